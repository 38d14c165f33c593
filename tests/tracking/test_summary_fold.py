"""The summary that grows event by event is that of the whole file, whatever the run did."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from splitft.tracking import summary_writer
from splitft.tracking.events import Evaluated, RoundDone, RunResumed, StepDone, Warned
from splitft.tracking.log import EventLog, read_events
from splitft.tracking.summary import summarise, write_summary
from splitft.tracking.summary_writer import SummaryWriter
from tracking.story import story


def _told(folder: Path, events) -> SummaryWriter:
    writer = SummaryWriter(folder)
    log = EventLog(folder / "events.jsonl")
    for event in events:
        log(event)
        writer(event)
    log.close()
    return writer


def test_the_file_is_the_same_event_by_event_and_at_once(tmp_path):
    summary = _told(tmp_path, story()).write()
    written = (tmp_path / "summary.json").read_bytes()
    assert summary == summarise(story()) == json.loads(written)
    assert write_summary(tmp_path) == summary
    assert (tmp_path / "summary.json").read_bytes() == written


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_processes_that_stop_anywhere_and_resume_sum_up_as_the_settled_events(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("run")
    for number in range(data.draw(st.integers(1, 3))):
        whole = (
            story()[:]
            if not number
            else [RunResumed(t=1000.0 * number, round=data.draw(st.sampled_from((1, 2))))]
        )
        if number:
            whole += [Warned(t=whole[0].t + 1, message="again")]
            whole += [event for event in story()[1:] if getattr(event, "round", 0) >= whole[0].round]
        writer = _told(folder, whole[: data.draw(st.integers(1, len(whole)))])
        assert writer.write() == summarise(read_events(folder / "events.jsonl"))


def test_a_round_reads_no_file_again(tmp_path, monkeypatch):
    writer = _told(tmp_path, story()[:2])
    monkeypatch.setattr(summary_writer, "read_events", lambda path: pytest.fail("the whole file is read"))
    for event in story()[2:]:
        writer(event)
    assert writer.write()["rounds"] == sum(isinstance(event, RoundDone) for event in story())


def test_the_file_has_a_line_for_each_client_and_number(tmp_path):
    _told(tmp_path, story()).write()
    lines = (tmp_path / "summary.json").read_text().splitlines()
    assert len([line for line in lines if line.startswith('    {"name": ')]) == 2
    assert max(map(len, lines)) < 1000
    assert any(isinstance(event, StepDone | Evaluated) for event in story())


def test_nothing_told_is_an_empty_summary(tmp_path):
    (tmp_path / "events.jsonl").write_text("")
    assert write_summary(tmp_path) == {}
    assert json.loads((tmp_path / "summary.json").read_text()) == {}
