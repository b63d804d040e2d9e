"""The divergence: estimators by hand, against the full sum, and the coefficient that follows a target."""

import math

import pytest
import torch

from textrl.kl import adapted, full_kl, k1, k2, k3
from textrl.score_weight import first_weight, risen

P = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
Q = torch.tensor([0.2, 0.2, 0.6], dtype=torch.float64)
KL = 0.5 * math.log(2.5) + 0.3 * math.log(1.5) + 0.2 * math.log(1 / 3)


def test_a_coefficient_stays_above_zero_however_short_the_horizon():
    coefs = [0.1]
    for _ in range(3):
        coefs.append(adapted(coefs[-1], 0.0, target=100.0, episodes=64, horizon=10.0))
    assert coefs[1:] == pytest.approx([0.08, 0.064, 0.0512])


def test_estimators_by_hand():
    logprob, ref = torch.tensor(math.log(0.5)), torch.tensor(math.log(0.2))
    assert float(k1(logprob, ref)) == pytest.approx(math.log(2.5), abs=1e-6)
    assert float(k2(logprob, ref)) == pytest.approx(math.log(2.5) ** 2 / 2, abs=1e-6)
    assert float(k3(logprob, ref)) == pytest.approx(0.4 - 1 + math.log(2.5), abs=1e-6)


def test_k1_and_k3_are_unbiased_and_k2_is_not():
    assert float(P @ k1(P.log(), Q.log())) == pytest.approx(KL, abs=1e-9)
    assert float(P @ k3(P.log(), Q.log())) == pytest.approx(KL, abs=1e-9)
    assert abs(float(P @ k2(P.log(), Q.log())) - KL) > 0.004
    assert (k3(P.log(), Q.log()) >= 0).all() and (k1(P.log(), Q.log()) < 0).any()


def test_the_weight_of_the_score():
    assert [risen(0.1, done) for done in (0, 0.15, 0.3)] == pytest.approx([0.1, 0.1 * math.e, 0.1 * math.e**2])
    assert risen(0.1, 0.15 * math.log(10)) == risen(0.1, 0.6) == risen(1, 0) == 1
    assert risen(1e-4, 0.15) == pytest.approx(0.001)  # it is 1 at 0.6, however small it was
    assert [first_weight(0.05, 2.0), first_weight(0.3, 0.1)] == pytest.approx([0.01, 1])


def test_full_kl():
    assert float(full_kl(P.log() + 3, Q.log() - 1)) == pytest.approx(KL, abs=1e-6)  # logits may be shifted
    assert full_kl(torch.zeros(2, 4, 3), torch.zeros(2, 4, 3)).tolist() == [[0] * 4] * 2
    lowest = torch.finfo(torch.float32).min
    one, other = torch.tensor([0.0, 0.0, lowest]), torch.tensor([0.0, math.log(3), lowest])  # a masked token
    assert float(full_kl(one, other)) == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(0.5 / 0.75), abs=1e-6)


def test_gradient_of_full_kl_vanishes_where_both_are_one_and_its_curvature_is_fishers():
    logits = P.log().float().requires_grad_()
    (gradient,) = torch.autograd.grad(full_kl(logits.detach(), logits), logits, create_graph=True)
    assert gradient.detach().abs().max() < 1e-6
    rows = torch.stack([torch.autograd.grad(gradient[i], logits, retain_graph=True)[0] for i in range(3)])
    assert torch.allclose(rows, (torch.diag(P) - torch.outer(P, P)).float(), atol=1e-6)


def test_adaptive_coefficient():
    assert adapted(0.1, 6.6, 6.0, 100, 1000) == pytest.approx(0.1 * (1 + 0.1 * 0.1))
    assert adapted(0.1, 60, 6.0, 100, 1000) == pytest.approx(0.1 * (1 + 0.2 * 0.1))  # the error is clipped
    assert adapted(0.1, 0, 6.0, 100, 1000) == pytest.approx(0.1 * (1 - 0.2 * 0.1))


def test_tokens_that_cannot_come_add_nothing_to_the_kl():
    logits = torch.tensor([0.0, 0.0, -math.inf])
    assert float(full_kl(logits, torch.zeros(3))) == pytest.approx(math.log(3 / 2))
    assert float(full_kl(logits, logits)) == 0  # neither policy says the last
