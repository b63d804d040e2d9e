"""Signs that training goes wrong: each is said once, with what mends it; a run that goes well says nothing."""

import copy
import warnings

import gymnasium as gym
import numpy as np
import pytest
import torch

import textrl
from textrl import agents
from textrl.failures import TrainingError
from textrl.models import small_model
from textrl.watch import TrainingWarning

TOKENIZER = textrl.symbol_tokenizer("abc")


class Endless(textrl.Task):
    """A task that never advises the end token."""

    def __init__(self):
        super().__init__(tokenizer=TOKENIZER, max_new_tokens=3)

    def prompts(self):
        return [{"prompt": "a"}, {"prompt": "b"}]

    def score(self, prompts, completions, **columns):
        return [float(text.count("a")) for text in completions]

    def allowed_tokens(self, rows, responses):
        return np.tile([False, True, True, True], (len(rows), 1))


class Sharper(textrl.Agent):
    """Every update makes it surer of what it says."""

    def update(self, rollout):
        with torch.no_grad():
            self.model.get_input_embeddings().weight *= 3
        return {}


def said(agent, timesteps=600):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        agent.learn(timesteps)
    assert all(each.category is TrainingWarning for each in caught)
    return [str(each.message) for each in caught]


def text_env(reward=lambda completions: [float(len(text)) for text in completions], **more):
    options = {"tokenizer": TOKENIZER, "prompts": ["a"], "max_new_tokens": 4, "reward": reward, **more}
    return gym.make_vec("textrl/Text-v0", num_envs=1, **options)


def one(messages, start):
    found = [message for message in messages if message.startswith(start)]
    assert len(found) == 1, messages
    assert "\n" not in found[0]
    return found[0]


@pytest.mark.parametrize("agent", [agents.PPO, agents.REINFORCE, agents.GRPO])
def test_a_run_that_goes_well_says_nothing(agent):
    reference = small_model(4, 16, 0)
    env = gym.make_vec("textrl/Copy-v0", num_envs=1, reference=reference, kl_coef=0.05)
    assert said(agent(env, batch_size=64), 3000) == []


def test_a_large_kl():
    env = text_env(reference=small_model(4, 8, 5), kl_coef=0.1)
    message = one(said(agents.PPO(env, batch_size=16, warn_kl=1e-4)), "KL to the reference is")
    assert "warn_kl=0.0001" in message
    assert "a higher kl_coef or a kl_target usually mends it" in message


def test_entropy_that_collapses():
    message = one(said(Sharper(text_env(), batch_size=16)), "entropy has collapsed")
    assert "a higher kl_coef usually mends it" in message  # a plain agent has no entropy bonus


def test_responses_that_are_all_equal():
    model = small_model(4, 8, 0)
    with torch.no_grad():
        model.get_input_embeddings().weight *= 1000
    for kind, cures in ((agents.REINFORCE, "a higher kl_coef"), (agents.A2C, "a higher kl_coef or a higher ent_coef")):
        messages = said(kind(text_env(), copy.deepcopy(model), batch_size=16, learning_rate=0.0))
        assert f"; {cures} usually mends it" in one(messages, "all responses of the last 3 iterations are equal")


def test_no_end_token():
    env = textrl.TextVectorEnv(Endless(), 1)
    message = one(said(agents.REINFORCE(env, batch_size=16)), "no response has ended by itself")
    assert "max_new_tokens" in message
    assert "'<end>'" in message


def test_texts_that_others_wrote_are_no_signs():
    """All alike, of one score and cut off, far from the reference: BPO is given them and did not say them."""
    env = text_env(reference=small_model(4, 8, 5), kl_coef=0.1)
    rows = [{"prompt": "a", "completion_ids": [1, 1, 1, 1], "logprobs": [-0.1] * 4}] * 4
    assert said(agents.BPO(env, dataset=rows, batch_size=4, warn_kl=1e-4), 100) == []


def test_a_constant_score():
    env = text_env(lambda completions: [0.25] * len(completions))
    message = one(said(agents.REINFORCE(env, batch_size=16)), "score is 0.25 for every response")
    assert "check the reward function" in message


AGENTS = {
    "PPO": {},
    "PPO, shared critic": {"critic": "shared"},
    "REINFORCE": {},
    "A2C": {},
    "TRPO": {},
    "GRPO": {"group_size": 4},
    "NLPO": {},
    "ReST": {"grow_batches": 1, "group_size": 4},
    "SFT": {"dataset": [{"prompt": "a", "completion": "b"}]},
    "DPO": {"dataset": [{"prompt": "a", "chosen": "b", "rejected": "c"}]},
    "BPO": {"dataset": [{"prompt": "a", "completion": "b", "score": 1.0}]},
}


@pytest.mark.parametrize("name", AGENTS)
def test_numbers_that_are_not_finite_are_skipped_counted_and_stop_the_run(name, tmp_path):
    """From the third update on the gradient of every parameter is NaN."""
    rows = []
    agent = getattr(agents, name.split(",")[0])(text_env(), batch_size=8, **AGENTS[name])

    def spoil(agent, metrics):
        rows.append(metrics.get("train/skipped_steps", 0))
        if agent.num_updates == 2:
            before.update({n: p.detach().clone() for n, p in agent.model.named_parameters()})
            for p in agent.model.parameters():
                p.register_hook(lambda gradient: gradient * float("nan"))

    before = {}
    with warnings.catch_warnings(), pytest.raises(TrainingError, match=r"3 iterations in a row .*step-") as caught:
        warnings.simplefilter("ignore")
        agent.learn(100_000, log_dir=tmp_path, checkpoint_every=1, callback=spoil)
    assert "\n" not in str(caught.value)
    assert agent.num_updates == 5
    assert rows[:2] == [0, 0]
    assert 0 < rows[2] < rows[3] < rows[4]
    for n, p in agent.model.named_parameters():
        assert torch.equal(p, before[n]), n


@pytest.mark.parametrize("stepped", [False, True], ids=["sampled", "stepped"])
def test_weights_that_are_not_finite_stop_the_run(stepped, tmp_path):
    env = text_env()
    agent = agents.PPO(gym.wrappers.vector.RecordEpisodeStatistics(env) if stepped else env, batch_size=8)

    def spoil(agent, metrics):
        if agent.num_updates == 2:
            with torch.no_grad():
                next(agent.model.parameters())[:] = float("nan")

    with warnings.catch_warnings(), pytest.raises(TrainingError, match=r"not finite"):
        warnings.simplefilter("ignore")
        agent.learn(100_000, log_dir=tmp_path, checkpoint_every=1, callback=spoil)


def test_a_score_that_has_become_the_best_is_no_sign():
    env, scores = text_env(lambda completions: [float(text.startswith("b")) for text in completions]), []
    agent = agents.REINFORCE(env, batch_size=32, learning_rate=0.02)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        agent.learn(12_000, callback=lambda _, metrics: scores.append(metrics["rollout/score"]))
    assert scores[0] < 1 and scores[-5:] == [1.0] * 5
    assert not [each for each in caught if str(each.message).startswith("score is")]
