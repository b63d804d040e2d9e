"""Agents that learn from given data: losses by hand, pairs that stay together, and shares of the exact optimum."""

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from conftest import benchmark
from datasets import Dataset

import textrl
import textrl.envs.copy
from textrl.agents import BPO, DPO, SFT, BestOfN, ReST
from textrl.agents.best_of_n import best_of_groups, kl_bound
from textrl.agents.bpo import advantage_weights, best_of_each, truncated_advantages
from textrl.agents.dpo import ipo_loss, sigmoid_loss
from textrl.agents.rest import keep_weights
from textrl.batch import batched_logprobs, microbatches, prompt_groups
from textrl.exact import evaluate_exact
from textrl.models import small_model
from textrl.offline import Epochs, encode_response, given_rollout
from textrl.policy import CausalPolicy
from textrl.rollout import Rollout
from textrl.symbols import symbol_tokenizer

CPU = torch.device("cpu")


class Weighted(textrl.Task):
    """Each place of the response has a weight for each symbol; two prompts with weights of their own."""

    def __init__(self, seed: int = 0, length: int = 4, symbols: str = "abc") -> None:
        super().__init__(tokenizer=symbol_tokenizer(symbols), max_new_tokens=length)
        self.weights = np.random.default_rng(seed).normal(size=(2, length, len(symbols) + 1))

    def prompts(self) -> list[dict[str, Any]]:
        return [{"prompt": "a"}, {"prompt": "b"}]

    def score(self, prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        found = []
        for prompt, text in zip(prompts, completions, strict=True):
            ids = [ord(c) - ord("a") + 1 for c in text] + [0] * (self.max_new_tokens - len(text))
            table = self.weights["ab".index(prompt)]
            found.append(float(sum(table[t, token] for t, token in enumerate(ids))) / math.sqrt(len(ids)))
        return found


def reference(task: textrl.Task, seed: int) -> Any:
    model = small_model(task.vocab_size, task.max_prompt_tokens + task.max_new_tokens, seed + 10)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
    return model


OPTIMUM = benchmark("optimum")
sample = OPTIMUM.drawn


def bradley_terry(env: textrl.TextEnv, model: Any, pairs: int, seed: int) -> Dataset:
    return Dataset.from_list(OPTIMUM.labelled(env, model, pairs, seed))


# ---- given responses -------------------------------------------------------------------------------------------


def test_a_response_ends_with_the_end_token_unless_the_horizon_cuts_it() -> None:
    task = Weighted()
    assert encode_response(task, "a", "bc") == ([0, 1], [2, 3, 0])
    assert encode_response(task, "a", "bcbc") == ([0, 1], [2, 3, 2, 3])
    with pytest.warns(UserWarning, match="completions of more than max_new_tokens=4 tokens are cut there"):
        assert encode_response(task, "a", "bcbcb") == ([0, 1], [2, 3, 2, 3])
    assert encode_response(task, "a", "") == ([0, 1], [0])
    assert encode_response(task, "a", "bc", end_token=False) == ([0, 1], [2, 3])


def test_a_sampled_response_read_back_as_text_is_the_same_episode() -> None:
    task = Weighted()
    env = textrl.TextEnv(task)
    rollout = sample(env, small_model(4, 8, 0), 50, 0)
    for i, (row, text) in enumerate(zip(rollout.rows, rollout.completions, strict=True)):
        prompt, response = encode_response(task, row["prompt"], text)
        assert rollout.tokens[i, : len(prompt) + len(response)].tolist() == prompt + response
        assert rollout.response_lengths[i] == len(response)


def test_what_is_not_known_of_given_responses_is_nan_and_not_reported() -> None:
    rollout = given_rollout(Weighted(), [[0, 1], [0]], [[2, 0], [3]], CPU)
    assert rollout.logprobs[rollout.action_mask].isnan().all() and rollout.scores.isnan().all()
    assert rollout.stopped.tolist() == [True, False]
    assert rollout.metrics() == {"rollout/response_length": 1.5, "rollout/stopped": 0.5}
    assert prompt_groups(given_rollout(Weighted(), [[0, 1], [0], [0, 1]], [[2], [2], [2]], CPU)).tolist() == [0, 1, 0]


def test_every_example_comes_once_an_epoch() -> None:
    epochs = Epochs(torch.Generator().manual_seed(0))
    first, second = (torch.cat([epochs.take(4, 10), epochs.take(4, 10), epochs.take(2, 10)]) for _ in range(2))
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(10))
    assert first.tolist() != second.tolist()
    epochs.take(4, 10)
    assert sorted(epochs.take(3, 3).tolist()) == [0, 1, 2]  # other examples


def test_pairs_are_never_split_and_weigh_the_same() -> None:
    task = Weighted()
    responses = [[1, 0], [2, 2, 2, 2], [1, 1, 1, 0], [0], [3], [3, 0]]
    batch = given_rollout(task, [[0, 1]] * 6, responses, CPU, group_size=2)
    parts = [part.tolist() for part in microbatches(batch, 12, 2)]
    assert sorted(i for part in parts for i in part) == list(range(6))
    assert len(parts) == 3 and all(part[0] % 2 == 0 and part[1] == part[0] + 1 for part in parts)

    def run(tokens: int) -> tuple[dict[str, float], list[torch.Tensor]]:
        agent = BestOfN(textrl.TextEnv(task), small_model(4, 6, 0), device="cpu", max_tokens_per_microbatch=tokens)
        agent.optimizer.step = lambda: 0.0  # type: ignore[method-assign]

        def loss(piece: Rollout) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            sums = agent.logprobs(piece).sum(1).view(-1, 2)
            value = (sums[:, 0] - 2 * sums[:, 1]).mean()
            return value, {"again": value}

        numbers = agent.minimise(loss, batch, mean_over="groups")
        return numbers, [p.grad.clone() for p in agent.model.parameters()]

    whole, split = run(10_000), run(12)
    assert whole[0]["loss"] == pytest.approx(split[0]["loss"], abs=1e-5)
    assert split[0]["again"] == split[0]["loss"]
    for a, b in zip(whole[1], split[1], strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


# ---- losses by hand --------------------------------------------------------------------------------------------


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_dpo_and_ipo_losses_by_hand() -> None:
    margins = torch.tensor([2.0, -1.0])
    expected = -(math.log(sigmoid(1.0)) + math.log(sigmoid(-0.5))) / 2
    assert float(sigmoid_loss(margins, 0.5)) == pytest.approx(expected, abs=1e-6)
    smooth = [-0.9 * math.log(sigmoid(x)) - 0.1 * math.log(sigmoid(-x)) for x in (1.0, -0.5)]
    assert float(sigmoid_loss(margins, 0.5, 0.1)) == pytest.approx(sum(smooth) / 2, abs=1e-6)
    assert float(ipo_loss(margins, 0.25)) == pytest.approx((0.0 + 9.0) / 2, abs=1e-6)  # 1 / (2 * 0.25) = 2


@pytest.mark.parametrize(("loss", "beta"), [("sigmoid", 0.3), ("ipo", 0.3)])
def test_one_step_of_dpo_is_the_gradient_step_worked_by_hand(loss: str, beta: float) -> None:
    task = Weighted()
    ref = reference(task, 0)
    env = textrl.TextEnv(task, reference=ref, kl_coef=beta)
    start = small_model(4, 6, 1)
    pairs = [
        {"prompt": "a", "chosen": "ab", "rejected": "c"},
        {"prompt": "b", "chosen_ids": [3, 0], "rejected_ids": [1, 1, 1, 1]},
    ]
    agent = DPO(env, copy.deepcopy(start), dataset=pairs, loss=loss, batch_size=4, device="cpu")
    assert agent.beta == beta
    metrics = agent.update(agent.collect())

    sides = [[[0, 1, 1, 2, 0], [0, 1, 3, 0]], [[0, 2, 3, 0], [0, 2, 1, 1, 1, 1]]]  # after the begin token

    def logprob(model: Any, ids: list[int]) -> torch.Tensor:
        logits = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        return torch.stack([logits[i - 1, ids[i]] for i in range(2, len(ids))]).sum()

    margins = []
    for chosen, rejected in sides:
        ratios = [logprob(start, ids) - logprob(ref, ids).detach() for ids in (chosen, rejected)]
        margins.append(ratios[0] - ratios[1])
    if loss == "sigmoid":
        expected = sum(-torch.log(torch.sigmoid(beta * h)) for h in margins) / 2
    else:
        expected = sum((h - 1 / (2 * beta)) ** 2 for h in margins) / 2
    norm = torch.stack([g.norm() for g in torch.autograd.grad(expected, list(start.parameters()))]).norm()
    assert metrics["loss"] == pytest.approx(expected.item(), abs=1e-5)
    assert metrics["grad_norm"] == pytest.approx(float(norm), rel=1e-3)
    assert metrics["accuracy"] == pytest.approx(sum(h.item() > 0 for h in margins) / 2)
    assert metrics["margin"] == pytest.approx(beta * sum(margins).item() / 2, abs=1e-5)


def test_advantage_weights_by_hand() -> None:
    returns, groups = torch.tensor([1.0, 3.0, 0.0]), torch.tensor([0, 0, 1])
    weights = advantage_weights(returns, groups, 2.0, 1e9)
    mean = (math.exp(0.5) + math.exp(1.5)) / 2
    everyone = (math.exp(0.5) + math.exp(1.5) + 1) / 3
    expected = [math.exp(0.5) / mean, math.exp(1.5) / mean, 1 / everyone]
    assert weights.tolist() == pytest.approx(expected, abs=1e-6)
    assert advantage_weights(returns, groups, 0.1, 1.5).max() == 1.5
    assert advantage_weights(returns * 1e4, groups, 0.01, 10.0).isfinite().all()


def test_the_best_share_by_hand() -> None:
    returns, groups = torch.tensor([1.0, 3.0, 2.0, 2.0, 9.0, 8.0]), torch.tensor([0, 0, 0, 0, 1, 1])
    assert best_of_each(returns, groups, 0.25).tolist() == [0, 1, 0, 0, 1, 0]
    assert best_of_each(returns, groups, 0.5).tolist() == [0, 1, 1, 1, 1, 0]  # ties stay


def test_truncated_advantages_by_hand() -> None:
    new, old = torch.tensor([-1.0, -2.0]), torch.tensor([-1.0, -2.0 - math.log(4)])
    baseline = (1 * 1 + 2 * 4) / 3  # ratios 1, and 4 cut to 2
    found = truncated_advantages(new, old, torch.tensor([1.0, 4.0]), 2.0)
    assert found.tolist() == pytest.approx([1 * (1 - baseline), 2 * (4 - baseline)], abs=1e-5)


def test_tis_takes_the_same_step_however_its_batch_is_cut() -> None:
    task = Weighted()
    env = textrl.TextEnv(task, reference=small_model(4, 8, 1), kl_coef=0.1)
    logged = OPTIMUM.drawn(env, small_model(4, 8, 2), 32, 0)
    steps = []
    for limit in (10_000, 40, 1):
        settings = {"batch_size": 32, "learning_rate": 1e-2, "max_tokens_per_microbatch": limit, "device": "cpu"}
        agent = BPO(env, small_model(4, 8, 1), dataset=logged, weighting="tis", **settings)
        numbers = agent.update(agent.collect())
        steps.append([numbers[name] for name in ("loss", "grad_norm", "ratio", "truncated")])
    assert steps[0][1] > 0.01
    assert steps[1] == pytest.approx(steps[0], rel=1e-4) and steps[2] == pytest.approx(steps[0], rel=1e-4)


def test_the_filter_of_rest_by_hand() -> None:
    returns, groups = torch.tensor([0.0, 1.0, 2.0, 5.0, 5.0]), torch.tensor([0, 0, 0, 1, 1])
    assert keep_weights(returns, groups, 0.5, 0.0).tolist() == [0, 0.5, 1, 0.5, 0.5]  # 1.5 of three, 1 of two
    assert keep_weights(returns, groups, 0.0, 0.0).tolist() == [1, 1, 1, 1, 1]
    # 1 + e^-a + e^-(a + 2) = 1.5 with a = (tau - 1) / 0.5: e^-a = 0.5 / (1 + e^-2), tau between 1 and 2
    second = 0.5 / (1 + math.exp(-2))
    soft = keep_weights(returns, groups, 0.5, 0.5).tolist()
    assert soft == pytest.approx([second * math.exp(-2), second, 1, 0.5, 0.5])
    # one of three is left: the weights are softmax(R / 0.5)
    whole = 1 + math.exp(-2) + math.exp(-4)
    last = keep_weights(returns, groups, 1.0, 0.5).tolist()
    assert last == pytest.approx([math.exp(-4) / whole, math.exp(-2) / whole, 1 / whole, 0.5, 0.5])


@pytest.mark.parametrize("kl_coef", [0.0, 0.01, 1.0, 100.0])
@pytest.mark.parametrize("quantile", [0.0, 0.3, 0.9])
def test_a_filter_of_rest_keeps_its_share(quantile: float, kl_coef: float) -> None:
    returns = torch.randint(-3, 4, (200,), generator=torch.Generator().manual_seed(0)).float()
    weights = keep_weights(returns, torch.arange(200) % 2, quantile, kl_coef)
    for group in (0, 1):
        assert float(weights[group::2].mean()) == pytest.approx(1 - quantile, rel=1e-5)
    assert float(weights.max()) <= 1
    order = returns[::2].argsort()
    assert bool((weights[::2][order].diff() >= 0).all())


TIES = [([0.1, 0.1, *[1.0] * 6], 0.3), ([0.3] * 8, 0.3), ([-1.0] * 3 + [1.0] * 5, 0.3), ([0.9, *[0.3] * 7], 0.02)]


@pytest.mark.parametrize(("returns", "kl_coef"), TIES)
def test_a_quantile_of_0_keeps_all_whatever_rounding_says(returns: list[float], kl_coef: float) -> None:
    found = keep_weights(torch.tensor(returns), torch.zeros(8, dtype=torch.int64), 0.0, kl_coef)
    assert found.tolist() == pytest.approx([1.0] * 8)


def test_a_rare_success_weighs_more_than_the_failures_that_are_the_quantile() -> None:
    returns, groups = torch.tensor([*[0.0] * 18, 1.0, 1.0]), torch.zeros(20, dtype=torch.int64)
    for kl_coef in (0.0, 0.05):
        assert keep_weights(returns, groups, 0.5, kl_coef).tolist() == pytest.approx([*[8 / 18] * 18, 1, 1])


def test_best_of_n_by_hand() -> None:
    assert best_of_groups(torch.tensor([1.0, 3.0, 3.0, 7.0, 2.0, 0.0]), 3).tolist() == [1, 3]
    assert kl_bound(1) == 0
    assert kl_bound(4) == pytest.approx(math.log(4) - 0.75)


# ---- the agents ------------------------------------------------------------------------------------------------


def test_the_reference_is_asked_once_or_brought_along() -> None:
    task = Weighted()
    ref = reference(task, 0)
    env = textrl.TextEnv(task, reference=ref, kl_coef=0.1)
    pairs = bradley_terry(env, ref, 8, 0)
    agent = DPO(env, copy.deepcopy(ref), dataset=pairs, batch_size=16, device="cpu")
    rollout = agent.collect()
    asked = torch.tensor([row["ref_logprob"] for row in rollout.rows])
    expected = batched_logprobs(CausalPolicy(ref, 4), rollout, 1000).sum(1)
    torch.testing.assert_close(asked, expected, atol=1e-5, rtol=0)
    metrics = agent.update(rollout)
    assert metrics["loss"] == pytest.approx(math.log(2), abs=1e-5)  # the model is the reference still
    brought = pairs.add_column("ref_chosen_logps", [-1.0] * 8).add_column("ref_rejected_logps", [-2.0] * 8)
    other = DPO(textrl.TextEnv(task), copy.deepcopy(ref), dataset=brought, batch_size=16, device="cpu")
    assert [row["ref_logprob"] for row in other.collect().rows] == [-1.0, -2.0] * 8


def test_without_a_reference_dpo_starts_from_its_own_model(tmp_path: Any) -> None:
    task = Weighted()
    pairs = bradley_terry(textrl.TextEnv(task), small_model(4, 6, 0), 16, 0)
    agent = DPO(textrl.TextEnv(task), small_model(4, 6, 0), dataset=pairs, batch_size=16, device="cpu")
    assert agent.beta == 0.1
    agent.learn(60)
    agent.save(tmp_path / "dpo")
    again = DPO.load(tmp_path / "dpo", textrl.TextEnv(task), dataset=pairs)
    assert again.collect().rows == agent.collect().rows  # what the first model said of the pairs was saved
    others = DPO.load(tmp_path / "dpo", textrl.TextEnv(task), dataset=pairs.select(range(8)))
    with pytest.raises(ValueError, match="reference is not known any more"):
        others.collect()
    used = DPO.load(tmp_path / "dpo", textrl.TextEnv(task))
    assert used.generate(["a"], deterministic=True) == agent.generate(["a"], deterministic=True)
    with pytest.raises(ValueError, match="dataset must be given for DPO to learn"):
        used.learn(10)


@pytest.mark.parametrize("cls", [SFT, BPO])
def test_loaded_without_its_data_an_agent_is_used_and_with_other_data_it_learns(cls: Any, tmp_path: Any) -> None:
    env = textrl.TextEnv(Weighted(), reference=small_model(4, 6, 1), kl_coef=0.1)
    rows = [{"prompt": "a", "completion": text} for text in ("a", "b", "c", "ab", "ac", "bc", "ba", "ca")]
    agent = cls(env, small_model(4, 6, 0), dataset=rows, batch_size=3, device="cpu").learn(60)
    agent.save(tmp_path / "agent")
    used = cls.load(tmp_path / "agent", env)
    assert used.generate(["a"], deterministic=True) == agent.generate(["a"], deterministic=True)
    with pytest.raises(ValueError, match="dataset must be given"):
        used.learn(10)
    other = cls.load(tmp_path / "agent", env, dataset=rows[:2])
    assert {text for _ in range(4) for text in read(other, other.collect())} <= {"a", "b"}
    other.learn(30)


def read(agent: textrl.Agent, rollout: Rollout) -> list[str]:
    responses = [row[int(n) :] for row, n in zip(rollout.tokens, rollout.prompt_lengths, strict=True)]
    return agent.task.decode([response.tolist() for response in responses])


def test_dpo_ends_with_the_weights_that_did_best_on_the_pairs_held_out() -> None:
    task = Weighted()
    ref = reference(task, 0)
    env = textrl.TextEnv(task, reference=ref, kl_coef=0.1)
    pairs = bradley_terry(env, ref, 300, 0)
    common: dict[str, Any] = {"batch_size": 32, "learning_rate": 3e-3, "device": "cpu"}
    agent = DPO(env, copy.deepcopy(ref).requires_grad_(True), dataset=pairs, held_out=0.1, **common)
    size = len(agent._pairs)  # those that differ
    assert sorted([*agent.held_out.indices.tolist(), *agent._learned.tolist()]) == list(range(size))
    assert 20 <= len(agent.held_out.indices) <= round(0.1 * size)
    losses: list[float] = []
    agent.learn(24_000, callback=lambda _, numbers: losses.append(numbers["train/held_out_loss"]))
    assert len(losses) > 40 and min(losses) < losses[-1] - 0.01, "these few pairs are learned by heart"
    agent._look()
    assert agent.held_out.loss == pytest.approx(min(losses), abs=1e-5)
    everything = DPO(env, copy.deepcopy(ref), dataset=pairs, **common)
    assert len(everything._learned) == size
    assert "held_out_loss" not in everything.update(everything.collect())
    assert (
        len(DPO(env, copy.deepcopy(ref), dataset=pairs.select(range(100)), held_out=0.1, **common).held_out.indices)
        == 0
    )  # too few to tell


@pytest.mark.parametrize(
    "changed", [{"beta": 0.01}, {"loss": "ipo"}, {"seed": 7}, {"held_out": 0.4}, {"trainable_layers": 1}]
)
def test_a_loaded_dpo_does_not_measure_by_another_loss_or_other_pairs_held_out(changed, tmp_path) -> None:
    pairs = [
        {"prompt": p, "chosen": p * n, "rejected": "c" * m} for p in "ab" for n in (1, 2, 3) for m in (1, 2, 3)
    ] * 4
    env = textrl.TextEnv(Weighted(), reference=small_model(4, 8, 3).requires_grad_(False), kl_coef=0.5)
    agent = DPO(env, small_model(4, 8, 3), dataset=pairs, held_out=0.3, batch_size=16, device="cpu", learning_rate=1e-3)
    agent.learn(2000).save(tmp_path / "agent")
    start = [p.detach().clone() for p in agent.model.parameters()]
    again = DPO.load(tmp_path / "agent", env, dataset=pairs, learning_rate=1e-2, **changed)
    again.learn(1000)
    assert any(not torch.equal(a, b) for a, b in zip(start, again.model.parameters(), strict=True))
    again._look()
    assert again.held_out.loss == pytest.approx(again.held_out.best_loss, abs=1e-5)


def test_a_loaded_dpo_asks_another_reference_again_and_keeps_what_it_knows_without_one(tmp_path) -> None:
    pairs = [{"prompt": "a", "chosen": "a", "rejected": "b"}, {"prompt": "b", "chosen": "c", "rejected": "b"}]
    first, second = (small_model(4, 8, seed).requires_grad_(False) for seed in (3, 4))
    make = lambda ref: textrl.TextEnv(Weighted(), reference=ref, kl_coef=0.5) if ref else textrl.TextEnv(Weighted())  # noqa: E731
    DPO(make(first), small_model(4, 8, 3), dataset=pairs, batch_size=4, device="cpu").learn(8).save(tmp_path / "agent")

    def told(ref):
        agent = DPO.load(tmp_path / "agent", make(ref), dataset=pairs, beta=0.5)
        return sorted(row["ref_logprob"] for row in agent.collect().rows)

    assert told(first) == told(None) != told(second)
    rollout = DPO(make(second), dataset=pairs, batch_size=4, device="cpu").collect()
    assert told(second) == pytest.approx(sorted(row["ref_logprob"] for row in rollout.rows))


def test_columns_of_the_reference_go_before_what_a_loaded_agent_knew(tmp_path) -> None:
    pairs = [{"prompt": "a", "chosen": "a", "rejected": "b", "ref_chosen_logps": -1.0, "ref_rejected_logps": -2.0}]
    env = textrl.TextEnv(Weighted())
    DPO(env, dataset=pairs, batch_size=1, device="cpu").learn(1).save(tmp_path / "agent")
    others = [{**pairs[0], "ref_chosen_logps": -3.0}, {**pairs[0], "chosen": "c", "ref_rejected_logps": -7.0}]
    agent = DPO.load(tmp_path / "agent", env, dataset=others)
    found = {tuple(row["ref_logprob"] for row in agent.collect().rows) for _ in range(4)}
    assert found == {(-3.0, -2.0), (-1.0, -7.0)}


def test_pairs_that_are_all_alike_are_refused_at_once() -> None:
    with pytest.raises(ValueError, match="dataset must be pairs that differ within the horizon; got '2 pairs that are"):
        DPO(textrl.TextEnv(Weighted()), dataset=[{"prompt": "a", "chosen": "a", "rejected": "a"}] * 2)


def test_pairs_held_out_are_none_of_those_learned_from() -> None:
    rows = [{"prompt": "", "chosen": a, "rejected": b} for a in ("a", "ab", "c") for b in ("b", "bc", "cb")]
    turned = [{"prompt": "", "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
    agent = DPO(textrl.TextEnv(Weighted()), dataset=(rows + turned) * 12, held_out=0.2, device="cpu")

    def pairs(indices: torch.Tensor) -> set[Any]:
        return {frozenset(map(tuple, agent._pairs[i][1])) for i in indices.tolist()}

    assert 20 <= len(agent.held_out.indices) <= 0.2 * len(agent._pairs)
    assert len(agent.held_out.indices) + len(agent._learned) == len(agent._pairs)
    assert not pairs(agent.held_out.indices) & pairs(agent._learned)


def test_pairs_that_the_horizon_makes_alike_are_dropped_with_a_warning() -> None:
    rows = [{"prompt": "", "chosen": "abcabca", "rejected": "abcabcc"}, {"prompt": "", "chosen": "a", "rejected": "b"}]
    with pytest.warns(
        UserWarning, match="dropped 1 of 2 pairs whose chosen and rejected are alike in max_new_tokens=4 tokens"
    ):
        assert len(DPO(textrl.TextEnv(Weighted()), dataset=rows, device="cpu")._pairs) == 1


def test_a_csv_file_may_hold_the_references_numbers_and_token_ids(tmp_path: Any) -> None:
    (tmp_path / "pairs.csv").write_text(
        "prompt,chosen,rejected,chosen_ids,rejected_ids,ref_chosen_logps,ref_rejected_logps\n"
        'a,b,c,"[2, 0]","[3, 0]",-1.5,-2\n'
    )
    agent = DPO(textrl.TextEnv(Weighted()), dataset=str(tmp_path / "pairs.csv"), device="cpu")
    assert agent._pairs == [([0, 1], [[2, 0], [3, 0]], [-1.5, -2.0])]
    half = [{"prompt": "a", "chosen": "b", "rejected": "c", "ref_chosen_logps": -1.0}]
    with pytest.raises(
        ValueError, match="column 'ref_rejected_logps' must be given where 'ref_chosen_logps' is; got None"
    ):
        DPO(textrl.TextEnv(Weighted()), dataset=half, device="cpu")
    for ids, said in (([1, 0, 2], "must end where the end token stands"), ([True, 2], "token ids below 4")):
        with pytest.raises(ValueError, match=said):
            SFT(textrl.TextEnv(Weighted()), dataset=[{"prompt": "a", "completion_ids": ids}], device="cpu")


def test_dpo_keeps_some_pairs_to_learn_from() -> None:
    task = Weighted()
    pairs = bradley_terry(textrl.TextEnv(task), reference(task, 0), 40, 0)
    with pytest.raises(ValueError, match=r"held_out must be .* some of 40 pairs to learn from; got 0\.999"):
        DPO(textrl.TextEnv(task), dataset=pairs, held_out=0.999)


def test_rest_rests_at_the_optimum() -> None:
    """At the optimum every response has the same return, and all weigh the same."""
    task = Weighted()
    ref = reference(task, 0)
    env = textrl.TextEnv(task, reference=ref, kl_coef=0.3)
    agent = ReST(env, textrl.solve(task, ref, 0.3).model(), device="cpu", learning_rate=0.0)
    batch = agent.collect()
    assert agent.update(batch)["effective_sample_size"] > 0.99 * len(batch)
    elsewhere = ReST(env, copy.deepcopy(ref).requires_grad_(True), device="cpu", learning_rate=0.0)
    assert elsewhere.update(elsewhere.collect())["effective_sample_size"] < 0.7 * len(batch)


def test_the_best_of_n_takes_the_arguments_of_generate() -> None:
    task = Weighted()
    model = small_model(4, 6, 0)
    agent = BestOfN(textrl.TextEnv(task), model, n=200, device="cpu")
    best = {c: task.score(["a"], [c])[0] for c in ("", "a", "b", "c")}
    assert agent.generate(["a"], max_new_tokens=1) == [max(best, key=lambda c: best[c])]
    plain = textrl.Agent(textrl.TextEnv(task), model, device="cpu")
    greedy = {"deterministic": True, "min_new_tokens": 2}
    assert agent.generate(["a", "b"], **greedy) == plain.generate(["a", "b"], **greedy)  # n times the same
    with pytest.raises(ValueError, match="max_new_tokens must be at most"):
        agent.generate(["a"], max_new_tokens=1000)


def test_the_best_of_n_scores_as_the_maximum_of_n_draws() -> None:
    task = Weighted()
    model = reference(task, 0)
    env = textrl.TextEnv(task)
    agent = BestOfN(env, model, n=4, batch_size=2000, device="cpu")
    before = copy.deepcopy(model.state_dict())
    metrics: list[dict[str, float]] = []
    agent.learn(1, callback=lambda _, numbers: metrics.append(numbers))
    singles = sample(env, model, 8000, 1, group_size=4).scores.view(-1, 4).amax(1)
    error = float(singles.std()) * math.sqrt(2 / 2000)
    assert abs(metrics[0]["rollout/score"] - float(singles.mean())) < 4 * error
    assert metrics[0]["train/kl_bound"] == pytest.approx(math.log(4) - 0.75)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    many = BestOfN(env, model, n=300, device="cpu").generate(["a", "b"])
    greedy = [max(sample(env, model, 2000, 2).scores).item()]
    assert max(task.score(["a", "b"], many)) == pytest.approx(greedy[0], abs=0.3)


def make(name: str, env: textrl.TextEnv, ref: Any, seed: int, **settings: Any) -> textrl.Agent:
    model = copy.deepcopy(ref).requires_grad_(True)
    common = {"learning_rate": 1e-3, "batch_size": 64, "seed": seed, "device": "cpu", **settings}
    if name == "DPO":
        return DPO(env, model, dataset=bradley_terry(env, ref, 4096, seed), **common)
    if name == "ReST":
        return ReST(env, model, **common)
    return BPO(env, model, dataset=sample(env, ref, 8192, seed), **common)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    ("name", "settings", "share"),
    [
        ("DPO", {}, 0.8),
        ("BPO", {}, 0.8),
        ("BPO", {"weighting": "tis"}, 0.5),  # truncation holds it near the logged policy
        ("ReST", {}, 0.85),
    ],
)
def test_agents_reach_their_share_of_the_exact_optimum(
    name: str, settings: dict[str, Any], share: float, seed: int
) -> None:
    task = Weighted(seed)
    ref = reference(task, seed)
    env = textrl.TextEnv(task, reference=ref, kl_coef=0.2)
    agent = make(name, env, ref, seed, **settings)
    agent.learn(200_000)
    assert evaluate_exact(task, agent.model, ref, 0.2).share >= share


def test_filtering_the_best_share_raises_the_score() -> None:
    task = Weighted()
    ref = reference(task, 0)
    env = textrl.TextEnv(task, reference=ref)
    agent = make("BPO", env, ref, 0, weighting="filter")
    agent.learn(15_000)
    found = evaluate_exact(task, agent.model, ref)
    logged = sample(env, ref, 8192, 0)
    best = best_of_each(logged.scores, prompt_groups(logged), 0.1) > 0
    assert found.score > 0.8 * float(logged.scores[best].mean())
    assert found.start < 0


def test_sft_learns_to_say_the_responses() -> None:
    rows = [{"prompt": "a", "completion": "bc"}, {"prompt": "b", "completion": "cab"}]
    agent = SFT(textrl.TextEnv(Weighted()), dataset=rows, learning_rate=1e-2, batch_size=8, device="cpu")
    agent.learn(2000)
    assert agent.generate(["a", "b"], deterministic=True) == ["bc", "cab"]


def test_what_is_wrong_is_said() -> None:
    env = textrl.TextEnv(Weighted())
    pair = {"prompt": "a", "chosen": "b", "rejected": "c"}
    for message, bad in [
        ("beta must be a finite number above 0; got 0", {"beta": 0}),
        ('loss must be "sigmoid" or "ipo"', {"loss": "hinge"}),
        ("label_smoothing must be from 0 to below 0.5", {"label_smoothing": 0.5}),
        ("held_out must be from 0 to below 1", {"held_out": 1.0}),
        ("dataset row 0, column 'rejected' is missing", {"dataset": [{"prompt": "a", "chosen": "b"}]}),
        ("dataset row 0, column 'prompt' is missing", {"dataset": [{"chosen": "b", "rejected": "c"}]}),
        ("column 'chosen_ids' must be 1 to 4 token ids below 4", {"dataset": [{**pair, "chosen_ids": [4]}]}),
        ("dataset must be .* with at least one row", {"dataset": []}),
    ]:
        with pytest.raises(ValueError, match=message):
            DPO(env, **{"dataset": [pair], **bad})
    with pytest.raises(ValueError, match="weighting must be one of"):
        BPO(env, weighting="best", dataset=[{"prompt": "a", "completion": "b"}])
    with pytest.raises(ValueError, match='episodes with logged log-probabilities for "tis"'):
        BPO(env, weighting="tis", dataset=[{"prompt": "a", "completion": "b"}])
    with pytest.raises(ValueError, match="quantiles must be rising numbers from 0 to 1"):
        ReST(env, quantiles=(0.9, 0.5))


def test_rest_takes_the_data_that_a_loaded_agent_is_given(tmp_path):
    task = Weighted()
    env = textrl.TextEnv(task)
    agent = ReST(env, small_model(task.vocab_size, 8), batch_size=8, grow_batches=1).learn(40)
    agent.save(tmp_path / "agent")
    rows = [{"prompt": p, "completion": "abc", "score": 7.0} for p in "ab" for _ in range(4)]
    given = ReST.load(tmp_path / "agent", env, dataset=rows)
    assert given.collect().scores.tolist() == [7.0] * 8
    assert given.collect().scores.tolist() != [7.0] * 8  # once
    given.save(tmp_path / "again")
    assert ReST.load(tmp_path / "again", env, dataset=rows).collect().scores.tolist() != [7.0] * 8


def test_returns_that_differ_by_rounding_are_a_tie():
    returns = torch.tensor([1.0, 1.0 + 1e-7, 0.5, 0.2])
    assert best_of_each(returns, torch.zeros(4, dtype=torch.int64), 0.25).tolist() == [1, 1, 0, 0]


def test_pairs_of_a_file_may_have_the_empty_prompt_of_the_task(tmp_path):
    class Empty(Weighted):
        def prompts(self):
            return [{"prompt": ""}]

    file = tmp_path / "pairs.jsonl"
    file.write_text('{"prompt": "", "chosen": "ab", "rejected": "cc"}\n' * 3)
    with pytest.warns(UserWarning, match="repeat"):
        DPO(textrl.TextEnv(Empty()), dataset=file, batch_size=2).learn(8)


def test_a_loaded_dpo_asks_about_other_pairs_however_many_they_are(tmp_path):
    env = textrl.TextEnv(Weighted(), reference=small_model(4, 8, 3), kl_coef=0.5)
    pairs = [{"prompt": "a", "chosen": a, "rejected": b} for a, b in (("a", "b"), ("ab", "c"), ("c", "ba"), ("b", "c"))]
    agent = DPO(env, small_model(4, 8), dataset=pairs[:1], batch_size=1).learn(4)
    agent.save(tmp_path / "agent")
    again = DPO.load(tmp_path / "agent", env, dataset=pairs, batch_size=8)
    fresh = DPO(env, small_model(4, 8), dataset=pairs, batch_size=8)
    known = [sorted(row["ref_logprob"] for row in each.collect().rows) for each in (again, fresh)]
    assert known[0] == pytest.approx(known[1], abs=1e-5)


def test_pairs_without_a_prompt_column_are_told_who_finds_it():
    with pytest.raises(
        ValueError, match=r"dataset row 0, column 'prompt' is missing; .*; read_preferences\(rows\) finds"
    ):
        DPO(textrl.TextEnv(textrl.envs.copy.Copy()), dataset=[{"chosen": "ab", "rejected": "ac"}])


def test_a_batch_of_pairs_has_as_many_responses_as_was_asked_for_whole_pairs_at_least():
    pairs = [{"prompt": "a", "chosen": "a", "rejected": "b"}, {"prompt": "b", "chosen": "c", "rejected": "b"}]
    for asked, given in ((4, 4), (3, 4), (1, 2)):
        assert len(DPO(textrl.TextEnv(Weighted()), dataset=pairs, batch_size=asked, device="cpu").collect()) == given
