import copy

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers import NormalizeReward, RecordEpisodeStatistics, RecordVideo, TimeLimit, TransformReward
from gymnasium.wrappers import vector as vector_wrappers

import textrl
from textrl.agents import BPO, DPO, GRPO, NLPO, PPO, REINFORCE, ReST
from textrl.critic import state_values, with_advantages
from textrl.envs.brackets import Brackets
from textrl.envs.copy import Copy
from textrl.envs.increasing import Increasing
from textrl.envs.text import Text
from textrl.models import small_model
from textrl.stepwise import frozen_reference
from textrl.wrappers import (
    KLPenalty,
    NumericInfo,
    OneHotObservation,
    TextObservation,
    VectorKLPenalty,
    VectorOneHotObservation,
)

MODES = list(AutoresetMode)


def tiny(task, seed=1):
    return small_model(task.vocab_size, task.max_prompt_tokens + task.max_new_tokens, seed, n_embd=16, n_layer=1)


def test_text_observations():
    env = TextObservation(textrl.TextEnv(Copy()))
    assert env.reset(options={"prompt": "abc"})[0] == "abc"
    assert env.step(2)[0] == "abcb"
    for _ in range(30):
        observation, _ = env.reset()
        assert observation in env.observation_space
    check_env(TextObservation(gym.make("textrl/Copy-v0")), skip_render_check=True)


def test_text_observations_stay_in_their_space():
    env = TextObservation(textrl.TextEnv(Text(prompts=["plain"])))
    assert env.reset()[0] in env.observation_space
    with pytest.raises(ValueError, match="textrl environment"):
        TextObservation(gym.make("CartPole-v1"))


def test_one_hot_observations():
    env = OneHotObservation(textrl.TextEnv(Copy(symbols="ab", length=1)))
    observation, _ = env.reset(options={"prompt": "b"})
    assert observation.tolist() == [[1, 0, 0], [0, 0, 1], [0, 0, 0], [0, 0, 0]] and observation in env.observation_space
    envs = VectorOneHotObservation(textrl.TextVectorEnv(Copy(symbols="ab", length=1), 2))
    observations, _ = envs.reset(options={"prompt": "b"})
    np.testing.assert_array_equal(observations, np.stack([observation] * 2))
    assert observations in envs.observation_space


def test_numeric_info():
    env = NumericInfo(textrl.TextEnv(Copy()))
    env.reset()
    assert list(env.step(0)[4]) == ["score"]


@pytest.mark.parametrize("policy", [False, True])
def test_the_penalty_of_the_wrapper_is_that_of_the_env(policy):
    task = Copy()
    inside = textrl.TextEnv(task, reference=tiny(task), kl_coef=0.3, temperature=0.8)
    outside = KLPenalty(textrl.TextEnv(task, temperature=0.8), tiny(task), 0.3)
    if policy:
        for env in (inside, outside):
            env.unwrapped.policy = frozen_reference(tiny(task, 2), task)[1]
    assert inside.reset(seed=0)[0].tolist() == outside.reset(seed=0)[0].tolist()
    for action in np.random.default_rng(0).integers(4, size=40).tolist():
        mine, theirs = outside.step(action), inside.step(action)
        assert mine[1] == pytest.approx(theirs[1], abs=1e-6) and type(mine[1]) is float
        assert mine[4].keys() == theirs[4].keys()
        assert mine[4]["ref_logprob"] == pytest.approx(theirs[4]["ref_logprob"], abs=1e-6)
        if mine[2]:
            inside.reset(), outside.reset()


@pytest.mark.parametrize("mode", MODES)
def test_the_penalty_of_the_vector_wrapper_is_that_of_the_env(mode):
    task = Copy()
    inside = textrl.TextVectorEnv(task, 2, reference=tiny(task), kl_coef=0.3, autoreset_mode=mode)
    outside = VectorKLPenalty(textrl.TextVectorEnv(task, 2, autoreset_mode=mode), tiny(task), 0.3)
    inside.reset(seed=0), outside.reset(seed=0)
    for actions in np.random.default_rng(0).integers(4, size=(120, 2)):
        mine, theirs = outside.step(actions), inside.step(actions)
        np.testing.assert_allclose(mine[1], theirs[1], atol=1e-6)
        assert mine[4].keys() == theirs[4].keys()
        for one, other in ((mine[4], theirs[4]), (mine[4].get("final_info", {}), theirs[4].get("final_info", {}))):
            assert one.keys() == other.keys()
            if "ref_logprob" in one:
                np.testing.assert_array_equal(one["_ref_logprob"], other["_ref_logprob"])
                np.testing.assert_allclose(one["ref_logprob"], other["ref_logprob"], atol=1e-6)
        if mode == AutoresetMode.DISABLED and mine[2].any():
            inside.reset(options={"reset_mask": mine[2]}), outside.reset(options={"reset_mask": mine[2]})


def test_the_penalty_follows_a_restored_episode():
    task = Copy()
    inside = textrl.TextEnv(task, reference=tiny(task), kl_coef=0.3)
    outside = KLPenalty(textrl.TextEnv(task), tiny(task), 0.3)
    for env in (inside, outside):
        env.reset(seed=0)
        start = env.unwrapped.snapshot()
        env.step(1), env.step(2)
        env.unwrapped.restore(start)
    assert outside.step(3)[1] == pytest.approx(inside.step(3)[1], abs=1e-6)


def test_the_penalty_reads_tokens_whatever_the_observations_are():
    task = Copy()
    one = KLPenalty(OneHotObservation(textrl.TextEnv(task)), tiny(task), 0.3)
    many = VectorKLPenalty(VectorOneHotObservation(textrl.TextVectorEnv(task, 2)), tiny(task), 0.3)
    inside = textrl.TextEnv(task, reference=tiny(task), kl_coef=0.3)
    for env in (one, many, inside):
        env.reset(options={"prompt": "abc"})
    for action in (2, 1, 0):
        expected = pytest.approx(inside.step(action)[1], abs=1e-6)
        assert one.step(action)[1] == expected
        assert many.step(np.array([action, action]))[1].tolist() == [expected, expected]


def test_gymnasiums_wrappers():
    env = RecordEpisodeStatistics(gym.make("textrl/Copy-v0"))
    env.reset(seed=0, options={"prompt": "abc"})
    for action in (1, 2, 3):
        env.step(action)
    info = env.step(0)[4]
    assert info["episode"]["r"] == 1.0 and info["episode"]["l"] == 4
    env = TransformReward(gym.make("textrl/Copy-v0"), lambda reward: 10 * reward)
    env.reset(options={"prompt": "abc"})
    assert env.step(0)[1] == 0.0
    env.reset(options={"prompt": "abc"})
    env.step(1)
    assert env.step(0)[1] == 2.5
    env = TimeLimit(gym.make("textrl/Copy-v0"), 2)
    env.reset()
    env.step(1)
    assert env.step(1)[2:4] == (False, True)
    env = NormalizeReward(gym.make("textrl/Copy-v0"))
    env.reset(seed=0)
    assert np.isfinite(env.step(0)[1])


def test_gymnasiums_vector_wrappers():
    envs = vector_wrappers.RecordEpisodeStatistics(gym.make_vec("textrl/Copy-v0", num_envs=3))
    envs.reset(seed=0)
    for _ in range(4):
        _, rewards, terminated, _, infos = envs.step(np.array([1, 1, 1]))
    assert terminated.all()
    np.testing.assert_allclose(infos["episode"]["r"], rewards)
    assert infos["episode"]["l"].tolist() == [4, 4, 4]
    envs = vector_wrappers.NormalizeReward(
        vector_wrappers.TransformReward(gym.make_vec("textrl/Copy-v0", num_envs=3), lambda reward: reward + 1)
    )
    envs.reset(seed=0)
    assert np.isfinite(envs.step(np.array([1, 0, 1]))[1]).all()


def test_record_video(tmp_path):
    pytest.importorskip("moviepy", reason="RecordVideo needs moviepy")
    env = RecordVideo(gym.make("textrl/Copy-v0", render_mode="rgb_array"), str(tmp_path), disable_logger=True)
    env.reset(seed=0)
    while not env.step(1)[2]:
        pass
    env.close()
    assert [path.suffix for path in tmp_path.iterdir()] and any(path.suffix == ".mp4" for path in tmp_path.iterdir())


def test_a_wrapped_env_is_stepped_by_agents():
    from textrl.agents import REINFORCE

    env = TransformReward(gym.make("textrl/Vowels-v0"), lambda reward: -reward)
    agent = REINFORCE(env, batch_size=32, seed=0)
    before = np.mean([agent.collect().rewards.sum(1).mean().item() for _ in range(2)])
    assert before < 0  # the wrapper's sign, not the task's
    agent.learn(6_000)
    assert agent.collect().rewards.sum(1).mean().item() > before


def wrapped(kind, task, **options):
    """An environment with a wrapper that pays the negative of what is paid inside."""
    if kind == "single":
        return TransformReward(textrl.TextEnv(task, **options), lambda reward: -reward)
    if kind == "sync":
        return vector_wrappers.TransformReward(
            SyncVectorEnv([lambda: textrl.TextEnv(task, **options)] * 3), lambda reward: -reward
        )
    return vector_wrappers.TransformReward(
        textrl.TextVectorEnv(task, 3, autoreset_mode=kind, **options), lambda reward: -reward
    )


@pytest.mark.parametrize("kind", ["single", "sync", *MODES])
def test_groups_of_a_prompt_are_stepped_where_an_environment_is_wrapped(kind):
    from textrl.agents import GRPO, BestOfN, ReST

    task = Copy(length=1)
    env = wrapped(kind, task)
    grouped = GRPO(env, batch_size=6, group_size=4).collect()
    assert len(grouped) == 8 and grouped.group_size == 4 and grouped.grouping == 4
    for first in (0, 4):
        assert len({row["prompt"] for row in grouped.rows[first : first + 4]}) == 1
        assert len({tuple(each.tolist()) for each in grouped.tokens[first : first + 4, :2]}) == 1
    assert len(ReST(env, batch_size=4, grow_batches=1, group_size=4).collect()) == 4
    best = BestOfN(env, batch_size=5, n=16).collect()  # the least of what the task pays is the most of what is paid
    assert len(best) == 5 and best.rewards.sum(1).mean() > -0.4 and best.group_size == 1
    agent = GRPO(env, batch_size=32, group_size=4, learning_rate=3e-3)
    before = agent.respond(task.rows * 20).scores.mean()
    agent.learn(3_000)
    assert agent.respond(task.rows * 20).scores.mean() < before - 0.1  # the wrapper's sign


def test_groups_keep_their_places_where_scores_fail():
    from textrl.agents import GRPO

    def score(prompts, completions):
        return [float("nan") if text.startswith("b") else 1.0 for text in completions]

    tokenizer = textrl.symbol_tokenizer("ab")
    env = TimeLimit(textrl.TextEnv(Text(tokenizer=tokenizer, prompts=["a", "b"], reward=score, max_new_tokens=2)), 5)
    agent = GRPO(env, batch_size=32, group_size=8, on_score_error="drop", max_dropped_share=1.0)
    rollout = agent.collect()
    assert 0 < len(rollout.dropped) == 32 - len(rollout)
    for group in range(4):
        assert (
            len({row["prompt"] for row, i in zip(rollout.rows, rollout.groups.tolist(), strict=True) if i == group}) < 2
        )
    assert np.isfinite(agent.update(rollout)["policy_loss"])


def test_a_wrapper_that_keeps_options_to_itself_is_named():
    from textrl.agents import GRPO

    class Deaf(gym.Wrapper):
        def reset(self, *, seed=None, options=None):
            return self.env.reset(seed=seed)

    agent = GRPO(Deaf(textrl.TextEnv(Copy(length=3))), batch_size=8, group_size=8)
    with pytest.raises(ValueError, match=r'env must hand options=.*"row".* on to the environment inside; got <Deaf'):
        agent.collect()


def test_sb3_vec_env_is_the_vector_env():
    from textrl.sb3 import TextVecEnv

    envs = textrl.TextVectorEnv(Brackets(), 3, autoreset_mode="SAME_STEP")
    twin = textrl.TextVectorEnv(Brackets(), 3, autoreset_mode="SAME_STEP")
    adapter = TextVecEnv(envs)
    adapter.seed(5)
    np.testing.assert_array_equal(adapter.reset(), twin.reset(seed=5)[0])
    for actions in np.random.default_rng(0).integers(5, size=(40, 3)):
        observations, rewards, ended, infos = adapter.step(actions)
        same, paid, terminated, _, theirs = twin.step(actions)
        np.testing.assert_array_equal(observations, same)
        np.testing.assert_allclose(rewards, paid)
        assert ended.tolist() == terminated.tolist() and len(infos) == 3
        for i in np.flatnonzero(ended):
            np.testing.assert_array_equal(infos[i]["terminal_observation"], theirs["final_obs"][i])
            assert infos[i]["score"] == theirs["final_info"]["score"][i]
            assert "action_mask" not in infos[i]  # it is of the next episode, which begins with
            np.testing.assert_array_equal(adapter.reset_infos[i]["action_mask"], theirs["action_mask"][i])
    assert np.stack(adapter.env_method("action_masks")).shape == (3, 5)
    with pytest.raises(ValueError, match="SAME_STEP"):
        TextVecEnv(textrl.TextVectorEnv(Copy(), 2))


def test_sb3_vec_env_tells_a_time_limit_from_an_end():
    from textrl.sb3 import TextVecEnv

    adapter = TextVecEnv(textrl.TextVectorEnv(Copy(), 2, autoreset_mode="SAME_STEP", max_episode_steps=1))
    adapter.reset()
    _, _, ended, infos = adapter.step(np.array([1, 0]))
    assert ended.tolist() == [True, True]
    assert [info["TimeLimit.truncated"] for info in infos] == [True, False]
    assert ["score" in info for info in infos] == [False, True]
    assert all(info["terminal_observation"].shape == adapter.observation_space.shape for info in infos)


def test_sb3_vec_env_takes_wrapped_environments_and_options():
    from textrl.sb3 import TextVecEnv

    inner = textrl.TextVectorEnv(Copy(), 2, autoreset_mode="SAME_STEP")
    adapter = TextVecEnv(gym.wrappers.vector.RecordEpisodeStatistics(inner))
    adapter.set_options({"prompt": "ab"})
    assert adapter.reset()[:, :3].tolist() == [[0, 1, 2]] * 2
    adapter.step(np.array([1, 1]))
    _, _, ended, infos = adapter.step(np.array([0, 2]))
    assert ended.tolist() == [True, False] and "episode" not in infos[1] and "episode" not in adapter.reset_infos[0]
    assert infos[0]["episode"]["l"] == 2 and infos[0]["episode"]["r"] == infos[0]["score"]
    adapter.set_options([{"prompt": "ab"}, {"prompt": "ba"}])
    with pytest.raises(ValueError, match="options must be the same for every row"):
        adapter.reset()


def test_sb3_vec_env_sets_attributes_of_all_rows_or_none():
    from textrl.sb3 import TextVecEnv

    reference = tiny(Copy())
    adapter = TextVecEnv(textrl.TextVectorEnv(Copy(), 2, reference=reference, kl_coef=0.1, autoreset_mode="SAME_STEP"))
    with pytest.raises(ValueError, match=r"indices must be None or all 2 rows: they are one environment; got \[1\]"):
        adapter.set_attr("kl_coef", 0.7, indices=[1])
    adapter.set_attr("kl_coef", 0.7, indices=[0, 1])
    assert adapter.get_attr("kl_coef") == [0.7, 0.7]


def test_sb3_policy_refuses_observations_that_are_no_texts():
    from stable_baselines3 import A2C
    from stable_baselines3.common.vec_env import DummyVecEnv, VecFrameStack, VecNormalize

    from textrl.sb3 import CausalLMPolicy

    def learn(env, steps=4):
        kwargs = {"model": small_model(4, 32)}
        A2C(CausalLMPolicy, env, n_steps=4, policy_kwargs=kwargs, device="cpu").learn(steps)

    with pytest.raises(ValueError, match="observation_space must be of a textrl environment, token ids below 4 and 4"):
        learn(gym.wrappers.TimeAwareObservation(TimeLimit(textrl.TextEnv(Copy()), 6)))
    for kind in (lambda env: VecFrameStack(env, 2), VecNormalize):
        with pytest.raises(ValueError, match="observation must be token ids from the left, and 4 where nothing is"):
            learn(kind(DummyVecEnv([lambda: textrl.TextEnv(Copy())])))


def test_sb3_policy_has_the_log_probabilities_of_the_model(tmp_path):
    from stable_baselines3 import PPO

    from textrl.sb3 import CausalLMPolicy, TextVecEnv

    task = Copy()
    model = tiny(task)
    envs = TextVecEnv(textrl.TextVectorEnv(task, 4, autoreset_mode="SAME_STEP"))
    kwargs = {"model": model, "temperature": 0.7}
    agent = PPO(CausalLMPolicy, envs, n_steps=8, batch_size=16, policy_kwargs=kwargs, seed=0, device="cpu")
    observations = np.array([[0, 1, 2, 3, 4, 4, 4, 4], [0, 1, 2, 3, 3, 1, 4, 4]])  # two lengths in one batch
    actions = torch.tensor([2, 0])
    values, logprobs, entropies = agent.policy.evaluate_actions(torch.from_numpy(observations), actions)
    for i, row in enumerate(observations):
        logits = model(torch.from_numpy(row[row != 4])[None]).logits[0, -1] / 0.7
        expected = logits.log_softmax(-1)
        assert logprobs[i].item() == pytest.approx(expected[actions[i]].item(), abs=1e-5)
        assert entropies[i].item() == pytest.approx(-(expected.exp() * expected).sum().item(), abs=1e-5)
    assert values.tolist() == [[0.0], [0.0]]
    before = [p.clone() for p in model.parameters()]
    agent.learn(64)
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    agent.save(tmp_path / "agent")
    again = PPO.load(tmp_path / "agent", device="cpu")
    for a, b in zip(agent.policy.parameters(), again.policy.parameters(), strict=True):
        torch.testing.assert_close(a, b)


# ---- agents in environments that are stepped ---------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_episodes_that_a_time_limit_cuts_off_keep_their_text_and_their_rewards(mode):
    envs = gym.make_vec("textrl/Increasing-v0", num_envs=8, max_episode_steps=2, autoreset_mode=mode)
    rollout = textrl.Agent(envs, batch_size=32, device="cpu").collect()
    assert rollout.truncated.tolist() == (~rollout.stopped).tolist()
    assert 0 < rollout.truncated.sum() < 32
    torch.testing.assert_close(rollout.scores, rollout.rewards.sum(1))
    assert rollout.completions == Increasing().decode(
        [ids[:n] for ids, n in zip(rollout.responses.tolist(), rollout.response_lengths.tolist(), strict=True)]
    )
    assert {row["prompt"] for row in rollout.rows} == {""}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("vector", ["native", "sync"])
def test_the_columns_of_the_rows_come_along_where_an_environment_is_stepped(vector, mode):
    rows = [{"prompt": text, "same": text} for text in "abcd"]
    task = Text(
        prompts=rows, max_new_tokens=3, reward=lambda completions, same, **_: [float(ord(text)) for text in same]
    )
    if vector == "native":
        envs = textrl.TextVectorEnv(task, 3, autoreset_mode=mode, max_episode_steps=2)
    else:
        envs = SyncVectorEnv([lambda: textrl.TextEnv(task)] * 3, autoreset_mode=mode)
    rollout = textrl.Agent(vector_wrappers.RecordEpisodeStatistics(envs), batch_size=24, device="cpu").collect()
    prompts = [row[:n].tolist() for row, n in zip(rollout.tokens, rollout.prompt_lengths, strict=True)]
    assert [task.encode(row).tolist() for row in rollout.rows] == prompts
    assert {row["same"] for row in rollout.rows} == set("abcd")


@pytest.mark.parametrize("critic", ["separate", "shared"])
def test_a_time_limit_is_no_end(critic):
    """What a cut-off episode would have gone on to is worth what the critic says of the state it was left in."""
    env = gym.wrappers.TimeLimit(textrl.TextEnv(Copy()), 2)
    agent = PPO(env, critic=critic, batch_size=16, device="cpu", learning_rate=1e-2)
    agent.learn(200)
    rollout = agent.collect()
    cut = rollout.truncated.nonzero()[:, 0].tolist()
    assert 0 < len(cut) < 16
    found, _ = with_advantages(rollout, agent.value, 1000, 0.9, 0.8, False)
    values = state_values(agent)
    for i in range(16):
        n, start = int(rollout.response_lengths[i]), int(rollout.prompt_lengths[i])
        states = np.full((n + 1, 8), 4)
        for t in range(n + 1):
            states[t, : start + t] = rollout.tokens[i, : start + t]
        v, advantage = values(states), 0.0
        for t in reversed(range(n)):
            after = v[t + 1] if t + 1 < n or i in cut else 0.0
            delta = float(rollout.rewards[i, t]) + 0.9 * after - v[t]
            advantage = delta + 0.9 * 0.8 * advantage
            assert float(found.advantages[i, t]) == pytest.approx(advantage, abs=1e-5)


def test_the_score_of_what_a_time_limit_cuts_off_is_without_the_penalty():
    for make in (
        lambda: gym.wrappers.TimeLimit(textrl.TextEnv(Copy(), reference=tiny(Copy(), 3), kl_coef=0.5), 2),
        lambda: gym.make_vec(
            "textrl/Copy-v0", num_envs=4, vectorization_mode="sync", reference=tiny(Copy(), 3), kl_coef=0.5,
            wrappers=[lambda env: gym.wrappers.TimeLimit(env, 2)],
        ),
    ):  # fmt: skip
        rollout = textrl.Agent(make(), batch_size=16, device="cpu").collect()
        assert 0 < rollout.truncated.sum() < 16
        assert rollout.scores[rollout.truncated].abs().max() < 1e-5  # a task pays at the end
        assert rollout.rewards.sum(1)[rollout.truncated].abs().max() > 1e-3


def test_a_learned_baseline_counts_what_a_cut_off_episode_would_have_gone_on_to():
    env = gym.wrappers.TimeLimit(textrl.TextEnv(Copy()), 2)
    agent = REINFORCE(env, baseline="value", batch_size=16, device="cpu", learning_rate=1e-2).learn(200)
    rollout, seen = agent.collect(), []
    agent.minimise = lambda loss, batch: seen.append(batch) or {"loss": 0.0}
    agent.update(rollout)
    values = state_values(agent)
    for i in rollout.truncated.nonzero()[:, 0].tolist():
        left = np.full((1, 8), 4)
        left[0, : int(rollout.prompt_lengths[i]) + 2] = rollout.tokens[i, : int(rollout.prompt_lengths[i]) + 2]
        assert values(left)[0] != 0
        assert float(seen[0].returns[i, 1]) == pytest.approx(float(rollout.rewards[i, 1]) + values(left)[0], abs=1e-5)


def test_a_sync_vector_env_of_a_task_with_masks_is_stepped_inside_them():
    envs = gym.make_vec("textrl/Brackets-v0", num_envs=3, vectorization_mode="sync")
    rollout = REINFORCE(envs, batch_size=12, device="cpu").collect()
    task, rows = Brackets(), [{"prompt": row["prompt"]} for row in rollout.rows]
    assert len({row["prompt"] for row in rows}) > 1
    for t in range(rollout.allowed.shape[1]):
        written = np.where(np.arange(6) < t, np.pad(rollout.responses.numpy(), ((0, 0), (0, 6)))[:, :6], 5)
        here = rollout.action_mask[:, t].numpy()
        expected = task.masks([row for row, on in zip(rows, here, strict=True) if on], written[here])
        np.testing.assert_array_equal(rollout.allowed[:, t].numpy()[here], expected)


@pytest.mark.parametrize("kind", ["masks", "own masks", "both"])
@pytest.mark.parametrize("many", [False, *MODES])
@pytest.mark.parametrize("paid_by", ["base", "wrapper"])
def test_the_penalty_of_a_wrapped_environment_is_that_of_the_policy_inside_its_masks(kind, many, paid_by):
    task = Copy() if kind == "own masks" else Brackets()
    paid = {"reference": tiny(task, 2), "kl_coef": 0.5}
    own, around = (paid, {}) if paid_by == "base" else ({}, paid)
    base = textrl.TextVectorEnv(task, 4, autoreset_mode=many, **own) if many else textrl.TextEnv(task, **own)
    env = vector_wrappers.RecordEpisodeStatistics(base) if many else RecordEpisodeStatistics(base)
    if around:
        env = VectorKLPenalty(env, **around) if many else KLPenalty(env, **around)
    own = {"top_p": 0.6} if kind != "masks" else {}
    agent = (NLPO if own else REINFORCE)(env, tiny(task, 5), batch_size=16, device="cpu", **own)
    rollout = agent.collect()
    assert rollout.allowed is not None and not rollout.allowed.all()
    kl = 0.5 * (rollout.logprobs - rollout.ref_logprobs).sum(1)
    torch.testing.assert_close(rollout.rewards.sum(1), rollout.scores - kl, atol=1e-4, rtol=0)
    assert base.policy is None


def test_the_penalty_is_whole_wherever_it_is_paid():
    reference, model = tiny(Copy()), tiny(Copy(), seed=2)
    settings = {"reference": reference, "kl_coef": 0.5}
    given = [
        SyncVectorEnv([lambda: KLPenalty(gym.make("textrl/Copy-v0"), **settings)] * 4),
        VectorKLPenalty(gym.make_vec("textrl/Copy-v0", num_envs=4), **settings),
        gym.make_vec("textrl/Copy-v0", num_envs=4, vectorization_mode="sync", **settings),
        gym.make_vec("textrl/Copy-v0", num_envs=4, **settings),
    ]
    rewards = []
    for env in given:
        rollout = textrl.Agent(env, copy.deepcopy(model), batch_size=16, device="cpu").collect()
        kl = 0.5 * (rollout.logprobs - rollout.ref_logprobs).sum(1)
        torch.testing.assert_close(rollout.rewards.sum(1), rollout.scores - kl, atol=1e-5, rtol=0)
        rewards.append(rollout.rewards.sum())
    torch.testing.assert_close(rewards[0], rewards[1])
    with pytest.raises(ValueError, match="kl_target must be None for a SyncVectorEnv"):
        PPO(given[2], copy.deepcopy(model), kl_target=1.0, device="cpu")


def test_agents_go_by_the_penalty_that_a_wrapper_pays():
    reference, updated = tiny(Copy()), {}
    for paid_by in ("base", "wrapper"):
        settings = {"reference": reference, "kl_coef": 0.5}
        own, around = (settings, {}) if paid_by == "base" else ({}, settings)
        env = RecordEpisodeStatistics(textrl.TextEnv(Copy(), **own))
        env = KLPenalty(env, **around) if around else env
        for cls in (GRPO, ReST, REINFORCE):
            agent = cls(env, tiny(Copy(), 2), batch_size=32, learning_rate=1e-3, device="cpu")
            agent.learn(60)
            updated.setdefault(cls, []).append(agent.model.transformer.wte.weight)
    for cls, (inside, outside) in updated.items():
        torch.testing.assert_close(inside, outside, atol=1e-5, rtol=0, msg=cls.__name__)
    rows = [{"prompt": "abc", "completion": "abc", "chosen": "abc", "rejected": "b"}] * 4
    for cls in (BPO, DPO):
        with pytest.raises(ValueError, match="and no wrapper that pays a KL penalty"):
            cls(env, dataset=rows, device="cpu")


class Reversed(gym.vector.VectorObservationWrapper):
    """Shows the text of every row but the first step's in another order."""

    def observations(self, observations):
        return observations if (observations == 4).sum() >= 8 else np.sort(observations, axis=1)


CHANGED = {
    "other": lambda: gym.wrappers.TransformAction(textrl.TextEnv(Copy()), lambda a: (a + 1) % 4, None),
    "the last": lambda: gym.wrappers.TransformAction(textrl.TextEnv(Copy(length=1)), lambda a: (a + 1) % 4, None),
    "twice": lambda: gym.wrappers.RepeatAction(textrl.TextEnv(Copy()), 2),
    "twice, the best of both": lambda: gym.wrappers.MaxAndSkipObservation(textrl.TextEnv(Copy()), 2),
    **{
        f"vector, {mode.name}": lambda mode=mode: vector_wrappers.TransformAction(
            textrl.TextVectorEnv(Copy(length=1), 3, autoreset_mode=mode), lambda a: (a + 1) % 4, None
        )
        for mode in AutoresetMode
    },
    "shown otherwise": lambda: Reversed(textrl.TextVectorEnv(Copy(), 2)),
}


@pytest.mark.parametrize("kind", CHANGED)
def test_a_wrapper_that_changes_actions_is_refused(kind):
    with pytest.raises(ValueError, match=r"env must take the tokens that it is given, .* took \[.*\] in place of ."):
        REINFORCE(CHANGED[kind](), batch_size=8, device="cpu").collect()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda env: gym.wrappers.TransformObservation(env, lambda o: o[::-1].copy(), None),
            "token ids from 0 to 3, from",
        ),
        (
            lambda env: gym.wrappers.TransformObservation(env, lambda o: o + 1, None),
            "token ids from 0 to 3, from the left",
        ),
        (
            lambda env: gym.wrappers.DtypeObservation(env, np.float32),
            r"integer token ids .* got shape \(8,\), dtype float32",
        ),
    ],
)
def test_observations_that_are_no_texts_are_refused(change, message):
    with pytest.raises(ValueError, match=f"observation must be {message}"):
        REINFORCE(change(textrl.TextEnv(Copy())), batch_size=8, device="cpu").collect()


def test_observations_may_be_smaller_numbers():
    env = gym.wrappers.DtypeObservation(textrl.TextEnv(Copy()), np.uint8)
    plain = RecordEpisodeStatistics(textrl.TextEnv(Copy()))
    small, same = (PPO(each, batch_size=8, device="cpu", seed=1).collect() for each in (env, plain))
    assert small.tokens.tolist() == same.tokens.tolist()


class Silent(gym.Wrapper):
    """Hands no info on."""

    def step(self, action):
        return *self.env.step(action)[:4], {}


def test_a_wrapper_that_keeps_the_info_is_refused_where_the_score_would_be_missed():
    reference = tiny(Copy())
    with pytest.raises(
        ValueError, match="info must be handed on by every wrapper: it has the score of an episode that"
    ):
        GRPO(Silent(textrl.TextEnv(Copy(), reference=reference, kl_coef=0.5)), batch_size=8, device="cpu").collect()
    envs = vector_wrappers.DictInfoToList(textrl.TextVectorEnv(Copy(), 2))
    with pytest.raises(ValueError, match="infos must be a dict of columns"):
        REINFORCE(envs, batch_size=8, device="cpu").collect()


def test_the_parts_of_a_sync_vector_env_must_be_alike():
    reference = tiny(Copy())

    def parts(**second):
        settings = {"reference": reference, "kl_coef": 0.1}
        first, other = settings, {**settings, **second}
        return SyncVectorEnv([lambda: textrl.TextEnv(Copy(), **first), lambda: textrl.TextEnv(Copy(), **other)])

    assert REINFORCE(parts(), batch_size=4, device="cpu").collect().ref_logprobs is not None
    with pytest.raises(ValueError, match=r"env must be one whose parts have the same kl_coef; .* with \[0.1, 1.0\]"):
        REINFORCE(parts(kl_coef=1.0), batch_size=4, device="cpu").collect()
    with pytest.raises(ValueError, match=r"env must be one whose parts have the same vocabulary and temperature"):
        REINFORCE(parts(temperature=0.5), batch_size=4, device="cpu")


def test_an_agent_leaves_its_policy_with_nobody():
    env = RecordEpisodeStatistics(textrl.TextEnv(Copy(), reference=tiny(Copy()), kl_coef=0.5))

    def first():
        env.reset(seed=0)
        return env.step(1)[1]

    before = first()
    rollout = REINFORCE(env, batch_size=8, device="cpu").learn(20).collect()
    kl = 0.5 * (rollout.logprobs - rollout.ref_logprobs).sum(1)
    torch.testing.assert_close(rollout.rewards.sum(1), rollout.scores - kl, atol=1e-5, rtol=0)
    assert env.unwrapped.policy is None and first() == before


def test_pictures_are_collected_as_gymnasiums_are():
    env = gym.make("textrl/Copy-v0", render_mode="ansi_list")
    env.reset(seed=0)
    env.step(1)
    assert len(env.render()) == 2


def test_a_penalty_is_not_paid_twice():
    settings = {"reference": tiny(Copy()), "kl_coef": 0.5}
    for make, wrapper in ((gym.make, KLPenalty), (lambda id, **k: gym.make_vec(id, num_envs=2, **k), VectorKLPenalty)):
        with pytest.raises(ValueError, match=r"env must be one without a penalty of its own; got one with kl_coef=0.5"):
            wrapper(make("textrl/Copy-v0", **settings), **settings)


def test_agents_take_an_environment_whose_info_has_numbers_only():
    rollout = REINFORCE(NumericInfo(textrl.TextEnv(Copy())), batch_size=8, device="cpu").collect()
    assert rollout.scores.tolist() == rollout.rewards.sum(1).tolist()
    assert {len(row["prompt"]) for row in rollout.rows} == {3}
    assert [len(text) for text in rollout.completions] == (rollout.response_lengths - rollout.stopped.long()).tolist()


@pytest.mark.parametrize("scale", [0.01, 10.0])
def test_what_a_wrapper_pays_is_what_ppo_shapes(scale):
    env = TransformReward(textrl.TextEnv(Increasing()), lambda reward: scale * reward)
    agent = PPO(env, tiny(Increasing()), batch_size=32, clip_score=0.05)
    rollout = agent.collect()
    returns = agent._shaped(rollout).rewards.sum(1)
    torch.testing.assert_close(returns, (scale * rollout.scores).clamp(-0.05, 0.05), atol=1e-5, rtol=1e-5)


def test_the_score_is_not_weighed_where_a_wrapper_changes_rewards():
    task = Increasing()
    plain = textrl.TextEnv(task, reference=tiny(task, 2), kl_coef=0.2)
    for env, weighed in (
        (TransformReward(plain, lambda reward: 2 * reward), False),
        (RecordEpisodeStatistics(plain), True),
        (plain, True),
    ):
        agent = REINFORCE(env, tiny(task), batch_size=16)
        rollout = agent.collect()
        agent.score_weight.value = 0.1
        found = agent.tempered(rollout).rewards.sum(1)
        penalty = -0.2 * (rollout.logprobs - rollout.ref_logprobs).sum(1)
        right = 0.1 * rollout.scores + penalty if weighed else 2 * (rollout.scores + penalty)
        torch.testing.assert_close(found, right, atol=1e-5, rtol=1e-5)


def test_a_step_that_only_resets_pays_no_penalty():
    task = Copy(symbols="ab", length=1)
    env = KLPenalty(gym.wrappers.Autoreset(textrl.TextEnv(task)), tiny(task), 0.5)
    env.reset(seed=0)
    _, reward, terminated, _, info = env.step(0)
    assert terminated and "ref_logprob" in info
    _, reward, _, _, info = env.step(0)
    assert reward == 0 and "ref_logprob" not in info
    assert "ref_logprob" in env.step(1)[4]


def test_a_penalty_above_a_wrapper_that_changes_actions_is_refused():
    task = Copy(symbols="ab", length=2)
    inner = textrl.TextEnv(task)
    env = KLPenalty(gym.wrappers.TransformAction(inner, lambda action: 2, inner.action_space), tiny(task), 0.5)
    env.reset(seed=0)
    with pytest.raises(ValueError, match=r"must take the tokens that it is given.*took \[2\] in place of 1"):
        env.step(1)


def test_a_penalty_above_a_wrapper_that_plays_a_token_twice_is_refused():
    task = Copy(symbols="ab", length=2)
    env = KLPenalty(gym.wrappers.RepeatAction(textrl.TextEnv(task), 2), tiny(task), 0.5)
    env.reset(seed=0)
    with pytest.raises(ValueError, match=r"must take the tokens that it is given.*took \[1, 1\] in place of 1"):
        env.step(1)


@pytest.mark.parametrize("mode", AutoresetMode)
def test_a_vector_penalty_sees_the_last_action_of_an_episode(mode):
    task = Copy(symbols="ab", length=1)
    inner = textrl.TextVectorEnv(task, 2, autoreset_mode=mode)
    changed = vector_wrappers.TransformAction(inner, lambda actions: np.full(2, 2), action_space=inner.action_space)
    for given, fine in (([2, 2], True), ([2, 1], False)):
        envs = VectorKLPenalty(changed, tiny(task), 0.5)
        envs.reset(seed=0)
        if fine:
            envs.step(np.array(given))
            continue
        with pytest.raises(ValueError, match=r"must take the tokens that it is given.*took \[2\] in place of 1"):
            envs.step(np.array(given))


def test_the_score_is_weighed_as_before_where_ppo_shapes_it():
    task = Increasing()
    env = RecordEpisodeStatistics(textrl.TextEnv(task, reference=tiny(task, 2), kl_coef=0.2))
    agent = PPO(env, tiny(task), batch_size=16, missing_end_penalty=0.5, learning_rate=1e-3)
    rollout = agent.collect()
    assert not agent.paid_otherwise
    agent.score_weight.value = 0.1
    shaped = agent._shaped(rollout)
    penalty = -0.2 * (rollout.logprobs - rollout.ref_logprobs).sum(1)
    right = 0.1 * (rollout.scores - 0.5 * ~rollout.stopped) + penalty
    torch.testing.assert_close(agent.tempered(shaped).rewards.sum(1), right, atol=1e-5, rtol=1e-5)


def test_a_vector_penalty_asks_nothing_of_rows_that_reset_and_refuses_changed_actions():
    task = Copy(symbols="ab", length=1)
    envs = VectorKLPenalty(textrl.TextVectorEnv(task, 2), tiny(task), 0.5)
    envs.reset(seed=0)
    assert envs.step(np.array([0, 1]))[2].tolist() == [True, False]
    rewards = envs.step(np.array([-1, 1]))[1]
    assert rewards[0] == 0 and rewards[1] != 0
    inner = textrl.TextVectorEnv(task, 2)
    changed = vector_wrappers.TransformAction(inner, lambda actions: np.full(2, 2), action_space=inner.action_space)
    envs = VectorKLPenalty(changed, tiny(task), 0.5)
    envs.reset(seed=0)
    with pytest.raises(ValueError, match=r"must take the tokens that it is given.*took \[2\] in place of 1"):
        envs.step(np.array([1, 1]))


class OwnMasks(gym.Wrapper):
    """Forbids one more token than the task does."""

    def action_masks(self):
        mask = self.unwrapped.action_masks().copy()
        if mask.sum() > 1:
            mask[np.flatnonzero(mask)[0]] = False
        return mask


def test_the_penalty_is_that_of_the_masks_that_a_wrapper_has():
    env = OwnMasks(textrl.TextEnv(Brackets(), reference=tiny(Brackets(), 2), kl_coef=0.5))
    agent = REINFORCE(env, tiny(Brackets()), batch_size=16, device="cpu")
    rollout = agent.collect()
    assert not agent.paid_otherwise
    paid = rollout.scores - 0.5 * rollout.log_ratios.sum(1)
    torch.testing.assert_close(rollout.rewards.sum(1), paid, atol=1e-5, rtol=1e-5)


def test_a_penalty_has_the_temperature_at_which_tokens_are_drawn_and_one_reference():
    task = Copy()
    hot, reference = textrl.TextEnv(task, temperature=0.5), tiny(task)
    assert KLPenalty(hot, reference, 0.1).temperature == 0.5
    assert VectorKLPenalty(textrl.TextVectorEnv(task, 2, temperature=0.5), reference, 0.1).temperature == 0.5
    with pytest.raises(ValueError, match=r"temperature must be 0.5, the environment's, at which tokens are drawn"):
        KLPenalty(hot, reference, 0.1, temperature=1.0)
    with pytest.raises(ValueError, match="env must be one without a penalty to another reference"):
        KLPenalty(KLPenalty(hot, reference, 0.1), tiny(task, 2), 0.1)


def test_below_float32_a_stepped_collection_is_read_again_as_a_whole():
    reference = tiny(Copy(), 2)
    env = RecordEpisodeStatistics(textrl.TextEnv(Copy(), reference=reference, kl_coef=0.5))
    agent = REINFORCE(env, tiny(Copy()), batch_size=16, device="cpu", dtype="bfloat16")
    rollout = agent.collect()
    assert 0 < rollout.drift < 0.05 and not agent.paid_otherwise
    with torch.no_grad():
        torch.testing.assert_close(agent.logprobs(rollout), rollout.logprobs, atol=1e-5, rtol=0)
    paid = rollout.scores - 0.5 * rollout.log_ratios.sum(1)
    torch.testing.assert_close(rollout.rewards.sum(1), paid, atol=1e-5, rtol=1e-5)


class Told(gym.Wrapper):
    """Forbids what was said last, and notes that before the environment knows."""

    said = -1

    def reset(self, **arguments):
        self.said = -1
        return self.env.reset(**arguments)

    def step(self, action):
        self.said = int(action)
        return self.env.step(action)

    def action_masks(self):
        mask = self.unwrapped.action_masks().copy()
        if self.said > 0 and mask.sum() > 1:
            mask[self.said] = False
        return mask if mask.any() else self.unwrapped.action_masks()


def test_the_penalty_is_that_of_the_masks_that_held_when_a_token_was_drawn():
    env = Told(textrl.TextEnv(Brackets(), reference=tiny(Brackets(), 2), kl_coef=0.5))
    agent = REINFORCE(env, tiny(Brackets()), batch_size=16, device="cpu")
    rollout = agent.collect()
    assert not agent.paid_otherwise and rollout.rewards.isfinite().all()


@pytest.mark.parametrize("wrapper", [RecordEpisodeStatistics, lambda env: TransformReward(env, lambda r: 3 * r)])
def test_below_float32_equal_models_have_no_kl_in_a_stepped_collection(wrapper):
    env = wrapper(textrl.TextEnv(Copy(), reference=tiny(Copy()), kl_coef=0.5))
    agent = REINFORCE(env, tiny(Copy()), batch_size=16, device="cpu", dtype="bfloat16")
    env.unwrapped.reference.to(torch.bfloat16)
    assert float(agent.collect().log_ratios.abs().max()) == 0
