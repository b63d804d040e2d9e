"""The on-policy agents: their losses by hand, their gradients and their ends against the exact answer."""

import copy
import dataclasses
import math

import numpy as np
import pytest
import torch
from conftest import benchmark

import textrl
from textrl.agents import A2C, GRPO, NLPO, PPO, REINFORCE, TRPO
from textrl.agents.grpo import kl_loss
from textrl.agents.ppo import clipped_policy_loss, clipped_value_loss
from textrl.agents.reinforce import policy_gradient_loss
from textrl.agents.trpo import conjugate_gradient, surrogate
from textrl.critic import value_loss
from textrl.kl import full_kl
from textrl.models import small_model
from textrl.optim import RowAdam
from textrl.rollout import Rollout
from textrl.tabular import tabular_model

ON_POLICY = [REINFORCE, A2C, PPO, TRPO, GRPO, NLPO]


class Bigrams(textrl.Task):
    """A random number for every pair of neighbours, summed over the response."""

    def __init__(self, vocab=4, length=4, prompts=("a", "b"), seed=0):
        super().__init__(tokenizer=textrl.symbol_tokenizer("abcdefgh"[: vocab - 1]), max_new_tokens=length)
        self._prompts, self._table = prompts, np.random.default_rng(seed).normal(size=(vocab, vocab)) / length

    def prompts(self):
        return [{"prompt": prompt} for prompt in self._prompts]

    def score(self, prompts, completions, completion_ids, **columns):
        return [
            float(sum(self._table[a, b] for a, b in zip([len(p), *ids], ids, strict=False)))
            for p, ids in zip(prompts, completion_ids, strict=True)
        ]


def environment(task, kl_coef=0.1, seed=0):
    return textrl.TextVectorEnv(task, num_envs=1, reference=tabular_model(task, std=1.0, seed=seed), kl_coef=kl_coef)


def tabular_agent(kind, kl_coef=0.1, **settings):
    """An agent whose policy says every token alike."""
    task = Bigrams()
    return kind(environment(task, kl_coef), tabular_model(task), **{"learning_rate": 0.1, **settings})


# Two responses to the prompt "a" (token 1): "ab" without an end, and the end at once.
TOKENS = torch.tensor([[0, 1, 1, 2], [0, 1, 0, 0]])
MASK = torch.tensor([[True, True], [True, False]])


def fixed_rollout(rewards=((0.0, 3.0), (1.0, 0.0)), old=((0.25, 0.5), (0.25, 1.0)), ref=((0.5, 0.25), (0.5, 1.0))):
    return Rollout(
        tokens=TOKENS,
        prompt_lengths=torch.tensor([2, 2]),
        action_mask=MASK,
        logprobs=torch.tensor(old).log(),
        rewards=torch.tensor(rewards),
        scores=torch.tensor(rewards).sum(1),
        stopped=torch.tensor([False, True]),
        ref_logprobs=torch.tensor(ref).log(),
        group_size=2,
    )


def loss_of_first_step(agent, rollout, parts=1):
    """What `minimise` is given first, at the weights before any step; the sum of it where a step has two parts."""
    seen = []

    def minimise(loss, batch, *rest):
        value, numbers = loss(batch)
        seen.append((value.item(), {key: number.item() for key, number in numbers.items()}))
        return {key: 0.0 for key in ("loss", "grad_norm", *numbers)}

    agent.minimise = minimise
    agent.update(rollout)
    return sum(value for value, _ in seen[:parts]), {k: v for _, numbers in seen[:parts] for k, v in numbers.items()}


# ---- numbers by hand ------------------------------------------------------------------------------------------------


def test_clipped_losses():
    ratio, advantages = torch.tensor([[1.5, 0.5], [1.5, 0.5]]), torch.tensor([[1.0, 1.0], [-1.0, -1.0]])
    every = torch.ones(2, 2, dtype=torch.bool)
    assert float(clipped_policy_loss(ratio, advantages, every, 0.2)) == pytest.approx((-1.2 - 0.5 + 1.5 + 0.8) / 4)
    values, old, returns = torch.tensor([[1.0, 0.1]]), torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 0.0]])
    row = torch.ones(1, 2, dtype=torch.bool)
    assert float(clipped_value_loss(values, old, returns, row, 0.2)) == pytest.approx(0.5 * (0.64 + 0.01) / 2)
    assert float(clipped_value_loss(values, old, returns, row, 0.0)) == pytest.approx(0.5 * (0 + 0.01) / 2)
    assert float(value_loss(values, returns, row)) == pytest.approx(0.5 * (0 + 0.01) / 2)


def test_policy_gradient_loss():
    logprobs = torch.tensor([[-1.0, -2.0], [-3.0, -9.0]])
    advantages = torch.tensor([[2.0, 1.0], [-1.0, 5.0]])
    assert float(policy_gradient_loss(logprobs, advantages, MASK)) == pytest.approx((2 + 2 - 3) / 3)


LOG4 = math.log(4)  # every token has probability 1/4 under the uniform policy


def test_reinforce_by_hand():
    # whole returns 3 and 1; the first baseline is the other's: advantages 2, 2 and -2
    loss, _ = loss_of_first_step(tabular_agent(REINFORCE, baseline="mean"), fixed_rollout())
    assert loss == pytest.approx((2 + 2 - 2) * LOG4 / 3)
    # two samples of one prompt, a running mean of 2: the baselines (2 + 1) / 2 and (2 + 3) / 2
    agent = tabular_agent(REINFORCE)
    agent.running_mean = 2.0
    loss, _ = loss_of_first_step(agent, fixed_rollout())
    assert loss == pytest.approx((1.5 + 1.5 - 1.5) * LOG4 / 3)
    loss, _ = loss_of_first_step(tabular_agent(REINFORCE, baseline="none"), fixed_rollout())
    assert loss == pytest.approx((3 + 3 + 1) * LOG4 / 3)
    loss, _ = loss_of_first_step(tabular_agent(REINFORCE, baseline="leave_one_out", group_size=2), fixed_rollout())
    assert loss == pytest.approx((2 + 2 - 2) * LOG4 / 3)
    early = fixed_rollout(rewards=((5.0, 3.0), (1.0, 0.0)))
    loss, _ = loss_of_first_step(tabular_agent(REINFORCE, baseline="none", reward_to_go=True), early)
    assert loss == pytest.approx((8 + 3 + 1) * LOG4 / 3)
    loss, numbers = loss_of_first_step(tabular_agent(REINFORCE, baseline="value"), fixed_rollout())
    assert numbers["value_loss"] == pytest.approx(0.5 * (9 + 9 + 1) / 3)
    assert loss == pytest.approx((3 + 3 + 1) * LOG4 / 3 + 0.5 * numbers["value_loss"])


def test_running_mean_baseline():
    agent = tabular_agent(REINFORCE, baseline="mean", baseline_decay=0.9)
    first = torch.tensor([[3.0, 3.0], [1.0, 0.0]])
    assert agent.advantages(fixed_rollout(), first).tolist() == [[2, 2], [-2, 0]]  # against the other's
    assert agent.running_mean == pytest.approx(2)
    again = agent.advantages(fixed_rollout(), first + 10)
    assert again[0].tolist() == pytest.approx([11, 11])  # against the mean before this batch
    assert agent.running_mean == pytest.approx(0.9 * 2 + 0.1 * 12)


def test_a2c_by_hand():
    agent = tabular_agent(A2C, whiten_advantages=False, ent_coef=0.5, vf_coef=2.0)
    loss, numbers = loss_of_first_step(agent, fixed_rollout())
    advantages = [0.95 * 3, 3, 1]  # the critic starts at zero
    assert numbers["policy_loss"] == pytest.approx(sum(advantages) * LOG4 / 3)
    assert numbers["value_loss"] == pytest.approx(0.5 * sum(a * a for a in advantages) / 3)
    assert numbers["entropy"] == pytest.approx(LOG4)
    assert loss == pytest.approx(numbers["policy_loss"] + 2 * numbers["value_loss"] - 0.5 * LOG4)


def test_ppo_by_hand():
    agent = tabular_agent(PPO, whiten_advantages=False, epochs=1, minibatches=1, clip_value=0.0)
    loss, numbers = loss_of_first_step(agent, fixed_rollout(), parts=2)
    # ratios 1, 1/2, 1; the second is below 0.8 and its advantage positive: the smaller gain counts
    assert numbers["policy_loss"] == pytest.approx(-(2.85 * 1 + 3 * 0.5 + 1 * 1) / 3)
    assert numbers["clip_fraction"] == pytest.approx(1 / 3)
    assert loss == pytest.approx(numbers["policy_loss"] + 0.5 * 0.5 * (2.85**2 + 9 + 1) / 3)
    worse = fixed_rollout(rewards=((0.0, -3.0), (1.0, 0.0)))
    _, numbers = loss_of_first_step(agent, worse)
    assert numbers["policy_loss"] == pytest.approx(-(-2.85 * 1 - 3 * 0.8 + 1 * 1) / 3)  # clipped


def test_grpo_by_hand():
    agent = tabular_agent(GRPO, kl_coef=0.1, group_size=2, minibatches=1)
    rollout = fixed_rollout()
    # the environment's penalty is taken out of the rewards: -0.1 * log(old / ref), summed
    penalty = [-0.1 * (math.log(0.25 / 0.5) + math.log(0.5 / 0.25)), -0.1 * math.log(0.25 / 0.5)]
    scores = [3 - penalty[0], 1 - penalty[1]]
    std = abs(scores[0] - scores[1]) / 2 + 1e-4
    advantage = (scores[0] - scores[1]) / std  # against the other sample
    k3 = [1.0 - math.log(2), 0.0, 1.0 - math.log(2)]  # pi 1/4; ref 1/2, 1/4, 1/2
    # the log-ratios are -log 2 and 0, and -log 2; when the texts were drawn they came to 0 and to -log 2 in all
    others = [0.0 + math.log(2), -math.log(2) + math.log(2), 0.0 - 0.0]
    kl = (1 * (k3[0] + others[0]) + 0.5 * (k3[1] + others[1]) + 1 * (k3[2] + others[2])) / 3
    loss, numbers = loss_of_first_step(agent, rollout)
    assert numbers["policy_loss"] == pytest.approx(-(advantage + 0.5 * advantage - advantage) / 3, rel=1e-5)
    assert numbers["kl_loss"] == pytest.approx(kl, abs=1e-6)
    assert loss == pytest.approx(numbers["policy_loss"] + 0.1 / std * kl, rel=1e-5)


def test_the_gradient_of_the_kl_in_the_loss_is_that_of_the_kl():
    """In expectation over all 16 responses of two tokens out of four, weighted by their probability."""
    torch.manual_seed(0)
    first, second, ref = torch.randn(4, requires_grad=True), torch.randn(4, 4, requires_grad=True), torch.randn(20)
    ref_first, ref_second = ref[:4].log_softmax(-1), ref[4:].view(4, 4).log_softmax(-1)
    a, b = torch.arange(16) // 4, torch.arange(16) % 4
    one, two = first.log_softmax(-1), second.log_softmax(-1)
    logprobs = torch.stack([one[a], two[a, b]], 1)
    refs = torch.stack([ref_first[a], ref_second[a, b]], 1)
    p = logprobs.sum(1).exp()
    exact = (p * (logprobs - refs).sum(1)).sum()
    usual = torch.tensor([[0.7]])  # any number: it does not depend on the response
    each = [
        kl_loss(row[None], row[None].detach(), ref[None], MASK[:1], usual)
        for row, ref in zip(logprobs, refs, strict=True)
    ]
    estimate = 2 * sum(w * loss for w, loss in zip(p.detach(), each, strict=True))  # two tokens in each mean
    wanted = torch.autograd.grad(exact, [first, second], retain_graph=True)
    for found, right in zip(torch.autograd.grad(estimate, [first, second]), wanted, strict=True):
        assert torch.allclose(found, right, atol=1e-5)


def test_at_the_optimum_no_noise_is_left_in_grpos_gradient():
    """The pulls of the score and of the KL cancel in every response, not only on average."""
    task = Bigrams()
    env = environment(task)

    def norm(model):
        agent = GRPO(env, model, batch_size=64, minibatches=1, epochs=1, learning_rate=0.0)
        return agent.update(agent.collect())["grad_norm"]

    assert norm(textrl.solve(task, env.reference, env.kl_coef).model()) < 1e-5
    assert norm(tabular_model(task)) > 1e-2


def test_conjugate_gradient_and_surrogate():
    matrix = torch.tensor([[4.0, 1.0], [1.0, 3.0]])
    x = conjugate_gradient(lambda v: matrix @ v, torch.tensor([1.0, 2.0]), 2)
    assert x.tolist() == pytest.approx([1 / 11, 7 / 11], abs=1e-6)
    old = torch.tensor([0.5, 0.2]).log()
    found = surrogate(torch.tensor([0.6, 0.1]).log(), old, torch.tensor([2.0, -1.0]))
    assert float(found) == pytest.approx((1.2 * 2 - 0.5) / 2)


def test_the_fisher_product_is_the_hessian_of_the_kl():
    task = Bigrams()
    agent = TRPO(environment(task), small_model(4, 8, n_embd=8, n_layer=1, n_head=2), damping=0.01, batch_size=16)
    rollout = agent.collect()

    def kl():
        rows, columns, _ = rollout.places()
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            logits = agent.policy.logits(agent.policy.hidden(rollout.tokens, rows, columns))
        return full_kl(logits.detach(), logits).mean()

    slope = torch.cat([g.flatten() for g in torch.autograd.grad(kl(), agent.weights, create_graph=True)])
    vector = torch.randn(len(slope), generator=torch.Generator().manual_seed(0))
    second = torch.autograd.grad(slope @ vector, agent.weights)
    expected = torch.cat([g.flatten() for g in second]) + 0.01 * vector
    torch.testing.assert_close(agent._fisher(rollout)(vector), expected, atol=1e-5, rtol=1e-4)
    agent.config = dataclasses.replace(agent.config, max_tokens_per_microbatch=20)  # in several parts
    torch.testing.assert_close(agent._fisher(rollout)(vector), expected, atol=1e-5, rtol=1e-4)


def one_state():
    """Every token of the uniform policy as often as it should be, in one state."""
    return Rollout(
        tokens=torch.tensor([[0, 1, action] for action in [0, 1, 2, 3] * 8]),
        prompt_lengths=torch.full((32,), 2),
        action_mask=torch.ones(32, 1, dtype=torch.bool),
        logprobs=torch.full((32, 1), -LOG4),
        rewards=torch.zeros(32, 1),
        scores=torch.zeros(32),
        stopped=torch.ones(32, dtype=torch.bool),
        advantages=torch.tensor([2.0, 1.0, 0.0, -3.0]).repeat(8)[:, None],
    )


def test_trpo_step_by_hand():
    """At one state the natural gradient of a softmax is the advantages themselves, up to a constant."""
    agent = tabular_agent(TRPO, damping=0.0, max_kl=1e-4)
    numbers = agent.step(one_state(), 1e-4)
    row = int(agent.model.tree(torch.tensor([[0, 1]])).last_hidden_state[0, -1, 0])
    moved = agent.model.lm_head.weight[row].detach()
    # F = (I - 11'/4)/4, so x'Fx = |x|^2/4 = 1/2 * ... : the step is x * sqrt(2 * max_kl / (|x|^2 / 4)), |x|^2 = 14
    expected = torch.tensor([2.0, 1.0, 0.0, -3.0]) * math.sqrt(2e-4 / (14 / 4))
    if numbers["step_size"] == 1:
        assert torch.allclose(moved, expected, atol=1e-5)
    else:  # the true KL is a hair above its second order: one halving
        assert numbers["step_size"] == 0.5 and torch.allclose(moved, expected / 2, atol=1e-5)
    assert 0 < numbers["kl_old_new"] <= 1e-4


# ---- what must always hold ------------------------------------------------------------------------------------------


def full_kl_by_hand(old, new, rollout):
    """Mean over the batch's states of the KL over the whole vocabulary, without the agent's own code."""
    total = count = 0.0
    with torch.no_grad():
        before, after = (m(input_ids=rollout.tokens).logits.double().log_softmax(-1) for m in (old, new))
    for i in range(len(rollout)):
        for t in range(int(rollout.action_mask[i].sum())):
            column = int(rollout.prompt_lengths[i]) + t - 1
            p, q = before[i, column], after[i, column]
            total, count = total + float((p.exp() * (p - q)).sum()), count + 1
    return total / count


@pytest.mark.slow
def test_trpo_never_leaves_its_trust_region():
    task = Bigrams()
    model = small_model(4, 8, n_embd=16, n_layer=1, n_head=2)
    agent = TRPO(environment(task), model, batch_size=16, learning_rate=3e-3, critic_epochs=1, minibatches=1)
    moved = 0
    for _ in range(200):
        rollout, old = agent.collect(), copy.deepcopy(agent.model)
        numbers = agent.update(rollout)
        kl = full_kl_by_hand(old, agent.model, rollout)
        assert kl <= 0.01 + 1e-6
        assert kl == pytest.approx(numbers["kl_old_new"], abs=1e-5)
        moved += kl > 1e-4
    assert moved > 100


def test_trpo_bound_follows_the_schedule():
    agent = tabular_agent(TRPO, batch_size=32)
    agent.schedule = 0.1
    assert 0 < agent.update(agent.collect())["kl_old_new"] <= 0.01 * 0.01


def test_a_learning_rate_of_zero_moves_nothing():
    agent = tabular_agent(PPO, batch_size=16, learning_rate=0.0)
    before = copy.deepcopy(agent.model.state_dict())
    agent.learn(100)
    assert agent.learning_rate == 0
    assert all(torch.equal(before[name], weight) for name, weight in agent.model.state_dict().items())


def test_learning_rate_falls_to_zero_and_comes_back():
    seen = []

    def note(agent, metrics):
        seen.append(agent.optimizer.learning_rate)

    agent = tabular_agent(REINFORCE, batch_size=16, warmup=0.0).learn(500, callback=note)
    assert seen[0] == pytest.approx(0.1)
    assert seen == sorted(seen, reverse=True) and 0 < seen[-1] < 0.02
    assert agent.optimizer.learning_rate == pytest.approx(0.1)
    seen.clear()
    tabular_agent(REINFORCE, batch_size=16, warmup=0.0, cooldown=0.0).learn(300, callback=note)
    assert set(seen) == {0.1}
    seen.clear()
    tabular_agent(REINFORCE, batch_size=16, warmup=0.0, cooldown=0.5).learn(500, callback=note)  # half the time full
    assert seen[len(seen) // 2 - 1] == 0.1 and 0 < seen[-1] < 0.04
    assert seen == sorted(seen, reverse=True)
    seen.clear()
    tabular_agent(REINFORCE, batch_size=16, warmup=0.5, cooldown=0.0).learn(500, callback=note)
    assert 0 < seen[0] < 0.02 and seen == sorted(seen) and seen[-1] == 0.1
    seen.clear()
    tabular_agent(REINFORCE, batch_size=16, warmup=0.5).learn(10, callback=note)
    assert seen == [0.1]  # a call of one iteration does not begin with nothing
    with pytest.raises(ValueError, match=r"cooldown must be from 0 to 1; got 1\.5"):
        tabular_agent(REINFORCE, cooldown=1.5)


def test_a_weight_seldom_used_is_not_thrown_far():
    """One gradient after 999 steps without: step k after it is lr 0.1 0.9^k / sqrt(0.05 0.95^k), whatever its size."""

    def moved(**settings):
        model = small_model(4, 8, n_embd=8, n_layer=1, n_head=2)
        agent = GRPO(environment(Bigrams()), model, learning_rate=0.01, **settings)
        weight, optimizer = agent.optimizer.masters[0], agent.optimizer
        start = weight.detach().clone()
        for step in range(1200):
            weight.grad = torch.zeros_like(weight)
            if step == 999:
                weight.grad[0, 0] = 0.5
            optimizer.step()
        return float((start - weight).detach()[0, 0]) / 0.01

    assert moved() == pytest.approx(0.1 / math.sqrt(0.05) / (1 - 0.9 / math.sqrt(0.95)), rel=0.02)  # 5.84
    assert moved(adam_beta2=0.999) > 20
    for wrong in (-0.1, 1.0):
        with pytest.raises(ValueError, match="adam_beta2 must be from 0 to below 1"):
            tabular_agent(REINFORCE, adam_beta2=wrong)


def test_a_row_of_a_table_is_moved_when_it_is_used_and_as_if_it_were_alone():
    assert not any(isinstance(adam, RowAdam) for adam in tabular_agent(A2C).optimizer.adams)
    agent = tabular_agent(PPO, learning_rate=0.01, weight_decay=0.1)
    policy, critic = agent.model.lm_head.weight, agent.critic.score.weight
    assert [type(adam) for adam in agent.optimizer.adams] == [RowAdam]
    chance = torch.Generator().manual_seed(0)
    alone = {}
    for table in (policy, critic):
        rows = [torch.nn.Parameter(row.detach().clone()) for row in table]
        alone[table] = [(row, torch.optim.AdamW([row], lr=0.01, eps=1e-5, weight_decay=0.1)) for row in rows]
    for _ in range(50):
        for table in (policy, critic):
            used = torch.rand(len(table), generator=chance) < 0.2
            table.grad = 1e-3 * torch.randn(table.shape, generator=chance) * used[:, None]
            for i in used.nonzero()[:, 0].tolist():
                row, adam = alone[table][i]
                row.grad = table.grad[i].clone()
                adam.step()
        agent.optimizer.step()
        agent.optimizer.load_state_dict(copy.deepcopy(agent.optimizer.state_dict()))
    for table in (policy, critic):
        torch.testing.assert_close(table.detach(), torch.stack([row.detach() for row, _ in alone[table]]))


def test_the_score_weighs_less_at_first():
    seen = []

    def note(agent, metrics):
        seen.append(agent.score_weight.value)

    agent = tabular_agent(PPO, batch_size=16, score_start=0.1).learn(1000, callback=note)
    assert seen[0] == pytest.approx(0.1) and seen == sorted(seen) and seen[len(seen) // 2] == 1
    assert agent.score_weight.value == 1
    seen.clear()
    agent.learn(300, callback=note)  # what has learned is not sent back
    assert set(seen) == {1}
    for wrong in (0.0, 1.5):
        with pytest.raises(ValueError, match="score_start must be above 0 and at most 1, or None"):
            tabular_agent(PPO, score_start=wrong)


@pytest.mark.parametrize("scale", [1.0, 10.0])
def test_the_first_weight_goes_by_the_spread_of_the_first_scores(scale):
    """0.4 KL coefficients of one deviation of the score: scores and coefficient times ten are the same run."""
    task, seen = Bigrams(), []
    task._table = task._table * scale
    agent = PPO(environment(task, 0.05 * scale), tabular_model(task, std=1.0, seed=3), batch_size=32, learning_rate=0.1)
    spread = float(copy.deepcopy(agent).collect().scores.std(unbiased=False))

    def note(agent, metrics):
        seen.append(agent.score_weight.value)

    agent.learn(600, callback=note)
    assert seen[0] == pytest.approx(0.4 * 0.05 * scale / spread, rel=1e-4) and seen[0] < 0.5
    assert seen == sorted(seen) and seen[-1] == 1


def test_scores_that_are_alike_but_for_rounding_have_no_spread():
    agent = tabular_agent(PPO, batch_size=16)
    agent.score_weight.rising = True
    assert agent.weigh(torch.full((48,), 0.1)) == 1 and agent.score_weight.first is None
    assert agent.weigh(torch.tensor([0.0, 2.0])) == agent.score_weight.first == pytest.approx(0.4 * agent.base.kl_coef)


def test_a_run_that_goes_on_weighs_the_score_as_one_that_was_not_stopped(tmp_path):
    def made():
        return tabular_agent(PPO, batch_size=16)

    whole, parts = [], []
    made().learn(600, callback=lambda agent, metrics: whole.append(agent.score_weight.value))

    def stop(agent, metrics):
        parts.append(agent.score_weight.value)
        return len(parts) != 3

    first = made().learn(600, log_dir=tmp_path, checkpoint_every=1, callback=stop)
    second = made()
    second.learn(
        600, log_dir=tmp_path, checkpoint_every=1, resume=True, callback=lambda a, m: parts.append(a.score_weight.value)
    )
    assert second.score_weight.first == first.score_weight.first
    assert parts == whole and whole[3] < 1


@pytest.mark.parametrize("kind", ON_POLICY)
def test_a_score_of_less_weight_is_a_smaller_score(kind):
    """An update at a weight of 1/2 is one on half the score; without a penalty the score keeps its full weight."""

    def learned(task, weight, kl_coef, **settings):
        agent = kind(environment(task, kl_coef), tabular_model(task, std=1.0, seed=3), batch_size=32, **settings)
        agent.score_weight.value = weight
        agent.update(agent.collect())
        return agent.model.lm_head.weight.detach()

    task, half = Bigrams(), Bigrams()
    half._table = half._table / 2
    settings = {"learning_rate": 0.1, "max_grad_norm": 0.0}
    found, wanted = learned(task, 0.5, 0.1, **settings), learned(half, 1.0, 0.1, **settings)
    assert (found - wanted).norm() < 0.1 * (found - learned(task, 1.0, 0.1, **settings)).norm()
    assert torch.equal(learned(task, 0.5, 0.0, **settings), learned(task, 1.0, 0.0, **settings))
    if issubclass(kind, PPO):
        settings |= {"kl_target": 1.0}
        assert torch.equal(learned(task, 0.5, 0.1, **settings), learned(task, 1.0, 0.1, **settings))


@pytest.mark.parametrize("critic", ["separate", "shared"])
def test_ppo_is_saved_with_its_critic(tmp_path, critic):
    task = Bigrams()
    env = environment(task)
    agent = PPO(env, small_model(4, 8, n_embd=16, n_layer=1, n_head=2), critic=critic, batch_size=16)
    agent.learning_rate = agent.optimizer.learning_rate = 0.01
    agent.update(agent.collect())
    agent.save(tmp_path / "agent")
    again = PPO.load(tmp_path / "agent", env)
    name = "value_head" if critic == "shared" else "critic"
    assert set(agent.modules) == set(again.modules) == {"policy", name}
    for key, weight in agent.modules[name].state_dict().items():
        assert torch.equal(weight, again.modules[name].state_dict()[key])


def test_nlpo_keeps_inside_its_mask_everywhere():
    task = Bigrams()
    model = tabular_model(task, std=1.5, seed=5)
    agent = NLPO(environment(task), model, top_p=0.7, mask_interval=2, batch_size=64, learning_rate=0.1)
    frozen = copy.deepcopy(agent.model)
    rollout = agent.collect()
    assert rollout.allowed is not None
    assert rollout.allowed.gather(2, rollout.responses[..., None])[..., 0][rollout.action_mask].all()
    with torch.no_grad():
        rows, columns, targets = rollout.places()
        p = frozen(input_ids=rollout.tokens).logits[rows, columns].softmax(-1)  # (n, V)
    ordered, order = p.sort(-1, descending=True)
    for n in range(len(p)):  # the mask by hand: the most probable until 0.7 is reached
        keep, reached = [], 0.0
        for token, share in zip(order[n].tolist(), ordered[n].tolist(), strict=True):
            if reached < 0.7:
                keep.append(token)
            reached += share
        assert sorted(keep) == rollout.allowed[rollout.action_mask][n].nonzero()[:, 0].tolist()
        expected = p[n, targets[n]] / p[n, keep].sum()
        assert float(rollout.logprobs[rollout.action_mask][n].exp()) == pytest.approx(float(expected), rel=1e-4)
    assert agent.update(rollout)["first_ratio_error"] < 1e-4  # the update sees the same masks


def test_nlpo_mask_policy_is_slow_and_saved(tmp_path):
    task = Bigrams()
    env = environment(task)
    agent = NLPO(env, tabular_model(task, std=1.0), mask_interval=3, batch_size=16, learning_rate=0.1)
    start = agent.mask_model.lm_head.weight.clone()
    for update in range(1, 4):
        agent.update(agent.collect())
        agent.num_updates += 1
        assert torch.equal(agent.mask_model.lm_head.weight, start) == (update < 3)
    assert torch.equal(agent.mask_model.lm_head.weight, agent.model.lm_head.weight)
    agent.update(agent.collect())
    agent.save(tmp_path / "agent")
    again = NLPO.load(tmp_path / "agent", env)
    assert torch.equal(again.mask_model.lm_head.weight, agent.mask_model.lm_head.weight)
    assert not torch.equal(again.mask_model.lm_head.weight, again.model.lm_head.weight)


# ---- the exact answer -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_estimators_are_unbiased_and_baselines_help():
    module = benchmark("gradient_variance")
    found = {name: module.measure(name, 300) for name in module.ESTIMATORS}
    for name, (z, _) in found.items():
        assert z < 2.5, name
    variances = {name: variance for name, (_, variance) in found.items()}
    none, leave_one_out = variances["REINFORCE, no baseline"], variances["REINFORCE, leave-one-out"]
    assert none > leave_one_out > variances["A2C, right value, lambda 0.95"]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("kind", ON_POLICY, ids=lambda kind: kind.__name__)
def test_agents_reach_the_optimum(kind, seed):
    task = Bigrams(length=4)
    env = environment(task, kl_coef=0.1, seed=seed)
    model = copy.deepcopy(env.reference).requires_grad_(True)
    several_steps_a_batch = kind in (PPO, NLPO, TRPO)
    agent = kind(env, model, learning_rate=0.05, batch_size=128, seed=seed)
    agent.learn(40_000 if several_steps_a_batch else 200_000)
    assert textrl.evaluate_exact(task, agent.model, env.reference, 0.1).share > 0.95


def test_an_agent_may_be_loaded_without_its_adaptive_coefficient(tmp_path):
    env = textrl.TextEnv(Bigrams(), reference=small_model(4, 6, 0), kl_coef=0.1)
    PPO(env, small_model(4, 6, 0), kl_target=1.0, batch_size=8, device="cpu").learn(30).save(tmp_path / "agent")
    before = env.kl_coef
    PPO.load(tmp_path / "agent", env, kl_target=None).learn(30)
    assert env.kl_coef == before


def test_a_shared_critic_needs_hidden_states():
    task = Bigrams()
    with pytest.raises(ValueError, match='critic must be "separate" for TabularLM, whose states below the head'):
        PPO(textrl.TextEnv(task), textrl.tabular_model(task), critic="shared")


@pytest.mark.parametrize("baseline", ["mean", "prompt_mean"])
def test_the_first_baseline_does_not_know_the_return_it_is_taken_off(baseline):
    def advantages(first):
        agent = tabular_agent(REINFORCE, baseline=baseline)
        return agent.advantages(fixed_rollout(), torch.tensor([[first, first], [1.0, 0.0]]))[0, 0]

    assert float(advantages(5.0) - advantages(3.0)) == pytest.approx(2.0)
