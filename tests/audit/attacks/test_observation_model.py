"""The attacker's model of noise and rounding."""

from __future__ import annotations

import pytest
import torch

from splitft.audit.attacks import ObservationModel, calibrated


def test_the_right_row_fits_under_noise_and_a_wrong_one_does_not():
    generator = torch.Generator().manual_seed(0)
    right, wrong = torch.randn(2, 50, 512, generator=generator)
    channel = ObservationModel(rounding=1e-5, deviation=0.5)
    observed = right + 0.5 * torch.randn(50, 512, generator=generator)
    misfit = channel.misfit(observed, torch.stack([right, wrong], 1))
    assert misfit[:, 0].mean() == pytest.approx(1.0, abs=0.05)
    assert channel.fits(misfit[:, 0], 512).all()
    assert not channel.fits(misfit[:, 1], 512).any()


def test_candidates_are_clipped_and_rounded_as_the_client_does():
    channel = ObservationModel(rounding=1e-5, without_noise=lambda rows: rows.clamp(-1, 1))
    assert channel.misfit(torch.tensor([[1.0, -1.0]]), torch.tensor([[[7.0, -3.0]]])).item() == 0.0


def test_rounding_is_measured_on_public_rows():
    rows = torch.randn(400, 64, generator=torch.Generator().manual_seed(0))
    twice = rows * (1 + 0.01 * torch.randn(400, 64, generator=torch.Generator().manual_seed(1)))
    found = calibrated(ObservationModel(), rows, twice).rounding
    assert 0.01 < found < 0.03  # twice what was put in, less what counts against the floor
