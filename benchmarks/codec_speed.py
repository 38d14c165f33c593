"""Measure the throughput of the codecs on one core.

    hidden states (N, D) in float32  --encode-->  encoded parts  --decode-->  (N, D)

Rows are normally distributed, with outlier channels and rows as in hidden states. Throughput is bytes of the
float32 input divided by the thread's CPU time, which other programs do not lengthen. Codecs take turns, and
the 33rd percentile over rounds is reported.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from measuring import begin, options, section, table
from splitft.codecs import CODECS, Codec, CodecContext, Encoded, codec_of

GOALS = {"int8": 1e9, "int4": 4e8}
"""Bytes of float32 input a second, for encoding and for decoding."""


def hidden_states(rows: int, width: int, seed: int) -> torch.Tensor:
    """Return random rows in which a few channels, and one row in a hundred, are many times larger."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, width, generator=generator)
    x[:, :: width // 5] *= 20
    x[::100] *= 10
    return x


class Timed:
    """One codec with a message to encode and one to decode, after its learning phase."""

    def __init__(self, codec: Codec, role: str, rows: torch.Tensor) -> None:
        self.codec, self.role, self.rows = codec, role, rows
        self.sender: dict[str, torch.Tensor] = {}
        self.receiver: dict[str, torch.Tensor] = {}
        for _ in range(1 + 2 * rows.shape[1] // len(rows) + 1):
            encoded = codec.encode(rows, CodecContext(role, 0, self.sender))
            codec.decode(encoded, torch.float32, CodecContext(role, 0, self.receiver))
        self.encoded = self.encode()
        self.parts = dict(self.receiver)

    def encode(self) -> Encoded:
        """Encode the next message."""
        return self.codec.encode(self.rows, CodecContext(self.role, 0, self.sender))

    def decode(self) -> None:
        """Decode the same message again."""
        self.codec.decode(self.encoded, torch.float32, CodecContext(self.role, 0, dict(self.receiver)))


def seconds_of(
    variants: dict[tuple[str, ...], Callable[[], object]], rounds: int
) -> dict[tuple[str, ...], float]:
    """Return this thread's CPU seconds of each variant; variants take turns after a warm-up round."""
    spent: dict[tuple[str, ...], list[float]] = {key: [] for key in variants}
    for _ in range(rounds + 1):
        for key, work in variants.items():
            began = time.thread_time()
            work()
            spent[key].append(time.thread_time() - began)
    return {key: sorted(times[1:])[rounds // 3] for key, times in spent.items()}


def main() -> None:
    parser = options(__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1024, help="N, tokens of a message")
    parser.add_argument("--width", type=int, default=576, help="D")
    parser.add_argument("--rounds", type=int, default=30)
    chosen = parser.parse_args()
    begin(chosen.seed, chosen.threads or 1)
    rounds = 4 if chosen.quick else chosen.rounds
    rows = hidden_states(chosen.rows, chosen.width, chosen.seed)
    timed = {
        (name, role): Timed(codec_of(name), role, rows) for name in CODECS for role in ("hidden", "gradient")
    }
    variants = {}
    for key, one in timed.items():
        variants[(*key, "encode")] = one.encode
        variants[(*key, "decode")] = one.decode
    seconds = seconds_of(variants, rounds)
    nbytes = rows.numel() * 4
    speed = {key: nbytes / max(spent, 1e-9) for key, spent in seconds.items()}
    ways = [(role, way) for role in ("hidden", "gradient") for way in ("encode", "decode")]
    body = [
        (
            name,
            f"{8 * timed[name, 'hidden'].encoded.nbytes / rows.numel():.2f}",
            *(f"{speed[(name, *way)] / 1e6:,.0f}" for way in ways),
        )
        for name in CODECS
    ]
    verdict = {}
    for name, goal in GOALS.items():
        found = [speed[name, "hidden", way] for way in ("encode", "decode")]
        met = "met" if min(found) >= goal else "missed"
        verdict[f"goal, {name} at {goal / 1e6:,.0f} MB/s"] = (
            f"encode {found[0] / 1e6:,.0f}, decode {found[1] / 1e6:,.0f}: {met}"
        )
    head = ("codec", "bits a number", "encode hidden", "decode hidden", "encode gradient", "decode gradient")
    facts = {
        "config": f"{chosen.rows} rows of {chosen.width}, one thread, MB/s of float32 input",
        "seed": chosen.seed,
        **verdict,
    }
    print(section("Codec throughput", facts, table(head, body)))


if __name__ == "__main__":
    main()
