"""Codecs on the simulated clock: every leg pays for the numbers that it encodes and decodes, and no more."""

from __future__ import annotations

from dataclasses import replace

import pytest

from schedule.cases import client, costs
from splitft.errors import ScheduleError
from splitft.schedule.codec_cost import WireBytes, codec_seconds
from splitft.schedule.cost import step_legs

SLOW = WireBytes(hidden=1.0, gradient=0.5, hidden_s=(1e-6, 2e-6), gradient_s=(3e-6, 4e-6))
QUICK = replace(SLOW, hidden_s=(0.0, 0.0), gradient_s=(0.0, 0.0))


@pytest.mark.parametrize("labels", ["client", "server"])
def test_each_leg_pays_for_what_it_encodes_and_decodes(labels):
    one, wide = client("a"), costs(labels=labels)
    D, work = wide.sizes.width, one.workload
    N, M = work.tokens * D, work.labelled_tokens * D
    slow, quick = (
        {leg.name: leg for leg in step_legs(replace(wide, wire=wire), one, 2)} for wire in (SLOW, QUICK)
    )
    paid = {name: slow[name].seconds - quick[name].seconds for name in slow}
    due = {"client_forward": N * 1e-6, "client_backward": N * 4e-6}
    if labels == "client":
        due |= {"server_forward": N * 2e-6 + M * 1e-6, "head": M * 2e-6 + M * 3e-6}
        due |= {"server_backward": M * 4e-6 + N * 3e-6}
    else:
        due |= {"server_step": N * 2e-6 + N * 3e-6}
    assert paid == pytest.approx({name: due.get(name, 0.0) for name in slow}, abs=1e-9)
    assert {name: leg.nbytes for name, leg in slow.items()} == {n: leg.nbytes for n, leg in quick.items()}


def test_a_client_with_codecs_of_its_own_is_charged_for_them():
    one, wide = client("a"), costs()
    own = step_legs(wide, replace(one, wire=SLOW), 2)
    assert own == step_legs(replace(wide, wire=SLOW), one, 2)
    assert own != step_legs(wide, one, 2)


def test_casts_take_no_time_and_other_codecs_what_was_measured():
    assert codec_seconds("bf16", "hidden") == (0.0, 0.0)
    assert codec_seconds("principal:bits=3", "hidden") == codec_seconds("principal", "hidden")
    encode, decode = codec_seconds("int8", "hidden")
    assert 0 < decode < encode < 1e-8


def test_seconds_below_nought_are_refused():
    with pytest.raises(ScheduleError, match="seconds are 0 or more"):
        WireBytes(hidden_s=(-1.0, 0.0))
