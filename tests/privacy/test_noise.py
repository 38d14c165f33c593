"""Every guarantee claimed for a row rests on two facts: clipping bounds it, and the noise is what it says."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from splitft.privacy.noise import DEFENCES, Noise, clip, deviation, laplace_rate, typical_norm

NORMS = st.floats(1e-3, 1e4)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(seed=st.integers(0, 10_000), scale=NORMS, norm=NORMS)
def test_no_two_clipped_rows_are_further_apart_than_twice_the_norm(seed, scale, norm):
    rows = scale * torch.randn(6, 8, generator=generator(seed), dtype=torch.float64)
    treated = clip(rows, norm, 0.0, generator())
    assert float(treated.norm(dim=1).max()) <= norm * (1 + 1e-12)
    assert float(torch.cdist(treated, treated).max()) <= 2 * norm * (1 + 1e-12)
    short = rows.norm(dim=1) <= norm
    assert torch.equal(treated[short], rows[short])


def test_clipping_keeps_the_direction_of_a_row_and_a_row_of_zeros():
    rows = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    assert torch.allclose(clip(rows, 1.0, 0.0, generator()), torch.tensor([[0.6, 0.8], [0.0, 0.0]]))


@pytest.mark.parametrize("defence", ["gaussian", "laplace"])
def test_noise_has_mean_zero_and_the_deviation_it_says(defence):
    width, norm, noise = 64, 3.0, 0.7
    rows = torch.zeros(20_000, width)
    treated = DEFENCES[defence](rows, norm, noise, generator(1))
    expected = deviation(norm, noise, width)
    assert expected == pytest.approx(noise * norm / math.sqrt(width))
    assert float(treated.std()) == pytest.approx(expected, rel=0.01)
    assert float(treated.mean()) == pytest.approx(0, abs=expected * 4 / math.sqrt(treated.numel()))
    assert float(treated.std(dim=0).max() / expected) < 1.05  # the same on every coordinate


def test_the_radius_of_laplace_noise_is_that_of_a_gamma_distribution():
    """Density ~ exp(-rate ||x||) in D dimensions: ||x|| ~ Gamma(D, rate), of variance D / rate^2."""
    width, norm, noise = 16, 2.0, 1.5
    radius = DEFENCES["laplace"](torch.zeros(40_000, width), norm, noise, generator(2)).norm(dim=1)
    rate = laplace_rate(norm, noise, width)
    assert float(radius.mean()) == pytest.approx(width / rate, rel=0.01)
    assert float(radius.var()) == pytest.approx(width / rate**2, rel=0.03)


def test_laplace_noise_in_one_dimension_keeps_its_epsilon_empirically():
    """With D = 1 the noise is Laplace's own: the odds of any event change by exp(epsilon) at most."""
    norm, noise, count = 1.0, 2.0, 200_000
    epsilon = 2 * norm * laplace_rate(norm, noise, 1)
    one, other = (
        DEFENCES["laplace"](torch.full((count, 1), value), norm, noise, generator(3 + i)).flatten()
        for i, value in enumerate((1.0, -1.0))
    )
    edges = torch.linspace(-5, 5, 21)
    a, b = (torch.histogram(sample, edges).hist for sample in (one, other))
    busy = torch.minimum(a, b) > 1000
    assert float((a[busy] / b[busy]).log().abs().max()) <= epsilon * 1.05
    assert float((a[busy] / b[busy]).log().abs().max()) >= epsilon * 0.9  # and no less: the noise is not idle


@pytest.mark.parametrize("defence", DEFENCES)
def test_a_defence_keeps_shape_and_type_and_passes_the_exact_gradient_of_clipping(defence):
    rows = torch.randn(5, 8, generator=generator(4), dtype=torch.bfloat16)
    assert DEFENCES[defence](rows, 1.0, 0.5, generator()).dtype == torch.bfloat16
    leaf = torch.randn(5, 8, generator=generator(5), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: DEFENCES[defence](x, 2.0, 0.5, generator(6)), leaf)


def test_without_a_defence_the_rows_are_the_same_object():
    rows = torch.randn(2, 3)
    assert DEFENCES["none"](rows, 1.0, 0.0, generator()) is rows


def test_simulated_noise_repeats_by_place_and_differs_between_places_and_clients():
    def drawn(noise: Noise, *place: object) -> torch.Tensor:
        return torch.randn(4, generator=noise.generator(*place))

    one, other = Noise(0, "client-1"), Noise(0, "client-2")
    assert torch.equal(drawn(one, "hidden", 1, 2), drawn(Noise(0, "client-1"), "hidden", 1, 2))
    others = [drawn(one, "hidden", 1, 3), drawn(other, "hidden", 1, 2), drawn(one, "gradient", 1, 2)]
    assert not any(torch.equal(drawn(one, "hidden", 1, 2), noise) for noise in others)


def test_secret_noise_never_repeats():
    noise = Noise(0, "client-1", secret=True)
    one, other = (torch.randn(4, generator=noise.generator("hidden", 1, 2)) for _ in range(2))
    assert not torch.equal(one, other)


def test_the_typical_norm_is_the_median_and_ignores_an_attention_sink():
    rows = torch.eye(4) * torch.tensor([1.0, 2.0, 2.0, 1e6])
    assert typical_norm(rows) == 2.0
