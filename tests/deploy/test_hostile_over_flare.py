"""A site with changed software sends invalid messages, over FLARE with real processes and certificates.

Half a minute, so it runs only where SPLITFT_SLOW=1 asks for it.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from laws.federations import largest_relative_difference, play
from runs import settings_file
from splitft.config import load
from splitft.deploy.flare import poc
from splitft.run.setup import prepare
from splitft.tracking.log import read_events
from splitft.training.checkpoint import load_snapshot

pytest.importorskip("nvflare")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not os.environ.get("SPLITFT_SLOW"), reason="half a minute: SPLITFT_SLOW=1 runs it"),
]
EVIL, STEPS = "client-2", 4
REASONS = (
    "numbers that are not finite",
    "not rows of width",
    "of step 99; expected",
    "in the name of 'client-1'",
)
"""Why it is refused, round by round: the misdeeds of `hostile_site/sitecustomize.py`."""
EXACT = {
    "model": {"dtype": "float64"},
    "training": {"rounds": len(REASONS), "steps": STEPS},
    "wire": {"hidden": "fp64", "gradient": "fp64", "adapter": "fp64"},
}


@pytest.fixture(scope="module")
def played(tmp_path_factory, tiny_llama):
    """The configuration, and what came of it with a hostile site."""
    folder = tmp_path_factory.mktemp("hostile")
    config = load(settings_file(folder, tiny_llama, **EXACT), [])
    start = poc.Poc.start
    changed = os.pathsep.join([str(Path(__file__).parent / "hostile_site"), os.environ.get("PYTHONPATH", "")])

    def with_changed_software(self, console):
        self.sites[EVIL].environment["PYTHONPATH"] = changed
        start(self, console)

    (folder / "scratch").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(folder / "scratch"))
        patch.setattr(poc.Poc, "start", with_changed_software)
        ended = poc.run_poc(config, folder / "run")
    return config, ended, read_events(ended.folder / "events.jsonl")


@pytest.mark.hostile(
    "four invalid messages over FLARE, by a site with changed software",
    "refused by name; out for that round alone",
)
def test_every_misdeed_is_refused_by_name_and_its_sender_is_out_for_that_round_alone(played):
    _, ended, events = played
    changes = [event for event in events if event.event == "SiteChanged"]
    assert {event.site for event in changes} == {EVIL}
    refused = {event.round: event.reason for event in changes if event.state == "refused"}
    assert list(refused) == [1, 2, 3, 4]
    for reason, words in zip(refused.values(), REASONS, strict=True):
        assert reason.startswith("ProtocolError: ")
        assert words in reason
    assert [event.state for event in changes] == ["refused", "back"] * 4
    participants = [event.participants for event in events if event.event == "RoundDone"]
    assert participants == [("client-1", "client-3")] * 4
    assert len([event for event in events if event.event == "SessionStarted"]) == 1
    assert ended.summary["finished"]


def test_the_others_learn_what_they_learn_without_it(played):
    config, ended, events = played
    for name in ("client-1", "client-3"):
        steps = [event.step for event in events if event.event == "StepDone" and event.client == name]
        assert steps == list(range(len(REASONS) * STEPS))
    prepared = prepare(config)
    prepared = type(prepared)(**{
        **prepared.__dict__, "clients": tuple(c for c in prepared.clients if c.name != EVIL),
    })  # fmt: skip
    without, _ = play(prepared, lambda number, cuts: {n: k for n, k in cuts.items() if n != EVIL})
    learnt = load_snapshot(ended.folder, len(REASONS)).state.adapters
    assert largest_relative_difference(learnt.tensors(), without.adapters.tensors()) < 1e-6
