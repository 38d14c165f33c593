"""The comparison's figures against sums done by hand over the short story."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import pytest

from splitft.compare.comparison import Trained, common_target, compare_runs, server_reads
from splitft.compare.comparison_page import (
    comparison_page,
    comparison_table,
    metric_table,
    paired_sentence,
    target_sentence,
)
from splitft.errors import RunError
from splitft.report.cost_charts import accuracy_by_round, loss_against_costs, loss_with_bands
from splitft.tracking.comparability import differences
from splitft.tracking.history import Point, first_below, loss_history, mean_loss_on_the_way
from splitft.tracking.summary import summarise
from tracking.story import story


def trained(method: str, seed: int, losses: list[float], **changes) -> Trained:
    """A run of the story's events with other losses; ten seconds and 5 MB a round."""
    points = [Point(n, loss, 10.0 * n, 5.0 * n) for n, loss in enumerate(losses)]
    summary = {**summarise(story()), "seed": seed, **changes}
    return Trained(method, seed, f"runs/{method}-{seed}", summary, points, server_reads(summary))


def test_a_history_adds_up_what_was_sent_and_how_long_it_took():
    # steps: 21 bytes a labelled token, 80 tokens in round 1 and 40 in round 2; adapters 3300 and 7000 bytes
    assert loss_history(story()) == [
        Point(0, 4.0, 0, 0.0),
        Point(1, 3.5, 12.0, (80 * 21 + 3300) / 1e6, 8),
        Point(2, 3.0, 20.0, (120 * 21 + 10300) / 1e6, 12),
    ]
    untimed = [event for event in story() if event.event != "RoundTimed"]
    assert {point.simulated_s for point in loss_history(untimed)} == {None}


def test_a_target_is_reached_at_the_first_evaluation_at_or_below_it():
    points = loss_history(story())
    assert first_below(points, 3.5) == points[1]
    assert first_below(points, 3.4999) == points[2]
    assert first_below(points, 2.9) is None


def test_the_common_target_is_the_best_of_the_worst():
    runs = [trained("a", 0, [4, 3, 2]), trained("a", 1, [4, 2.5, 2.7]), trained("b", 0, [4, 3.5, 3.6])]
    assert common_target(runs)[0] == 3.5
    assert "the best of b, seed 0" in common_target(runs)[1]
    data = compare_runs(runs)
    first, second = data["methods"]
    assert first["simulated_s_to_target"] == [10.0, 10.0]
    assert second["mb_to_target"] == [5.0]
    stuck = [trained("a", 0, [4, 3]), trained("b", 0, [4, 4.5])]
    assert common_target(stuck)[0] == 4.5
    assert "did not improve" in common_target(stuck)[1]


def test_token_accuracy_stands_beside_the_loss_where_all_report_it():
    both = [trained("a", seed, [4, 3, 2]) for seed in (0, 1)]
    right = [0.1, 0.2, 0.3]
    both[0] = replace(both[0], history=_with_accuracy(both[0].history, right))
    both[1] = replace(both[1], history=_with_accuracy(both[1].history, [share + 0.1 for share in right]))
    data = compare_runs([*both, trained("b", 0, [4, 3, 2])])
    assert [one["accuracy"] for one in data["methods"]] == [pytest.approx([0.3, 0.4]), [None]]
    a, b = comparison_table(data).rows
    assert (a[3], b[3]) == ("35.0", "–")
    [chart] = accuracy_by_round({"a": [run.history for run in both], "b": [trained("b", 0, [4, 3]).history]})
    [line] = chart.data
    assert (line.name, list(line.y)) == ("a", pytest.approx([0.15, 0.25, 0.35]))
    assert "Token accuracy by round" in comparison_page(data, "")


def _with_accuracy(history, shares):
    return [replace(point, accuracy=share) for point, share in zip(history, shares, strict=True)]


def test_the_rows_are_means_over_seeds():
    runs = [trained("a", 0, [4, 3, 2]), trained("a", 1, [4, 3, 2.2]), trained("b", 0, [4, 3.5, 3.0])]
    data = compare_runs(runs, target=2.1)
    a, b = comparison_table(data).rows
    perplexity = (math.exp(2) + math.exp(2.2)) / 2
    # Ann computes 4 s in two rounds; the server is idle for 8 of 18 s without moving
    assert a == (
        "a", f"2.100±{math.sqrt(0.02):.3f}", f"{perplexity:.4g}", "–", "20.0 (1 of 2)", "10.0 (1 of 2)", "–",
        "2.00", "5.00", "hidden states",
    )  # fmt: skip
    assert b[4:6] == ("– (0 of 1)", "– (0 of 1)")
    assert target_sentence(data) == "Target: held-out loss 2.1000, as given."
    page = comparison_page(data, "seed: <0>")
    assert "seed: &lt;0&gt;" in page
    assert "2 methods side by side" in page


def test_the_bands_reach_from_the_lowest_seed_to_the_highest():
    seeds = [trained("a", n, losses).history for n, losses in enumerate(([4, 3, 2], [5, 2.5, 2.2]))]
    by_round, by_time, by_mb = loss_with_bands({"a": seeds, "b": seeds[:1]}, target=2.1)
    band, *lines = by_time.data
    assert list(band["x"]) == [0, 10, 20, 20, 10, 0]
    assert list(band["y"]) == [4, 2.5, 2, 2.2, 3, 5]
    assert {line["name"]: list(line["y"]) for line in lines} == {
        "a": [4.5, 2.75, 2.1], "b": [4, 3, 2], "target": [2.1, 2.1],
    }  # fmt: skip
    assert list(by_round.data[1]["x"]) == [0, 1, 2]
    assert list(by_mb.data[1]["x"]) == [0, 5, 10]
    untimed = {"a": [Point(0, 4, None, 0), Point(1, 3, None, 1)]}
    assert [chart.title for chart in loss_against_costs(untimed)] == ["Loss by traffic"]


def test_what_the_server_reads_is_told_by_the_bytes_that_reached_it():
    def reads(**up):
        roles = ("hidden", "gradient", "adapter", "label")
        return server_reads({"bytes": {role: {"up": up.get(role, 0), "down": 1} for role in roles}})

    assert reads(hidden=1, label=1, adapter=1) == "the text"
    assert reads(hidden=1, gradient=1) == "hidden states"
    assert reads(adapter=1) == "adapters"
    assert reads() == "nothing"
    data = {"bytes": {"adapter": {"up": 1, "down": 1}}}  # frames without tensors are counted too
    said = {received: server_reads(data, received) for received in ("text", "nothing", "hidden", None)}
    assert list(said.values()) == ["all the text", "nothing", "adapters", "adapters"]


def prints(held_out: str, trained_on: str = "0b") -> dict:
    clients = summarise(story())["clients"]
    owned = [{**clients[0], "held_out": held_out, "trained_on": trained_on}]
    return {"clients": [*owned, {**clients[1], "held_out": "01", "trained_on": "02"}]}


def test_runs_on_different_text_are_refused_with_what_differs():
    one, other = trained("a", 0, [4, 3], **prints("0a")), trained("b", 0, [4, 3], **prints("0c"))
    with pytest.raises(RunError, match=r"runs/a-0 and runs/b-0 were evaluated on different text \(3 and 3"):
        compare_runs([one, other])
    assert compare_runs([one, trained("b", 1, [4, 3], **prints("0c"))]), "another seed draws other text"
    assert compare_runs([one, trained("b", 0, [4, 3])]), "an older run does not tell"
    trained_otherwise = trained("b", 0, [4, 3], **prints("0a", "0d"))
    with pytest.raises(RunError, match="trained on different text"):
        compare_runs([one, trained_otherwise])
    data = differences([("x", one.summary), ("y", {**other.summary, "model": "another"})])
    assert data == ["the runs trained different models: tiny (x), another (y)"]


def test_a_run_without_a_finite_loss_is_named():
    with pytest.raises(RunError, match="runs/a-0: no finite held-out loss after training"):
        compare_runs([trained("a", 0, [4])])


def test_what_the_models_can_do_has_a_table_of_its_own():
    runs = [
        replace(trained("a", 0, [4, 3]), metrics={"bleu": 10.0, "rouge_l": 0.5}),
        replace(trained("a", 1, [4, 3]), metrics={"bleu": 12.0, "rouge_l": 0.5}),
        trained("b", 0, [4, 3]),
    ]
    table = metric_table(compare_runs(runs))
    assert table.headings == ("method", "BLEU", "ROUGE-L")
    assert table.rows == [("a", f"11.00±{math.sqrt(2):.2f}", "0.5000±0.0000"), ("b", "–", "–")]
    assert "<h2>Tasks</h2>" in comparison_page(compare_runs(runs), "")
    assert metric_table(compare_runs(runs[2:])) is None
    assert "<h2>Tasks</h2>" not in comparison_page(compare_runs(runs[2:]), "")


def test_no_run_has_a_target_after_its_first_round_unless_all_are_so_good():
    runs = [trained("a", 0, [4, 3.1, 2]), trained("b", 0, [4, 3.4, 2.5])]
    data = compare_runs(runs)
    assert data["targets"] == pytest.approx([2.5 + 0.6 * 2 / 3, 2.5 + 0.6 / 3, 2.5])
    a, b = (method["to_targets"] for method in data["methods"])
    assert [goal["simulated_s"] for goal in a] == [[20.0]] * 3
    assert [goal["reached"] for goal in b] == [1, 1, 1]
    assert compare_runs([trained("a", 0, [4, 3, 3.2]), trained("b", 0, [4, 3, 3.1])])["targets"] == [3]


def test_the_mean_loss_on_the_way_is_the_area_under_the_line():
    points = trained("a", 0, [4, 3, 2]).history  # 10 s and 5 MB a round
    by_time = partial(mean_loss_on_the_way, points, lambda point: point.simulated_s)
    assert by_time(20.0) == pytest.approx(3.0)
    assert by_time(10.0) == pytest.approx(3.5)
    assert by_time(5.0) == pytest.approx(3.75)
    assert by_time(40.0) == pytest.approx(2.5), "after the last evaluation it stays"
    assert math.isnan(
        mean_loss_on_the_way([replace(one, simulated_s=None) for one in points], lambda p: None, 1)
    )


def test_several_seeds_are_compared_in_pairs():
    losses = {"a": (2.0, 2.2, 2.1), "b": (2.3, 2.4, 2.5)}
    runs = [
        trained(name, seed, [4, 3, loss]) for name, all_ in losses.items() for seed, loss in enumerate(all_)
    ]
    (pair,) = compare_runs(runs)["paired"]
    assert pair["difference"] == pytest.approx(0.3)
    # t = mean / (sd / sqrt(3)) of 0.3, 0.2, 0.4 = 0.3 / (0.1 / 1.732) = 5.196; two degrees of freedom
    assert pair["p"] == pytest.approx(0.0351, abs=1e-4)
    assert "b +0.3000 (p 0.035)" in paired_sentence(compare_runs(runs))
    assert compare_runs(runs[:2] + runs[3:5])["paired"][0]["p"] is None, "two seeds are too few"
