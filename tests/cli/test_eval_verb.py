"""`splitft eval` on whole run folders: what it measures is what the run and the libraries say."""

from __future__ import annotations

import json
import math

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import splitft
from runs import invoke, settings_file
from splitft.evaluation.metrics import overlap

SHORT = {
    "training": {"rounds": 1, "steps": 3},
    "wire": {"hidden": "fp32", "gradient": "fp32"},  # so that nothing is rounded on the way
}


def pairs(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_llama):
    folder = tmp_path_factory.mktemp("plain")
    return splitft.train(settings_file(folder, tiny_llama, **SHORT), folder / "out")


@pytest.fixture(scope="module")
def prompted(tmp_path_factory, tiny_llama):
    folder = tmp_path_factory.mktemp("prompted")
    rows = [{"mr": f"n{n // 3}", "ref": f"the ward {'abc'[n % 3]} {n // 3}"} for n in range(36)]
    data = {
        "source": str(pairs(folder / "pairs.jsonl", rows)), "prompt": "mr", "completion": "ref",
        "holdout": 0.5, "max_tokens": 40,
    }  # fmt: skip
    return splitft.train(settings_file(folder, tiny_llama, data=data, **SHORT), folder / "out")


def test_the_loss_of_what_was_exported_is_the_loss_that_the_run_ended_with(run):
    done = invoke("eval", run.folder, "--json")
    assert done.exit_code == 0, done.stderr
    (entry,) = json.loads(done.stdout)
    assert entry["task"] == "perplexity"
    assert entry["metrics"]["loss"] == pytest.approx(run.summary["eval_loss"][-1], rel=1e-5)
    assert entry["metrics"]["perplexity"] == pytest.approx(math.exp(entry["metrics"]["loss"]))
    base = json.loads(invoke("eval", run.folder, "--base", "--json").stdout)
    assert base[0]["metrics"]["loss"] == pytest.approx(run.summary["eval_loss"][0], rel=1e-5)
    kept = json.loads((run.folder / "eval.json").read_text())["evaluations"]
    assert [one["adapter"] for one in kept] == [True, False]
    invoke("eval", run.folder, "--json")
    kept = json.loads((run.folder / "eval.json").read_text())["evaluations"]
    assert [one["adapter"] for one in kept] == [False, True], "trying again replaces"


def test_what_is_written_is_what_peft_writes_and_is_held_against_every_reference(prompted):
    done = invoke("eval", prompted.folder, "--json", "--max-new-tokens", 6, "--batch-size", 4)
    assert done.exit_code == 0, done.stderr
    loss, entry = json.loads(done.stdout)
    assert loss["metrics"]["loss"] == pytest.approx(prompted.summary["eval_loss"][-1], rel=1e-5)
    assert entry["task"] == "e2e"
    held_out = sum(client["eval_examples"] for client in prompted.summary["clients"])
    assert entry["metrics"]["references"] == held_out
    assert 12 >= entry["metrics"]["prompts"] >= 6
    name = prompted.config.model.name
    tokenizer = AutoTokenizer.from_pretrained(name)
    whole = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    whole = PeftModel.from_pretrained(whole, str(prompted.adapter_dir)).eval()
    for sample in entry["samples"]:
        tokens = tokenizer(sample["prompt"] + "\n", return_tensors="pt", return_token_type_ids=False)
        with torch.no_grad():
            said = whole.generate(**tokens, max_new_tokens=6, do_sample=False)
        text = tokenizer.decode(said[0][tokens["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        assert sample["written"] == text


def test_a_clients_own_adapter_has_the_loss_that_the_run_had_for_that_client(tmp_path, tiny_llama):
    file = settings_file(tmp_path, tiny_llama, **SHORT, privacy={"private_blocks": 1})
    run = splitft.train(file, tmp_path / "out")
    for client in run.summary["clients"]:
        done = invoke("eval", run.folder, "--client", client["name"], "--json")
        (entry,) = json.loads(done.stdout)
        assert entry["metrics"]["examples"] == client["eval_examples"]
        assert entry["metrics"]["loss"] == pytest.approx(client["loss"][-1], rel=1e-5)
    kept = json.loads((run.folder / "eval.json").read_text())["evaluations"]
    assert [one["client"] for one in kept] == ["client-1", "client-2", "client-3"]
    done = invoke("eval", run.folder, "--client", "client-9")
    assert (done.exit_code, "there are those of client-1, client-2" in done.stderr) == (2, True)


def test_all_references_of_one_prompt_count(prompted, tmp_path):
    rows = [{"mr": "q", "ref": text} for text in ("a b", "c d", "e f g")]
    file = pairs(tmp_path / "refs.jsonl", rows)
    done = invoke("eval", prompted.folder, "--data", file, "--task", "e2e", "--json", "--max-new-tokens", 5)
    (entry,) = json.loads(done.stdout)
    metrics = entry["metrics"]
    assert (metrics["prompts"], metrics["references"]) == (1, 3)
    wanted = overlap([entry["samples"][0]["written"]], [["a b", "c d", "e f g"]])
    assert {key: metrics[key] for key in wanted} == pytest.approx(wanted)


def test_final_numbers_are_a_task_of_their_own(prompted, tmp_path):
    file = pairs(tmp_path / "sums.jsonl", [{"mr": "1 + 1", "ref": "2 #### 2"}, {"mr": "1", "ref": "#### 1"}])
    done = invoke("eval", prompted.folder, "--data", file, "--json", "--max-new-tokens", 5)
    assert [entry["task"] for entry in json.loads(done.stdout)] == ["perplexity", "gsm8k"]
    assert json.loads(done.stdout)[1]["metrics"]["exact_match"] == 0


def test_a_long_text_is_read_in_windows(run, tmp_path):
    text = tmp_path / "wiki.txt"
    text.write_text("the ward sleeps\n\nthe nurse writes a chart of the day\n\nfever", encoding="utf-8")
    done = invoke("eval", run.folder, "--data", text, "--task", "windows", "--json")
    metrics = json.loads(done.stdout)[0]["metrics"]
    length = len("the ward sleeps\n\nthe nurse writes a chart of the day\n\nfever")
    whole, rest = divmod(length, run.config.data.max_tokens)
    assert metrics["tokens"] == length - whole - bool(rest)


def test_the_report_shows_what_was_measured(prompted):
    done = invoke("eval", prompted.folder, "--task", "e2e", "--max-new-tokens", 4)
    assert done.exit_code == 0, done.stderr
    for words in ("BLEU", "chrF", "ROUGE-L", "prompt", "written", "eval.json"):
        assert words in done.stdout
    page = prompted.report().read_text(encoding="utf-8")
    assert "<h2>Tasks</h2>" in page
    assert "BLEU" in page


def test_what_cannot_be_measured_is_said(run, tmp_path):
    def refused(*arguments):
        done = invoke("eval", *arguments)
        assert done.exit_code == 2, (done.stdout, done.exception)
        assert "Traceback" not in done.stderr
        return done.stderr

    assert "no task 'magic'; give one of perplexity, windows" in refused(run.folder, "--task", "magic")
    assert "did you mean gsm8k?" in refused(run.folder, "--task", "gsm8")
    assert "give data.prompt and data.completion" in refused(run.folder, "--task", "e2e")
    assert "all clients share the global one" in refused(run.folder, "--client", "client-1")
    assert "give it with --data" in refused(run.folder, "--task", "windows")
    assert "only keys of the section data" in refused(run.folder, "lora.rank=2")
    assert "only data.eval_examples" in refused(run.folder, "data.holdout=0.3")
    assert "gone" in refused(tmp_path / "gone")
    assert "no file" in refused(run.folder, "--data", tmp_path / "gone.txt")
    source = run.config.data.source
    assert "trained on text of" in invoke("eval", run.folder, "--data", source).stderr
    (tmp_path / "eval.json").write_text("{")
    before = (run.folder / "eval.json").read_bytes()
    (run.folder / "eval.json").write_text("{")
    assert "is not what `splitft eval` writes" in refused(run.folder)
    (run.folder / "eval.json").write_bytes(before)
