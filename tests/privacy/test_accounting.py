"""Epsilon against closed forms, published numbers and two other accountants."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitft.privacy.accounting import gaussian_epsilon, row_epsilon, updates_epsilon


def delta_of(epsilon: float, mu: float) -> float:
    """The Gaussian mechanism's exact delta (Balle and Wang 2018, arXiv 1805.06530, Theorem 8)."""

    def phi(x: float) -> float:
        return math.erfc(-x / math.sqrt(2)) / 2

    return phi(mu / 2 - epsilon / mu) - math.exp(epsilon) * phi(-mu / 2 - epsilon / mu)


@given(mu=st.floats(0.05, 12), delta=st.sampled_from([1e-3, 1e-5, 1e-6]))
def test_epsilon_inverts_the_exact_delta_of_the_gaussian_mechanism(mu, delta):
    epsilon = gaussian_epsilon(mu, delta)
    assert delta_of(epsilon, mu) == pytest.approx(delta, rel=1e-3)


def test_epsilon_is_that_of_the_gaussian_mechanism_in_the_textbook_and_below_its_bound():
    """Dwork and Roth 2014, Theorem A.1: sigma = sqrt(2 ln(1.25 / delta)) / epsilon suffices below 1."""
    sigma = math.sqrt(2 * math.log(1.25 / 1e-5)) / 0.9
    assert 0.5 < gaussian_epsilon(1 / sigma, 1e-5) < 0.9


def test_mu_of_one_at_delta_1e_5_is_the_published_4_38():
    """1-GDP is (4.38, 1e-5)-DP: Dong et al. 2019, from Corollary 2.13."""
    assert gaussian_epsilon(1.0, 1e-5) == pytest.approx(4.377, abs=1e-3)


@pytest.mark.parametrize(("sigma", "rounds"), [(1.0, 1), (4.0, 10), (2.0, 100)])
def test_rounds_compose_as_two_other_accountants_have_it(sigma, rounds):
    from opacus.accountants.analysis import rdp

    orders = [1 + x / 10 for x in range(1, 100)] + list(range(12, 64))
    spent = rdp.compute_rdp(q=1.0, noise_multiplier=sigma, steps=rounds, orders=orders)
    renyi, _ = rdp.get_privacy_spent(orders=orders, rdp=spent, delta=1e-5)
    ours = updates_epsilon(sigma, rounds, 1e-5)
    assert 0.8 * renyi < ours <= renyi  # Renyi's is an upper bound, and ours is exact


def test_rounds_compose_as_the_privacy_loss_distribution_has_it():
    from opacus.accountants import PRVAccountant

    numerical = PRVAccountant()
    numerical.history = [(4.0, 1.0, 10)]
    assert updates_epsilon(4.0, 10, 1e-5) == pytest.approx(numerical.get_epsilon(delta=1e-5), rel=0.01)


def test_without_noise_epsilon_is_infinite_and_without_a_release_it_is_zero():
    assert updates_epsilon(0.0, 3, 1e-5) == math.inf
    assert row_epsilon("clip", 0.0, 64, 1e-5) == math.inf
    assert gaussian_epsilon(0.0, 1e-5) == 0.0
    assert gaussian_epsilon(1e-9, 1e-5) == 0.0


def test_epsilon_grows_without_a_step_where_the_exact_dual_overflows():
    values = [gaussian_epsilon(mu, 1e-5) for mu in (20, 25, 27, 28, 30, 60, 1000)]
    assert values == sorted(values)
    assert values[-1] < math.inf


def test_a_row_under_gaussian_noise_is_a_mechanism_of_sensitivity_two_norms():
    """s = noise C / sqrt(D) against 2 C: mu = 2 sqrt(D) / noise, whatever the norm C is."""
    assert row_epsilon("gaussian", 40.0, 100, 1e-5) == pytest.approx(gaussian_epsilon(0.5, 1e-5))
    assert row_epsilon("gaussian", 40.0, 100, 1e-5, rows=4) == pytest.approx(gaussian_epsilon(1.0, 1e-5))


def test_rows_under_laplace_noise_add_up():
    one = row_epsilon("laplace", 10.0, 1, 1e-5)
    assert one == pytest.approx(2 * math.sqrt(2) / 10)
    assert row_epsilon("laplace", 10.0, 1, 1e-5, rows=7) == pytest.approx(7 * one)
