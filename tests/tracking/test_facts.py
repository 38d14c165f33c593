"""Facts stand apart from events, and events give them on."""

from __future__ import annotations

from typing import get_args

import pytest
from pydantic import ValidationError

from splitft.tracking import events, facts


def test_there_is_a_sentence_for_everything_that_can_come_to_a_server():
    wanted = {"client", "server", *get_args(facts.Received)} - {"hidden"}
    assert facts.PRIVACY.keys() == wanted


def test_a_fact_is_the_same_wherever_it_is_had_from():
    assert events.Traffic is facts.Traffic
    assert events.Bar is facts.Bar
    with pytest.raises(ValidationError):
        facts.Traffic(sideways={})
