"""Moments on a site's own disk are those of the cut and the steps that the server counts, or none."""

from __future__ import annotations

import json
import stat
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from damage import mutations
from splitft.adapters import AdapterState, Factors
from splitft.deploy.site.site_store import KeptState, SiteStore
from splitft.errors import ForbiddenError


def moments(value: float) -> KeptState:
    return KeptState({"0.q_proj.A.exp_avg": torch.full((2,), value)})


def value_of(found: KeptState) -> float | None:
    return float(found.moments["0.q_proj.A.exp_avg"][0]) if found else None


def test_a_site_goes_on_with_what_the_server_knows_of(tmp_path):
    store = SiteStore(tmp_path)
    store.save(1, 2, 10, moments(1.0))
    store.save(2, 3, 10, moments(2.0), begun=True)  # it has moved in round 2
    assert value_of(store.load(1, 2, 10)) == 1.0  # the server went back to round 1
    assert value_of(store.load(2, 2, 10)) == 1.0  # it never heard of the move
    assert value_of(store.load(2, 3, 10)) == 2.0  # it heard of the move, and of no training
    assert value_of(store.load(5, 3, 10)) == 2.0  # rounds went by without this site
    store.save(2, 3, 20, moments(3.0))  # it has trained
    assert value_of(store.load(2, 3, 20)) == 3.0
    assert value_of(store.load(2, 3, 10)) == 2.0  # the server never heard of its training
    store.save(2, 3, 10, moments(4.0), begun=True)  # so it begins the round again
    assert value_of(store.load(2, 3, 20)) is None


def test_the_last_two_rounds_stay_and_what_is_damaged_is_none(tmp_path):
    store = SiteStore(tmp_path)
    for number in (1, 2, 3):
        store.save(number, 2, 10 * number, moments(number))
    assert value_of(store.load(3, 2, 10)) is None
    assert value_of(store.load(3, 2, 20)) == 2.0
    (tmp_path / "kept-0003.safetensors").write_bytes(b"half a file")
    assert value_of(store.load(3, 2, 30)) is None
    assert value_of(store.load(3, 2, 20)) == 2.0


def test_what_was_kept_of_later_rounds_goes_when_the_run_begins_anew(tmp_path):
    store = SiteStore(tmp_path)
    for number in (8, 9, 10):
        store.save(number, 2, 10 * number, moments(number))
    for number in (1, 2):
        store.save(number, 2, 10 * number, moments(-number))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "kept-0001.safetensors",
        "kept-0002.safetensors",
    ]
    assert value_of(store.load(2, 2, 10)) == -1.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kept")
    store = SiteStore(folder)
    for number in (1, 2):
        store.save(number, 2, 10, moments(number))
    return folder


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_any_change_is_found_and_the_round_before_is_used(folder, data):
    path = folder / "kept-0002.safetensors"
    written = path.read_bytes()
    path.write_bytes(data.draw(mutations(written)))
    try:
        assert value_of(SiteStore(folder).load(2, 2, 10)) == 1.0
    finally:
        path.write_bytes(written)
    assert value_of(SiteStore(folder).load(2, 2, 10)) == 2.0


def test_damage_is_said_in_the_log(tmp_path, caplog):
    SiteStore(tmp_path).save(1, 2, 10, moments(1.0))
    path = tmp_path / "kept-0001.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    assert value_of(SiteStore(tmp_path).load(1, 2, 10)) is None
    assert "kept-0001.safetensors is damaged and is not used" in caplog.text


def test_moments_of_an_earlier_version_are_used(tmp_path):
    data = save(moments(4.0).moments, metadata={"steps": "10", "cut": "2"})
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert set(header["__metadata__"]) == {"steps", "cut"}
    (tmp_path / "kept-0001.safetensors").write_bytes(data)
    assert value_of(SiteStore(tmp_path).load(1, 2, 10)) == 4.0


def test_a_site_declines_to_go_on_with_another_text(tmp_path):
    SiteStore(tmp_path, "one two").check_text(0)
    SiteStore(tmp_path, "one two").check_text(3)
    with pytest.raises(ForbiddenError, match=r"not the one with which it began this run.*remove .*text.txt"):
        SiteStore(tmp_path, "one three").check_text(3)
    SiteStore(tmp_path, "one three").check_text(0)  # another run of this name begins
    SiteStore(tmp_path, "one three").check_text(1)
    SiteStore(tmp_path / "new", "one").check_text(5)  # a run of an earlier version: known from now on
    with pytest.raises(ForbiddenError):
        SiteStore(tmp_path / "new", "two").check_text(6)


def own(value: float) -> AdapterState:
    return AdapterState({(0, "q_proj"): Factors(torch.zeros(2, 0), torch.full((3, 2), value))})


def test_factors_that_never_leave_are_kept_beside_the_moments(tmp_path):
    store = SiteStore(tmp_path)
    store.save(1, 2, 10, KeptState(moments(1.0).moments, own(2.0)))
    found = store.load(1, 2, 10)
    assert (value_of(found), found.own.tensors()["0.q_proj.B"].tolist()) == (1.0, [[2.0, 2.0]] * 3)
    assert found.own[0, "q_proj"].names == "B"
    assert [stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()] == [0o600]


DYING = """
import sys, torch
from pathlib import Path
from splitft.adapters import AdapterState, Factors
from splitft.deploy.site.site_store import KeptState, SiteStore
store = SiteStore(Path(sys.argv[1]))
for number in range(1, 10**6):
    B = torch.full((300, 200), float(number))
    state = KeptState({}, AdapterState({(0, "q_proj"): Factors(torch.zeros(200, 0), B)}))
    store.save(number, 2, number, state, begun=True)
    store.save(number, 2, number, state)
    print(number, flush=True)
"""


@pytest.mark.fault(
    "a site's process is killed (SIGKILL) while it writes", "what it has told of is on its disk"
)
def test_what_was_written_before_a_kill_is_whole(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", DYING, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    try:
        for line in process.stdout:
            if int(line) == 20:
                break
    finally:
        process.kill()
        rest = process.communicate()[0].split()
    last = int(rest[-1]) if rest else 20
    found = SiteStore(tmp_path).load(last, 2, last)
    assert found.own.tensors()["0.q_proj.B"].unique().tolist() == [float(last)]
