"""Workloads: the numbers that are refused, and micro-batches."""

from __future__ import annotations

import math

import pytest

from schedule.cases import WORK
from splitft.errors import ScheduleError
from splitft.schedule.codec_cost import WireBytes
from splitft.schedule.workload import Workload


@pytest.mark.parametrize("bad", [0, -1, math.nan])
def test_impossible_workloads_and_codecs_are_refused(bad):
    with pytest.raises(ScheduleError, match="workload: steps is"):
        Workload(12, 8, 2, 8, bad)
    with pytest.raises(ScheduleError, match=r"gradient takes .* bytes"):
        WireBytes(gradient=bad)


def test_a_workload_has_no_more_labels_than_tokens_and_no_more_tokens_than_padded():
    with pytest.raises(ScheduleError, match="13 labelled of 12 real of 16 padded"):
        Workload(12, 13, 2, 8, 1)
    with pytest.raises(ScheduleError, match="12 labelled of 17 real of 16 padded"):
        Workload(17, 12, 2, 8, 1)
    assert WORK.divided(2).padded_tokens == 8
