"""Properties over generated tasks, masks, lengths and dtypes: three views agree, or one line says what is wrong."""

import copy
import json

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import textrl
from textrl.asking import Asking
from textrl.batch import pad_responses
from textrl.files import InputError
from textrl.models import small_model
from textrl.policy import CausalPolicy
from textrl.preferences import read_preferences
from textrl.returns import gae, leave_one_out, whiten
from textrl.rollout import sample_episodes
from textrl.scores import ScoreError

settings.register_profile("quick", max_examples=30, deadline=None, derandomize=True, database=None)
settings.load_profile("quick")

TOKENIZER = textrl.symbol_tokenizer("ab")


class Given(textrl.Task):
    """Rows, scores and masks as a test wants them."""

    def __init__(self, rows=None, score=None, masks=None, horizon=3, **options):
        super().__init__(tokenizer=TOKENIZER, max_new_tokens=horizon, **options)
        self._given, self._score, self._masks = rows or [{"prompt": "a"}], score, masks

    def prompts(self):
        return self._given

    def score(self, prompts, completions, **columns):
        return [float(len(text)) for text in completions] if self._score is None else self._score

    def allowed_tokens(self, rows, responses):
        return None if self._masks is None else self._masks(len(rows), responses)


def one_line(error):
    assert "\n" not in str(error.value)
    assert str(error.value)


anything = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.binary(max_size=3),
    st.lists(st.integers(), max_size=3), st.dictionaries(st.text(max_size=6), st.integers(), max_size=2),
)  # fmt: skip


@given(horizon=anything, prompt_tokens=anything)
def test_a_task_takes_a_horizon_or_says_why_not(horizon, prompt_tokens):
    whole = isinstance(horizon, int) and not isinstance(horizon, bool) and horizon >= 1
    limit = prompt_tokens is None or (
        isinstance(prompt_tokens, int) and not isinstance(prompt_tokens, bool) and prompt_tokens >= 1
    )
    if whole and limit:
        assert Given(horizon=horizon, max_prompt_tokens=prompt_tokens).max_new_tokens == horizon
    else:
        with pytest.raises(ValueError, match=r"max_(new|prompt)_tokens must be a whole number of at least 1") as error:
            Given(horizon=horizon, max_prompt_tokens=prompt_tokens)
        one_line(error)


@given(rows=st.lists(st.one_of(anything, st.fixed_dictionaries({"prompt": anything})), min_size=1, max_size=3))
def test_rows_are_texts_the_tokenizer_knows_or_said_to_be_wrong(rows):
    fine = all(isinstance(row, dict) and isinstance(row.get("prompt"), str) for row in rows)
    fine = fine and all(set(row["prompt"]) <= set("ab") for row in rows)
    if fine:
        textrl.TextEnv(Given(rows)).reset(seed=0)
    else:
        with pytest.raises(ValueError, match=r"row|prompt") as error:
            env = textrl.TextEnv(Given(rows))
            for row in rows:
                env.reset(options={"row": row})
        one_line(error)


numbers = st.one_of(
    st.floats(), st.integers(), st.booleans(), st.floats(width=32).map(np.float32), st.integers(0, 9).map(np.int64),
    st.floats(width=16).map(lambda x: torch.tensor(x, dtype=torch.float16)),
)  # fmt: skip


@given(said=st.one_of(anything, st.lists(st.one_of(numbers, anything), min_size=0, max_size=5)))
def test_scores_are_numbers_or_said_to_be_wrong_and_dropped_one_by_one(said):
    rows, ids = [{"prompt": "a"}] * 3, [[1, 0], [2, 2, 0], [0]]
    task = Given(score=said)
    try:
        scores = task.evaluate(rows, ids)
        assert np.isfinite(scores.totals).all()
        assert scores.totals.shape == (3,)
    except ScoreError as error:
        assert "\n" not in str(error)
        assert "prompt 'a'" in str(error)
    task.asking = Asking(drop=True)
    scores = task.evaluate(rows, ids)
    assert set(scores.faults) == {i for i, total in enumerate(scores.totals) if np.isnan(total)}
    assert np.isfinite(scores.last).all()


@given(
    dtype=st.sampled_from(["float16", "float32", "float64", "int32", "int64", "bool", "uint8"]), seed=st.integers(0, 9)
)
def test_scores_of_every_dtype_and_holder_mean_the_same(dtype, seed):
    array = np.random.default_rng(seed).integers(0, 2, 3).astype(dtype)
    for said in (array, array.tolist(), tuple(array), torch.from_numpy(array), list(array)):
        totals = Given(score=said).evaluate([{"prompt": "a"}] * 3, [[0]] * 3).totals
        np.testing.assert_array_equal(totals, array.astype(np.float64))
        assert totals.dtype == np.float64


@given(
    shape=st.sampled_from([(2, 3), (1, 3), (2, 2), (3,), (2, 3, 1)]),
    dtype=st.sampled_from(["bool", "int8", "float32"]),
    seed=st.integers(0, 99),
)
def test_masks_are_bool_of_the_right_shape_with_a_token_in_each_row_or_said_to_be_wrong(shape, dtype, seed):
    mask = np.random.default_rng(seed).integers(0, 2, shape).astype(dtype)
    task = Given(masks=lambda n, responses: mask)
    rows, responses = [{"prompt": "a"}] * 2, np.full((2, 3), 3)
    if shape == (2, 3) and dtype == "bool" and mask.any(1).all():
        assert task.masks(rows, responses) is mask
    else:
        with pytest.raises(ValueError, match="allowed_tokens must") as error:
            task.masks(rows, responses)
        one_line(error)


@given(
    prompts=st.lists(st.text("ab", max_size=5), min_size=1, max_size=4),
    horizon=st.integers(1, 4),
    seed=st.integers(0, 99),
    kl_coef=st.sampled_from([0.0, 0.3]),
    per_token=st.booleans(),
)
@settings(suppress_health_check=[HealthCheck.too_slow])
def test_stepped_and_sampled_episodes_are_paid_the_same(prompts, horizon, seed, kl_coef, per_token):
    task = Given([{"prompt": prompt} for prompt in prompts], horizon=horizon)
    if per_token:
        task.score = lambda prompts, completions, completion_ids: [[float(i) for i in ids] for ids in completion_ids]
    width = task.max_prompt_tokens + horizon
    reference, policy = small_model(3, width, seed), CausalPolicy(small_model(3, width, seed + 1), 3)
    env = textrl.TextEnv(task, reference=reference, kl_coef=kl_coef)
    generator = torch.Generator().manual_seed(seed)
    rollout = sample_episodes(env, policy, task.rows, generator=generator)
    env.policy = lambda observations: torch.stack(
        [policy.model(input_ids=torch.from_numpy(o[o < 3])[None]).logits[0, -1] for o in observations]
    )
    for i, row in enumerate(task.rows):
        env.reset(options={"row": row})
        n = int(rollout.response_lengths[i])
        for t in range(n):
            _, reward, terminated, _, _ = env.step(int(rollout.responses[i, t]))
            assert reward == pytest.approx(float(rollout.rewards[i, t]), abs=1e-4)
        assert terminated


@given(
    lengths=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 5)), min_size=1, max_size=5),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    seed=st.integers(0, 99),
)
def test_padding_never_changes_advantages(lengths, dtype, seed):
    prompts, responses = [[1] * p for p, _ in lengths], [[2] * r for _, r in lengths]
    _, _, mask = pad_responses(prompts, responses, torch.device("cpu"))
    generator = torch.Generator().manual_seed(seed)
    rewards, values = (torch.randn(mask.shape, generator=generator).to(dtype) * mask for _ in range(2))
    advantages, returns = gae(rewards, values, mask)
    for i, (_, r) in enumerate(lengths):
        one, ret = gae(rewards[i : i + 1, :r], values[i : i + 1, :r], mask[i : i + 1, :r])
        assert torch.equal(one[0], advantages[i, :r])
        assert torch.equal(ret[0], returns[i, :r])
    assert not advantages[~mask].any()
    assert whiten(advantages.float(), mask).isfinite().all()


@given(scores=st.lists(st.floats(-100, 100), min_size=2, max_size=8), seed=st.integers(0, 99))
def test_leave_one_out_is_what_its_name_says(scores, seed):
    groups = torch.tensor(sorted(np.random.default_rng(seed).integers(0, 3, len(scores)).tolist()))
    found = leave_one_out(torch.tensor(scores, dtype=torch.float64), groups).tolist()
    for i, score in enumerate(scores):
        others = [x for j, x in enumerate(scores) if j != i and groups[j] == groups[i]]
        assert found[i] == pytest.approx(score - np.mean(others) if others else 0.0, abs=1e-9)


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=12)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3)),
    max_leaves=6,
)
columns = st.sampled_from(
    ["prompt", "chosen", "rejected", "completion", "label", "messages", "score_chosen", "human_ref_A"]
)
pairs = st.fixed_dictionaries(
    {"prompt": st.text(max_size=4), "chosen": st.text(max_size=4), "rejected": st.text(max_size=4)}
)


@given(
    rows=st.lists(st.one_of(pairs, st.dictionaries(columns, json_values, max_size=4), json_values), max_size=4),
    skip=st.booleans(),
)
def test_preference_files_are_read_whole_or_said_to_be_wrong(rows, skip, tmp_path_factory):
    file = tmp_path_factory.mktemp("fuzz") / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    _read(file, skip)


@given(
    content=st.one_of(
        st.binary(max_size=60), st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass"))
    ),
    end=st.sampled_from([".json", ".jsonl", ".csv", ".parquet"]),
)
def test_files_of_any_bytes_are_read_whole_or_said_to_be_wrong(content, end, tmp_path_factory):
    file = tmp_path_factory.mktemp("fuzz") / f"pairs{end}"
    file.write_bytes(content)
    _read(file, False)


def _read(file, skip):
    try:
        found = read_preferences(file, skip_bad_rows=skip)
        assert len(found) > 0
        assert all(isinstance(row[name], str) for row in found for name in ("prompt", "chosen", "rejected"))
    except InputError as error:
        assert "\n" not in str(error)
        assert file.name in str(error)


def test_options_are_not_changed():
    rows = [{"prompt": "a", "extra": [1]}]
    before = copy.deepcopy(rows)
    env = textrl.TextEnv(Given(rows))
    env.reset(seed=0)
    env.step(0)
    assert rows == before


@given(text=st.text("ab<end>", max_size=12))
def test_the_end_token_written_out_in_a_prompt_is_text(text):
    tokenizer = textrl.symbol_tokenizer("abnd<>")
    tokenizer_of_two = textrl.symbol_tokenizer("ab")
    ids = tokenizer_of_two.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)
    assert all(len(piece) == 1 for piece, _ in ids)
    if "e" not in text:
        found = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert len(found) == len(text)
        assert 0 not in found
