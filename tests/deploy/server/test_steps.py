"""What a site uploads is held against what was due before anybody else's work depends on it."""

from __future__ import annotations

import pytest
import torch

from splitft.adapters import AdapterState, Factors
from splitft.deploy.server.federation import check_factors
from splitft.errors import AdapterError
from splitft.geometry import Span
from splitft.specs import LoraSpec
from splitft.training.ranks import RankPolicy

KEY = (1, "q_proj")
RANKS = RankPolicy(LoraSpec(rank=4, rank_at_cut=2), 4, "svd", seed=0)


def _state(rank: int = 2, out: int = 5, magnitude: bool = False) -> AdapterState:
    change = torch.zeros(1, out) if magnitude else None
    return AdapterState({KEY: Factors(torch.ones(rank, 3), torch.ones(out, rank), change)})


@pytest.mark.parametrize("magnitude", [False, True])
def test_factors_that_are_due_pass(magnitude):
    check_factors("a", _state(magnitude=magnitude), _state(4, magnitude=magnitude), Span(0, 2), RANKS)


@pytest.mark.parametrize(
    ("sent", "words"),
    [
        (_state(3), "due was rank 2"),
        (_state(out=6), "due was rank 2 over 5 and 3"),
        (_state(magnitude=True), r"lora\.method"),
        (AdapterState(), "other factors"),
    ],
)
def test_factors_that_are_not_are_refused_with_the_sites_name(sent, words):
    with pytest.raises(AdapterError, match=f"^client-2 .*{words}"):
        check_factors("client-2", sent, _state(4), Span(0, 2), RANKS)
