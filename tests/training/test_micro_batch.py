"""A loss that is no number ends training with words."""

from __future__ import annotations

import math

import pytest

from splitft.errors import RunError
from splitft.training.micro_batch import MicroBatch, check_finite


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_no_number_names_client_step_and_what_to_do(loss):
    micro_batch = MicroBatch(round=2, step=7, number=0, of=1, sequences=1, labelled=3, step_labelled=3)
    with pytest.raises(RunError, match=r"client-1.*step 7 of round 2.*training\.lr"):
        check_finite(loss, "client-1", micro_batch)
    check_finite(3.5, "client-1", micro_batch)
