"""A held-out loss has noise for one label's loss, and the epsilon that is said."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from laws.federations import federation, write_text
from splitft.privacy.accounting import row_epsilon
from splitft.privacy.defence import promises
from splitft.privacy.held_out_loss import MOST_NATS, HeldOutNoise, bounded_sum, held_out_noise
from splitft.specs import LabelsSpec, PrivacySpec, RowDefenceSpec

DELTA = 1e-5
WIDTH = 64
GAUSSIAN = PrivacySpec(gradient=RowDefenceSpec(defence="gaussian", noise=30.0))
LAPLACE = PrivacySpec(gradient=RowDefenceSpec(defence="laplace", noise=300.0))
RANDOMISED = PrivacySpec(labels=LabelsSpec(defence="randomised", epsilon=2.0))
losses = st.floats(0, 1e4)


@given(st.lists(losses, min_size=1, max_size=30), losses)
def test_another_label_changes_the_sum_by_no_more_than_one_label_counts(exact, another):
    changed = [another, *exact[1:]]
    one, other = (bounded_sum(torch.tensor(each, dtype=torch.float64)) for each in (exact, changed))
    assert abs(one - other) <= MOST_NATS * (1 + 1e-9)


def test_an_evaluation_costs_a_label_what_one_pass_of_its_defence_costs():
    gaussian, laplace, randomised = (held_out_noise(one, WIDTH) for one in (GAUSSIAN, LAPLACE, RANDOMISED))
    assert gaussian.epsilon(1, DELTA) == pytest.approx(row_epsilon("gaussian", 30.0, WIDTH, DELTA))
    assert gaussian.epsilon(7, DELTA) == pytest.approx(row_epsilon("gaussian", 30.0, WIDTH, DELTA, rows=7))
    assert laplace.epsilon(7, DELTA) == pytest.approx(row_epsilon("laplace", 300.0, WIDTH, DELTA, rows=7))
    assert randomised.epsilon(7, DELTA) == pytest.approx(14.0)
    assert held_out_noise(PrivacySpec(), WIDTH) is None
    hidden = PrivacySpec(hidden=RowDefenceSpec(defence="gaussian", noise=1.0))
    clipped = PrivacySpec(gradient=RowDefenceSpec(defence="clip"))
    for unprotected in (hidden, clipped):  # neither has an epsilon of labels
        assert held_out_noise(unprotected, WIDTH) is None
        assert not unprotected.protects_labels


def _drawn(noise: HeldOutNoise, total: float, count: int = 20_000) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.tensor([noise.add(total, generator) for _ in range(count)])


@pytest.mark.parametrize("privacy", [GAUSSIAN, LAPLACE, RANDOMISED])
def test_the_noise_has_the_deviation_that_is_said(privacy):
    noise = held_out_noise(privacy, WIDTH)
    drawn = _drawn(noise, 100.0)
    assert float(drawn.mean()) == pytest.approx(100.0, abs=4 * noise.deviation / math.sqrt(len(drawn)))
    assert float(drawn.std()) == pytest.approx(noise.deviation, rel=0.04)


@pytest.mark.parametrize("privacy", [LAPLACE, RANDOMISED])
def test_no_threshold_tells_two_labels_apart_better_than_epsilon_allows(privacy):
    """For the sums of two label sets that are as far apart as one label can bring them."""
    noise = held_out_noise(privacy, WIDTH)
    low, high = _drawn(noise, 0.0), _drawn(noise, MOST_NATS)
    for threshold in torch.linspace(-1, 2, 13) * MOST_NATS:
        p, q = float((low > threshold).float().mean()), float((high > threshold).float().mean())
        assert q <= p * math.exp(noise.ratio) + 0.02
        assert 1 - p <= (1 - q) * math.exp(noise.ratio) + 0.02


def test_what_leaves_is_noised_and_the_exact_loss_stays(tiny_llama, tmp_path):
    text = write_text(tmp_path / "notes.jsonl")
    seen = []
    for privacy in ({}, {"labels": {"defence": "randomised", "epsilon": 2.0}}):
        prepared = federation(tiny_llama, text, [2], privacy=privacy)
        prepared.server.place({"client-1": 2})
        prepared.server.install(prepared.initial().adapters)
        sent = prepared.simulation(None).evaluate()["client-1"]
        seen.append((sent.loss, prepared.clients[0].held_out.exact.loss, sent.tokens))
    (plain, exact, count), (noised, at_client, same) = seen
    assert (plain, count) == (exact, same)
    assert at_client == pytest.approx(exact, rel=1e-6)
    assert 1e-3 < abs(noised - exact) < 20 * held_out_noise(RANDOMISED, 32).deviation


def test_the_promise_says_that_losses_are_not_reported_and_the_epsilon_of_evaluations():
    [labels, said] = promises(RANDOMISED, WIDTH, 32, 3, evaluations=5)
    assert "epsilon 2 for one label" in labels
    assert "Losses of training batches are not reported" in said
    assert "epsilon 2 for one held-out label in one evaluation, 10 over the 5 of the run" in said
    assert f"laplace noise of {MOST_NATS / 2 * math.sqrt(2):.3g} nats" in said
    hidden = PrivacySpec(hidden=RowDefenceSpec(defence="gaussian", noise=1.0))
    assert not any("not reported" in one for one in promises(hidden, WIDTH, 32, 3, 5))
