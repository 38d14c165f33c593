"""A federation on threads: real clients and the real server, with a transport that a test can make faulty."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from laws.federations import Scripted
from splitft.config import RunConfig
from splitft.deploy.requests import Direct, Envelope, Transport
from splitft.deploy.run_terms import load_run_terms
from splitft.deploy.server.federation import FederationSetup, RemoteFederation
from splitft.deploy.server.inbox import Inbox
from splitft.deploy.server.quota import InboxLimits
from splitft.deploy.server.session import ServerSession
from splitft.deploy.site.connection import Connection
from splitft.deploy.site.policy import SitePolicy
from splitft.deploy.site.session import SiteSession
from splitft.deploy.site.setup import open_site
from splitft.deploy.site.site_store import SiteStore
from splitft.errors import DeployError
from splitft.protocol import BaseFile, BaseTensor, MessageSerializer, Register
from splitft.protocol.frame import open_frame
from splitft.run.setup import RunSetup
from splitft.specs import DeploySpec, SiteSpec
from splitft.training import RunState

EVERYONE = ("client-1", "client-2", "client-3")
"""The sites of most federations here."""
KEY = bytes(range(16))
LIMIT = 10**6
BATCH_TOKENS = 400
HEAD_BYTES = len(Envelope(KEY, 0, 0, b"").to_bytes())
SPEC = DeploySpec(silence_s=30, patience_s=30, window_ms=2)


@dataclass
class Outcome:
    """What a deployed run came to."""

    state: RunState | None = None
    events: list[Any] = field(default_factory=list)
    error: BaseException | None = None

    def states(self, site: str) -> list[str]:
        """What became of a site, in order."""
        return [event.state for event in self.of("SiteChanged") if event.site == site]

    def reasons(self, site: str) -> str:
        """Why."""
        return "; ".join(event.reason for event in self.of("SiteChanged") if event.site == site)

    def participants(self) -> list[tuple[str, ...]]:
        """Whose training counts, by round."""
        return [event.participants for event in self.of("RoundDone")]

    def of(self, kind: str) -> list[Any]:
        return [event for event in self.events if event.event == kind]


class KilledError(DeployError):
    """What a transport raises where a test lets its site die."""


def kind_of(data: bytes) -> str:
    """What a numbered message says."""
    return open_frame(data[HEAD_BYTES:]).kind


def registration(name: str) -> Register:
    return Register(
        client=name, train_examples=1, train_tokens=1, eval_examples=1, truncated=0,
        tokens_per_batch=1, labelled_per_batch=1, sequences_per_batch=1, padded_length=1,
    )  # fmt: skip


def site_thread(
    config: RunConfig,
    name: str,
    server: ServerSession,
    key: bytes,
    site: SiteSpec | None = None,
    folder: Path | None = None,
) -> threading.Thread:
    """A site of a session as a job wires it, which takes part when the thread is started.

    It keeps its moments in `folder`, if there is one.
    """
    terms = load_run_terms(config)
    party = open_site(config, name) if site is None else open_site(config, name, site)
    connection = Connection(
        Direct(name, server.inbox.answer), key, terms.serializer, terms.frame_limit, patience_s=60
    )
    store = SiteStore(None) if folder is None else SiteStore(folder, party.text)
    session = SiteSession(party.register, connection, party.open_client, store, party.policy)
    return threading.Thread(target=session.run, daemon=True)


def serve_with(server: ServerSession, threads: Sequence[threading.Thread]) -> None:
    """Run a session to its end with these sites; it has to finish, and they have to leave."""
    for thread in threads:
        thread.start()
    try:
        assert server.serve().reason == "finished"
    finally:
        server.abort()
        for thread in threads:
            thread.join(60)
    assert not any(thread.is_alive() for thread in threads)


def deployed(
    prepared: RunSetup,
    transports: Mapping[str, Callable[[Transport], Transport]] | None = None,
    spec: DeploySpec = SPEC,
    impostors: Mapping[str, Callable[[Inbox, RunSetup], None]] | None = None,
    policies: Mapping[str, SitePolicy] | None = None,
    manifest: tuple[BaseFile, ...] = (),
    tensors: tuple[BaseTensor, ...] = (),
    controller: Callable[[int, Mapping[str, int]], Mapping[str, int]] = lambda number, cuts: cuts,
    kept: Path | None = None,
    serializers: Mapping[str, MessageSerializer] | None = None,
) -> Outcome:
    """All rounds over a network of threads; `transports` wrap a site's own, `impostors` play a site by hand.

    `controller` chooses cuts; sites keep what they need in folders of `kept`; `serializers` are those of
    sites that compute in another type than the server.
    """
    transports, impostors = transports or {}, impostors or {}
    names = [client.name for client in prepared.clients]
    seed, numbered = prepared.config.seed, prepared.config.wire.needs_example_ids
    limits = InboxLimits(LIMIT, BATCH_TOKENS, example_ids=numbered)
    inbox = Inbox(names, KEY, prepared.serializer, limits, seed)
    outcome, threads = Outcome(), []
    for client in prepared.clients:
        if client.name in impostors:
            target, arguments = impostors[client.name], (inbox, prepared)
        else:
            transport = transports.get(client.name, lambda own: own)(Direct(client.name, inbox.answer))
            training = prepared.config.training
            connection = Connection(
                transport, KEY, (serializers or {}).get(client.name, prepared.serializer), LIMIT,
                patience_s=30, heartbeat_s=0.3,
                in_flight=min(training.in_flight, training.micro_batches), seed=seed,
            )  # fmt: skip
            session = SiteSession(
                registration(client.name), connection, lambda cut, client=client: client,
                SiteStore(kept and kept / client.name), (policies or {}).get(client.name),
            )  # fmt: skip
            target, arguments = _dying_quietly(session.run), ()
        threads.append(threading.Thread(target=target, args=arguments, daemon=True))
    for thread in threads:
        thread.start()
    until = time.monotonic() + 20
    while any(inbox.silence_s(name) > 1e9 for name in names) and time.monotonic() < until:
        inbox.take(0, 0.01)
    state = prepared.initial()
    setup = FederationSetup(
        prepared.server, prepared.ranks, spec, manifest, tensors,
        private_blocks=prepared.config.privacy.private_blocks, chooses=prepared.config.wire.chooses,
    )  # fmt: skip
    federation = RemoteFederation(inbox, setup, state, {}, outcome.events.append)
    try:
        schedule = Scripted(prepared.cut_schedule, controller)
        trainer = prepared.trainer(federation, outcome.events.append, schedule=schedule)
        outcome.state = trainer.train(state)
    except Exception as error:
        outcome.error = error
    finally:
        inbox.close("finished")
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    return outcome


def _dying_quietly(run: Callable[[], object]) -> Callable[[], None]:
    def live() -> None:
        with contextlib.suppress(KilledError):
            run()

    return live
