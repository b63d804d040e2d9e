"""What the settings of the agents change."""

import numpy as np
import pytest
import torch
from test_agents import Bigrams, environment, fixed_rollout, one_state, tabular_agent

import textrl
from textrl.agents import GRPO, PPO, TRPO
from textrl.models import small_model
from textrl.tabular import tabular_model


def test_ppo_asks_the_last_step_of_an_epoch_how_far_it_is_from_the_old_policy():
    agent = tabular_agent(PPO, minibatches=2, target_kl=0.05)
    kls = iter([0.0, 0.06, 0.0, 0.06])
    agent._step = lambda batch: {"loss": 0.0, "kl_old_new": next(kls), "ratio_error": 0.0}
    assert agent.update(fixed_rollout())["steps"] == 2  # the first step of an epoch stands where it began


def test_a_step_of_ppo_reports_the_loss_and_the_gradient_of_actor_and_critic():
    agent = tabular_agent(PPO, epochs=1, minibatches=1)
    parts = iter(
        [
            {"loss": 1.0, "grad_norm": 3.0, "kl_old_new": 0.0, "ratio_error": 0.0},
            {"loss": 0.5, "grad_norm": 4.0, "value_loss": 2.0},
        ]
    )
    agent.minimise = lambda loss, batch: next(parts)
    numbers = agent.update(fixed_rollout())
    assert numbers["loss"] == pytest.approx(1.5)
    assert numbers["grad_norm"] == pytest.approx(5.0)
    assert numbers["value_loss"] == pytest.approx(2.0)


def test_as_many_layers_of_ppos_critic_learn_as_of_its_policy():
    model = small_model(4, 8, n_embd=8, n_layer=2, n_head=2)
    agent = PPO(environment(Bigrams()), model, trainable_layers=1)
    for trunk in (agent.model.base_model, agent.critic.base_model):
        learns = [any(p.requires_grad for p in block.parameters()) for block in trunk.h]
        assert learns == [False, True]
        assert not trunk.wte.weight.requires_grad


def test_ppos_coefficient_follows_the_mean_of_the_log_ratios_and_not_of_their_sizes():
    agent = tabular_agent(PPO, kl_target=1.0, kl_horizon=10.0, epochs=1, minibatches=1)
    agent.update(fixed_rollout(old=((0.25, 0.5), (0.25, 1.0)), ref=((1.0, 1.0), (0.125, 1.0))))  # log 1/8 and log 2
    assert agent.base.kl_coef == pytest.approx(0.1 * (1 - 0.2 * 2 / 10))  # a mean below 0 is below any target


def test_grpo_takes_as_many_passes_and_steps_as_it_is_told():
    agent, seen = tabular_agent(GRPO, group_size=2, epochs=3, minibatches=2), []
    agent.minimise = lambda loss, batch: seen.append(len(batch)) or {"loss": 0.0}
    agent.update(fixed_rollout())
    assert seen == [1] * 6


class Masked(Bigrams):
    """No token follows itself."""

    def allowed_tokens(self, rows, responses):
        written = (responses < self.vocab_size).sum(1)
        last = responses[np.arange(len(responses)), np.maximum(written - 1, 0)]
        return (np.arange(self.vocab_size) != last[:, None]) | (written == 0)[:, None]


@pytest.mark.parametrize(("task", "temperature"), [(Bigrams(), 2.0), (Masked(), 1.0)])
def test_trpos_ratios_are_those_of_the_policy_that_tokens_are_drawn_from(task, temperature):
    model = tabular_model(task, std=2.0, seed=1)
    agent = TRPO(textrl.TextEnv(task, temperature=temperature), model, batch_size=16)
    rollout = agent.collect()
    targets = rollout.places()[2][:, None]
    found = agent._logits(rollout).log_softmax(-1).gather(-1, targets)[:, 0]
    torch.testing.assert_close(rollout.spread(found.detach()), rollout.logprobs)


def test_trpo_measures_the_same_in_however_many_parts():
    found = []
    for limit in (16384, 20):
        task = Bigrams()
        agent = TRPO(environment(task), tabular_model(task, std=1.0), batch_size=16, max_tokens_per_microbatch=limit)
        rollout = agent.collect()
        rollout.advantages = torch.where(rollout.action_mask, torch.arange(16.0)[:, None], 0.0)
        with torch.no_grad():
            old = [agent._logits(part) for part, _ in agent._parts(rollout)]
            agent.model.lm_head.weight.mul_(1.1)  # away from the old policy
        found.append(torch.tensor(agent._measure(rollout, old)))
        assert (len(old) > 1) == (limit == 20)
    assert found[0].abs().min() > 1e-4
    torch.testing.assert_close(*found)


def test_trpos_line_search_shrinks_by_its_factor():
    agent = tabular_agent(TRPO, damping=0.0, backtrack_coef=0.8)
    measured = iter([(1.0, 0.0), (0.5, 0.0), (1.0, 0.0), (2.0, 0.0)])
    agent._measure = lambda rollout, old: next(measured)
    assert agent.step(one_state(), 0.01)["step_size"] == pytest.approx(0.64)


def test_trpos_fisher_matrix_is_that_of_so_many_episodes():
    agent, seen = tabular_agent(TRPO, fisher_episodes=3), []
    real = agent._linear
    agent._linear = lambda batch: seen.append(len(batch)) or real(batch)
    agent.step(one_state(), 0.01)
    assert seen == [3]
