"""RLHF: the three steps from a pretrained model and human ratings to a policy people prefer (Ouyang 2022).

    1. SFT: the cross-entropy of review sentences
    2. reward model: -log sigmoid(r(chosen) - r(rejected)) on pairs of sentences that people rated apart
    3. PPO: the reward model's score at the end, a per-token KL penalty to the SFT model, the critic from the
       reward model

Each step leaves its model in the run's folder, and checkpoints on the way: a run that was stopped or killed goes on
from the last of them, and on the CPU ends with the same weights. At the end stands a report: `report.html` and
`report.json`.
"""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import torch
from datasets import Dataset
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from textrl import fetch
from textrl.adapters import new_scalar
from textrl.config import check
from textrl.disk import could_be_folder, read_json, write_json
from textrl.env import TextEnv
from textrl.models import cast, load_model, pick_device, pick_dtype
from textrl.probing import longest_text
from textrl.ratings import human_ceiling, load_ratings, openings, rating_groups
from textrl.render import escape
from textrl.reward_training import RewardModelConfig, train_reward_model
from textrl.rewards import RewardModel
from textrl.rollout import Rollout, policy_in, sample_episodes
from textrl.runs import RUN, Checkpoints

from .ppo import PPO
from .rlhf_config import RLHFConfig as RLHFConfig
from .rlhf_report import LOGS, REPORT, compare, second_judge, write_page
from .sft import SFT


def rlhf(config: RLHFConfig) -> dict[str, Any]:
    """Runs the three steps and writes the report; steps that are whole in `log_dir` already are not run again.

    Raises:
        ValueError: where `log_dir` holds a run with other settings, or the model cannot be loaded.
        FetchError: where the model or the ratings cannot be fetched.
    """
    run = _Run(config)
    for number, step in enumerate((run.sft, run.reward_model, run.ppo), 1):
        run.step(number, step)
    return run.report()


class _Run:
    """One run's folder, its models and how far it is."""

    def __init__(self, config: RLHFConfig) -> None:
        self.config, self.folder = config, Path(config.log_dir)
        check("log_dir", config.log_dir, could_be_folder(self.folder), "a folder, or a new one that can be made")
        self._seconds = self._found()
        source = config.model or str(fetch.smollm2())
        base = load_model(source)
        parameters = sum(p.numel() for p in base.parameters())
        self.device = pick_device(config.device)
        self.dtype = pick_dtype(config.dtype, self.device, parameters)
        self.base: PreTrainedModel = cast(base, self.dtype, self.device)
        with torch.device("meta"):
            new_scalar(self.base.config)  # refused here, where there is none
        self.tokenizer: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(source)
        second_judge()  # refused here, where it is missing
        self.ratings = load_ratings(("movie", "product"))
        self._choose_data()
        self.about = f"{Path(source).name}: {parameters / 1e6:.0f}M parameters in {self.dtype}, on {self.device}"
        print(escape(self.about), flush=True)
        if not (self.folder / RUN).exists():  # nothing is written before all is at hand
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self.folder / RUN, {"config": self._settings(), "seconds": {}})

    def _settings(self) -> dict[str, Any]:
        return {name: value for name, value in dataclasses.asdict(self.config).items() if name != "log_dir"}

    def _found(self) -> dict[str, float]:
        """The seconds that each step of a run in the folder took, once its settings are seen to be the same."""
        file, settings = self.folder / RUN, self._settings()
        if file.exists():
            try:
                found = read_json(file)
                had, seconds = dict(found["config"]), dict(found["seconds"])
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(
                    f"log_dir holds a {RUN} that textrl rlhf did not write: {str(file)!r} ({error})"
                ) from None
            changed = sorted(k for k in settings if had.get(k) != settings[k])
            if changed:
                raise ValueError(
                    f"log_dir {str(self.folder)!r} holds a run with another {', '.join(changed)}:"
                    " choose a new folder, or the same settings to go on"
                )
            return seconds
        return {}

    def step(self, number: int, step: Callable[[Path], None]) -> None:
        """Runs one step unless its checkpoint is there already."""
        name = step.__name__
        checkpoints = Checkpoints(self.folder / LOGS / name, keep=1)
        if (self.folder / name).exists():
            checkpoints.clear()
            print(f"step {number} of 3, {name}: done already", flush=True)
            return
        print(f"step {number} of 3, {name}", flush=True)
        began = time.perf_counter()
        step(self.folder / name)
        checkpoints.clear()
        self._seconds[name] = round(time.perf_counter() - began, 1)
        saved = read_json(self.folder / RUN)
        write_json(self.folder / RUN, {**saved, "seconds": self._seconds})

    def saving(self, name: str, work: int) -> dict[str, Any]:
        """Where a step logs and saves: twice in the default length, however long this run is, and at a signal."""
        folder = self.folder / LOGS / name
        return {
            "log_dir": folder,
            "progress_bar": True,
            "checkpoint_every": max(1, work // 2),
            "keep": 1,
            "resume": True,
        }

    def planned(self, work: int) -> int:
        """An amount of work planned for the default length, scaled to `minutes`."""
        return max(1, round(work * self.config.minutes / RLHFConfig.minutes))

    def sentences(self, *splits: str) -> Dataset:
        """Movie-review sentences."""
        return self.ratings.filter(lambda row: row["split"] in splits and row["source"] == "movie")

    def _choose_data(self) -> None:
        """What steps and report read, before the first step: settings that leave nothing of it are refused here."""
        config, size = self.config, self.config.reward_group_size
        train = self.ratings.filter(lambda row: row["split"] == "train" and self.short(row["text"]))
        test = self.ratings.filter(lambda row: row["split"] == "test")
        wanted = self.planned(config.reward_groups)
        try:
            self.pairs = rating_groups(train, config.pair_gap, wanted, size, config.seed)
            self.test_pairs = rating_groups(test, config.pair_gap, config.eval_groups, size, seed=0)
        except ValueError as error:
            raise ValueError(
                f"pair_gap, reward_group_size and max_words must leave pairs of sentences: {error}"
            ) from None
        try:
            chosen = openings(self.sentences("validation"), config.opening_words, seed=config.seed)["prompt"]
            self.prompts = chosen[: config.eval_episodes]  # that the reward model's scores are standardised on
            self.test_prompts = openings(self.sentences("test"), config.opening_words, seed=0)["prompt"]
        except ValueError as error:
            raise ValueError(f"opening_words must leave openings of sentences: {error}") from None
        known = openings(self.sentences("validation", "train"), config.opening_words, seed=config.seed)["prompt"]
        held_out = set(self.test_prompts)
        self.ppo_prompts = [prompt for prompt in known if prompt not in held_out]
        lengths = map(len, self.tokenizer([*self.ppo_prompts, *chosen, *self.test_prompts])["input_ids"])
        room = longest_text(self.base) - max(lengths) - 1  # a begin token
        right = f"at most {room}, which is what the model can read after an opening"
        check("max_new_tokens", config.max_new_tokens, config.max_new_tokens <= room, right)
        self.reward_epochs = max(1, round(wanted / (1 + max(self.pairs["group"]))))  # where there are fewer than wanted

    def short(self, text: str) -> bool:
        """Whether a sentence is short enough to learn from."""
        return len(text.split()) <= self.config.max_words

    def env(self, prompts: Sequence[str], reward: Any, reference: PreTrainedModel | None, horizon: int) -> Any:
        """`textrl/Text-v0` on these prompts."""
        return gym.make(
            "textrl/Text-v0",
            disable_env_checker=True,
            tokenizer=self.tokenizer,
            prompts=list(prompts),
            reward=reward,
            max_new_tokens=horizon,
            reference=reference,
            kl_coef=0.0 if reference is None else self.config.kl_coef,
            temperature=self.config.temperature,
        )

    def load(self, name: str) -> PreTrainedModel:
        """The language model that a step left."""
        return load_model(self.folder / name, dtype=self.dtype, device=self.device)

    def scorer(self) -> RewardModel:
        """The reward model that step 2 left."""
        model = RewardModel.load(self.folder / "reward_model")
        cast(model.model, self.dtype, self.device)
        return model

    def shared(self) -> dict[str, Any]:
        """The settings that both agents share."""
        names = ("trainable_layers", "seed", "device", "dtype")
        return {name: getattr(self.config, name) for name in names}

    def samples(self, env: Any, model: PreTrainedModel, prompts: Sequence[str]) -> Rollout:
        """One continuation of each prompt; the same random numbers for every model."""
        base: TextEnv = env.unwrapped
        policy = policy_in(base, model)
        generator = torch.Generator().manual_seed(self.config.seed + 1000)
        return sample_episodes(base, policy, [{"prompt": p} for p in prompts], generator=generator)

    # ---- the steps -------------------------------------------------------------------------------------------

    def sft(self, folder: Path) -> None:
        """Step 1: review sentences, from their first word to the end token."""
        config = self.config
        rows = [self._begun(text) for text in self.sentences("train")["text"] if self.short(text)]
        prompts = sorted({row["prompt"] for row in rows})
        env = self.env(prompts, lambda completions: [0.0] * len(completions), None, 2 * config.max_words)
        agent = SFT(
            env,
            self.base,
            dataset=rows,
            learning_rate=config.sft_learning_rate,
            batch_size=config.sft_batch_size,
            **self.shared(),
        )
        agent.learn(self.planned(config.sft_timesteps), **self.saving("sft", config.sft_timesteps))
        agent.save(folder)

    def _begun(self, text: str) -> dict[str, str]:
        """A sentence to learn from: all of it, or all but its first word where a tokenizer has no begin token."""
        if self.tokenizer.bos_token_id is not None:
            return {"prompt": "", "completion": text}
        first = text.split()[0]
        return {"prompt": first, "completion": text.split(first, 1)[1]}

    def reward_model(self, folder: Path) -> None:
        """Step 2: pairs of sentences that people rated apart; scores of mean 0, std 1 on the SFT model's samples."""
        config, sft = self.config, self.load("sft")
        model = RewardModel.from_language_model(sft, self.tokenizer, seed=config.seed)
        settings = RewardModelConfig(
            learning_rate=config.reward_learning_rate,
            batch_size=1,
            epochs=self.reward_epochs,
            trainable_layers=config.trainable_layers,
            seed=config.seed,
        )
        whole = len(self.pairs) * self.reward_epochs * config.reward_groups // self.planned(config.reward_groups)
        train_reward_model(model, self.pairs, settings, **self.saving(folder.name, whole))
        prompts = self.prompts
        drawn = self.samples(self.env(prompts, model, None, config.max_new_tokens), sft, prompts)
        model.standardise(prompts, drawn.completions)
        model.save(folder)

    def ppo(self, folder: Path) -> None:
        """Step 3: PPO on openings that the report does not use."""
        config, sft, scorer = self.config, self.load("sft"), self.scorer()
        agent = PPO(
            self.env(self.ppo_prompts, scorer, sft, config.max_new_tokens),
            copy.deepcopy(sft),
            critic=scorer,
            learning_rate=config.ppo_learning_rate,
            batch_size=config.ppo_batch_size,
            epochs=config.ppo_epochs,
            minibatches=config.ppo_minibatches,
            adam_beta2=0.999,  # PPO's own 0.95 was measured on small models only
            score_start=1.0,  # it starts close to where it ends: there is no first good response to settle on
            **self.shared(),
        )
        agent.learn(self.planned(config.ppo_timesteps), **self.saving("ppo", config.ppo_timesteps))
        agent.save(folder)

    # ---- the report ------------------------------------------------------------------------------------------

    def report(self) -> dict[str, Any]:
        """Compares the SFT model and the PPO policy on held-out openings and writes the report."""
        print("report", flush=True)
        config, sft, policy, scorer = self.config, self.load("sft"), self.load("ppo"), self.scorer()
        pairs, prompts = self.test_pairs, self.test_prompts[: config.eval_episodes]
        env = self.env(prompts, scorer, sft, config.max_new_tokens)
        out: dict[str, Any] = {
            "model": self.about,
            "openings": len(prompts),
            "reward_model": {
                "pair_gap": config.pair_gap,
                "pairs": len(pairs),
                "accuracy": scorer.accuracy(pairs),
                "human_ceiling": human_ceiling(pairs),
            },
            **compare(prompts, self.samples(env, sft, prompts), self.samples(env, policy, prompts)),
            "seconds": {**self._seconds, "all": round(sum(self._seconds.values()), 1)},
            "config": dataclasses.asdict(config),
        }
        said = write_page(self.folder, out)
        write_json(self.folder / REPORT, out)
        print(f"{said} and {escape(str(self.folder / REPORT))}")
        return out
