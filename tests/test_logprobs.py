"""The head's own forward and backward pass against autograd's: numbers, gradients, chunks, masks, any order."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

import textrl
import textrl.envs.copy
import textrl.logprobs
from textrl.agents import PPO
from textrl.critic import batched_values
from textrl.logprobs import token_logprobs
from textrl.models import small_model
from textrl.policy import CausalPolicy, values_at
from textrl.scalars import value_model

N, D, V = 37, 8, 11


@pytest.fixture(params=["plain", "fused"])
def device(request, monkeypatch):
    """Where the tensors are, and by which of the two ways they are read."""
    if request.param == "plain":
        return torch.device("cpu")
    pytest.importorskip("triton")
    import textrl.fused

    monkeypatch.setattr(textrl.fused, "BLOCK", 4)  # a row is three blocks
    monkeypatch.setattr(textrl.logprobs, "function_for", lambda hidden, weight: textrl.fused.FusedLogprobs)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def parts(dtype=torch.float64, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, D, generator=generator, dtype=dtype).to(device).requires_grad_()
    weight = torch.randn(V, D, generator=generator, dtype=dtype).to(device).requires_grad_()
    targets = torch.randint(0, V, (N,), generator=generator)
    allowed = torch.rand(N, V, generator=generator) < 0.6
    allowed[torch.arange(N), targets] = True
    return hidden, weight, targets.to(device), allowed.to(device), torch.randn(2, N, generator=generator).to(device)


def plainly(hidden, weight, targets, allowed, temperature):
    logits = (hidden @ weight.T).float() / temperature
    if allowed is not None:
        logits = logits.masked_fill(~allowed, -1e30)
    table = logits.log_softmax(-1)
    return table.gather(-1, targets[:, None])[:, 0], -(table.exp() * table).sum(-1)


@pytest.mark.parametrize("chunk", [8 * 2**20, 4 * V * 5, 4 * V])
@pytest.mark.parametrize("kept", [2**30, 0])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("entropy", [False, True])
def test_numbers_and_gradients_are_autograds(chunk, kept, masked, entropy, device, monkeypatch):
    monkeypatch.setattr(textrl.logprobs, "CHUNK_BYTES", chunk)
    monkeypatch.setattr(textrl.logprobs, "KEEP_BYTES", kept)
    hidden, weight, targets, allowed, weights = parts(torch.float32, device)
    allowed = allowed if masked else None

    def look(function):
        logprobs, entropies = function(0.7)
        loss = (weights[0] * logprobs).sum() + ((weights[1] * entropies).sum() if entropy else 0.0)
        return [logprobs, entropies, *torch.autograd.grad(loss, [hidden, weight], retain_graph=True), loss]

    mine = look(lambda t: token_logprobs(hidden, weight, targets, allowed, t, entropy=True))
    want = look(lambda t: plainly(hidden, weight, targets, allowed, t))
    for a, b in zip(mine, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(b.detach().abs().max()))
    again = torch.autograd.grad(mine[-1], [hidden, weight])  # a second backward pass through the same graph
    for a, b in zip(again, want[2:4], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(b.detach().abs().max()))


def test_a_frozen_head_or_trunk_gets_no_gradient_and_no_rows_are_fine(device):
    hidden, weight, targets, _, weights = parts(torch.float32, device)
    for learns, frozen in ((hidden, weight), (weight, hidden)):
        frozen.requires_grad_(False)
        want = torch.autograd.grad((weights[0] * plainly(hidden, weight, targets, None, 1.0)[0]).sum(), learns)[0]
        (weights[0] * token_logprobs(hidden, weight, targets)[0]).sum().backward()
        assert frozen.grad is None
        torch.testing.assert_close(learns.grad, want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))
        frozen.requires_grad_(True)
        learns.grad = None
    logprobs, entropies = token_logprobs(hidden[:0], weight, targets[:0], entropy=True)
    assert logprobs.shape == entropies.shape == (0,)


def test_a_token_that_is_not_allowed_is_as_improbable_in_both_ways(device):
    hidden, weight, targets, allowed, _ = parts(torch.float32, device)
    allowed[torch.arange(N), targets] = False
    allowed[:, 0] |= ~allowed.any(1)
    found = token_logprobs(hidden, weight, targets, allowed)[0]
    torch.testing.assert_close(found, plainly(hidden, weight, targets, allowed, 1.0)[0])


def test_kernels_that_do_not_run_are_told_and_left_alone(monkeypatch):
    pytest.importorskip("triton")
    import textrl.fused

    def broken(*arguments, **constants):
        raise RuntimeError("no C compiler\nmore")

    monkeypatch.setattr(textrl.fused, "_launch", broken)
    textrl.fused.works.cache_clear()
    with pytest.warns(RuntimeWarning, match=r"take the slow way: Triton's kernels do not run here \(no C compiler\)$"):
        assert not textrl.fused.works(torch.device("cpu"))
    textrl.fused.works.cache_clear()


def test_a_gpus_head_for_sampling_gives_the_same_logits(monkeypatch):
    model = small_model(V, 16, 0)
    policy, hidden = CausalPolicy(model, V - 1), torch.randn(5, model.config.n_embd)
    want = policy.logits(hidden)
    monkeypatch.setattr(CausalPolicy, "device", torch.device("cuda"))
    found = policy.sampler()(hidden)
    assert found.shape == (5, 64)
    torch.testing.assert_close(found[:, : V - 1], want)


class Odd(nn.Linear):
    """A head that somebody changed."""

    def forward(self, x):
        return super().forward(x) + 0.1


def test_policies_use_it_for_plain_heads_only():
    model = small_model(13, 16, seed=1)
    policy = CausalPolicy(model, V, temperature=0.8)  # two rows of the head are never used
    tokens = torch.randint(0, V, (3, 9), generator=torch.Generator().manual_seed(2))
    rows, columns = torch.tensor([0, 0, 2]), torch.tensor([1, 7, 3])
    targets = torch.tensor([4, 0, 10])

    def look():
        model.zero_grad()
        logprobs, entropies = policy.logprobs(policy.hidden(tokens, rows, columns), targets, entropy=True)
        (logprobs.sum() - entropies.sum()).backward()
        return logprobs.detach(), entropies.detach(), [p.grad.clone() for p in model.parameters()]

    fast = look()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(textrl.policy, "touched", lambda module: True)
        slow = look()
    for a, b in zip([*fast[:2], *fast[2]], [*slow[:2], *slow[2]], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(b.detach().abs().max()) + 1e-9)
    odd = copy.deepcopy(model)
    odd.lm_head = Odd(64, 13, bias=False)
    odd.lm_head.weight = odd.transformer.wte.weight
    other = CausalPolicy(odd, V, temperature=0.8)
    got = other.logprobs(other.hidden(tokens, rows, columns), targets)[0]
    with torch.no_grad():
        difference = odd.lm_head(other.hidden(tokens, rows, columns)) - model.lm_head(
            policy.hidden(tokens, rows, columns)
        )
    torch.testing.assert_close(difference, torch.full_like(difference, 0.1), atol=1e-4, rtol=0)
    torch.testing.assert_close(got.detach(), fast[0], atol=1e-4, rtol=1e-4)  # a shift of all logits changes nothing


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_shared_critics_values_come_from_sampling(temperature):
    reference = small_model(8, 32, seed=3)
    env = textrl.TextEnv(textrl.envs.copy.Copy(), reference=reference, kl_coef=0.1, temperature=temperature)
    agent = PPO(env, critic="shared", batch_size=24, learning_rate=1e-2, dtype="float32")
    agent.learn(200)
    rollout = agent.collect()
    assert float(rollout.values.abs().max()) > 1e-3
    again = batched_values(agent.value, rollout, 64)
    torch.testing.assert_close(rollout.values, again, atol=1e-5, rtol=1e-5)
    assert (rollout.values[~rollout.action_mask] == 0).all()
    separate = PPO(env, critic="separate", batch_size=24, dtype="float32")
    assert separate.collect().values is None
    twin = copy.deepcopy(agent.model.state_dict()), copy.deepcopy(agent.value_head.state_dict())
    state = agent.generator.get_state(), copy.deepcopy(agent.optimizer.state_dict())
    numbers = [agent.update(rollout)]
    agent.model.load_state_dict(twin[0]), agent.value_head.load_state_dict(twin[1])
    agent.generator.set_state(state[0]), agent.optimizer.load_state_dict(state[1])
    numbers.append(agent.update(replace(rollout, values=None)))
    for key, value in numbers[0].items():
        assert numbers[1][key] == pytest.approx(value, rel=1e-3, abs=1e-5), key


def test_a_scalar_head_below_float32_does_not_round_its_scores():
    model = value_model(small_model(6, 16), seed=0, std=0.3).to(torch.bfloat16)
    tokens = torch.arange(12).view(2, 6) % 6
    rows, columns = torch.tensor([0, 0, 1, 1]), torch.tensor([1, 4, 2, 5])
    values = values_at(model, tokens, rows, columns)
    assert values.dtype == torch.float32
    assert not torch.equal(values, values.bfloat16().float())
