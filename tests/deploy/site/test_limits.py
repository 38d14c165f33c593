"""What a site has done for runs is counted over sessions and jobs, and bounds what a server may ask."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import pytest

from runs import settings
from splitft.config import from_mapping
from splitft.deploy.site.limits import OrderLimits, WorkLedger
from splitft.deploy.site.policy import at_site, refusals
from splitft.errors import ForbiddenError
from splitft.protocol import Evaluate, Join, RoundStart, Train, Wait
from splitft.specs import SiteSpec, TrainingSpec
from splitft.specs.site import SiteLimitsSpec


@pytest.fixture
def ledger(tmp_path):
    def open_ledger() -> WorkLedger:
        return WorkLedger(tmp_path / "runs", tmp_path / "runs" / "first" / "north")

    return open_ledger


@pytest.mark.parametrize("kept", [True, False])
def test_seconds_add_up_over_sessions(ledger, kept):
    one = ledger() if kept else WorkLedger()
    for _ in range(7):
        one.work(1.5)
    assert one.seconds_today == pytest.approx(10.5)
    one.write()
    assert (ledger() if kept else one).seconds_today == pytest.approx(10.5)


def test_jobs_at_the_same_time_lose_nothing(ledger):
    def work(_):
        own = ledger()
        for _ in range(50):
            own.work(6.0)
        own.write()

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(work, range(8)))
    assert ledger().seconds_today == pytest.approx(8 * 50 * 6.0)


def test_a_new_day_begins_at_nothing(ledger, monkeypatch):
    monkeypatch.setattr(WorkLedger, "_today", staticmethod(lambda: "2026-11-27"))
    ledger().work(5000)
    assert ledger().seconds_today == 5000
    monkeypatch.setattr(WorkLedger, "_today", staticmethod(lambda: "2026-11-28"))
    later = ledger()
    assert later.seconds_today == 0
    later.work(6)
    assert [path.name for path in later._runs.glob("work-*")] == ["work-2026-11-28.txt"]


def test_a_damaged_line_does_not_stop_the_site(ledger, tmp_path):
    ledger().work(6)
    [path] = (tmp_path / "runs").glob("work-*.txt")
    path.write_text(path.read_text() + "nan\ninf\n-5\nsix\n", encoding="utf-8")
    assert ledger().seconds_today == 6


def test_the_hours_of_a_day_are_an_end(ledger):
    limits = OrderLimits(SiteLimitsSpec(hours_a_day=1), ledger=ledger())
    limits.work(3000)
    limits.check(Train(round=1, steps=1))
    with pytest.raises(ForbiddenError, match=r"limits\.hours_a_day"):
        limits.work(700)
    with pytest.raises(ForbiddenError, match=r"limits\.hours_a_day"):
        OrderLimits(SiteLimitsSpec(hours_a_day=1), ledger=ledger()).check_day()


def test_evaluations_are_counted_over_sessions(ledger):
    spec, training = SiteLimitsSpec(evaluations=4), TrainingSpec(rounds=100)
    for number in range(4):
        OrderLimits(spec, training, ledger()).check(Evaluate(round=number))
    with pytest.raises(ForbiddenError, match=r"evaluated 4 times .*limits\.evaluations"):
        OrderLimits(spec, training, ledger()).check(Evaluate(round=4))


@pytest.mark.parametrize(
    "order",
    [
        Train(round=1, steps=11),
        Train(round=4, steps=1),
        RoundStart(round=4, cut=1),
        Evaluate(round=4),
        Join(round=4, cut=1, steps=0),
        Join(round=2, cut=1, steps=21),
    ],
)
def test_the_run_itself_is_a_limit(order):
    with pytest.raises(ForbiddenError, match=r"training\.(steps|rounds) of the run"):
        OrderLimits(SiteLimitsSpec(), TrainingSpec(rounds=3, steps=10)).check(order)


def test_what_a_run_may_ask_is_asked_freely():
    limits = OrderLimits(SiteLimitsSpec(attempts=1), TrainingSpec(rounds=3, steps=10))
    limits.check(Join(round=0, cut=1, steps=0))
    limits.check(Evaluate(round=0))
    for number in (1, 2, 3):
        limits.check(RoundStart(round=number, cut=1))
        limits.check(Train(round=number, steps=10))
        limits.check(Evaluate(round=number))
        for _ in range(1000):
            limits.check(Wait())


def test_a_round_again_and_again_is_an_end():
    limits = OrderLimits(SiteLimitsSpec(attempts=2), TrainingSpec(rounds=3))
    for _ in range(2):
        limits.check(Train(round=1, steps=1))
    with pytest.raises(ForbiddenError, match=r"of round 1 3 times .*limits\.attempts"):
        limits.check(Train(round=1, steps=1))


def test_a_run_that_goes_beyond_the_owners_limits_is_declined_before_anything_is_read():
    run = from_mapping({"training": {"rounds": 50, "steps": 200}})
    spec = SiteSpec.model_validate({"limits": {"rounds": 10, "steps": 100}})
    found = refusals(spec, run, None)
    assert [one.split(" ")[0] for one in found] == ["training.rounds", "training.steps"]
    assert refusals(SiteSpec(), run, None) == ()


@pytest.mark.parametrize(("asked", "most", "used"), [(None, 7, 7), (5, 7, 5), (9, 7, 7)])
def test_no_more_held_out_examples_are_evaluated_than_the_owner_gives(asked, most, used):
    run = from_mapping({"data": {"eval_examples": asked}})
    spec = SiteSpec.model_validate({"limits": {"held_out": most}, "text": {"source": "python-docs"}})
    assert at_site(run, spec).data.eval_examples == used


def test_a_site_reads_no_larger_message_than_its_owner_allows(tiny_llama, tmp_path):
    from laws.federations import write_text
    from splitft.deploy.site.setup import open_site

    config = from_mapping(
        settings(tiny_llama, write_text(tmp_path / "notes.jsonl"), aggregate={"rule": "zero-pad"})
    )
    spec = {"text": {"source": config.data.source}}
    usual = open_site(config, "client-2", SiteSpec.model_validate(spec)).terms.frame_limit
    small = open_site(config, "client-2", SiteSpec.model_validate({**spec, "limits": {"frame_mb": 0.5}}))
    assert small.terms.frame_limit == 500_000 < usual


def test_an_update_is_measured_against_its_weight(tiny_llama, tmp_path):
    """The oracle forms B A and the weight; the code forms neither."""
    from laws.federations import federation, write_text

    prepared = federation(tiny_llama, write_text(tmp_path / "notes.jsonl"), [2], clients={"count": 1})
    [client] = prepared.clients
    blocks = client.blocks
    assert blocks.largest_update()[0] == 0  # B is zero at first
    factors = {
        key: type(one)(one.A, one.B + (number + 1) / 50)
        for number, (key, one) in enumerate(blocks._known.items())
    }
    blocks.bank.put("own", type(blocks._known)(factors))
    ratios = {
        key: float(
            (prepared.ranks.scale * one.product()).norm() / blocks.bank._layers[key].base.weight.norm()
        )
        for key, one in factors.items()
    }
    worst = max(ratios, key=ratios.get)
    ratio, layer = blocks.largest_update()
    assert (layer, ratio) == (worst, pytest.approx(ratios[worst], rel=1e-5))
    assert math.isfinite(ratio)
