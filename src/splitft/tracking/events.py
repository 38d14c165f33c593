"""What happens in a run, as small typed facts: the one source of summary, report and progress.

    runtime --Event--> listener(s)          EventLog       events.jsonl, one JSON object a line
                                            Progress       the lines on the terminal
    events.jsonl --read_events--> [Event] --summarise--> summary.json, report.html

Rounds of training are numbered from 1; round 0 is the state before training, so that
`Evaluated(round=0)` is the loss before and `Evaluated(round=r)` the loss after round r. What events tell of
(`Traffic`, `ClientFacts`, `Bar`) stands in `facts.py` and is given on from here; `log.py` keeps events in a
file.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from splitft.tracking.facts import PRIVACY, Fact
from splitft.tracking.facts import Bar as Bar
from splitft.tracking.facts import ClientFacts as ClientFacts
from splitft.tracking.facts import Received as Received
from splitft.tracking.facts import Role as Role
from splitft.tracking.facts import Traffic as Traffic


class Stamped(Fact):
    """What every event has."""

    t: float = Field(default_factory=time.time)
    """Unix time at which it happened, in seconds."""


class RunStarted(Stamped):
    """The run has its model and its data and begins."""

    event: Literal["RunStarted"] = "RunStarted"
    version: str
    """splitft's version."""
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
    """Where labels, head and loss live."""
    received: Received = "hidden"
    """What comes to the server, beside labels."""
    clients: tuple[ClientFacts, ...]
    """Everyone who takes part."""
    defences: tuple[str, ...] = ()
    """What is done to messages before they leave, and what that promises, one sentence each."""
    audited: str = ""
    """What a stored audit found that the server can read in this setting, in one sentence."""
    machines: Mapping[str, str] = {}
    """Devices and links of the simulated clock, by client, in words."""

    @property
    def privacy(self) -> str:
        """What the server can read, in one sentence that a run says first and its report repeats."""
        said = PRIVACY[self.labels if self.received == "hidden" else self.received]
        return " ".join(filter(None, (said, self.audited)))


class RunResumed(Stamped):
    """The run continues from a checkpoint; rounds `round` and later begin again."""

    event: Literal["RunResumed"] = "RunResumed"
    round: int
    """First round that is trained now."""


class WireChosen(Stamped):
    """`wire: auto` has chosen one client's codecs, before the first round."""

    event: Literal["WireChosen"] = "WireChosen"
    client: str
    """Whose."""
    hidden: str
    """Codec of hidden states."""
    gradient: str
    """Codec of gradients."""
    reason: str
    """What was measured, and what is allowed."""


class CutsChanged(Stamped):
    """Cuts in force from this round on; sent for the first round too."""

    event: Literal["CutsChanged"] = "CutsChanged"
    round: int
    """First round with these cuts."""
    cuts: Mapping[str, int]
    """k of each client, by name."""
    reason: str = ""
    """Why the controller moved them, in words."""


class StepDone(Stamped):
    """One client has taken one optimizer step."""

    event: Literal["StepDone"] = "StepDone"
    round: int
    """Round, from 1."""
    step: int
    """The client's step, counted over the whole run from 0."""
    client: str
    """Who."""
    loss: float
    """Mean loss in nats over the batch's labelled tokens."""
    tokens: int
    """Labelled tokens in the batch."""
    examples: int
    """Sequences in the batch."""
    seconds: Mapping[str, float] = {}
    """Wall seconds by leg, such as client_forward or server_backward."""
    traffic: Traffic = Traffic()
    """What this step sent."""


class RoundDone(Stamped):
    """Adapters of one round have been collected and aggregated."""

    event: Literal["RoundDone"] = "RoundDone"
    round: int
    """Round, from 1."""
    participants: tuple[str, ...]
    """Who trained in it."""
    aggregation_error: float
    """||mean(BA) - BA_global|| / ||mean(BA)|| over all layers; 0 is exact."""
    traffic: Mapping[str, Traffic] = {}
    """Adapters sent in this round, by client."""


class PrivacySpent(Stamped):
    """What the noise on the updates of all rounds so far promises a client that took part in each."""

    event: Literal["PrivacySpent"] = "PrivacySpent"
    round: int
    """Round, from 1."""
    epsilon: float
    """Of the rounds so far together, at `delta`; infinite without noise."""
    epsilon_of_round: float
    """Of this round alone."""
    delta: float
    """Probability with which the promise may fail."""
    clipped: int
    """Participants of this round whose update was longer than the bound."""
    deviation: float
    """Standard deviation of the noise on each factor of the mean."""


class RoundTimed(Stamped):
    """How long a round took on the simulated clock."""

    event: Literal["RoundTimed"] = "RoundTimed"
    round: int
    """Round, from 1."""
    seconds: float
    """Simulated seconds from the start of moving to the last client's adapters."""
    move_seconds: float
    """Those of them in which blocks changed sides."""
    weight_bytes: int
    """Base weights that clients loaded for deeper cuts."""
    legs: Mapping[str, Mapping[str, float]]
    """Seconds by client and leg, waiting for the server among them."""
    idle: Mapping[str, float]
    """Seconds in which a client's processor, or the server, did not compute."""
    memory_bytes: Mapping[str, float] = {}
    """Foretold peak memory of each client at its cut, and of the server."""
    bars: tuple[Bar, ...] = ()
    """The round in full; given for the first round, and for those in which a cut moved."""


class Evaluated(Stamped):
    """The global adapters have been tried on every client's held-out text."""

    event: Literal["Evaluated"] = "Evaluated"
    round: int
    """0 before training, r after round r."""
    loss: float
    """Mean loss in nats over the labelled held-out tokens of all clients."""
    by_client: Mapping[str, float]
    """The same for each client alone."""
    traffic: Mapping[str, Traffic] = {}
    """What the evaluation sent, by client; kept apart from the bytes of training."""


class CheckpointSaved(Stamped):
    """The run can continue from here."""

    event: Literal["CheckpointSaved"] = "CheckpointSaved"
    round: int
    """Rounds that are in it."""
    path: str
    """Where, relative to the run folder."""


class Warned(Stamped):
    """Something the user should know; the run goes on."""

    event: Literal["Warned"] = "Warned"
    message: str
    """One sentence."""


def _renamed(name: str) -> AfterValidator:
    """Read an event under the name that earlier versions wrote, and keep today's."""
    return AfterValidator(lambda _: name)


class SessionStarted(Stamped):
    """A deployed run goes on with the sites that are there: one link of its chain of jobs."""

    event: Annotated[Literal["SessionStarted", "LinkStarted"], _renamed("SessionStarted")] = "SessionStarted"
    round: int
    """First round that it trains."""
    sites: tuple[str, ...]
    """Who is there."""
    absent: tuple[str, ...] = ()
    """Who is awaited."""


class SiteChanged(Stamped):
    """A site of a deployed run was lost, refused, stopped for being slow, has declined, or is back."""

    event: Literal["SiteChanged"] = "SiteChanged"
    round: int
    """Round in which it happened; 0 before the first."""
    site: str
    """Who."""
    state: Literal["lost", "refused", "late", "back", "declined"]
    """`lost`: nothing heard; `refused`: what it sent cannot be; `late`: its finished steps count, no more;
    `declined`: its data owner forbids what the run asks."""
    reason: str
    """What was found."""

    @property
    def message(self) -> str:
        """One sentence."""
        verb = "has" if self.state == "declined" else "is"
        return f"round {self.round}: {self.site} {verb} {self.state}: {self.reason}"


class SessionEnded(Stamped):
    """The sites that are there do not fit any more; a supervisor starts the next link."""

    event: Annotated[Literal["SessionEnded", "LinkEnded"], _renamed("SessionEnded")] = "SessionEnded"
    round: int
    """Rounds finished."""
    reason: Literal["finished", "back", "paused", "stopped"]
    """All rounds are trained; a site that was away can join; too few sites are left, or the engine gave up;
    whoever runs the federation has stopped the run."""
    detail: str = ""
    """In words."""


class RunDone(Stamped):
    """All rounds are trained and the adapter is written."""

    event: Literal["RunDone"] = "RunDone"
    rounds: int
    """Rounds trained over the whole run."""


Event = Annotated[
    RunStarted
    | RunResumed
    | WireChosen
    | CutsChanged
    | StepDone
    | RoundDone
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
