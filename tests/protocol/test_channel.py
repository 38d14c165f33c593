"""Lines: every byte is counted once, under its role, and direct passing equals passing through bytes."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

import splitft
from laws.federations import write_text
from runs import adapter_bytes, settings
from splitft.config import from_mapping
from splitft.protocol import Activations, Evaluation, LastHidden, MessageSerializer
from splitft.protocol.channel import Channel
from splitft.protocol.frame import Frame
from splitft.specs import WireSpec
from splitft.tracking.events import Evaluated, RoundDone, StepDone
from splitft.tracking.log import read_events

HIDDEN = torch.ones(5, 4)
SENT = Activations(
    client="a",
    round=1,
    step=0,
    training=True,
    lengths=(3, 2),
    labelled=((0, 2), (1, 2)),
    hidden=HIDDEN,
    labels=torch.arange(3),
)


def _line(tap=None, **wire) -> Channel:
    return Channel(
        "a", MessageSerializer(4, torch.float32, torch.float32, WireSpec(**wire), labels_travel=True), tap
    )


def test_a_line_counts_the_whole_frame_by_role_and_direction():
    seen = []
    line = _line(lambda *one: seen.append(one))
    line.up(SENT)
    line.down(LastHidden(step=0, hidden=HIDDEN))
    line.up(Evaluation(client="a", round=0, loss=1.0, tokens=3))
    assert [(client, direction) for client, direction, _ in seen] == [("a", "up"), ("a", "down"), ("a", "up")]
    first, answer, last = (len(data) for _, _, data in seen)
    counted = line.traffic()
    assert counted.up == {"hidden": first - 3 * 8, "label": 3 * 8, "adapter": last}
    assert counted.down == {"hidden": answer}
    assert line.traffic().up == {}


def test_a_direct_line_counts_the_tensors_alone_and_makes_no_frame():
    line = _line(lambda *one: pytest.fail("a frame was made"), in_process="direct")
    line.up(SENT)
    assert line.traffic().up == {"hidden": 5 * 4 * 2, "label": 3 * 8}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "notes.jsonl")


@pytest.mark.parametrize("labels", ["client", "server"])
def test_a_run_reports_every_byte_that_crossed_a_line_once(tmp_path, tiny_llama, text, labels):
    config = from_mapping(settings(tiny_llama, text, training={"rounds": 2}, split={"labels": labels}))
    frames = []
    run = splitft.train(config, tmp_path / "run", tap=lambda *one: frames.append(one))
    crossed, labelled = Counter(), Counter()
    for client, direction, data in frames:
        crossed[client, direction] += len(data)
        if (ids := Frame.from_bytes(data).stored.get("labels")) is not None:
            labelled[direction] += 8 * len(ids)
    counted, by_role = Counter(), Counter()
    for event in read_events(run.folder / "events.jsonl"):
        if isinstance(event, StepDone):
            parts = {event.client: event.traffic}
        else:
            parts = event.traffic if isinstance(event, RoundDone | Evaluated) else {}
        for client, one in parts.items():
            for direction, roles in (("up", one.up), ("down", one.down)):
                counted[client, direction] += sum(roles.values())
                by_role.update({(role, direction): size for role, size in roles.items()})
    assert counted == crossed
    assert by_role["label", "up"] == labelled["up"]
    assert (labelled["up"] > 0) == (labels == "server")
    summary = run.summary
    for role, sizes in summary["bytes"].items():
        for direction, size in sizes.items():
            both = size + summary["evaluation_bytes"][role][direction]
            assert both == by_role[role, direction]


@pytest.mark.parametrize(
    "sections",
    [
        {"wire": {"hidden": "fp32", "gradient": "fp32", "adapter": "fp32"}},
        {"wire": {"hidden": "bf16", "gradient": "bf16", "adapter": "bf16"}},
        {"wire": {}, "split": {"labels": "server"}},
        {
            "wire": {"hidden": "bf16", "adapter": "bf16"},
            "training": {"optimizer_state": "keep"},
            "aggregate": {"rule": "zero-pad"},
        },
    ],
    ids=["fp32", "bf16", "labels on the server", "moments kept"],
)
def test_direct_passing_gives_the_adapters_of_passing_through_bytes(tmp_path, tiny_llama, text, sections):
    runs = []
    for how in ("bytes", "direct"):
        wired = {**sections, "wire": {**sections["wire"], "in_process": how}}
        config = from_mapping(settings(tiny_llama, text, **wired))
        runs.append(splitft.train(config, tmp_path / how))
    assert adapter_bytes(runs[0].folder) == adapter_bytes(runs[1].folder)
    assert runs[0].summary["eval_loss"] == runs[1].summary["eval_loss"]


def test_a_rounder_wire_changes_the_run_so_the_codecs_are_really_used(tmp_path, tiny_llama, text):
    learnt = set()
    for name in ("fp32", "bf16"):
        config = from_mapping(settings(tiny_llama, text, wire={"hidden": name, "gradient": name}))
        learnt.add(adapter_bytes(splitft.train(config, tmp_path / name).folder))
    assert len(learnt) == 2
