"""How agents act outside their own environment: `predict` and `generate`, inside the masks that can be known."""

import numpy as np
import pytest
import torch

import textrl
from textrl.acting import _response
from textrl.agents import GRPO, NLPO, ReST
from textrl.envs.copy import Copy
from textrl.models import small_model


class Halves(textrl.Task):
    """The second half of a response may only repeat letters of the first; "b" is never the first."""

    def __init__(self, prompts=("a", "ab")):
        super().__init__(tokenizer=textrl.symbol_tokenizer("abc"), max_new_tokens=4)
        self._prompts = prompts

    def prompts(self):
        return [{"prompt": prompt, "banned": 2} for prompt in self._prompts]

    def score(self, prompts, completions, **columns):
        return [float(len(text)) for text in completions]

    def allowed_tokens(self, rows, responses):
        allowed = np.ones((len(rows), 4), dtype=bool)
        for i, row in enumerate(rows):
            if responses[i, 0] == 4:
                allowed[i, [0, row["banned"]]] = False
            elif responses[i, 1] != 4:
                allowed[i] = np.isin(np.arange(4), [0, *responses[i, :2]])
        return allowed


def loud_for(token):
    """A model that would say one token always."""
    model = small_model(4, 8)
    with torch.no_grad():
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.copy_(50 * model.transformer.wte.weight[token])
    return model


def test_predict_keeps_inside_the_masks_that_it_can_know():
    task = Halves(prompts=("a",))
    agent = textrl.Agent(textrl.TextEnv(task), loud_for(2), device="cpu")
    env = textrl.TextEnv(task)  # not the agent's own
    for deterministic in (True, False):
        observation, _ = env.reset(seed=0)
        for _ in range(4):
            action, _ = agent.predict(observation, deterministic=deterministic)
            assert env.action_masks()[action]
            observation, _, ended, _, _ = env.step(action)
            if ended:
                break
    start, _ = env.reset()
    assert agent.predict(start, deterministic=True)[0] != 2
    assert agent.predict(start, deterministic=True, action_masks=np.array([0, 0, 1, 0]))[0] == 2
    both = np.stack([start, start])
    masks = np.array([[False, True, False, False], [False, False, False, True]])
    assert agent.predict(both, action_masks=masks)[0].tolist() == [1, 3]


def test_predict_sees_weights_however_they_changed():
    agent = textrl.Agent(textrl.TextEnv(Copy(symbols="abc", length=3)), loud_for(2), device="cpu")
    text, _ = agent.env.reset(seed=0)
    assert agent.predict(text, deterministic=True)[0] == 2
    agent.model.transformer.ln_f.bias.data.copy_(50 * agent.model.transformer.wte.weight.data[3])
    assert agent.predict(text, deterministic=True)[0] == 3


def test_predict_refuses_a_broken_model():
    env = textrl.TextEnv(Halves(prompts=("a",)))
    agent = textrl.Agent(env, loud_for(2), device="cpu")
    with torch.no_grad():
        agent.model.transformer.ln_f.bias.fill_(torch.nan)
    for deterministic in (True, False):
        with pytest.raises(ValueError, match="model gives logits that are not finite"):
            agent.predict(env.reset(seed=0)[0], deterministic=deterministic)


def test_masks_are_left_out_where_an_observation_does_not_say_which_hold():
    free = textrl.Agent(textrl.TextEnv(Halves(prompts=("c",))), loud_for(2), device="cpu")
    elsewhere, _ = textrl.TextEnv(Halves(prompts=("a",))).reset()
    assert free.predict(elsewhere, deterministic=True)[0] == 2  # none of its task's prompts
    agent = textrl.Agent(textrl.TextEnv(Halves()), loud_for(2), device="cpu")
    start, _ = textrl.TextEnv(Halves(prompts=("ab",))).reset()
    # "ab" begins with the prompt "a" too, of which it would be the response "b": what both allow is left
    assert agent.predict(start, deterministic=True)[0] != 2


def test_generate_keeps_inside_the_masks_of_the_tasks_own_prompts():
    agent = textrl.Agent(textrl.TextEnv(Halves()), loud_for(2), device="cpu")
    text = agent.generate(["a"], deterministic=True)[0]
    assert text[0] != "b"
    assert agent.generate(["bc"], deterministic=True) == ["bbbb"]  # nobody said what holds here


class Odd(Halves):
    """Masks as an author may write them."""

    def __init__(self, masks):
        super().__init__()
        self._masks = masks

    def allowed_tokens(self, rows, responses):
        assert not (responses == 0).any(), "asked about a response that has ended"
        return self._masks(len(rows))


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        (
            lambda n: np.zeros((n, 4), dtype=bool),
            "allowed_tokens must allow at least one token; none is allowed for .*'a",
        ),
        (lambda n: np.ones((n, 3), dtype=bool), r"allowed_tokens must give a bool array of shape \(., 4\); got bool"),
        (lambda n: [[1, 0, 0, 1]] * n, r"allowed_tokens must give a bool array of shape \(., 4\); got int64"),
    ],
)
def test_masks_that_are_none_are_named_wherever_they_are_asked_for(masks, message):
    env = textrl.TextEnv(Odd(masks))
    agent = textrl.Agent(env, small_model(4, 8), batch_size=4, device="cpu")
    for ask in (
        env.reset,
        agent.collect,
        lambda: agent.generate(["a"]),
        lambda: agent.predict(np.array([[0, 1, *[4] * 5]])),
    ):
        with pytest.raises(ValueError, match=message):
            ask()
    with pytest.raises(ValueError, match=message):
        textrl.evaluate_exact(env.task, small_model(4, 8), masked=True)


def test_masks_may_be_lists_and_leave_only_the_end():
    task = Odd(lambda n: [[True, False, False, True]] * n)
    rollout = textrl.Agent(textrl.TextEnv(task), small_model(4, 8), batch_size=64, device="cpu").collect()
    assert set("".join(rollout.completions)) == {"c"} and 0 < rollout.stopped.float().mean() < 1
    silent = textrl.Agent(textrl.TextEnv(Odd(lambda n: [[True, False, False, False]] * n)), small_model(4, 8))
    assert silent.generate(["a"], min_new_tokens=2) == [""]


def test_generate_takes_prompts_longer_than_those_learned_from():
    agent = textrl.Agent(textrl.TextEnv(Halves()), loud_for(2), device="cpu")  # reads 8 tokens, prompts have up to 3
    own = agent.generate(["a"], max_new_tokens=2, deterministic=True)[0]
    assert own != "bb"  # "b" is never the first
    assert agent.generate(["cabac", "a"], max_new_tokens=2, deterministic=True) == ["bb", own]
    with pytest.raises(ValueError, match="max_new_tokens must be at most 2: the model reads no longer text; got 4"):
        agent.generate(["cabac"])
    with pytest.raises(ValueError, match=r"prompts must be texts of less than 8 tokens, .*; one has 9; got 'abcabcab'"):
        agent.generate(["a", "abcabcab"])


@pytest.mark.parametrize(
    ("masks", "message"),
    [(np.ones(3), r"action_masks must be of shape \(1, 4\)"), (np.zeros(4), "at least one token in each row")],
)
def test_wrong_masks_are_refused(masks, message):
    env = textrl.TextEnv(Halves())
    agent = textrl.Agent(env, loud_for(2), device="cpu")
    with pytest.raises(ValueError, match=message):
        agent.predict(env.reset()[0], action_masks=masks)


def test_a_response_that_is_over_is_none_to_be_masked():
    task = Copy(length=2)
    empty = task.vocab_size
    observation = np.array([0, 1, 2, empty, empty])
    assert _response(task, observation, 2) is not None
    observation[3] = task.eos_token_id
    task.max_new_tokens = 3
    assert _response(task, observation, 2) is None
    assert _response(task, np.array([0, 1, 2, 1, 2]), 2) is None  # the horizon


def test_a_batch_is_rounded_up_to_whole_groups():
    agent = GRPO(textrl.TextEnv(Copy(length=2)), batch_size=6, group_size=4)
    rollout = agent.collect()
    assert len(rollout) == 8
    agent.update(rollout)
    assert rollout.values is None  # the caller's is as it was
    rest = ReST(agent.env, batch_size=6, group_size=4, grow_batches=1, quantiles=(0, 0.5))
    assert len(rest.collect()) == 8


def test_nlpo_draws_inside_its_mask_whatever_the_prompt_and_the_length():
    task = Copy(symbols="abc", length=2)
    agent = NLPO(textrl.TextEnv(task), small_model(task.vocab_size, 16, initializer_range=1.0), top_p=0.3, batch_size=8)
    for prompt, steps in (("a", 1), ("cc", 1), ("a", task.max_new_tokens + 1)):
        observation = np.full((1, 12), task.vocab_size)
        ids = task.encode({"prompt": prompt})
        observation[0, : len(ids)] = ids
        mask = agent.narrow(observation)[0]
        assert 0 < mask.sum() < task.vocab_size
        said = agent.generate([prompt] * 100, max_new_tokens=steps)
        assert {task.tokenizer.convert_tokens_to_ids(t[0]) if t else 0 for t in said} <= set(np.flatnonzero(mask))


def test_what_generate_is_given():
    agent = textrl.Agent(textrl.TextEnv(Halves()), loud_for(2), device="cpu")
    settings = {"deterministic": True}
    assert agent.generate(("a",), np.int64(3), **settings) == agent.generate(["a"], 3, **settings)
    for wrong, message in (
        ({"prompts": ["\ud800"]}, "prompts must be text; got half of a surrogate pair"),
        ({"prompts": ["a"], "max_new_tokens": 2.0}, "max_new_tokens must be a whole number of at least 1; got 2.0"),
        ({"prompts": ["a"], "min_new_tokens": 5}, "min_new_tokens must be at most max_new_tokens, 4; got 5"),
    ):
        with pytest.raises(ValueError, match=message):
            agent.generate(**wrong)
    with pytest.raises(ValueError, match=r"rows must be at least one row of the task; got \[\]"):
        agent.respond([])


@pytest.mark.parametrize(
    ("observation", "message"),
    [
        (np.zeros((0, 7), dtype=np.int64), r"or \(N, 7\), N from 1; got shape \(0, 7\)"),
        ([0, 1, 4, 2, 4, 4, 4], "from the left, and 4 where nothing"),
        ([0, 1, 2, 0, 2, 4, 4], "in which nothing is written after the end token"),
    ],
)
def test_predict_refuses_what_no_environment_shows(observation, message):
    agent = textrl.Agent(textrl.TextEnv(Halves()), loud_for(2), device="cpu")
    with pytest.raises(ValueError, match=f"observation must be .*{message}"):
        agent.predict(np.array(observation))
    for shown in ([0, 1, 2, 0, 4, 4, 4], [0, 1, 2, 1, 1, 1, 1]):  # the last of an episode
        agent.predict(np.array(shown))
