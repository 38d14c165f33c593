"""Reading a client's text off what a server sees: attacks as strong as we can make them."""

from splitft.privacy.attacks.channel import Channel, calibrated
from splitft.privacy.attacks.labels import GradientChannel
from splitft.privacy.attacks.matching import Effort
from splitft.privacy.attacks.replica import Replica
from splitft.privacy.attacks.seen import Seen
from splitft.privacy.attacks.suite import ATTACKS, HIDDEN_ATTACKS, LABEL_ATTACKS, Attacker

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
