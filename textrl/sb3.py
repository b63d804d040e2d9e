"""Stable-Baselines3: our batched environment as its `VecEnv`, and a causal language model as its policy."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from gymnasium.vector import AutoresetMode
from numpy.typing import NDArray
from stable_baselines3.common.distributions import CategoricalDistribution, Distribution
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor, nn

from .config import check
from .models import load_model
from .policy import CausalPolicy, values_at
from .scalars import value_model
from .scores import shorten
from .vector import TextVectorEnv

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Indices = int | Iterable[int] | None


class TextVecEnv(VecEnv):
    """A `TextVectorEnv` for Stable-Baselines3: one batch, one reference model, no processes.

    Args:
        envs: in SAME_STEP autoreset mode.

    Raises:
        ValueError: for another mode, with the keyword that sets the right one.
    """

    def __init__(self, envs: TextVectorEnv) -> None:
        base = envs.unwrapped
        if not isinstance(base, TextVectorEnv) or base.autoreset_mode != AutoresetMode.SAME_STEP:
            raise ValueError(
                'envs must be a TextVectorEnv made with autoreset_mode="SAME_STEP", as Stable-Baselines3 resets;'
                f" got {envs} with {getattr(base, 'autoreset_mode', None)}"
            )
        self.envs, self._actions = envs, np.zeros(envs.num_envs, dtype=np.int64)
        super().__init__(envs.num_envs, base.single_observation_space, base.single_action_space)

    def reset(self) -> NDArray[np.int64]:
        """Starts new episodes, with the seeds that `seed` set: (N, L)."""
        options = self._options[0] or None
        alike = all(each == self._options[0] for each in self._options)
        check("options", self._options, alike, "the same for every row: one prompt is for all of them")
        observations, infos = self.envs.reset(seed=list(self._seeds), options=options)
        self.reset_infos = self._split(infos)
        self._reset_seeds()
        self._reset_options()
        return observations

    def step_async(self, actions: NDArray[np.int64]) -> None:
        """Takes the actions."""
        self._actions = actions

    def step_wait(self) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.bool_], list[dict[str, Any]]]:
        """Steps: observations (N, L), rewards (N,), ended (N,) and N infos with `terminal_observation`."""
        observations, rewards, terminated, truncated, infos = self.envs.step(self._actions)
        final = self._split(infos.pop("final_info", {}))
        last = infos.pop("final_obs", None)
        infos.pop("_final_info", None), infos.pop("_final_obs", None)
        split = self._split(infos)
        for i in np.flatnonzero(terminated | truncated).tolist():
            cut = bool(truncated[i] and not terminated[i])
            self.reset_infos[i] = split[i]  # of the episode that begins
            ended = {**final[i], "terminal_observation": last[i], "TimeLimit.truncated": cut}
            if "episode" in split[i]:  # Gymnasium's RecordEpisodeStatistics, about the one that ended
                ended["episode"] = self.reset_infos[i].pop("episode")
            split[i] = ended
        return observations, rewards.astype(np.float32), terminated | truncated, split

    def _split(self, infos: dict[str, Any]) -> list[dict[str, Any]]:
        out: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        for key, values in infos.items():
            if not key.startswith("_"):
                for i in np.flatnonzero(infos[f"_{key}"]).tolist():
                    nested = isinstance(values, dict)
                    out[i][key] = {k: v[i] for k, v in values.items() if k[0] != "_"} if nested else values[i]
        return out

    def close(self) -> None:
        """Closes the environment."""
        self.envs.close()

    def get_attr(self, attr_name: str, indices: Indices = None) -> list[Any]:
        """The attribute, once for each row: there is one environment."""
        return [getattr(self.envs.unwrapped, attr_name) for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: Indices = None) -> None:
        """Sets an attribute, for all rows.

        Raises:
            ValueError: for some of them.
        """
        every = sorted(self._get_indices(indices)) == list(range(self.num_envs))
        check("indices", indices, every, f"None or all {self.num_envs} rows: they are one environment")
        setattr(self.envs.unwrapped, attr_name, value)

    def env_method(self, method_name: str, *args: Any, indices: Indices = None, **kwargs: Any) -> list[Any]:
        """Calls a batched method (`action_masks`) and gives each row its part."""
        out = getattr(self.envs.unwrapped, method_name)(*args, **kwargs)
        return [out[i] for i in self._get_indices(indices)]

    def env_is_wrapped(self, wrapper_class: type[Any], indices: Indices = None) -> list[bool]:
        """False: rows are not wrapped one by one."""
        return [False for _ in self._get_indices(indices)]

    def get_images(self) -> Sequence[NDArray[np.uint8] | None]:
        """The rows' pictures, with render_mode "rgb_array"."""
        return self.envs.render() or [None] * self.num_envs


class CausalLMPolicy(ActorCriticPolicy):
    """A causal language model as the actor, a copy of its trunk with a scalar head as the critic.

    The action's distribution is the model's next-token distribution at the environment's temperature, so that PPO and
    A2C of Stable-Baselines3 fine-tune the model itself. Every state is read from its start: simple, and slower than our
    own agents. Use as `PPO(CausalLMPolicy, env, policy_kwargs={"model": model})`.

    Args:
        observation_space: of the environment.
        action_space: of the environment.
        lr_schedule: given by Stable-Baselines3.
        model: a `PreTrainedModel`, or the name or folder of one; it is trained in place.
        temperature: divides the logits; the same as the environment's.
        kwargs: of `ActorCriticPolicy`; the ones that describe an MLP have no effect.
    """

    def __init__(
        self,
        observation_space: Any,
        action_space: Any,
        lr_schedule: Callable[[float], float],
        *,
        model: PreTrainedModel | str,
        temperature: float = 1.0,
        **kwargs: Any,
    ) -> None:
        size = int(getattr(action_space, "n", 0))
        high = np.asarray(getattr(observation_space, "high", -1))
        right = f"of a textrl environment, token ids below {size} and {size} where nothing is written"
        check("observation_space", observation_space, high.ndim == 1 and bool((high == size).all()), right)
        super().__init__(observation_space, action_space, lr_schedule, **kwargs)
        self.vocab_size, self.temperature = size, temperature
        self.language_model: nn.Module = load_model(model)
        self.critic: nn.Module = value_model(load_model(model))
        settings = {"lr": lr_schedule(1), **self.optimizer_kwargs}
        self.optimizer = self.optimizer_class(self.parameters(), **settings)

    def set_training_mode(self, mode: bool) -> None:
        """Nothing changes: a language model with dropout would say another thing each time it is asked."""
        super().set_training_mode(False)

    def _build(self, lr_schedule: Any) -> None:
        """No MLP: the constructor puts the language models in its place."""

    def _read(self, obs: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Observations (B, L) -> tokens (B, S), and the row and column of each last token, (B,).

        Raises:
            ValueError: for what is no text from the left.
        """
        given, obs = obs, obs.long()
        written = obs != self.vocab_size
        lengths = written.sum(1)
        fine = (obs == given).all() & (obs >= 0).all() & (obs <= self.vocab_size).all() & written[:, 0].all()
        if not fine or (written[:, 1:] > written[:, :-1]).any():
            right = f"token ids from the left, and {self.vocab_size} where nothing is written, as textrl shows them"
            raise ValueError(f"observation must be {right}; got {shorten(given.tolist())}")
        tokens = torch.where(written, obs, 0)[:, : int(lengths.max())]
        return tokens, torch.arange(len(obs), device=obs.device), lengths - 1

    def _distribution(self, tokens: Tensor, rows: Tensor, columns: Tensor) -> Distribution:
        policy = CausalPolicy(self.language_model, self.vocab_size, self.temperature)
        logits = policy.logits(policy.hidden(tokens, rows, columns)) / self.temperature  # (B, V)
        assert isinstance(self.action_dist, CategoricalDistribution)
        return self.action_dist.proba_distribution(action_logits=logits)

    def get_distribution(self, obs: Any) -> Distribution:
        """The next-token distribution at these observations, (B, L)."""
        return self._distribution(*self._read(obs))

    def predict_values(self, obs: Any) -> Tensor:
        """The critic's values, (B, 1)."""
        return values_at(self.critic, *self._read(obs))[:, None]

    def forward(self, obs: Any, deterministic: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Observations (B, L) -> actions (B,), values (B, 1), log-probabilities (B,)."""
        read = self._read(obs)
        distribution = self._distribution(*read)
        actions = distribution.get_actions(deterministic=deterministic)
        values = values_at(self.critic, *read)[:, None]
        return actions, values, distribution.log_prob(actions)

    def evaluate_actions(self, obs: Any, actions: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Values (B, 1), log-probabilities (B,) and entropies (B,) of actions (B,) at observations (B, L)."""
        read = self._read(obs)
        distribution = self._distribution(*read)
        values = values_at(self.critic, *read)[:, None]
        return values, distribution.log_prob(actions), distribution.entropy()

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return {**super()._get_constructor_parameters(), "model": self.language_model, "temperature": self.temperature}
