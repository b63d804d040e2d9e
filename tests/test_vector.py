"""N single environments and one vector environment, stepped alike, are told apart by nothing."""

import copy
import warnings
from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers import TimeLimit
from gymnasium.wrappers.vector import DictInfoToList

import textrl
from textrl.agents import REINFORCE
from textrl.envs.brackets import Brackets
from textrl.envs.copy import Copy
from textrl.envs.increasing import Increasing
from textrl.envs.proxy_gold import ProxyGold
from textrl.models import small_model
from textrl.state import pack_env, unpack_env
from textrl.stepwise import frozen_reference

TASKS = [Copy, Brackets, Increasing, ProxyGold]
MODES = list(AutoresetMode)


def small_reference(task, seed=1):
    return small_model(task.vocab_size, task.max_prompt_tokens + task.max_new_tokens, seed, n_embd=16, n_layer=1)


class Pair:
    """The same environments twice, in Gymnasium's SyncVectorEnv and in ours."""

    def __init__(self, task_class, num_envs, mode, reference=False, policy=False, limit=None):
        kwargs = {}
        if reference:
            kwargs = {"reference": small_reference(task_class()), "kl_coef": 0.3, "temperature": 0.7}
        self.mode = mode
        self.singles = [textrl.TextEnv(task_class(), **kwargs) for _ in range(num_envs)]
        given = self.singles if limit is None else [TimeLimit(env, limit) for env in self.singles]
        self.theirs = SyncVectorEnv([lambda env=env: env for env in given], autoreset_mode=mode)
        self.ours = textrl.TextVectorEnv(task_class(), num_envs, autoreset_mode=mode, max_episode_steps=limit, **kwargs)
        if policy:
            model = small_reference(task_class(), seed=2)
            for env in [*self.singles, self.ours]:
                env.policy = frozen_reference(model, env.task)[1]
        self.ended = np.zeros(num_envs, dtype=bool)

    def reset(self, **kwargs):
        options = kwargs.pop("options", None)  # SyncVectorEnv takes reset_mask out of the dict
        theirs = self.theirs.reset(options=None if options is None else dict(options), **kwargs)
        ours = self.ours.reset(options=options, **kwargs)
        same(theirs, ours)
        return ours

    def step(self, actions):
        theirs, ours = self.theirs.step(actions), self.ours.step(actions)
        same(theirs, ours)
        return ours

    def run(self, steps, seed=0):
        generator = np.random.default_rng(seed)
        self.reset(seed=seed)
        for _ in range(steps):
            actions = generator.integers(self.ours.single_action_space.n, size=self.ours.num_envs)
            _, _, terminated, truncated, _ = self.step(actions)
            if self.mode == AutoresetMode.DISABLED and (terminated | truncated).any():
                self.reset(options={"reset_mask": terminated | truncated})


def same(theirs, ours, where=""):
    """Equal in every key, dtype and number; floats of a reference to 1e-5."""
    if isinstance(theirs, dict):
        assert set(theirs) == set(ours), where
        for key in theirs:
            same(theirs[key], ours[key], f"{where}/{key}")
    elif isinstance(theirs, tuple):
        assert len(theirs) == len(ours)
        for i, (a, b) in enumerate(zip(theirs, ours, strict=True)):
            same(a, b, f"{where}[{i}]")
    else:
        assert type(theirs) is type(ours) and theirs.dtype == ours.dtype and theirs.shape == ours.shape, where
        if theirs.dtype == object:
            for a, b in zip(theirs, ours, strict=True):
                assert type(a) is type(b), where
                np.testing.assert_array_equal(a, b, err_msg=where)
        elif theirs.dtype.kind == "f":
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5, err_msg=where)
        else:
            np.testing.assert_array_equal(ours, theirs, err_msg=where)


class Down(textrl.Task):
    """A deterministic score that fails while it is down."""

    deterministic = True
    down = True

    def __init__(self):
        super().__init__(tokenizer=textrl.symbol_tokenizer("ab"), max_new_tokens=1)

    def prompts(self):
        return [{"prompt": "a"}]

    def score(self, prompts, completions, **columns):
        return [float("nan") if self.down and c == "b" else 1.0 for c in completions]


def test_a_score_that_failed_is_asked_for_again():
    envs = textrl.TextVectorEnv(Down(), 3, autoreset_mode="DISABLED")
    envs.task.asking = replace(envs.task.asking, drop=True)
    known = False
    for down in (True, False, True):
        envs.task.down = down
        envs.reset(seed=0)
        _, _, _, _, infos = envs.step(np.array([2, 1, 2]))
        failed = [True, False, True] if down and not known else [False] * 3  # what is known stays known
        assert np.isnan(infos["score"]).tolist() == failed
        assert [fault is not None for fault in infos.get("score_fault", [None] * 3)] == failed
        known |= not down


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("task", TASKS)
def test_single_and_vector_alike(task, mode):
    Pair(task, 5, mode).run(300)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("policy", [False, True])
def test_alike_with_a_reference(mode, policy):
    Pair(Copy, 2, mode, reference=True, policy=policy).run(150)  # two: now and then all rows reset in one step
    Pair(Brackets, 3, mode, reference=True, policy=policy).run(60)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("limit", [1, 2, 3])
def test_alike_under_a_time_limit(mode, limit):
    for task in (Copy, Brackets, Increasing):
        Pair(task, 4, mode, limit=limit).run(100)
    Pair(Brackets, 2, mode, reference=True, policy=True, limit=limit).run(40)


@pytest.mark.parametrize("mode", MODES)
def test_a_time_limit_through_make_vec(mode):
    envs = gym.make_vec("textrl/Copy-v0", num_envs=2, max_episode_steps=2, autoreset_mode=mode)
    envs.reset(seed=0)
    assert not np.any(envs.step(np.array([1, 1]))[2:4])
    _, _, terminated, truncated, _ = envs.step(np.array([1, 0]))
    assert terminated.tolist() == [False, True] and truncated.tolist() == [True, True]
    with pytest.raises(ValueError, match="max_episode_steps must be a whole number of at least 1; got 0"):
        gym.make_vec("textrl/Copy-v0", num_envs=2, max_episode_steps=0)


def test_agents_step_an_env_with_a_time_limit():
    envs = gym.make_vec("textrl/Copy-v0", num_envs=4, max_episode_steps=2)
    rollout = REINFORCE(envs, batch_size=16).collect()
    assert rollout.action_mask.sum(1).max() == 2 and not rollout.scores[~rollout.stopped].any()


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("reference", [False, True])
def test_alike_over_ten_thousand_steps(mode, reference):
    Pair(Copy, 3, mode, reference=reference).run(10_000)


def test_without_a_reference_rewards_are_equal_to_the_last_bit():
    singles = [textrl.TextEnv(Increasing()) for _ in range(3)]
    theirs = SyncVectorEnv([lambda env=env: env for env in singles])
    ours = textrl.TextVectorEnv(Increasing(), 3)
    theirs.reset(seed=0)
    ours.reset(seed=0)
    for actions in np.random.default_rng(0).integers(6, size=(200, 3)):
        assert theirs.step(actions)[1].tolist() == ours.step(actions)[1].tolist()


def test_the_kind_of_seed():
    pair = Pair(Copy, 3, AutoresetMode.NEXT_STEP)
    first = pair.reset(seed=4)[0]
    np.testing.assert_array_equal(pair.reset(seed=[4, 5, 6])[0], first)
    pair.reset(seed=[1, None, 2])
    assert pair.ours.reset(seed=9)[0].tolist() == pair.ours.reset(seed=9)[0].tolist()
    assert pair.ours.np_random_seed == 9
    pair.reset(seed=4)
    for bad in ([1, 2], [1, 2.5, 3], [1, -1, 3], -1, 1.5, "abc"):
        with pytest.raises(ValueError, match="num_envs=3"):
            pair.ours.reset(seed=bad)
    pair.step(np.array([1, 2, 3]))


def test_a_reset_mask_resets_those_rows_only_and_is_left_alone():
    pair = Pair(Brackets, 4, AutoresetMode.SAME_STEP)
    pair.reset(seed=0)
    pair.step(np.array([1, 1, 3, 3]))
    options = {"reset_mask": np.array([True, False, False, True]), "other": 1}
    observations, infos = pair.reset(options=options)
    assert set(options) == {"reset_mask", "other"}
    assert infos["_action_mask"].tolist() == [True, False, False, True]
    assert (observations[1] != 5).sum() == 4 and (observations[0] != 5).sum() == 3
    for bad, error in (
        ([True] * 4, TypeError),
        (np.ones(4), TypeError),
        (np.ones(3, bool), ValueError),
        (np.zeros(4, bool), ValueError),
        (np.ones((4, 1), bool), ValueError),
    ):
        with pytest.raises(error, match=r"^options\['reset_mask'\] must .*[^\n]$"):
            pair.ours.reset(options={"reset_mask": bad})
    with pytest.raises(gym.error.ResetNeeded, match="all rows"):
        textrl.TextVectorEnv(Copy(), 2).reset(options={"reset_mask": np.array([True, False])})


def test_arrays_are_fresh_at_every_call():
    envs = textrl.TextVectorEnv(Brackets(), 3, autoreset_mode="SAME_STEP")
    given = [envs.reset(seed=0)]
    for actions in np.random.default_rng(0).integers(5, size=(30, 3)):
        given.append(envs.step(actions))
    arrays = []

    def gather(x):
        if isinstance(x, dict):
            x = tuple(x.values())
        if isinstance(x, tuple):
            for each in x:
                gather(each)
        elif isinstance(x, np.ndarray):
            arrays.append(x)

    for each in given:
        gather(each)
    assert len(arrays) > 300
    assert not any(np.may_share_memory(a, b) for i, a in enumerate(arrays) for b in arrays[:i])


@pytest.mark.parametrize(
    "actions",
    [np.array([0.0, 1.0]), np.array([0, 4]), np.array([-1, 0]), np.array([0]), np.zeros((2, 1), int), None, "ab"],
)
def test_wrong_actions_leave_the_state_as_it_was(actions):
    envs, twin = (textrl.TextVectorEnv(Copy(), 2) for _ in range(2))
    envs.reset(seed=0)
    twin.reset(seed=0)
    with pytest.raises(ValueError, match="actions must be"):
        envs.step(actions)
    for good in ([1, 2], [0, 3], [2, 2]):
        same(twin.step(np.array(good)), envs.step(np.array(good)))


def test_steps_out_of_turn():
    envs = textrl.TextVectorEnv(Copy(), 2, autoreset_mode=AutoresetMode.DISABLED)
    with pytest.raises(gym.error.ResetNeeded, match="first reset"):
        envs.step(np.array([1, 1]))
    envs.reset(seed=0)
    observations = envs.step(np.array([0, 1]))[0]
    with pytest.raises(AssertionError, match=r"rows \[0\] have ended"):
        envs.step(np.array([1, 1]))
    again = envs.reset(options={"reset_mask": np.array([True, False])})[0]
    np.testing.assert_array_equal(again[1], observations[1])


def test_a_score_that_fails_leaves_an_env_that_can_go_on():
    class Fails(Copy):
        broken = True

        def score(self, prompts, completions, **columns):
            if self.broken:
                raise RuntimeError("the score is down")
            return super().score(prompts, completions, **columns)

    task = Fails()
    envs = textrl.TextVectorEnv(task, 2)
    envs.reset(seed=0)
    task.token_scores = False
    with pytest.raises(ValueError, match="RuntimeError: the score is down for prompt"):
        envs.step(np.array([0, 1]))
    task.broken = False
    observations, rewards, terminated, _, _ = envs.step(np.array([0, 0]))
    assert terminated.tolist() == [False, True] and rewards[0] == 0
    assert (observations[0] != 4).sum() == 4  # a new prompt


def test_metadata_belongs_to_the_instance():
    one, other = textrl.TextVectorEnv(Copy(), 1, autoreset_mode="SAME_STEP"), textrl.TextVectorEnv(Copy(), 1)
    assert one.metadata["autoreset_mode"] is one.autoreset_mode is AutoresetMode.SAME_STEP
    assert other.metadata["autoreset_mode"] is AutoresetMode.NEXT_STEP
    with pytest.raises(ValueError, match="autoreset_mode"):
        textrl.TextVectorEnv(Copy(), 1, autoreset_mode="never")
    with pytest.raises(ValueError, match="num_envs"):
        textrl.TextVectorEnv(Copy(), 0)


@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP])
def test_infos_become_lists(mode):
    envs = DictInfoToList(textrl.TextVectorEnv(Brackets(), 3, autoreset_mode=mode))
    envs.reset(seed=0)
    for actions in np.random.default_rng(0).integers(5, size=(20, 3)):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            _, _, terminated, _, infos = envs.step(actions)
        for info, ended in zip(infos, terminated, strict=True):
            final = info.get("final_info", {}) if mode == AutoresetMode.SAME_STEP else info
            assert ("score" in final) == ended


def test_the_reference_reads_one_token_a_step():
    task = Copy(length=6)
    envs = textrl.TextVectorEnv(task, 4, reference=small_reference(task), kl_coef=0.1, autoreset_mode="SAME_STEP")
    sizes = []
    hook = envs.reference.base_model.wte.register_forward_hook(lambda module, args, out: sizes.append(out.shape[:2]))
    envs.reset(seed=0)
    envs.step(np.array([1, 1, 1, 1]))
    sizes.clear()
    envs.step(np.array([1, 0, 1, 1]))  # row 1 ends and starts again
    envs.step(np.array([1, 1, 1, 1]))
    hook.remove()
    assert sorted(map(tuple, sizes)) == [(1, 7), (4, 1), (4, 1)]  # only the restarted row reads a prompt of 7 tokens


class Counted(Copy):
    """Counts how many responses its score was asked about."""

    deterministic = True
    asked = 0

    def score(self, prompts, completions, **columns):
        self.asked += len(prompts)
        return super().score(prompts, completions, **columns)


def test_a_small_deterministic_score_is_asked_once_for_each_response():
    task = Counted()
    envs, plain = textrl.TextVectorEnv(task, 16), textrl.TextVectorEnv(Copy(), 16)
    plain.reset(seed=0)
    plain.reset(seed=0, options={"prompt": "abc"})  # a row given from outside: from here on nothing is remembered
    envs.reset(seed=0), plain.reset(seed=0)
    ends = set()
    for actions in np.random.default_rng(0).integers(4, size=(400, 16)):
        mine, theirs = envs.step(actions), plain.step(actions)
        same(theirs, mine)
        ends |= {
            (mine[4]["prompt"][i], mine[4]["completion"][i], mine[4]["finish_reason"][i])
            for i in np.flatnonzero(mine[2])
        }
    assert len(ends) <= task.asked <= len(ends) + 16  # the first step may ask of every row whether tokens are paid


def test_only_a_score_that_says_so_is_remembered():
    class Louder(Counted):
        def score(self, prompts, completions, **columns):
            return [2 * score for score in super().score(prompts, completions, **columns)]

    class Described(Counted):
        def describe(self, prompts, completions, **columns):
            return {"asked": [float(self.asked)] * len(prompts)}

    patched = Counted()
    patched.score = lambda prompts, completions, **columns: [0.0] * len(prompts)
    assert Copy().deterministic_score and Counted().deterministic_score
    assert not any(task.deterministic_score for task in (Louder(), Described(), patched))


def test_a_large_task_is_asked_every_time():
    task = Counted(symbols="abcdefgh", length=5)
    envs = textrl.TextVectorEnv(task, 4)
    envs.reset(seed=0)
    ended = sum(envs.step(np.zeros(4, int))[2].sum() for _ in range(20))
    assert task.asked >= ended == 40


def test_a_copy_of_an_env_goes_its_own_way():
    envs = textrl.TextVectorEnv(Brackets(), 3)
    envs.reset(seed=0)
    twin = copy.deepcopy(envs)
    for actions in np.random.default_rng(1).integers(5, size=(20, 3)):
        same(envs.step(actions), twin.step(actions))


@pytest.mark.parametrize("options", [{}, {"max_episode_steps": 2}])
def test_an_env_taken_up_again_in_mid_episode_goes_on_alike(options):
    envs, again = (textrl.TextVectorEnv(Copy(), 4, **options) for _ in range(2))
    envs.reset(seed=0)
    for _ in range(2):
        envs.step(np.array([1, 2, 0, 3]))
    tensors = {}
    unpack_env(again, pack_env(envs, tensors), tensors, torch.device("cpu"))
    for actions in np.random.default_rng(1).integers(4, size=(20, 4)):
        same(envs.step(actions), again.step(actions))


def test_nothing_more_is_asked_of_a_text_that_has_ended():
    class Drawn(textrl.Task):
        """A task that only samples: how long its prompts are is not known."""

        def __init__(self):
            super().__init__(tokenizer=textrl.symbol_tokenizer("ab"), max_new_tokens=3)

        def sample(self, rng):
            return {"prompt": "ab"}

        def score(self, prompts, completions, **columns):
            return [float(len(text)) for text in completions]

    reference = small_model(3, 5)  # prompt and response but for the last token
    envs = textrl.TextVectorEnv(Drawn(), 2, reference=reference, kl_coef=0.1, autoreset_mode=AutoresetMode.NEXT_STEP)
    envs.policy = lambda observations: np.where(observations[:, -1:] == 3, 0.0, np.nan) + np.zeros((2, 3))
    envs.reset(seed=0)
    for actions in ([1, 1], [1, 0], [1, 1], [-1, 1], [1, 1]):  # row 0 ends at the third step, row 1 at the second
        rewards = envs.step(np.array(actions))[1]
        assert np.isfinite(rewards).all()


def test_masks_of_brackets_of_prompts_of_different_lengths():
    envs = textrl.TextVectorEnv(Brackets(), 2)
    envs.reset(seed=0)
    envs.reset(options={"reset_mask": np.array([True, False]), "prompt": "("})
    alone = textrl.TextEnv(Brackets())
    alone.reset(options={"prompt": "("})
    assert envs.action_masks()[0].tolist() == alone.action_masks().tolist()
