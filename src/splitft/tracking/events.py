"""The events of a run: the one source of summary, report and progress.

    training --Event--> listener(s)         EventLog       events.jsonl, one JSON object a line
                                            Progress       the lines on the terminal
    events.jsonl --read_events--> [Event] --summarise--> summary.json, report.html

Rounds of training are numbered from 1; round 0 is the state before training, so that
`Evaluated(round=0)` is the loss before and `Evaluated(round=r)` the loss after round r. The records inside
events (`Traffic`, `ClientInfo`, `Bar`) are defined in `records.py`, the events of a deployed run's sessions
in `session_events.py`, those of what was kept out of the adapters in `safety_events.py`; all can be imported
from here too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Literal

from pydantic import Field

from splitft.tracking.records import PRIVACY, Stamped
from splitft.tracking.records import Bar as Bar
from splitft.tracking.records import ClientInfo as ClientInfo
from splitft.tracking.records import Received as Received
from splitft.tracking.records import Role as Role
from splitft.tracking.records import Traffic as Traffic
from splitft.tracking.safety_events import RoundUndone as RoundUndone
from splitft.tracking.safety_events import UpdatesBounded as UpdatesBounded
from splitft.tracking.session_events import SessionEnded as SessionEnded
from splitft.tracking.session_events import SessionStarted as SessionStarted
from splitft.tracking.session_events import SiteChanged as SiteChanged


class RunStarted(Stamped):
    """The model and the data are loaded, and the run begins."""

    event: Literal["RunStarted"] = "RunStarted"
    version: str
    """Version of splitft."""
    method: str
    """Name of the method."""
    seed: int
    """Seed of shares, initial factors and batches."""
    model: str
    """Model as the configuration names it."""
    blocks: int
    """L, the model's number of blocks."""
    rounds: int
    """Rounds to train."""
    steps: int
    """Local steps a client takes in a round."""
    labels: Literal["client", "server"]
    """Where labels, head and loss are."""
    received: Received = "hidden"
    """Content that reaches the server, besides labels."""
    clients: tuple[ClientInfo, ...]
    """All clients of the run."""
    defences: tuple[str, ...] = ()
    """The defences applied to messages, and what they guarantee, one sentence each."""
    audited: str = ""
    """What the server can read in this setting according to a stored audit, in one sentence."""
    machines: Mapping[str, str] = {}
    """Devices and links of the simulated clock, by client, in words."""
    base: Mapping[str, str] = {}
    """SHA-256 of the files of the frozen base model, to resume with the same; empty if unknown."""
    tokenizer: str = ""
    """Digest of the tokenizer, likewise."""
    devices: str = ""
    """The devices that compute, in words; empty in earlier versions."""
    precision: str = ""
    """Type of the frozen weights and hidden states, and the reason for it; empty in earlier versions."""

    @property
    def privacy(self) -> str:
        """What the server can read, as the run prints it first and its report repeats it."""
        sentence = PRIVACY[self.labels if self.received == "hidden" else self.received]
        whole = [client.name for client in self.clients if client.cut == self.blocks]
        apart = ""
        if self.received == "hidden" and whole:
            apart = f"Clients that begin with the whole model send adapters alone: {', '.join(whole)}."
        return " ".join(filter(None, (sentence, apart, self.audited)))


class RunResumed(Stamped):
    """The run continues from a checkpoint; rounds `round` and later begin again."""

    event: Literal["RunResumed"] = "RunResumed"
    round: int
    """First round to train."""


class WireChosen(Stamped):
    """`wire: auto` has chosen the codecs of one client, before the first round."""

    event: Literal["WireChosen"] = "WireChosen"
    client: str
    hidden: str
    """Codec of hidden states."""
    gradient: str
    """Codec of gradients."""
    reason: str
    """The measurements and the limits."""


class CutsChanged(Stamped):
    """New cuts hold from this round on; sent for the first round too."""

    event: Literal["CutsChanged"] = "CutsChanged"
    round: int
    """First round with these cuts."""
    cuts: Mapping[str, int]
    """k by client."""
    reason: str = ""
    """The controller's reason for moving them, in words."""


class StepDone(Stamped):
    """A client has taken an optimizer step."""

    event: Literal["StepDone"] = "StepDone"
    round: int
    """Round, from 1."""
    step: int
    """The client's step, counted over the whole run from 0."""
    client: str
    loss: float | None = None
    """Mean loss in nats over the batch's labeled tokens; None if the client does not report it."""
    tokens: int
    """Labelled tokens in the batch."""
    examples: int
    """Sequences in the batch."""
    seconds: Mapping[str, float] = {}
    """Wall seconds by leg, such as client_forward or server_backward."""
    traffic: Traffic = Traffic()
    """Bytes of this step."""


class RoundDone(Stamped):
    """The adapters of a round have been collected and aggregated."""

    event: Literal["RoundDone"] = "RoundDone"
    round: int
    """Round, from 1."""
    participants: tuple[str, ...]
    """Clients that trained in it."""
    aggregation_error: float
    """||mean(BA) - BA_global|| / ||mean(BA)|| over all layers; 0 is exact."""
    traffic: Mapping[str, Traffic] = {}
    """Adapters sent in this round, by client."""


class PrivacySpent(Stamped):
    """The privacy budget spent on the updates of a client that took part in every round so far."""

    event: Literal["PrivacySpent"] = "PrivacySpent"
    round: int
    """Round, from 1."""
    epsilon: float
    """Epsilon of all rounds so far at `delta`; infinite without noise."""
    epsilon_of_round: float
    """Epsilon of this round alone."""
    delta: float
    """Probability with which the guarantee may fail."""
    clipped: int
    """Participants of this round whose update was longer than the bound."""
    deviation: float
    """Standard deviation of the noise on each factor of the mean."""


class RoundTimed(Stamped):
    """The length of a round on the simulated clock."""

    event: Literal["RoundTimed"] = "RoundTimed"
    round: int
    """Round, from 1."""
    seconds: float
    """Seconds from the first block that moves to the last client's adapters."""
    move_seconds: float
    """Part of `seconds` in which blocks moved between client and server."""
    weight_bytes: int
    """Bytes of base weights that clients loaded for deeper cuts."""
    legs: Mapping[str, Mapping[str, float]]
    """Seconds by client and leg, waiting for the server among them."""
    idle: Mapping[str, float]
    """Seconds in which a client's processor, or the server, did not compute."""
    memory_bytes: Mapping[str, float] = {}
    """Predicted peak memory of each client at its cut, and of the server."""
    bars: tuple[Bar, ...] = ()
    """Every leg; recorded for the first round, and for those in which a cut moved."""


class Evaluated(Stamped):
    """The global adapters have been evaluated on every client's held-out text."""

    event: Literal["Evaluated"] = "Evaluated"
    round: int
    """0 before training, r after round r."""
    loss: float
    """Mean loss in nats over the labeled held-out tokens of all clients."""
    by_client: Mapping[str, float]
    """The same for each client alone, as it reports it."""
    accuracy: float | None = None
    """Share of these tokens that are the most probable ones; None if a client does not report it."""
    accuracy_by_client: Mapping[str, float] = {}
    """The same for each client that reports it."""
    outliers: Mapping[str, str] = {}
    """Clients whose loss does not fit the others' for the same adapters, and why; not part of `loss`."""
    traffic: Mapping[str, Traffic] = {}
    """Bytes of the evaluation, by client; not part of the bytes of training."""

    @property
    def warnings(self) -> list[str]:
        """One sentence for each outlier."""
        return [
            f"round {self.round}: {name} reports a loss of {self.by_client[name]:.4g}, which is left out of "
            f"the run's: {reason}"
            for name, reason in self.outliers.items()
        ]


class CheckpointSaved(Stamped):
    """A checkpoint has been written, from which the run can continue."""

    event: Literal["CheckpointSaved"] = "CheckpointSaved"
    round: int
    """Rounds it contains."""
    path: str
    """Path relative to the run folder."""


class Warned(Stamped):
    """A warning; the run continues."""

    event: Literal["Warned"] = "Warned"
    message: str
    """One sentence."""


class RunDone(Stamped):
    """All rounds are trained and the adapter is written."""

    event: Literal["RunDone"] = "RunDone"
    rounds: int
    """Rounds of the whole run."""


Event = Annotated[
    RunStarted
    | RunResumed
    | WireChosen
    | CutsChanged
    | StepDone
    | RoundDone
    | UpdatesBounded
    | RoundUndone
    | PrivacySpent
    | RoundTimed
    | Evaluated
    | CheckpointSaved
    | Warned
    | SessionStarted
    | SiteChanged
    | SessionEnded
    | RunDone,
    Field(discriminator="event"),
]
Listener = Callable[[Event], None]
