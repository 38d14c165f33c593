"""LoRA adapters of many clients on one frozen model, and their aggregation."""

from splitft.adapters.aggregate import AGGREGATORS, Aggregated, Fresh, aggregate, fit, fit_all
from splitft.adapters.lora import AdapterBank, attach
from splitft.adapters.optimizer import LocalOptimizer, Moments, moments_within
from splitft.adapters.state import AdapterState, Factors, initial_state

__all__ = [
    "AGGREGATORS",
    "AdapterBank",
    "AdapterState",
    "Aggregated",
    "Factors",
    "Fresh",
    "LocalOptimizer",
    "Moments",
    "aggregate",
    "attach",
    "fit",
    "fit_all",
    "initial_state",
    "moments_within",
]
