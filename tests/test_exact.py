"""The exact optimum and the exact value of a policy, against an enumeration that shares no code with them."""

import copy
import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch

import textrl
from textrl.exact import evaluate_exact, exact_critic, exact_gradient, solve
from textrl.models import small_model
from textrl.policy import CausalPolicy, values_at
from textrl.tabular import tabular_model


class RandomTask(textrl.Task):
    """A random number for every response; `per_token` splits it over the tokens."""

    def __init__(self, vocab=4, horizon=4, prompts=("",), seed=0, per_token=False, masks=False):
        super().__init__(tokenizer=textrl.symbol_tokenizer("abcdefgh"[: vocab - 1]), max_new_tokens=horizon)
        self._prompts, self._seed, self._per_token, self._masks = prompts, seed, per_token, masks

    def prompts(self):
        return [{"prompt": prompt, "bonus": float(i)} for i, prompt in enumerate(self._prompts)]

    def number(self, prompt, ids):
        return float(np.random.default_rng([self._seed, len(prompt), *ids]).normal())

    def score(self, prompts, completions, completion_ids, bonus, **columns):
        if self._per_token:
            return [
                [self.number(p, ids[: t + 1]) for t in range(len(ids))]
                for p, ids in zip(prompts, completion_ids, strict=True)
            ]
        return [self.number(p, ids) + b for p, ids, b in zip(prompts, completion_ids, bonus, strict=True)]

    def allowed_tokens(self, rows, responses):
        if not self._masks:
            return None
        allowed = np.ones((len(rows), self.vocab_size), dtype=bool)
        allowed[:, 1] = responses[:, 0] == self.vocab_size  # "a" only as the first token
        return allowed


def responses_of(task):
    """Every complete response: no end token but at the end, which it needs if it is short."""
    eos, horizon = task.eos_token_id, task.max_new_tokens
    for length in range(1, horizon + 1):
        for ids in itertools.product(range(task.vocab_size), repeat=length):
            if eos not in ids[:-1] and (ids[-1] == eos or length == horizon):
                yield list(ids)


def logprobs_of(model, task, prompt, responses, temperature=1.0):
    """log pi(ids | prompt) of each response in float64, those of one length in one forward."""
    prompt_ids, twin = task.encode({"prompt": prompt}).tolist(), copy.deepcopy(model).double()
    out = []
    for _, group in itertools.groupby(responses, len):
        ids = torch.tensor(list(group))
        logits = twin(torch.cat([torch.tensor([prompt_ids] * len(ids)), ids], 1)).logits[..., : task.vocab_size]
        logs = (logits / temperature).log_softmax(-1)[:, len(prompt_ids) - 1 : -1]
        out.append(logs.gather(2, ids[..., None]).sum((1, 2)))
    return torch.cat(out).numpy()


def table_of(task, models, temperature=1.0):
    """For each row: the scores and each model's log-probabilities of all responses."""
    responses = list(responses_of(task))
    with torch.no_grad():
        return [
            (
                task.evaluate([row] * len(responses), responses).totals,
                *(logprobs_of(model, task, row["prompt"], responses, temperature) for model in models),
            )
            for row in task.rows
        ]


def noisy(model, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator)
    return model


def gpt2(task, seed, scale=0.2):
    length = task.max_prompt_tokens + task.max_new_tokens
    return noisy(small_model(task.vocab_size, length, seed, n_embd=16, n_layer=1, n_head=2), scale, seed)


CASES = [
    (4, 4, ("",), 0.05, 1.0, False),
    (5, 4, ("", "a"), 0.3, 1.0, False),
    (4, 5, ("a", "bc"), 0.1, 0.7, False),
    (4, 4, ("a", "a", "b"), 0.2, 1.0, True),
]


@pytest.mark.parametrize(("vocab", "horizon", "prompts", "kl_coef", "temperature", "per_token"), CASES)
def test_solve_is_the_closed_form(vocab, horizon, prompts, kl_coef, temperature, per_token):
    task = RandomTask(vocab, horizon, prompts, seed=vocab * horizon, per_token=per_token)
    reference = gpt2(task, seed=1)
    expected = np.zeros(3)
    table = {}
    for row, (scores, logs) in zip(task.rows, table_of(task, [reference], temperature), strict=True):
        table.setdefault(row["prompt"], []).append((scores, logs))
    for rows in table.values():  # rows with one prompt are averaged
        scores, logs = np.mean([r[0] for r in rows], 0), rows[0][1]
        tilted = logs + scores / kl_coef
        log_z = np.logaddexp.reduce(tilted)
        p = np.exp(tilted - log_z)
        expected += len(rows) / len(task.rows) * np.array([kl_coef * log_z, p @ scores, p @ (tilted - log_z - logs)])
    solution = solve(task, reference, kl_coef, temperature=temperature)
    found = np.array([solution.objective, solution.score, solution.kl])
    assert np.abs(found - expected).max() < 1e-6
    assert solution.objective == pytest.approx(solution.score - kl_coef * solution.kl, abs=1e-9)


def test_optimal_logits_are_the_tilted_reference():
    task, kl_coef = RandomTask(4, 4, ("b",)), 0.2
    reference = gpt2(task, seed=3)
    solution = solve(task, reference, kl_coef)
    responses = list(responses_of(task))
    ((scores, logs),) = table_of(task, [reference])
    tilted = np.exp(logs + scores / kl_coef - (logs + scores / kl_coef).max())
    for prefix in ([], [2], [3, 1], [1, 1, 1]):
        under = [
            sum(w for ids, w in zip(responses, tilted, strict=True) if ids[: len(prefix) + 1] == [*prefix, a])
            for a in range(4)
        ]
        expected = np.array(under) / sum(under)
        found = solution.logits("b", prefix).softmax(-1).numpy()
        assert np.abs(found - expected).max() < 1e-9
    assert torch.equal(solution.logits("b", "ca"), solution.logits("b", [3, 1]))


def test_without_a_penalty_the_best_response_is_said():
    task = RandomTask(5, 4, ("c", "ab"))
    solution = solve(task)
    best = np.mean([scores.max() for (scores,) in table_of(task, [])])
    assert solution.objective == pytest.approx(best, abs=1e-12)
    assert solution.kl == 0
    reference = gpt2(task, 0)
    with_reference = solve(task, reference)
    expected = np.mean([-logs[scores.argmax()] for scores, logs in table_of(task, [reference])])
    assert with_reference.objective == pytest.approx(best, abs=1e-12)
    assert with_reference.kl == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(("vocab", "horizon", "prompts", "kl_coef", "temperature", "per_token"), CASES)
def test_evaluate_is_an_enumeration(vocab, horizon, prompts, kl_coef, temperature, per_token):
    task = RandomTask(vocab, horizon, prompts, seed=7, per_token=per_token)
    reference, model = gpt2(task, 1), gpt2(task, 2, scale=0.4)
    rows = [
        (np.exp(logs) @ scores, np.exp(logs) @ (logs - ref), -np.exp(logs) @ logs, np.exp(ref) @ scores)
        for scores, ref, logs in table_of(task, [reference, model], temperature)
    ]
    score, kl, entropy, start = np.mean(rows, 0)
    found = evaluate_exact(task, model, reference, kl_coef, temperature=temperature)
    assert found.score == pytest.approx(score, abs=1e-6)
    assert found.kl == pytest.approx(kl, abs=1e-6)
    assert found.entropy == pytest.approx(entropy, abs=1e-6)
    assert found.objective == pytest.approx(score - kl_coef * kl, abs=1e-6)
    optimum = solve(task, reference, kl_coef, temperature=temperature).objective
    assert found.share == pytest.approx((score - kl_coef * kl - start) / (optimum - start), abs=1e-6)


def test_the_optimal_policy_is_worth_the_optimum_and_the_reference_nothing():
    task = RandomTask(4, 5, ("a", "b"))
    reference = gpt2(task, 0)
    solution = solve(task, reference, 0.1)
    best = evaluate_exact(task, solution.model(), reference, 0.1)
    assert best.objective == pytest.approx(solution.objective, abs=1e-6)
    assert best.share == pytest.approx(1, abs=1e-6)
    assert evaluate_exact(task, reference, reference, 0.1).share == pytest.approx(0, abs=1e-9)
    assert evaluate_exact(task, tabular_model(task)).share == pytest.approx(0, abs=1e-9)  # even tokens are the start
    assert evaluate_exact(task, solve(task).model()).share == pytest.approx(1, abs=1e-6)


def test_a_callable_is_a_policy_too():
    task = RandomTask(4, 4, ("", "abc"))
    model = gpt2(task, 5)
    policy = CausalPolicy(copy.deepcopy(model).double(), 4)

    def ask(observations):
        lengths = torch.from_numpy((observations != 4).sum(1))
        tokens = torch.from_numpy(np.where(observations == 4, 0, observations))
        return policy.model(tokens).logits[torch.arange(len(tokens)), lengths - 1]

    one, other = evaluate_exact(task, ask), evaluate_exact(task, model)
    assert dataclasses.astuple(one) == pytest.approx(dataclasses.astuple(other), abs=1e-12)


def test_a_kl_that_is_infinite_is_said_to_be_and_broken_logits_are_refused():
    task = RandomTask(4, 3, ("",))

    def never_two(observations):
        logits = torch.zeros(len(observations), 4)
        logits[:, 2] = -torch.inf
        return logits

    found = evaluate_exact(task, tabular_model(task), reference=never_two, kl_coef=0.1)
    assert (found.kl, found.objective, found.share) == (math.inf, -math.inf, -math.inf)
    assert evaluate_exact(task, tabular_model(task), reference=never_two).objective == pytest.approx(found.score)
    assert solve(task, reference=never_two, kl_coef=0.1).kl < 10
    broken = gpt2(task, 5)
    with torch.no_grad():
        broken.transformer.ln_f.weight.fill_(torch.nan)
    for refused in (lambda: solve(task, reference=broken, kl_coef=0.1), lambda: evaluate_exact(task, broken)):
        with pytest.raises(ValueError, match="model gives logits that are not finite"):
            refused()


def test_masks_bind_the_policy_only_where_asked():
    task = RandomTask(4, 4, masks=True)
    model = gpt2(task, 5)
    ((scores, logs),) = table_of(task, [model])
    keep = np.array([1 not in ids[1:] for ids in responses_of(task)])
    weights = []
    for ids in responses_of(task):  # renormalise token by token
        weight = 1.0
        for t, token in enumerate(ids):
            p = next_probabilities(model, task, ids[:t])
            if t > 0:
                p[1] = 0
            weight *= p[token] / p.sum()
        weights.append(weight)
    assert np.sum(weights) == pytest.approx(1, abs=1e-9)
    assert np.array(weights)[~keep].sum() == 0
    assert evaluate_exact(task, model, masked=True).score == pytest.approx(np.array(weights) @ scores, abs=1e-9)
    assert evaluate_exact(task, model).score == pytest.approx(np.exp(logs) @ scores, abs=1e-9)


def next_probabilities(model, task, ids):
    with torch.no_grad():
        logits = copy.deepcopy(model).double()(torch.tensor([task.encode({"prompt": ""}).tolist() + ids])).logits
    return logits[0, -1].softmax(-1).numpy()


def test_the_gradient_is_that_of_finite_differences():
    task = RandomTask(4, 3, ("c", "a"))
    reference, model = gpt2(task, 0), tabular_model(task, std=1.0, seed=4)
    gradient = exact_gradient(task, model, reference, 0.2)["lm_head.weight"]
    assert gradient.abs().max() > 0.01
    for place in [(3, 1), (8, 0), (11, 3)]:
        sides = []
        for sign in (1, -1):
            moved = copy.deepcopy(model).double()
            with torch.no_grad():
                moved.lm_head.weight[place] += sign * 1e-5
            sides.append(evaluate_exact(task, moved, reference, 0.2).objective)
        assert float(gradient[place]) == pytest.approx((sides[0] - sides[1]) / 2e-5, abs=1e-7)
    optimal = solve(task, reference, 0.2).model()
    assert exact_gradient(task, optimal, reference, 0.2)["lm_head.weight"].abs().max() < 1e-6


def test_large_tasks_are_refused_with_their_size():
    count = sum(8**t for t in range(9)) + 8**8 * 8
    with pytest.raises(ValueError, match=rf"at most 2,000,000 responses.*this one has {count:,}"):
        solve(RandomTask(9, 9))
    with pytest.raises(ValueError, match=r"about 10\^90"):
        solve(RandomTask(9, 100))
    assert math.isfinite(solve(RandomTask(5, 6)).objective)


def test_tasks_without_finite_prompts_are_refused():
    class Endless(RandomTask):
        def prompts(self):
            return None

        def sample(self, rng):
            return {"prompt": "", "bonus": 0.0}

    with pytest.raises(ValueError, match=r"define prompts\(\)"):
        solve(Endless())


@pytest.mark.parametrize("response", [[0], [1, 1, 1, 1], [4], [-1]])
def test_logits_after_the_end_are_refused(response):
    with pytest.raises(ValueError, match="response must be at most 3 token ids below 4"):
        solve(RandomTask(4, 4)).logits("", response)


def test_a_foreign_prompt_is_refused():
    with pytest.raises(ValueError, match="one of the task's prompts"):
        solve(RandomTask(4, 4, ("a", "bb"))).logits("b")


def test_a_share_of_nothing_to_gain():
    class Even(RandomTask):
        def score(self, prompts, completions, **columns):
            return [1.0] * len(prompts)

    task = Even()
    model = gpt2(task, 0)
    assert evaluate_exact(task, model, model, 0.5).share == 1
    worse = evaluate_exact(task, tabular_model(task, std=2.0, seed=1), model, 0.5)
    assert worse.objective < worse.optimum - 0.01 and math.isnan(worse.share)


def test_a_penalty_needs_a_reference():
    with pytest.raises(ValueError, match="needs a reference"):
        solve(RandomTask(), kl_coef=0.1)


class Letters(textrl.Task):
    """How many of the letters are "a"."""

    def __init__(self):
        super().__init__(tokenizer=textrl.symbol_tokenizer("ab"), max_new_tokens=2)

    def prompts(self):
        return [{"prompt": "b"}]

    def score(self, prompts, completions, **columns):
        return [float(text.count("a")) for text in completions]


def test_the_optimal_policys_logits_are_those_that_the_temperature_divides():
    task = Letters()
    reference = tabular_model(task, std=1.0, seed=2)
    solution = solve(task, reference, 0.3, temperature=1.5)
    found = evaluate_exact(task, solution.model(), reference, 0.3, temperature=1.5)
    assert found.share == pytest.approx(1, abs=1e-5)
    assert found.objective == pytest.approx(solution.objective, abs=1e-5)


class Anything(textrl.Task):
    """Half a point for either letter, none for the end."""

    def __init__(self):
        super().__init__(tokenizer=textrl.symbol_tokenizer("ab"), max_new_tokens=1)

    def prompts(self):
        return [{"prompt": ""}]

    def score(self, prompts, completions, **columns):
        return [0.5 * len(text) for text in completions]


def test_without_a_penalty_tied_tokens_are_said_evenly():
    solution = solve(Anything())
    assert solution.objective == 0.5
    assert solution.logits("").softmax(-1).tolist() == pytest.approx([0, 0.5, 0.5])
    assert evaluate_exact(Anything(), solution.model()).entropy == pytest.approx(math.log(2))


def test_the_exact_critic_of_a_prompt_is_its_objective():
    task = Letters()
    model, reference = (tabular_model(task, std=1.0, seed=seed) for seed in (1, 2))
    critic = exact_critic(task, model, reference, 0.3, temperature=1.5)
    found = evaluate_exact(task, model, reference, 0.3, temperature=1.5)
    assert found.kl > 0.1
    tokens = torch.from_numpy(task.encode({"prompt": "b"}))[None]
    place = torch.tensor([0]), torch.tensor([tokens.shape[1] - 1])
    assert float(values_at(critic, tokens, *place)) == pytest.approx(found.objective, abs=1e-5)
