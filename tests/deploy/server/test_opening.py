"""A deployed run says first what its server will be able to read."""

from __future__ import annotations

import pytest

from deploy.network import serve_with, site_thread
from laws.federations import write_text
from splitft.config import from_mapping
from splitft.deploy.run_terms import load_run_terms
from splitft.deploy.server.session import ServerSession
from splitft.specs import SiteSpec
from splitft.tracking.events import RunStarted
from splitft.tracking.log import read_events


@pytest.mark.parametrize(
    ("cuts", "received", "words"),
    [([1, 2], "hidden", "not audited"), ([1, 4], "hidden", "adapters alone: client-2"),
     ([4, 4], "adapters", ""), ("whole", "adapters", "")],
)  # fmt: skip
def test_the_first_event_says_what_reaches_the_server(tiny_llama, tmp_path, cuts, received, words):
    text = write_text(tmp_path / "notes.jsonl")
    config = from_mapping({
        "model": {"name": str(tiny_llama), "dtype": "float32"},
        "data": {"source": str(text), "max_tokens": 32},
        "clients": {"count": 2, "cuts": cuts},
        "lora": {"rank": 4, "rank_at_cut": None},
        "training": {"rounds": 1, "steps": 1, "batch_size": 2},
        "deploy": {"window_ms": 2, "min_clients": 2},
    })  # fmt: skip
    terms, names = load_run_terms(config), ("client-1", "client-2")
    server = ServerSession(terms, tmp_path / "run", names, bytes(16))
    site = SiteSpec.model_validate({"text": {"source": str(text)}})
    serve_with(server, [site_thread(config, name, server, bytes(16), site) for name in names])
    [begun] = [e for e in read_events(tmp_path / "run" / "events.jsonl") if isinstance(e, RunStarted)]
    assert begun.received == received
    assert words in begun.privacy
    assert ("audited" in begun.privacy) == (received == "hidden")
