"""Check what a site claims against what the server knows or has counted itself.

    Activations     batch no larger than the run's, no more text than the site has registered
    LocalStep       the same: its tokens are the site's word, and bounded by what it has registered
    RoundReady      moments of the blocks that it gives up, whole and plausible, and its own B of them, if any
    AdapterUpload   factors of its blocks, finite and of plausible size; no tokens of its own counting
    Evaluation      tokens as the server has counted them, right predictions among them; with labels on the
                    server, its loss and right predictions

A claim that does not hold is an error of its site alone. Nothing here weighs a site by a number that the site
has chosen: weights are labelled tokens of batches that the server has processed (`training.client_record`).
The exception is a site that trains alone, with the whole model: it counts its own tokens, at most as many as
a site whose batches the server processes could have.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from splitft.adapters import AdapterState, Moments
from splitft.config import RunConfig
from splitft.deploy.server.quota import InboxLimits
from splitft.errors import AdapterError, ProtocolError, SplitftError
from splitft.geometry import Span
from splitft.protocol import (
    Activations,
    AdapterUpload,
    CodecsChosen,
    Declined,
    Evaluation,
    HeadGradient,
    Heartbeat,
    LocalStep,
    Message,
    Next,
    Register,
    RoundReady,
    TryCodec,
    expect,
)
from splitft.specs import TrainingSpec

MOST_FACTOR = 1e6
"""Largest number in a site's factors: far above any that training yields, far below what overflows in float32
when factors are multiplied and squared."""
MOST_NATS = 1e6
"""Largest loss of a token that a site may report."""
ADAMW_FIELDS = frozenset({"exp_avg", "exp_avg_sq", "step"})
"""Moments of a parameter with AdamW."""

FROM_CLIENTS = (
    Register, Declined, TryCodec, CodecsChosen, Next, Heartbeat, RoundReady, Activations, HeadGradient,
    LocalStep, AdapterUpload, Evaluation,
)  # fmt: skip
"""Messages that a client may send."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SiteLimits:
    """The most text that a site may send, by the run and by its own registration."""

    longest: int
    """Tokens of a sequence."""
    examples: int
    """Sequences that it trains on."""
    tokens: int
    """Tokens of these sequences."""
    held_out: int
    """Sequences that it evaluates on."""

    @classmethod
    def of(cls, config: RunConfig, register: Register) -> SiteLimits:
        """Return the limits of a registered site."""
        return cls(
            longest=config.data.max_tokens,
            examples=register.train_examples,
            tokens=register.train_tokens,
            held_out=register.eval_examples,
        )

    def check_alone(self, message: LocalStep, training: TrainingSpec, before: int) -> None:
        """Raise ProtocolError if a site cannot have the tokens that it claims; `before`: those of this round.

        An example comes once an epoch, and a round's steps meet at most this many epochs.
        """
        longest = message.sequences * (self.longest - 1)
        if message.tokens > longest:
            raise ProtocolError(
                f"{message.client} claims {message.tokens} labelled tokens in {message.sequences} sequences; "
                f"they have at most {longest}"
            )
        if not message.training:
            return
        batches = max(1, self.examples // (training.batch_tokens or training.batch_size))
        most = self.tokens * (2 + (training.steps - 1) // batches)
        if (
            message.sequences > self.examples
            or message.tokens > self.tokens
            or before + message.tokens > most
        ):
            raise ProtocolError(
                f"{message.client} claims {message.tokens} labelled tokens of {message.sequences} sequences "
                f"after {before} in this round; it registered {self.tokens} of {self.examples}"
            )

    def check(self, message: Activations) -> None:
        """Raise ProtocolError if a batch is more than the site can have."""
        count, tokens, longest = len(message.lengths), sum(message.lengths), max(message.lengths)
        if longest > self.longest:
            raise ProtocolError(
                f"{message.client} sends a sequence of {longest} tokens; data.max_tokens is {self.longest}"
            )
        if message.training and (count > self.examples or tokens > self.tokens):
            raise ProtocolError(
                f"{message.client} trains on {count} sequences of {tokens} tokens at once; it registered "
                f"{self.examples} of {self.tokens}"
            )


@dataclass
class HeldOutCount:
    """The held-out batches of one site in one evaluation, as the server counts them."""

    batches: int = 0
    sequences: int = 0
    tokens: int = 0
    """Labelled tokens."""
    loss: float | None = None
    """Sum over them in nats, if the server has computed it."""
    correct: int | None = None
    """Right predictions among them, likewise."""

    def check(self, message: Activations | LocalStep, round: int, limits: SiteLimits | None) -> None:
        """Raise ProtocolError unless a held-out batch is the next one."""
        if isinstance(message, Activations):
            expect(message, Activations, round=round, step=self.batches, micro_batches=1)
        else:
            expect(message, LocalStep, round=round, step=self.batches)
        sequences = self.sequences + sequences_of(message)
        if limits is not None and sequences > limits.held_out:
            raise ProtocolError(
                f"{message.client} evaluates on {sequences} sequences; it registered {limits.held_out}"
            )

    def add(self, message: Activations | LocalStep) -> None:
        """Count a batch."""
        self.batches += 1
        self.sequences += sequences_of(message)
        self.tokens += message.tokens if isinstance(message, LocalStep) else message.labelled_tokens

    def checked(self, message: Evaluation) -> Evaluation:
        """Return the site's result, with the server's loss if it has computed it. Raises ProtocolError."""
        if message.tokens != self.tokens or not self.tokens:
            raise ProtocolError(
                f"{message.client} reports {message.tokens} held-out tokens; the server has processed "
                f"{self.tokens}"
            )
        if self.loss is not None:
            return message.model_copy(update={"loss": self.loss, "correct": self.correct})
        if message.correct is not None and message.correct > self.tokens:
            raise ProtocolError(
                f"{message.client} reports {message.correct} right predictions of {self.tokens} held-out "
                "tokens"
            )
        check_loss(message.client, message.loss / self.tokens)
        return message


def check_outline(site: str, outline: Message, limits: InboxLimits) -> None:
    """Raise ProtocolError for what the site may not send, before any payload is read."""
    if not isinstance(outline, FROM_CLIENTS):
        raise ProtocolError(f"{type(outline).__name__} is not sent by clients")
    if outline.client != site:
        raise ProtocolError(f"{site} sends a message in the name of {outline.client!r}")
    if isinstance(outline, Activations):
        padded = len(outline.lengths) * max(outline.lengths)
        if padded > limits.batch_tokens:
            raise ProtocolError(
                f"{site} sends a batch of {padded} padded tokens; this run has at most {limits.batch_tokens}"
            )
        if outline.examples and not limits.example_ids:
            raise ProtocolError(f"{site} sends numbers of its examples, which no codec of this run needs")


def sequences_of(message: Activations | LocalStep) -> int:
    """Return the number of sequences of a batch."""
    return message.sequences if isinstance(message, LocalStep) else len(message.lengths)


def check_alone(message: LocalStep, training: TrainingSpec) -> None:
    """Raise ProtocolError for a step of a site that trains alone if no batch of the run is so large."""
    check_loss(message.client, message.loss)
    most = training.batch_tokens or training.batch_size
    if message.training and message.sequences > most:
        raise ProtocolError(
            f"{message.client} claims a step of {message.sequences} sequences; this run has at most {most}"
        )


def check_labelled(message: Activations) -> None:
    """Raise ProtocolError if the last token of a sequence has a label: no token follows that it predicts."""
    for length, (_, stop) in zip(message.lengths, message.labelled, strict=True):
        if stop >= length:
            raise ProtocolError(
                f"{message.client} labels positions up to {stop} of a sequence of {length} tokens; "
                f"the last of them predicts nothing"
            )


def check_loss(site: str, loss: float | None) -> None:
    """Raise ProtocolError for a mean loss that no token has."""
    if loss is not None and not abs(loss) <= MOST_NATS:
        raise ProtocolError(f"{site} reports a loss of {loss:g} nats a token; at most {MOST_NATS:g} is read")


def check_gradient(message: HeadGradient) -> None:
    """Raise ProtocolError for a gradient with a loss that no batch has."""
    check_loss(message.client, message.loss)


def check_size(site: str, adapters: AdapterState) -> None:
    """Raise AdapterError unless the factors are finite and of a size that can be aggregated."""
    for (block, target), factors in adapters.items():
        for tensor in (factors.A, factors.B, factors.magnitude):
            largest = 0.0 if tensor is None or not tensor.numel() else float(tensor.abs().max())
            if not largest <= MOST_FACTOR:  # also NaN
                raise AdapterError(
                    f"the factors of {site} for block {block} {target} have the number {largest:g}; "
                    f"at most {MOST_FACTOR:g} is aggregated: lower training.lr"
                )


def check_ready(
    site: str, message: RoundReady, given_up: AdapterState, training: TrainingSpec, keeps_own: bool = False
) -> None:
    """Raise an error unless a site sends the state of the blocks that it gives up with its new cut, if any.

    `given_up` are the global factors of these blocks; with `keeps_own` the site has a B of its own for each.
    """
    _check_own(site, message.own, given_up if keeps_own else AdapterState())
    if message.moments and (training.optimizer_state != "keep" or training.optimizer != "adamw"):
        raise ProtocolError(f"{site} sends moments of its optimizer, and this run keeps none")
    by_parameter: dict[str, Moments] = {}
    for name, tensor in message.moments.items():
        parameter, _, field = name.rpartition(".")
        by_parameter.setdefault(parameter, {})[field] = tensor
    due = {f"{block}.{target}.{part}" for block, target in given_up for part in "ABM"}
    for parameter, moments in by_parameter.items():
        if parameter not in due:
            raise ProtocolError(f"{site} sends moments of {parameter}, which it does not give up")
        if not _plausible(moments):
            raise ProtocolError(f"{site} sends moments of {parameter} that no optimizer has")


def _check_own(site: str, own: AdapterState, due: AdapterState) -> None:
    """Raise ProtocolError unless these are a B of the site's own for each of the layers `due`."""
    if own.keys() != due.keys():
        raise ProtocolError(f"{site} sends factors of its own of other blocks than those that it gives up")
    for key, factors in own.items():
        if factors.names != "B" or factors.B.shape != due[key].B.shape or factors.magnitude is not None:
            raise ProtocolError(
                f"{site} sends {factors.names} {tuple(factors.B.shape)} as its own factor of block {key[0]} "
                f"{key[1]}; due was B {tuple(due[key].B.shape)}"
            )
    check_size(site, own)


def _plausible(moments: Mapping[str, torch.Tensor]) -> bool:
    """Return whether these can be the moments of one parameter with AdamW."""
    if moments.keys() != ADAMW_FIELDS:
        return False
    mean, square, step = moments["exp_avg"], moments["exp_avg_sq"], moments["step"]
    return (
        mean.shape == square.shape
        and mean.dim() == 2
        and step.dim() == 0
        and 1 <= float(step) < 2**53
        and math.isfinite(float(mean.abs().sum()))
        and bool((square >= 0).all())
    )


def given_up_blocks(state: AdapterState, old: int, new: int) -> AdapterState:
    """Return the global factors of blocks that a site gives up when its cut moves from `old` to `new`."""
    return state.within(Span(0, old).minus(Span(0, new)))


def unusable(site: str, what: str, error: Exception) -> SplitftError:
    """Return the error for something of a site that has made the server's own code fail."""
    logger.error("a %s of %s could not be used: %s: %s", what, site, type(error).__name__, error)
    return ProtocolError(f"the {what} of {site} could not be used: {type(error).__name__}: {error}")
