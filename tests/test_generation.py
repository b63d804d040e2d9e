"""Where a response ends: several end tokens, texts, a least length."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM, GPTNeoConfig, GPTNeoForCausalLM, LlamaConfig, LlamaForCausalLM

import textrl
from textrl.agents import PPO
from textrl.batch import batched_logprobs
from textrl.drawing import Sampling, draw, within_top_p
from textrl.envs.copy import Copy
from textrl.generation import generate, stop_at
from textrl.models import small_model
from textrl.policy import CausalPolicy
from textrl.rollout import collect_sampled
from textrl.slots import cacheable

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


def test_a_text_whose_characters_are_several_tokens_each_is_seen():
    stop = stop_at(["é€😀"], lambda responses: [bytes(ids).decode(errors="replace") for ids in responses])
    ids = list("x€é€😀".encode())
    assert stop([ids, ids[:-1]]) == [True, False]


def test_top_p_keeps_no_token_more_than_reach_it():
    assert within_top_p(torch.zeros(4), 0.5).sum() == 2  # a quarter each: two reach it exactly
    assert within_top_p(torch.zeros(4), 0.51).sum() == 3


def test_top_p_is_about_what_temperature_and_masks_have_left():
    logits = torch.tensor([[0.5, 0.3, 0.2]]).log()
    uniforms = torch.linspace(0, 0.999, 50)
    colder = draw(logits.expand(50, 3), uniforms, Sampling(temperature=0.5, top_p=0.6))[0]
    assert set(colder.tolist()) == {0}  # 0.25 / 0.38 reaches 0.6 alone
    forbidden = torch.tensor([[True, False, False]]).expand(50, 3)
    others = draw(logits.expand(50, 3), uniforms, Sampling(top_p=0.55), forbidden)[0]
    assert set(others.tolist()) == {1}  # 0.3 / 0.5


def test_rounding_of_the_sum_of_probabilities_never_draws_what_cannot_come():
    logits = torch.randn(200, 500, generator=torch.Generator().manual_seed(0))
    forbidden = torch.zeros(200, 500, dtype=torch.bool)
    forbidden[:, -3:] = True
    sums = logits.masked_fill(forbidden, -torch.inf).softmax(-1).cumsum(-1)[:, -1]
    largest = torch.nextafter(torch.tensor(1.0), torch.tensor(0.0))
    assert (sums < largest).any()  # else this tests nothing
    tokens, logprobs = draw(logits, largest.expand(200), Sampling(), forbidden)
    assert (tokens < 497).all()
    assert logprobs.isfinite().all()


def test_top_k_of_all_tokens_but_one_leaves_that_one_out():
    logits = torch.tensor([[0.1, 0.5, 0.25, 0.15]]).log().expand(50, 4)
    tokens, logprobs = draw(logits, torch.linspace(0, 0.999, 50), Sampling(top_k=3))
    assert set(tokens.tolist()) == {1, 2, 3}
    torch.testing.assert_close(logprobs[0].exp(), torch.tensor(0.5 / 0.9))


@pytest.mark.parametrize("k", [1, 3])
def test_top_k_keeps_k_of_tokens_that_are_alike(k):
    tokens, logprobs = draw(torch.zeros(50, 4), torch.linspace(0, 0.999, 50), Sampling(top_k=k))
    assert len(set(tokens.tolist())) == k
    torch.testing.assert_close(logprobs.exp(), torch.full((50,), 1 / k))


LOCAL = [[["global", "local"], 1]]
SIZES = {"vocab_size": 4, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
ODD = {
    "local attention": lambda: GPTNeoForCausalLM(
        GPTNeoConfig(vocab_size=4, hidden_size=16, num_layers=2, num_heads=2, window_size=3, attention_types=LOCAL)
    ),
    "alibi": lambda: BloomForCausalLM(BloomConfig(vocab_size=4, hidden_size=16, n_layer=2, n_head=2)),
    "longrope": lambda: LlamaForCausalLM(
        LlamaConfig(
            **SIZES, intermediate_size=16, max_position_embeddings=32,
            rope_parameters={
                "rope_type": "longrope", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64,
                "short_factor": [1.0] * 4, "long_factor": [4.0] * 4,
            },
        )
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", ODD)
def test_models_that_count_columns_are_read_anew(kind):
    """Ragged rows, stepped: the log-probabilities are those of each text alone."""
    torch.manual_seed(0)
    model = ODD[kind]().eval()
    assert not cacheable(model, 12)
    task = gym.make(
        "textrl/Text-v0", tokenizer=textrl.symbol_tokenizer("abc"), prompts=["a", "abcabca"], max_new_tokens=4
    ).unwrapped.task
    envs = textrl.TextVectorEnv(task, 4, reference=model, kl_coef=0.1)
    policy = CausalPolicy(model, 4)
    before, _ = envs.reset(seed=0)
    for actions in np.random.default_rng(0).integers(1, 4, size=(3, 4)):
        after, _, _, _, infos = envs.step(actions)
        for i, action in enumerate(actions.tolist()):
            text = torch.from_numpy(before[i][before[i] != 4])[None]
            with torch.no_grad():
                logits = model(input_ids=text).logits[0, -1]
            assert infos["ref_logprob"][i] == pytest.approx(float(logits.log_softmax(-1)[action]), abs=1e-5)
        before = after
    rollout = collect_sampled(envs, policy, 8, rng=np.random.default_rng(0), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(batched_logprobs(policy, rollout, 1000), rollout.logprobs, atol=1e-5, rtol=0)
