"""What a user can get wrong ends in one clear message, exit status 2, and nothing lost or left behind."""

from __future__ import annotations

import json

import pytest

from runs import adapter_bytes, invoke, settings_file
from splitft.schedule.controllers import CONTROLLERS, Controller, Decision


@pytest.fixture
def file(tmp_path, tiny_llama):
    return settings_file(tmp_path, tiny_llama, training={"rounds": 1, "steps": 2})


def _jsonl(path, *texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def _alien(path):
    path.mkdir()
    (path / "config.json").write_text('{"model_type": "alien"}')
    return path


def _encoder(path):
    path.mkdir()
    (path / "config.json").write_text('{"model_type": "t5"}')
    return path


def _without_weights(path, model):
    path.mkdir()
    (path / "config.json").write_bytes((model / "config.json").read_bytes())
    return path


MENDABLE = {
    "empty text": (lambda t, m: [f"data.source={_jsonl(t / 'e.jsonl')}"], ["e.jsonl"]),
    "one example": (
        lambda t, m: [f"data.source={_jsonl(t / 'o.jsonl', 'a b')}"],
        ["3 clients need at least 2 examples each", "there are 1"],
    ),
    "fewer examples than clients": (
        lambda t, m: [f"data.source={_jsonl(t / 'f.jsonl', 'a b', 'c d', 'e f', 'g h')}"],
        ["3 clients need at least 2 examples each", "there are 4", "at most 2 client"],
    ),
    "one example and one client": (
        lambda t, m: [f"data.source={_jsonl(t / 'o.jsonl', 'a b')}", "clients.count=1", "clients.cuts=1"],
        ["1 clients need at least 2 examples", "there are 1"],
    ),
    "nothing to learn": (lambda t, m: [f"data.source={_jsonl(t / 'b.jsonl', '', ' ')}"], ["b.jsonl"]),
    "no such text": (lambda t, m: [f"data.source={t / 'gone.jsonl'}"], ["gone.jsonl"]),
    "no such column": (lambda t, m: ["data.text=body"], ["body", "text"]),
    "cut 0": (lambda t, m: ["clients.cuts=0"], ["clients.cuts: found 0", "at least 1"]),
    "cut past the last block": (lambda t, m: ["clients.cuts=5"], ["clients.cuts: cut 5", "choose 1 to 4"]),
    "cut of all blocks, labels on the server": (
        lambda t, m: ["clients.cuts=4", "split.labels=server"], ["clients.cuts: cut 4", "choose 1 to 3"]),
    "one cut too deep": (lambda t, m: ["clients.cuts=[1, 9, 2]"], ["clients.cuts[1]: cut 9"]),
    "cuts for others": (lambda t, m: ["clients.cuts=[1, 2]"], ["2 cuts for 3 clients"]),
    "rank 0": (lambda t, m: ["lora.rank=0"], ["lora.rank: found 0", "at least 1"]),
    "no such layers": (lambda t, m: ["lora.targets=[query]"], ["no linear layer named query", "q_proj"]),
    "longer than the model": (
        lambda t, m: [f"data.source={_jsonl(t / 'l.jsonl', *['x' * 400] * 9)}", "data.max_tokens=300"],
        ["data.max_tokens", "300 tokens", "128 positions"],
    ),
    "unknown family": (lambda t, m: [f"model.name={_alien(t / 'alien')}"], ["alien"]),
    "not a language model": (lambda t, m: [f"model.name={_encoder(t / 'encoder')}"], ["t5"]),
    "no model there": (lambda t, m: [f"model.name={t}"], ["is not a model folder: it has no config.json"]),
    "a file for a model": (lambda t, m: [f"model.name={t / 'run.yaml'}"], ["is a file; give the folder"]),
    "no weights": (lambda t, m: [f"model.name={_without_weights(t / 'bare', m)}"], ["bare"]),
    "misspelt model": (lambda t, m: ["model.name=smollm2-135"], ["did you mean 'smollm2-135m'?"]),
    "misspelt key": (lambda t, m: ["training.rouns=3"], ["training.rouns", "did you mean rounds?"]),
    "not an override": (lambda t, m: ["rounds"], ["'rounds' is not an override; write key.path=value"]),
    "several at once": (
        lambda t, m: ["lora.rank=0", "clients.cuts=0", "training.lr=fast", "sed=1"],
        ["lora.rank: found 0", "clients.cuts: found 0", "training.lr: found 'fast'", "did you mean seed?"],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("overrides", "said"), MENDABLE.values(), ids=MENDABLE)
def test_what_the_user_can_mend_ends_with_one_message_and_leaves_nothing(
    tmp_path, file, tiny_llama, overrides, said
):
    out = tmp_path / "out"
    done = invoke("train", file, *overrides(tmp_path, tiny_llama), "--out", out)
    _assert_one_message(done, *said)
    assert not out.exists()  # so that the same command runs once the fault is mended


def _assert_one_message(done, *said):
    assert done.exit_code == 2, (done.stdout, done.stderr, done.exception)
    assert done.stderr.startswith("splitft: ")
    assert "Traceback" not in done.stderr
    assert "unexpected" not in done.stderr
    assert len(done.stderr) < 1000
    for words in said:
        assert words in done.stderr


NUMBERS = "block_forward_ms_per_token: 1.0, block_backward_ms_per_token: 1.0, head_ms_per_token: 1.0"
SCHEDULES = {
    "a link without bandwidth": (
        "schedule.links={up_mbit_per_s: 0, down_mbit_per_s: 5}",
        ["schedule.links.up_mbit_per_s: found 0; give a number, above 0"],
    ),
    "a link of no number": (
        "schedule.links={up_mbit_per_s: .nan, down_mbit_per_s: .inf}",
        ["up_mbit_per_s: found 'nan'", "down_mbit_per_s: found 'inf'"],
    ),
    "negative memory": (
        f"schedule.devices={{{NUMBERS}, memory_gb: -4}}",
        ["schedule.devices.memory_gb: found -4; give a number, above 0"],
    ),
    "unknown machine": (
        "schedule.devices=toaster",
        ["schedule.devices: found 'toaster'", "phone | laptop", "block_forward_ms_per_token"],
    ),
    "one unknown link": (
        "schedule.links=[lan, lte, pigeon]",
        ["schedule.links[2]: found 'pigeon'", "lte | dsl | fibre | lan"],
    ),
    "unknown controller": ("schedule.controller=makespam", ["found 'makespam'", "did you mean makespan?"]),
    "unknown policy": ("schedule.misfit=ignore", ["schedule.misfit: found 'ignore'; give stop | leave-out"]),
    "cuts deeper than the model": ("schedule.min_cut=9", ["schedule.min_cut: 9", "give at most 3"]),
}


@pytest.mark.parametrize("name", ["plan", "train"])
@pytest.mark.parametrize(("override", "said"), SCHEDULES.values(), ids=SCHEDULES)
def test_a_machine_or_link_that_cannot_be_is_named_with_what_fits(tmp_path, file, name, override, said):
    out = ["--out", tmp_path / "out"] if name == "train" else []
    _assert_one_message(invoke(name, file, override, *out), *said)
    assert not (tmp_path / "out").exists()


TINY = f"schedule.devices=[laptop, {{{NUMBERS}, memory_gb: 1.0e-6}}, laptop]"
CHOSEN = ("clients.cuts=auto", "schedule.controller=makespan")


def test_a_client_that_holds_not_even_the_shallowest_cut_is_named_with_what_it_lacks(tmp_path, file):
    lack = "client 'client-2' lacks"
    out = tmp_path / "out"
    stopped = invoke("train", file, TINY, *CHOSEN, "--out", out)
    _assert_one_message(stopped, lack, "cut 1 takes", "it has 0.001 MB", "schedule.misfit: leave-out")
    assert not out.exists()
    planned = invoke("plan", file, TINY, *CHOSEN, "--json")
    assert planned.exit_code == 0
    told = json.loads(planned.stdout)
    assert [client["lack"].startswith(lack) for client in told["clients"]] == [False, True, False]
    assert all(lack in one["reason"] for one in told["choices"] if one["controller"] != "fixed")
    done = invoke("train", file, TINY, *CHOSEN, "schedule.misfit=leave-out", "--out", out, "--json")
    assert done.exit_code == 0
    summary = json.loads(done.stdout)
    assert [client["name"] for client in summary["clients"]] == ["client-1", "client-3"]
    assert any(lack in warning for warning in summary["warnings"])
    nobody = [f"schedule.devices={{{NUMBERS}, memory_gb: 1.0e-6}}", *CHOSEN, "schedule.misfit=leave-out"]
    none = invoke("train", file, *nobody, "--out", tmp_path / "none")
    _assert_one_message(none, "no client fits at any cut", lack)


@pytest.mark.parametrize("cut", [0, 4, 2.5, None])
def test_a_controller_that_gives_an_impossible_cut_is_named_and_nothing_trains(
    tmp_path, file, monkeypatch, cut
):
    def broken(problem):
        given = {client.name: 1 for client in problem.clients}
        given["client-2"] = cut
        return Decision({name: one for name, one in given.items() if one is not None}, "as it happens")

    monkeypatch.setitem(CONTROLLERS._things, "paper", Controller(broken))
    asked = ("clients.cuts=auto", "schedule.controller=paper")
    said = f"controller 'paper' gives client 'client-2' cut {cut}, but cuts 1 to 3 fit"
    if cut is None:
        said = "controller 'paper' must give every client a cut, and no other: client-2"
    _assert_one_message(invoke("train", file, *asked, "--out", tmp_path / "out"), said)
    assert not (tmp_path / "out").exists()
    planned = invoke("plan", file, *asked, "--json")
    assert planned.exit_code == 0
    assert said in next(
        c["reason"] for c in json.loads(planned.stdout)["choices"] if c["controller"] == "paper"
    )


def test_a_controller_that_errs_while_training_leaves_the_rounds_before(tmp_path, file, monkeypatch):
    def broken(problem):
        known = all(client.loss is not None for client in problem.clients)
        return Decision({client.name: 9 if known else 1 for client in problem.clients}, "as it happens")

    monkeypatch.setitem(CONTROLLERS._things, "paper", Controller(broken))
    out = tmp_path / "out"
    asked = ("clients.cuts=auto", "schedule.controller=paper", "training.rounds=2")
    _assert_one_message(
        invoke("train", file, *asked, "--out", out), "gives client 'client-1' cut 9", "1 to 3"
    )
    monkeypatch.undo()
    resumed = invoke("train", file, *asked, "--out", out, "--resume", "--json")
    assert resumed.exit_code == 0
    assert len(json.loads(resumed.stdout)["eval_loss"]) == 3


def test_missing_and_unreadable_files_are_named(tmp_path, file):
    _assert_one_message(invoke("train", tmp_path / "gone.yaml"), "gone.yaml: cannot be read", "splitft init")
    (tmp_path / "bad.yaml").write_text("model: {name: [")
    _assert_one_message(invoke("train", tmp_path / "bad.yaml"), "bad.yaml:1: not YAML that can be read")
    _assert_one_message(invoke("train", tmp_path), "cannot be read (Is a directory)")
    _assert_one_message(invoke("init", file), "run.yaml exists already; give another name, or --force")
    _assert_one_message(invoke("init", tmp_path / "no/such/run.yaml"), "No such file or directory")
    for verb in (["report"], ["generate", "--base"], ["export", "--to", tmp_path / "to"]):
        rest = ["a prompt"] if verb[0] == "generate" else []
        _assert_one_message(invoke(*verb, tmp_path / "gone", *rest), "gone")
    assert not (tmp_path / "to").exists()


def test_a_run_folder_that_is_taken_or_cannot_be_written_is_refused(tmp_path, file):
    out = tmp_path / "out"
    assert invoke("train", file, "--out", out).exit_code == 0
    before = adapter_bytes(out)
    _assert_one_message(invoke("train", file, "--out", out), "holds a run already; continue it with --resume")
    _assert_one_message(invoke("train", file, "--out", tmp_path), "exists and is not empty")
    _assert_one_message(invoke("train", file, "--out", file / "out"), "cannot be written (Not a directory)")
    _assert_one_message(invoke("train", file, "--out", "/proc/splitft"), "cannot be written", "another --out")
    _assert_one_message(invoke("train", file, "--resume"), "--resume needs --out DIR")
    _assert_one_message(invoke("train", file, "seed=5", "--out", out, "--resume"), "seed (was 0, now 5)")
    _assert_one_message(invoke("export", out, "--to", tmp_path), "exists already; choose another --to")
    _assert_one_message(invoke("generate", out, ""), "the prompt is empty")
    assert adapter_bytes(out) == before


def test_text_that_is_cut_off_is_counted_in_a_warning(tmp_path, file):
    done = invoke("train", file, "data.max_tokens=8", "--out", tmp_path / "out", "--json")
    (warning,) = json.loads(done.stdout)["warnings"]
    assert "of 40 examples were cut off at 8 tokens (data.max_tokens)" in warning
    assert warning.partition(" of ")[0].isdigit()
