"""Real processes and certificates: one site trains on its own text, two decline, each for its own reason."""

from __future__ import annotations

import os
import shutil
import tempfile

import pytest
import yaml

from laws.federations import write_text
from runs import settings_file
from splitft.config import load
from splitft.deploy.flare import poc
from splitft.tracking.log import read_events

pytest.importorskip("nvflare")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not os.environ.get("SPLITFT_SLOW"), reason="half a minute: SPLITFT_SLOW=1 runs it"),
]


@pytest.fixture
def ended(tmp_path, tiny_llama, monkeypatch):
    """The run of three sites whose kits have their owners' files."""
    spoilt = tmp_path / "spoilt"
    shutil.copytree(tiny_llama, spoilt)
    data = bytearray((spoilt / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (spoilt / "model.safetensors").write_bytes(data)
    own = [write_text(tmp_path / f"{n}.jsonl", examples=20, seed=n) for n in (1, 2, 3)]
    files = {
        "client-1": {"text": {"source": str(own[0])}},
        "client-2": {"text": {"source": str(own[1])}, "bounds": {"min_cut": 3}},
        "client-3": {"text": {"source": str(own[2])}, "model": {"folder": str(spoilt)}},
    }
    start = poc.Poc.start

    def with_files(self, console):
        for site, content in files.items():
            (self.kits.of(site) / "local" / "site.yaml").write_text(yaml.safe_dump(content))
        start(self, console)

    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    monkeypatch.setattr(poc.Poc, "start", with_files)
    file = settings_file(tmp_path, tiny_llama, training={"rounds": 2}, deploy={"min_clients": 1})
    return poc.run_poc(load(file, []), tmp_path / "run")


def test_what_a_site_forbids_does_not_happen_and_both_sides_say_so(ended):
    events = read_events(ended.folder / "events.jsonl")
    declined = {e.site: e.reason for e in events if e.event == "SiteChanged" and e.state == "declined"}
    assert set(declined) == {"client-2", "client-3"}
    assert "this site takes part from 3 on" in declined["client-2"]
    assert "model.safetensors of the base model here is not the server's" in declined["client-3"]
    assert [e.participants for e in events if e.event == "RoundDone"] == [("client-1",)] * 2
    assert len([e for e in events if e.event == "SessionStarted"]) == 1
    logs = {path.name: path.read_text(errors="replace") for path in (ended.folder / "logs").iterdir()}
    for party in ("client-2", "client-3"):
        for side in (party, "localhost"):
            said = "".join(text for name, text in logs.items() if name.startswith(side))
            assert f"{party} declines: {declined[party]}" in said
    trained = next(one for one in ended.summary["clients"] if one["name"] == "client-1")
    assert trained["train_examples"] + trained["eval_examples"] <= 20
