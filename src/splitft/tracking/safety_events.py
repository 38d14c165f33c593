"""The events of what was kept out of the adapters: updates far too large, rounds that failed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from splitft.tracking.records import Stamped


class UpdatesBounded(Stamped):
    """Updates of some participants were far larger than the others' and have been scaled down."""

    event: Literal["UpdatesBounded"] = "UpdatesBounded"
    round: int
    """Round, from 1."""
    scale: Mapping[str, float]
    """Rest of each such client's update, as a share below 1."""
    limit: float
    """Largest update that was let through, in the units of `typical`."""
    typical: float
    """Median of this round's and the last rounds' updates: root mean square of the changed numbers."""

    @property
    def message(self) -> str:
        """The event in one sentence."""
        listed = ", ".join(f"{name} (to {share:.2g} of it)" for name, share in sorted(self.scale.items()))
        return (
            f"round {self.round}: the update was scaled down of {listed}: it was more than "
            f"{self.limit / self.typical:.3g} times the median (aggregate.norm_bound)"
        )


class RoundUndone(Stamped):
    """Most clients failed in a round; the run has gone back to the adapters before it."""

    event: Literal["RoundUndone"] = "RoundUndone"
    round: int
    """Round, from 1."""
    reason: str
    """The failure, in words."""
    in_a_row: int
    """Rounds undone since the last one that counted, this one included."""

    @property
    def message(self) -> str:
        """The event in one sentence."""
        return f"round {self.round} is undone, its adapters are not used: {self.reason}"
