"""A method: SplitFT with the cheapest codecs that lose almost nothing, and the exact mean of updates.

method: frugal
"""

from splitft.methods import METHODS, Fixed, Method

METHODS.add(
    "frugal",
    Method(
        source="this file",
        difference="SplitFT in int8 on the wire, with FedEx-LoRA's exact mean.",
        fixes={"aggregate.rule": Fixed("exact", "hands out the exact mean")},
        defaults={"wire.hidden": "int8", "wire.gradient": "int8"},
        follows_fleet=True,
    ),
)
