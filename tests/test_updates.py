"""What an update does beside its loss: what ends it, what it clips, what it bounds, and what follows it."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_agents import LOG4, Bigrams, environment, fixed_rollout, loss_of_first_step, one_state, tabular_agent

import textrl
from textrl.agents import A2C, BPO, DPO, GRPO, NLPO, PPO, REINFORCE, TRPO, ReST
from textrl.agents.bpo import truncated_advantages
from textrl.agents.ppo import clipped_value_loss
from textrl.agents.rest import keep_weights
from textrl.critic import value_loss
from textrl.drawing import within_top_p
from textrl.envs.copy import Copy
from textrl.kl import full_kl
from textrl.models import small_model
from textrl.offline import given_rollout
from textrl.optim import Optimizer
from textrl.returns import gae, masked_var
from textrl.rollout import Rollout, both_masks
from textrl.tabular import tabular_model


def test_a2cs_critic_learns_returns_and_not_whitened_advantages():
    rollout = fixed_rollout()
    _, numbers = loss_of_first_step(tabular_agent(A2C, whiten_advantages=True), rollout)
    _, returns = gae(rollout.rewards, torch.zeros(2, 2), rollout.action_mask)
    expected = value_loss(torch.zeros(2, 2), returns, rollout.action_mask)
    assert numbers["value_loss"] == pytest.approx(float(expected), abs=1e-6)


def test_the_return_in_tis_is_that_of_the_policy_as_it_is_now():
    agent = tabular_agent(BPO, kl_coef=0.5, weighting="tis")
    agent.weights = torch.full((2,), 0.5)
    rollout, seen = fixed_rollout(), []

    def minimise(loss, batch, mean_over="tokens"):
        seen.append((loss(batch)[0].item(), mean_over))
        return {"loss": 0.0}

    agent.minimise = minimise
    agent.update(rollout)
    now = torch.tensor([-2 * LOG4, -LOG4])  # the policy says every token alike
    returns = rollout.scores - 0.5 * (now - rollout.ref_logprobs.sum(1))
    advantages = truncated_advantages(now, rollout.logprobs.sum(1), returns, agent.config.max_ratio)
    expected = -(advantages * now).mean()
    assert not math.isclose(expected, 0)
    assert seen == [(pytest.approx(float(expected), abs=1e-5), "groups")]  # whole responses weigh the same


def test_awrs_temperature_is_the_penaltys_coefficient_where_none_is_given():
    task = Bigrams()

    def weights(**settings):
        return BPO(environment(task, 0.5), tabular_model(task), dataset=fixed_rollout(), **settings).weights

    assert torch.equal(weights(), weights(beta=0.5))
    assert not torch.allclose(weights(), weights(beta=2.0))


PAIRS = [{"prompt": "ab", "chosen": "ab" if i % 3 else "a", "rejected": "bb" if i % 2 else ""} for i in range(9)]


def agent_at(temperature, **settings):
    task = Copy(length=2)
    model = small_model(task.vocab_size, 16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5 if parameter.ndim > 1 else 1)
    return DPO(textrl.TextEnv(task, temperature=temperature), model, dataset=PAIRS, batch_size=8, **settings)


def test_the_reference_is_asked_at_the_temperature():
    agent = agent_at(2.0)
    rollout = agent.collect()
    known = torch.tensor([row["ref_logprob"] for row in rollout.rows])
    torch.testing.assert_close(agent.logprobs(rollout).detach().sum(1), known)  # nothing learned yet


def test_the_loss_on_pairs_held_out_is_the_mean_over_pairs_however_they_are_cut():
    agent = agent_at(1.0, max_tokens_per_microbatch=22)
    agent.collect()
    agent.held_out.indices = torch.arange(9)
    with torch.no_grad():
        agent.model.lm_head.weight.mul_(1.5)  # away from the reference: the pairs' losses differ
        whole = agent._loss(agent._rollout(agent.held_out.indices, agent.reference.known))[0]
    agent._look()
    assert agent.held_out.loss == pytest.approx(float(whole), abs=1e-5)


def test_nlpos_mask_is_about_the_probabilities_at_the_temperature():
    task = Copy(length=2)
    model = small_model(task.vocab_size, 16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8 if parameter.ndim > 1 else 1)
    env = textrl.TextEnv(task, temperature=3.0)
    agent = NLPO(env, model, top_p=0.7)
    observation = env.reset(seed=0)[0][None]
    logits = agent.stepper(observation)
    right, wrong = within_top_p(logits / 3, 0.7), within_top_p(logits, 0.7)
    assert not torch.equal(right, wrong)
    assert agent.narrow(observation).tolist() == right.tolist()


def test_nlpos_mask_policy_reads_again_once_it_has_caught_up():
    env = textrl.TextEnv(Copy(length=2))
    agent = NLPO(env, batch_size=8, mask_interval=1, learning_rate=0.1, epochs=1, minibatches=1, score_start=1.0)
    observation = env.reset(seed=0)[0][None]
    rollout = agent.collect()
    before = agent.mask_stepper(observation).clone()
    agent.update(rollout)
    after = agent.mask_stepper(observation).clone()
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, agent.stepper(observation))


def test_values_are_clipped_around_the_old_ones():
    mask = torch.tensor([[True, True]])
    values, old, returns = torch.tensor([[2.0, 5.0]]), torch.tensor([[3.0, 5.0]]), torch.tensor([[2.0, 5.0]])
    # the first moved by -1, of which -0.2 count: 2.8 is 0.8 off; the second stands where it was
    assert float(clipped_value_loss(values, old, returns, mask, 0.2)) == pytest.approx(0.5 * 0.8**2 / 2)
    assert float(clipped_value_loss(values, old, returns, mask, 0.0)) == 0


@pytest.mark.parametrize(("kl", "passes"), [(0.049, 4), (0.051, 1)])
def test_ppo_starts_no_further_epoch_beyond_its_target(kl, passes):
    agent = tabular_agent(PPO, minibatches=1, target_kl=0.05)
    agent._step = lambda batch: {"loss": 0.0, "kl_old_new": kl, "ratio_error": 0.0}
    assert agent.update(fixed_rollout())["steps"] == passes


@pytest.mark.parametrize(("size", "floored"), [(1.0, False), (0.01, True)])
def test_ppo_divides_advantages_by_no_less_than_the_floor(size, floored):
    agent = tabular_agent(PPO, epochs=1, minibatches=1, gae_lambda=1.0, whiten_floor=0.1)
    seen = []
    agent._step = lambda batch: seen.append(batch) or {"loss": 0.0, "kl_old_new": 0.0, "ratio_error": 0.0}
    rollout = fixed_rollout(rewards=((0.0, 3 * size), (1 * size, 0.0)))
    rollout.ref_logprobs = None
    agent.update(rollout)
    mask = seen[0].action_mask
    advantages, _ = gae(rollout.rewards, torch.zeros(2, 2), rollout.action_mask, 1.0, 1.0)
    before = masked_var(advantages, rollout.action_mask).sqrt()
    assert (before < 0.1) == floored
    after = masked_var(seen[0].advantages, mask).sqrt()
    assert float(after) == pytest.approx(float(before) / 0.1 if floored else 1, rel=1e-3)


def test_a_score_is_lowered_for_a_missing_end_then_clipped_then_whitened():
    rollout = replace(fixed_rollout(rewards=((0.5, 3.0), (-1.0, 0.0))), scores=torch.tensor([3.0, -1.0]))
    agent = tabular_agent(PPO, missing_end_penalty=1.0)
    assert agent._shaped(rollout).rewards.tolist() == [[0.5, 2], [-1, 0]]  # the first did not stop
    agent = tabular_agent(PPO, missing_end_penalty=1.0, clip_score=1.5)
    assert agent._shaped(rollout).rewards.tolist() == [[0.5, 1.5], [-1, 0]]
    agent = tabular_agent(PPO, missing_end_penalty=1.0, clip_score=1.5, whiten_scores=True)
    shaped = agent._shaped(rollout).rewards  # mean 0.25, deviation 1.25
    assert shaped.flatten().tolist() == pytest.approx([0.5, 1.25, -0.75, 0])


@pytest.mark.parametrize("kind", [PPO, GRPO])
def test_the_kl_that_ends_the_epochs_is_that_from_old_to_new(kind):
    agent = tabular_agent(kind, minibatches=1)
    _, numbers = loss_of_first_step(agent, fixed_rollout())
    # old probabilities 1/4, 1/2, 1/4, new 1/4: exp(d) - 1 - d with d = log new / old = -log 2 at one token of three
    assert numbers["kl_old_new"] == pytest.approx((0.5 - 1 + math.log(2)) / 3, abs=1e-6)


@pytest.mark.parametrize("kind", [A2C, PPO])
def test_entropy_lowers_the_loss(kind):
    plain, bonus = (
        loss_of_first_step(tabular_agent(kind, ent_coef=weight), fixed_rollout())[0] for weight in (0.0, 0.1)
    )
    assert bonus == pytest.approx(plain - 0.1 * math.log(4), abs=1e-6)


@pytest.mark.parametrize(("target", "change"), [(0.5, 0.2), (5.0, -0.2)])
def test_ppos_coefficient_rises_where_the_policy_is_too_far_from_the_reference(target, change):
    agent = tabular_agent(PPO, kl_target=target, kl_horizon=10.0, epochs=1, minibatches=1)
    rollout = fixed_rollout(ref=((0.0625, 0.25), (0.125, 1.0)))  # KL: log 8 and log 2, on average log 4
    numbers = agent.update(rollout)
    assert agent.base.kl_coef == pytest.approx(0.1 * (1 + change * 2 / 10))
    assert numbers["kl_coef"] == agent.base.kl_coef


def test_rest_fits_all_but_what_weighs_nothing_by_weights_whose_mean_is_one():
    task = Copy(length=2)
    model = small_model(task.vocab_size, 16)
    agent = ReST(textrl.TextEnv(task, reference=copy.deepcopy(model), kl_coef=1.0), model, quantiles=(0.5,))
    scores = torch.tensor([5.0, 4.9, 3.2, -10.0])
    rollout = Rollout(
        tokens=torch.tensor([[0, 1, 1]] * 4),
        prompt_lengths=torch.full((4,), 2),
        action_mask=torch.ones(4, 1, dtype=torch.bool),
        logprobs=torch.zeros(4, 1),
        rewards=scores[:, None],
        scores=scores,
        stopped=torch.zeros(4, dtype=torch.bool),
    )
    weights = keep_weights(scores, torch.zeros(4, dtype=torch.int64), 0.5, 1.0)
    assert 0.05 < weights[2] / weights.mean() < 0.5
    assert weights[3] / weights.mean() < 0.05
    seen = []
    agent.minimise = lambda loss, batch: seen.append(batch) or {"loss": 0.0}
    agent.update(rollout)
    (batch,) = seen
    order = batch.scores.argsort(descending=True)
    assert batch.scores[order].tolist() == scores[:3].tolist()
    torch.testing.assert_close(batch.advantages[order, 0], weights[:3] / weights[:3].mean())


def test_trpo_takes_no_step_that_does_not_improve_the_surrogate():
    agent = tabular_agent(TRPO, damping=0.0, backtrack_coef=0.5)
    measured = iter([(1.0, 0.0), (0.5, 0.0), (1.0, 0.0), (2.0, 0.0)])
    agent._measure = lambda rollout, old: next(measured)
    numbers = agent.step(one_state(), 0.01)
    assert (numbers["step_size"], numbers["improvement"]) == (0.25, 1.0)


def test_trpos_bound_is_on_the_kl_from_the_old_policy_to_the_new():
    agent = tabular_agent(TRPO, damping=0.0)
    numbers = agent.step(one_state(), 0.5)  # so far that the two directions differ
    row = int(agent.model.tree(torch.tensor([[0, 1]])).last_hidden_state[0, -1, 0])
    moved = agent.model.lm_head.weight[row].detach()
    right, wrong = full_kl(torch.zeros(4), moved), full_kl(moved, torch.zeros(4))
    assert abs(right - wrong) > 0.01
    assert numbers["kl_old_new"] == pytest.approx(float(right), abs=1e-5)


def test_trpo_stays_where_it_is_if_no_step_will_do():
    agent = tabular_agent(TRPO, damping=0.0)
    before = agent.model.lm_head.weight.detach().clone()
    agent._measure = lambda rollout, old: (0.0, math.inf)
    numbers = agent.step(one_state(), 0.01)
    assert numbers["step_size"] == 0
    assert torch.equal(agent.model.lm_head.weight, before)


class Guided(Copy):
    """The end token, which the model says nearly always, is advised against."""

    def allowed_tokens(self, rows, responses):
        mask = np.ones((len(rows), self.vocab_size), dtype=np.bool_)
        mask[:, self.eos_token_id] = False
        return mask


def test_nlpos_mask_is_about_the_tokens_that_the_tasks_mask_leaves():
    env = textrl.TextEnv(Guided(length=2))
    agent = NLPO(env, batch_size=8, top_p=0.85, device="cpu")
    observation = env.reset(seed=0)[0][None]
    agent.mask_stepper = lambda _: torch.tensor([[0.97, 0.02, 0.007, 0.003]]).log()
    assert agent.narrow(observation)[0].tolist() == [True, False, False, False]
    inside = both_masks(env.action_masks()[None], agent.own_masks, observation)
    assert inside[0].tolist() == [False, True, True, False]  # 0.67 and 0.23 of what the task's mask leaves


def fixed(env):
    """The same texts whatever the agent."""
    rows = [{"prompt": "abc", "completion_ids": [1 + i % 3, 1 + i % 2, 0]} for i in range(64)]
    texts = [[0, 1, 2, 3]] * len(rows), [row["completion_ids"] for row in rows]
    return given_rollout(env.task, *texts, torch.device("cpu"))


def test_float16_gradients_do_not_vanish_and_a_scale_that_is_too_large_is_halved():
    env, found = textrl.TextEnv(Copy()), []
    for dtype in ("float32", "float16"):
        agent = REINFORCE(env, small_model(4, 16, 3), batch_size=64, dtype=dtype, device="cpu")
        rollout, agent.optimizer.step = fixed(env), lambda scale=1.0: 0.0
        agent.minimise(lambda batch, agent=agent: (1e-5 * agent.logprobs(batch).mean(), {}), rollout)
        found.append(agent.model.transformer.ln_f.weight.grad.float() / agent.optimizer.scale)
    wide, low = found
    assert 0 < wide.norm() < 1e-6
    assert torch.nn.functional.cosine_similarity(wide, low, dim=0) > 0.999
    weight = torch.nn.Parameter(torch.ones(3).half())
    optimizer = Optimizer([weight], learning_rate=0.1)
    scale = optimizer.scale
    weight.grad = torch.full((3,), torch.inf).half()
    optimizer.step(scale)
    assert (optimizer.scale, optimizer.skipped) == (scale / 2, 0) and weight.tolist() == [1, 1, 1]
    weight.grad = torch.full((3,), torch.inf).half()
    optimizer.step()
    assert optimizer.skipped == 1
    other = Optimizer([weight], learning_rate=0.1)
    other.load_state_dict(optimizer.state_dict())
    assert other.scale == scale / 4
    assert Optimizer([torch.nn.Parameter(torch.ones(1))], learning_rate=0.1).scale == 1
