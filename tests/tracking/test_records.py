"""Records are defined apart from events, and can be imported with them."""

from __future__ import annotations

from typing import get_args

import pytest
from pydantic import ValidationError

from splitft.tracking import events, records


def test_there_is_a_sentence_for_everything_that_can_come_to_a_server():
    wanted = {"client", "server", *get_args(records.Received)} - {"hidden"}
    assert records.PRIVACY.keys() == wanted


def test_a_record_is_the_same_wherever_it_is_imported_from():
    assert events.Traffic is records.Traffic
    assert events.Bar is records.Bar
    with pytest.raises(ValidationError):
        records.Traffic(sideways={})
