"""The page about a run stands alone, says what the summary says, and shows every name as plain text."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from splitft.errors import RunError
from splitft.report.page import page, write_report
from splitft.report.run_record import read_run
from splitft.tracking.events import (
    Bar,
    ClientInfo,
    CutsChanged,
    Evaluated,
    Event,
    RoundTimed,
    RunResumed,
    Warned,
)
from splitft.tracking.log import EventLog
from splitft.tracking.summary import client_table, headline, summarise
from tracking.story import started, step, story

HOSTILE = "</script><script>alert(1)</script><b>&\"'"


class Seen(HTMLParser):
    """What a browser would make of a page: its elements, the text a reader sees, its scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.scripts: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self.open.append(tag)
            self.scripts.append("")

    def handle_endtag(self, tag) -> None:
        if tag in ("script", "style"):
            self.open.pop()
        else:
            self.text += " "

    def handle_data(self, data) -> None:
        if self.open:
            self.scripts[-1] += data
        else:
            self.text += data

    @property
    def words(self) -> str:
        return " ".join(self.text.split())


def run_folder(folder: Path, events: Iterable[Event], config: str | None = None) -> Path:
    folder.mkdir(parents=True)
    log = EventLog(folder / "events.jsonl")
    for event in events:
        log(event)
    log.close()
    if config is not None:
        (folder / "config.yaml").write_text(config, encoding="utf-8")
    return folder


def seen(*folders: Path) -> Seen:
    return Seen(page([read_run(folder) for folder in folders]))


def figures(told: Seen) -> list[dict]:
    """The charts' data, in the page's order."""
    return [json.loads(script) for script in told.scripts if script.startswith('{"data"')]


@pytest.fixture
def finished(tmp_path) -> Path:
    return run_folder(tmp_path / "a-run", story(), "seed: 7\nlora: {rank: 4}\n")


def test_the_page_says_what_the_summary_says(finished, tmp_path):
    path = write_report([finished], tmp_path / "new/report.html")
    words, summary = Seen(path.read_text(encoding="utf-8")).words, summarise(story())
    assert path == tmp_path / "new/report.html"
    for text in (
        "a-run", "tiny", "splitft 0.1.0", "seed 7", "finished, 2 rounds", headline(summary),
        summary["privacy"], "4 of 14 examples were cut off", "4.000 → 3.000", "cut 2 to 4 of 6 blocks",
        "0:00:30", "simulated 0:00:20", "lora: {rank: 4}",
    ):  # fmt: skip
        assert text in words, text
    for row in client_table(summary).rows:
        assert " ".join(row) in words


def test_the_page_needs_no_network_and_no_other_file(finished):
    told = seen(finished)
    assert {tag for tag, _ in told.elements}.isdisjoint({"link", "img", "iframe", "object", "embed", "base"})
    assert [attrs for _, attrs in told.elements if {"src", "href", "srcset"} & attrs.keys()] == []
    ours = [script for script in told.scripts if len(script) < 100_000]
    assert len(told.scripts) == len(ours) + 1, "plotly.js is there, once"
    assert not any(re.search(r"https?:|@import|url\(", text) for text in [*ours, told.text])


def test_plotly_is_written_once_however_many_runs(finished, tmp_path):
    other = run_folder(tmp_path / "other", story())
    one, two = page([read_run(finished)]), page([read_run(finished), read_run(other)])
    assert abs(len(two) - len(one)) < 100_000 < len(one)


def test_the_charts_show_the_events(finished):
    held_out, training, cuts, traffic, seconds, error, *_ = figures(seen(finished))
    assert {t["name"]: t["y"] for t in held_out["data"]} == {
        "ann": [5.0, 4.5, 3.0], "bob": [3.5, 3.0, 3.75], "all clients": [4.0, 3.5, 3.0],
    }  # fmt: skip
    assert {t["name"]: (t["x"], t["y"]) for t in training["data"]} == {
        "ann": ([0, 1, 2, 3], [4.0, 3.0, 2.5, 2.0]),
        "bob": ([0, 1], [3.0, 2.0]),
        "all clients": ([0, 1, 2, 3], [3.25, 2.75, 2.5, 2.0]),
    }
    assert {t["name"]: (t["x"], t["y"]) for t in cuts["data"]} == {
        "ann": ([1, 2], [2, 4]),
        "bob": ([1, 2], [3, 3]),
    }
    assert all(trace["line"]["shape"] == "hv" for trace in cuts["data"])
    assert traffic["data"][0]["x"] == ["hidden", "gradient", "adapter", "evaluation"]
    assert traffic["data"][0]["y"] == pytest.approx([720e-6, 480e-6, 4100e-6, 77e-6])
    assert seconds["data"][0]["x"] == [1.5, 3.0]
    assert error["data"][0]["y"] == [0.25, 0.0]


def test_the_simulated_clock_has_its_section_with_machines_and_idle_shares(tmp_path):
    events = [started(machines={"ann": "a phone", "server": "a big one"}), *story()[1:]]
    told = seen(run_folder(tmp_path / "timed", events))
    words = told.words.split("Simulated clock", 1)[1]
    assert "One round Round 2: who does what, and when. Before it, blocks moved for 1 s." in words
    assert "who idle machine ann 33.3 % a phone server 44.4 % a big one" in words, "of 11 and 7 seconds"
    assert ("figure", {"class": "wide"}) in told.elements
    assert len(figures(told)) == 6 + 3


def test_a_run_without_simulated_clock_shows_nothing_of_it(tmp_path):
    events = [event for event in story() if not isinstance(event, RoundTimed)]
    told = seen(run_folder(tmp_path / "untimed", events))
    assert "imulated" not in told.words
    assert len(figures(told)) == 6


def test_the_reasons_of_cuts_stand_under_their_chart(finished):
    words = seen(finished).words
    cuts, after = words.index("Blocks that each client holds"), words.index("Bytes on the wire")
    assert "Round 2: ann is quick" in words[cuts:after]
    assert "Round 1:" not in words[cuts:after], "for which none is given"


def test_a_run_that_has_only_begun_has_a_page(tmp_path):
    told = seen(run_folder(tmp_path / "begun", [started()]))
    assert "not finished: 0 of 2 rounds" in told.words
    assert "not measured before and after" in told.words
    assert [len(figure["data"]) for figure in figures(told)] == [2], "the cuts alone"


def test_a_page_can_be_written_of_losses_that_are_not_numbers(tmp_path):
    nan = float("nan")
    events = [started(), step(1, 1, 0, "ann", nan, 3), Evaluated(round=0, loss=nan, by_client={"ann": 1.0})]
    told = seen(run_folder(tmp_path / "nan", events))
    assert figures(told)[0]["data"][0]["y"] == [1.0]


def test_what_was_done_again_after_a_crash_is_shown_once(tmp_path):
    before = [event for event in story() if event.t <= 118]
    again = [event for event in story() if event.t >= 114]
    events = [*before, RunResumed(t=200, round=2), *again]
    again, once = run_folder(tmp_path / "again", events), run_folder(tmp_path / "once", story())
    assert figures(seen(again)) == figures(seen(once))


def test_every_name_is_text_and_none_is_markup(tmp_path):
    clients = (
        ClientInfo(name=HOSTILE, cut=2, train_examples=1, train_tokens=1, eval_examples=1),
        ClientInfo(name="bob", cut=2, train_examples=1, train_tokens=1, eval_examples=1),
    )
    events = [
        started(model=HOSTILE, method=HOSTILE, clients=clients, machines={HOSTILE: HOSTILE}),
        Warned(message=HOSTILE),
        Evaluated(round=0, loss=2.0, by_client={HOSTILE: 2.0, "bob": 2.0}),
        CutsChanged(round=1, cuts={HOSTILE: 3}, reason=HOSTILE),
        RoundTimed(
            round=1, seconds=1, move_seconds=0, weight_bytes=0, legs={HOSTILE: {HOSTILE: 1.0}},
            idle={HOSTILE: 0.0}, bars=(Bar(who=HOSTILE, leg=HOSTILE, start=0, end=1),),
        ),
    ]  # fmt: skip
    folder = run_folder(tmp_path / "<b>run", events, HOSTILE)
    for told in (seen(folder), seen(folder, run_folder(tmp_path / "other", story(), "seed: 1"))):
        assert told.text.count(HOSTILE) >= 4
        assert not any("alert" in script for script in told.scripts if not script.startswith('{"data"'))
        tags = [tag for tag, _ in told.elements]
        assert tags.count("script") == len(figures(told)) + 2
    drawn = figures(seen(folder))[0]["data"][0]["name"]
    assert "<" not in drawn, "plotly reads names as HTML"
    assert html.unescape(drawn) == HOSTILE
    for chart in figures(seen(folder))[-2:]:
        assert "<" not in json.dumps(chart).replace("<br>", ""), "nor in the charts of the simulated clock"


def test_several_runs_stand_side_by_side(finished, tmp_path):
    other = [event for event in story() if event.t < 125 and not isinstance(event, Warned)]
    told = seen(finished, run_folder(tmp_path / "b-run", other, "seed: 8\nlora: {rank: 4}\n"))
    assert "2 runs side by side" in told.words
    assert "a-run splitft tiny 7 2 4.000 3.000 -25.0 % – 120" in told.words
    assert "b-run splitft tiny 7 2 of 2 4.000 3.500 -12.5 % – 120" in told.words
    assert "key a-run b-run seed 7 8" in told.words
    assert "lora.rank" not in told.words, "on which they agree"
    held_out, training, *_ = figures(told)
    assert {t["name"]: t["y"] for t in held_out["data"]} == {"a-run": [4.0, 3.5, 3.0], "b-run": [4.0, 3.5]}
    assert [t["name"] for t in training["data"]] == ["a-run", "b-run"]


def test_runs_of_one_name_are_told_apart_by_their_paths(tmp_path):
    folders = [run_folder(tmp_path / way / "run", story()) for way in ("here", "there")]
    words = Seen(write_report(folders, tmp_path / "both.html").read_text(encoding="utf-8")).words
    assert all(str(folder) in words for folder in folders)


def test_a_folder_that_holds_no_run_is_refused_with_what_would_fit(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    cases = {
        "absent": "does not exist; give a run folder",
        "file": "is a file; give a run folder",
        "empty": "has no events.jsonl",
    }
    for name, message in cases.items():
        with pytest.raises(RunError, match=message):
            write_report([tmp_path / name], tmp_path / "report.html")
    early = run_folder(tmp_path / "early", [Warned(message="slow disk")])
    with pytest.raises(RunError, match="stopped before its training began"):
        write_report([early], tmp_path / "report.html")
    with pytest.raises(RunError, match="at least one run folder"):
        write_report([], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()
