"""The command line: each verb from end to end, and what is left when one is stopped."""

from __future__ import annotations

import json
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import splitft
from runs import COMMAND, adapter_bytes, invoke, settings_file, started
from splitft.cli import app
from splitft.tracking.events import StepDone
from splitft.tracking.log import read_events

VERBS = sorted(command.callback.__name__ for command in app.registered_commands)
SHORT = {"training": {"rounds": 1, "steps": 2}}


@pytest.fixture
def file(tmp_path, tiny_llama):
    return settings_file(tmp_path, tiny_llama, **SHORT)


# --- from end to end ------------------------------------------------------------------------------


def test_a_first_session_goes_from_init_to_an_exported_model(tmp_path, file, tiny_llama):
    mine, out = tmp_path / "mine.yaml", tmp_path / "out"
    made = invoke("init", mine)
    assert (made.exit_code, made.stdout) == (
        0, f"wrote {mine}; train it with: splitft train {mine}\n",
    )  # fmt: skip
    overrides = [
        f"model.name={tiny_llama}", "model.dtype=float32", f"data.source={tmp_path / 'notes.jsonl'}",
        "data.max_tokens=24", "clients.count=2", "clients.cuts=[1, 2]", "lora.rank=4", "lora.rank_at_cut=2",
        "training.rounds=2", "training.steps=3", "training.lr=1e-2",
    ]  # fmt: skip
    trained = invoke("train", mine, *overrides, "--out", out)
    assert trained.exit_code == 0, trained.stderr
    assert "Labels stay on the clients" in trained.stdout
    assert "after round 2: held-out loss" in trained.stdout
    assert str(out / "report.html") in trained.stdout
    assert {path.name for path in out.iterdir()} == {
        "config.yaml", "events.jsonl", "summary.json", "checkpoints", "adapter", "report.html",
    }  # fmt: skip

    page = tmp_path / "page.html"
    assert invoke("report", out, "--to", page).stdout == f"{page}\n"
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")

    said = invoke("generate", out, "the ward", "--max-new-tokens", 4)
    assert said.stdout.startswith("the ward")
    base = invoke("generate", out, "the ward", "--max-new-tokens", 4, "--base")
    assert (said.exit_code, base.exit_code) == (0, 0)

    exported = invoke("export", out, "--to", tmp_path / "adapter")
    merged = invoke("export", out, "--to", tmp_path / "whole", "--merged")
    assert (exported.stdout, merged.stdout) == (f"{tmp_path / 'adapter'}\n", f"{tmp_path / 'whole'}\n")
    tokens = torch.tensor([[5, 80, 90, 7]])
    plain = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", dtype=torch.float32)
    with torch.no_grad():
        wanted = PeftModel.from_pretrained(plain, str(tmp_path / "adapter")).eval()(tokens).logits
        torch.testing.assert_close(whole(tokens).logits, wanted, rtol=1e-5, atol=1e-5)
    assert AutoTokenizer.from_pretrained(tmp_path / "whole").eos_token == "<end>"


def test_json_is_the_summary_alone_on_stdout(tmp_path, file):
    done = invoke("train", file, "training.steps=1", "--out", tmp_path / "out", "--json")
    summary = json.loads(done.stdout)
    assert summary == splitft.Run(tmp_path / "out").summary
    assert summary["steps"] == 3
    assert "held-out loss" in done.stderr


def test_overrides_are_written_into_the_run(tmp_path, file):
    invoke("train", file, "training.steps=1", "seed=7", "lora.targets=[q_proj]", "--out", tmp_path / "out")
    written = yaml.safe_load((tmp_path / "out/config.yaml").read_text())
    assert (written["seed"], written["training"]["steps"], written["lora"]["targets"]) == (7, 1, ["q_proj"])
    config = json.loads((tmp_path / "out/adapter/adapter_config.json").read_text())
    assert config["target_modules"] == ["q_proj"]


HELP = """
import sys
from typer.testing import CliRunner
from splitft.cli import app
for verb in [[], *([verb] for verb in sys.argv[1:])]:
    shown = CliRunner().invoke(app, [*verb, "--help"])
    assert shown.exit_code == 0 and "Usage" in shown.stdout, verb
assert CliRunner().invoke(app, ["--version"]).stdout.startswith("splitft ")
print({"torch", "transformers", "peft", "numpy"} & set(sys.modules))
"""


def test_help_of_every_verb_needs_no_heavy_import():
    done = subprocess.run([sys.executable, "-c", HELP, *VERBS], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("set()\n", "")


def test_help_names_the_defaults_that_depend_on_other_arguments():
    for verb, default in (("train", "runs/NAME-DATE-TIME"), ("report", "report.html in the first DIR")):
        shown = CliRunner().invoke(app, [verb, "--help"], env={"COLUMNS": "150"})
        assert default in shown.stdout


def test_a_fault_of_ours_says_so_and_debug_shows_it(tmp_path, file, monkeypatch):
    def broken(*arguments, **options):
        raise ZeroDivisionError("by no fault of yours")

    monkeypatch.setattr("splitft.run.train.train", broken)
    done = invoke("train", file, "--out", tmp_path / "out")
    assert done.exit_code == 1
    assert "splitft: unexpected ZeroDivisionError: by no fault of yours" in done.stderr
    assert "SPLITFT_DEBUG=1" in done.stderr
    monkeypatch.setenv("SPLITFT_DEBUG", "1")
    assert isinstance(invoke("train", file, "--out", tmp_path / "out").exception, ZeroDivisionError)


# --- stopped from outside -------------------------------------------------------------------------


def test_ctrl_c_in_a_run_says_how_to_go_on_and_that_command_does(tmp_path, tiny_llama):
    file, out = settings_file(tmp_path, tiny_llama, training={"steps": 20}), tmp_path / "out"
    process = started("train", file, "--out", out)
    log, deadline = out / "events.jsonl", time.monotonic() + 60
    while not (log.exists() and '"event":"StepDone","round":2' in log.read_text()):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate()
    command = f"splitft train {out / 'config.yaml'} --out {out} --resume"
    assert (process.returncode, said) == (
        130, f"splitft: stopped; round 1 is safe. Continue with: {command}\n",
    )  # fmt: skip
    resumed = invoke(*command.split()[1:])
    assert resumed.exit_code == 0, resumed.stderr
    whole = splitft.train(file, tmp_path / "whole")
    assert adapter_bytes(out) == adapter_bytes(whole.folder)


def test_a_disk_that_fills_up_costs_no_finished_round(tmp_path, tiny_llama):
    """A real limit on file sizes: checkpoints fit, the log of events outgrows it in round 2."""
    file, out = settings_file(tmp_path, tiny_llama, training={"steps": 20}), tmp_path / "out"
    whole = splitft.train(file, tmp_path / "whole")
    log = (whole.folder / "events.jsonl").read_bytes()
    second = [place.start() for place in re.finditer(b'"event":"StepDone","round":2', log)]
    limit = second[len(second) // 2]
    process = started("train", file, "--out", out, preexec_fn=lambda: _limit_file_size(limit))
    _, said = process.communicate()
    assert process.returncode == 2
    assert said.startswith(f"splitft: the run stopped writing to {out} (File too large); round 1 is safe in")
    assert said.endswith("Free some space, then continue with --resume\n")
    assert said.count("\n") == 1
    steps = [event for event in read_events(out / "events.jsonl") if isinstance(event, StepDone)]
    assert {step.round for step in steps} == {1, 2}
    resumed = invoke("train", file, "--out", out, "--resume")
    assert resumed.exit_code == 0, resumed.stderr
    assert adapter_bytes(out) == adapter_bytes(whole.folder)


def _limit_file_size(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def test_the_command_is_the_one_that_is_installed():
    installed = subprocess.run(
        [Path(sys.executable).with_name("splitft"), "--version"], capture_output=True, text=True
    )
    ours = subprocess.run([*COMMAND, "--version"], capture_output=True, text=True)
    assert installed.stdout == ours.stdout == f"splitft {splitft.__version__}\n"
