"""The attacker's copy of the model computes what a client does."""

from __future__ import annotations

import pytest
import torch

from splitft.adapters import AdapterState
from splitft.audit.attacks.public_model import FIRST, PublicModel
from splitft.model import open_model
from splitft.specs import ModelSpec


@pytest.mark.parametrize("cuts", [(3,), (1, 3), (2, 1, 3)])
def test_the_table_is_of_every_token_after_the_first_whatever_was_computed_before(tiny_llama, cuts):
    public_model = PublicModel(
        open_model(ModelSpec(name=str(tiny_llama))), 1, AdapterState(), "attention", 1.0
    )
    for cut in cuts:
        table = public_model.at(cut).table
    tokens = torch.arange(public_model.shape.vocab)
    pairs = torch.stack([torch.full_like(tokens, FIRST), tokens], 1)
    torch.testing.assert_close(table, public_model.hidden(pairs, cuts[-1])[:, 1].float())
