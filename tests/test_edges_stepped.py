"""Single lines whose loss nothing else would notice: stepped collections, exact answers in parts, warnings."""

import importlib
import warnings
from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
import torch
from test_acting import Halves
from test_agents import fixed_rollout, tabular_agent
from test_episodes import Vowels
from test_exact import RandomTask, gpt2
from test_flat import llama

import textrl
from textrl import cli, collecting, enumeration
from textrl.agents import NLPO, REINFORCE
from textrl.asking import Asking, ask
from textrl.attaching import penalty_weight
from textrl.batch import batched_logprobs
from textrl.collecting import collect
from textrl.envs.copy import Copy
from textrl.episodes import read_episodes
from textrl.exact import evaluate_exact, solve
from textrl.models import small_model, train_last_layers
from textrl.optim import Optimizer
from textrl.patient import Patient
from textrl.policy import CausalPolicy
from textrl.rollout import masks_along
from textrl.scores import ScoreUnavailable
from textrl.stepwise import check_positions
from textrl.tabular import tabular_model
from textrl.trunk import frozen_blocks, same_blocks
from textrl.watch import TrainingWarning, Watch
from textrl.wrappers import KLPenalty


def test_what_a_sync_vector_env_pays_is_logged_with_the_whole_penalty(tmp_path):
    reference, task = small_model(5, 8, 9), Vowels()
    env = gym.vector.SyncVectorEnv([lambda: textrl.TextEnv(task, reference=reference, kl_coef=0.5)] * 2)
    found = read_episodes(collect(env, small_model(5, 8, 1), 8, tmp_path / "sync"))
    kl = (found.logprobs - found.ref_logprobs).sum(1)
    right = [text.count(1) / 4 for text in found.responses.tolist()]
    bonus = [{"": 0.5, "bcd": 0.25}[row["prompt"]] for row in found.rows]
    assert found.scores.tolist() == pytest.approx([a + b for a, b in zip(right, bonus, strict=True)], abs=1e-4)
    torch.testing.assert_close(found.rewards.sum(1), found.scores - 0.5 * kl, atol=1e-4, rtol=1e-4)


def test_a_wrapped_environment_is_played_at_its_temperature(tmp_path):
    task, model = Vowels(), tabular_model(Vowels(), std=1.0)
    env = gym.Wrapper(textrl.TextEnv(task, temperature=2.0))
    found = read_episodes(collect(env, model, 8, tmp_path / "warm"))
    torch.testing.assert_close(found.logprobs, batched_logprobs(CausalPolicy(model, 5, 2.0), found, 1000))


def test_later_episodes_of_a_wrapped_environment_have_prompts_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(collecting, "EPISODES_AT_ONCE", 4)
    env = gym.Wrapper(textrl.TextEnv(Copy(length=3)))
    model = small_model(env.unwrapped.task.vocab_size, 16)
    prompts = [row["prompt"] for row in read_episodes(collect(env, model, 8, tmp_path / "four")).rows]
    assert prompts[:4] != prompts[4:]


@pytest.mark.parametrize(("task", "top_p"), [(Vowels(), 0.5), (Halves(), 0.999)])
def test_a_wrapped_environment_is_played_inside_both_masks(tmp_path, task, top_p):
    env = textrl.TextEnv(task)
    agent = NLPO(env, tabular_model(task, std=1.0), top_p=top_p, device="cpu")
    found = read_episodes(collect(gym.Wrapper(env), agent, 32, tmp_path / "masked"))
    found.rows = [next(row for row in task.rows if row["prompt"] == each["prompt"]) for each in found.rows]
    masks = masks_along(task, found, agent.narrow)
    assert masks.gather(2, found.responses[..., None])[..., 0][found.action_mask].all()


def test_every_row_of_a_vector_plays_the_same_number_of_episodes_and_no_fewer_than_asked():
    env = gym.vector.VectorWrapper(textrl.TextVectorEnv(Copy(length=2), num_envs=2))
    assert len(textrl.Agent(env, batch_size=5).collect()) == 6


def test_the_weights_of_all_penalties_are_summed():
    task = Copy(length=2)
    reference = small_model(task.vocab_size, 16)
    assert penalty_weight(textrl.TextEnv(task, reference=reference, kl_coef=0.1)) == pytest.approx(0.1)
    both = KLPenalty(KLPenalty(textrl.TextEnv(task), reference, 0.3), reference, 0.2)
    assert penalty_weight(both) == pytest.approx(0.5)


class Broken(gym.Wrapper):
    """Pays NaN for the first token of every other episode."""

    count = 0

    def reset(self, **arguments):
        self.count, self.first = self.count + 1, True
        return self.env.reset(**arguments)

    def step(self, action):
        observation, reward, *rest = self.env.step(action)
        reward, self.first = (float("nan") if self.first and self.count % 2 else reward), False
        return observation, reward, *rest


def test_an_episode_that_a_wrapper_paid_nan_is_left_out():
    agent = textrl.Agent(Broken(textrl.TextEnv(Copy(length=4))), batch_size=8)
    rollout = agent.collect()
    assert len(rollout) == len(rollout.dropped) == 4
    assert rollout.rewards.isfinite().all()


def test_the_reference_says_what_it_says_without_masks():
    task = Halves()
    reference = tabular_model(task, std=1.0, seed=1)
    agent = textrl.Agent(textrl.TextEnv(task, reference=reference, kl_coef=0.1), tabular_model(task), batch_size=16)
    rollout = agent.collect()
    rows, columns, targets = rollout.places()
    with torch.no_grad():
        logits = reference(input_ids=rollout.tokens).logits[rows, columns].log_softmax(-1)
    torch.testing.assert_close(rollout.ref_logprobs, rollout.spread(logits.gather(-1, targets[:, None])[:, 0]))
    assert not rollout.allowed[rollout.action_mask].all()


def test_the_start_of_a_masked_policy_is_the_reference_over_all_tokens():
    task = RandomTask(4, 3, masks=True)
    model = gpt2(task, 5)
    plain, masked = evaluate_exact(task, model), evaluate_exact(task, model, masked=True)
    assert masked.start == plain.start and masked.score != plain.score


class Banned(textrl.Task):
    """Two rows with one prompt, of which each bans another token; nobody asks about what cannot be said."""

    def __init__(self, length=1):
        super().__init__(tokenizer=textrl.symbol_tokenizer("abc"), max_new_tokens=length)

    def prompts(self):
        return [{"prompt": "a", "banned": 1}, {"prompt": "a", "banned": 2}]

    def score(self, prompts, completions, **columns):
        return [float(text.startswith("b")) for text in completions]

    def allowed_tokens(self, rows, responses):
        banned = np.array([row["banned"] for row in rows])
        assert not (responses == banned[:, None]).any(), "asked about a response that the masks do not allow"
        return np.arange(4) != banned[:, None]


@pytest.mark.parametrize("length", [1, 3])
def test_rows_with_one_prompt_keep_their_own_masks(length):
    assert evaluate_exact(Banned(length), lambda o: torch.zeros(len(o), 4), masked=True).score == pytest.approx(1 / 6)


def test_the_exact_answer_does_not_hang_on_how_many_texts_are_read_at_once(monkeypatch):
    task = RandomTask(4, 3)
    model = gpt2(task, 5)

    def ask(observations):  # a policy that tells every text from every other
        number = (observations * 4.0 ** np.arange(observations.shape[1])).sum(1)
        return torch.from_numpy(np.sin(number[:, None] * np.arange(1, 5)))

    def answers():
        return [evaluate_exact(task, policy, ask, 0.3).objective for policy in (model, ask)] + [
            solve(task, model, 0.3).objective
        ]

    whole = answers()
    width = len(task.encode(task.rows[0])) + 2
    monkeypatch.setattr(enumeration, "_TOKENS_AT_ONCE", 5 * width)  # the nine longest prefixes five at once
    monkeypatch.setattr(enumeration, "_TEXTS_AT_ONCE", 5)
    assert answers() == pytest.approx(whole, abs=1e-12)


def test_the_norm_of_a_step_is_that_of_all_gradients():
    one, two = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
    optimizer = Optimizer([one], [two], learning_rate=0.1)
    one.grad, two.grad = torch.tensor([3.0]), torch.tensor([4.0])
    assert optimizer.step() == pytest.approx(5)


def test_the_state_of_an_optimizer_holds_its_float32_copies_and_its_learning_rate():
    def made():
        return Optimizer([torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))], learning_rate=0.1)

    first, second = made(), made()
    first.parameters[0].grad = torch.full((4,), 1e-3, dtype=torch.bfloat16)
    first.learning_rate = 1e-4
    first.step()  # too small a step for bfloat16
    assert torch.equal(first.parameters[0], second.parameters[0])
    second.load_state_dict(first.state_dict())
    assert torch.equal(second.masters[0], first.masters[0]) and not torch.equal(first.masters[0], torch.ones(4))
    assert second.learning_rate == 1e-4


@pytest.mark.parametrize(
    ("module", "name", "arguments", "seen"),
    [
        (
            "ope",
            "ope",
            ["ope", "--dataset", "x.jsonl", "--penalised", "--confidence", "0.8"],
            {"penalised": True, "confidence": 0.8},
        ),
        ("collecting", "collect", ["collect", "--dataset", "new", "--episodes", "5", "--seed", "7"], (5, "new", 7)),
    ],
)
def test_the_commands_flags_arrive(module, name, arguments, seen, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.jsonl").write_text('{"prompt": "ab", "completion": "ab"}\n')
    found = []

    def spy(*given, **named):
        found.append(named or given[2:])
        raise ValueError("enough")

    monkeypatch.setattr(importlib.import_module(f"textrl.{module}"), name, spy)
    assert cli.main([*arguments, "--env", "textrl/Copy-v0"]) == 2
    assert found == [seen]


def test_lists_beside_numbers_are_faults():
    columns = {"prompts": ["a", "a"], "completions": ["b", "bb"], "completion_ids": [[2], [2, 2]]}
    assert set(ask(lambda **_: [1.0, [0.5, 0.5]], columns, Asking(drop=True)).faults) == {1}


def test_a_score_that_is_not_there_is_not_asked_again_for_each_response():
    calls = []

    def score(**columns):
        calls.append(len(columns["prompts"]))
        raise ScoreUnavailable("nobody there")

    columns = {"prompts": ["a"] * 3, "completions": ["b"] * 3, "completion_ids": [[2]] * 3}
    assert set(ask(score, columns, Asking(drop=True)).faults) == {0, 1, 2}
    assert calls == [3]


def test_blocks_above_embeddings_that_learn_are_not_frozen_nor_those_that_differ_the_same():
    model = llama()
    train_last_layers(model, 1)
    assert frozen_blocks(model) == 2
    other = llama()
    assert same_blocks(model, other, 2)
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight.add_(0.01)
    assert not same_blocks(model, other, 2) and same_blocks(model, other, 1)
    model.model.embed_tokens.requires_grad_(True)
    assert frozen_blocks(model) == 0


def test_a_model_that_is_one_token_short_is_refused():
    task = Copy(length=2)
    need = task.max_prompt_tokens + task.max_new_tokens
    check_positions("model", small_model(task.vocab_size, need), task)
    with pytest.raises(ValueError, match=f"model reads at most {need - 1} tokens"):
        check_positions("model", small_model(task.vocab_size, need - 1), task)


def test_a_vector_environments_patient_is_at_its_temperature():
    agent = textrl.Agent(textrl.TextVectorEnv(Copy(length=2), num_envs=2, temperature=2.0))
    assert Patient(agent).env.temperature == 2.0


def watched(*seen):
    """What is said of iterations, each a score of all responses and metrics."""
    rollout = replace(fixed_rollout(), completions=["ab", ""])
    watch = Watch(tabular_agent(REINFORCE))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for score, metrics in seen:
            scores = rollout.scores if score is None else torch.full((2,), score)
            watch.see(replace(rollout, scores=scores), metrics)
    assert all(each.category is TrainingWarning for each in caught)
    return [str(each.message).split()[0] for each in caught]


def test_a_sign_that_comes_and_goes_is_said_once():
    far, near = {"rollout/kl_reference": 1e4}, {"rollout/kl_reference": 0.0}
    assert watched((None, far), (None, near), (None, far)) == ["KL"]


def test_a_constant_score_that_moves_is_no_sign():
    assert watched(*((float(i), {}) for i in range(6))) == []
    assert watched(*((1.0, {}) for _ in range(6))) == ["score"]


def test_entropy_is_held_against_that_of_the_first_iteration():
    assert watched(*((None, {"rollout/surprisal": x}) for x in (1.0, 10.0, 0.3, 0.3, 0.3, 0.3))) == []
    assert watched(*((None, {"rollout/surprisal": x}) for x in (10.0, 1.0, 0.3, 0.3, 0.3, 0.3))) == ["entropy"]


@pytest.mark.parametrize("texts", [1, 2, 3, 4, 5, 8])
def test_a_tree_may_be_read_in_any_number_of_parts(texts, monkeypatch):
    """Of 27 texts; a part in which no text is the first that begins with a prefix adds nothing to its level."""
    task = RandomTask(4, 4)
    model = gpt2(task, 5)
    whole = evaluate_exact(task, model).score, solve(task, model, 0.3).objective
    width = len(task.encode(task.rows[0])) + 3
    monkeypatch.setattr(enumeration, "_TOKENS_AT_ONCE", texts * width)
    assert (evaluate_exact(task, model).score, solve(task, model, 0.3).objective) == pytest.approx(whole, abs=1e-12)
