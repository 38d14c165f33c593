"""One session of a deployed run, with its sites on threads."""

from __future__ import annotations

import threading
import time

from laws.federations import write_text
from splitft.config import from_mapping
from splitft.deploy.requests import Direct
from splitft.deploy.run_terms import load_run_terms
from splitft.deploy.server.session import ServerSession
from splitft.deploy.site.connection import Connection
from splitft.deploy.site.session import SiteSession
from splitft.deploy.site.setup import open_site
from splitft.deploy.site.site_store import SiteStore
from splitft.tracking.events import CutsChanged, StepDone
from splitft.tracking.log import read_events

KEY = bytes(range(16))
MACHINE = {
    "block_forward_ms_per_token": 0.5,
    "block_backward_ms_per_token": 0.5,
    "head_ms_per_token": 0.1,
    "memory_gb": 4.0,
}


def test_a_site_that_computes_slower_than_its_profile_gets_a_shallower_cut(tiny_llama, tmp_path, monkeypatch):
    config = from_mapping({
        "model": {"name": str(tiny_llama), "dtype": "float32"},
        "data": {"source": str(write_text(tmp_path / "notes.jsonl")), "max_tokens": 32},
        "clients": {"count": 2, "cuts": "auto"},
        "lora": {"rank": 4, "rank_at_cut": None},
        "training": {"rounds": 2, "steps": 3, "batch_size": 2},
        "schedule": {"controller": "makespan", "devices": MACHINE, "links": "lan", "server": MACHINE},
        "deploy": {"window_ms": 2, "min_clients": 2},
    })  # fmt: skip
    terms = load_run_terms(config)
    server = ServerSession(terms, tmp_path / "run", ("client-1", "client-2"), KEY)
    threads = []
    for name in ("client-1", "client-2"):
        party = open_site(config, name)
        connection = Connection(
            Direct(name, server.inbox.answer), KEY, terms.serializer, terms.frame_limit, patience_s=30
        )

        def open_client(cut, party=party, name=name):
            client = party.open_client(cut)
            if name == "client-2":  # 0.5 s for a pass that its profile says takes some milliseconds
                forward = client.forward
                monkeypatch.setattr(client, "forward", lambda: time.sleep(0.5) or forward())
            return client

        session = SiteSession(party.register, connection, open_client, SiteStore(None), party.policy)
        threads.append(threading.Thread(target=session.run, daemon=True))
    for thread in threads:
        thread.start()
    assert server.serve().reason == "finished"
    for thread in threads:
        thread.join(20)
    events = list(read_events(tmp_path / "run/events.jsonl"))
    steps = [event for event in events if isinstance(event, StepDone)]
    legs = {"client_forward", "head", "server_forward", "server_backward", "client_backward"}
    assert all(legs - {"client_backward"} <= step.seconds.keys() <= legs for step in steps)
    assert all(step.seconds["client_forward"] > 0.5 for step in steps if step.client == "client-2")
    first, second = [event for event in events if isinstance(event, CutsChanged)]
    assert second.round == 2
    assert second.cuts["client-2"] < first.cuts["client-2"]
