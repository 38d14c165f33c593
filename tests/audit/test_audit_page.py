"""What an audit found reads well on a terminal and on a page."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from splitft.audit.audit_page import rise, short_table


@pytest.mark.parametrize(
    ("cost", "words"),
    [(0.0, "+0.0%"), (-0.001, "-0.1%"), (0.355, "+35.5%"), (1.0, "x 2.0"), (5.9, "x 6.9"), (4231, "x 4,232")],
)
def test_a_rise_of_perplexity_is_told_in_per_cent_or_times(cost, words):
    assert rise(cost) == words


def test_a_table_fits_80_columns_and_names_a_setting_once():
    row = {
        "cut": 15, "codec": "int8", "noise": 0.05, "gradient_noise": 0.05, "way": "hidden", "tokens": 1.0,
        "standard_error": 0.0, "rare": 1.0, "function": None, "sentences": 1.0, "rouge_l": 1.0,
        "perplexity_cost": 9150.0,
    }  # fmt: skip
    rows = [{**row, "attack": "matching"}, {**row, "attack": "head gradient", "way": "labels"}]
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(short_table({"rows": rows}).to_rich())
    lines = console.export_text().splitlines()
    assert lines[-2].split() == [
        "15",
        "int8",
        "0.05",
        "x",
        "9,151",
        "matching",
        "all",
        "tokens",
        "100.0%",
        "±",
        "0.0%",
        "100%",
        "100%",
    ]
    assert lines[-1].split() == ["head", "gradient", "labels", "100.0%", "±", "0.0%", "100%", "100%"]
    assert not any("…" in line for line in lines)
