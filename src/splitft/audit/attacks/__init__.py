"""Reading a client's text off what a server sees: attacks as strong as we can make them."""

from splitft.audit.attacks.channel import Channel, calibrated
from splitft.audit.attacks.labels import GradientChannel
from splitft.audit.attacks.matching import Effort
from splitft.audit.attacks.observation import Seen
from splitft.audit.attacks.replica import Replica
from splitft.audit.attacks.suite import ATTACKS, HIDDEN_ATTACKS, LABEL_ATTACKS, Attacker

__all__ = [
    "ATTACKS",
    "HIDDEN_ATTACKS",
    "LABEL_ATTACKS",
    "Attacker",
    "Channel",
    "Effort",
    "GradientChannel",
    "Replica",
    "Seen",
    "calibrated",
]
