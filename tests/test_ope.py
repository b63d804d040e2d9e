"""Off-policy estimators against the exact value, and against numbers worked by hand."""

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch

import textrl
from textrl.agents import BPO, NLPO
from textrl.envs.brackets import Brackets
from textrl.envs.copy import Copy
from textrl.episodes import read_episodes
from textrl.exact import evaluate_exact
from textrl.models import small_model
from textrl.ope import _q_and_v, estimators, ope, score_by_token, token_means, weight_shares
from textrl.policy import CausalPolicy
from textrl.rollout import Rollout, collect_sampled
from textrl.symbols import symbol_tokenizer

NAMES = ("is", "wis", "pdis", "dr")


class Count(textrl.Task):
    """How many of the letters are "a", and half a point for stopping early; from two prompts."""

    def __init__(self) -> None:
        super().__init__(tokenizer=symbol_tokenizer("abc"), max_new_tokens=3)

    def prompts(self) -> list[dict[str, Any]]:
        return [{"prompt": ""}, {"prompt": "b"}]

    def score(self, prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        return [text.count("a") + 0.5 * (len(text) < 3) for text in completions]


def louder(model: Any, scale: float) -> Any:
    changed = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in changed.parameters():
            if parameter.ndim > 1:
                parameter.mul_(scale)
    return changed


def sample(env: textrl.TextEnv, model: Any, episodes: int, seed: int) -> Rollout:
    return collect_sampled(
        env,
        CausalPolicy(model, env.task.vocab_size, env.temperature),
        episodes,
        rng=np.random.default_rng(seed),
        generator=torch.Generator().manual_seed(seed),
    )


@pytest.mark.parametrize("penalised", [False, True])
def test_estimates_are_unbiased_within_their_standard_error(penalised: bool) -> None:
    task = Count()
    logged, other, reference = (louder(small_model(4, 8, seed), 5.0) for seed in (1, 2, 3))
    env = textrl.TextEnv(task, reference=reference, kl_coef=0.2, temperature=1.5)
    exact = evaluate_exact(task, other, reference, 0.2, temperature=1.5)
    truth = exact.objective if penalised else exact.score
    started = evaluate_exact(task, logged, reference, 0.2, temperature=1.5)
    assert abs(truth - (started.objective if penalised else started.score)) > 0.03  # there is something to tell
    found = [ope(sample(env, logged, 400, seed), other, env, penalised=penalised) for seed in range(12)]
    for name in NAMES:
        values = np.array([each.estimates[name].value for each in found])
        errors = np.array([each.estimates[name].std_error for each in found])
        assert abs(values.mean() - truth) < 3.5 * values.std(ddof=1) / len(values) ** 0.5, name
        assert 0.5 < values.std(ddof=1) / errors.mean() < 2, name  # the standard error says how far they scatter
        covered = [each.estimates[name].low < truth < each.estimates[name].high for each in found]
        assert sum(covered) >= 9, name
    assert all(1 < each.effective_sample_size < 400 for each in found)


def test_the_logged_policy_evaluates_to_its_own_mean() -> None:
    task, model = Count(), louder(small_model(4, 8, 1), 5.0)
    env = textrl.TextEnv(task)
    rollout = sample(env, model, 200, 0)
    found = ope(rollout, model, env)
    for name in ("is", "wis", "pdis"):
        assert found.estimates[name].value == pytest.approx(float(rollout.scores.mean()), abs=1e-4)
    assert found.effective_sample_size == pytest.approx(200, abs=1e-2)
    assert found.logged == pytest.approx(float(rollout.scores.mean()), abs=1e-5)
    assert found.can_tell


def test_doubly_robust_with_the_true_values_has_only_the_variance_of_the_prompts() -> None:
    task = Count()
    logged, other = louder(small_model(4, 8, 1), 4.0), louder(small_model(4, 8, 2), 4.0)
    env = textrl.TextEnv(task)
    policy = CausalPolicy(other, 4)

    def value(prompt: list[int], response: list[int]) -> float:
        """The exact value of the other policy after these tokens."""
        if response and (response[-1] == 0 or len(response) == 3):
            return task.score([""], task.decode([response]))[0]
        tokens = torch.tensor([[*prompt, *response]])
        place = torch.tensor([tokens.shape[1] - 1])
        p = policy.logits(policy.hidden(tokens, torch.tensor([0]), place))[0].softmax(-1)
        return sum(float(p[a]) * value(prompt, [*response, a]) for a in range(4))

    @torch.no_grad()
    def true_q(rollout: Rollout) -> torch.Tensor:
        out = torch.zeros(*rollout.action_mask.shape, 4)
        for b, t in rollout.action_mask.nonzero().tolist():
            prompt = rollout.tokens[b, : rollout.prompt_lengths[b]].tolist()
            before = rollout.responses[b, :t].tolist()
            out[b, t] = torch.tensor([value(prompt, [*before, a]) for a in range(4)])
        return out

    rollout = sample(env, logged, 24, 5)
    found = ope(rollout, other, env, q=true_q)
    with torch.no_grad():
        expected = np.mean(
            [
                value(row, [])
                for row in [
                    r[:n] for r, n in zip(rollout.tokens.tolist(), rollout.prompt_lengths.tolist(), strict=True)
                ]
            ]
        )
    assert found.estimates["dr"].value == pytest.approx(expected, abs=1e-4)
    assert found.estimates["dr"].std_error < 0.2 * found.estimates["is"].std_error


def test_estimators_by_hand() -> None:
    mask = torch.tensor([[True, True], [True, False]])
    rewards = torch.tensor([[1.0, 2.0], [4.0, 0.0]]).double()
    weights = torch.tensor([[0.5, 2.0], [1.0, 1.0]]).double()
    q, v = torch.tensor([[1.0, 3.0], [2.0, 9.0]]).double(), torch.tensor([[2.0, 1.0], [1.0, 9.0]]).double()
    found = {name: parts.tolist() for name, parts in estimators(rewards, weights.log(), mask, q, v).items()}
    assert found["is"] == [2.0 * 3.0, 1.0 * 4.0]
    assert np.mean(found["wis"]) == pytest.approx((2 * 3 + 1 * 4) / 3)
    assert found["pdis"] == [0.5 * 1 + 2 * 2, 4.0]
    # 4.5 - (0.5 * 1 - 1 * 2) - (2 * 3 - 0.5 * 1) = 0.5;  4 - (1 * 2 - 1 * 1) = 3
    assert found["dr"] == [0.5, 3.0]


def test_token_means_by_hand() -> None:
    mask = torch.tensor([[True, True], [True, False], [True, False]])
    rewards = torch.tensor([[1.0, 2.0], [4.0, 0.0], [5.0, 0.0]]).double()
    table = token_means(rewards, torch.tensor([[1, 0], [1, 0], [0, 0]]), mask, 3)
    # at place 0: returns 3 and 4 after token 1, 5 after token 0, mean 4; one pseudo-observation of the mean each
    assert table.tolist() == [[(5 + 4) / 2, (3 + 4 + 4) / 3, 4.0], [2.0, 2.0, 2.0]]


def test_a_batch_that_cannot_tell_says_so() -> None:
    task = Count()
    logged, other = louder(small_model(4, 8, 1), 12.0), louder(small_model(4, 8, 2), 12.0)
    env = textrl.TextEnv(task)
    found = ope(sample(env, logged, 60, 0), other, env)
    assert found.effective_sample_size < 30 and not found.can_tell
    assert 1 / 60 < found.largest_weight <= 1


def test_episodes_that_hold_little_of_what_a_policy_says_cannot_tell() -> None:
    """A logged policy that always says "c": what it says has small and equal weights, and nothing else is known."""
    task, other = Count(), small_model(4, 8, 2)
    env = textrl.TextEnv(task)
    logged = textrl.tabular_model(task)
    with torch.no_grad():
        logged.lm_head.weight[:, 3] = 12.0
    found = ope(sample(env, logged, 400, 0), other, env)
    assert found.effective_sample_size > 30 and found.estimates["wis"].std_error < 0.1
    assert found.mean_weight.value < 0.5 and not found.covered and not found.can_tell
    assert ope(sample(env, other, 400, 0), other, env).mean_weight.value == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("shift", [-1.6, 1.6])
def test_weights_too_small_or_large_to_be_numbers_are_still_compared(shift: float) -> None:
    mask = torch.ones(40, 500, dtype=torch.bool)
    noise = torch.randn(40, 500, generator=torch.Generator().manual_seed(0)).double() * 0.01
    rewards = torch.zeros(40, 500).double()
    rewards[:, -1] = torch.arange(40) / 40
    q = torch.zeros_like(rewards)
    plain = estimators(rewards, noise.cumsum(1), mask, q, q)["wis"]
    torch.testing.assert_close(estimators(rewards, (noise + shift).cumsum(1), mask, q, q)["wis"], plain)
    assert weight_shares(torch.full((3,), -2e30)).isnan().all()


def test_what_is_missing_is_named() -> None:
    task, model = Count(), small_model(4, 8, 1)
    env = textrl.TextEnv(task)
    with pytest.raises(ValueError, match="episodes with logprobs"):
        ope([{"prompt": "", "completion": "ab"}] * 4, model, env)
    with pytest.raises(ValueError, match="at least 4 episodes"):
        ope(sample(env, model, 3, 0), model, env)
    with pytest.raises(ValueError, match="penalised must be False without a reference"):
        ope(sample(env, model, 4, 0), model, env, penalised=True)


def narrow_agent(env: textrl.TextEnv) -> NLPO:
    agent = NLPO(env, louder(small_model(5, 9, 1), 5.0), top_p=0.6, seed=1)
    agent.learn(200)
    return agent


def test_a_policy_weighs_its_own_episodes_alike_under_action_masks(tmp_path: Any) -> None:
    """Logged to disk, as rows and in memory; inside the task's masks, and inside an agent's own."""
    env = textrl.TextEnv(Brackets())
    agent = narrow_agent(env)
    policies = {"model": agent.model, "agent": agent}
    for name, policy in policies.items():
        logged = textrl.collect(env, policy, 200, tmp_path / name)
        read = read_episodes(tmp_path / name, env.task)
        rows = [
            {**row, "completion_ids": ids, "logprobs": logprobs[: len(ids)]}
            for row, ids, logprobs in zip(
                read.rows,
                [each.actions.tolist() for each in logged.iterate_episodes()],
                read.logprobs.tolist(),
                strict=True,
            )
        ]
        for source in (tmp_path / name, rows):
            assert ope(source, policy, env).effective_sample_size == pytest.approx(200, rel=1e-3)
    assert ope(tmp_path / "model", agent, env).effective_sample_size < 199
    memory = sample(env, agent.model, 200, 0)
    assert ope(memory, agent.model, env).effective_sample_size == pytest.approx(200, rel=1e-3)
    bpo = BPO(env, agent.model, dataset=tmp_path / "model", weighting="tis", batch_size=64)
    torch.testing.assert_close(bpo.logprobs(batch := bpo.collect()), batch.logprobs, atol=1e-4, rtol=1e-4)


def test_what_was_done_outside_the_masks_is_learned_from_and_has_no_weight() -> None:
    env = textrl.TextEnv(Brackets())
    model = small_model(5, 9, 1)
    rows = [{"prompt": "((", "completion_ids": [1, 3, 0], "logprobs": [-1.0] * 3}] * 3  # "([" and the end: not balanced
    rows += [{"prompt": "((", "completion_ids": [2, 2, 0], "logprobs": [-1.0] * 3}] * 3
    found = ope(rows, model, env)
    assert found.effective_sample_size == pytest.approx(3)
    penalised = ope(rows, model, textrl.TextEnv(Brackets(), reference=model, kl_coef=0.1), penalised=True)
    for each in [*found.estimates.values(), *penalised.estimates.values()]:
        assert abs(each.value) < 100 and each.std_error < 100
    agent = BPO(env, model, dataset=rows, weighting="filter", best_share=1.0, batch_size=6)
    assert bool(agent.logprobs(agent.collect()).isfinite().all())
    assert float(agent.logprobs(agent.collect()).detach().min()) > -100
    lost = sample(env, model, 8, 0)
    lost.rows = []
    with pytest.raises(ValueError, match="dataset must be episodes with their rows"):
        ope(lost, model, env)


def test_an_episodes_q_comes_from_the_half_that_it_is_not_in():
    rewards = torch.tensor([[0.0], [1.0], [0.0], [1.0]], dtype=torch.float64)
    logged = Rollout(
        tokens=torch.tensor([[0, 1]] * 4),
        prompt_lengths=torch.ones(4, dtype=torch.int64),
        action_mask=torch.ones(4, 1, dtype=torch.bool),
        logprobs=torch.zeros(4, 1),
        rewards=rewards.float(),
        scores=rewards[:, 0].float(),
        stopped=torch.zeros(4, dtype=torch.bool),
    )
    chosen, states = _q_and_v(CausalPolicy(small_model(4, 8), 4), logged, rewards, None)
    assert chosen[:, 0].tolist() == [1, 0, 1, 0]
    torch.testing.assert_close(states, chosen)  # all tokens of a place alike: those never seen have its mean


def test_the_value_of_a_state_is_that_inside_the_masks():
    zeros = torch.zeros(4, 1)
    logged = Rollout(
        tokens=torch.tensor([[0, 2]] * 4),
        prompt_lengths=torch.ones(4, dtype=torch.int64),
        action_mask=torch.ones(4, 1, dtype=torch.bool),
        logprobs=zeros,
        rewards=zeros,
        scores=zeros[:, 0],
        stopped=torch.zeros(4, dtype=torch.bool),
        allowed=torch.tensor([False, False, True, False]).expand(4, 1, 4),
    )
    q = torch.tensor([1.0, 2.0, 4.0, 8.0])
    policy = CausalPolicy(small_model(4, 8), 4)
    chosen, states = _q_and_v(policy, logged, zeros.double(), lambda batch: q.expand(len(batch), 1, 4))
    assert chosen.unique().tolist() == [4]
    assert states.unique().tolist() == [4]  # the only token that was allowed


def test_the_logged_return_is_that_of_the_policy_that_was_logged():
    task = Copy(length=2)
    logged, other, reference = (small_model(task.vocab_size, 16, seed) for seed in (1, 2, 3))
    with torch.no_grad():
        for parameter in [*logged.parameters(), *other.parameters(), *reference.parameters()]:
            parameter.mul_(5 if parameter.ndim > 1 else 1)
    env = textrl.TextEnv(task, reference=reference, kl_coef=0.5)
    rollout = collect_sampled(
        env,
        CausalPolicy(logged, task.vocab_size),
        16,
        rng=np.random.default_rng(0),
        generator=torch.Generator().manual_seed(0),
    )
    found = ope(rollout, other, env, penalised=True)
    assert math.isfinite(found.logged)
    assert found.logged == pytest.approx(float(rollout.rewards.sum(1).mean()), abs=1e-4)


class ByToken(Count):
    def score(self, prompts, completions, completion_ids, **columns):
        return [[float(i == 1) - 0.25 * t for t, i in enumerate(ids)] for ids in completion_ids]


@pytest.mark.parametrize("kl_coef", [0.0, 0.5])
def test_scores_of_tokens_are_weighed_as_they_were_paid(kl_coef, tmp_path):
    logged, other, reference = (louder(small_model(4, 8, seed), 5.0) for seed in (1, 2, 3))
    env = textrl.TextEnv(ByToken(), reference=reference, kl_coef=kl_coef)
    rollout = sample(env, logged, 50, 0)
    steps = zip(rollout.responses.tolist(), rollout.response_lengths.tolist(), strict=True)
    right = [[float(i == 1) - 0.25 * t if t < n else 0.0 for t, i in enumerate(ids)] for ids, n in steps]
    torch.testing.assert_close(score_by_token(rollout, kl_coef).float(), torch.tensor(right))
    found = ope(rollout, other, env).estimates
    assert found["pdis"].value != pytest.approx(found["is"].value, abs=1e-3)
    textrl.collect(env, logged, 50, tmp_path / "logged")
    stored = read_episodes(tmp_path / "logged", env.task)
    assert (score_by_token(stored, kl_coef)[:, 0] != 0).any()
    for unknown in (float("nan"), 1.0):  # not told, or paid otherwise
        rollout.rewards[3, 0] = unknown
        last = rollout.response_lengths[:, None] - 1
        lumped = score_by_token(rollout, kl_coef)
        torch.testing.assert_close(lumped.gather(1, last)[:, 0].float(), rollout.scores)
        assert lumped.count_nonzero() <= len(rollout)
