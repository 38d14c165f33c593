"""The events of a deployed run's sessions: their begin and end, and what became of the sites."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator

from splitft.tracking.records import Stamped


def _renamed(name: str) -> AfterValidator:
    """Accept the name that earlier versions wrote, and replace it by today's."""
    return AfterValidator(lambda _: name)


class SessionStarted(Stamped):
    """A deployed run starts or continues with the connected sites: one session of the run."""

    event: Annotated[Literal["SessionStarted", "LinkStarted"], _renamed("SessionStarted")] = "SessionStarted"
    round: int
    """First round of the session."""
    sites: tuple[str, ...]
    """Connected sites."""
    absent: tuple[str, ...] = ()
    """Expected sites that are not connected."""
    session: str = ""
    """Id of the session, which is that of its FLARE job."""


class SiteChanged(Stamped):
    """A site of a deployed run was lost, refused or late, has failed or declined, or is back."""

    event: Literal["SiteChanged"] = "SiteChanged"
    round: int
    """Round in which it happened; 0 before the first."""
    site: str
    state: Literal["lost", "refused", "failed", "late", "back", "declined"]
    """`lost`: no heartbeat; `refused`: it sent an invalid message; `failed`: it reports that it could not do
    what it was asked, such as with a full disk; `late`: only its finished steps count;
    `declined`: its policy forbids what the run asks for."""
    reason: str
    """The cause, in words."""

    @property
    def message(self) -> str:
        """The event in one sentence."""
        verb = "has" if self.state in ("declined", "failed") else "is"
        return f"round {self.round}: {self.site} {verb} {self.state}: {self.reason}"


class SessionEnded(Stamped):
    """A session of a deployed run has ended; the supervisor may start the next one."""

    event: Annotated[Literal["SessionEnded", "LinkEnded"], _renamed("SessionEnded")] = "SessionEnded"
    round: int
    """Rounds finished."""
    reason: Literal["finished", "back", "paused", "stopped", "failed"]
    """`finished`: all rounds are trained; `back`: an absent site can join; `paused`: too few sites are left,
    or the engine failed; `stopped`: an administrator has stopped the run; `failed`: a server error."""
    detail: str = ""
    """The reason in words."""
    session: str = ""
    """Id of the session, which is that of its FLARE job."""
