"""Mutated frames: a typed refusal or a good message, and nothing else (more: benchmarks/frame_fuzz.py)."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.judge import attack, fault_of, good_frames
from protocol.mutations import DAMAGE, FORGERY, MUTATIONS, forged, opened
from splitft.errors import SplitftError

FRAMES = good_frames()


def test_the_frames_that_are_mutated_are_good_ones_of_every_kind():
    kinds = {type(terms.from_bytes(data)).__name__ for terms, data in FRAMES}
    assert len(kinds) == 10
    for terms, data in FRAMES:
        assert fault_of(terms.from_bytes(data), terms) is None
        assert forged(*opened(data)) == data  # so a forgery is refused for what is wrong in it


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.__name__)
def test_no_mutated_frame_crashes_hangs_or_is_accepted_wrongly(mutation):
    tally = attack(FRAMES, 300, seed=1, mutations=[mutation])
    assert tally.frames > 250
    assert tally.refused[mutation.__name__] > 0


def test_damage_is_always_found_and_some_forgeries_are_good_frames():
    tally = attack(FRAMES, 3000, seed=2)
    print(f"{tally.frames} mutated frames")
    assert not set(tally.accepted) & {mutation.__name__ for mutation in DAMAGE}
    assert set(tally.accepted) & {mutation.__name__ for mutation in FORGERY}


@settings(max_examples=300)
@given(which=st.integers(0, len(FRAMES) - 1), data=st.data())
def test_whatever_stands_in_a_sealed_frame_is_refused_or_good(which, data):
    terms, good = FRAMES[which]
    parts = list(opened(good))
    place = data.draw(st.integers(0, 2))
    start = data.draw(st.integers(0, len(parts[place])))
    stop = data.draw(st.integers(start, min(len(parts[place]), start + 40)))
    parts[place] = parts[place][:start] + data.draw(st.binary(max_size=40)) + parts[place][stop:]
    try:
        message = terms.from_bytes(forged(*parts))
    except SplitftError:
        return
    assert fault_of(message, terms) is None


def test_an_attack_can_be_played_again():
    first, again = (attack(FRAMES, 200, seed=3) for _ in range(2))
    assert (first.refused, first.accepted) == (again.refused, again.accepted)


@pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="the extra fuzz is not installed")
def test_a_fuzzer_that_is_guided_by_coverage_finds_nothing_either():
    script = Path(__file__).with_name("guided.py")
    command = [sys.executable, str(script), "-runs=4000", "-seed=1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 0, done.stderr[-2000:]
    runs = re.search(r"Done (\d+) runs", done.stderr)
    assert runs is not None
    assert int(runs.group(1)) >= 4000  # a batch of seeds more, where they are not through yet
