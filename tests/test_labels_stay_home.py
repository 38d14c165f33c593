"""With `labels: client` no token id leaves a client: every frame of a run is looked at, byte by byte.

The search itself is shown to work by a run with `labels: server`, where it finds the text.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import splitft
from laws.federations import write_text
from runs import settings
from splitft.config import from_mapping
from splitft.protocol import MESSAGES
from splitft.protocol.frame import Frame
from splitft.run.setup import prepare

WINDOW = 4
"""So many ids in a row are no chance: letters of a sentence as numbers."""
WIDTH = 32
MODES = {
    "client": {},
    "client, moments kept": {
        "training": {"rounds": 2, "optimizer_state": "keep"},
        "aggregate": {"rule": "zero-pad"},
        "schedule": {"controller": "makespan"},
    },
    "client, fp32": {"wire": {"hidden": "fp32", "gradient": "fp32"}},
    "client, prompted": {"data": {"prompt": "text", "completion": "text"}},
    "client, shared": {"split": {"server_adapters": "shared"}},
    "server": {"split": {"labels": "server"}},
}
AT_HOME = [mode for mode in MODES if mode != "server"]
FIELDS = {
    "RoundStart": {"round", "cut"},
    "RoundReady": {"client", "round"},
    "Activations": {"client", "round", "step", "training", "lengths", "labelled", "examples"},
    "LastHidden": {"step"},
    "HeadGradient": {"client", "round", "step", "loss"},
    "CutGradient": {"step", "loss"},
    "AdapterUpload": {"client", "round", "tokens"},
    "GlobalAdapters": {"round"},
    "Evaluation": {"client", "round", "loss", "tokens", "correct"},
}
"""Plain fields that each message may have."""
UP = {"RoundReady", "Activations", "HeadGradient", "AdapterUpload", "Evaluation"}
DOWN = {"RoundStart", "LastHidden", "CutGradient", "GlobalAdapters"}


class Recorded:
    """All frames of a run, and the token ids of its text."""

    def __init__(self, config: Any, out: Any) -> None:
        self.config = config
        self.frames: list[tuple[str, bytes]] = []
        splitft.train(config, out, tap=lambda client, direction, data: self.frames.append((direction, data)))
        self.parsed = [(direction, Frame.from_bytes(data)) for direction, data in self.frames]
        examples = prepare(config).text.examples
        self.windows = {
            example.tokens[place : place + WINDOW]
            for example in examples
            for place in range(len(example) - WINDOW + 1)
        }


@pytest.fixture(scope="module")
def recorded(tiny_llama, tmp_path_factory):
    folder = tmp_path_factory.mktemp("recorded")
    text, runs = write_text(folder / "notes.jsonl"), {}

    def run(mode: str) -> Recorded:
        if mode not in runs:
            sections = {"training": {"rounds": 2}, **MODES[mode]}
            config = from_mapping(settings(tiny_llama, text, **sections))
            runs[mode] = Recorded(config, folder / mode)
        return runs[mode]

    return run


def _as_bytes(windows, dtype: str) -> list[bytes]:
    return [np.array(window, dtype).tobytes() for window in windows]


def _integers(value: Any) -> Iterator[int]:
    """All whole numbers in a JSON value, in the order they stand in."""
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _integers(item)
    elif isinstance(value, int) and not isinstance(value, bool):
        yield value


def _found_in_bytes(run: Recorded, dtype: str) -> int:
    haystack = b"|".join(data for _, data in run.frames)
    return sum(needle in haystack for needle in _as_bytes(run.windows, dtype))


def _found_in_fields(run: Recorded) -> int:
    found = 0
    for _, frame in run.parsed:
        numbers = list(_integers(dict(frame.fields)))
        found += sum(
            tuple(numbers[place : place + WINDOW]) in run.windows
            for place in range(len(numbers) - WINDOW + 1)
        )
    return found


@pytest.mark.parametrize("mode", AT_HOME)
def test_no_sequence_of_token_ids_is_in_any_frame(recorded, mode):
    run = recorded(mode)
    assert len(run.windows) > 50
    for dtype in ("<i2", "<i4", "<i8", ">i4"):
        assert _found_in_bytes(run, dtype) == 0
    assert _found_in_fields(run) == 0


def test_the_same_search_finds_the_text_when_labels_are_on_the_server(recorded):
    run = recorded("server")
    assert _found_in_bytes(run, "<i8") > len(run.windows) / 2
    assert _found_in_bytes(run, "<i4") == 0  # it looks for the type that it is told


def test_the_search_finds_ids_in_plain_fields(recorded):
    run = recorded("client")
    window = next(iter(run.windows))
    leaking = Recorded.__new__(Recorded)
    leaking.windows = run.windows
    leaking.parsed = [("up", Frame("K", {"lengths": [[1, *window[:2]], list(window[2:])]}, {}))]
    assert _found_in_fields(leaking) == 1


@pytest.mark.parametrize("mode", AT_HOME)
def test_no_word_of_the_text_is_in_any_frame(recorded, mode):
    run = recorded(mode)
    lines = Path(run.config.data.source).read_text(encoding="utf-8").splitlines()
    haystack = b"|".join(data for _, data in run.frames)
    for sentence in (json.loads(line)["text"] for line in lines):
        assert sentence.encode() not in haystack
        assert all(word.encode() not in haystack for word in sentence.split())


@pytest.mark.parametrize("mode", AT_HOME)
def test_what_travels_is_rows_of_model_width_factors_and_moments_in_floating_point(recorded, mode):
    run = recorded(mode)
    codecs = {"bf16": torch.bfloat16, "fp32": torch.float32}
    wire = run.config.wire
    for direction, frame in run.parsed:
        for name, tensor in frame.stored.items():
            field = name.partition("/")[0]
            role = MESSAGES[frame.kind].ROLES[field]
            assert role in ("hidden", "gradient", "adapter"), (direction, frame.kind, name)
            assert tensor.dtype == codecs[getattr(wire, role)], (direction, frame.kind, name)
            if role == "adapter":
                step = name.endswith(".step")
                assert tensor.dim() == (0 if step else 2)
            else:
                assert tensor.dim() == 2
                assert tensor.shape[1] == WIDTH


@pytest.mark.parametrize("mode", AT_HOME)
def test_every_message_goes_its_way_with_its_fields_and_nothing_else(recorded, mode):
    run = recorded(mode)
    for direction, frame in run.parsed:
        assert frame.kind in (UP if direction == "up" else DOWN)
        assert frame.fields.keys() <= FIELDS[frame.kind]
        if frame.kind == "Activations":
            assert not frame.fields["examples"]  # numbers of examples go where a codec compares epochs alone
            lengths, labelled = frame.fields["lengths"], frame.fields["labelled"]
            assert len(frame.stored["hidden"]) == sum(lengths)  # real tokens, no padding
            assert all(stop == length - 1 for (_, stop), length in zip(labelled, lengths, strict=True))
    assert {frame.kind for _, frame in run.parsed} == UP | DOWN


def test_no_integers_go_up_unless_labels_are_on_the_server(recorded):
    for mode in MODES:
        integers = [
            name
            for direction, frame in recorded(mode).parsed
            for name, tensor in frame.stored.items()
            if not tensor.is_floating_point()
        ]
        assert set(integers) == ({"labels"} if mode == "server" else set())
