"""Where a response ends: several end tokens, texts, a least length."""

import numpy as np
import pytest
import torch

import textrl
from textrl.agents import PPO
from textrl.drawing import Sampling
from textrl.envs.copy import Copy
from textrl.generation import generate, stop_at
from textrl.policy import CausalPolicy, small_model

TOKENIZER = textrl.symbol_tokenizer(["a", "b", "c", "ab", "bc"])
PROMPTS = [np.array([0, i % 5]) for i in range(40)]


def decode(responses):
    return [TOKENIZER.decode(ids, skip_special_tokens=True) for ids in responses]


def sample(texts=(), **options):
    policy = CausalPolicy(small_model(6, 32, seed=4), 6)
    stop = stop_at(texts, decode) if texts else None
    sampling = Sampling(**options)
    generator = torch.Generator().manual_seed(0)
    found = generate(policy, PROMPTS, 12, [0], sampling=sampling, generator=generator, stop=stop)
    return [ids[:n] for ids, n in zip(found.responses.tolist(), found.lengths.tolist(), strict=True)], found


@pytest.mark.parametrize("texts", [["bb"], ["cab", "aa"], ["abc"]])
def test_a_text_ends_a_response_with_the_token_that_completes_it(texts):
    free, _ = sample()
    stopped, found = sample(texts)
    ends = 0
    for before, after in zip(free, stopped, strict=True):
        says = [any(text in decode([before[:n]])[0] for text in texts) for n in range(1, len(before) + 1)]
        length = says.index(True) + 1 if True in says else len(before)
        assert after == before[:length]  # with the same random numbers, the same tokens up to there
        ends += length < len(before)
    assert 0 < ends < len(free)
    written = torch.arange(12) < found.lengths[:, None]
    assert (found.responses[~written] == 0).all()
    assert (found.logprobs[~written] == 0).all()


def test_a_least_length_holds_for_texts_and_the_end_token():
    stopped, _ = sample(["b"], min_new_tokens=5)
    assert min(map(len, stopped)) == 5
    assert all("b" in decode([ids])[0] or ids[-1] == 0 or len(ids) == 12 for ids in stopped)
    assert not any(0 in ids[:4] for ids in stopped)


def test_agents_take_stop_strings():
    agent = PPO(textrl.TextEnv(Copy(length=8)), seed=1)
    texts = agent.generate(["ab"] * 50, stop_strings=["b"], min_new_tokens=2)
    assert all(len(text) >= 2 and "b" not in text[1:-1] for text in texts)
    with pytest.raises(ValueError, match=r"stop_strings must be a list of texts.*got 'b'"):
        agent.generate(["a"], stop_strings="b")
    with pytest.raises(ValueError, match="not empty"):
        agent.generate(["a"], stop_strings=[""])
