"""`splitft shares` tells what a run would do with the text, and nothing else."""

from __future__ import annotations

import json

import pytest

from runs import invoke, settings_file
from splitft.config import load
from splitft.report.share_charts import bars, label_columns
from splitft.run.inputs import gather


@pytest.fixture
def file(tmp_path, tiny_llama):
    return settings_file(tmp_path, tiny_llama)


def test_the_shares_shown_are_those_a_run_trains_and_is_evaluated_on(file):
    told = json.loads(invoke("shares", file, "--json").stdout)
    gathered = gather(load(file))
    assert told["names"] == [client.name for client in gathered.clients]
    for place, client in enumerate(gathered.clients):
        held_out = sum(sum(batch.lengths) for batch in client.held_out)
        assert told["summary"]["tokens"][place] == client.facts.train_tokens + held_out
        assert told["summary"]["examples"][place] == client.facts.train_examples + client.facts.eval_examples


def test_the_table_and_the_page_say_the_same(tmp_path, file):
    page = tmp_path / "new/shares.html"
    done = invoke("shares", file, "--html", page)
    assert done.exit_code == 0, done.stderr
    told = json.loads(invoke("shares", file, "--json").stdout)
    written = page.read_text(encoding="utf-8")
    for words in ("client-1", f"{told['summary']['tokens'][2]:,}", "by length, 8 classes, Dirichlet 1"):
        assert words in done.stdout
        assert words in written
    assert f"{told['summary']['length_distance']:.3f}" in done.stdout
    assert written.startswith("<!doctype html>")
    assert '"heatmap"' in written


def test_labels_have_a_table_and_a_heat_map(tmp_path, tiny_llama):
    text = tmp_path / "sites.jsonl"
    rows = [{"text": f"the ward {n}", "site": "north" if n % 3 else "south"} for n in range(12)]
    text.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    shares = {"by": "natural", "column": "site"}
    file = settings_file(
        tmp_path, tiny_llama, data={"source": str(text)}, clients={"count": 2, "cuts": 1, "shares": shares}
    )
    told = json.loads(invoke("shares", file, "--json").stdout)
    assert told["names"] == ["north", "south"]
    assert told["summary"]["label_counts"] == [[8, 0], [0, 4]]
    said = invoke("shares", file).stdout
    assert "one client for each site" in said
    assert "site: mean Jensen-Shannon distance between clients 1.000." in said


def test_bars_grow_with_the_counts():
    assert bars([0, 1, 4, 8]) == "·▁▄█"
    assert bars([0, 0]) == "··"
    assert bars([]) == ""


def test_rare_labels_are_counted_together():
    counts = [[n + 1 for n in range(20)], [1] * 20]
    told = {"summary": {"labels": [f"l{n:02}" for n in range(20)], "label_counts": counts}}
    labels, shown = label_columns(told)
    assert labels == [*(f"l{n:02}" for n in range(9, 20)), "others"]
    assert [sum(row) for row in shown] == [sum(row) for row in counts]


def test_what_cannot_be_divided_is_said(tmp_path, file):
    done = invoke("shares", file, "clients.shares.by=label", "clients.shares.column=site")
    assert (done.exit_code, "has no column 'site'" in done.stderr) == (2, True)
    done = invoke("shares", file, "clients.count=30", "clients.cuts=1")
    assert done.exit_code == 2
    assert "30 clients need at least 2 examples each" in done.stderr
