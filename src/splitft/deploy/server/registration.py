"""Wait for the registrations of a session's sites, and check their numbers against the run.

    Register --unfit--> a reason: this site is left out, and the others go on
                   +--> None: its numbers are plausible for this run

What a site registers enters the cost model of all. Each number has bounds that follow from the run's own
configuration, narrow enough that no product of them overflows or vanishes. A site outside of them is left out
with the number, what fits, and where it comes from.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

from pydantic import ValidationError

from splitft.config import RunConfig
from splitft.deploy.run_terms import MAX_DEVICE_NUMBER, MIN_DEVICE_NUMBER, RunTerms, site_names
from splitft.deploy.server.arrivals import Arrival
from splitft.deploy.server.inbox import Inbox
from splitft.deploy.server.uptime import UPTIME
from splitft.errors import ProtocolError
from splitft.protocol import Declined, Register
from splitft.run.setup import most_rows
from splitft.specs import DeviceSpec

MOST_EXAMPLES = 2**40
"""Largest number of examples that a site may have."""
ROUNDING = 1 + 1e-9
"""Means of equal numbers may differ by this factor."""


def await_registrations(
    terms: RunTerms, inbox: Inbox, sites: Sequence[str], declined: dict[str, str]
) -> dict[str, Register]:
    """Wait until every site has registered or declined, up to `deploy.join_s`; return who takes part.

    Adds sites that take no part to `declined`, with the reason.
    """
    found: dict[str, Register] = {}
    config, blocks = terms.config, terms.model.shape.blocks
    deadline = UPTIME.now() + config.deploy.join_s
    while not set(sites) <= found.keys() | declined.keys() and UPTIME.now() < deadline:
        if inbox.closed:
            break
        for arrival in inbox.take(0, 0.5):
            if not isinstance(arrival, Arrival):
                continue
            site, message = arrival.site, arrival.message
            if arrival.is_step:
                arrival.refuse(ProtocolError("no round has begun"))
            elif isinstance(message, Declined):
                declined[site] = message.reason
            elif isinstance(message, Register):
                if reason := unfit(config, blocks, site, message):
                    declined[site] = reason
                else:
                    found[site] = message
    return {name: found[name] for name in sites if name in found and name not in declined}


def unfit(config: RunConfig, blocks: int, name: str, register: Register) -> str | None:
    """Return why a registered site cannot take part; None if it can."""
    if reason := next(_implausible(config, register), None) or _unfit_device(register):
        return reason
    if config.cuts and not config.schedule.adaptive:
        deepest, key = config.cuts[site_names(config).index(name)], "clients.cuts"
    elif config.clients.cuts == "whole":
        deepest, key = blocks, "clients.cuts"
    else:
        whole = config.schedule.may_choose_whole and config.split.labels == "client"
        deepest, key = config.schedule.max_cut or blocks - (not whole), "schedule.max_cut"
    if register.min_cut <= deepest:
        return None
    return f"its data owner allows cuts from {register.min_cut} on, and this run goes to {deepest} ({key})"


def _implausible(config: RunConfig, register: Register) -> Iterator[str]:
    """Yield each number that a site of this run cannot have, with what fits."""
    longest, training, rows = config.data.max_tokens, config.training, most_rows(config)
    sequences = training.batch_size if training.batch_tokens is None else max(1, training.batch_tokens // 2)
    held_out = config.data.eval_examples or MOST_EXAMPLES
    given = register.model_dump()
    bounds: dict[str, tuple[float, float, str]] = {
        "train_examples": (1, MOST_EXAMPLES, "the text"),
        "train_tokens": (2 * register.train_examples, longest * register.train_examples, "data.max_tokens"),
        "eval_examples": (1, held_out, "data.eval_examples"),
        "truncated": (0, MOST_EXAMPLES, "the text"),
        "sequences_per_batch": (1, min(sequences, register.train_examples), "training.batch_size"),
        "padded_length": (2, longest, "data.max_tokens"),
        "tokens_per_batch": (2, min(rows, register.train_tokens), "training.batch_size, train_tokens"),
    }
    for name, (least, most, key) in bounds.items():
        if not least / ROUNDING <= given[name] <= most * ROUNDING:
            yield f"it registers {name} {given[name]:g}; from {least:g} to {most:g} is possible ({key})"
    ascending = {
        "sequences_per_batch": register.sequences_per_batch,
        "labelled_per_batch": register.labelled_per_batch,
        "tokens_per_batch": register.tokens_per_batch,
        "sequences_per_batch x padded_length": register.sequences_per_batch * register.padded_length,
        "tokens of the largest batch of this run": float(rows),
    }
    for (name, value), (larger, most) in pairwise(ascending.items()):
        if value > most * ROUNDING:
            yield f"it registers {name} {value:g}, which must be at most {larger} ({most:g})"


def _unfit_device(register: Register) -> str | None:
    """Return what is wrong with the machine that a site describes; None if it is plausible, or not given."""
    if not register.device:
        return None
    try:
        machine = DeviceSpec.model_validate(register.device)
    except ValidationError as error:
        return f"it describes a machine with invalid values: {error.errors()[0]['msg']}"
    for name, value in machine.model_dump().items():
        if value and not MIN_DEVICE_NUMBER <= value <= MAX_DEVICE_NUMBER:
            return (
                f"it describes a machine with {name} {value:g}; numbers from {MIN_DEVICE_NUMBER:g} to "
                f"{MAX_DEVICE_NUMBER:g} are possible"
            )
    return None
