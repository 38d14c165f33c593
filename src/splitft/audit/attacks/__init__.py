"""Reading a client's text off what a server sees: attacks as strong as we can make them."""

from splitft.audit.attacks.channel import ObservationModel, calibrated
from splitft.audit.attacks.labels import GradientObservationModel
from splitft.audit.attacks.matching import Effort
from splitft.audit.attacks.observation import Observation
from splitft.audit.attacks.replica import PublicModel
from splitft.audit.attacks.suite import ATTACKS, HIDDEN_ATTACKS, LABEL_ATTACKS, Attacker

__all__ = [
    "ATTACKS",
    "HIDDEN_ATTACKS",
    "LABEL_ATTACKS",
    "Attacker",
    "Effort",
    "GradientObservationModel",
    "Observation",
    "ObservationModel",
    "PublicModel",
    "calibrated",
]
