"""What the settings of offline agents change."""

import math
from typing import Any

import pytest
import torch
from conftest import benchmark
from test_acting import Halves
from test_agents import LOG4, Bigrams, environment, fixed_rollout, loss_of_first_step, tabular_agent
from test_offline import Weighted, bradley_terry, reference

import textrl
from textrl.agents import BPO, DPO, NLPO, REINFORCE, ReST
from textrl.agents.bpo import advantage_weights, best_of_each, truncated_advantages
from textrl.agents.dpo import sigmoid_loss
from textrl.batch import prompt_groups
from textrl.models import small_model
from textrl.tabular import tabular_model

OPTIMUM = benchmark("optimum")


def test_the_share_of_the_best_is_rounded_to_whole_episodes() -> None:
    returns, groups = torch.tensor([1.0, 2.0, 3.0]), torch.zeros(3, dtype=torch.int64)
    assert best_of_each(returns, groups, 0.6).tolist() == [0, 1, 1]  # 1.8 of three
    assert best_of_each(returns, groups, 0.4).tolist() == [0, 0, 1]  # 1.2


def test_bpos_weights_are_those_of_its_settings() -> None:
    env = textrl.TextEnv(Weighted())
    logged = OPTIMUM.drawn(env, small_model(4, 8, 2), 64, 0)
    groups = prompt_groups(logged)

    def weights(**settings: Any) -> torch.Tensor:
        return BPO(env, small_model(4, 8, 1), dataset=logged, device="cpu", **settings).weights

    for settings, expected in (
        ({"beta": 0.1, "max_weight": 1.5}, advantage_weights(logged.scores, groups, 0.1, 1.5)),
        ({"weighting": "filter", "best_share": 0.5}, best_of_each(logged.scores, groups, 0.5)),
    ):
        torch.testing.assert_close(weights(**settings), expected / expected.sum())


def test_the_ratios_of_tis_are_inside_the_action_masks() -> None:
    env = textrl.TextEnv(Halves())
    model = tabular_model(env.task, std=1.0)
    logged = OPTIMUM.drawn(env, model, 32, 0)
    agent = BPO(env, model, dataset=logged, weighting="tis", batch_size=32, device="cpu", learning_rate=0.0)
    numbers = agent.update(agent.collect())  # the policy is the one that was logged
    assert numbers["ratio"] == pytest.approx(1, abs=1e-5)
    assert numbers["truncated"] == 0


def test_truncated_is_the_share_of_ratios_beyond_their_bound() -> None:
    # the ratios are (1/16) / (1/8) and 1
    agent = tabular_agent(BPO, weighting="tis", max_ratio=1.0)
    agent.weights = torch.full((2,), 0.5)
    assert agent.update(fixed_rollout())["truncated"] == 0
    assert agent.update(fixed_rollout(old=((0.25, 0.125), (0.25, 1.0))))["truncated"] == 0.5


def pairs_agent(**settings: Any) -> DPO:
    task = Weighted()
    ref = reference(task, 0)
    env = textrl.TextEnv(task, reference=ref, kl_coef=0.1)
    common = {"batch_size": 16, "device": "cpu", **settings}
    return DPO(env, small_model(4, 8, 3), dataset=bradley_terry(env, ref, 120, 0), **common)


def test_dpos_labels_are_smoothed_as_configured() -> None:
    agent = pairs_agent(label_smoothing=0.2)
    batch = agent.collect()
    known = torch.tensor([row["ref_logprob"] for row in batch.rows])
    ratios = (agent.logprobs(batch).detach().sum(1) - known).view(-1, 2)
    margins = ratios[:, 0] - ratios[:, 1]
    loss, numbers = agent._loss(batch)
    assert float(loss) == pytest.approx(float(sigmoid_loss(margins, 0.1, 0.2)), abs=1e-6)
    assert float(numbers["margin"]) == pytest.approx(0.1 * float(margins.mean()), abs=1e-6)


def test_dpo_looks_at_the_pairs_held_out_four_times_an_epoch_and_at_the_end() -> None:
    agent, seen = pairs_agent(held_out=0.3), []
    assert len(agent.held_out.indices) >= 20 and len(agent._learned) // 32 == 2  # so a look every two updates
    agent._look = lambda: seen.append(agent.num_updates)  # type: ignore[method-assign]
    agent.call = {"start": 0, "total": 10**9}
    for agent.num_updates in range(4):
        agent.call["total"] = 1 if agent.num_updates == 3 else 10**9
        agent.update(agent.collect())
    assert seen == [0, 2, 3]


def test_dpo_forgets_the_best_weights_when_it_is_given_other_pairs(tmp_path: Any) -> None:
    agent = pairs_agent(held_out=0.3)
    agent.update(agent.collect())
    agent._look()
    assert agent.held_out.best and math.isfinite(agent.held_out.best_loss)
    agent.save(tmp_path / "dpo")
    others = bradley_terry(agent.env, agent.base.reference, 120, 1)
    again = DPO.load(tmp_path / "dpo", agent.env, dataset=others)
    again.collect()
    assert again.held_out.best == [] and again.held_out.best_loss == math.inf
    same = DPO.load(tmp_path / "dpo", agent.env, dataset=bradley_terry(agent.env, agent.base.reference, 120, 0))
    same.collect()
    assert same.held_out.best_loss == agent.held_out.best_loss


def test_rest_begins_with_the_returns_of_what_was_logged_and_goes_on_with_its_own() -> None:
    env = textrl.TextEnv(Weighted(), reference=small_model(4, 8, 1), kl_coef=0.5)
    logged = OPTIMUM.drawn(env, small_model(4, 8, 2), 32, 0)
    settings = {"grow_batches": 2, "batch_size": 16, "group_size": 4, "quantiles": (0.5,), "epochs": 3}
    agent = ReST(env, small_model(4, 8, 3), dataset=logged, device="cpu", **settings)
    first = agent.collect()
    expected = logged.scores - 0.5 * (logged.logprobs - logged.ref_logprobs).sum(1)
    torch.testing.assert_close(first.rewards.sum(1), expected)
    assert (expected - logged.scores).abs().max() > 0.01
    steps: list[int] = []
    agent.minimise = lambda loss, batch: steps.append(len(batch)) or {"loss": 0.0}  # type: ignore
    agent.update(first)
    assert len(steps) % 3 == 0 and sum(steps[: len(steps) // 3]) * 3 == sum(steps)  # three passes over what was kept
    assert sum(steps) > len(first)
    agent.num_updates += 1
    grown = agent.collect()
    assert len(grown) == 32 and grown.group_size == 4
    assert [row["prompt"] for row in grown.rows[::4]] == [row["prompt"] for row in grown.rows[3::4]]
    assert not torch.equal(grown.scores, logged.scores)


def test_reinforces_return_is_that_of_the_whole_response_at_every_token() -> None:
    early = fixed_rollout(rewards=((5.0, 3.0), (1.0, 0.0)))
    loss, _ = loss_of_first_step(tabular_agent(REINFORCE, baseline="none"), early)
    assert loss == pytest.approx((8 + 8 + 1) * LOG4 / 3)


def test_the_masked_share_is_that_of_the_agents_own_tokens() -> None:
    task = Bigrams()
    agent = NLPO(environment(task), tabular_model(task, std=1.5, seed=5), top_p=0.7, batch_size=64)
    rollout = agent.collect()
    shares = [1 - float(rollout.allowed[part].float().mean()) for part in (rollout.action_mask, slice(None))]
    assert abs(shares[0] - shares[1]) > 0.01
    assert agent.update(rollout)["masked_share"] == pytest.approx(shares[0], abs=1e-5)


def test_the_return_in_tis_counts_the_distance_from_the_reference() -> None:
    agent, seen = tabular_agent(BPO, kl_coef=0.5, weighting="tis"), []
    agent.weights = torch.full((2,), 0.5)
    rollout = fixed_rollout(ref=((0.5, 0.5), (0.125, 1.0)))
    agent.minimise = lambda loss, batch, mean_over: seen.append(batch) or {"loss": 0.0}  # type: ignore
    agent.update(rollout)
    now = torch.tensor([-2 * LOG4, -LOG4])  # the policy says every token alike
    kl = now - rollout.ref_logprobs.sum(1)
    assert abs(float(kl[0] - kl[1])) > 0.1  # else the baseline takes it off again
    returns = rollout.scores - 0.5 * kl
    expected = truncated_advantages(now, rollout.logprobs.sum(1), returns, agent.config.max_ratio)
    torch.testing.assert_close(seen[0].advantages[:, 0], expected)
