"""Events survive the file, a crash in the middle of a line, and a run that is resumed."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitft.errors import RunError
from splitft.tracking.events import (
    CheckpointSaved,
    CutsChanged,
    Evaluated,
    RunDone,
    RunResumed,
    StepDone,
    Traffic,
    Warned,
)
from splitft.tracking.log import EventLog, read_events, settled
from tracking.story import ANN, BOB, started, step, story


def write(path, events) -> None:
    log = EventLog(path)
    for event in events:
        log(event)
    log.close()


def test_a_run_survives_its_file(tmp_path):
    write(tmp_path / "events.jsonl", story())
    assert read_events(tmp_path / "events.jsonl") == story()


NUMBERS = st.floats(allow_nan=False)
COUNTS = st.dictionaries(st.sampled_from(["hidden", "gradient", "adapter", "label"]), st.integers(0, 2**60))
EVENTS = st.one_of(
    st.builds(
        StepDone,
        t=st.floats(0, 1e12), round=st.integers(1), step=st.integers(0), client=st.text(), loss=NUMBERS,
        tokens=st.integers(0), examples=st.integers(0), seconds=st.dictionaries(st.text(), NUMBERS),
        traffic=st.builds(Traffic, up=COUNTS, down=COUNTS),
    ),
    st.builds(Warned, t=st.floats(0, 1e12), message=st.text()),
    st.builds(
        Evaluated,
        t=st.floats(0, 1e12), round=st.integers(0), loss=NUMBERS,
        by_client=st.dictionaries(st.text(), NUMBERS),
        traffic=st.dictionaries(st.text(), st.builds(Traffic, up=COUNTS, down=COUNTS)),
    ),
)  # fmt: skip


@given(st.lists(EVENTS, max_size=5))
def test_any_names_numbers_and_line_ends_survive_the_file(tmp_path_factory, events):
    path = tmp_path_factory.mktemp("events") / "events.jsonl"
    write(path, events)
    assert read_events(path) == events


def test_a_loss_that_is_not_a_number_survives_as_such(tmp_path):
    write(tmp_path / "e", [step(1, 1, 0, ANN, math.nan, 3), step(2, 1, 0, BOB, math.inf, 3)])
    first, second = read_events(tmp_path / "e")
    assert math.isnan(first.loss)
    assert second.loss == math.inf


def test_an_event_is_on_disk_as_soon_as_it_is_told(tmp_path):
    log = EventLog(tmp_path / "e")
    log(started())
    assert read_events(tmp_path / "e") == [started()]
    log.close()
    log.close()


@pytest.mark.parametrize("torn", ['{"event":"StepD', "\u2713".encode()[:2].decode("latin-1"), "{}"])
def test_a_line_torn_by_a_crash_is_left_out_and_cut_off_before_more_is_written(tmp_path, torn):
    path = tmp_path / "events.jsonl"
    write(path, story()[:3])
    with path.open("ab") as file:
        file.write(torn.encode("latin-1"))
    assert read_events(path) == story()[:3]
    write(path, story()[3:])
    assert read_events(path) == story()


def test_a_file_of_nothing_but_a_torn_line_is_empty(tmp_path):
    path = tmp_path / "events.jsonl"
    path.write_bytes(b'{"event":"RunSta')
    assert read_events(path) == []
    write(path, story())
    assert read_events(path) == story()


def test_a_bad_line_in_the_middle_is_named(tmp_path):
    path = tmp_path / "events.jsonl"
    write(path, story()[:2])
    with path.open("a") as file:
        file.write('{"event": "Applause"}\n')
    write(path, story()[2:])
    with pytest.raises(RunError, match=r"events\.jsonl:3: not an event of this version.*Applause"):
        read_events(path)


def test_a_folder_without_events_is_named(tmp_path):
    with pytest.raises(RunError, match="is this a run folder"):
        read_events(tmp_path / "events.jsonl")


def test_what_a_resumed_run_does_again_supersedes_what_it_did():
    kept = settled([*story(), RunResumed(t=200, round=2), step(205, 2, 2, ANN, 1.0, 5)])
    trained = [e.t for e in kept if isinstance(e, StepDone)]
    assert trained == [105, 106, 107, 108, 205]
    assert [e.round for e in kept if isinstance(e, Evaluated)] == [0, 1]
    assert [e.round for e in kept if isinstance(e, CheckpointSaved)] == [1]
    assert [e.round for e in kept if isinstance(e, CutsChanged)] == [1]
    assert not any(isinstance(e, RunDone) for e in kept)
    assert started() in kept


def test_a_run_that_was_never_resumed_is_settled_as_it_is():
    assert settled(story()) == story()


@given(st.lists(st.integers(1, 3), max_size=4))
def test_settling_twice_is_settling_once(restarts):
    events = story()
    for restart in restarts:
        events += [RunResumed(t=300, round=restart), step(301, restart, 0, ANN, 1.0, 1)]
    assert settled(settled(events)) == settled(events)


def test_the_privacy_sentence_says_who_can_read_the_text():
    assert "never token ids" in started(labels="client").privacy
    assert "can read the clients' text" in started(labels="server").privacy
