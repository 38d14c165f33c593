"""Measure the server's throughput with its clients divided among several processes.

    1 process     N clients' batches together, all threads (or all devices) of the machine
    R processes   each N / R of the clients, and 1 / R of the threads and devices

A server step is forward, backward and the optimizer steps of N clients' own factors, at one cut, through the
interface that training uses: with several processes, batches and gradients travel over local pipes. On a CPU
whose threads share a matrix product well nothing is to be gained; processes gain where a device waits for the
program, and where each has a device of its own.
"""

from __future__ import annotations

import argparse

from measuring import Spread, begin, interleaved, options, ratio, section, table
from server_batching import CUT, activations, gradient, step
from splitft.geometry import Span
from splitft.model import Model, open_model
from splitft.model.devices import RunDevices, take_devices
from splitft.specs import DevicesSpec, LoraSpec, ModelSpec, SplitSpec, TrainingSpec
from splitft.training import Server
from splitft.training.ranks import RankPolicy
from splitft.training.replicas import plan_replicas

BATCH = (4, 128)
"""(sequences, tokens of each sequence) of one client."""


def server_in(devices: RunDevices, model: Model, names: list[str], seed: int) -> Server:
    """Return a server in its first round, in as many processes as `devices` says."""
    blocks, places = model.shape.blocks, plan_replicas(devices, dict.fromkeys(names, 1.0))
    ranks, training = RankPolicy(LoraSpec(), blocks, "svd", seed), TrainingSpec(steps=10**6)
    server = Server(model, Span(CUT, blocks), ranks, SplitSpec(), training, places)
    server.place(dict.fromkeys(names, CUT))
    server.start(1, names, server.initial())
    return server


def chosen_options() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = options(__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4], help="numbers of processes")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--devices", nargs="+", default=["auto"], help="devices of the server")
    return parser.parse_args()


def main() -> None:
    chosen = chosen_options()
    begin(chosen.seed, chosen.threads)
    counts = [1, *(chosen.processes[:1] if chosen.quick else chosen.processes)]
    clients, size = (2, (1, 32)) if chosen.quick else (chosen.clients, BATCH)
    spec = DevicesSpec(server=tuple(chosen.devices))
    model = open_model(ModelSpec(), take_devices(spec).every)
    names = [f"client-{number:02d}" for number in range(clients)]
    messages = [activations(name, *size, model) for name in names]
    gradients = [gradient(message, model) for message in messages]
    servers = {
        f"{count}": server_in(
            take_devices(spec.model_copy(update={"server_replicas": count})), model, names, chosen.seed
        )
        for count in counts
    }
    try:
        variants = {
            name: lambda server=server: step(server, messages, gradients) for name, server in servers.items()
        }
        seconds = interleaved(variants, 2 if chosen.quick else 10)
    finally:
        for server in servers.values():
            server.close()
    rows = []
    for name, spent in seconds.items():
        gain = ratio(seconds["1"], spent)
        speed = clients * size[0] * size[1] / Spread.of(spent).median
        rows.append([name, f"{speed:.0f}", f"{gain.median:.2f} ({gain.low:.2f} to {gain.high:.2f})"])
    facts = {
        "config": f"{model.spec.name}, {model.spec.dtype}, blocks {CUT} to {model.shape.blocks - 1}, "
        f"{clients} clients with {size[0]} x {size[1]} tokens, server on {' '.join(chosen.devices)}",
        "seed": chosen.seed,
        "spread": "median of ratios of neighbouring steps (middle half), 10 of each",
    }
    print(section("Server processes", facts, table(["processes", "tokens/s", "ratio"], rows)))


if __name__ == "__main__":
    main()
