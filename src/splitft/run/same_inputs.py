"""Check that a run that continues has the base model, the tokenizer and the text that it began with.

    RunStarted(base, tokenizer, clients[trained_on, held_out]) <--check_inputs--> RunSetup of now

Examples are held out by a draw over each client's share, so one more line in a file moves others between
training and evaluation: the held-out loss would then be of text that was trained on. Content counts, not the
path: a model or a text that has only moved is the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from splitft.errors import RunError
from splitft.tracking.events import ClientInfo, RunStarted
from splitft.tracking.log import read_started


def check_inputs(
    folder: Path, base: Mapping[str, str], tokenizer: str = "", clients: Iterable[ClientInfo] = ()
) -> None:
    """Raise RunError if what is given now is not what the run in `folder` began with.

    What is not known of then (a run of an earlier version) or not given now (`base`: digests by file) is not
    compared.
    """
    started = read_started(folder / "events.jsonl")
    if started is None:
        return
    found = [*_base(started.base, base)]
    if started.tokenizer and tokenizer and started.tokenizer != tokenizer:
        found.append("the tokenizer is another, so the same text has other tokens")
    found += _texts(started, clients)
    if found:
        listed = "; ".join(found)
        raise RunError(
            f"{folder} cannot go on with other inputs than it began with: {listed}. Restore what has changed "
            "(it may lie elsewhere: give its place as model.name or data.source), or train anew with "
            "another --out"
        )


def moved_keys(folder: Path) -> set[str]:
    """Return the keys of a configuration whose path may change, since the content behind it is compared."""
    started = read_started(folder / "events.jsonl")
    if started is None:
        return set()
    known = {"model.name"} if started.base else set()
    texts = bool(started.clients) and all(one.trained_on and one.held_out for one in started.clients)
    return known | ({"data.source"} if texts else set())


def _base(then: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Return what differs; files beside the weights count where both are known (a server knows more)."""
    if not then or not now:
        return []
    here, there = ([name for name in one if name.endswith(".safetensors")] for one in (now, then))
    if sorted(here) != sorted(there):
        return [f"the base model is in {', '.join(sorted(here))}, and was in {', '.join(sorted(there))}"]
    return [
        f"{name} of the base model has SHA-256 {now[name][:12]}..., and had {then[name][:12]}..."
        for name in then
        if name in now and then[name] != now[name]
    ]


def _texts(started: RunStarted, clients: Iterable[ClientInfo]) -> list[str]:
    then = {one.name: one for one in started.clients if one.trained_on and one.held_out}
    found = []
    for now in clients:
        old = then.get(now.name)
        if old is None or not now.trained_on or (old.trained_on, old.held_out) == _prints(now):
            continue
        if old.train_examples == now.train_examples and old.eval_examples == now.eval_examples:
            found.append(f"{now.name} has as many examples as before, but others")
        else:
            found.append(
                f"{now.name} has {now.train_examples:,} examples to train on and {now.eval_examples:,} held "
                f"out, and had {old.train_examples:,} and {old.eval_examples:,}"
            )
    if len(found) > 4:
        found = [*found[:4], f"the text of {len(found) - 4} more clients is another too"]
    return found


def _prints(client: ClientInfo) -> tuple[str, str]:
    return client.trained_on, client.held_out
