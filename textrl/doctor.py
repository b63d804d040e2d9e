"""`textrl doctor`: the checks that otherwise take days to think of, on an environment and a model before training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .agent import Agent
from .codec import plain_ids
from .model_checks import finite, gradients, kl, order, padding, ratio, temperature
from .patient import Fault, Patient
from .scores import about, shorten


@dataclass(frozen=True)
class Finding:
    """What one check found.

    Attributes:
        name: what was looked at.
        fine: whether it passed.
        said: what was seen; where it did not pass, what is wrong and what mends it.
    """

    name: str
    fine: bool
    said: str

    def __str__(self) -> str:
        return f"{'ok   ' if self.fine else 'FAULT'} {self.name}: {self.said}"


def diagnose(agent: Agent) -> list[Finding]:
    """Runs every check on an agent that has not learned yet; its weights stay as they are.

    Args:
        agent: of any class; its environment, task, tokenizer, policy and reference are looked at.

    Returns:
        a finding for each of `CHECKS`; without numbers from the model only the first.
    """
    patient, found = Patient(agent), []
    for name, check in CHECKS.items():
        try:
            found.append(Finding(name, True, check(patient)))
        except Exception as error:  # whatever a model, a tokenizer or a score may raise
            said = str(error) if isinstance(error, Fault) else f"{type(error).__name__}: {error}"
            found.append(Finding(name, False, " ".join(said.split())))
            if check is finite:  # nothing else would mean anything
                break
    return found


def end_token(patient: Patient) -> str:
    """The end token ends an episode, no other token does, and the model means the same token by it."""
    task, env, name = patient.task, patient.env, patient.agent.tokenizer.eos_token
    env.reset(options={"row": patient.rows[0]})
    _, _, terminated, _, info = env.step(task.eos_token_id)
    if not terminated or info.get("finish_reason", "stop") != "stop":
        raise Fault(f"the end token {name!r} does not end an episode", "terminated=True after the end token")
    if any(early for _, _, early in patient.stepped()):
        raise Fault("an episode ends before its end token", "terminated=True only at the end token or the horizon")
    config = getattr(patient.agent.model, "generation_config", None) or patient.agent.model.config
    own = getattr(config, "eos_token_id", None)
    ends = [own] if isinstance(own, int) else list(own or [])
    if ends and task.eos_token_id not in ends:
        raise Fault(
            f"the tokenizer's end token is {name!r}, id {task.eos_token_id}, the model's has the id"
            f" {' or '.join(map(str, ends))}: it would never stop",
            "tokenizer.eos_token = the token that the model was trained to end with",
        )
    return f"{name!r}, id {task.eos_token_id}, ends an episode"


def round_trip(patient: Patient) -> str:
    """Texts come back from the tokenizer as they were; special tokens written out in a prompt are text."""
    task, tokenizer = patient.task, patient.agent.tokenizer
    for text in [*(row["prompt"] for row in patient.rows), *patient.rollout.completions]:
        ids = plain_ids(tokenizer, text, "text")
        back = task.decode([ids], alone=True)[0]
        if back != text:
            raise Fault(
                f"{shorten(text)} comes back from the tokenizer as {shorten(back)}",
                "a tokenizer that changes nothing (no lowercase, no clean-up of spaces, no unknown token)",
            )
    try:
        inside = task.encode({"prompt": str(tokenizer.eos_token)}).tolist()
    except ValueError:  # a prompt that is refused cannot end anything
        inside = []
    if task.eos_token_id in inside[1 if tokenizer.bos_token_id is not None else 0 :]:
        raise Fault(
            f"{tokenizer.eos_token!r} in a prompt becomes the end token", "a fast tokenizer that splits special tokens"
        )
    return f"{len(patient.rows)} prompts and {len(patient.rollout.completions)} responses come back unchanged"


def determinism(patient: Patient) -> str:
    """The score says the same of the same response, whatever it is asked beside it."""
    lengths = patient.rollout.response_lengths.tolist()
    ids = [r[:n] for r, n in zip(patient.rollout.responses.tolist(), lengths, strict=True)]
    first = patient.task.evaluate(patient.rows, ids).totals
    turned = patient.task.evaluate(patient.rows[::-1], ids[::-1]).totals[::-1]
    alone = [patient.task.evaluate([row], [one]).totals[0] for row, one in zip(patient.rows, ids, strict=True)]
    for i, again in [(i, x) for other in (turned, alone) for i, x in enumerate(other)]:
        if abs(again - first[i]) > 1e-3 * (1 + abs(first[i])):
            where = about(patient.rows[i]["prompt"], patient.rollout.completions[i])
            raise Fault(
                f"score is {first[i]:.4g} and then {again:.4g} for {where}",
                "a score without randomness and without memory, that looks at each response alone",
            )
    same = "; all are the same, so nothing can be learned yet" if len(set(first.tolist())) == 1 else ""
    return f"the same three times; from {first.min():.4g} to {first.max():.4g}{same}"


def last_token(patient: Patient) -> str:
    """The score is paid at the last token, and nothing but the KL penalty before it."""
    if patient.task.token_scores:
        return _causal(patient)
    before, patient.plain.kl_coef = patient.plain.kl_coef, 0.0
    try:
        for rewards, info, _ in patient.stepped():
            off = [t for t, reward in enumerate(rewards) if abs(reward) > 1e-5]
            if off:
                raise Fault(
                    f"token {off[0] + 1} of {len(rewards)} is paid {rewards[off[0]]:.4g} beside the score"
                    f" ({float(info.get('score', 0.0)):.4g}, due at the last token)",
                    "an environment without wrappers that move or change rewards",
                )
    finally:
        patient.plain.kl_coef = before
    return "the score, and nothing before it"


def _causal(patient: Patient) -> str:
    """The reward of a token does not change as the response grows: a stepped environment has paid it by then."""
    few = patient.stepped_episodes
    lengths, texts = patient.rollout.response_lengths.tolist(), patient.rollout.completions
    for i, row in enumerate(patient.rows[:few]):
        response = patient.rollout.responses[i, : lengths[i]].tolist()
        whole = patient.task.evaluate([row], [response]).tokens
        for t in range(len(response)):
            part = patient.task.evaluate([row], [response[: t + 1]]).tokens
            if whole is None or part is None:
                where = about(row["prompt"], texts[i])
                raise Fault(f"score gives no rewards for tokens for {where}", "a list of them for every response")
            if abs(part[0][t] - whole[0][t]) > 1e-5 * (1 + abs(whole[0][t])):
                raise Fault(
                    f"token {t + 1} of {len(response)} is worth {part[0][t]:.4g} when it is written and"
                    f" {whole[0][t]:.4g} at the end, for {about(row['prompt'], texts[i])}",
                    "a score whose reward for a token depends only on the tokens up to it",
                )
    return "a score for every token, which what follows does not change"


CHECKS: dict[str, Callable[[Patient], str]] = {
    "finite logits": finite,
    "score determinism": determinism,  # before others ask: a score with memory would know all texts
    "ratio at the first minibatch": ratio,
    "padding": padding,
    "order of the batch": order,
    "temperature": temperature,
    "KL penalty": kl,
    "end token": end_token,
    "tokenizer round trip": round_trip,
    "reward at the last token": last_token,
    "gradients": gradients,
}
