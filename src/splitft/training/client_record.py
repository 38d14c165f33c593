"""What the server keeps for one participant of a round: its steps, and the micro-batches of the one underway.

    micro-batch 0   Activations --check, take--> ... gradient --give_back--+
    micro-batch 1   Activations --check, take--> ... gradient --give_back--+--> the step is whole

They may come and be answered in any order. All parts of a step tell how many there are and how many labelled
tokens they have together, so that each part's gradient is weighted rightly before the others are known.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from splitft.errors import ProtocolError
from splitft.protocol import Activations, expect
from splitft.specs import TrainingSpec


@dataclass
class RoundProgress:
    """One participant's part in a round, as the server has it."""

    cut: int
    step: int = 0
    """Steps this client has finished in the round."""
    tokens: int = 0
    """Labelled tokens it has trained on in the round."""
    labelled: dict[int, int] = field(default_factory=dict)
    """Labelled tokens of each micro-batch of the step that has begun, those that are done too."""
    same: dict[str, int | None] = field(default_factory=dict)
    """What all micro-batches of the step that has begun tell alike."""
    back: int = 0
    """How many of them are done."""

    def check(self, message: Activations, training: TrainingSpec) -> None:
        """Raise ProtocolError unless this micro-batch may come now."""
        client, of = message.client, message.micro_batches
        if of > training.micro_batches:
            raise ProtocolError(f"{client} sends a step in {of} parts; {training.micro_batches} were agreed")
        underway = len(self.labelled) - self.back
        if message.micro_batch in self.labelled or underway >= min(training.in_flight, of):
            raise ProtocolError(f"{client} sends a batch, but its gradient was due")
        expect(message, Activations, **self.same)
        labelled, parts = message.labelled_tokens + sum(self.labelled.values()), len(self.labelled) + 1
        if (labelled == message.step_tokens) != (parts == of) or labelled > message.step_tokens:
            raise ProtocolError(
                f"{client} sends {labelled} labelled tokens in {parts} of {of} parts of a step that has "
                f"{message.step_tokens}"
            )

    def take(self, message: Activations) -> None:
        """This micro-batch is underway."""
        self.labelled[message.micro_batch] = message.labelled_tokens
        self.same = {name: getattr(message, name) for name in ("step", "micro_batches", "step_labelled")}

    def give_back(self) -> bool:
        """One micro-batch is done; whether the step is whole with it."""
        self.back += 1
        if self.back != self.same["micro_batches"]:
            return False
        self.tokens += sum(self.labelled.values())
        self.step += 1
        self.forget()
        return True

    def forget(self) -> None:
        """Nothing of a step is underway any more."""
        self.labelled, self.same, self.back = {}, {}, 0
