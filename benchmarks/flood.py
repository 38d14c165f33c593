"""Measure the time of an honest site's steps while another site floods the server.

The server and one honest site run in this process, on threads. The flooder is a process of its own, which
sends on several TCP connections as fast as it is answered. A thread for each connection hands its messages to
the server's inbox under the flooder's name, as FLARE's threads do. On few cores the flooder's own work counts
too.

    repeated     the same large message under the same number
    invalid      a frame with a spoilt checksum
    steps        steps that are not due, with as many hidden states as the run allows
    heartbeats   valid heartbeats, numbered

Runs with and without the flooder alternate. `--unbounded` switches the quotas off, for comparison.
"""

from __future__ import annotations

import math
import multiprocessing
import socket
import statistics
import struct
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path

import torch

from measuring import begin, options, section, table
from splitft.config import RunConfig, from_mapping
from splitft.deploy.requests import Direct, Envelope
from splitft.deploy.run_terms import RunTerms, load_run_terms
from splitft.deploy.server import quota
from splitft.deploy.server.session import ServerSession
from splitft.deploy.site.connection import Connection
from splitft.deploy.site.session import SiteSession
from splitft.deploy.site.setup import open_site
from splitft.deploy.site.site_store import SiteStore
from splitft.errors import TransportError
from splitft.protocol import Activations, Declined, Heartbeat
from splitft.tracking.log import read_events

KEY = bytes(range(16))
HONEST, FLOODER = "client-1", "client-2"
FLOODS = ("repeated", "invalid", "steps", "heartbeats")
CONNECTIONS = 16
LENGTH = struct.Struct("<I")


def configuration(steps: int) -> RunConfig:
    """Return a run of one round on the embedded text; steps are long enough to be measured."""
    return from_mapping({
        "model": {"name": "smollm2-135m"},
        "data": {"source": "python-docs", "max_examples": 60, "max_tokens": 128, "eval_examples": 1},
        "clients": {"count": 2, "cuts": [2, 2], "shares": {"by": "iid"}},
        "training": {"rounds": 1, "steps": steps, "batch_size": 1},
        "deploy": {"min_clients": 1, "join_s": 60},
    })  # fmt: skip


def messages(kind: str, terms: RunTerms) -> Callable[[int, int], bytes]:
    """Return the maker of a flood's messages, by channel and number."""
    tokens, width = terms.batch_tokens, terms.model.shape.width
    hidden = torch.zeros(tokens, width, dtype=terms.model.dtype)
    step = Activations(
        client=FLOODER, round=1, step=0, training=True, lengths=(tokens,), labelled=((0, 1),), hidden=hidden
    )
    large = terms.serializer.to_bytes(step)
    small = terms.serializer.to_bytes(Heartbeat(client=FLOODER))
    if kind == "repeated":
        return lambda channel, number: Envelope(KEY, channel, 0, large).to_bytes()
    if kind == "invalid":
        spoilt = large[:-1] + bytes([large[-1] ^ 1])
        return lambda channel, number: Envelope(KEY, channel, number, spoilt).to_bytes()
    frame = large if kind == "steps" else small
    return lambda channel, number: Envelope(KEY, channel, number, frame).to_bytes()


def flood(port: int, kind: str, terms: RunTerms, seconds: float) -> None:
    """Send as fast as it is answered, on every channel; runs in a process of its own."""
    make, until = messages(kind, terms), time.monotonic() + seconds

    def send(channel: int) -> None:
        number = 0
        with suppress(OSError), socket.create_connection(("127.0.0.1", port)) as line:
            while time.monotonic() < until:
                data = make(channel, number)
                line.sendall(LENGTH.pack(len(data)) + data)
                number += line.recv(1) == b"+"

    threads = [threading.Thread(target=send, args=(channel,)) for channel in range(CONNECTIONS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@contextmanager
def flooded(server: ServerSession, kind: str, terms: RunTerms) -> Iterator[list[int]]:
    """Flood the inbox from another process; yields the numbers of messages answered and turned away."""
    counts = [0, 0]
    listener = socket.create_server(("127.0.0.1", 0))

    def serve(line: socket.socket) -> None:
        with suppress(OSError), line, line.makefile("rb") as reader:
            while len(head := reader.read(LENGTH.size)) == LENGTH.size:
                data = reader.read(LENGTH.unpack(head)[0])
                try:
                    server.inbox.answer(FLOODER, data)
                    counts[0] += 1
                    line.sendall(b"+")
                except TransportError:
                    counts[1] += 1
                    line.sendall(b"-")

    def accept() -> None:
        while True:
            try:
                line = listener.accept()[0]
            except OSError:
                return
            threading.Thread(target=serve, args=(line,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    arguments = (listener.getsockname()[1], kind, terms, 3600.0)
    process = multiprocessing.get_context("fork").Process(target=flood, args=arguments, daemon=True)
    process.start()
    try:
        yield counts
    finally:
        process.kill()
        process.join()
        listener.close()


def step_seconds(config: RunConfig, kind: str | None) -> tuple[float, list[int]]:
    """Return the median seconds of the honest site's steps in a run, and the flood's counts."""
    with tempfile.TemporaryDirectory() as folder:
        terms = load_run_terms(config)
        server = ServerSession(terms, Path(folder) / "run", (HONEST, FLOODER), KEY)
        party = open_site(config, HONEST)
        line = Connection(
            Direct(HONEST, server.inbox.answer), KEY, terms.serializer, terms.frame_limit, 600.0
        )
        site = SiteSession(party.register, line, party.open_client, SiteStore(None), party.policy)
        thread = threading.Thread(target=site.run, daemon=True)
        thread.start()
        # the flooder is a site of the session with a certificate, and takes no part in the training
        declined = terms.serializer.to_bytes(Declined(client=FLOODER, reason="it floods"))
        first = Envelope(KEY, CONNECTIONS, 0, declined).to_bytes()
        threading.Thread(target=server.inbox.answer, args=(FLOODER, first), daemon=True).start()
        if kind is None:
            server.serve()
            counts = [0, 0]
        else:
            with flooded(server, kind, terms) as counts:
                server.serve()
        thread.join()
        times = [event.t for event in read_events(Path(folder) / "run/events.jsonl")
                 if event.event == "StepDone" and event.client == HONEST]  # fmt: skip
    return statistics.median(b - a for a, b in pairwise(times[1:])), list(counts)


def main() -> None:
    parser = options(__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=12, help="honest steps of a run")
    parser.add_argument("--repetitions", type=int, default=3, help="runs with and without each flood")
    parser.add_argument("--floods", nargs="+", choices=FLOODS, default=list(FLOODS))
    parser.add_argument("--unbounded", action="store_true", help="switch the quotas off")
    chosen = parser.parse_args()
    begin(chosen.seed, chosen.threads)
    if chosen.unbounded:
        quota.Quota.admit = lambda self, site, nbytes: None  # type: ignore[method-assign]
        quota.Quota.release = lambda self, nbytes: None  # type: ignore[method-assign]
    config = configuration(4 if chosen.quick else chosen.steps)
    rows = []
    for kind in chosen.floods:
        ratios, calm, busy, counts = [], [], [], [0, 0]
        for _ in range(1 if chosen.quick else chosen.repetitions):
            calm.append(step_seconds(config, None)[0])
            seconds, found = step_seconds(config, kind)
            busy.append(seconds)
            ratios.append(busy[-1] / calm[-1])
            counts = [counts[0] + found[0], counts[1] + found[1]]
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        means = [f"{1e3 * math.fsum(times) / len(times):.0f}" for times in (calm, busy)]
        rows.append([kind, *means, spread, f"{counts[0]:,}", f"{counts[1]:,}"])
    print(
        section(
            "A flood" + (", without quotas" if chosen.unbounded else ""),
            {
                "config": f"smollm2-135m, cut 2, batches of one text of at most 128 tokens, "
                f"{config.training.steps} steps a run; flooder on {CONNECTIONS} connections",
                "seed": chosen.seed,
                "spread": f"median (least to most) of {len(ratios)} ratios of neighbouring runs",
            },
            table(
                ["flood", "ms a step without", "ms with", "ratio", "messages answered", "turned away"], rows
            ),
        )
    )


if __name__ == "__main__":
    main()
