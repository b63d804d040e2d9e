"""Returns, advantages and whitening, by hand."""

import math

import pytest
import torch

from textrl.critic import with_advantages
from textrl.returns import (
    discounted_returns,
    explained_variance,
    gae,
    group_normalised,
    leave_one_out,
    masked_mean,
    masked_var,
    mean_of_others,
    whiten,
)
from textrl.rollout import Rollout

FULL = torch.ones(1, 3, dtype=torch.bool)


def mask(*rows):
    return torch.tensor(rows, dtype=torch.bool)


def test_masked_mean_and_variance():
    x, m = torch.tensor([[1.0, 3.0, 100.0], [5.0, 100.0, 100.0]]), mask([1, 1, 0], [1, 0, 0])
    assert masked_mean(x, m) == 3
    assert masked_var(x, m) == pytest.approx((4 + 0 + 4) / 3)  # biased: divided by 3, not 2
    assert masked_mean(x, torch.zeros_like(m)) == 0


def test_whitening():
    x, m = torch.tensor([[1.0, 3.0, 100.0], [5.0, 7.0, 100.0]]), mask([1, 1, 0], [1, 1, 0])
    s = math.sqrt(5)
    expected = torch.tensor([[-3 / s, -1 / s, 0], [1 / s, 3 / s, 0]])
    assert torch.allclose(whiten(x, m), expected, atol=1e-6)
    kept = whiten(x, m, keep_mean=True)
    assert torch.allclose(kept[m], expected[m] + 4, atol=1e-6)
    assert kept[0, 2] == 0


def test_discounted_returns():
    rewards = torch.tensor([[1.0, 2.0, 4.0]])
    assert discounted_returns(rewards, FULL).tolist() == [[7, 6, 4]]
    assert discounted_returns(rewards, FULL, 0.5).tolist() == [[3, 4, 4]]
    # the middle place is not the agent's: no discount for it, its reward counts for the token before
    assert discounted_returns(rewards, mask([1, 0, 1]), 0.5).tolist() == [[1 + 2 + 0.5 * 4, 0, 4]]
    assert discounted_returns(torch.tensor([[1.0, 2.0, 0.0]]), mask([1, 1, 0])).tolist() == [[3, 2, 0]]


def test_gae_by_hand():
    rewards, values = torch.tensor([[1.0, 0.0, 2.0]]), torch.tensor([[0.5, 1.0, 1.5]])
    deltas = [1 + 0.9 * 1 - 0.5, 0 + 0.9 * 1.5 - 1, 2 - 1.5]  # nothing past the end
    third = deltas[2]
    second = deltas[1] + 0.9 * 0.8 * third
    first = deltas[0] + 0.9 * 0.8 * second
    advantages, returns = gae(rewards, values, FULL, 0.9, 0.8)
    assert advantages[0].tolist() == pytest.approx([first, second, third], abs=1e-6)
    assert returns[0].tolist() == pytest.approx([first + 0.5, second + 1, third + 1.5], abs=1e-6)


def test_gae_between_monte_carlo_and_one_step():
    torch.manual_seed(0)
    rewards, values = torch.randn(4, 5), torch.randn(4, 5)
    m = torch.arange(5) < torch.tensor([5, 3, 1, 4])[:, None]
    holes = torch.rand(4, 5) < 0.6  # with rewards at places that are not the agent's
    assert torch.allclose(gae(rewards, values, holes, 0.9, 1.0)[1], discounted_returns(rewards, holes, 0.9), atol=1e-6)
    rewards, values = rewards * m, values * m
    advantages, returns = gae(rewards, values, m, 0.9, 1.0)
    assert torch.allclose(returns, discounted_returns(rewards, m, 0.9), atol=1e-6)
    assert torch.allclose(advantages, (returns - values) * m, atol=1e-6)
    one_step, _ = gae(rewards, values, m, 0.9, 0.0)
    after = torch.cat([values[:, 1:], torch.zeros(4, 1)], 1)
    assert torch.allclose(one_step, (rewards + 0.9 * after - values) * m, atol=1e-6)


def test_gae_steps_over_places_that_are_not_the_agents():
    rewards, values = torch.tensor([[1.0, 5.0, 2.0]]), torch.tensor([[0.5, 9.0, 1.5]])
    advantages, returns = gae(rewards, values, mask([1, 0, 1]), 0.9, 0.8)
    first = (1 + 5 + 0.9 * 1.5 - 0.5) + 0.9 * 0.8 * 0.5
    assert advantages[0].tolist() == pytest.approx([first, 0, 0.5], abs=1e-6)
    assert returns[0].tolist() == pytest.approx([first + 0.5, 0, 2], abs=1e-6)


def test_mean_of_others():
    scores, groups = torch.tensor([1.0, 2.0, 6.0, 5.0]), torch.tensor([0, 0, 0, 1])
    found = mean_of_others(scores, groups, torch.full((4,), 4.0))
    assert found.tolist() == pytest.approx([(4 + 8) / 3, (4 + 7) / 3, (4 + 3) / 3, 4])


def test_leave_one_out():
    scores = torch.tensor([1.0, 2.0, 6.0, 0.0, 0.0, 3.0])
    assert leave_one_out(scores, 3).tolist() == [1 - 4, 2 - 3.5, 6 - 1.5, -1.5, -1.5, 3]
    assert leave_one_out(scores, 2).tolist() == [-1, 1, 6, -6, -3, 3]


def test_group_normalised():
    found = group_normalised(torch.tensor([1.0, 3.0, 5.0, 5.0]), 2)
    s = math.sqrt(2) + 1e-4  # unbiased deviation of 1 and 3
    assert found.tolist() == pytest.approx([-1 / s, 1 / s, 0, 0], abs=1e-6)


def test_explained_variance():
    returns = torch.tensor([[1.0, 2.0, 3.0]])
    assert explained_variance(returns, returns, FULL) == 1
    assert explained_variance(torch.full((1, 3), 7.0), returns, FULL) == pytest.approx(0)
    assert explained_variance(-returns, returns, FULL) == pytest.approx(1 - 4)


def test_the_mean_of_one_place_is_what_stands_there():
    x, m = torch.tensor([[3.0, 100.0]]), torch.tensor([[True, False]])
    assert masked_mean(x, m) == 3
    assert masked_var(x, m) == 0
    assert whiten(x, m).tolist() == [[0, 0]]


def test_rewards_at_several_places_between_the_agents_all_count_for_the_token_before():
    rewards, values = torch.tensor([[1.0, 2.0, 4.0, 8.0]]), torch.tensor([[0.5, 9.0, 9.0, 1.5]])
    mask = torch.tensor([[True, False, False, True]])
    advantages, _ = gae(rewards, values, mask, 0.5, 1.0)
    last = 8 - 1.5
    assert advantages.tolist() == [[1 + 2 + 4 + 0.5 * 1.5 - 0.5 + 0.5 * last, 0, 0, last]]


def test_the_critics_targets_come_from_advantages_before_whitening():
    mask = torch.tensor([[True, True], [True, False]])
    rewards, values = torch.tensor([[0.0, 3.0], [1.0, 0.0]]), torch.tensor([[0.5, 1.0], [2.0, 0.0]])
    rollout = Rollout(
        tokens=torch.tensor([[0, 1, 1, 2], [0, 1, 0, 0]]),
        prompt_lengths=torch.tensor([2, 2]),
        action_mask=mask,
        logprobs=torch.zeros(2, 2),
        rewards=rewards,
        scores=rewards.sum(1),
        stopped=torch.tensor([False, True]),
        values=values,
    )
    found, known = with_advantages(rollout, lambda batch: values, 64, 1.0, 0.5, True)
    advantages, returns = gae(rewards, values, mask, 1.0, 0.5)
    torch.testing.assert_close(found.advantages, whiten(advantages, mask))
    torch.testing.assert_close(found.returns, returns)
    plain, same = with_advantages(rollout, lambda batch: values, 64, 1.0, 0.5, False)
    assert torch.equal(plain.advantages, advantages)
    assert same == pytest.approx(known)
