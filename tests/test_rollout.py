"""A batch of episodes: its numbers, its groups, and the masks and log-probabilities that it was drawn with."""

import math

import numpy as np
import pytest
import torch

import textrl
from textrl.batch import without
from textrl.envs.brackets import Brackets
from textrl.models import small_model
from textrl.policy import CausalPolicy
from textrl.rollout import Rollout, both_masks, collect_sampled


def test_the_numbers_of_a_batch_by_hand():
    rollout = Rollout(
        tokens=torch.tensor([[0, 1, 1, 2], [0, 1, 0, 0]]),
        prompt_lengths=torch.tensor([2, 2]),
        action_mask=torch.tensor([[True, True], [True, False]]),
        logprobs=torch.tensor([[0.25, 0.5], [0.25, 1.0]]).log(),
        rewards=torch.tensor([[0.5, 3.0], [1.0, 0.0]]),
        scores=torch.tensor([4.0, 1.0]),
        stopped=torch.tensor([False, True]),
        ref_logprobs=torch.tensor([[0.5, 0.25], [0.0625, 1.0]]).log(),
    )
    log2 = math.log(2)
    assert rollout.metrics() == pytest.approx(
        {
            "rollout/score": 2.5,
            "rollout/score_std": 1.5,
            "rollout/return": 2.25,
            "rollout/response_length": 1.5,
            "rollout/stopped": 0.5,
            "rollout/surprisal": (2 + 1 + 2) * log2 / 3,  # a token
            "rollout/kl_reference": ((-1 + 1) + 2) * log2 / 2,  # a response
        }
    )


def test_who_belongs_together_is_known_after_some_were_dropped():
    zeros = torch.zeros(6, 1)
    rollout = Rollout(
        tokens=torch.arange(12).view(6, 2),
        prompt_lengths=torch.ones(6, dtype=torch.int64),
        action_mask=torch.ones(6, 1, dtype=torch.bool),
        logprobs=zeros,
        rewards=zeros,
        scores=torch.arange(6.0),
        stopped=torch.zeros(6, dtype=torch.bool),
        group_size=2,
    )
    left = without(rollout, {1: "bad", 2: "bad", 3: "worse"})
    assert left.scores.tolist() == [0, 4, 5]
    assert left.grouping.tolist() == [0, 2, 2]
    assert left.dropped == ["bad", "bad", "worse"]


def test_the_tasks_mask_goes_before_an_agents_own_where_they_have_nothing_in_common():
    task = np.array([[True, True, False], [True, False, False]])
    own = np.array([[False, True, True], [False, True, True]])
    observations = np.zeros((2, 4), dtype=np.int64)
    assert both_masks(task, lambda *_: own, observations).tolist() == [[False, True, False], [True, False, False]]
    assert both_masks(None, lambda *_: own, observations) is own
    assert both_masks(task, None, observations) is task


def test_a_lower_precision_keeps_inside_the_masks_and_reads_the_values_with_the_log_probabilities():
    env = textrl.TextEnv(Brackets())
    model = small_model(env.task.vocab_size, env.task.max_prompt_tokens + env.task.max_new_tokens).bfloat16()
    policy = CausalPolicy(model, env.task.vocab_size)
    rollout = collect_sampled(
        env,
        policy,
        16,
        rng=np.random.default_rng(0),
        generator=torch.Generator().manual_seed(0),
        value=lambda hidden: hidden.float().sum(-1),
    )
    assert rollout.allowed is not None
    single = rollout.action_mask & (rollout.allowed.sum(-1) == 1)
    assert single.any()
    assert rollout.logprobs[single].abs().max() < 1e-6  # the only token that was allowed
    rows, columns, _ = rollout.places()  # one token at a time rounds otherwise than all at once
    values = policy.hidden(rollout.tokens, rows, columns).float().sum(-1)
    torch.testing.assert_close(rollout.values, rollout.spread(values), atol=1e-2, rtol=1e-2)
    assert rollout.drift < 0.1
