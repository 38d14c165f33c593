"""Labels stand in the gradient that the client returns, and can be read off it."""

from __future__ import annotations

import pytest
import torch

from splitft.audit.attacks.labels import GradientObservationModel, fit_cut_reader, read_head_gradient
from splitft.geometry import Span
from splitft.model import loss_and_gradient, open_model
from splitft.specs import ModelSpec


@pytest.fixture(params=["llama", "gpt2", "gemma2"])
def head(request, tiny_folders):
    model = open_model(ModelSpec(name=str(tiny_folders[request.param]), dtype="float32"))
    return model.segment(Span(0, 0), embedding=True, head=True)


def test_every_label_is_read_off_its_gradient(head):
    generator = torch.Generator().manual_seed(0)
    last = 3 * torch.randn(200, 32, generator=generator)
    labels = torch.randint(272, (200,), generator=generator)
    _, gradient = loss_and_gradient(head, last, labels)
    assert read_head_gradient(head, last, gradient).tolist() == labels.tolist()


def test_noise_hides_labels_and_a_noise_aware_attacker_does_no_worse_than_guessing(head):
    generator = torch.Generator().manual_seed(0)
    last = 3 * torch.randn(200, 32, generator=generator)
    labels = torch.randint(272, (200,), generator=generator)
    _, gradient = loss_and_gradient(head, last, labels)
    typical = float(gradient.square().mean().sqrt())
    noisy = gradient + 20 * typical * torch.randn(gradient.shape, generator=generator)
    read = read_head_gradient(head, last, noisy, GradientObservationModel(deviation=20 * typical))
    assert float((read == labels).float().mean()) < 0.3


def test_a_map_from_gradients_to_labels_can_be_learnt():
    generator = torch.Generator().manual_seed(0)
    embedding = torch.randn(40, 16, generator=generator)
    turn = torch.randn(16, 16, generator=generator)
    labels = torch.randint(40, (600,), generator=generator)
    gradient = -(embedding[labels] @ turn) * torch.rand(600, 1, generator=generator)
    reader = fit_cut_reader(gradient[:400], labels[:400], embedding)
    assert float((reader.read(gradient[400:]) == labels[400:]).float().mean()) > 0.9
