"""Wrong arguments from Python, one for each place: a `ValueError` of one line that names the argument."""

import dataclasses
import math

import datasets
import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

import textrl
from textrl.agents import DPO, PPO, SFT, ReST
from textrl.drawing import Sampling
from textrl.envs.arithmetic import Arithmetic
from textrl.envs.bandit import Bandit
from textrl.envs.brackets import Brackets
from textrl.envs.copy import Copy
from textrl.envs.random_walk import RandomWalk
from textrl.models import small_model
from textrl.returns import discounted_returns, gae, leave_one_out, masked_mean
from textrl.reward_training import RewardModelConfig, train_reward_model
from textrl.rewards import RewardModel, weighted_sum

nan = math.nan


@pytest.fixture(scope="module")
def task():
    return gym.make("textrl/Copy-v0", length=1).unwrapped.task


@pytest.fixture(scope="module")
def reference(task):
    return textrl.tabular_model(task)


@pytest.fixture(scope="module")
def scorer(task):
    lm = PPO(textrl.TextEnv(task), device="cpu").model
    return RewardModel.from_language_model(lm, task.tokenizer)


def pairs(**change):
    row = {"prompt": "a", "chosen": "a", "rejected": "b", **change}
    return datasets.Dataset.from_list([row])


def one(prompts, completions):
    return [1.0] * len(prompts)


def refused(message, call):
    with pytest.raises(ValueError) as caught:
        call()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("rewards", "message"),
    [
        (None, "rewards must be a list of functions with their weights"),
        ([], "rewards must be a list"),
        ([one], "rewards[0] must be a function and its weight"),
        ([(one, 1.0), (one, nan)], "rewards[1] must be"),
        ([(one, "1")], "rewards[0] must be"),
        ([(5, 1.0)], "rewards[0] must be"),
    ],
)
def test_weighted_sum(rewards, message):
    refused(message, lambda: weighted_sum(rewards))


def test_what_a_part_of_a_weighted_sum_returns():
    texts = ["a", "b"]
    for given in (1.0, [1.0], np.ones((2, 1)), [[1.0], [1.0, 2.0]], None):
        total = weighted_sum([(lambda **k: [1.0, 2.0], 1.0), (lambda given=given, **k: given, 1.0)])
        refused("what rewards[1] returns must be a list of 2 numbers", lambda total=total: total(texts, texts))
    for given in ([1.0, None], torch.tensor([1.0, 0.0]), np.array([1, 0])):  # None: no opinion
        assert weighted_sum([(lambda given=given, **k: given, 2.0), (lambda **k: (1, 1), 1.0)])(texts, texts) == [
            3.0,
            1.0,
        ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": None}, "model must be a sequence classifier with one label, and of a decoder"),
        ({"model": torch.nn.Linear(2, 2)}, "model must be a sequence classifier"),
        ({"tokenizer": None}, "tokenizer must be a tokenizer with an end-of-sequence token"),
        ({"max_length": 0}, "max_length must be a whole number of at least 3; got 0"),
        ({"tokens_at_once": "x"}, "tokens_at_once must be a whole number of at least 1; got 'x'"),
    ],
)
def test_reward_models(change, message, scorer):
    refused(message, lambda: RewardModel(**{"model": scorer.model, "tokenizer": scorer.tokenizer, **change}))


@pytest.mark.parametrize(
    ("prompts", "completions", "message"),
    [
        ("a", ["a"], "prompts must be a list of texts; got 'a'"),
        (["a"], [None], "completions must be a list of texts"),
        (["a"], ["a", "b"], "completions must be as many as prompts, 1; got 2"),
        (["a"], ["?"], "text has what the tokenizer does not know"),
    ],
)
def test_what_a_reward_model_scores(prompts, completions, message, scorer):
    refused(message, lambda: scorer(prompts, completions))


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        (None, {}, "pairs must be a datasets.Dataset"),
        (pairs(chosen=1), {}, "pairs row 0, column 'chosen' must be a text; got 1"),
        (pairs(group="x"), {}, "pairs row 0, column 'group' must be a whole number of at most 64 bits; got 'x'"),
        (pairs(), {"config": 5}, "config must be a RewardModelConfig; got int"),
        (pairs(), {"log_dir": ""}, "log_dir must be a path; got ''"),
        (pairs(), {"log_dir": "x", "keep": "x"}, "keep must be a whole number; got 'x'"),
    ],
)
def test_training_of_a_reward_model(given, options, message, scorer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(message, lambda: train_reward_model(scorer, given, **options))
    refused("reward_model must be a RewardModel; got 'x'", lambda: train_reward_model("x", given, **options))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "value"),
    [("learning_rate", "x"), ("batch_size", 1.5), ("epochs", 0), ("seed", -1), ("max_grad_norm", nan)],
)
def test_settings_of_reward_model_training(name, value):
    refused(f"{name} must be", lambda: RewardModelConfig(**{name: value}))


def test_exact_answers(task, reference):
    refused("model or reference must be a language model", lambda: textrl.solve(task, 5, 0.1))
    refused("model must be a language model; got None", lambda: textrl.exact_gradient(task, None))
    refused("task must be an instance of a subclass of textrl.Task", lambda: textrl.tabular_model(None))
    refused("std must be a number; got 'x'", lambda: textrl.tabular_model(task, std="x"))
    refused("std must be a finite number from 0 up; got nan", lambda: textrl.tabular_model(task, std=nan))
    refused("seed must be at least 0; got -1", lambda: textrl.tabular_model(task, seed=-1))
    solution = textrl.solve(task)
    refused("response has text that the tokenizer does not know: '?'", lambda: solution.logits("a", "?"))
    refused("response must be a text or token ids; got None", lambda: solution.logits("a", None))


def test_environments(task, reference):
    env = textrl.TextEnv(task, reference=reference, kl_coef=0.1)
    for seed in (-1, 1.5, "x"):
        refused("seed must be None or a whole number from 0", lambda seed=seed: env.reset(seed=seed))
    assert env.reset(seed=np.int64(3))[0].tolist() == env.reset(seed=3)[0].tolist()
    refused("snapshot must be what `snapshot` gave; got None", lambda: env.restore(None))
    narrow = torch.zeros(1, task.vocab_size - 1)
    for policy in (
        5,
        lambda x: None,
        lambda x: "x",
        lambda x: torch.zeros(5),
        lambda x: torch.zeros(2, 5),
        lambda x: narrow,
    ):
        env.policy = policy
        env.reset(seed=0)
        refused("policy must be a function", lambda: env.step(1))
    wide = torch.tensor([[0.0] * task.vocab_size + [9.0]])  # a vocabulary padded beyond the tokenizer's
    paid = []
    for logits in (wide, wide[:, :-1]):
        env.policy = lambda x, logits=logits: logits
        env.reset(seed=0)
        paid.append(env.step(1)[-1]["kl"])
    assert paid[0] == paid[1]
    refused("options must be a dict or None; got 5", lambda: textrl.TextVectorEnv(task, 2).reset(options=5))
    refused("length must be from 1 to 1,000", lambda: gym.make("textrl/Copy-v0", length=10**9))


def test_tokenizers_and_numbers():
    refused("symbols must be different, non-empty strings", lambda: textrl.symbol_tokenizer(["\ud800"]))
    refused("top_k must be a whole number", lambda: Sampling(top_k=1.5))
    refused("temperature must be a number; got 'x'", lambda: Sampling(temperature="x"))


def test_mathematics():
    x, mask = torch.ones(2, 3), torch.ones(2, 3, dtype=torch.bool)
    refused("rewards and values and mask must have one shape", lambda: gae(x, x[:, :2], mask))
    refused("x and mask must have one shape; got [(2, 3), (1, 1)]", lambda: masked_mean(x, mask[:1, :1]))
    refused("x and mask must be tensors", lambda: masked_mean(x.numpy(), mask.numpy()))
    refused("rewards must be floats and mask bools, (B, T)", lambda: gae(x.long(), x, mask))
    refused("rewards must be floats and mask bools, (B, T)", lambda: discounted_returns(x, mask.float()))
    refused("gamma must be from 0 to 1; got nan", lambda: gae(x, x, mask, gamma=nan))
    refused("gae_lambda must be from 0 to 1; got -1", lambda: gae(x, x, mask, gae_lambda=-1))
    for size, score in ((2, torch.ones(5)), (1, torch.ones(4)), (0, torch.ones(4))):
        refused("group_size must be at least 2 and divide the scores", lambda k=size, s=score: leave_one_out(s, k))


def test_what_is_collected(task, tmp_path):
    env = textrl.TextEnv(task)
    refused("episodes must be a whole number; got 1.5", lambda: textrl.collect(env, "x", 1.5, tmp_path / "a"))
    refused("seed must be a whole number; got None", lambda: textrl.collect(env, "x", 1, tmp_path / "a", seed=None))
    refused("num_envs must be a whole number", lambda: textrl.TextVectorEnv(task, 10**20))
    refused("id must be a text", lambda: textrl.register(5, type(task)))
    masks = np.zeros((1, task.vocab_size), bool)
    observation = env.reset(seed=0)[0]
    refused("action_masks must be", lambda: PPO(env, device="cpu").predict(observation, action_masks=masks[0]))


def test_few_texts_for_a_reward_model(scorer):
    refused("completions must be at least two texts", lambda: scorer.standardise(["a"], ["b"]))
    refused(
        "a list of dicts or a file, with at least one row; got Dataset", lambda: scorer.accuracy(pairs().select([]))
    )
    assert scorer([], []) == []


def test_registered_again():
    def horizon():
        return gym.make("test/Again-v0").unwrapped.task.max_new_tokens

    for length in (2, 3):
        textrl.register("test/Again-v0", "textrl.envs.vowels:Vowels", length=length)
        assert horizon() == length
    refused("is registered already", lambda: textrl.register("test/Again-v0", "textrl.envs.copy:Copy"))
    refused('task must be a subclass of textrl.Task or "module:Class"', lambda: gym.make("textrl/Copy-v0", task=5))
    refused("'math:pi' is 3.14", lambda: gym.make("textrl/Copy-v0", task="math:pi"))
    textrl.registration.register_built_in()
    assert horizon() == 3


def test_agents(task):
    env = textrl.TextEnv(task)
    agent = PPO(env, device="cpu")
    refused("temperature must be a number above 0; got 0", lambda: agent.generate(["a"], temperature=0))
    refused("log_dir must be a path; got ''", lambda: agent.learn(10, log_dir=""))
    refused("log_dir must be a folder, or the name of a new one; got", lambda: agent.learn(10, log_dir=__file__))
    refused("a RewardModel or a scalar model; got 5", lambda: PPO(env, critic=5, device="cpu"))
    refused("quantiles must be a tuple of numbers", lambda: ReST(env, quantiles="x", device="cpu"))
    for cls in (SFT, DPO):
        refused("dataset must be given", lambda cls=cls: cls(env, device="cpu").learn(10))


class Silent(textrl.Agent):
    def update(self, rollout):
        pass


def test_an_update_that_returns_nothing_is_named(task):
    with pytest.raises(ValueError, match=r"Silent.update must return a dict of numbers by their names; got None"):
        Silent(textrl.TextEnv(task), device="cpu").learn(5)


def test_numbers_of_numpy_are_numbers(task, tmp_path):
    env = textrl.TextEnv(task)
    numbers = {"seed": np.int64(3), "batch_size": np.int32(4), "learning_rate": np.float64(0.5)}
    agent = PPO(env, device="cpu", **numbers)
    agent.save(tmp_path / "agent")
    config = PPO.load(tmp_path / "agent", env).config
    assert (config.seed, config.batch_size, config.learning_rate) == (3, 4, 0.5)
    assert {type(getattr(agent.config, name)) for name in numbers} == {int, float}
    assert torch.equal(
        textrl.tabular_model(task, std=1.0, seed=np.int64(2)).lm_head.weight,
        textrl.tabular_model(task, std=1.0, seed=2).lm_head.weight,
    )


def test_a_tensor_of_one_number_is_a_score():
    task = gym.make(
        "textrl/Text-v0", tokenizer=textrl.symbol_tokenizer("ab"), prompts=["a"], max_new_tokens=2,
        reward=lambda completions: [torch.tensor(0.5) for _ in completions],
    ).unwrapped.task  # fmt: skip
    assert task.evaluate([{"prompt": "a"}] * 2, [[1, 0], [0]]).totals.tolist() == [0.5, 0.5]


def test_a_tokenizer_with_gaps_in_its_ids_is_refused():
    backend = Tokenizer(models.WordLevel({"<end>": 0, "a": 1, "b": 3}))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")
    with pytest.raises(ValueError, match=r"tokenizer must be one of 3 tokens with the ids 0 to 2; got 'ids up to 3'"):
        textrl.Task(tokenizer=tokenizer, max_new_tokens=2)


@pytest.mark.parametrize(
    "columns", [None, [1.0], {"a": 1.0}, {3: [1.0]}, {"a": np.ones((1, 2))}, {"score": [1.0]}, {"a": [{}]}], ids=str
)
def test_describe_must_give_columns(columns):
    wrong = type("Wrong", (Copy,), {"describe": lambda self, **_: columns})()
    for env in (textrl.TextEnv(wrong), textrl.TextVectorEnv(wrong, 1)):
        env.reset(seed=0)
        with pytest.raises(ValueError, match="describe must"):
            env.step(0 if isinstance(env, textrl.TextEnv) else np.array([0]))


def test_columns_that_come_and_go_are_refused():
    class Changing(Copy):
        deterministic = True

        def describe(self, prompts, completions, **columns):
            return {"long" if len(completions[0]) > 1 else "short": [1.0] * len(prompts)}

        def score(self, prompts, completions, **columns):
            return [0.0] * len(prompts)

    envs = textrl.TextVectorEnv(Changing(length=1), 1, autoreset_mode=AutoresetMode.SAME_STEP)
    envs.reset(seed=0)
    envs.step(np.array([0]))
    envs.step(np.array([1]))
    with pytest.raises(ValueError, match=r"describe must give the same columns of every response; \['long', 'short'\]"):
        envs.step(np.array([1]))


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (Brackets, {"depth": 30, "length": 30}, "depth must be from 1 to 13; got 30"),
        (Arithmetic, {"largest": 10_000}, "largest must be from 0 to 99; got 10000"),
        (RandomWalk, {"edges": -1}, "edges must be at least 0; got -1"),
        (RandomWalk, {"seed": -2}, "seed must be at least 0; got -2"),
        (Bandit, {"payoffs": "ab"}, "payoffs must be finite numbers; got 'ab'"),
        (Bandit, {"payoffs": [float("nan")]}, "payoffs must be finite numbers"),
    ],
)
def test_environments_name_the_argument_that_is_wrong(kind, settings, message):
    with pytest.raises(ValueError, match=message):
        kind(**settings)


def test_a_coefficient_may_be_a_number_of_numpy():
    task = Copy()
    model = small_model(task.vocab_size, 10)
    assert textrl.TextEnv(task, reference=model, kl_coef=np.float32(0.5)).kl_coef == 0.5
    with pytest.raises(ValueError, match="kl_coef must be a number of at least 0; got True"):
        textrl.TextEnv(task, reference=model, kl_coef=True)


@pytest.mark.parametrize("logit", [-np.inf, np.nan])
def test_a_policy_that_says_what_it_cannot_is_named(logit):
    task = Copy()
    logits = np.zeros((1, task.vocab_size), dtype=np.float32)
    logits[0, 2] = logit
    env = textrl.TextEnv(task, reference=small_model(task.vocab_size, 10), kl_coef=0.0)
    env.policy = lambda observations: logits
    env.reset(seed=0)
    with pytest.raises(ValueError, match="policy must be a function whose logits give the token taken, 2, a finite"):
        env.step(2)


def test_settings_of_ones_own_are_checked_whether_annotations_are_postponed_or_not():
    space = {"dataclass": dataclasses.dataclass, "AgentConfig": textrl.AgentConfig}
    fields = "    decay: float = 0.5\n    on: bool | None = None\n"
    text = f"@dataclass(frozen=True, kw_only=True)\nclass Mine(AgentConfig):\n{fields}"
    exec(compile(text, "mine", "exec", dont_inherit=True), space)
    for wrong, message in (({"decay": "a"}, "decay must be a number; got 'a'"), ({"on": "no"}, "on must be True or")):
        with pytest.raises(ValueError, match=message):
            space["Mine"](**wrong)


def test_what_is_loaded_late_is_listed():
    assert {"Agent", "solve", "agents"} <= set(dir(textrl))
    assert "_logits" not in repr(textrl.solve(Copy(length=1)))


class Half(textrl.Task):
    """A task whose author has forgotten what `missing` says."""

    def __init__(self, missing):
        if missing != "super().__init__(tokenizer=":
            super().__init__(tokenizer=textrl.symbol_tokenizer("ab"), max_new_tokens=2)


class Scored(Half):
    def score(self, prompts, completions, **columns):
        return [0.0] * len(prompts)


class Sampled(Half):
    def sample(self, rng):
        return {"prompt": ""}


class Both(Scored, Sampled):
    pass


@pytest.mark.parametrize(
    ("kind", "missing"), [(Both, "super().__init__(tokenizer="), (Sampled, "score("), (Scored, "prompts() or sample(")]
)
@pytest.mark.parametrize("made", [textrl.TextEnv, lambda task: textrl.TextVectorEnv(task, 2), textrl.solve])
def test_a_task_that_is_not_whole_is_refused_where_it_enters(kind, missing, made):
    word = "call" if "super" in missing else "define"
    refused(f"task {kind.__name__} must {word} {missing}", lambda: made(kind(missing)))


def test_device_and_dtype_may_be_torchs_own():
    agent = PPO(gym.make("textrl/Copy-v0"), device=torch.device("cpu"), dtype=torch.float32)
    assert (agent.config.device, agent.config.dtype) == ("cpu", "float32")
    refused("or a device torch has; got 'float32'", lambda: PPO(gym.make("textrl/Copy-v0"), device=torch.float32))


def test_a_task_may_have_its_functions_on_itself():
    task = Half("")
    task.score = lambda prompts, completions, **columns: [1.0] * len(prompts)
    task.prompts = lambda: [{"prompt": "a"}]
    assert textrl.solve(task).score == 1


class Bare(textrl.Agent):
    """Forgets what makes an agent."""

    def __init__(self, env):
        self.env = env

    def update(self, rollout):
        return {}


def test_an_agent_that_forgets_to_be_made_is_told(task):
    refused("agent Bare must call super().__init__(env, model, config, **settings)", lambda: Bare(task).learn(10))


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (lambda logprobs: logprobs.mean(), "; got tensor("),
        (lambda logprobs: (logprobs, {}), "got a tensor of shape (4, 2)"),
        (lambda logprobs: (logprobs.mean().detach(), {}), "got a tensor of shape () without a gradient"),
        (lambda logprobs: (logprobs.mean(), None), "; got (tensor("),
        (lambda logprobs: None, "got None"),
    ],
)
def test_a_loss_that_is_none_is_told(found, message, task):
    agent = PPO(textrl.TextEnv(task), batch_size=4, device="cpu")
    rollout = agent.collect()
    with pytest.raises(ValueError) as caught:
        agent.minimise(lambda batch: found(agent.logprobs(batch)), rollout)
    assert "loss must be a function of a batch that gives (mean, numbers)" in str(caught.value)
    assert message in str(caught.value)


def test_a_model_is_no_policy_of_an_environment(task, reference):
    env = textrl.TextEnv(task, reference=reference, kl_coef=0.1)
    env.policy = reference
    env.reset(seed=0)
    refused("policy must be a function observations (B, L) -> logits (B, V); textrl.policy.Causal", lambda: env.step(1))


def test_one_observation_is_acted_on_alone(task):
    agent = PPO(textrl.TextEnv(task), device="cpu")
    observation, _ = agent.env.reset(seed=0)
    assert np.ndim(agent.act(observation)) == 0
    assert agent.act(observation[None]).shape == (1,)
    refused("observation must be integer token ids", lambda: agent.act(observation / 2))


def test_what_was_typed_is_what_is_named(task):
    agent = PPO(textrl.TextEnv(task), device="cpu")
    refused("deterministic must be True or False", lambda: agent.generate(["a"], deterministic=1))
    refused("total_timesteps must be a number or None", lambda: agent.learn("100"))
    refused('critic must be "separate", "shared", a RewardModel or a scalar', lambda: PPO(agent.env, critic="folder"))
    refused("task must be an instance of a subclass", lambda: textrl.exact_gradient("task", textrl.tabular_model(task)))
    row = {"prompt": "a", "chosen": "a", "rejected": "?"}
    refused("dataset row 0, rejected has text that the tokenizer does not know", lambda: DPO(agent.env, dataset=[row]))
