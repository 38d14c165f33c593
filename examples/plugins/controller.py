"""A controller of cuts: every client keeps as few blocks as its owner and its memory allow.

clients: {cuts: auto}              schedule: {controller: shallowest}
"""

from splitft.schedule.controllers import Decision
from splitft.schedule.problem import feasible
from splitft.specs.schedule import CONTROLLERS, Controller


def shallowest(problem):
    """Return the shallowest feasible cut of every client."""
    cuts = {name: min(found.cuts) for name, found in feasible(problem).items()}
    return Decision(cuts, "the shallowest cuts that are allowed")


CONTROLLERS.add("shallowest", Controller(shallowest))
