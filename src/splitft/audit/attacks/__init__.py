"""Attacks that read a client's text off what a server observes, as strong as we can make them."""

from splitft.audit.attacks.labels import GradientObservationModel
from splitft.audit.attacks.matching import Effort
from splitft.audit.attacks.observation import Observation
from splitft.audit.attacks.observation_model import ObservationModel, calibrated
from splitft.audit.attacks.public_model import PublicModel
from splitft.audit.attacks.suite import ATTACKS, Attack, Attacker

__all__ = [
    "ATTACKS",
    "Attack",
    "Attacker",
    "Effort",
    "GradientObservationModel",
    "Observation",
    "ObservationModel",
    "PublicModel",
    "calibrated",
]
