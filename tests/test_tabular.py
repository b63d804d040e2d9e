"""The tabular language model: one row a prefix, and at home wherever a model is."""

import copy
import itertools

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import textrl
from textrl.generation import generate
from textrl.heads import head_of
from textrl.models import load_model
from textrl.policy import CausalPolicy, values_at
from textrl.scalars import value_model
from textrl.slots import cacheable
from textrl.stepwise import StepwiseLM
from textrl.tabular import TabularLM, tabular_model


class Letters(textrl.Task):
    def __init__(self, prompts=("", "ab", "a"), length=4):
        super().__init__(tokenizer=textrl.symbol_tokenizer("abc"), max_new_tokens=length)
        self._prompts = prompts

    def prompts(self):
        return [{"prompt": prompt} for prompt in self._prompts]

    def score(self, prompts, completions, **columns):
        return [float(text.count("a")) for text in completions]


def test_every_prefix_has_a_row_of_its_own():
    task = Letters(prompts=("", "c"), length=3)
    model = tabular_model(task)
    texts = [[0], [0, 3]]  # prompts: begin; begin c
    responses = [r for length in range(3) for r in itertools.product((1, 2, 3), repeat=length)]
    states = [[*text, *r] for text in texts for r in responses]
    found = [int(model.tree(torch.tensor([s])).last_hidden_state[0, -1, 0]) for s in states]
    assert 0 not in found
    # the text "c" after the empty prompt is the prompt "c": one row, for no policy can tell them apart
    assert len(set(found)) == len({tuple(s) for s in states})
    assert model.config.num_prefixes == len(set(found)) + 2
    assert int(model.tree(torch.tensor([[0, 0, 1]])).last_hidden_state[0, -1, 0]) == 0  # past the end: nowhere


def test_zero_logits_and_random_logits():
    task = Letters()
    assert torch.equal(tabular_model(task)(torch.tensor([[0, 1]])).logits, torch.zeros(1, 2, 4))
    one, same, other = (tabular_model(task, std=2.0, seed=s).lm_head.weight for s in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert float(one.detach().std()) == pytest.approx(2, rel=0.1)


def test_saved_and_loaded(tmp_path):
    model = tabular_model(Letters(), std=1.0)
    model.save_pretrained(tmp_path / "model")
    tokens = torch.tensor([[0, 1, 2, 3], [0, 3, 3, 3]])
    for again in (
        TabularLM.from_pretrained(tmp_path / "model"),
        AutoModelForCausalLM.from_pretrained(tmp_path / "model"),
        load_model(str(tmp_path / "model")),
    ):
        assert torch.equal(again(tokens).logits, model(tokens).logits)


def test_value_model(tmp_path):
    model = tabular_model(Letters(), std=1.0)
    critic = value_model(model)
    tokens = torch.tensor([[0, 1, 2], [0, 3, 3]])
    rows, columns = torch.tensor([0, 0, 1]), torch.tensor([0, 2, 1])
    values = values_at(critic, tokens, rows, columns)
    assert torch.equal(values, torch.zeros(3))
    values.sum().backward()  # each of the three prefixes has a value of its own
    assert critic.score.weight.grad.count_nonzero() == 3
    with torch.no_grad():
        critic.score.weight.normal_()
    critic.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(again(tokens).logits, critic(tokens).logits)
    assert torch.equal(values_at(again, tokens, rows, columns), values_at(critic, tokens, rows, columns))


def test_generation_samples_its_probabilities():
    task = Letters(prompts=("",), length=1)
    model = tabular_model(task, std=1.0)
    assert not cacheable(model, 5)

    assert head_of(model) is model.lm_head
    sampled = generate(
        CausalPolicy(model, 4), [np.array([0])] * 20_000, 1, [0], generator=torch.Generator().manual_seed(0)
    )
    share = sampled.responses[:, 0].bincount(minlength=4) / 20_000
    p = model(torch.tensor([[0]])).logits[0, 0].softmax(-1)
    assert (share - p).abs().max() < 4 * 0.5 / 20_000**0.5
    assert torch.allclose(sampled.logprobs[:, 0], p.log()[sampled.responses[:, 0]], atol=1e-6)


def test_steps_and_samples_alike_as_policy_and_reference():
    task = Letters()
    reference, policy = tabular_model(task, std=1.0, seed=1), tabular_model(task, std=1.0, seed=2)
    env = textrl.TextEnv(task, reference=reference, kl_coef=0.5)
    env.policy = StepwiseLM(CausalPolicy(policy, 4))
    env.reset(options={"prompt": "ab"})
    tokens = torch.tensor([[0, 1, 2, 3, 1]])
    for t, action in enumerate((3, 1)):
        reward = env.step(action)[1]
        log_ratio = (policy(tokens).logits.log_softmax(-1) - reference(tokens).logits.log_softmax(-1))[0, 2 + t, action]
        assert reward == pytest.approx(-0.5 * float(log_ratio.detach()), abs=1e-5)


def test_every_parameter_and_only_those_learn():
    model = copy.deepcopy(tabular_model(Letters()))
    assert [name for name, _ in model.named_parameters()] == ["lm_head.weight"]


def test_too_large_a_tree_is_refused():
    with pytest.raises(ValueError, match=r"at most 16,777,216 prefixes for a table; this one has about 10\^19"):
        tabular_model(Letters(length=40))
