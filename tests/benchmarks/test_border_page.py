"""The page `Which method when` is what the stored figures give, and the arithmetic still gives them."""

from __future__ import annotations

import json

import pytest

from border import FIGURES, LAUNCHES, PAGE, SIZES, TOKENS, configuration, page
from splitft.run.plan import fleet_for
from splitft.schedule.border import FLEETS, Terrain, border


@pytest.fixture(scope="module")
def figures():
    return json.loads(FIGURES.read_text(encoding="utf-8"))


def test_the_page_is_what_the_script_writes_from_the_figures(figures):
    text = PAGE.read_text(encoding="utf-8")
    assert page(text, figures) == text
    assert set(figures["maps"]) == set(SIZES)


def test_a_change_of_a_figure_changes_the_page(figures):
    place = figures["maps"]["135M"]["places"][0]
    place["methods"]["fedlora"]["seconds"] *= 7
    text = PAGE.read_text(encoding="utf-8")
    assert page(text, figures) != text


@pytest.mark.parametrize(
    ("size", "fleet", "link", "steps"),
    [
        ("135M", "one of each", "lan", 3),
        ("135M", "4 x laptop", "lte", 300),
        ("8B", "4 x workstation", "fibre", 30),
    ],
)
def test_the_arithmetic_still_gives_the_figures(size, fleet, link, steps):
    """If the cost model or a preset has changed, run `python benchmarks/border.py` again."""
    stored = json.loads(FIGURES.read_text(encoding="utf-8"))["maps"][size]["places"]
    (was,) = [one for one in stored if (one["fleet"], one["link"], one["steps"]) == (fleet, link, steps)]
    ours = fleet_for(configuration(size))
    terrain = Terrain({fleet: FLEETS[fleet]}, (link,), (steps,), TOKENS, LAUNCHES)
    (place,) = border(ours.costs, ours.clients[0].workload, terrain)
    for name, method in place.methods.items():
        assert was["methods"][name]["seconds"] == (method.seconds and pytest.approx(method.seconds, rel=1e-4))
        assert tuple(was["methods"][name]["cuts"]) == method.cuts
