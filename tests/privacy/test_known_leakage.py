"""Stored audits answer for what was measured and nothing else, and no controller goes below their bound."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.resources import files

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from schedule.cases import problems
from splitft.errors import ScheduleError
from splitft.privacy import known_leakage
from splitft.privacy.known_leakage import (
    Setting,
    check_fixed_cuts,
    known_recoveries,
    known_recovery,
    known_sentence,
    leakage_sentence,
    shallowest_cut,
    share_in_words,
)
from splitft.schedule.controllers import CONTROLLERS, choose
from splitft.schedule.problem import feasible

TABLE = {1: 0.99, 2: 0.95, 4: 0.80, 8: 0.42, 15: 0.25}
tables = st.dictionaries(st.integers(1, 4), st.integers(0, 10).map(lambda tenth: tenth / 10), min_size=1)


def entries(cut: int, noise: float, hidden: float, labels: float) -> list[dict[str, object]]:
    """Both ways of one setting, as known.json has them."""
    setting = {"cut": cut, "codec": "bf16", "noise": noise}
    return [{**setting, "way": way, "recovered": s} for way, s in (("hidden", hidden), ("labels", labels))]


@pytest.fixture(autouse=True)
def stored(monkeypatch):
    audited = [*entries(2, 0.0, 1.0, 1.0), *entries(4, 0.0, 0.8, 1.0), *entries(2, 1.0, 0.5, 0.6)]
    monkeypatch.setattr(known_leakage, "_table", lambda: {"models": {"small": audited}})


def test_what_was_measured_is_found_by_way_and_as_the_worse_of_both():
    assert known_recovery("small", 4, way="hidden") == 0.8
    assert known_recovery("small", 4) == 1.0  # the labels are read off the gradients
    assert known_recovery("small", 2, noise=1.0, gradient_noise=1.0) == 0.6


def test_between_two_noises_the_lower_one_s_figure_stands():
    assert known_recovery("small", 2, noise=0.3, way="hidden") == 1.0
    assert known_recovery("small", 2, noise=2.0, way="hidden") is None  # beyond what was measured


def test_what_was_not_audited_is_unknown():
    assert known_recovery("large", 2) is None
    assert known_recovery("small", 3, way="hidden") is None
    assert known_recovery("small", 2, codec="int4", way="hidden") is None
    assert known_recovery("small", 3, noise=1.0, gradient_noise=1.0) is None  # one way known, the other not


def test_a_way_that_reads_everything_settles_the_other():
    assert known_recovery("small", 3) == 1.0


def test_bounds_get_the_figures_of_every_audited_cut():
    assert known_recoveries("small") == {2: 1.0, 4: 1.0}
    assert known_recoveries("small", way="hidden") == {2: 1.0, 4: 0.8}
    assert known_recoveries("large") == {}


def test_a_run_says_what_is_known_of_its_setting():
    assert known_sentence("small", Setting(4, "bf16", 0.0, 0.0)) == (
        "At cut 4 (bf16) without noise, the server can read 8 of 10 tokens from the hidden states and all "
        "labelled tokens from the gradients that return."
    )
    assert "not audited" in known_sentence("large", Setting(4, "bf16", 0.0, 0.0))
    assert "every label" in known_sentence("large", Setting(4, "bf16", 0.0, 0.0), labels_travel=True)


def test_a_setting_of_which_only_the_labels_are_known_is_not_told_as_a_whole():
    assert known_sentence("small", Setting(3, "bf16", 0.0, 0.0)) == (
        "At cut 3 (bf16) without noise, the server can read all labelled tokens from the gradients that "
        "return. What it reads off the hidden states of this setting was not audited."
    )


def test_the_package_s_own_table_says_where_its_figures_come_from():
    stored = json.loads(files("splitft.privacy").joinpath("known.json").read_text(encoding="utf-8"))
    assert {"command", "commit", "date", "text", "public"} <= stored["story"].keys()
    entries = [entry for model in stored["models"].values() for entry in model]
    assert all(0 <= entry["recovered"] <= 1 and entry["tokens"] > 0 for entry in entries)


@pytest.mark.parametrize(
    ("share", "words"),
    [(1.0, "all"), (0.97, "more than 9 of 10"), (0.9, "9 of 10"), (0.31, "3 of 10"), (0.06, "1 of 10"),
     (0.01, "fewer than 1 of 20")],
)  # fmt: skip
def test_shares_are_told_in_tenths(share, words):
    assert share_in_words(share) == words


@pytest.mark.parametrize(
    ("noise", "gradient_noise", "ending"),
    [(0.2, 0.2, "that return."), (0.2, 0.0, "that return (noise 0)."), (0.0, 1.0, "that return (noise 1).")],
)
def test_noise_on_gradients_is_told_where_it_is_another(noise, gradient_noise, ending):
    assert leakage_sentence(Setting(2, "bf16", noise, gradient_noise), 1.0, 1.0).endswith(ending)


def test_what_was_not_attacked_is_not_audited():
    assert (
        leakage_sentence(Setting(2, "bf16", 0.0, 0.0), None, None)
        == "At cut 2 (bf16) without noise: not audited."
    )


@pytest.mark.parametrize(("bound", "cut"), [(1.0, 1), (0.95, 2), (0.5, 8), (0.42, 8), (0.3, 15)])
def test_the_bound_is_kept_from_the_first_audited_cut_that_keeps_it(bound, cut):
    assert shallowest_cut(TABLE, bound, deepest=29) == cut


def test_a_deeper_cut_that_came_out_worse_rules_out_the_ones_before_it():
    assert shallowest_cut({1: 0.5, 2: 0.2, 3: 0.4, 4: 0.1}, 0.3, deepest=4) == 4


def test_a_bound_that_no_cut_keeps_is_refused_with_what_each_cut_gives():
    with pytest.raises(ScheduleError, match=r"no cut up to 8.*cut 4 gives 0\.80, cut 8 gives 0\.42"):
        shallowest_cut(TABLE, 0.3, deepest=8)


@given(tables, st.integers(0, 10).map(lambda tenth: tenth / 10))
def test_every_audited_cut_from_the_bound_on_keeps_it_and_the_one_before_does_not(table, bound):
    try:
        floor = shallowest_cut(table, bound, deepest=4)
    except ScheduleError:
        assert table[max(table)] > bound
        return
    assert all(table[cut] <= bound for cut in table if cut >= floor)
    before = [cut for cut in table if cut < floor]
    assert not before or table[max(before)] > bound


@pytest.mark.parametrize("controller", sorted(set(CONTROLLERS) - {"fixed"}))
@given(problem=problems(), table=tables, bound=st.integers(0, 10).map(lambda tenth: tenth / 10))
def test_no_controller_chooses_a_cut_at_which_more_may_be_recovered(controller, problem, table, bound):
    try:
        floor = shallowest_cut(table, bound, deepest=4)
    except ScheduleError:
        assume(False)
    bounded = replace(
        problem,
        clients=tuple(replace(one, min_cut=max(one.min_cut, floor)) for one in problem.clients),
    )
    assume(all(found.cuts for found in feasible(bounded).values()))
    for cut in choose(controller, bounded).cuts.values():
        assert table[max(audited for audited in table if audited <= cut)] <= bound


def test_a_fixed_cut_below_the_bound_is_refused_with_the_cut_that_would_do():
    check_fixed_cuts({"a": 8, "b": 20}, 8, TABLE, 0.5)
    with pytest.raises(ScheduleError, match=r"b cut 5 \(0\.80 by the audit\); .* of at least 8"):
        check_fixed_cuts({"a": 8, "b": 5}, 8, TABLE, 0.5)
