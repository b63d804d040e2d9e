"""Logged batches: exact round trips, readable by Minari alone."""

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

minari = pytest.importorskip("minari")

import textrl  # noqa: E402
from textrl.agents import BPO, REINFORCE  # noqa: E402
from textrl.batch import batched_logprobs  # noqa: E402
from textrl.collecting import collect  # noqa: E402
from textrl.envs.copy import Copy  # noqa: E402
from textrl.episodes import as_episodes, open_dataset, read_episodes  # noqa: E402
from textrl.models import small_model  # noqa: E402
from textrl.ope import ope  # noqa: E402
from textrl.policy import CausalPolicy  # noqa: E402
from textrl.rollout import Rollout, collect_sampled  # noqa: E402
from textrl.symbols import symbol_tokenizer  # noqa: E402


class Vowels(textrl.Task):
    """Share of vowels; two prompts and a column beside them."""

    def __init__(self) -> None:
        super().__init__(tokenizer=symbol_tokenizer("abcd"), max_new_tokens=4)

    def prompts(self) -> list[dict[str, Any]]:
        return [{"prompt": "", "bonus": 0.5}, {"prompt": "bcd", "bonus": 0.25}]

    def score(self, prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        return [text.count("a") / 4 + bonus for text, bonus in zip(completions, columns["bonus"], strict=True)]


@pytest.fixture(autouse=True)
def datasets_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    yield


def make(kl_coef: float = 0.1, seed: int = 1) -> tuple[textrl.TextEnv, Any]:
    task = Vowels()
    model = small_model(task.vocab_size, 8, seed)
    reference = small_model(task.vocab_size, 8, 9) if kl_coef else None
    return textrl.TextEnv(task, reference=reference, kl_coef=kl_coef), model


def same(a: Rollout, b: Rollout) -> None:
    for name in ("tokens", "prompt_lengths", "action_mask", "logprobs", "ref_logprobs", "rewards", "scores", "stopped"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    assert a.rows == b.rows
    assert a.completions == b.completions


def test_tokens_logprobs_and_rewards_come_back_exactly(tmp_path: Path) -> None:
    env, model = make()
    collect(env, model, 40, tmp_path / "batch", seed=3)
    sampled = collect_sampled(
        env,
        CausalPolicy(model, env.task.vocab_size),
        40,
        rng=np.random.default_rng([3, 2]),
        generator=torch.Generator().manual_seed(3),
    )
    same(read_episodes(str(tmp_path / "batch"), env.task), sampled)


def test_minari_loads_it_by_its_id() -> None:
    env, model = make(kl_coef=0)
    written = collect(env, model, 5, "toy/vowels/random-v0")
    loaded = minari.load_dataset("toy/vowels/random-v0")
    assert loaded.id == written.id == "toy/vowels/random-v0"
    assert (loaded.total_episodes, loaded.total_steps) == (5, read_episodes(loaded).num_tokens)
    assert loaded.observation_space == env.observation_space and loaded.action_space == env.action_space
    assert "toy/vowels/random-v0" in minari.list_local_datasets()
    for episode in loaded.iterate_episodes():
        assert episode.terminations.tolist() == [False] * (len(episode) - 1) + [True]
        assert not episode.truncations.any()
        assert all(observation in env.observation_space for observation in episode.observations)
        env.reset(seed=0)
        assert episode.infos["score"][-1] == pytest.approx(episode.rewards.sum())  # no penalty here


def test_an_episode_replays_in_the_environment() -> None:
    env, model = make()
    dataset = collect(env, model, 6, "toy/replay-v0", seed=4)
    rollout = read_episodes(dataset, env.task)
    env.policy = lambda o: (
        CausalPolicy(model, env.task.vocab_size)
        .logits(
            CausalPolicy(model, env.task.vocab_size).hidden(
                torch.from_numpy(o[:, : (o != env.task.vocab_size).sum()]),
                torch.tensor([0]),
                torch.tensor([int((o != env.task.vocab_size).sum()) - 1]),
            )
        )
        .detach()
    )
    for episode, row in zip(dataset.iterate_episodes(), rollout.rows, strict=True):
        observation, _ = env.reset(options={"row": row})
        for t, action in enumerate(episode.actions):
            np.testing.assert_array_equal(observation, episode.observations[t])
            observation, reward, terminated, _, info = env.step(int(action))
            assert reward == pytest.approx(float(episode.rewards[t]), abs=1e-5)
            assert info["ref_logprob"] == pytest.approx(float(episode.infos["ref_logprob"][t + 1]), abs=1e-5)
        np.testing.assert_array_equal(observation, episode.observations[-1])
        assert terminated and info["score"] == pytest.approx(float(episode.infos["score"][-1]))


def test_logged_logprobs_are_those_of_the_policy(tmp_path: Path) -> None:
    env, model = make()
    rollout = read_episodes(collect(env, model, 30, tmp_path / "batch"))
    again = batched_logprobs(CausalPolicy(model, env.task.vocab_size), rollout, 64)
    torch.testing.assert_close(rollout.logprobs, again, atol=1e-5, rtol=0)


class Doubled(gym.Wrapper[Any, Any, Any, Any]):
    def step(self, action: Any) -> Any:
        observation, reward, *rest = self.env.step(action)
        return observation, 2 * float(reward), *rest


def test_a_wrapped_environment_is_stepped_and_its_rewards_are_kept() -> None:
    env, model = make(kl_coef=0)
    rollout = read_episodes(collect(Doubled(env), model, 7, "toy/doubled-v0"), env.task)
    assert len(rollout) == 7
    torch.testing.assert_close(
        rollout.rewards.sum(1), rollout.scores
    )  # what offline agents learn from is what was paid
    plain = read_episodes(collect(gym.Wrapper(env), model, 7, "toy/plain-v0"), env.task)
    assert plain.completions == rollout.completions and plain.scores.any()
    torch.testing.assert_close(rollout.scores, 2 * plain.scores)


def test_one_seed_one_batch() -> None:
    env, model = make()
    first, second, other = (
        read_episodes(collect(env, model, 8, f"toy/seed-v{i}", seed=seed), env.task) for i, seed in enumerate((0, 0, 1))
    )
    same(first, second)
    assert first.completions != other.completions


def test_an_agent_can_be_asked() -> None:
    class Still(textrl.Agent):
        def update(self, rollout: Rollout) -> dict[str, float]:
            return {}

    env, model = make()
    from_agent = read_episodes(collect(env, Still(env, copy.deepcopy(model), device="cpu"), 8, "toy/agent-v0"))
    same(from_agent, read_episodes(collect(env, model, 8, "toy/model-v0")))


def test_rows_become_episodes() -> None:
    task = Vowels()
    rows = [
        {"prompt": "bcd", "completion": "ab", "bonus": 0.25},
        {"prompt": "", "completion_ids": [1, 1, 1, 1], "bonus": 0.5},
    ]
    rollout = as_episodes(rows, task, torch.device("cpu"))
    assert rollout.tokens.tolist() == [[0, 2, 3, 4, 1, 2, 0], [0, 1, 1, 1, 1, 0, 0]]
    assert rollout.stopped.tolist() == [True, False]
    assert rollout.scores.tolist() == [0.5, 1.5]  # 1/4 + 1/4; 4/4 + 1/2
    assert rollout.logprobs[0, :3].isnan().all()


def test_what_is_wrong_is_said(tmp_path: Path) -> None:
    env, model = make()
    with pytest.raises(ValueError, match="episodes must be at least 1; got 0"):
        collect(env, model, 0, tmp_path / "a")
    with pytest.raises(ValueError, match="there is none at"):
        open_dataset(tmp_path / "nowhere")
    (tmp_path / "p.txt").touch()
    with pytest.raises(ValueError, match=r"or a file that ends in one of .json, .*p.txt', a file of another kind$"):
        as_episodes(tmp_path / "p.txt", Vowels(), torch.device("cpu"))
    none = collect(env, model, 1, tmp_path / "b").filter_episodes(lambda episode: False)
    with pytest.raises(ValueError, match="dataset must be one with episodes"):
        read_episodes(none)
    with pytest.raises(ValueError, match="dataset must be a new folder"):
        collect(env, model, 1, tmp_path / "b")
    env.task.score = lambda **columns: 1 / 0
    with pytest.raises(ValueError, match="ZeroDivisionError"):
        collect(env, model, 1, tmp_path / "c")
    assert not (tmp_path / "c").exists()
    with pytest.raises(ValueError, match="dataset row 0, column 'prompt' is missing"):
        as_episodes([{"completion": "a"}], env.task, torch.device("cpu"))


def test_a_collection_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def score(self: Any, prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        calls.append(len(prompts))
        if len(calls) > 1:
            raise KeyboardInterrupt
        return [0.0] * len(prompts)

    monkeypatch.setattr(Copy, "score", score)
    env = textrl.TextEnv(Copy())
    with pytest.raises(KeyboardInterrupt):
        textrl.collect(env, small_model(4, 8), 600, tmp_path / "logged")
    assert len(calls) == 2 and not (tmp_path / "logged").exists()


@pytest.mark.parametrize("kl_coef", [0.0, 0.5])
def test_what_a_wrapper_pays_is_what_is_logged(tmp_path: Path, kl_coef: float) -> None:
    reference = {"reference": small_model(4, 8, 2), "kl_coef": kl_coef} if kl_coef else {}
    inner = textrl.TextEnv(Copy(), **reference)  # type: ignore[arg-type]
    turned = gym.wrappers.TransformReward(inner, lambda reward: -reward)
    found = read_episodes(collect(turned, small_model(4, 8), 40, tmp_path / "turned"))
    same = gym.wrappers.TransformReward(inner, lambda reward: reward)
    plain = read_episodes(collect(same, small_model(4, 8), 40, tmp_path / "same"))
    assert plain.scores.tolist() == inner.task.evaluate(plain.rows, plain.responses.tolist()).totals.tolist()
    if not kl_coef:
        assert found.scores.tolist() == (-plain.scores).tolist() and plain.scores.any()
    else:  # a wrapper that turns the penalty too pays for the distance from the reference
        assert found.ref_logprobs is not None
        kl = (found.logprobs - found.ref_logprobs).sum(1)
        assert torch.allclose(found.scores, -plain.scores + 2 * kl_coef * kl, atol=1e-4)
        assert not torch.allclose(found.scores, plain.scores)


def test_a_time_limit_is_logged_and_the_environment_left_as_it_was(tmp_path: Path) -> None:
    env = gym.wrappers.TimeLimit(textrl.TextEnv(Copy()), 2)
    found = read_episodes(collect(env, small_model(4, 8), 20, tmp_path / "cut"))
    assert found.truncated is not None and 0 < found.truncated.sum() < 20
    assert not (found.truncated & found.stopped).any()
    assert env.unwrapped.policy is None  # type: ignore[attr-defined]
    for episode in minari.MinariDataset(tmp_path / "cut" / "data").iterate_episodes():
        assert episode.terminations[-1] != episode.truncations[-1]


def test_episodes_that_were_cut_off_are_not_learned_from_nor_judged(tmp_path: Path) -> None:
    model, what = small_model(4, 8), r"dataset must be whole episodes, .*; got '\d+ of 20 episodes that were cut off"
    dataset = collect(gym.wrappers.TimeLimit(textrl.TextEnv(Copy()), 2), model, 20, tmp_path / "cut")
    with pytest.raises(ValueError, match=what):
        BPO(textrl.TextEnv(Copy()), dataset=dataset)
    with pytest.raises(ValueError, match=what):
        ope(dataset, model, textrl.TextEnv(Copy()))


def tall(task: Any, layers: int) -> LlamaForCausalLM:
    torch.manual_seed(layers)
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": layers, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=task.vocab_size, bos_token_id=0, eos_token_id=0, **shape))


def test_what_another_agents_model_made_of_a_rollout_stays_behind() -> None:
    task = Copy(length=2)
    other = REINFORCE(textrl.TextEnv(task), tall(task, 3), trainable_layers=1, batch_size=8, device="cpu")
    rollout = other.collect()
    assert rollout.below is not None
    for dataset in (rollout, replace(rollout, below=None)):
        agent = BPO(textrl.TextEnv(task), tall(task, 2), trainable_layers=1, dataset=dataset, device="cpu")
        assert agent._logged is not None and agent._logged.below is None


def test_a_dataset_of_other_tokens_is_refused(tmp_path: Path) -> None:
    class Turned(Copy):
        def __init__(self) -> None:
            super().__init__(symbols="cba")

    dataset = collect(textrl.TextEnv(Copy()), small_model(4, 8), 4, tmp_path / "logged")
    with pytest.raises(ValueError, match="task must be one whose tokens are those of the dataset; got 'Turned'"):
        read_episodes(dataset, Turned())


def test_a_dataset_that_is_too_long_for_a_task_is_refused(tmp_path: Path) -> None:
    env, model = make()
    data = collect(env, model, 20, tmp_path / "long")
    short = Vowels()
    short.max_new_tokens = 1
    with pytest.raises(ValueError, match=r"task.max_new_tokens must be at least 4, as the dataset needs it; got 1"):
        read_episodes(data, short)


def test_masks_of_the_agent_that_was_logged_stay_behind() -> None:
    env, model = make()
    rollout = collect_sampled(
        env, CausalPolicy(model, env.task.vocab_size), 8, rng=np.random.default_rng(0), generator=torch.Generator()
    )
    rollout.allowed = torch.ones(*rollout.action_mask.shape, env.task.vocab_size, dtype=torch.bool)
    assert as_episodes(rollout, env.task, torch.device("cpu")).allowed is None
