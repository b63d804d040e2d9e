import gymnasium as gym
import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2Model

import textrl
from textrl.envs.copy import Copy
from textrl.envs.increasing import Increasing
from textrl.envs.proxy_gold import ProxyGold
from textrl.envs.random_walk import RandomWalk
from textrl.models import small_model
from textrl.penalty import chosen_logprobs
from textrl.policy import CausalPolicy
from textrl.rollout import collect_sampled
from textrl.stepwise import frozen_reference


def tiny(task, seed=1):
    return small_model(task.vocab_size, task.max_prompt_tokens + task.max_new_tokens, seed, n_embd=16, n_layer=1)


class Lettered(textrl.Task):
    """One point for each of the prompt's letter, which is a column of its row."""

    def __init__(self):
        super().__init__(tokenizer=textrl.symbol_tokenizer("ab"), max_new_tokens=2)

    def prompts(self):
        return [{"prompt": "a", "letter": "b", "weight": 2}, {"prompt": "b", "letter": "a"}]

    def score(self, prompts, completions, letter, weight, **columns):
        return [(w or 1) * c.count(x or "a") for c, x, w in zip(completions, letter, weight, strict=True)]


@pytest.mark.parametrize(
    ("options", "score"),
    [({"prompt": "a"}, 2), ({"prompt": "b"}, 1), ({"prompt": ""}, 1), ({"row": {"prompt": "a", "letter": "a"}}, 2)],
)
def test_a_chosen_prompt_has_the_columns_of_the_tasks_row(options, score):
    env, envs = textrl.TextEnv(Lettered()), textrl.TextVectorEnv(Lettered(), 2)
    env.reset(options=options), envs.reset(options=options)
    for token in (1, 2):
        info = env.step(token)[-1]
        infos = envs.step(np.array([token] * 2))[-1]
    assert info["score"] == score and infos["score"].tolist() == [score] * 2


def test_an_episode_by_hand():
    env = textrl.TextEnv(Copy(symbols="ab", length=2))  # end 0, a 1, b 2; V = 3; L = 3 + 3
    observation, info = env.reset(seed=0, options={"prompt": "ab"})
    assert observation.tolist() == [0, 1, 2, 3, 3, 3] and info == {}
    observation, reward, terminated, truncated, info = env.step(1)
    assert observation.tolist() == [0, 1, 2, 1, 3, 3]
    assert (reward, terminated, truncated, info) == (0.0, False, False, {})
    env.step(1)
    observation, reward, terminated, truncated, info = env.step(0)
    assert observation.tolist() == [0, 1, 2, 1, 1, 0] and terminated and not truncated
    assert reward == pytest.approx(2 / 3)  # a and the end are right, the second a is not
    assert info == {
        "prompt": "ab", "completion": "aa", "text": "abaa", "score": pytest.approx(2 / 3), "finish_reason": "stop",
    }  # fmt: skip


def test_the_horizon_ends_an_episode_and_is_no_truncation():
    env = textrl.TextEnv(Copy(symbols="ab", length=2))
    env.reset(options={"row": {"prompt": "ba"}})
    for _ in range(3):
        _, reward, terminated, truncated, info = env.step(2)
    assert terminated and not truncated and info["finish_reason"] == "length" and reward == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    "action", [4, -1, 1.0, np.float64(1), np.array([1]), np.array(1.0), "a", None, [1], True, torch.tensor([1])]
)
def test_wrong_actions_leave_the_state_as_it_was(action):
    env, twin = textrl.TextEnv(Copy()), textrl.TextEnv(Copy())
    env.reset(seed=0)
    twin.reset(seed=0)
    with pytest.raises(ValueError, match="action must be one integer token id from 0 to 3"):
        env.step(action)
    for good in (1, np.int32(2), np.array(3)):
        mine, theirs = env.step(good), twin.step(int(good))
        np.testing.assert_array_equal(mine[0], theirs[0])
        assert mine[1:] == theirs[1:]


def test_steps_out_of_turn():
    env = textrl.TextEnv(Copy())
    with pytest.raises(gym.error.ResetNeeded, match="before the first reset"):
        env.step(1)
    with pytest.raises(gym.error.ResetNeeded):
        env.snapshot()
    observation, _ = env.reset(seed=0)
    observation = env.step(0)[0]
    with pytest.raises(gym.error.ResetNeeded, match="after the end"):
        env.step(1)
    np.testing.assert_array_equal(env.restore(env.snapshot()), observation)


def test_a_snapshot_branches_an_episode():
    env = textrl.TextEnv(Increasing())
    env.reset(seed=0)
    env.step(1)
    here = env.snapshot()
    first = [env.step(action) for action in (3, 2, 0)]
    np.testing.assert_array_equal(env.restore(here), here.tokens)
    second = [env.step(action) for action in (3, 2, 0)]
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a[0], b[0])
        assert a[1:] == b[1:]
    assert first[-1][2] and here.length == 2  # the snapshot itself has not moved
    env.restore(here)
    assert env.step(5)[1] == pytest.approx(1 / 5)
    with pytest.raises(ValueError, match="of an episode of Increasing, this environment's task is Copy"):
        textrl.TextEnv(Copy()).restore(here)
    with pytest.raises(ValueError, match="snapshot has an observation"):
        textrl.TextEnv(Increasing(length=3)).restore(here)
    with pytest.raises(ValueError, match="snapshot is of a task with another vocabulary than these 4 tokens"):
        small, large = (textrl.TextEnv(Copy(symbols=symbols, length=2)) for symbols in ("abc", "abcde"))
        large.reset(seed=0)
        small.restore(large.snapshot())


def test_a_snapshot_with_a_reference_gives_the_same_penalties():
    task = Copy()
    env = textrl.TextEnv(task, reference=tiny(task), kl_coef=0.5)
    env.reset(seed=0)
    env.step(1)
    here = env.snapshot()
    first = [env.step(a)[1] for a in (2, 3)]
    env.restore(here)
    env.step(1)
    env.restore(here)
    assert [env.step(a)[1] for a in (2, 3)] == pytest.approx(first, abs=1e-5)


def test_the_penalty_by_hand():
    task = Copy()
    env = textrl.TextEnv(task, reference=tiny(task), kl_coef=0.5, temperature=0.7)
    observation, _ = env.reset(seed=0)
    tokens = torch.from_numpy(observation[observation != 4])[None]
    expected = float((env.reference(tokens).logits[0, -1] / 0.7).log_softmax(-1)[2])
    snapshot = env.snapshot()
    _, reward, _, _, info = env.step(2)
    assert info["ref_logprob"] == pytest.approx(expected, abs=1e-6) and "kl" not in info
    assert reward == pytest.approx(0.5 * expected, abs=1e-6)  # the entropy bonus is left to the agent
    env.restore(snapshot)
    env.policy = lambda observations: np.zeros((len(observations), 4))  # uniform
    _, reward, _, _, info = env.step(2)
    assert info["kl"] == pytest.approx(np.log(1 / 4) - expected, abs=1e-6)
    assert reward == pytest.approx(-0.5 * (np.log(1 / 4) - expected), abs=1e-6)


def test_the_reference_is_frozen():
    task = Copy()
    env = textrl.TextEnv(task, reference=tiny(task), kl_coef=0.1)
    assert not any(p.requires_grad for p in env.reference.parameters()) and not env.reference.training


@pytest.mark.parametrize("task_class", [Copy, Increasing, ProxyGold])
def test_three_views_of_one_task_give_equal_rewards(task_class):
    task = task_class()
    reference, model, temperature = tiny(task, 1), tiny(task, 2), 0.8
    kwargs = {"reference": reference, "kl_coef": 0.4, "temperature": temperature}
    env, envs = textrl.TextEnv(task, **kwargs), textrl.TextVectorEnv(task, 12, **kwargs)
    rollout = collect_sampled(
        env,
        CausalPolicy(model, task.vocab_size, temperature),
        12,
        rng=np.random.default_rng(0),
        generator=torch.Generator().manual_seed(0),
    )
    env.policy, envs.policy = frozen_reference(model, task)[1], frozen_reference(model, task)[1]
    lengths = rollout.action_mask.sum(1).tolist()
    assert len(set(lengths)) > 1
    stepped = np.zeros(rollout.rewards.shape)
    for i, row in enumerate(rollout.rows):
        observation, _ = env.reset(options={"row": row})
        for t in range(lengths[i]):
            np.testing.assert_array_equal(
                observation[observation != task.vocab_size], rollout.tokens[i, : rollout.prompt_lengths[i] + t]
            )
            observation, stepped[i, t], terminated, _, info = env.step(int(rollout.responses[i, t]))
            assert terminated == (t == lengths[i] - 1)
            assert info["kl"] == pytest.approx(float(rollout.logprobs[i, t] - rollout.ref_logprobs[i, t]), abs=1e-5)
        assert info["score"] == pytest.approx(float(rollout.scores[i])) and info["completion"] == rollout.completions[i]
    np.testing.assert_allclose(stepped, rollout.rewards, atol=1e-5)
    batched = np.zeros(rollout.rewards.shape)
    envs.reset()
    streams = envs._streams
    streams.draw = lambda indices: (None, *streams.lay_out([rollout.rows[i] for i in indices]))
    envs.reset()
    running = np.ones(12, dtype=bool)
    for t in range(max(lengths)):
        _, rewards, terminated, _, _ = envs.step(rollout.responses[:, t].numpy())
        batched[running, t] = rewards[running]
        running &= ~terminated
        if not running.all():  # NEXT_STEP has begun other episodes in those rows: what they earn is not looked at
            assert not (running & (np.array(lengths) <= t + 1)).any()
    np.testing.assert_allclose(batched, rollout.rewards, atol=1e-5)


def test_extra_columns_come_with_the_final_info():
    env = textrl.TextEnv(ProxyGold())
    env.reset()
    for action in (1, 1, 1, 1, 1):
        info = env.step(action)[4]
        assert "gold_score" not in info
    info = env.step(1)[4]
    assert info["proxy_score"] == info["score"] == 1.0 and info["gold_score"] == 0.0
    assert type(info["gold_score"]) is np.float64


def test_describe_is_checked():
    class Clash(Copy):
        def describe(self, prompts, completions, **columns):
            return {"score": [0.0]}

    env = textrl.TextEnv(Clash())
    env.reset()
    with pytest.raises(ValueError, match="describe must give"):
        env.step(0)


@pytest.mark.parametrize("mask", [np.zeros((1, 4), bool), np.ones((1, 4), int), np.ones((2, 4), bool)])
def test_masks_are_checked(mask):
    class Masked(Copy):
        def allowed_tokens(self, rows, responses):
            return mask

    with pytest.raises(ValueError, match="allowed_tokens must"):
        textrl.TextEnv(Masked()).reset()


@pytest.mark.parametrize(
    "kwargs, named",
    [
        ({"kl_coef": -1}, "kl_coef"),
        ({"kl_coef": float("nan")}, "kl_coef"),
        ({"kl_coef": 0.1}, "reference"),
        ({"temperature": 0}, "temperature"),
        ({"render_mode": "film"}, "render_mode"),
        ({"reference": torch.nn.Linear(2, 2)}, "reference must be a transformers PreTrainedModel"),
    ],
)
def test_wrong_arguments(kwargs, named):
    for make in (lambda: textrl.TextEnv(Copy(), **kwargs), lambda: textrl.TextVectorEnv(Copy(), 2, **kwargs)):
        with pytest.raises(ValueError, match=named):
            make()


def test_the_prompts_are_not_the_actions():
    env = textrl.TextEnv(Copy())
    prompts, actions = [], []
    env.action_space.seed(3)
    env.reset(seed=3)
    for _ in range(200):
        env.reset()
        prompts.append(env._tokens[1])
        actions.append(env.action_space.sample() % 3 + 1)
    assert abs(np.corrcoef(prompts, actions)[0, 1]) < 0.25


def test_a_task_that_samples():
    class Endless(textrl.Task):
        def __init__(self):
            super().__init__(tokenizer=textrl.symbol_tokenizer("ab"), max_new_tokens=2, max_prompt_tokens=9)

        def sample(self, rng):
            return {"prompt": "".join(rng.choice(["a", "b"], size=int(rng.integers(1, 9))))}

        def score(self, prompts, completions, **columns):
            return [float(len(prompt)) for prompt in prompts]

    env, envs = textrl.TextEnv(Endless()), textrl.TextVectorEnv(Endless(), 3)
    one, three = env.reset(seed=5)[0], envs.reset(seed=5)[0]
    np.testing.assert_array_equal(one, three[0])
    for _ in range(10):
        env.step(0)
        envs.step(np.zeros(3, int))
        np.testing.assert_array_equal(env.reset()[0], envs.step(np.zeros(3, int))[0][0])


def test_logprobs_take_arrays_and_tensors_of_any_precision():
    logits = np.array([[0.0, np.log(3.0)]])
    assert chosen_logprobs(logits, [1], 1.0)[0] == pytest.approx(np.log(0.75))
    assert chosen_logprobs(torch.zeros(1, 4, dtype=torch.bfloat16), [2], 1.0)[0] == pytest.approx(np.log(0.25))


def test_random_walks_are_good_in_parts_only():
    task = RandomWalk()
    walks = task.walks(300)
    scores = np.array([walk["score"] for walk in walks])
    assert 0 < scores.mean() < 0.9 and scores.max() == 1.0
    again = task.score(
        [w["prompt"] for w in walks], [w["completion"] for w in walks], start=[w["prompt"][-1] for w in walks]
    )
    assert again == scores.tolist()


def test_large_alphabets_do_not_list_every_prompt():
    task = Copy(symbols="abcdefghijklmnopqrstuvwxyz", length=32)
    assert len(task.rows) == 10_000 and len({row["prompt"] for row in task.rows}) == 10_000


@pytest.mark.parametrize("kind", [GPT2Model, GPT2ForSequenceClassification])
def test_a_reference_without_next_token_logits_is_refused(kind):
    config = GPT2Config(vocab_size=8, n_embd=16, n_layer=1, n_head=2, n_positions=32, pad_token_id=0)
    with pytest.raises(ValueError, match=f"reference must be a causal language model.*{kind.__name__} gives"):
        gym.make("textrl/Copy-v0", reference=kind(config), kl_coef=0.1)
