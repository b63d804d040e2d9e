"""How a reward model is trained, and how it reads texts that are long, alike or many."""

import copy
import json
import subprocess
import sys
from subprocess import PIPE

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

import textrl
from textrl import cli
from textrl.agents import PPO
from textrl.envs.copy import Copy
from textrl.models import load_model, small_model
from textrl.reward_training import RewardModelConfig, _Training, train_reward_model
from textrl.rewards import RewardModel
from textrl.scalars import value_model


def scorer():
    """An untrained scalar model of four tokens, and its tokenizer."""
    return value_model(small_model(4, 16), seed=0, std=0.1), textrl.symbol_tokenizer("abc")


def test_the_learning_rate_falls_by_equal_steps():
    model = RewardModel.from_language_model(small_model(4, 16), textrl.symbol_tokenizer("abc"))
    pairs = Dataset.from_list([{"prompt": "", "chosen": "a", "rejected": "b"}] * 4)
    training = _Training(model, pairs, RewardModelConfig(epochs=1, batch_size=1, learning_rate=0.4))
    rates = []
    for _ in range(4):
        training.step()
        rates.append(training.optimizer.learning_rate)
    assert rates == pytest.approx([0.4, 0.3, 0.2, 0.1])


def test_pairs_are_shuffled_anew_in_every_epoch():
    model = RewardModel.from_language_model(small_model(4, 16), textrl.symbol_tokenizer("abc"))
    pairs = Dataset.from_list([{"prompt": "", "chosen": "a" * (i + 1), "rejected": "b"} for i in range(8)])
    order = np.concatenate(_Training(model, pairs, RewardModelConfig(epochs=2, batch_size=2)).batches)
    assert sorted(order[:8]) == sorted(order[8:]) == list(range(8))
    assert order[:8].tolist() != order[8:].tolist()


def test_a_text_that_is_too_long_loses_its_beginning():
    model = RewardModel.from_language_model(small_model(4, 16), textrl.symbol_tokenizer("abc"), max_length=5)
    whole, short = model.encode(["aaabc", "bc"])
    assert len(whole) == 5
    assert whole[-3:] == short[-3:]  # "bc" and the end
    assert whole[0] == short[0]


def test_a_tie_counts_half():
    model = RewardModel.from_language_model(small_model(4, 16), textrl.symbol_tokenizer("abc"))
    assert model.accuracy(Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "b"}])) == 0.5


def test_what_a_reward_model_reads_is_saved_with_it(tmp_path):
    tokenizer = textrl.symbol_tokenizer("abc")
    model = RewardModel.from_language_model(small_model(4, 16), tokenizer, max_length=7, special_tokens=True)
    model.save(tmp_path / "model")
    again = RewardModel.load(tmp_path / "model")
    assert (again.max_length, again.special_tokens) == (7, True)
    assert RewardModel.load(tmp_path / "model", max_length=9).max_length == 9
    capped = RewardModel.from_language_model(small_model(4, 16), tokenizer)
    assert capped.max_length == 16
    assert capped(["abc" * 20], ["b"]) == capped(["abc" * 30], ["b"])


def test_a_training_does_not_go_on_with_the_checkpoints_of_another(tmp_path):
    tokenizer = textrl.symbol_tokenizer("abc")
    rows = [{"prompt": "", "chosen": "a" * (i % 3 + 1), "rejected": "b"} for i in range(32)]
    pairs = Dataset.from_list(rows)
    options = {"log_dir": tmp_path / "run", "checkpoint_every": 8}
    first = RewardModel.from_language_model(small_model(4, 16), tokenizer)
    train_reward_model(first, pairs, RewardModelConfig(batch_size=8), **options)
    kept = sorted((tmp_path / "run").rglob("*"))
    second = RewardModel.from_language_model(small_model(4, 16, 1), tokenizer)
    with pytest.raises(ValueError, match=r"log_dir must be a folder without another run's checkpoints"):
        train_reward_model(second, pairs.select(range(8)), RewardModelConfig(batch_size=8), **options)
    assert sorted((tmp_path / "run").rglob("*")) == kept


def test_a_checkpoint_keeps_how_texts_are_read_and_a_copy_does_not(tmp_path):
    tokenizer = textrl.symbol_tokenizer("abc")
    scorer = RewardModel.from_language_model(small_model(4, 16), tokenizer, max_length=4, special_tokens=True)
    pairs = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}] * 8)
    train_reward_model(scorer, pairs, RewardModelConfig(batch_size=4), log_dir=tmp_path, checkpoint_every=4)
    found = RewardModel.load(tmp_path / "best")
    assert (found.max_length, found.special_tokens, found.mean, found.std) == (4, True, 0.0, 1.0)
    scorer.max_length = 5
    with pytest.raises(ValueError, match="holds a training with another options"):
        train_reward_model(
            scorer, pairs, RewardModelConfig(batch_size=4), log_dir=tmp_path, checkpoint_every=4, resume=True
        )
    fresh = RewardModel.from_language_model(found.model, tokenizer)
    assert (fresh.mean, fresh.std) == (0.0, 1.0)


def test_a_folder_of_something_else_is_neither_read_nor_written_over(tmp_path):
    tokenizer = textrl.symbol_tokenizer("abc")
    config = LlamaConfig(
        vocab_size=4, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, eos_token_id=0
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "lm")
    tokenizer.save_pretrained(tmp_path / "lm")
    with pytest.raises(ValueError, match=r"lm' has no weights for score.weight: it is a model of another kind"):
        RewardModel.load(tmp_path / "lm")
    scorer = RewardModel.from_language_model(LlamaForCausalLM(config), tokenizer)
    scorer.save(tmp_path / "scorer")
    with pytest.raises(ValueError, match=r"scorer' has a head for scores \(score.weight\): it is a model of"):
        load_model(tmp_path / "scorer")
    with pytest.raises(ValueError, match=r"folder must be empty, new, or hold agent.json"):
        scorer.save(tmp_path / "lm")
    scorer.save(tmp_path / "scorer")
    textrl.Agent(textrl.TextEnv(Copy()), LlamaForCausalLM(config)).save(tmp_path / "agent")
    with pytest.raises(ValueError, match=r"folder must be empty, new, or hold a reward model; .* holds 'Agent'"):
        scorer.save(tmp_path / "agent")
    with pytest.raises(ValueError, match=r"folder must be empty, new, or hold an agent; .* holds 'RewardModel'"):
        textrl.Agent(textrl.TextEnv(Copy())).save(tmp_path / "scorer")
    config.num_labels = 2
    LlamaForSequenceClassification(config).save_pretrained(tmp_path / "two")
    tokenizer.save_pretrained(tmp_path / "two")
    with pytest.raises(ValueError, match="holds no reward model"):
        RewardModel.load(tmp_path / "two")


def test_a_training_is_not_resumed_on_pairs_that_differ_far_down(tmp_path):
    model, tokenizer = scorer()
    rows = [{"prompt": "", "chosen": "a" * (1 + i % 3), "rejected": "b"} for i in range(12)]
    settings = {"log_dir": tmp_path / "run", "checkpoint_every": 4, "batch_size": 4, "learning_rate": 1e-3}
    train_reward_model(RewardModel(copy.deepcopy(model), tokenizer), rows, **settings)
    rows[-1]["chosen"] = "c"
    with pytest.raises(ValueError, match="another pairs"):
        train_reward_model(RewardModel(copy.deepcopy(model), tokenizer), rows, resume=True, **settings)


def test_a_training_does_not_remove_an_agents_checkpoints(tmp_path):
    model, tokenizer = scorer()
    agent = PPO(textrl.TextEnv(Copy()), batch_size=4)
    agent.learn(20, log_dir=tmp_path / "run", checkpoint_every=10)
    rows = [{"prompt": "", "chosen": "a", "rejected": "b"}]
    with pytest.raises(ValueError, match=r"log_dir must be a folder without another run's"):
        train_reward_model(RewardModel(model, tokenizer), rows, log_dir=tmp_path / "run", checkpoint_every=1)
    assert any((tmp_path / "run" / "checkpoints").iterdir())


def test_scores_that_are_all_alike_are_shifted_alone():
    model, tokenizer = scorer()
    reward = RewardModel(model, tokenizer)
    with pytest.warns(UserWarning, match="all 2 texts score alike"):
        reward.standardise(["", ""], ["ab", "ab"])
    assert reward.std == 1.0 and reward([""], ["ab"]) == pytest.approx([0.0], abs=1e-6)


def test_a_model_that_learns_more_has_no_longer_the_mean_and_deviation_of_its_old_weights():
    reward = RewardModel(*scorer())
    reward.standardise(["", ""], ["ab", "b"])
    assert (reward.mean, reward.std) != (0.0, 1.0)
    train_reward_model(reward, [{"prompt": "", "chosen": "ab", "rejected": "b"}])
    assert (reward.mean, reward.std) == (0.0, 1.0)


def test_pairs_may_be_rows_and_long_ones_are_warned_of():
    model, tokenizer = scorer()
    rows = [{"prompt": "", "chosen": "abab", "rejected": "b"}]
    reward = RewardModel(model, tokenizer, max_length=4)
    assert reward.accuracy(rows) == reward.accuracy(Dataset.from_list(rows))
    with pytest.warns(UserWarning, match="1 of 2 texts reach max_length=4"):
        train_reward_model(reward, rows, learning_rate=1e-3)


def test_a_tokenizer_that_knows_more_than_the_model_is_refused():
    model, _ = scorer()
    with pytest.raises(ValueError, match="tokenizer has 9 tokens but the model's vocabulary only 4"):
        RewardModel(model, textrl.symbol_tokenizer("abcdefgh"))


PAIR = {"prompt": "a", "chosen": "b", "rejected": "c"}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([PAIR, {**PAIR, "chosen": 3}], "pairs row 1, column 'chosen' must be a text; got 3"),
        ([PAIR, {**PAIR, "chosen": b"b"}], "pairs row 1, column 'chosen' must be a text; got b'b'"),
        (
            [PAIR, {**PAIR, "rejected": "\ud800"}],
            "pairs row 1, column 'rejected' must be text; got half of a surrogate",
        ),
        ([PAIR, {"prompt": "a", "chosen": "b"}], "pairs row 1, column 'rejected' is missing; got the columns"),
        ([PAIR, "x"], "pairs row 1 must be a dict"),
        ([], "pairs must be .* with at least one row; got"),
        ("absent.jsonl", "pairs must be a file that exists; got 'absent.jsonl'"),
    ],
)
def test_pairs_are_refused_by_row_and_column(rows, message):
    reward = RewardModel(*scorer())
    for call in (reward.accuracy, lambda rows: train_reward_model(reward, rows)):
        with pytest.raises(ValueError, match=message):
            call(rows)


@pytest.mark.parametrize("group", [None, "a", 1.0, True, 2**70])
def test_a_group_is_a_whole_number(group):
    with pytest.raises(ValueError, match="pairs row 1, column 'group' must be a whole number of at most 64 bits; got "):
        train_reward_model(RewardModel(*scorer()), [{**PAIR, "group": 1}, {**PAIR, "group": group}])


def test_pairs_are_taken_in_every_form_that_dpo_takes(tmp_path):
    model, tokenizer = scorer()
    rows = [{**PAIR, "x": 1}, {**PAIR, "chosen": "bb", "x": "z", "id": 2**70}]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    learned = []
    for data in (Dataset.from_list([{name: row[name] for name in PAIR} for row in rows]), rows, tuple(rows)):
        learned.append(RewardModel(copy.deepcopy(model), tokenizer))
        train_reward_model(learned[-1], data, learning_rate=1e-2)
    learned.append(RewardModel(copy.deepcopy(model), tokenizer))
    train_reward_model(learned[-1], tmp_path / "pairs.jsonl", learning_rate=1e-2)
    assert len({str(each(["a", "a"], ["b", "c"])) for each in learned}) == 1
    assert learned[0](["a"], ["b"]) != RewardModel(model, tokenizer)(["a"], ["b"])
    assert learned[0].accuracy(tmp_path / "pairs.jsonl") == learned[0].accuracy(rows)


def test_pairs_that_are_alike_are_dropped_with_a_warning():
    model, tokenizer = scorer()
    alike = {**PAIR, "rejected": "b"}
    with pytest.raises(
        ValueError, match="pairs must have one whose chosen and rejected differ; got 4 pairs, all alike"
    ):
        train_reward_model(RewardModel(model, tokenizer), [alike] * 4)
    learned = [RewardModel(copy.deepcopy(model), tokenizer) for _ in range(2)]
    train_reward_model(learned[0], [PAIR], learning_rate=1e-2)
    with pytest.warns(UserWarning, match="dropped 2 of 3 pairs: chosen equals rejected"):
        train_reward_model(learned[1], [alike, PAIR, alike], learning_rate=1e-2)
    assert learned[0](["a"], ["b"]) == learned[1](["a"], ["b"])


def test_a_classifier_that_reads_its_first_token_is_refused():
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = BertForSequenceClassification(BertConfig(vocab_size=4, num_labels=1, **sizes))
    with pytest.raises(
        ValueError, match=r"one label, and of a decoder, .*not BERT\); got BertForSequenceClassification"
    ):
        RewardModel(model, textrl.symbol_tokenizer("abc"))


def test_transformers_reads_a_saved_reward_model_at_the_same_token(tmp_path):
    """Where padding is the end token it would pool at the token before the end."""
    model = RewardModel(*scorer())
    assert model.model.config.pad_token_id == model.tokenizer.eos_token_id
    model.save(tmp_path / "scorer")
    assert model.model.config.pad_token_id == model.tokenizer.eos_token_id
    there = AutoModelForSequenceClassification.from_pretrained(tmp_path / "scorer").eval()
    for text in ("abc", "b"):
        with torch.no_grad():
            found = there(torch.tensor(model.encode([text]))).logits
        assert found.item() == pytest.approx(model.scalars([text]).item(), abs=1e-5)
    assert RewardModel.load(tmp_path / "scorer")([""], ["ca"]) == pytest.approx(model([""], ["ca"]), abs=1e-5)


def test_a_folder_that_a_run_writes_to_is_refused(tmp_path):
    model = RewardModel.from_language_model(small_model(4, 16), textrl.symbol_tokenizer("abc"))
    pairs = [{"prompt": "", "chosen": "a", "rejected": "b"}] * 4
    message = rf"log_dir must not be in use; another process writes to '{tmp_path}'"
    code = f"from pathlib import Path; from textrl.runs import alone\nwith alone(Path({str(tmp_path)!r})):\n"
    code += "    print('mine', flush=True)\n    input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=PIPE, stdout=PIPE, text=True) as other:
        assert other.stdout.readline() == "mine\n"
        with pytest.raises(ValueError, match=message):
            train_reward_model(model, pairs, log_dir=tmp_path)
        with pytest.raises(ValueError, match=message):
            PPO(textrl.TextEnv(Copy()), batch_size=4).learn(8, log_dir=tmp_path, resume=True)
        command = f"train ppo --env textrl/Copy-v0 --total-timesteps 8 --log-dir {tmp_path} --quiet"
        assert cli.main(command.split()) == 2
        assert not list(tmp_path.iterdir())
        other.kill()
    train_reward_model(model, pairs, log_dir=tmp_path)


def test_the_end_token_is_learned_though_it_is_padding_too(tmp_path):
    config = LlamaConfig(
        vocab_size=4, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=16, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    reward = RewardModel.from_language_model(LlamaForCausalLM(config), textrl.symbol_tokenizer("abc"))
    reward.save(tmp_path / "reward")
    for each in (reward, RewardModel.load(tmp_path / "reward")):
        each.model.requires_grad_(True)
        chosen, rejected = each.pair_scalars({"prompt": ["", "a"], "chosen": ["a", "bb"], "rejected": ["b", "c"]})
        (chosen - 2 * rejected).sum().backward()
        assert each.model.get_input_embeddings().weight.grad[0].abs().sum() > 1e-3
