"""Check what a site claims against what the server knows or has counted itself.

    Activations     batch no larger than the run's, no more text than the site has registered
    RoundReady      moments of the blocks that it gives up, whole and plausible
    AdapterUpload   factors of its blocks, finite and of plausible size; no tokens of its own counting
    Evaluation      tokens as the server has counted them; with labels on the server, its loss too

A claim that does not hold is an error of its site alone. Nothing here weighs a site by a number that the site
has chosen: weights are labelled tokens of batches that the server has processed (`training.client_record`).
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
    Declined,
    Evaluation,
    HeadGradient,
    Heartbeat,
    Message,
    Next,
    Register,
    RoundReady,
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
    Register, Declined, Next, Heartbeat, RoundReady, Activations, HeadGradient, AdapterUpload, Evaluation,
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

    def check(self, message: Activations, round: int, limits: SiteLimits | None) -> None:
        """Raise ProtocolError unless a held-out batch is the next one."""
        expect(message, Activations, round=round, step=self.batches, micro_batches=1)
        sequences = self.sequences + len(message.lengths)
        if limits is not None and sequences > limits.held_out:
            raise ProtocolError(
                f"{message.client} evaluates on {sequences} sequences; it registered {limits.held_out}"
            )

    def add(self, message: Activations) -> None:
        """Count a batch."""
        self.batches += 1
        self.sequences += len(message.lengths)
        self.tokens += message.labelled_tokens

    def checked(self, message: Evaluation) -> Evaluation:
        """Return the site's result, with the server's loss if it has computed it. Raises ProtocolError."""
        if message.tokens != self.tokens or not self.tokens:
            raise ProtocolError(
                f"{message.client} reports {message.tokens} held-out tokens; the server has processed "
                f"{self.tokens}"
            )
        if self.loss is not None:
            return message.model_copy(update={"loss": self.loss})
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


def check_ready(site: str, message: RoundReady, given_up: AdapterState, training: TrainingSpec) -> None:
    """Raise ProtocolError unless the moments are those of blocks that the site gives up with its new cut."""
    if message.own:
        raise ProtocolError(f"{site} sends factors of its own, which it keeps in no deployed run")
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
