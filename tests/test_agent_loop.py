"""`Agent`: the loop, stepping against sampling, saving, and what a user gets wrong."""

import copy
import csv
from typing import ClassVar

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode
from gymnasium.wrappers import TransformReward
from transformers.utils import logging as hub_logging

import textrl
from textrl.agents import PPO, REINFORCE, BestOfN
from textrl.envs.copy import Copy
from textrl.logging import read_numbers
from textrl.models import small_model
from textrl.returns import masked_mean
from textrl.runs import Due

ID = "textrl/Copy-v0"


class Mean(textrl.Agent):
    """An agent of one's own: one method."""

    def update(self, rollout):
        rollout.advantages = rollout.rewards.sum(1, keepdim=True).expand_as(rollout.rewards) - rollout.scores.mean()

        def loss(batch):
            return masked_mean(-batch.advantages * self.logprobs(batch), batch.action_mask), {}

        return self.minimise(loss, rollout)


class Same(textrl.Agent):
    """Learns nothing, keeps the rollouts."""

    def update(self, rollout):
        self.seen = [*getattr(self, "seen", []), rollout]
        return {}


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(("cls", "total_timesteps"), [(PPO, 20_000), (REINFORCE, 50_000)])
def test_agents_learn_to_copy(cls, total_timesteps, seed):
    env = gym.make_vec(ID, num_envs=1)
    agent = cls(env, seed=seed).learn(total_timesteps)
    assert agent.collect().scores.mean() > 0.95


STEPPED = {
    "single": lambda **k: TransformReward(gym.make(ID, **k), lambda r: r),
    "next_step": lambda **k: gym.wrappers.vector.RecordEpisodeStatistics(gym.make_vec(ID, num_envs=8, **k)),
    "same_step": lambda **k: gym.wrappers.vector.RecordEpisodeStatistics(
        gym.make_vec(ID, num_envs=8, autoreset_mode=AutoresetMode.SAME_STEP, **k)
    ),
    "disabled": lambda **k: gym.wrappers.vector.RecordEpisodeStatistics(
        gym.make_vec(ID, num_envs=8, autoreset_mode=AutoresetMode.DISABLED, **k)
    ),
    "sync": lambda **k: gym.make_vec(ID, num_envs=8, vectorization_mode="sync", **k),
}


@pytest.mark.parametrize("kind", STEPPED)
def test_a_wrapped_env_is_stepped_and_gives_what_sampling_would(kind):
    """Every number of a stepped rollout is that of the model on the same tokens."""
    model, reference = small_model(4, 16, 1), small_model(4, 16, 2)
    env = STEPPED[kind](reference=reference, kl_coef=0.3)
    agent = Same(env, model, batch_size=24)
    rollout = agent.collect()
    assert len(rollout) == 24
    assert len({row["prompt"] for row in rollout.rows}) > 5
    rows, columns, targets = rollout.places()
    logp, ref = (m(input_ids=rollout.tokens).logits.log_softmax(-1)[rows, columns, targets] for m in (model, reference))
    torch.testing.assert_close(rollout.logprobs[rollout.action_mask], logp.detach(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(rollout.ref_logprobs[rollout.action_mask], ref.detach(), atol=1e-5, rtol=1e-4)
    want = rollout.spread((-0.3 * (logp - ref)).detach())
    want.scatter_add_(1, rollout.response_lengths[:, None] - 1, rollout.scores[:, None])
    torch.testing.assert_close(rollout.rewards, want, atol=1e-5, rtol=1e-4)
    completions = agent.task.decode(rollout.responses[i, :n].tolist() for i, n in enumerate(rollout.response_lengths))
    assert rollout.completions == completions


def test_a_wrapper_that_changes_the_reward_changes_what_is_learned_from():
    env = TransformReward(gym.make(ID), lambda r: 10 * r)
    rollout = Same(env, batch_size=32).collect()
    torch.testing.assert_close(rollout.rewards.sum(1), 10 * rollout.scores)
    plain = Same(gym.make(ID), batch_size=32).collect()
    torch.testing.assert_close(plain.rewards.sum(1), plain.scores)


def test_short_episodes_are_not_preferred_by_stepping():
    """Every row plays its quota: the lengths are distributed as those of whole samples."""
    lengths = {}
    for kind, env in {"sampled": gym.make(ID), "stepped": STEPPED["next_step"]()}.items():
        agent = Same(env, small_model(4, 16, 0), batch_size=800)
        lengths[kind] = agent.collect().response_lengths.float()
    difference = lengths["sampled"].mean() - lengths["stepped"].mean()
    error = (lengths["sampled"].var() / 800 + lengths["stepped"].var() / 800).sqrt()
    assert difference.abs() < 3 * error
    assert lengths["sampled"].std() > 1


def test_learn_counts_tokens_logs_and_stops(tmp_path):
    seen = []
    agent = Mean(gym.make(ID), batch_size=8)
    agent.learn(200, log_dir=tmp_path, callback=lambda a, m: seen.append((a.num_timesteps, m)) or len(seen) < 3)
    assert len(seen) == agent.num_updates == 3
    with (tmp_path / "progress.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["time/timesteps"]) for row in rows] == [timesteps for timesteps, _ in seen]
    assert [float(row["rollout/score"]) for row in rows] == pytest.approx([m["rollout/score"] for _, m in seen])
    assert list(tmp_path.glob("events.out.tfevents*"))
    before = agent.num_timesteps
    agent.learn(100)
    assert agent.num_timesteps >= before + 100


def test_a_seed_fixes_everything():
    runs = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(runs))  # no global generator matters
        agent = PPO(gym.make(ID), seed=seed, batch_size=16)
        agent.learn(300)
        runs.append(torch.cat([p.detach().flatten() for p in agent.model.parameters()]))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


@pytest.mark.parametrize("critic", ["separate", "shared"])
def test_save_and_load(tmp_path, critic):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    env = gym.make(ID, reference=small_model(4, 16, 3), kl_coef=0.2)
    agent = PPO(env, batch_size=16, critic=None, learning_rate=2e-3)
    agent = PPO(env, config=type(agent.config)(batch_size=16, critic=critic, clip_coef=0.1)).learn(300)
    agent.save(tmp_path / "run" / "final")
    again = PPO.load(tmp_path / "run" / "final", env, clip_coef=0.3)
    assert (again.config.clip_coef, again.config.critic, again.num_timesteps) == (0.3, critic, agent.num_timesteps)
    for name in agent.modules:
        for a, b in zip(agent.modules[name].parameters(), again.modules[name].parameters(), strict=True):
            assert torch.equal(a, b)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "final")
    assert torch.equal(model.transformer.wte.weight, agent.model.transformer.wte.weight)
    assert AutoTokenizer.from_pretrained(tmp_path / "run" / "final").decode([1, 2, 0], skip_special_tokens=True) == "ab"
    agent.save(tmp_path / "run" / "final")
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["final"]
    with pytest.raises(ValueError, match=r"holds a PPO, not a REINFORCE"):
        REINFORCE.load(tmp_path / "run" / "final", env)
    with pytest.raises(ValueError, match=r"agent\.json"):
        PPO.load(tmp_path, env)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(ValueError, match="holds something else"):
        agent.save(tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "x"


def test_predict_is_stable_baselines3s():
    env = gym.make(ID)
    agent = REINFORCE(env)
    observation, _ = env.reset(seed=0)
    action, state = agent.predict(observation, deterministic=True)
    assert state is None
    assert env.action_space.contains(action)
    logits = agent.model(input_ids=torch.from_numpy(observation[observation < 4])[None]).logits[0, -1]
    assert action == logits.argmax()
    actions, _ = agent.predict(np.stack([observation] * 3))
    assert actions.shape == (3,)
    drawn = {int(agent.predict(observation)[0]) for _ in range(60)}
    assert drawn == {0, 1, 2, 3}


BAD = [
    (lambda: PPO(gym.make(ID), clip_coeff=0.1), "'clip_coeff' is not a setting of PPOConfig; did you mean 'clip_coef'"),
    (lambda: PPO(gym.make(ID), clip_range=0.1), "'clip_range' is not a setting of PPOConfig; did you mean 'clip_coef'"),
    (lambda: PPO(gym.make(ID), clip_coef=2.0), r"clip_coef must be above 0 and below 1; got 2.0"),
    (lambda: PPO(gym.make(ID), batch_size=0), r"batch_size must be at least 1; got 0"),
    (lambda: PPO(gym.make(ID), learning_rate="fast"), r"learning_rate must be a number or None; got 'fast'"),
    (lambda: PPO(gym.make(ID), epochs=2.5), r"epochs must be a whole number; got 2.5"),
    (lambda: PPO(gym.make(ID), learning_rate=float("nan")), r"learning_rate must be .*finite.*; got nan"),
    (lambda: PPO(gym.make("CartPole-v1")), "env must be a textrl environment"),
    (
        lambda: PPO(gym.make_vec(ID, 1, vectorization_mode="async")),
        "env must be one whose parts are in this process: a SyncVectorEnv, .*; got AsyncVectorEnv",
    ),
    (lambda: PPO(gym.make(ID), "/no/such/folder"), r"model must be a folder that exists.*got '/no/such/folder'"),
    (lambda: PPO(gym.make(ID), small_model(3, 16)), r"tokenizer has 4 tokens but the model's vocabulary only 3"),
    (lambda: PPO(gym.make(ID), small_model(4, 5)), r"model reads at most 5 tokens, but .* need 8"),
    (lambda: PPO(gym.make(ID), device="abacus"), r"device must be .*; got 'abacus'"),
    (lambda: PPO(gym.make(ID), dtype="float8"), r"dtype must be one of .*; got 'float8'"),
    (lambda: PPO(gym.make(ID), kl_target=3.0), r"kl_target must be None without a reference and a kl_coef .*; got 3.0"),
    (lambda: PPO(gym.make(ID, reference=small_model(4, 8)), kl_target=3.0), r"kl_target must be None .* got 3.0$"),
    (lambda: PPO(gym.make(ID), seed=-1), r"seed must be from 0 to below .*; got -1"),
    (lambda: PPO(gym.make(ID), seed=2**70), r"seed must be from 0 to below .*; got 1180591620717411303424"),
    (lambda: PPO(gym.make(ID), missing_end_penalty=-1.0), r"missing_end_penalty must be a finite number from 0 up"),
    (lambda: REINFORCE(gym.make(ID), vf_coef=-1.0), r"vf_coef must be at least 0; got -1.0"),
    (lambda: PPO(gym.make(ID)).learn(0), r"total_timesteps must be above 0; got 0"),
    (lambda: PPO(gym.make(ID)).generate([]), r"prompts must be a list of at least one text; got \[\]"),
    (lambda: BestOfN(gym.make(ID)).generate("abc"), r"prompts must be a list of at least one text; got 'abc'"),
    (lambda: PPO(gym.make(ID)).generate(["xyz"]), r"prompt has text that the tokenizer does not know: 'xyz'"),
    (lambda: gym.make(ID, kl_coef=0.1), r"kl_coef=0.1 needs a reference"),
    (lambda: gym.make("textrl/Text-v0", prompts=[]), r"prompts is empty"),
    (
        lambda: gym.make("textrl/Text-v0", prompts=["ab" * 99], max_prompt_tokens=9),
        r"prompt is 199 tokens long, longer",
    ),
]


@pytest.mark.parametrize(("wrong", "message"), BAD, ids=[message[:30] for _, message in BAD])
def test_bad_input_is_one_line_with_name_value_and_remedy(wrong, message):
    with pytest.raises(ValueError, match=message) as caught:
        wrong()
    assert "\n" not in str(caught.value)


SCORES = {
    "must return a list of 2 numbers": "great",
    "must return 2 numbers": [1.0],
    "must be finite; got nan .*prompt 'b'": [1.0, float("nan")],
    "must be finite; got inf": [float("inf"), 0.0],
    "must be a number; got 'good'": ["good", "bad"],
    "must be a number; got None": [None, 1.0],
    "a number for each of the": [[1.0] * 99, [1.0]],
}


@pytest.mark.parametrize("message", SCORES)
def test_a_score_that_misbehaves_is_named_with_prompt_and_response(message):
    env = gym.make(
        "textrl/Text-v0", tokenizer=textrl.symbol_tokenizer("ab"), prompts=["a", "b"], max_new_tokens=3,
        reward=lambda prompts, completions: SCORES[message],
    ).unwrapped  # fmt: skip
    with pytest.raises(ValueError, match=message):
        env.task.evaluate(env.task.rows, [[1, 0], [2, 2, 0]])


class Sampled(textrl.Task):
    """Says nothing of how long its prompts are."""

    def __init__(self, prompt):
        super().__init__(tokenizer=textrl.symbol_tokenizer("ab"), max_new_tokens=4)
        self.prompt = prompt

    def sample(self, rng):
        return {"prompt": self.prompt}

    def score(self, prompts, completions, **columns):
        return [float(len(text)) for text in completions]


def test_a_task_that_only_samples_may_meet_a_short_model_as_long_as_its_prompts_fit():
    model = small_model(3, 8)
    for prompt, fits in (("aba", True), ("ababa", False)):
        for env in (textrl.TextEnv(Sampled(prompt)), gym.wrappers.TimeLimit(textrl.TextEnv(Sampled(prompt)), 10)):
            agent = REINFORCE(env, copy.deepcopy(model), batch_size=4, device="cpu")
            if fits:
                agent.learn(10)
                continue
            with pytest.raises(ValueError, match=r"reads at most 8 tokens, but prompt and response may have (9|10)"):
                agent.learn(400)


def test_the_score_has_its_full_weight_after_learn_even_if_it_was_ended_early():
    task = Copy(length=2)
    model = small_model(task.vocab_size, 16)
    env = textrl.TextEnv(task, reference=copy.deepcopy(model), kl_coef=0.1)
    agent = PPO(env, model, batch_size=8, epochs=1, minibatches=1, score_start=0.1)
    seen = []
    agent.learn(1000, callback=lambda agent, metrics: seen.append(agent.score_weight.value) or False)
    assert seen[0] < 1
    assert agent.score_weight.value == 1
    assert agent.schedule == 1


def test_the_best_checkpoint_has_the_best_mean_since_the_one_before():
    due, said = Due(every=10, next=10), []
    for step, score in enumerate((0.0, 4.0, 1.0, 2.0, 3.0, 2.0, 9.0), 1):
        due.note(score)
        said.append(due.due(5 * step, last=step == 7))
        if step == 6:
            assert (due.best, due.best_value) == (30, 2.5)  # means of 2, 1.5 and 2.5
    assert said == [False, True, False, True, False, True, True]
    assert due == Due(every=10, next=40, best=35, best_value=9.0)  # the last is compared too


def test_the_best_may_be_the_last_and_what_a_callback_ends_is_saved(tmp_path):
    def made():
        return REINFORCE(textrl.TextEnv(Copy(length=2)), batch_size=4, device="cpu")

    agent = made().learn(30, log_dir=tmp_path / "a", checkpoint_every=1000)
    assert (tmp_path / "a" / "best").resolve().name == f"step-{agent.num_timesteps:09d}"
    agent = made().learn(100, log_dir=tmp_path / "b", checkpoint_every=1000, callback=lambda agent, metrics: np.False_)
    assert agent.num_updates == 1 and [each.name for each in (tmp_path / "b" / "checkpoints").iterdir()]
    with pytest.raises(ValueError, match=r"a folder without another run's checkpoints; got .*resume=Tr"):
        made().learn(100, log_dir=tmp_path / "b")
    whole = made().learn(100, log_dir=tmp_path / "c")
    again = made().learn(100, log_dir=tmp_path / "b", checkpoint_every=1000, resume=True)
    assert again.num_updates == whole.num_updates > 1
    assert (tmp_path / "b" / "progress.csv").read_text() == (tmp_path / "c" / "progress.csv").read_text()


class Odd(REINFORCE):
    numbers: ClassVar = {"loss": torch.tensor([0.5]), "own/count": np.int64(3), "own/flag": True}

    def update(self, rollout):
        return self.numbers


def test_the_numbers_of_an_update_are_numbers(tmp_path, monkeypatch):
    agent, seen = Odd(textrl.TextEnv(Copy(length=2)), batch_size=4, device="cpu"), {}
    agent.learn(1, callback=lambda agent, metrics: seen.update(metrics), log_dir=tmp_path / "run")
    assert {name: seen[name] for name in ("train/loss", "own/count", "own/flag")} == {
        "train/loss": 0.5,
        "own/count": 3,
        "own/flag": 1.0,
    }
    assert read_numbers(tmp_path / "run" / "progress.csv")[0]["train/loss"] == 0.5
    for numbers, said in (
        ({"x": "good"}, "got 'good' for 'x'"),
        ({"x": None}, "got None for 'x'"),
        ({3: 1.0}, "got 1.0 for 3"),
        ({"x": torch.zeros(2)}, r"got tensor\(\[0., 0.\]\) for 'x'"),
    ):
        monkeypatch.setattr(Odd, "numbers", numbers)
        with pytest.raises(ValueError, match=f"Odd.update must return a dict of numbers by their names; {said}"):
            agent.learn(1)


def test_the_reference_forgets_what_it_read_after_every_iteration():
    task = Copy(length=2)
    model = small_model(task.vocab_size, 16)
    bare = textrl.TextEnv(task, reference=copy.deepcopy(model), kl_coef=0.1)
    agent = REINFORCE(gym.wrappers.RecordEpisodeStatistics(bare), model, batch_size=4)
    agent.collect()
    assert bare.penalty.stepper._seen is not None  # else this tests nothing
    agent.learn(1)
    assert bare.penalty.stepper._seen is None  # as in a run that is taken up here


def test_what_was_read_before_an_update_is_read_again_after_it():
    env = gym.wrappers.RecordEpisodeStatistics(textrl.TextEnv(Copy(length=2)))
    observation = env.reset(seed=0)[0][None]

    class Reader(REINFORCE):
        def update(self, rollout):
            self.before = self.stepper(observation).clone()
            return super().update(rollout)

    agent = Reader(env, batch_size=4, learning_rate=0.1)
    agent.learn(1)
    after = agent.stepper(observation).clone()
    assert not torch.equal(agent.before, after)
    agent.stepper.forget()
    torch.testing.assert_close(after, agent.stepper(observation))


def test_what_an_agent_makes_in_build_is_the_same_for_the_same_seed():
    class Wide(Same):
        def build(self):
            self.more = self.modules["more"] = torch.nn.Linear(3, 3)

    def weight(seed):
        torch.rand(seed + 1)  # the global generator is elsewhere each time
        before = torch.get_rng_state()
        agent = Wide(textrl.TextEnv(Copy()), seed=seed)
        assert torch.equal(torch.get_rng_state(), before)
        return agent.more.weight

    assert torch.equal(weight(3), weight(3)) and not torch.equal(weight(3), weight(4))


def test_the_weight_of_the_score_is_logged_where_an_update_asks_for_it():
    task, rows = Copy(length=2), []
    model = small_model(task.vocab_size, 16)
    for kl_coef in (0.1, 0.0):
        env = textrl.TextEnv(task, reference=copy.deepcopy(model), kl_coef=kl_coef)
        REINFORCE(env, copy.deepcopy(model), batch_size=8, score_start=0.1).learn(
            100, callback=lambda agent, metrics: rows.append(metrics.get("train/score_weight"))
        )
    weights = [weight for weight in rows if weight is not None]
    assert weights[0] == pytest.approx(0.1) and weights == sorted(weights) and weights[-1] == 1
    assert rows[len(weights) :] == [None] * (len(rows) - len(weights)) != []


def test_saving_shows_no_bars_and_leaves_those_of_others(tmp_path, capsys):
    before = hub_logging.is_progress_bar_enabled()  # the command line, in another test, hides them all
    try:
        hub_logging.enable_progress_bar()
        REINFORCE(gym.make(ID)).save(tmp_path / "agent")
        assert capsys.readouterr().err == ""
        assert hub_logging.is_progress_bar_enabled()
    finally:
        if not before:
            hub_logging.disable_progress_bar()
