"""The frozen weights of a model: read single tensors of a checkpoint or of the hub, and hold each once."""

from splitft.model.weights.checkpoint_files import Checkpoint, in_folder
from splitft.model.weights.hub import on_hub
from splitft.model.weights.store import WEIGHTS, PlainWeight, WantedWeight, WeightForm, WeightStore

__all__ = [
    "WEIGHTS",
    "Checkpoint",
    "PlainWeight",
    "WantedWeight",
    "WeightForm",
    "WeightStore",
    "in_folder",
    "on_hub",
]
