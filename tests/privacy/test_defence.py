"""What a client does before anything leaves it: public norms, and a site's floor under a run."""

from __future__ import annotations

import pytest
import torch

from splitft.data.text import Batch, Example
from splitft.errors import ProtocolError
from splitft.privacy.defence import Defence, promises, with_site
from splitft.privacy.noise import Noise
from splitft.specs import PrivacySpec, RowDefenceSpec, SiteBoundsSpec, UpdatesSpec

PUBLIC = Batch.of([Example((1, 2, 3))])


def defence(**privacy: object) -> Defence:
    return Defence(PrivacySpec(**privacy), Noise(0, "client-1"), PUBLIC)


def test_the_public_norm_is_asked_of_the_base_model_once_for_each_cut():
    asked = []

    def base(batch: Batch) -> torch.Tensor:
        asked.append(batch)
        return torch.full((3, 4), 1.0)  # every row has norm 2

    guard = defence(hidden=RowDefenceSpec(defence="clip"))
    rows = torch.full((5, 4), 10.0)
    for cut in (1, 1, 2):
        assert torch.allclose(guard.hidden(rows, cut, base, "training", 1, 0).norm(dim=1), torch.tensor(2.0))
    assert asked == [PUBLIC, PUBLIC]


def test_a_gradients_norm_comes_from_random_labels_at_what_the_server_sent_and_not_from_the_text():
    last = torch.randn(6, 4)

    def head(rows: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        assert torch.equal(rows, last)
        return torch.full_like(rows, 0.5)  # norm 1

    guard = defence(gradient=RowDefenceSpec(defence="clip"))
    treated = guard.gradient(torch.full((6, 4), 7.0), last, 100, head, 1, 0)
    assert torch.allclose(treated.norm(dim=1), torch.tensor(1.0))


def test_a_norm_given_for_a_gradient_is_that_of_one_tokens_loss():
    guard = defence(gradient=RowDefenceSpec(defence="clip", clip_norm=6.0))
    treated = guard.gradient(torch.full((3, 4), 7.0), torch.zeros(3, 4), 9, lambda rows, labels: rows, 1, 0)
    assert torch.allclose(treated.norm(dim=1), torch.tensor(2.0))  # of a mean over three tokens


def test_a_site_raises_the_noise_of_a_run_to_its_floor_and_never_lowers_it():
    site = SiteBoundsSpec(min_noise=0.5)
    assert with_site(PrivacySpec(), site).hidden == RowDefenceSpec(defence="gaussian", noise=0.5)
    weak = PrivacySpec(hidden=RowDefenceSpec(defence="laplace", noise=0.1, clip_norm=3.0))
    assert with_site(weak, site).hidden == RowDefenceSpec(defence="laplace", noise=0.5, clip_norm=3.0)
    strong = PrivacySpec(hidden=RowDefenceSpec(defence="laplace", noise=0.9))
    assert with_site(strong, site) is strong


def test_a_site_takes_no_part_at_a_shallower_cut_than_it_allows():
    guard = Defence(PrivacySpec(), Noise(0, "a"), site=SiteBoundsSpec(min_cut=4))
    guard.check_cut(4)
    with pytest.raises(ProtocolError, match="cut 3 was asked for, but this site takes part from cut 4"):
        guard.check_cut(3)


def test_a_run_says_what_it_promises_and_when_a_promise_means_nothing():
    spec = PrivacySpec(
        hidden=RowDefenceSpec(defence="gaussian", noise=1.0),
        gradient=RowDefenceSpec(defence="laplace", noise=2000.0),
        updates=UpdatesSpec(clip_norm=1.0, noise_multiplier=2.0),
        private_blocks=2,
    )
    hidden, gradient, losses, updates, private = promises(spec, width=576, tokens=64, passes=3, evaluations=4)
    assert "no meaningful promise" in hidden
    assert "labels alone" in gradient
    assert "no meaningful promise" not in gradient
    assert "not against the server" in updates
    assert "first 2 blocks never leave" in private
    assert "Losses of training batches are not reported" in losses
    assert "laplace noise" in losses
    assert promises(PrivacySpec(), 576, 64, 3, 4) == []
