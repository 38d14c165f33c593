"""No terminal, pipe or encoding ends a command: real processes whose output nobody can read."""

from __future__ import annotations

import io
import os
import shlex
import subprocess
import sys

import pytest

import splitft
from runs import COMMAND, settings_file
from splitft.cli.terminal import HANDLER, LastingStream, make_streams_last

PLACES = {
    "ascii": {"PYTHONIOENCODING": "ascii"},
    "cp1252": {"PYTHONIOENCODING": "cp1252"},
    "latin-1": {"PYTHONIOENCODING": "latin-1"},
    "LANG=C": {"LANG": "C", "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
}


def run(*arguments, environment=None, words="", **options) -> subprocess.CompletedProcess:
    """The command in a shell, with redirections in `words`; stdout as bytes."""
    line = shlex.join([*COMMAND, *map(str, arguments)])
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", f"{line} {words}"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **(environment or {})},
        capture_output=True,
        timeout=240,
        **options,
    )


@pytest.fixture(scope="module")
def file(tmp_path_factory, tiny_llama):
    folder = tmp_path_factory.mktemp("terminal")
    return settings_file(
        folder, tiny_llama, training={"rounds": 2, "steps": 1}, clients={"count": 2, "cuts": [1, 2]}
    )


SLOW = (pytest.mark.slow, pytest.mark.skipif(not os.environ.get("SPLITFT_SLOW"), reason="SPLITFT_SLOW=1"))
"""Each command is a process that imports torch: the ordinary suite tries the hardest case of each kind."""


def _cases(choices: dict, *quick: str):
    return [pytest.param(choices[name], id=name, marks=() if name in quick else SLOW) for name in choices]


@pytest.mark.parametrize("environment", _cases(PLACES, "ascii"))
@pytest.mark.fault("the terminal's encoding is {id}", "the run ends well")
def test_a_run_ends_well_in_any_encoding(tmp_path, file, environment):
    done = run("train", file, "--out", tmp_path / "run", environment=environment)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"held-out loss" in done.stdout
    assert b"Traceback" not in done.stdout
    if environment.get("PYTHONIOENCODING") == "ascii":
        done.stdout.decode("ascii")
    assert splitft.Run(tmp_path / "run").summary["finished"]


NOBODY = {
    "stdout closed": ">&-",
    "both closed": ">&- 2>&-",
    "a pipe that is closed after the first line": "| head -n 1",
    "a pipe that nobody reads": "| true",
    "a full disk": ">/dev/full 2>/dev/full",
}


@pytest.mark.parametrize("words", _cases(NOBODY, "a pipe that is closed after the first line"))
@pytest.mark.fault("nobody reads the output: {id}", "the run ends well")
def test_a_run_ends_well_when_nobody_reads_its_output(tmp_path, file, words):
    done = run("train", file, "--out", tmp_path / "run", words=words)
    assert (done.returncode, done.stderr) == (0, b"")
    summary = splitft.Run(tmp_path / "run").summary
    assert (summary["finished"], summary["rounds"]) == (True, 2)
    assert (tmp_path / "run/report.html").is_file()
    assert b'"event":"RunStarted"' in (tmp_path / "run/events.jsonl").read_bytes()[:200]


@pytest.mark.parametrize("verb", ["plan", "shares"])
@pytest.mark.parametrize("where", _cases({one: one for one in ("ascii", "| head -n 1", ">&-")}, "ascii"))
def test_tables_are_printed_anywhere(file, verb, where):
    if where == "ascii":
        done = run(verb, file, environment=PLACES["ascii"])
        assert done.stdout.decode("ascii").count("\n") > 5
    else:
        done = run(verb, file, words=where)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("where", _cases({one: one for one in ("ascii", "cp1252")}))
def test_studies_end_well_in_any_encoding(tmp_path, file, where):
    for arguments in (
        ("compare", file, "--out", tmp_path / "study", "--methods", "splitft,local"),
        ("audit", file),
    ):
        done = run(*arguments, environment=PLACES[where])
        assert done.returncode == 0, done.stderr.decode("ascii", "replace")
        assert b"Traceback" not in done.stderr


def test_a_message_for_the_user_fits_any_encoding(tmp_path):
    done = run("train", tmp_path / "größe→.yaml", environment=PLACES["ascii"])
    assert done.returncode == 2
    assert done.stderr.startswith(b"splitft: ")
    assert b"Traceback" not in done.stderr


class _Broken(io.StringIO):
    """A stream like a pipe that was closed after some lines."""

    left = 2

    def write(self, text):
        if self.left == 0:
            raise BrokenPipeError
        self.left -= 1
        return super().write(text)


def test_a_stream_that_broke_stays_silent():
    stream = _Broken()
    lasting = LastingStream(stream)
    for line in ("one\n", "two\n", "three\n"):
        assert lasting.write(line) == len(line)
        lasting.flush()
    assert stream.getvalue() == "one\ntwo\n"
    stream.close()
    lasting.writelines(["four"])
    assert lasting.closed


def test_plain_spellings_are_used_where_an_encoding_lacks_a_character(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, "ascii", write_through=True))
    monkeypatch.setattr(sys, "stderr", None)
    make_streams_last()
    make_streams_last()  # once is enough
    print("round 1/2 · loss 1 → 2, größe 東 \udc80 …")
    assert raw.getvalue() == b"round 1/2 - loss 1 -> 2, gr\\xf6\\xdfe \\u6771 \\udc80 ...\n"
    assert "é".encode("latin-1", HANDLER) == b"\xe9"
    with pytest.raises(UnicodeDecodeError):
        b"\xff".decode("ascii", HANDLER)
