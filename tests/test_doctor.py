"""`textrl doctor`: every planted fault is found under its name, with a fix; what is sound passes."""

import copy
import re
import sys

import gymnasium as gym
import pytest
import torch
from tokenizers import normalizers

import textrl
from textrl import cli
from textrl.doctor import CHECKS, diagnose
from textrl.models import small_model
from textrl.patient import Patient
from textrl.registration import registered

ID = "textrl/Copy-v0"


def model(seed=0):
    return small_model(4, 16, seed)


def agent_on(env=None, policy=None, cls=textrl.Agent, **options):
    if env is None:
        env = gym.make(ID, disable_env_checker=True, reference=model(5), kl_coef=0.3, **options)
    return cls(env, policy or model())


def hooked(change):
    policy = model()
    policy.transformer.h[0].register_forward_hook(lambda module, arguments, output: change(output))
    return policy


class Noisy(textrl.Agent):
    def logprobs(self, batch):
        return super().logprobs(batch) + 0.01


class WrongSign(textrl.TextEnv):
    def _pay(self, token, info):
        return -super()._pay(token, info)


class Sums(textrl.TextEnv):
    """Its penalty is of another reference than it says."""

    def _pay(self, token, info):
        return 0.5 * super()._pay(token, info)


class Endless(gym.Wrapper):
    def step(self, action):
        observation, reward, _, truncated, info = self.env.step(action)
        return observation, reward, False, truncated, info


def copy_task(cls=None, **options):
    task = gym.make(ID, **options).unwrapped.task
    if cls is not None:
        task.__class__ = type("Changed", (cls, type(task)), {})
    return task


class Random:
    def score(self, prompts, completions, **columns):
        return torch.rand(len(prompts)).tolist()


class Memory:
    """Its score depends on what else is in the batch."""

    def score(self, prompts, completions, **columns):
        return [float(i) for i in range(len(prompts))]


class Novelty:
    """Pays for what it has not seen yet."""

    def score(self, prompts, completions, **columns):
        seen, texts = vars(self).setdefault("seen", set()), list(zip(prompts, completions, strict=True))
        found = [float(text not in seen) for text in texts]
        seen.update(texts)
        return found


class LooksAhead:
    """Every token is worth the length of the whole response."""

    def score(self, prompts, completions, completion_ids, **columns):
        return [[float(len(ids))] * len(ids) for ids in completion_ids]


class Raises:
    def score(self, prompts, completions, **columns):
        raise OSError("no disk")


def with_eos(token):
    policy = model()
    policy.generation_config.eos_token_id = token
    return policy


def with_unused():
    policy = model()
    policy.transformer.register_parameter("spare", torch.nn.Parameter(torch.ones(3)))
    return policy


def nan():
    policy = model()
    policy.transformer.ln_f.bias.data[0] = float("nan")
    return policy


def detached():
    policy = model()
    policy.transformer.h[0].mlp.register_forward_hook(lambda module, arguments, output: output.detach())
    return policy


def sharing():
    policy, reference = model(), model(5)
    reference.transformer.h[1].mlp.c_fc.weight = policy.transformer.h[1].mlp.c_fc.weight
    return agent_on(gym.make(ID, reference=reference, kl_coef=0.1), policy)


def thawed_later():
    policy = model()
    policy.transformer.h[0].requires_grad_(False)
    agent = agent_on(policy=policy)
    agent.model.transformer.h[0].requires_grad_(False)
    agent.optimizer.parameters = [p for p in agent.model.parameters() if p.requires_grad]
    agent.model.requires_grad_(True)
    return agent


def hotter():
    agent = agent_on()
    agent.policy.temperature = 2.0
    return agent


def looking_ahead():
    agent = agent_on()
    block = agent.model.transformer.h[0]
    block.register_forward_hook(lambda module, arguments, output: output + output.mean(1, keepdim=True))
    return agent


def lowercase():
    task = gym.make("textrl/Text-v0", tokenizer=textrl.symbol_tokenizer("abc"), prompts=["ab"]).unwrapped.task
    task.tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    task._prompts.rows[0]["prompt"] = "aB"
    task._rows = None
    return agent_on(textrl.TextEnv(task), small_model(4, 64))


def noise(x):
    return x + torch.randn(x.shape)


PLANTED = {
    "logits are not finite": ("finite logits", lambda: agent_on(policy=nan())),
    "ratios differ from 1": ("ratio at the first minibatch", lambda: agent_on(cls=Noisy)),
    "ratios differ from 1 by up to .*without dropout": (
        "ratio at the first minibatch",
        lambda: agent_on(policy=hooked(noise)),
    ),
    "padding changes log-probabilities .*causal": (
        "padding",
        looking_ahead,
    ),
    "order of a batch, or who is in it, changes": (
        "order of the batch",
        lambda: agent_on(policy=hooked(lambda x: x + torch.arange(len(x))[:, None, None] * torch.linspace(-1, 1, 64))),
    ),
    "order of a batch.*layer norm in place of batch norm": (
        "order of the batch",
        lambda: agent_on(policy=hooked(lambda x: x - 0.1 * x.mean(0, keepdim=True))),
    ),
    "drawn at temperature 2 and scored by the environment at 1": ("temperature", hotter),
    "KL penalty of a stepped episode has the wrong sign": (
        "KL penalty",
        lambda: agent_on(WrongSign(copy_task(), reference=model(5), kl_coef=0.3)),
    ),
    "KL penalty of a stepped episode is off by": (
        "KL penalty",
        lambda: agent_on(Sums(copy_task(), reference=model(5), kl_coef=0.3)),
    ),
    "end token '<end>' does not end an episode": ("end token", lambda: agent_on(Endless(gym.make(ID)))),
    "an episode ends before its end token": (
        "end token",
        lambda: agent_on(gym.wrappers.TimeLimit(gym.make(ID), 2)),
    ),
    "end token is '<end>', id 0, the model's has the id 3: it would never stop": (
        "end token",
        lambda: agent_on(policy=with_eos(3)),
    ),
    "'aB' comes back from the tokenizer as 'ab'": ("tokenizer round trip", lowercase),
    "score is .* and then .* for prompt": (
        "score determinism",
        lambda: agent_on(textrl.TextEnv(copy_task(Random))),
    ),
    "score is 0 and then 15 .*looks at each response alone": (
        "score determinism",
        lambda: agent_on(textrl.TextEnv(copy_task(Memory))),
    ),
    "score is 1 and then 0 .*without memory": (
        "score determinism",
        lambda: agent_on(textrl.TextEnv(copy_task(Novelty))),
    ),
    "score raised OSError: no disk": ("score determinism", lambda: agent_on(textrl.TextEnv(copy_task(Raises)))),
    "is paid 0.1 beside the score": (
        "reward at the last token",
        lambda: agent_on(gym.wrappers.TransformReward(gym.make(ID), lambda reward: reward + 0.1)),
    ),
    "token 1 of .* is worth 1 when it is written and .* at the end, for prompt": (
        "reward at the last token",
        lambda: agent_on(textrl.TextEnv(copy_task(LooksAhead))),
    ),
    "1 of 29 trainable parameters get no gradient, transformer.spare": (
        "gradients",
        lambda: agent_on(policy=with_unused()),
    ),
    "trainable parameters get no gradient, transformer.h.0": ("gradients", lambda: agent_on(policy=detached())),
    "the reference shares weights with the policy": ("gradients", sharing),
    "is trainable but not in the optimizer": ("gradients", thawed_later),
}


@pytest.mark.parametrize("message", PLANTED)
def test_a_planted_fault_is_named_with_a_fix(message):
    name, plant = PLANTED[message]
    faults = {finding.name: finding for finding in diagnose(plant()) if not finding.fine}
    assert name in faults, list(map(str, faults.values()))
    assert re.search(message, faults[name].said), faults[name].said
    assert "fix: " in faults[name].said or "OSError" in message
    assert "\n" not in str(faults[name])
    assert "temperature 1 and scored by the environment at 1:" not in str(list(faults.values()))
    others = {"ratio at the first minibatch", "temperature", "KL penalty", "order of the batch", "padding"}
    model_faults = "padding" in message or "order" in message or "ratio" in message or "temperature" in message
    assert len(faults) == 1 or (model_faults and faults.keys() <= {name, *others}) or name in (
        "score determinism", "end token",
    ), list(faults)  # fmt: skip


IDS = [id for id in registered() if id.startswith("textrl/") and "Reviews" not in id]


@pytest.mark.parametrize("id", IDS)
def test_every_environment_is_sound(id):
    env = gym.make(id, disable_env_checker=True)
    task = env.unwrapped.task
    reference = small_model(task.vocab_size, task.max_prompt_tokens + task.max_new_tokens, 5)
    env = gym.make(id, disable_env_checker=True, reference=reference, kl_coef=0.2, temperature=0.7)
    agent = textrl.Agent(env)
    before = {name: p.clone() for name, p in agent.model.named_parameters()}
    found = diagnose(agent)
    assert [finding.name for finding in found] == list(CHECKS)
    assert [str(finding) for finding in found if not finding.fine] == []
    assert all(torch.equal(before[name], p) for name, p in agent.model.named_parameters())
    assert env.unwrapped.policy is None
    assert env.unwrapped.kl_coef == 0.2


def test_a_vector_environment_and_frozen_layers():
    env = gym.make_vec(ID, num_envs=4)
    assert all(finding.fine for finding in diagnose(textrl.Agent(env, trainable_layers=1)))


def test_rounding_in_bfloat16_is_no_fault():
    """Single logits are rounded to a quarter there, so the mean counts; a wrong temperature is still found."""
    numbers = torch.tensor([0.0, 0.3])
    assert Patient(agent_on(policy=model())).apart(numbers) == pytest.approx(0.3)
    wide = model().to(torch.bfloat16)
    with torch.no_grad():
        wide.transformer.ln_f.weight.mul_(40)
    agent = textrl.Agent(gym.make(ID, reference=copy.deepcopy(wide), kl_coef=0.2), wide, dtype="bfloat16")
    assert Patient(agent).apart(numbers) == pytest.approx(0.15)
    assert [str(finding) for finding in diagnose(agent) if not finding.fine] == []
    agent.policy.temperature = 2.0
    assert "temperature" in [finding.name for finding in diagnose(agent) if not finding.fine]


def test_a_part_that_starts_at_nothing_is_no_fault():
    """As an adapter does: the gradient of one factor is zero while the other is."""

    class Adapter(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner
            self.down = torch.nn.Linear(64, 2, bias=False)
            self.up = torch.nn.Linear(2, 64, bias=False)
            torch.nn.init.zeros_(self.up.weight)

        def forward(self, x):
            return self.inner(x) + self.up(self.down(x))

    policy = model()
    policy.transformer.h[0].mlp = Adapter(policy.transformer.h[0].mlp)
    assert [str(finding) for finding in diagnose(agent_on(policy=policy)) if not finding.fine] == []


def test_the_command(capsys, tmp_path, monkeypatch):
    model().save_pretrained(tmp_path / "m")
    wrong = with_eos(3)
    wrong.save_pretrained(tmp_path / "wrong")
    assert cli.main(["doctor", ID, "--model", str(tmp_path / "m"), "--reference", str(tmp_path / "m")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(CHECKS)
    assert all(line.startswith("ok    ") for line in lines)
    assert cli.main(["doctor", ID, "--model", str(tmp_path / "wrong")]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines if line.startswith("FAULT")] == ["FAULT end token"]
    (tmp_path / "shaky.py").write_text(
        "import random, textrl\n"
        "class Shaky(textrl.Task):\n"
        "    def __init__(self):\n"
        "        super().__init__(tokenizer=textrl.symbol_tokenizer('abc'), max_new_tokens=3)\n"
        "    def prompts(self):\n"
        "        return [{'prompt': 'a'}]\n"
        "    def score(self, prompts, completions, **columns):\n"
        "        return [random.random() for _ in prompts]\n"
        "textrl.register('test/Shaky-v0', Shaky)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "shaky", raising=False)
    assert cli.main(["doctor", "shaky:test/Shaky-v0"]) == 1
    assert "FAULT score determinism: score is" in capsys.readouterr().out
    del gym.registry["test/Shaky-v0"]
    assert "test/Shaky-v0" not in registered()
    assert cli.main(["doctor", "textrl/Nothing-v0"]) == 2
    assert cli.main(["doctor", ID, "--model", "no/such"]) == 2
    assert capsys.readouterr().err.count("\n") == 2


def test_a_model_with_another_tokenizer_is_a_fault(tmp_path, capsys):
    other = textrl.symbol_tokenizer("xyz")
    small_model(4, 8).save_pretrained(tmp_path / "model")
    other.save_pretrained(tmp_path / "model")
    assert cli.main(["doctor", "textrl/Copy-v0", "--model", str(tmp_path / "model")]) == 1
    said = capsys.readouterr().out
    assert "FAULT tokenizer: model" in said and "saved with another tokenizer (4 tokens)" in said
