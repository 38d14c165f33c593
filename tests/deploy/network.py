"""A federation on threads: real clients and the real server, with a carrier that a test can make faulty."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from splitft.assemble import Prepared
from splitft.deploy.carrier import Carrier, Direct
from splitft.deploy.desk import Desk
from splitft.deploy.gathering import Gathering
from splitft.deploy.keeping import Keeping
from splitft.deploy.visit import Visit
from splitft.protocol import Hello
from splitft.runtime import RunState, train_rounds
from splitft.specs import DeploySpec

LINK = bytes(range(16))
LIMIT = 10**6
BATCH_TOKENS = 400
SPEC = DeploySpec(silence_s=30, patience_s=30, window_ms=2)


@dataclass
class Outcome:
    """What a deployed run came to."""

    state: RunState | None = None
    events: list[Any] = field(default_factory=list)
    error: BaseException | None = None

    def states(self, site: str) -> list[str]:
        """What became of a site, in order."""
        return [e.state for e in self.events if e.event == "SiteChanged" and e.site == site]

    def of(self, kind: str) -> list[Any]:
        return [event for event in self.events if event.event == kind]


def hello(name: str) -> Hello:
    return Hello(
        client=name, train_examples=1, train_tokens=1, eval_examples=1, truncated=0,
        tokens_per_batch=1, labelled_per_batch=1, sequences_per_batch=1, padded_length=1,
    )  # fmt: skip


def deployed(
    prepared: Prepared,
    carriers: Mapping[str, Callable[[Carrier], Carrier]] | None = None,
    spec: DeploySpec = SPEC,
    honest: Callable[[Desk, str], None] | None = None,
    impostors: Mapping[str, Callable[[Desk], None]] | None = None,
) -> Outcome:
    """All rounds over a network of threads; `carriers` wrap a site's own, `impostors` play a site by hand."""
    names = [client.name for client in prepared.clients]
    desk = Desk(names, LINK, prepared.terms, LIMIT, BATCH_TOKENS)
    outcome, threads = Outcome(), []
    for client in prepared.clients:
        if client.name in (impostors or {}):
            play = impostors[client.name]
            threads.append(threading.Thread(target=play, args=(desk,), daemon=True))
            continue
        carrier: Carrier = Direct(client.name, desk.answer)
        if client.name in (carriers or {}):
            carrier = carriers[client.name](carrier)
        visit = Visit(
            hello(client.name), carrier, LINK, prepared.terms, LIMIT,
            lambda cut, client=client: client, Keeping(None), patience_s=30, alive_every_s=0.5,
        )  # fmt: skip
        threads.append(threading.Thread(target=visit.run, daemon=True))
    for thread in threads:
        thread.start()
    while any(desk.silence_s(name) > 1e9 for name in names):
        desk.take(0, 0.01)
    gathering = Gathering(
        desk,
        prepared.server,
        prepared.ranks,
        spec,
        prepared.initial(),
        {},
        outcome.events.append,
    )
    try:
        outcome.state = train_rounds(
            prepared.initial(), prepared.server, gathering, prepared.ranks, prepared.config.training,
            prepared.pace, outcome.events.append, lambda state: None,
        )  # fmt: skip
    except Exception as error:
        outcome.error = error
    finally:
        desk.close("finished")
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    return outcome
