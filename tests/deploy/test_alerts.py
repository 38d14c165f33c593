"""Each alert appears when it should, and not before."""

from __future__ import annotations

import math

import pytest

from splitft.deploy.alerts import alerts

WELL = {
    "started": True,
    "silence_s": 60.0,
    "disk_free_bytes": 50e9,
    "disk_bytes": 100e9,
    "losses": [3.0, 2.9, 2.95, 2.99],
    "troubles": [{"site": "north", "state": "lost", "times": 1}],  # and is back
    "sites": [{"name": "north", "state": "training", "heard_s_ago": 29.0}],
}


def test_a_run_that_goes_well_has_none():
    assert alerts(WELL) == []
    assert alerts({}) == []
    assert alerts({"started": False, "sites": [{"name": "north", "state": "away"}]}) == []


def _site(**values):
    return {"sites": [{"name": "north", "state": "training", "heard_s_ago": 1.0, **values}]}


CASES = {
    "silent": (_site(heard_s_ago=31.0), "north is silent: heard 31 s ago, lost after 60 s"),
    "lost": (_site(state="lost"), "north is lost: see whether it runs"),
    "lost for a reason": (_site(state="lost", reason="no heartbeat for 60 s"), "north is lost: no heartbeat"),
    "declined": (_site(state="declined"), "north is declined: its data owner forbids"),
    "away": (_site(state="away", heard_s_ago=None), "north is away: it was not connected"),
    "rising": ({"losses": [3.0, 2.9, 2.95, 2.96, 3.2]}, "rose in the last 3 rounds, from 2.900 to 3.200"),
    "not finite": ({"losses": [3.0, math.nan]}, "not finite"),
    "not finite in JSON": ({"losses": [3.0, None]}, "not finite"),
    "refusals": (
        {"troubles": [{"site": "south", "state": "refused", "times": 4}]},
        "messages of south were refused 4 times",
    ),
    "updates scaled down": (
        {"troubles": [{"site": "south", "state": "bounded", "times": 2}]},
        "updates of south were scaled down 2 times",
    ),
    "losses left out": (
        {"troubles": [{"site": "south", "state": "doubted", "times": 1}]},
        "held-out losses of south were left out 1 times",
    ),
    "rounds undone": (
        {"undone": ["no site finished it", "3 of 4 sites' loss exploded"]},
        "2 rounds were undone, the last because 3 of 4",
    ),
    "a small part of a large disk": (
        {"disk_free_bytes": 40e9, "disk_bytes": 1e12},
        "nearly full: 40.0 of 1000",
    ),
    "a small disk": ({"disk_free_bytes": 0.9e9, "disk_bytes": 8e9}, "nearly full: 0.9 of 8 GB"),
}


@pytest.mark.parametrize(("changes", "words"), CASES.values(), ids=CASES)
def test_what_needs_attention_is_said(changes, words):
    (found,) = alerts({**WELL, **changes})
    assert words in found
