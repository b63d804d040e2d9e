"""Writing logged batches of episodes: a policy plays, and a Minari dataset is what `textrl.episodes` reads.

`textrl.episodes` says what such a dataset holds.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np
import torch

from .acting import evaluated_policy
from .agent import Agent
from .attaching import Masks, actor, attached, base_env, is_bare, paid_scores
from .config import check, check_type
from .disk import could_be_folder
from .env import observation_space
from .episodes import dataset_folder, minari_module, on_device, open_dataset, vocabulary_digest
from .models import few_threads
from .rollout import Rollout, collect_sampled
from .stepping import collect_stepped
from .stepwise import StepwiseLM
from .task import Task
from .wrappers import AnyEnv

if TYPE_CHECKING:
    from minari import MinariDataset
    from transformers import PreTrainedModel

EPISODES_AT_ONCE = 512


def collect(
    env: AnyEnv,
    model: Agent | PreTrainedModel | str | Path,
    episodes: int,
    dataset: str | Path,
    seed: int = 0,
) -> MinariDataset:
    """Plays episodes and writes them as a Minari dataset.

    Args:
        env: a textrl environment, single or vector. A wrapped one is stepped, and rounded up to a multiple of its rows.
        model: who acts, inside the task's action masks: an agent (NLPO inside its own too; of BestOfN, what draws its
            samples, whose log-probabilities are known), a language model, its folder or name.
        episodes: how many, at least 1.
        dataset: where they go: an id that ends in a version ("textrl/copy/random-v0"), kept where Minari keeps its
            datasets (`MINARI_DATASETS_PATH`, or `~/.minari/datasets`); else, and for every `Path`, a new folder.
        seed: of the prompts and the samples.

    Returns:
        the dataset, as Minari reads it.

    Raises:
        ValueError: for a dataset that exists already, or fewer than one episode.
    """
    check_type("episodes", episodes, "int")
    check("episodes", episodes, episodes >= 1, "at least 1")
    check_type("seed", seed, "int")
    check("seed", seed, seed >= 0, "at least 0")
    base = base_env(env)
    policy, narrow = evaluated_policy(model, base)
    rng, generator = np.random.default_rng([seed, 2]), torch.Generator().manual_seed(int(seed))
    folder = dataset_folder(dataset)
    new = not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
    check("dataset", str(folder), new, "a new folder, or one that is empty")
    check("dataset", str(folder), could_be_folder(folder), "in a folder that can be written")
    stepper = StepwiseLM(policy)
    storage: Any = None  # made when there is something to write
    last: list[Masks] = []
    with few_threads(policy.model), _whole(folder), attached(env, stepper, last) as missing:
        while storage is None or storage.total_episodes < episodes:
            size = min(EPISODES_AT_ONCE, episodes - (0 if storage is None else int(storage.total_episodes)))
            if is_bare(env):
                rollout = collect_sampled(base, policy, size, rng=rng, generator=generator, narrow=narrow)
            else:
                rollout = collect_stepped(
                    env,
                    base.task,
                    actor(env, stepper, base.temperature, generator, narrow, last),
                    size,
                    device=policy.device,
                    seed=seed if storage is None else None,
                    missing_penalty=missing,
                )
                rollout.scores = paid_scores(rollout, env)
            if storage is None:
                storage = _new_storage(dataset, env, type(model).__name__)
            storage.update_episodes(_buffers(rollout, base.task))
    return open_dataset(storage.data_path.parent)


@contextmanager
def _whole(folder: Path) -> Iterator[None]:
    """Takes the new dataset in a folder away where something fails before it is whole."""
    try:
        yield
    except BaseException:
        shutil.rmtree(folder / "data", ignore_errors=True)
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
        raise


def _new_storage(dataset: str | Path, env: AnyEnv, algorithm: str) -> Any:
    minari, base, folder = minari_module(), base_env(env), dataset_folder(dataset)
    from minari.dataset.minari_storage import MinariStorage
    from minari.namespace import create_namespace, list_local_namespaces

    named = folder != Path(dataset).absolute()
    namespace = os.path.dirname(dataset) if named else ""
    if namespace and namespace not in list_local_namespaces():
        create_namespace(namespace)
    folder.mkdir(parents=True, exist_ok=True)
    spec = env.spec if isinstance(env, gym.Env) else None
    try:
        spec = None if spec is None else gym.envs.registration.EnvSpec.from_json(spec.to_json())
    except (TypeError, ValueError):  # a spec that holds a model cannot be written
        spec = None
    storage = MinariStorage.new(
        folder / "data",
        observation_space=observation_space(base.task),
        action_space=gym.spaces.Discrete(base.task.vocab_size),
        env_spec=spec,
        jpeg_encoding=False,
    )
    name = dataset if named else folder.name
    facts = {
        "kl_coef": base.kl_coef,
        "temperature": base.temperature,
        "eos_token_id": base.task.eos_token_id,
        "max_prompt_tokens": base.task.max_prompt_tokens,
        "vocabulary": vocabulary_digest(base.task),
    }
    storage.update_metadata(
        {"dataset_id": str(name), "minari_version": minari.__version__, "algorithm_name": algorithm, "textrl": facts}
    )
    return storage


def _buffers(rollout: Rollout, task: Task) -> Iterator[Any]:
    """The episodes as Minari writes them."""
    from minari.data_collector import EpisodeBuffer

    space = observation_space(task)
    moved = on_device(rollout, torch.device("cpu"))
    starts, lengths = moved.prompt_lengths.tolist(), moved.response_lengths.tolist()
    columns = {"logprob": moved.logprobs.numpy()}
    if moved.ref_logprobs is not None:
        columns["ref_logprob"] = moved.ref_logprobs.numpy()
    cut_off = [False] * len(starts) if moved.truncated is None else moved.truncated.tolist()
    for i, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        tokens = moved.tokens[i, : start + length].numpy()
        observations = np.full((length + 1, *space.shape), task.vocab_size, dtype=np.int64)  # (n + 1, L)
        for t in range(length + 1):
            observations[t, : start + t] = tokens[: start + t]
        ended = np.arange(length) == length - 1
        infos = {name: np.concatenate([[np.float32(0)], values[i, :length]]) for name, values in columns.items()}
        infos["score"] = np.full(length + 1, np.nan, dtype=np.float32)
        infos["score"][-1] = moved.scores[i]
        yield EpisodeBuffer(
            options={"row": json.dumps(moved.rows[i], default=str)},
            observations=observations,
            actions=tokens[start:],
            rewards=moved.rewards[i, :length].numpy(),
            terminations=ended & (not cut_off[i]),
            truncations=ended & cut_off[i],
            infos=infos,
        )
