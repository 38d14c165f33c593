"""Records of the server about its clients: the steps of a round, and the state that outlives rounds.

    micro-batch 0   Activations --check, begin--> ... gradient --finish--+
    micro-batch 1   Activations --check, begin--> ... gradient --finish--+--> the step is complete

Micro-batches may arrive and be answered in any order. Each announces how many parts its step has and how many
labelled tokens they have together, so each gradient can be weighted before the other parts are known.

The weight of a client in the mean of a round is the number of labelled tokens counted here. A client cannot
raise it: a round has at most the steps that were ordered, and a step is no larger than a batch of the run.

    cut moves 2 -> 4    server: blocks 2 3 | 4 5 6   --state of blocks 2, 3-->     client
    cut moves 4 -> 2    server: blocks 2 3 | 4 5 6   <--state of blocks 2, 3--     client

The state of a block moves with the block. The server deletes it only when the client confirms the move: a
client that is lost on the way keeps its old cut, and neither side lacks anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from splitft.adapters import AdapterState, Moments, moments_within
from splitft.errors import ProtocolError
from splitft.protocol import Activations, expect
from splitft.specs import TrainingSpec
from splitft.training.micro_batch import MicroBatch, StepTotals


@dataclass
class RoundProgress:
    """The steps of one participant of a round."""

    steps: int = 0
    """Steps completed in the round."""
    tokens: int = 0
    """Labelled tokens of those steps."""
    begun: dict[int, MicroBatch] = field(default_factory=dict)
    """Micro-batches that have arrived of the current step, by number, including the finished ones."""
    lengths: list[int] = field(default_factory=list)
    """Real tokens of each of their sequences."""
    totals: StepTotals = field(default_factory=StepTotals)
    """Sums of those that are finished."""
    completed: StepTotals | None = None
    """The step that the last finished micro-batch completed, if it did."""

    def check(self, message: Activations, training: TrainingSpec) -> None:
        """Raise ProtocolError unless this micro-batch is allowed now."""
        client, of = message.client, message.micro_batches
        if self.steps >= training.most_steps:
            raise ProtocolError(
                f"{client} sends step {self.steps + 1} of round {message.round}, in which "
                f"{training.most_steps} were ordered"
            )
        if of > training.micro_batches:
            raise ProtocolError(f"{client} sends a step in {of} parts; {training.micro_batches} were agreed")
        in_flight = len(self.begun) - len(self.totals.finished)
        if message.micro_batch in self.begun or in_flight >= min(training.in_flight, of):
            raise ProtocolError(f"{client} sends a batch, but its gradient was due")
        if self.begun:
            one = next(iter(self.begun.values()))
            same = {"step": one.step, "micro_batches": one.of, "step_labelled": one.step_labelled}
            expect(message, Activations, **same)
        labelled = message.labelled_tokens + sum(one.labelled for one in self.begun.values())
        parts = len(self.begun) + 1
        if (labelled == message.step_tokens) != (parts == of) or labelled > message.step_tokens:
            raise ProtocolError(
                f"{client} sends {labelled} labelled tokens in {parts} of {of} parts of a step that has "
                f"{message.step_tokens}"
            )
        check_step_size(client, [*self.lengths, *message.lengths], training)

    def begin(self, message: Activations) -> None:
        """Record a micro-batch whose forward pass is done."""
        self.begun[message.micro_batch] = MicroBatch.of_message(message)
        self.lengths += message.lengths

    def finish(self, number: int, loss: float | None) -> bool:
        """Record a micro-batch after backward, with its mean loss; return whether its step is complete."""
        self.completed = None
        if not self.totals.add(self.begun[number], loss):
            return False
        self.completed = self.totals
        self.tokens += self.totals.tokens
        self.steps += 1
        self.forget()
        return True

    def forget(self) -> None:
        """Forget the current step."""
        self.begun, self.lengths, self.totals = {}, [], StepTotals()


def check_step_size(client: str, lengths: Sequence[int], training: TrainingSpec) -> None:
    """Raise ProtocolError if a step's sequences, in all its micro-batches, are more than a batch of the run.

    With `training.batch_tokens` a sequence longer than that is a batch of its own.
    """
    count, most = len(lengths), training.batch_tokens
    if most is None and count > training.batch_size:
        raise ProtocolError(
            f"{client} sends a step of {count} sequences; training.batch_size is {training.batch_size}"
        )
    if most is not None and count > 1 and count * max(lengths) > most:
        raise ProtocolError(
            f"{client} sends a step of {count * max(lengths)} padded tokens; training.batch_tokens is {most}"
        )


class ClientStates:
    """State of all clients that the server keeps from round to round.

    Moments are kept with `training.optimizer_state: keep`, personal factors by rules that leave each client
    its B (FedSA-LoRA, arXiv 2410.01463).
    """

    def __init__(self, per_client: bool) -> None:
        """Begin empty. Without `per_client`, all clients share the moments on the server."""
        self._per_client = per_client
        self.moments: dict[str, Moments] = {}
        """Optimizer moments by slot."""
        self.own: dict[str, AdapterState] = {}
        """Personal factors B of the server's blocks, by client."""

    def personal(self, client: str, state: AdapterState) -> AdapterState:
        """Return global factors with the client's personal ones in their place."""
        return state.replace_B(self.own.get(client, AdapterState()))

    def moments_of(self, client: str, blocks: Sequence[int]) -> Moments:
        """Return the client's moments of these blocks; none where all clients share them."""
        return moments_within(self.moments.get(client, {}), blocks)

    def move(self, client: str, gained: Sequence[int], moments: Moments, own: AdapterState) -> None:
        """Delete the state of blocks that the client has gained, and keep that of blocks it has given up."""
        if self._per_client and (moments or client in self.moments):
            before = self.moments.get(client, {})
            gone = moments_within(before, gained)
            self.moments[client] = {name: one for name, one in before.items() if name not in gone} | moments
        if personal := self.own.get(client, AdapterState()):
            self.own[client] = personal.within(set(personal.ranks()) - set(gained))
        self.add_own(client, own)

    def add_own(self, client: str, own: AdapterState) -> None:
        """Keep personal factors of the server's blocks."""
        if own:
            self.own[client] = self.own.get(client, AdapterState()).updated(own)
