"""The flat forward against the model's own: states, gradients, samples, any padding and any order."""

import copy
import importlib

import numpy as np
import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import textrl
import textrl.generation
import textrl.policy
import textrl.slots
from textrl.agents import PPO
from textrl.drawing import Sampling
from textrl.envs.copy import Copy
from textrl.flat import FlatGPT2, FlatLlama, attention, flat_of
from textrl.generation import generate
from textrl.models import recompute_blocks, small_model, without_dropout
from textrl.policy import CausalPolicy, values_at
from textrl.scalars import value_model
from textrl.stepwise import StepwiseLM
from textrl.trunk import frozen_blocks

VOCAB = 11
OPTIONS = [
    {}, {"temperature": 0.6, "min_new_tokens": 3}, {"temperature": 0.6, "top_k": 7},
    {"top_p": 0.8, "min_new_tokens": 5}, {"deterministic": True},
]  # fmt: skip


def gpt2(**changes):
    model = small_model(VOCAB, 64, 1, n_embd=32, n_layer=3, **changes)
    return sharp(model)


def llama(**changes):
    fields = dict(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, eos_token_id=0, bos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    return sharp(LlamaForCausalLM(LlamaConfig(**{**fields, **changes})).eval())


def sharp(model):
    """Weights, biases and norms far from where they start, so that none of them can be forgotten unseen."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


MODELS = {
    "gpt2": gpt2,
    "llama": llama,
    "llama, biases": lambda: llama(attention_bias=True, mlp_bias=True, num_key_value_heads=4, head_dim=16),
    "llama, one key head": lambda: llama(num_key_value_heads=1, tie_word_embeddings=True),
}


@pytest.fixture
def plainly(monkeypatch):
    """A switch: from its call on, nothing is flat."""

    def switch():
        for module in (textrl.policy, textrl.slots):
            monkeypatch.setattr(module, "flat_of", lambda model: None)

    return switch


def batch_of(lengths, seed=0):
    """(B, S) tokens with other tokens as padding, and every place within the lengths."""
    rng = np.random.default_rng(seed)
    tokens = torch.from_numpy(rng.integers(0, VOCAB, (len(lengths), max(lengths) + 2)))
    rows = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)])
    columns = torch.cat([torch.arange(n) for n in lengths])
    return tokens, rows, columns


@pytest.mark.parametrize("lengths", [[7, 7, 7], [3, 9, 1, 6]])
@pytest.mark.parametrize("name", MODELS)
def test_states_logits_and_gradients_are_the_models_own(name, lengths, plainly):
    model = MODELS[name]()
    critic = value_model(model, seed=1, std=0.5)
    tokens, rows, columns = batch_of(lengths)
    assert type(flat_of(model)) is (FlatGPT2 if name == "gpt2" else FlatLlama)
    assert flat_of(critic) is not None

    def everything():
        for each in (model, critic):
            each.zero_grad()
        policy = CausalPolicy(model, VOCAB)
        logits = policy.logits(policy.hidden(tokens, rows, columns))
        values = values_at(critic, tokens, rows, columns)
        (logits.sin().sum() + values.sin().sum()).backward()
        return logits, values, [p.grad.clone() for m in (model, critic) for p in m.parameters()]

    flat = everything()
    plainly()
    plain = everything()
    torch.testing.assert_close(flat[0], plain[0], atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(flat[1], plain[1], atol=2e-5, rtol=1e-5)
    for mine, theirs in zip(flat[2], plain[2], strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5 * float(theirs.abs().max()) + 1e-7, rtol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_only_the_places_asked_for_count(name, plainly):
    """Some places, out of order, some twice, a row without any."""
    model = MODELS[name]()
    policy = CausalPolicy(model, VOCAB)
    tokens, _, _ = batch_of([5, 9, 2, 6])
    rows, columns = torch.tensor([3, 0, 0, 3, 1, 1]), torch.tensor([2, 4, 1, 2, 0, 7])
    flat = policy.hidden(tokens, rows, columns)
    plainly()
    torch.testing.assert_close(flat, policy.hidden(tokens, rows, columns), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_samples_are_equal_for_equal_random_numbers(name, plainly):
    policy = CausalPolicy(MODELS[name](), VOCAB)
    prompts = [np.array(p) for p in ([1], [2, 3, 4, 5], [6, 7], [8, 9, 10])]

    def sample(which):
        generator = torch.Generator().manual_seed(3)
        return generate(policy, which, 20, [0, 4], generator=generator, value=lambda hidden: hidden.float().sum(-1))

    even = [np.array([i, i + 1]) for i in range(4)]
    flat = [sample(prompts), sample(even)]
    plainly()
    plain = [sample(prompts), sample(even)]
    assert len({int(n) for n in flat[0].lengths}) > 1  # rows left the batch
    for mine, theirs in zip(flat, plain, strict=True):
        assert torch.equal(mine.responses, theirs.responses)
        assert torch.equal(mine.lengths, theirs.lengths)
        torch.testing.assert_close(mine.logprobs, theirs.logprobs, atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(mine.values, theirs.values, atol=2e-4, rtol=1e-5)


def test_a_row_is_the_same_alone_and_in_any_order():
    policy = CausalPolicy(gpt2(), VOCAB)
    prompts = [np.array(p) for p in ([1], [2, 3, 4, 5], [6, 7], [8, 9, 10])]
    uniforms = torch.rand(4, 12, generator=torch.Generator().manual_seed(1))

    def sample(order):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "rand", lambda *shape, **_: uniforms[order])
            return generate(policy, [prompts[i] for i in order], 12, [0, 4])

    together = sample([0, 1, 2, 3])
    for order in ([2, 0, 3, 1], [1], [3, 2]):
        other = sample(order)
        assert torch.equal(other.responses, together.responses[order])
        torch.testing.assert_close(other.logprobs, together.logprobs[order], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_the_stepper_is_the_same(name, plainly):
    policy = CausalPolicy(MODELS[name](), VOCAB)
    rng = np.random.default_rng(0)
    starts, history = np.array([1, 4, 2]), []
    observations = np.full((3, 12), VOCAB)
    for row, n in zip(observations, starts, strict=True):
        row[:n] = rng.integers(0, VOCAB, n)
    for t in range(6):
        history.append(observations.copy())
        observations[np.arange(3), starts + t] = rng.integers(0, VOCAB, 3)
        if t == 3:  # a new episode in one row
            observations[1], starts[1] = VOCAB, 1 - t - 1
            observations[1, :1] = 5
    flat_stepper = StepwiseLM(policy)
    flat = [flat_stepper(each).clone() for each in history]
    plainly()
    plain_stepper = StepwiseLM(policy)
    for mine, each in zip(flat, history, strict=True):
        torch.testing.assert_close(mine, plain_stepper(each), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_blocks_that_run_again_give_the_same_gradients(name):
    model = MODELS[name]()
    tokens, rows, columns = batch_of([3, 9, 6])
    found, saved = [], []
    for _ in range(2):
        model.zero_grad()
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, kept=kept: kept.append(x.numel()) or x, lambda x: x):
            hidden = CausalPolicy(model, VOCAB).hidden(tokens, rows, columns)
        hidden.sin().sum().backward()
        found.append([hidden.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
        saved.append(sum(kept))
        recompute_blocks(model)
    for mine, theirs in zip(*found, strict=True):
        assert torch.equal(mine, theirs)
    assert saved[1] < 0.5 * saved[0]
    with pytest.raises(ValueError, match=r"activation_checkpointing must be False .*got True"):
        recompute_blocks(gpt2(activation_function="relu"))


def test_an_update_of_the_weights_is_seen():
    model = gpt2()
    flat, policy = flat_of(model), CausalPolicy(model, VOCAB)
    before = policy.hidden(*batch_of([4]))
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight.add_(0.1)
    after = policy.hidden(*batch_of([4]))
    assert flat is not None
    assert not torch.allclose(before, after)


class Doubled(nn.Linear):
    """A layer that somebody changed, as LoRA does."""

    def forward(self, x):
        return 2 * super().forward(x)


def test_what_is_not_known_keeps_its_own_forward(plainly):
    def with_layer():
        model = llama()
        layer = model.model.layers[1].mlp
        layer.up_proj = Doubled(32, 48, bias=False)
        return model

    def hooked():
        model = gpt2()
        model.transformer.h[0].register_forward_hook(lambda module, inputs, output: output * 2)
        return model

    def dropping():
        config = GPT2Config(vocab_size=VOCAB, n_positions=64, n_embd=32, n_layer=1, n_head=4)
        return GPT2LMHeadModel(config).train()

    unknown = {
        "inverse layer": gpt2(scale_attn_by_inverse_layer_idx=True),
        "unscaled": gpt2(scale_attn_weights=False),
        "upcast": gpt2(reorder_and_upcast_attn=True),
        "activation": gpt2(activation_function="relu"),
        "exact gelu": gpt2(activation_function="gelu"),
        "rope": llama(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}),
        "llama activation": llama(hidden_act="gelu"),
        "layer": with_layer(),
        "hook": hooked(),
        "dropout": dropping(),
    }
    for name, model in unknown.items():
        assert flat_of(model) is None, name
    assert flat_of(without_dropout(unknown["dropout"])) is not None
    for name in ("inverse layer", "unscaled", "activation", "rope", "layer", "hook"):  # and it matters
        policy = CausalPolicy(unknown[name], VOCAB)
        tokens, rows, columns = batch_of([4, 6])
        want = unknown[name](input_ids=tokens).logits[rows, columns]
        torch.testing.assert_close(policy.logits(policy.hidden(tokens, rows, columns)), want, atol=2e-5, rtol=1e-5)


def test_lower_precision_stays_close(plainly):
    for make in MODELS.values():
        model = make().to(torch.bfloat16)
        policy = CausalPolicy(model, VOCAB)
        tokens, rows, columns = batch_of([4, 9])
        flat = policy.logits(policy.hidden(tokens, rows, columns)).log_softmax(-1)
        own = policy.logits(model.base_model(input_ids=tokens).last_hidden_state[rows, columns]).log_softmax(-1)
        exact = copy.deepcopy(model).float()
        want = exact(input_ids=tokens).logits[rows, columns].log_softmax(-1)
        assert (flat - want).abs().mean() < 1.5 * (own - want).abs().mean() + 1e-3


@pytest.mark.parametrize("form", ["causal", "masked", "all"])
def test_attention_in_bfloat16_is_that_in_float32(form):
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(2, 3, 5, 8, generator=generator).to(torch.bfloat16).requires_grad_() for _ in range(3))
    mask = torch.rand(2, 1, 1, 5, generator=generator) < 0.7
    mask[..., 0] = True
    arguments = {"causal": (None, True), "masked": (mask, False), "all": (None, False)}[form]
    found = attention(q, k, v, *arguments)
    exact = [x.detach().float().requires_grad_() for x in (q, k, v)]
    want = attention(*exact, *arguments)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), want, atol=0.03, rtol=0.03)
    grads = torch.autograd.grad(found.float().square().sum(), (q, k, v))
    for grad, right in zip(grads, torch.autograd.grad(want.square().sum(), exact), strict=True):
        torch.testing.assert_close(grad.float(), right, atol=0.1, rtol=0.05)


@pytest.fixture
def decoding():
    pytest.importorskip("triton")
    return importlib.import_module("textrl.decoding")


@pytest.mark.parametrize("name", ["gpt2", "llama, one key head"])
@pytest.mark.parametrize("options", OPTIONS[1:3])
def test_a_gpus_kernels_draw_what_the_loop_draws(name, options, decoding, monkeypatch):
    """By Triton's interpreter, with parts so small that there are several."""
    policy, prompts = CausalPolicy(MODELS[name](), VOCAB), [np.array([1, 2]), np.array([3])]

    def sample():
        seeded = torch.Generator().manual_seed(3)
        return generate(policy, prompts, 6, [0], sampling=Sampling(**options), generator=seeded)

    plain, used = sample(), []
    monkeypatch.setattr(decoding, "TILE", 4)
    monkeypatch.setattr(decoding, "BLOCK", 4)
    monkeypatch.setitem(textrl.generation.RECORDERS, "cpu", lambda step: step)
    for module in (textrl.slots, textrl.generation):
        monkeypatch.setattr(module, "kernels_for", lambda name, device: used.append(1) or decoding)
    fixed = sample()
    assert used and plain.lengths.max() > 4
    assert torch.equal(plain.responses, fixed.responses)
    torch.testing.assert_close(fixed.logprobs, plain.logprobs, rtol=1e-5, atol=1e-5)


def test_the_kernels_draw_at_the_edges(decoding):
    logits = torch.tensor([[-torch.inf, 1.0, 1.0, -torch.inf, 1.0, 1.0, -torch.inf, 9.0]]).expand(6, 8)
    uniforms = torch.tensor([0.0, 0.2499, 0.2501, 0.5, 0.75, 1 - 2**-24])
    tokens, logprobs = decoding.draw_plainly(logits, 7, uniforms, 2.0)  # the last column is padding
    assert tokens.tolist() == [1, 1, 2, 4, 5, 5]
    torch.testing.assert_close(logprobs, torch.full((6,), 0.25).log())
    assert not decoding.draw_plainly(logits * torch.nan, 7, uniforms, 1.0)[1].isfinite().any()


@pytest.mark.parametrize(("heads", "groups", "dim"), [(4, 4, 8), (6, 2, 6), (2, 1, 16)])
def test_the_kernel_attends_to_what_is_written(heads, groups, dim, decoding, monkeypatch):
    monkeypatch.setattr(decoding, "TILE", 4)
    torch.manual_seed(0)
    q, k, v = torch.randn(5, heads + 2 * groups, dim).split([heads, groups, groups], 1)
    keys, values = torch.randn(2, 5, groups, 11, dim)
    columns, want = torch.tensor([0, 3, 4, 7, 10]), []
    for i, column in enumerate(columns.tolist()):
        past = [torch.cat([cache[i, :, :column], own[i, :, None]], 1) for cache, own in ((keys, k), (values, v))]
        past = [x.repeat_interleave(heads // groups, 0)[None] for x in past]
        want.append(attention(q[i][None, :, None], *past)[0, :, 0])
    rows = torch.arange(5)
    torch.testing.assert_close(decoding.attend(q, k, v, columns, keys, values), torch.stack(want))
    assert torch.equal(keys[rows, :, columns], k) and torch.equal(values[rows, :, columns], v)


def test_greedy_and_truncated_draws_agree(plainly):
    policy = CausalPolicy(gpt2(), VOCAB)
    prompts = [np.array([1, 2]), np.array([3])]
    for sampling in (Sampling(deterministic=True), Sampling(0.7, top_k=3), Sampling(1.3, top_p=0.8, min_new_tokens=5)):
        seeded = torch.Generator().manual_seed
        runs = [generate(policy, prompts, 9, [0], sampling=sampling, generator=seeded(2))]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(textrl.slots, "flat_of", lambda model: None)
            runs.append(
                generate(policy, prompts, 9, [0], sampling=sampling, generator=torch.Generator().manual_seed(2))
            )
        assert torch.equal(runs[0].responses, runs[1].responses)
        assert int(runs[0].lengths.min()) > sampling.min_new_tokens * (not sampling.deterministic)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("options", OPTIONS)
def test_a_step_over_fixed_tensors_draws_what_the_loop_draws(name, options, monkeypatch):
    model = MODELS[name]()
    policy, head = CausalPolicy(model, VOCAB), torch.randn(32, generator=torch.Generator().manual_seed(1))
    prompts = [np.array([1 + i % 5] * (1 + i % 3)) for i in range(12)]
    steps = []

    def counted(step):
        return lambda: (steps.append(1), step())

    def sample():
        generator = torch.Generator().manual_seed(3)
        return generate(
            policy, prompts, 30, [0, 2], sampling=Sampling(**options), generator=generator, value=lambda x: x @ head
        )  # fmt: skip

    plain = sample()
    monkeypatch.setitem(textrl.generation.RECORDERS, "cpu", counted)
    fixed = sample()
    assert torch.equal(plain.responses, fixed.responses)
    assert torch.equal(plain.lengths, fixed.lengths)
    torch.testing.assert_close(fixed.logprobs, plain.logprobs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(fixed.values, plain.values, rtol=1e-5, atol=1e-5)
    longest, started = int(plain.lengths.max()), max(2, options.get("min_new_tokens", 0) + 1)
    assert longest - started <= len(steps) < longest - started + 8  # it ends within eight tokens of the last row


def test_a_block_of_which_a_part_learns_is_not_frozen():
    torch.manual_seed(0)
    shape = {"vocab_size": 4, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 3}
    model = LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=2, bos_token_id=0, eos_token_id=0))
    model.requires_grad_(False)
    model.model.layers[2].requires_grad_(True)
    assert frozen_blocks(model) == 2
    model.model.layers[1].mlp.down_proj.requires_grad_(True)
    assert frozen_blocks(model) == 1


def test_a_critic_enters_where_the_frozen_blocks_end(monkeypatch):
    torch.manual_seed(0)
    env = textrl.TextEnv(Copy(length=2))
    shape = {"vocab_size": env.task.vocab_size, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 3}
    model = LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=2, bos_token_id=0, eos_token_id=0))
    agent = PPO(env, model, trainable_layers=1, batch_size=4)
    rollout, ran, qkv = agent.collect(), [], FlatLlama.qkv
    monkeypatch.setattr(FlatLlama, "qkv", lambda self, layer, *rest: (ran.append(layer), qkv(self, layer, *rest))[1])
    agent.value(rollout)
    assert set(ran) == {2}
