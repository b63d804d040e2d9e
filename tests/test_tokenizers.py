"""A policy, a critic and a reward model with a tokenizer each."""

import copy
import json
import warnings

import gymnasium as gym
import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import textrl
import textrl.wrappers
from textrl import cli
from textrl.agents import DPO, PPO, SFT
from textrl.codec import Codec
from textrl.models import small_model
from textrl.offline import given_rollout
from textrl.policy import values_at
from textrl.reward_training import pairs_of
from textrl.rewards import RewardModel
from textrl.scalars import value_model
from textrl.textcritic import TextCritic, same_tokenizer


class Pairs(textrl.Task):
    """How often "ab" comes."""

    def __init__(self, score=None):
        super().__init__(tokenizer=textrl.symbol_tokenizer("abc"), max_new_tokens=4)
        self._score = score

    def prompts(self):
        return [{"prompt": "a"}, {"prompt": ""}]

    def score(self, prompts, completions, **columns):
        return self._score(prompts=prompts, completions=completions) if self._score else [0.0] * len(prompts)


def merging_tokenizer():
    """Says "ab" as one token, and letters by other ids than the task's."""
    vocab = {"<end>": 0, "c": 1, "b": 2, "a": 3, "ab": 4}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[("a", "b")]))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", bos_token="<end>")


def loud_critic(vocab):
    """A scalar model that says something else after every text."""
    critic = value_model(small_model(vocab, 12, seed=1), seed=2, std=1.0)
    with torch.no_grad():
        for parameter in critic.transformer.parameters():
            if parameter.ndim > 1:
                parameter.mul_(10)
    return critic


def rollout_of(task, responses):
    return given_rollout(task, [[0, 1]] * len(responses), responses, torch.device("cpu"))


def test_a_critic_reads_the_text_so_far_with_its_own_tokens():
    task, model = Pairs(), loud_critic(5)
    critic = TextCritic(model, merging_tokenizer(), task)
    found = critic(rollout_of(task, [[2, 3, 1, 2], [1, 0]]))  # "a" + "bcab", "a" + "a"

    @torch.no_grad()
    def alone(*ids):
        """What the critic says at the end of a text of its own tokens."""
        return float(values_at(model, torch.tensor([ids]), torch.tensor([0]), torch.tensor([len(ids) - 1])))

    # before each token the text is a, ab, abc, abca; in the critic's words, the begin token first
    expected = [[alone(0, 3), alone(0, 4), alone(0, 4, 1), alone(0, 4, 1, 3)], [alone(0, 3), alone(0, 3, 3)]]
    assert found[0].tolist() == pytest.approx(expected[0], abs=1e-5)
    assert found[1, :2].tolist() == pytest.approx(expected[1], abs=1e-5)
    assert found[1, 2:].tolist() == [0, 0]
    assert len({round(value, 3) for value in expected[0]}) == 4


def test_a_text_longer_than_the_critic_reads_loses_its_beginning():
    model = loud_critic(5)
    model.config.n_positions = 3
    critic = TextCritic(model, merging_tokenizer(), Pairs())
    found = critic(rollout_of(Pairs(), [[2, 3, 1, 2]]))[0]  # a, ab, abc, abca
    texts = torch.tensor([[0, 3, 0], [0, 4, 0], [0, 4, 1], [0, 1, 3]])
    with torch.no_grad():
        expected = values_at(model, texts, torch.arange(4), torch.tensor([1, 1, 2, 2]))
    torch.testing.assert_close(found.detach(), expected)


def test_a_critics_value_does_not_depend_on_what_comes_next():
    task = Pairs()
    critic = TextCritic(loud_critic(5), merging_tokenizer(), task)
    first = critic(rollout_of(task, [[token, 0] for token in (1, 2, 3)]))[:, 0]  # "a" and then "a", "b" ("ab") or "c"
    assert first.detach().tolist() == pytest.approx([float(first[0].detach())] * 3)


def test_the_critic_of_ppo_keeps_the_reward_models_tokenizer(tmp_path):
    tokenizer = merging_tokenizer()
    scorer = RewardModel(loud_critic(5), tokenizer)
    env = textrl.TextEnv(Pairs(scorer))
    settings = {"batch_size": 32, "learning_rate": 1e-2, "clip_value": 0.0, "device": "cpu"}
    agent = PPO(env, small_model(4, 8), critic=scorer, **settings)
    assert isinstance(agent.value, TextCritic)
    assert agent.critic.config.vocab_size == 5
    start = copy.deepcopy(agent.critic.state_dict())
    rollout = agent.collect()
    explained = [agent.update(rollout)["explained_variance"] for _ in range(12)]
    assert explained[0] == pytest.approx(0, abs=1e-6), "its head starts at zero"
    assert explained[-1] > 0.15, "it learns what its texts are worth, as far as the text so far says"
    assert any(not torch.equal(start[name], weight) for name, weight in agent.critic.state_dict().items())
    agent.save(tmp_path / "agent")
    for given in ({}, {"critic": scorer}):
        again = PPO.load(tmp_path / "agent", env, **given)
        assert isinstance(again.value, TextCritic)
        assert torch.equal(again.value(rollout), agent.value(rollout))
    with pytest.raises(ValueError, match=r"holds an agent whose critic has a tokenizer of its own: give critic=$"):
        PPO.load(tmp_path / "agent", env, critic=small_model(4, 8))
    shared = PPO(env, small_model(4, 8), critic=RewardModel(loud_critic(4), env.task.tokenizer), device="cpu")
    assert not isinstance(shared.value, TextCritic)


def test_a_reward_model_with_another_tokenizer_gets_text():
    scorer = RewardModel(loud_critic(5), merging_tokenizer())
    env = textrl.TextEnv(Pairs(scorer))
    agent = PPO(env, small_model(4, 8), batch_size=16, device="cpu")
    rollout = agent.collect()
    prompts = [row["prompt"] for row in rollout.rows]
    assert rollout.scores.tolist() == pytest.approx(scorer(prompts, rollout.completions), abs=1e-5)
    assert scorer.encode(["abc"]) == [[0, 4, 1, 0]]


def test_tokenizers_are_compared_by_what_they_do():
    assert same_tokenizer(textrl.symbol_tokenizer("abc"), textrl.symbol_tokenizer("abc"))
    assert not same_tokenizer(textrl.symbol_tokenizer("abc"), textrl.symbol_tokenizer("acb"))
    assert not same_tokenizer(textrl.symbol_tokenizer("abc"), merging_tokenizer())


CHAT = "{% for m in messages %}<start>{{ m.role }}\n{{ m.content }}<end>{% endfor %}<start>assistant\n"


def chat_tokenizer():
    """Bytes, and special tokens for turns; the template writes no begin token."""
    backend = Tokenizer(
        models.BPE(vocab={c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[])
    )
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="<end>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<start>"]})
    tokenizer.chat_template = CHAT
    return tokenizer


@pytest.mark.parametrize("begin", ["", "<s>"])
def test_what_a_chat_template_wrote_is_read_as_it_means_it(begin):
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = begin + CHAT
    messages = [{"role": "user", "content": "hi"}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False)
    right = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    settings = {"tokenizer": tokenizer, "prompts": [prompt], "reward": lambda completions: [0.0] * len(completions)}
    env = gym.make("textrl/Text-v0", **settings, special_tokens=True, max_new_tokens=8)
    observation, _ = env.reset()
    assert observation[observation != len(tokenizer)].tolist() == right
    pairs = [{"prompt": prompt, "chosen": "<end>", "rejected": "no"}]
    given, both, _ = DPO(env, dataset=pairs, device="cpu")._pairs[0]
    assert given == right and both[0] == [
        *tokenizer("<end>", split_special_tokens=True)["input_ids"],
        tokenizer.eos_token_id,
    ]
    scorer = RewardModel.from_language_model(small_model(len(tokenizer), 64), tokenizer, special_tokens=True)
    bos = [tokenizer.bos_token_id]
    assert scorer.encode([prompt + "yo"])[0] == [
        *bos,
        *right[len(begin) // 3 :],
        *tokenizer("yo")["input_ids"],
        tokenizer.eos_token_id,
    ]
    with pytest.warns(
        UserWarning, match="prompts have special tokens written out .*, which are read as text; special_tokens"
    ):
        observation, _ = gym.make("textrl/Text-v0", **settings, max_new_tokens=8).reset()
    assert (observation != len(tokenizer)).sum() > len(right) + 5


def spaced_tokenizer():
    """As SentencePiece's: a word's space is the beginning of its token, and a text that is decoded loses the first."""
    words = [
        "<s>",
        "</s>",
        "<unk>",
        "\u2581the",
        "\u2581movie",
        "\u2581was",
        "\u2581good",
        "s",
        "\u2581a",
        "\u2581",
        *"themovigwasd",
    ]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(dict.fromkeys(words))}, unk_token="<unk>"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def saved(folder, letters):
    small_model(len(letters) + 1, 64).save_pretrained(folder)
    textrl.symbol_tokenizer(letters).save_pretrained(folder)
    return str(folder)


def test_a_named_reference_or_model_brings_its_tokenizer(tmp_path, capsys, monkeypatch):
    model = saved(tmp_path / "model", "xyz ")
    for make in (gym.make, gym.make_vec):
        env = make("textrl/Text-v0", prompts=["x y"], reference=model, kl_coef=0.1)
        assert len(env.unwrapped.task.tokenizer) == 5
        assert env.unwrapped.reference is not None
    (tmp_path / "p.jsonl").write_text('{"prompt": "x"}\n')
    flags = ["--prompts", str(tmp_path / "p.jsonl"), "--env-arg", "max_new_tokens=4", "--batch-size", "4"]
    run = ["train", "reinforce", "--env", "textrl/Text-v0", "--model", model, "--quiet", "--total-timesteps", "1e1"]
    assert cli.main([*run, *flags, "--log-dir", str(tmp_path / "run")]) == 0
    told = json.loads((tmp_path / "run/run.json").read_text())
    assert told["env_kwargs"]["tokenizer"] == model and told["total_timesteps"] == 10
    assert cli.main(["evaluate", str(tmp_path / "run"), "--episodes", "4"]) == 0
    monkeypatch.chdir(tmp_path)  # what is named by a relative path is found from elsewhere too
    relative = [
        *run,
        "--env-arg",
        "prompts=p.jsonl",
        "--env-arg",
        "tokenizer=model",
        *flags[2:],
        "--log-dir",
        "relative",
    ]
    assert cli.main(relative) == 0
    monkeypatch.chdir("/")
    assert cli.main(["evaluate", str(tmp_path / "relative"), "--episodes", "4"]) == 0
    assert "warning" not in capsys.readouterr().err
    both = [*run, *flags, "--reference", model, "--log-dir", str(tmp_path / "both")]
    assert cli.main(both) == 0
    assert json.loads((tmp_path / "both/run.json").read_text())["env_kwargs"]["kl_coef"] == 0.1


def test_what_is_saved_tells_transformers_where_a_response_ends(tmp_path):
    tokenizer = chat_tokenizer()
    model = small_model(len(tokenizer), 32)
    model.config.eos_token_id, model.generation_config.eos_token_id = 3, [3, 4]
    env = gym.make("textrl/Text-v0", tokenizer=tokenizer, prompts=["a"], max_new_tokens=4)
    SFT(env, model, dataset=[{"prompt": "a", "completion": "b"}]).save(tmp_path / "agent")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "agent")
    assert saved.generation_config.eos_token_id == saved.config.eos_token_id == tokenizer.eos_token_id
    assert model.config.eos_token_id == 3 and model.generation_config.eos_token_id == [3, 4]
    model.generation_config.eos_token_id = [3, tokenizer.eos_token_id]
    SFT(env, model, dataset=[{"prompt": "a", "completion": "b"}]).save(tmp_path / "agent")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "agent")
    assert saved.generation_config.eos_token_id == [3, tokenizer.eos_token_id]


def test_a_model_that_was_saved_with_another_tokenizer_is_warned_of(tmp_path):
    env = gym.make("textrl/Text-v0", tokenizer=textrl.symbol_tokenizer("xyz"), prompts=["x"], max_new_tokens=4)
    with pytest.warns(
        UserWarning, match=r"model .* was saved with another tokenizer \(5 tokens\) than the task's \(4\): texts are"
    ):
        PPO(env, saved(tmp_path / "model", "xyz "), device="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PPO(env, saved(tmp_path / "same", "xyz"), device="cpu")


def test_a_letter_without_a_space_of_its_own_hides_nothing():
    """Where "a" is the two tokens of a space and a letter, the letter alone says nothing of spaces."""
    words = ["<s>", "</s>", "<unk>", "\u2581the", "\u2581movie", "\u2581", "a"]
    backend = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [], unk_token="<unk>"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    assert tokenizer("a")["input_ids"] == [5, 6]
    assert Codec(tokenizer).decode([[4], [3, 4], [6]]) == [" movie", " the movie", "a"]
    assert Codec(tokenizer).decode([[3, 4]], alone=True) == ["the movie"]


def test_a_response_keeps_the_space_that_it_begins_with():
    tokenizer, seen = spaced_tokenizer(), []

    def reward(prompts, completions):
        seen.extend(p + c for p, c in zip(prompts, completions, strict=True))
        return [0.0] * len(prompts)

    env = gym.make("textrl/Text-v0", tokenizer=tokenizer, prompts=["the movie"], reward=reward, max_new_tokens=3)
    for actions, text in (((5, 6, 1), "the movie was good"), ((7, 5, 6), "the movies was good"), ((1,), "the movie")):
        env.reset()
        for action in actions:
            _, _, ended, _, info = env.step(action)
        assert ended and info["text"] == seen[-1] == text
    assert env.unwrapped.task.decode([[3, 4, 5]], alone=True) == ["the movie was"]
    assert textrl.wrappers.TextObservation(env).reset()[0] == "the movie"


def test_a_word_of_any_script_keeps_the_space_before_it():
    pieces = ["[UNK]", "[END]", "film", "was", "very"]
    backend = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.WordPiece()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="[END]", unk_token="[UNK]")
    assert Codec(tokenizer).decode([[3, 4]]) == [" was very"]


def words():
    backend = Tokenizer(models.WordLevel({"<eos>": 0, "the": 1, "movie": 2, "<unk>": 3}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", unk_token="<unk>")


def unigram():
    pieces = ["<s>", "</s>", "<unk>", *"\u2581</s>themovi"]
    backend = Tokenizer(models.Unigram([(piece, -1.0) for piece in dict.fromkeys(pieces)], unk_id=2))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("tokenizer", [words(), unigram()], ids=["words", "unigram"])
def test_special_tokens_in_a_prompt_are_text_for_vocabularies_that_hold_them_as_words(tokenizer):
    """`split_special_tokens` alone does not keep such tokenizers from finding them."""
    end, prompt = tokenizer.eos_token_id, f"the {tokenizer.eos_token} movie"
    assert end in tokenizer(prompt, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    for special in (False, True):
        options = {"tokenizer": tokenizer, "reward": lambda completions: [0.0] * len(completions)}
        env = gym.make("textrl/Text-v0", prompts=[prompt], max_new_tokens=3, special_tokens=special, **options)
        ids = env.reset(seed=0)[0].tolist()
        assert (end in ids) == special
        scorer = RewardModel.from_language_model(small_model(len(tokenizer), 64), tokenizer, special_tokens=special)
        assert (end in scorer.encode([prompt])[0][:-1]) == special


USER, GOOD, BAD = ({"role": r, "content": c} for r, c in (("user", "ab"), ("assistant", "cd"), ("assistant", "ef")))


def chat_env(special_tokens=True):
    options = {"tokenizer": chat_tokenizer(), "prompts": ["a"], "reward": lambda completions: [0.0] * len(completions)}
    return gym.make("textrl/Text-v0", max_new_tokens=9, max_prompt_tokens=60, special_tokens=special_tokens, **options)


def test_chats_of_pairs_are_read_alike_from_files_lists_and_the_command_line(tmp_path):
    rows = [{"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}]
    whole = [{"chosen": [USER, GOOD], "rejected": [USER, BAD]}]
    file = tmp_path / "chat.json"
    file.write_text(json.dumps(rows))
    env = chat_env()
    task = env.unwrapped.task
    sources = (file, DPO.read_dataset(file, False, task), rows, Dataset.from_list(rows), whole)
    (prompt, (chosen, rejected), _), *others = [pair for source in sources for pair in DPO(env, dataset=source)._pairs]
    assert others == [(prompt, [chosen, rejected], None)] * 4
    assert prompt == task.tokenizer.apply_chat_template([USER], add_generation_prompt=True, return_dict=False)
    assert task.decode([chosen, rejected]) == ["cd", "ef"]
    assert chosen[-1] == rejected[-1] == task.eos_token_id


def test_a_reward_model_learns_from_chats_in_lists():
    reward_model = RewardModel.from_language_model(small_model(259, 64), chat_tokenizer(), special_tokens=True)
    (row,) = pairs_of([{"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}], reward_model)
    prompt = reward_model.tokenizer.apply_chat_template([USER], tokenize=False)
    assert row == {"prompt": prompt, "chosen": "cd", "rejected": "ef"}


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [USER, GOOD]},
        {"messages": [USER, GOOD], "prompt": "ab"},
        {"prompt": [USER], "completion": [GOOD]},
        {"prompt": "ab", "completion": [GOOD]},
        {"prompt": [USER], "completion": "cd"},
    ],
)
def test_supervised_fine_tuning_takes_chats(row):
    env = chat_env()
    task = env.unwrapped.task
    ((prompt, response),) = SFT(env, dataset=[row])._examples
    assert prompt == task.tokenizer.apply_chat_template([USER], add_generation_prompt=True, return_dict=False)
    assert response == [*task.tokenizer("cd", add_special_tokens=False)["input_ids"], task.eos_token_id]


def test_the_last_message_is_what_is_learned():
    env = chat_env()
    task = env.unwrapped.task
    ((prompt, response),) = SFT(env, dataset=[{"messages": [USER, GOOD, USER, BAD]}])._examples
    before = task.tokenizer.apply_chat_template([USER, GOOD, USER], add_generation_prompt=True, return_dict=False)
    assert prompt == before
    assert task.decode([response]) == ["ef"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [USER]}, "dataset row 0, column 'messages' must end with one message of the assistant; got"),
        ({"messages": "ab"}, "dataset row 0, column 'prompt' is missing"),
        ({"messages": ["ab"]}, "dataset row 0, column 'messages' must be messages, dicts with the texts"),
        ({"prompt": [USER], "completion": None}, "dataset row 0, column 'completion' must be a text; got None"),
    ],
)
def test_what_is_no_chat_is_told(row, message):
    with pytest.raises(ValueError, match=message):
        SFT(chat_env(), dataset=[row])


def test_chats_without_special_tokens_are_dialogues_and_that_is_said():
    with pytest.warns(UserWarning, match="not by the tokenizer's chat template, whose special tokens only special_tok"):
        agent = SFT(chat_env(special_tokens=False), dataset=[{"messages": [USER, GOOD]}])
    ((prompt, response),) = agent._examples
    assert agent.task.decode([prompt, response], alone=True) == ["\n\nHuman: ab\n\nAssistant:", " cd"]
