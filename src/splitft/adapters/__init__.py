"""LoRA adapters of many clients on one frozen model, and their aggregation."""

from splitft.adapters.aggregate import Aggregated, aggregate, fit, fit_all
from splitft.adapters.aggregators import Fresh, United
from splitft.adapters.bank import AdapterBank, attach
from splitft.adapters.factoring import add_folded, with_folded
from splitft.adapters.optimizer import LocalOptimizer, Moments, moments_within, step_together
from splitft.adapters.state import AdapterState, Factors, initial_state, with_mean_of_own

__all__ = [
    "AdapterBank",
    "AdapterState",
    "Aggregated",
    "Factors",
    "Fresh",
    "LocalOptimizer",
    "Moments",
    "United",
    "add_folded",
    "aggregate",
    "attach",
    "fit",
    "fit_all",
    "initial_state",
    "moments_within",
    "step_together",
    "with_folded",
    "with_mean_of_own",
]
