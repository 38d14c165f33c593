"""A site that moves to another cut gives up its own B of the blocks that it gives up, and nothing else."""

from __future__ import annotations

import pytest
import torch

from splitft.adapters import AdapterState, Factors
from splitft.deploy.server.claims import check_ready
from splitft.errors import AdapterError, ProtocolError
from splitft.protocol import RoundReady
from splitft.specs import TrainingSpec

KEY = (2, "q_proj")
GIVEN_UP = AdapterState({KEY: Factors(torch.zeros(4, 8), torch.zeros(8, 4))})
NONE = AdapterState()


def own(**changes) -> AdapterState:
    made = {"A": torch.zeros(4, 0), "B": torch.ones(8, 4), **changes}
    return AdapterState({KEY: Factors(**made)})


def ready(state: AdapterState) -> RoundReady:
    return RoundReady(client="a", round=2, own=state)


def test_the_b_of_the_blocks_given_up_is_taken():
    check_ready("a", ready(own()), GIVEN_UP, TrainingSpec(), keeps_own=True)
    check_ready("a", ready(NONE), NONE, TrainingSpec(), keeps_own=True)
    check_ready("a", ready(NONE), GIVEN_UP, TrainingSpec())


@pytest.mark.parametrize(
    ("state", "given_up", "keeps", "words"),
    [
        (own(), GIVEN_UP, False, "of other blocks"),  # a rule without factors of its own
        (own(), NONE, True, "of other blocks"),
        (NONE, GIVEN_UP, True, "of other blocks"),
        (own(A=torch.zeros(4, 8)), GIVEN_UP, True, "sends AB .* due was B"),
        (own(B=torch.ones(8, 5), A=torch.zeros(5, 0)), GIVEN_UP, True, r"due was B \(8, 4\)"),
        (own(magnitude=torch.zeros(1, 8)), GIVEN_UP, True, "due was B"),
        (own(B=torch.full((8, 4), 1e9)), GIVEN_UP, True, "at most 1e\\+06 is aggregated"),
    ],
)
@pytest.mark.fault("a site gives up factors of its own that it has not, or of another size", "it is refused")
def test_other_factors_are_refused(state, given_up, keeps, words):
    with pytest.raises((ProtocolError, AdapterError), match=words):
        check_ready("a", ready(state), given_up, TrainingSpec(), keeps_own=keeps)
