"""Logged batches of episodes, as Minari datasets on disk, which other offline libraries read too.

One step is one token. Beside what every Minari dataset holds, `infos` carries at index t + 1, as `env.step` returns it,
`logprob` (of the action at t under the policy that drew it), `ref_logprob` (where there is a reference) and `score` (at
the last step; NaN before). The metadata of an episode holds its row of the task, as JSON under `options/row`; that
of the dataset, under `textrl`, the KL coefficient, the temperature, the end token and the prompts' longest length.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .batch import batched_logprobs, pad_responses
from .cells import number_of
from .config import as_path, check, is_number
from .env import TextEnv
from .files import InputError, Rows, all_or_none, dataset_rows, found_at, is_file_name, read_rows
from .formats import FILE_OF_ROWS
from .offline import digest, example_ids, given_rollout
from .rollout import Rollout, masks_along, policy_in
from .scores import reason, shorten
from .task import Task
from .vector import TextVectorEnv

if TYPE_CHECKING:
    from minari import MinariDataset


def open_dataset(dataset: MinariDataset | str | Path) -> MinariDataset:
    """A Minari dataset from its id or folder.

    Raises:
        ValueError: where there is none.
    """
    minari = minari_module()
    if isinstance(dataset, minari.MinariDataset):
        return dataset
    data = dataset_folder(dataset) / "data"
    if not data.is_dir():
        raise ValueError(f"dataset must be a Minari dataset's folder or id; there is none at {str(data.parent)!r}")
    try:
        return minari.MinariDataset(data)
    except Exception as error:  # whatever Minari and h5py raise of files that are not theirs
        raise ValueError(f"dataset {str(data.parent)!r} cannot be read as a Minari dataset ({reason(error)})") from None


def read_episodes(
    dataset: MinariDataset | str | Path, task: Task | None = None, device: torch.device | str = "cpu"
) -> Rollout:
    """All episodes of a Minari dataset; token ids and logged log-probabilities as they were when they were drawn.

    Args:
        dataset: one that `collect` wrote, or another recorded from a textrl environment; what was not recorded is NaN.
        task: gives the responses as text; without it `completions` stays empty.
        device: where the tensors go.

    Raises:
        ValueError: for a dataset that is not there, is empty, or is not of this task.
    """
    found = open_dataset(dataset)
    fill = int(found.observation_space.high.flat[0])
    eos = found.storage.metadata.get("textrl", {}).get("eos_token_id", None if task is None else task.eos_token_id)
    if task is not None:
        check("task", task.vocab_size, task.vocab_size == fill, f"one with the dataset's vocabulary of {fill}")
        own = vocabulary_digest(task)
        same = found.storage.metadata.get("textrl", {}).get("vocabulary", own) == own
        check("task", type(task).__name__, same, "one whose tokens are those of the dataset")
    episodes = list(found.iterate_episodes())
    check("dataset", str(found.storage.data_path), bool(episodes), "one with episodes")
    prompts = [episode.observations[0][episode.observations[0] != fill] for episode in episodes]
    responses = [episode.actions.tolist() for episode in episodes]
    if task is not None:
        for name, texts in (("max_prompt_tokens", prompts), ("max_new_tokens", responses)):
            limit, longest = getattr(task, name), max(map(len, texts))
            check(f"task.{name}", limit, longest <= limit, f"at least {longest}, as the dataset needs it")
    tokens, prompt_lengths, mask = pad_responses(prompts, responses, torch.device("cpu"))
    unknown = torch.where(mask, torch.nan, 0.0)
    rollout = Rollout(
        tokens=tokens,
        prompt_lengths=prompt_lengths,
        action_mask=mask,
        logprobs=unknown,
        rewards=unknown,
        scores=torch.tensor([_last(episode.infos, "score") for episode in episodes], dtype=torch.float32),
        stopped=torch.tensor([response[-1] == eos for response in responses]),
        rows=[_read_row(metadata) for metadata in found.storage.get_episode_metadata(found.episode_indices)],
        completions=[] if task is None else task.decode(responses),
    )
    rollout.rewards = rollout.spread(_flat([episode.rewards for episode in episodes]))
    cut_off = [bool(episode.truncations[-1]) for episode in episodes]
    rollout.truncated = torch.tensor(cut_off) if any(cut_off) else None
    for name, column in (("logprobs", "logprob"), ("ref_logprobs", "ref_logprob")):
        if all(episode.infos and column in episode.infos for episode in episodes):
            setattr(rollout, name, rollout.spread(_flat([e.infos[column][-len(e) :] for e in episodes])))
    return on_device(rollout, torch.device(device))


def vocabulary_digest(task: Task) -> str:
    """By which two vocabularies of one size are told apart."""
    vocabulary = sorted(task.tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()


def as_episodes(source: Any, task: Task, device: torch.device) -> Rollout:
    """Logged episodes from wherever they are.

    Args:
        source: a `Rollout`, a Minari dataset, its id or folder, or rows (or a file of them) with "prompt" and
            "completion" (text) or "completion_ids", and, where they are known, "score" (else the task is asked) and
            "logprobs" (a list).
        task: what was played.
        device: where the tensors go.

    Raises:
        ValueError: for anything else, naming the row.
    """
    if isinstance(source, Rollout):  # what another agent's model made of it stays behind
        mine = replace(source, below=None, values=None, advantages=None, returns=None, allowed=None)
        return on_device(mine, device)
    if isinstance(source, (str, Path)) and not is_file_name(source) and os.path.isfile(source):
        raise InputError(f"dataset must be a Minari dataset's folder or id, or {FILE_OF_ROWS}; got {found_at(source)}")
    if (isinstance(source, (str, Path)) and not is_file_name(source)) or type(source).__name__ == "MinariDataset":
        return read_episodes(source, task, device)
    rows = dataset_rows(source, read_logged)
    logged = rows.each(lambda row: _logged_row(task, row, rows.strict))
    responses = [response for response, _, _ in logged]
    own = [{name: value for name, value in row.items() if name != "completion_ids"} for row in rows]  # of the task
    rollout = given_rollout(task, [task.encode(row).tolist() for row in own], responses, torch.device("cpu"), own)
    rollout.completions = task.decode(responses)
    scores = [score for _, score, _ in logged if score is not None]
    logprobs = [each for _, _, each in logged if each is not None]
    all_or_none(len(scores), len(rows), "'score'")
    all_or_none(len(logprobs), len(rows), "'logprobs'")
    totals = scores or task.evaluate(own, responses).totals
    rollout.scores = torch.tensor(np.asarray(totals), dtype=torch.float32)
    if logprobs:
        rollout.logprobs = rollout.spread(_flat(logprobs))
    return on_device(rollout, device)


def take_in(logged: Rollout, base: TextEnv | TextVectorEnv, tokens_at_once: int) -> Tensor:
    """Readies logged episodes to be learned from: action masks, the reference's opinion; gives their returns, (B,).

    The masks are the task's, where none are known, and what was done in spite of them. The returns are
    score - kl_coef * (log mu - log pi_ref), mu the policy that was logged; the score where mu is not known.

    Raises:
        ValueError: for episodes whose scores are not known.
    """
    check_whole(logged)
    if cut := unfinished(logged, base.task):
        said = f"{cut} of {len(logged)} logged episodes end before the end token and before max_new_tokens"
        warnings.warn(f"{said}={base.task.max_new_tokens}: they are learned from as if they were whole", stacklevel=2)
    bad = bool(logged.scores.isnan().any())
    check("dataset", "episodes without scores", not bad, "episodes whose scores are known")
    if logged.allowed is None and (masks := masks_along(base.task, logged)) is not None:
        logged.allowed = masks.scatter(2, logged.responses[..., None], True)
    if base.reference is not None:
        reference = policy_in(base, base.reference)
        logged.ref_logprobs = batched_logprobs(reference, logged, tokens_at_once)
    log_ratios = logged.log_ratios
    if log_ratios is None or bool(logged.logprobs.isnan().any()):
        return logged.scores
    return logged.scores - base.kl_coef * log_ratios.sum(1)


def check_whole(logged: Rollout) -> None:
    """Refuses episodes that a time limit cut off: what they would have been worth nobody knows.

    Raises:
        ValueError: counting them.
    """
    cut = 0 if logged.truncated is None else int(logged.truncated.sum())
    what = f"{cut} of {len(logged)} episodes that were cut off by a time limit"
    check("dataset", what, not cut, "whole episodes, each to its own end")


def unfinished(logged: Rollout, task: Task) -> int:
    """How many episodes end neither with the end token nor at the horizon: logged at a shorter one, say."""
    return int((~logged.stopped & (logged.response_lengths < task.max_new_tokens)).sum())


def episodes_digest(logged: Rollout) -> str:
    """By which two sets of logged episodes are told apart: their tokens, scores and log-probabilities."""
    columns = (logged.tokens, logged.prompt_lengths, logged.scores, logged.logprobs)
    return digest([column.tolist() for column in columns])


def read_logged(file: str | Path, skip_bad_rows: bool = False) -> Rows:
    """The episodes of a JSON (lines), CSV or Parquet file."""
    columns = ("score", "logprobs", "completion_ids")
    return read_rows(file, numbers=columns, skip_bad_rows=skip_bad_rows, called="dataset")


def logged_source(name: str | Path, skip_bad_rows: bool = False) -> Rows | str:
    """What `as_episodes` takes from what a user named: the rows of a file; a Minari dataset is read later."""
    return read_logged(name, skip_bad_rows) if is_file_name(name) else str(name)


def _logged_row(task: Task, row: Mapping[str, Any], strict: bool) -> tuple[list[int], float | None, list[float] | None]:
    """An episode's response as token ids, and its score and log-probabilities where they are known.

    Raises:
        ValueError: naming the column.
    """
    response = example_ids(task, row, strict=strict)[1]
    score = None if row.get("score") is None else number_of(row, "score")
    logprobs = row.get("logprobs")
    if logprobs is not None:
        fine = isinstance(logprobs, (list, tuple)) and all(is_number(x) and -math.inf < x <= 0 for x in logprobs)
        if not fine or len(logprobs) != len(response):
            raise ValueError(
                f"column 'logprobs' must be a list of {len(response)} finite numbers, none above 0, one a token;"
                f" got {shorten(logprobs)}"
            )
    return response, score, logprobs


def on_device(rollout: Rollout, device: torch.device) -> Rollout:
    """A rollout whose tensors are on a device."""
    moved = {key: value.to(device) for key, value in vars(rollout).items() if isinstance(value, Tensor)}
    return Rollout(**{**vars(rollout), **moved})


# ---- Minari -------------------------------------------------------------------------------------------------------


def minari_module() -> Any:
    """Minari, which is an extra.

    Raises:
        ImportError: saying what to install.
    """
    try:
        import minari
    except ImportError as error:
        raise ImportError(f"logged episodes need Minari ({error}): pip install 'gymnasium-textrl[offline]'") from None
    return minari


def dataset_folder(dataset: str | Path) -> Path:
    """Where a dataset lies: a folder, or Minari's place for an id, which ends in a version."""
    as_path("dataset", dataset)
    minari_module()
    from minari.storage import get_dataset_path

    if isinstance(dataset, str) and re.fullmatch(r"\w[\w/.-]*-v\d+", dataset):
        dataset = Path(get_dataset_path(dataset))
    return Path(dataset).absolute()  # Minari loses its way from a relative one


def _read_row(metadata: dict[str, Any]) -> dict[str, Any]:
    """The task's row in an episode's metadata; without one, what the episode holds has no row."""
    row = metadata.get("options", {}).get("row")
    return {} if row is None else dict(json.loads(row))


def _last(infos: Mapping[str, Any] | None, name: str) -> float:
    return float(infos[name][-1]) if infos and name in infos else float("nan")


def _flat(parts: Sequence[Any]) -> Tensor:
    """Numbers of all episodes one after the other: (n,) float32."""
    return torch.from_numpy(np.concatenate([np.asarray(part, dtype=np.float32) for part in parts]))
