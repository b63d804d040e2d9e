"""An allocation that fails: the microbatch is halved once, to the same effect; then one line says what to turn."""

import copy

import pytest
import torch
from torch import nn

import textrl
from textrl.agents import DPO, PPO
from textrl.envs.copy import Copy
from textrl.memory import OutOfMemory, accumulate_gradients, is_out_of_memory
from textrl.optim import Optimizer
from textrl.returns import masked_mean
from textrl.rollout import Rollout
from textrl.scores import reason

CPU = RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried to ...")
ERRORS = [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), CPU, MemoryError()]


def agent_of(**settings):
    return PPO(textrl.TextEnv(Copy()), batch_size=16, seed=3, epochs=1, minibatches=2, dtype="float32", **settings)


def failing(agent, error, when):
    """The agent's loss fails for microbatches for which `when(tokens)` is true, and after some work."""
    loss = agent._loss

    def fails(batch):
        result = loss(batch)
        if when(batch.tokens.numel()):
            result[0].backward()
            raise error
        return result

    agent._loss = fails


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
def test_the_update_goes_on_with_half_the_microbatch_to_the_same_effect(error):
    plain, short = agent_of(), agent_of()
    rollout = plain.collect()
    short.generator.set_state(plain.generator.get_state())  # the same minibatches
    largest = max(rollout.select(torch.arange(8)).tokens.numel(), 1)
    failing(short, error, lambda tokens: tokens > 0.7 * largest)
    want = plain.update(copy.deepcopy(rollout))
    with pytest.warns(RuntimeWarning, match=r"max_tokens_per_microbatch is \d+ from now on \(it was 16384\)"):
        got = short.update(copy.deepcopy(rollout))
    assert 1 <= short.config.max_tokens_per_microbatch <= largest
    for key, value in want.items():
        assert got[key] == pytest.approx(value, rel=1e-4, abs=1e-5), key
    for a, b in zip(plain.model.parameters(), short.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-4)


def test_learn_goes_on_and_a_second_failure_names_the_options():
    agent = agent_of()
    failing(agent, CPU, lambda tokens: tokens > 50)
    with pytest.warns(RuntimeWarning, match="out of memory in the update"):
        agent.learn(60)
    assert agent.num_updates >= 1
    failing(agent, CPU, lambda tokens: True)
    with pytest.raises(OutOfMemory, match=r"lower max_tokens_per_microbatch \(now \d+\).*batch_size \(now 16\)"):
        agent.learn(60)


def test_pairs_stay_whole_and_other_errors_pass():
    rows = [{"prompt": "a", "chosen": "abc", "rejected": "c"}, {"prompt": "bc", "chosen": "a", "rejected": "cb"}]
    agent = DPO(textrl.TextEnv(Copy()), dataset=rows, batch_size=16, dtype="float32")
    sizes = []
    failing(agent, ERRORS[0], lambda tokens: sizes.append(tokens) or tokens == sizes[0])
    with pytest.warns(RuntimeWarning, match="out of memory in the update"):
        agent.update(agent.collect())
    assert max(sizes[1:]) <= sizes[0] // 2
    broken = agent_of()
    failing(broken, RuntimeError("shapes do not fit"), lambda tokens: True)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        broken.learn(10)
    assert broken.config.max_tokens_per_microbatch == 16384
    assert not is_out_of_memory(ValueError("can't allocate memory"))


def test_activation_checkpointing_learns_the_same():
    plain, again = agent_of(), agent_of(activation_checkpointing=True)
    assert again.critic.base_model.gradient_checkpointing and again.model.base_model.gradient_checkpointing
    rollout = plain.collect()
    again.generator.set_state(plain.generator.get_state())  # the same minibatches
    want, got = plain.update(copy.deepcopy(rollout)), again.update(copy.deepcopy(rollout))
    assert got == pytest.approx(want, rel=1e-5, abs=1e-6)


def test_a_run_that_is_resumed_keeps_the_halved_microbatch(tmp_path):
    agent = agent_of()
    failing(agent, CPU, lambda tokens: tokens > 50)
    with pytest.warns(RuntimeWarning, match="out of memory in the update"):
        agent.learn(60, log_dir=tmp_path, checkpoint_every=1)
    again = agent_of()
    again.learn(120, log_dir=tmp_path, resume=True)
    assert again.config == agent.config != agent_of().config


def test_a_parameter_in_two_groups_counts_in_the_first_alone():
    own, both, other = (nn.Parameter(torch.zeros(1)) for _ in range(3))
    optimizer = Optimizer([own, both], [both, other], learning_rate=0.1, max_grad_norm=0.0)
    assert [len(optimizer.parameters[group]) for group in optimizer.groups] == [2, 1]
    own.grad, both.grad, other.grad = torch.tensor([2.0]), torch.tensor([3.0]), torch.tensor([6.0])
    assert optimizer.step() == pytest.approx(7)
    assert both.item() == pytest.approx(-0.1, rel=1e-3)  # one step


def test_weights_below_float32_are_put_back_with_their_copies():
    weight = nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.bfloat16))
    optimizer = Optimizer([weight], learning_rate=0.5)
    before = optimizer.get_weights()
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert weight.tolist() != [1, 2]
    optimizer.set_weights(before)
    assert weight.tolist() == [1, 2]
    assert optimizer.masters[0].tolist() == [1, 2]


@pytest.mark.parametrize("tokens_at_once", [64, 4])
def test_a_ragged_batchs_loss_is_the_mean_over_its_tokens_however_it_is_cut(tokens_at_once):
    weight = torch.tensor(2.0, requires_grad=True)
    x = torch.tensor([[1.0, 3.0], [5.0, 0.0], [7.0, 9.0]])
    batch = Rollout(
        tokens=torch.ones(3, 4, dtype=torch.int64),
        prompt_lengths=torch.tensor([2, 2, 2]),
        action_mask=torch.tensor([[True, True], [True, False], [True, True]]),
        logprobs=x,
        rewards=x,
        scores=x[:, 0],
        stopped=torch.zeros(3, dtype=torch.bool),
    )

    def loss(part):
        mean = masked_mean(part.logprobs, part.action_mask)
        return weight * mean, {"mean": mean}

    found = accumulate_gradients(loss, batch, tokens_at_once)
    assert found == pytest.approx({"loss": 10, "mean": 5})
    assert weight.grad.item() == pytest.approx(5)


def test_a_loss_may_report_plain_numbers():
    agent = agent_of()
    out = agent.minimise(lambda batch: (-agent.logprobs(batch).mean(), {"a": 0.25, "b": 2}), agent.collect())
    assert out["a"] == pytest.approx(0.25) and out["b"] == pytest.approx(2)


def test_an_error_without_words_is_told_by_its_name():
    agent = agent_of()
    failing(agent, MemoryError(), lambda tokens: True)
    with pytest.warns(RuntimeWarning), pytest.raises(OutOfMemory, match=r"smaller optimizer \(MemoryError\)"):
        agent.learn(60)
    assert [reason(error) for error in (OSError(), OSError(" \n"), OSError("\na\nb"))] == ["OSError", "OSError", "a"]
