"""A bound on what the server may read, as a bound on cuts: plain arithmetic on an audit's table.

    cut        1     2     4     8    15              share of tokens that the strongest attack recovers
    recovery  .99   .95   .80   .42   .25    max_recovery .5 -> cuts from 8 on

A cut that was not audited counts as the nearest audited one before it, since deeper reveals less; cuts before
the first audited one are not allowed. An audit is a measurement, so a deeper cut may come out worse by
chance: a cut is allowed if it and every deeper audited one keep the bound.
"""

from __future__ import annotations

from collections.abc import Mapping

from splitft.errors import ScheduleError


def shallowest_cut(recovery: Mapping[int, float], max_recovery: float, deepest: int) -> int:
    """The shallowest cut from which on the bound is kept.

    Raises ScheduleError, saying which cut gives what, if none of 1 to `deepest` keeps it.
    """
    found = None
    for cut in sorted((cut for cut in recovery if 1 <= cut <= deepest), reverse=True):
        if recovery[cut] > max_recovery:
            break
        found = cut
    if found is None:
        told = ", ".join(f"cut {cut} gives {recovery[cut]:.2f}" for cut in sorted(recovery))
        raise ScheduleError(
            f"schedule.max_recovery: no cut up to {deepest} keeps the tokens that can be recovered under "
            f"{max_recovery:g}: {told}; give a higher bound, or audit with more noise (privacy.hidden)"
        )
    return found


def check_kept(cuts: Mapping[str, int], floor: int, recovery: Mapping[int, float], bound: float) -> None:
    """Raise ScheduleError, naming clients and what would do, if a fixed cut is shallower than `floor`."""
    shallow = [f"{name} cut {cut} ({_at(recovery, cut)})" for name, cut in cuts.items() if cut < floor]
    if shallow:
        raise ScheduleError(
            f"schedule.max_recovery: {bound:g} of the tokens may be recovered, but {', '.join(shallow)}; "
            f"give clients.cuts of at least {floor} ({_at(recovery, floor)}), or a higher bound"
        )


def _at(recovery: Mapping[int, float], cut: int) -> str:
    """What the audit says of a cut."""
    known = [audited for audited in recovery if audited <= cut]
    return f"{recovery[max(known)]:.2f} by the audit" if known else "not audited"
