"""Models whose logits, blocks or caches are of an unusual kind give the numbers of their own forward."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import (
    BartConfig,
    BartForCausalLM,
    BertConfig,
    BertLMHeadModel,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MistralForTokenClassification,
    Qwen2Config,
    Qwen2ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import textrl
from textrl.agents import PPO, REINFORCE, TRPO
from textrl.envs.copy import Copy
from textrl.generation import generate
from textrl.heads import OwnHead, head_of
from textrl.models import small_model
from textrl.optim import Optimizer
from textrl.policy import CausalPolicy, values_at
from textrl.probing import looks_ahead
from textrl.scalars import value_model
from textrl.stepwise import StepwiseLM
from textrl.trunk import frozen_blocks

V = 5
SIZES = {
    "vocab_size": V, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 32, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
    "initializer_range": 0.3,
}  # fmt: skip


class Tripled(GPT2LMHeadModel):
    """A model of somebody's own, which changes the logits."""

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = 3 * out.logits
        return out


def made(kind):
    torch.manual_seed(0)
    if kind == "capped":
        sizes = {**SIZES, "head_dim": 8, "query_pre_attn_scalar": 8}
        return Gemma2ForCausalLM(Gemma2Config(**sizes, final_logit_softcapping=2.0, sliding_window=3)).eval()
    if kind == "scaled":
        return GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=4.0, embedding_multiplier=2.0)).eval()
    if kind == "two kinds of blocks":
        settings = {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1}
        return Qwen2ForCausalLM(Qwen2Config(**SIZES, **settings)).eval()
    if kind == "counts places by its cache":
        return BartForCausalLM(
            BartConfig(
                vocab_size=V, d_model=16, decoder_layers=2, decoder_attention_heads=2, decoder_ffn_dim=16,
                encoder_layers=2, max_position_embeddings=32, init_std=0.3, bos_token_id=0, eos_token_id=0,
                pad_token_id=0, dropout=0.0,
            )
        ).eval()  # fmt: skip
    return Tripled(small_model(V, 32, initializer_range=0.3).config).eval()


KINDS = ["capped", "scaled", "two kinds of blocks", "counts places by its cache", "changes the logits"]


@pytest.mark.parametrize("kind", KINDS)
def test_log_probabilities_are_those_of_the_models_own_forward(kind):
    model = made(kind)
    policy = CausalPolicy(model, V)
    tokens = torch.arange(14).view(2, 7) % V
    rows, columns = torch.tensor([0, 0, 1, 1]), torch.tensor([2, 5, 0, 4])
    right = model(input_ids=tokens).logits.log_softmax(-1)[rows, columns]
    hidden = policy.hidden(tokens, rows, columns)
    found, _ = policy.logprobs(hidden, tokens[rows, columns + 1])
    torch.testing.assert_close(found, right.gather(-1, tokens[rows, columns + 1, None])[:, 0], atol=1e-5, rtol=1e-5)
    found.sum().backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    right.gather(-1, tokens[rows, columns + 1, None]).sum().backward()
    expected = [p.grad for p in model.parameters() if p.grad is not None]
    for mine, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_drawn_of_ragged_prompts_has_the_recorded_log_probability(kind):
    model = made(kind)
    policy = CausalPolicy(model, V)
    prompts = [torch.tensor(ids).numpy() for ids in ([0, 1, 2, 3], [0, 2])]
    drawn = generate(policy, prompts, 6, [], generator=torch.Generator().manual_seed(0))
    for prompt, response, logprobs in zip(prompts, drawn.responses, drawn.logprobs, strict=True):
        text = torch.cat([torch.from_numpy(prompt), response])
        right = model(input_ids=text[None]).logits[0].log_softmax(-1)[len(prompt) - 1 : -1]
        torch.testing.assert_close(logprobs, right.gather(-1, response[:, None])[:, 0].detach(), atol=1e-5, rtol=1e-4)


def bert(decoder):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return BertLMHeadModel(BertConfig(vocab_size=4, is_decoder=decoder, **sizes))


@pytest.mark.parametrize("kind", KINDS)
def test_causal_models_are_told_by_one_forward(kind):
    model, calls = made(kind), []
    model.register_forward_hook(lambda *_: calls.append(1))
    assert not looks_ahead(model) and not looks_ahead(model)
    assert calls == [1]


def test_models_that_are_not_causal_are_refused(tmp_path):
    bert(False).save_pretrained(tmp_path)
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=4, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2))
    for model, wrong in (
        (bert(False), "reads both ways"),
        (tmp_path, "reads both ways"),
        (t5, "gives no logits for one"),
    ):
        with pytest.raises(ValueError, match=f"^model must be a causal language model, .*{wrong}"):
            REINFORCE(textrl.TextEnv(Copy()), model)
        with pytest.raises(ValueError, match=f"^reference must be a causal language model, .*{wrong}"):
            textrl.TextEnv(Copy(), reference=model, kl_coef=0.1)


def test_a_bert_that_is_a_decoder_learns_without_a_critic_of_its_own():
    env = textrl.TextEnv(Copy())
    REINFORCE(env, bert(True), batch_size=8).learn(24)
    PPO(env, bert(True), critic="shared", batch_size=8).learn(24)
    with pytest.raises(ValueError, match=r"has a score for every token, .*; got 'bert' .*critic=\"shared\""):
        PPO(env, bert(True), batch_size=8)


@pytest.mark.parametrize("kind", ["capped", "scaled", "two kinds of blocks"])
def test_only_blocks_that_can_be_entered_are_shared(kind):
    model = made(kind)
    for block in model.base_model.layers[:2]:
        block.requires_grad_(False)
    model.base_model.embed_tokens.requires_grad_(False)
    assert frozen_blocks(model) == 0
    plain = MistralForCausalLM(MistralConfig(**SIZES, sliding_window=None))
    plain.base_model.embed_tokens.requires_grad_(False)
    plain.base_model.layers[0].requires_grad_(False)
    assert frozen_blocks(plain) == 1


def test_heads_are_told_apart():
    assert isinstance(head_of(made("capped")), OwnHead)
    assert isinstance(head_of(made("changes the logits")), OwnHead)
    model = made("two kinds of blocks")
    assert head_of(model) is model.lm_head
    handle = model.register_forward_hook(lambda *_: None)
    assert head_of(model) is None  # what it does to the logits is not known
    handle.remove()
    assert head_of(model) is model.lm_head


def test_a_shared_critic_reads_states_below_a_head_of_its_own():
    class Short(textrl.Task):
        """Say a."""

        def prompts(self):
            return [{"prompt": "a"}]

        def score(self, prompts, completions, **columns):
            return [float(len(text)) for text in completions]

    task = Short(tokenizer=textrl.symbol_tokenizer("abcd"), max_new_tokens=3)
    model = made("capped")
    agent = PPO(textrl.TextEnv(task), model, critic="shared", batch_size=8, learning_rate=1e-3).learn(48)
    rollout = agent.collect()
    again = agent.value(rollout)
    torch.testing.assert_close(rollout.values, again, atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match=r"AutoModelForSequenceClassification.*'granite'"):
        PPO(textrl.TextEnv(task), made("scaled"), batch_size=8)
    PPO(textrl.TextEnv(task), made("scaled"), critic="shared", batch_size=8).learn(24)
    TRPO(textrl.TextEnv(task), small_model(V, 32), activation_checkpointing=True, batch_size=8).learn(24)


def test_a_scalar_heads_bias_counts():
    model = MistralForTokenClassification(value_model(small_llama()).config).eval()
    with torch.no_grad():
        model.score.bias.fill_(5.0)
    tokens = torch.arange(6).view(1, 6) % V
    found = values_at(model, tokens, torch.tensor([0]), torch.tensor([5]))
    torch.testing.assert_close(found, model(input_ids=tokens).logits[0, 5], atol=1e-5, rtol=1e-5)


def small_llama():
    torch.manual_seed(0)
    return MistralForCausalLM(MistralConfig(**SIZES, sliding_window=None)).eval()


def test_a_stepper_sees_weights_that_somebody_changed():
    model = small_model(V, 32)
    stepper = StepwiseLM(CausalPolicy(model, V))
    observation = torch.tensor([[0, 1, 2, V, V]]).numpy()
    before = stepper(observation)
    model.load_state_dict(small_model(V, 32, seed=1).state_dict())
    right = model(input_ids=torch.tensor([[0, 1, 2]])).logits[0, -1]
    assert not torch.allclose(before[0], right, atol=1e-3)
    torch.testing.assert_close(stepper(observation)[0], right.detach(), atol=1e-5, rtol=1e-5)


def test_weights_that_somebody_set_are_learned_on_from():
    model = small_model(V, 32).to(torch.bfloat16)
    optimizer = Optimizer(model.parameters(), learning_rate=1e-6)
    weight = model.transformer.ln_f.weight
    with torch.no_grad():
        weight.fill_(0.5)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    torch.testing.assert_close(weight.float(), torch.full((len(weight),), 0.5))
    assert float(optimizer.get_weights()[-2].mean()) == pytest.approx(0.5, abs=1e-5)


class Summed(GPT2LMHeadModel):
    """Logits that hang on all states before them."""

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits.cumsum(1)
        return out


class Bare(GPT2LMHeadModel):
    """A forward that takes tokens alone."""

    def forward(self, input_ids):
        return super().forward(input_ids=input_ids)


def test_heads_that_mix_places_and_forwards_of_few_words():
    config = small_model(V, 32, initializer_range=0.3).config
    tokens = torch.arange(7)[None] % V
    for kind, known in ((Summed, False), (Bare, True)):
        model = kind(config).eval()
        policy = CausalPolicy(model, V)
        assert (head_of(model) is not None) == known
        found = policy.logits(policy.hidden(tokens, torch.tensor([0, 0]), torch.tensor([6, 2])))
        torch.testing.assert_close(found, model(tokens).logits[0, [6, 2]], atol=1e-5, rtol=1e-5)


def test_a_head_that_scales_a_little_is_told_in_bfloat16():
    model = GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=1.04)).to(torch.bfloat16).eval()
    assert isinstance(head_of(model), OwnHead)


def test_a_model_in_training_mode_is_asked_in_eval_mode_and_stays_in_it():
    model = GPT2LMHeadModel(small_model(V, 32, resid_pdrop=0.5).config).train()
    assert head_of(model) is model.lm_head and model.training


def test_a_forward_that_does_not_fit_into_memory_says_so():
    model = GPT2LMHeadModel(small_model(V, 32).config).eval()
    model.transformer.forward = lambda *_, **__: (_ for _ in ()).throw(torch.OutOfMemoryError("no room"))
    with pytest.raises(torch.OutOfMemoryError):
        head_of(model)


def test_a_stepper_follows_a_fused_step_and_models_made_for_inference():
    model = small_model(V, 32)
    stepper = StepwiseLM(CausalPolicy(model, V))
    observation = torch.tensor([[0, 1, 2, V, V]]).numpy()
    before = stepper(observation).clone()
    optimizer = Optimizer(model.parameters(), learning_rate=0.1)
    model(input_ids=torch.tensor([[0, 1, 2]])).logits.sum().backward()
    optimizer.step()
    right = model(input_ids=torch.tensor([[0, 1, 2]])).logits[0, -1].detach()
    assert not torch.allclose(before[0], right, atol=1e-3)
    torch.testing.assert_close(stepper(observation)[0], right, atol=1e-5, rtol=1e-5)
    with torch.inference_mode():
        fixed = small_model(V, 32)
        assert StepwiseLM(CausalPolicy(fixed, V))(observation).shape == (1, V)


def test_weights_that_are_set_to_what_they_are_keep_their_float32_copies():
    model = small_model(V, 32).to(torch.bfloat16)
    optimizer = Optimizer(model.parameters(), learning_rate=1e-5)
    weight = model.transformer.ln_f.weight
    for _ in range(8):  # each step by itself is lost in bfloat16
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        model.load_state_dict(copy.deepcopy(model.state_dict()))
    assert float(optimizer.get_weights()[-2].mean()) == pytest.approx(1 - 8e-5, abs=1e-6)


def test_backward_hooks_are_called():
    model = small_model(V, 32)
    calls = []
    model.transformer.h[0].register_full_backward_hook(lambda *_: calls.append(1))
    hidden = CausalPolicy(model, V).hidden(torch.tensor([[0, 1, 2]]), torch.tensor([0]), torch.tensor([2]))
    hidden.sum().backward()
    assert calls == [1]


def test_a_critic_that_knows_fewer_tokens_and_one_that_was_not_saved_are_refused(tmp_path):
    env = textrl.TextEnv(Copy())  # four tokens
    with pytest.raises(ValueError, match="critic must be one of 4; got 'a model of 3 tokens'"):
        PPO(env, small_model(4, 16), critic=value_model(small_model(3, 16)))
    PPO(env, small_model(4, 16), batch_size=4).save(tmp_path / "agent")
    with pytest.raises(ValueError, match=r"agent' holds no value_head: make the agent with the settings that it was"):
        PPO.load(tmp_path / "agent", env, critic="shared")
