"""`wire: auto`: what is chosen is within the budget and the cheapest that is, said with reasons, and kept."""

from __future__ import annotations

import math

import pytest

import splitft
from laws.federations import write_text
from runs import StoppedError, adapter_bytes, settings, stop_at
from splitft.codecs import codec_of
from splitft.config import from_mapping
from splitft.errors import ConfigError
from splitft.protocol import HeldOutLoss
from splitft.run import codec_choice as probing
from splitft.run.setup import prepare
from splitft.specs import WireSpec
from splitft.tracking.events import StepDone, WireChosen
from splitft.tracking.log import read_events


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "notes.jsonl", examples=60)


@pytest.fixture
def config(tiny_llama, text):
    def make(**sections):
        return from_mapping(settings(tiny_llama, text, **{"wire": "auto", **sections}))

    return make


def test_each_client_gets_the_cheapest_codec_that_fits_and_a_reason(config):
    prepared = prepare(config())
    assert set(prepared.wires) == {client.name for client in prepared.clients}
    for choice in prepared.chosen:
        assert choice.hidden in probing.HIDDEN
        assert choice.gradient in probing.GRADIENT
        assert f"{choice.hidden} " in choice.reason
        assert prepared.serializer_of(choice.client).wire.hidden == choice.hidden


def test_candidates_are_ordered_by_their_bytes():
    for candidates in (probing.HIDDEN, probing.GRADIENT):
        sizes = [codec_of(name).bytes_for((512, 576)) for name in candidates]
        assert sizes == sorted(sizes)


def test_a_wider_budget_never_takes_more_bytes(config):
    def nbytes(budget):
        wires = prepare(config(wire={"hidden": "auto", "gradient": "auto", "budget": budget})).wires
        return [
            codec_of(wire.hidden).bytes_for((64, 32)) + codec_of(wire.gradient).bytes_for((64, 32))
            for wire in wires.values()
        ]

    tight, wide = nbytes(1e-9), nbytes(1.0)
    assert all(one >= other for one, other in zip(tight, wide, strict=True))
    assert sum(tight) > sum(wide)


def test_the_effect_is_that_of_the_runs_own_evaluation(config):
    prepared = prepare(config())
    client, count = prepared.clients[0], len(prepared.clients[0].held_out)
    prepared.server.place({one.name: one.plan.client.stop for one in prepared.clients})
    prepared.server.install(prepared.server.initial())
    line = probing._InProcess(client, prepared.server, prepared.serializer)
    replies = probing._replies(client, line, "int4", count)
    simulation = prepare(config(wire={"hidden": "int4", "gradient": "fp32"})).simulation()
    simulation.server.place({name: one.plan.client.stop for name, one in simulation.clients.items()})
    simulation.server.install(simulation.server.initial())
    found = simulation.evaluate()[client.name]
    client.held_out.result()  # counting begins afresh
    for index, reply in enumerate(replies):
        client.held_out.forward(index)
        client.held_out.head(reply)
    probed = client.held_out.result()
    assert (probed.loss, probed.tokens) == (pytest.approx(found.loss, rel=1e-5), found.tokens)


def test_the_rise_is_the_divergence_of_predictions_less_what_rounding_does_by_itself(config):
    prepared = prepare(config())
    client, server = prepared.clients[0], prepared.server
    server.place({one.name: one.plan.client.stop for one in prepared.clients})
    server.install(server.initial())

    def replies(codec, perturbed=False):
        line = probing._InProcess(client, server, prepared.serializer)
        return probing._replies(client, line, codec, 1, perturbed)[0]

    exact, perturbed = replies("fp32"), replies("fp32", perturbed=True)
    rises = [
        probing._rise(client, exact, replies(codec), perturbed) for codec in ("fp32", "int8", "int4", "int2")
    ]
    assert rises == sorted(rises)
    assert abs(rises[0]) < 1e-6 < rises[2]
    chance = [client.segment.logits(one.hidden).double().softmax(1) for one in (exact, replies("int2"))]
    by_hand = (chance[0] * (chance[0] / chance[1]).log()).sum(1).mean()
    assert math.log1p(rises[3]) == pytest.approx(float(by_hand), rel=1e-3, abs=1e-6)


def test_where_labels_are_on_the_server_losses_are_compared(config):
    prepared = prepare(config(split={"labels": "server"}))
    exact, found = (HeldOutLoss(step=0, loss=loss, tokens=10) for loss in (20.0, 21.0))
    rise = probing._rise(prepared.clients[0], exact, found, exact)
    assert rise == pytest.approx(math.exp(0.1) - 1)  # of perplexity, by a tenth of a nat a token
    for choice in prepared.chosen:
        assert choice.hidden in probing.HIDDEN
        assert choice.gradient == "int8"


def test_a_run_says_what_it_chose_first_and_resumes_with_the_same(tmp_path, config):
    whole = splitft.train(config(), tmp_path / "whole")
    chosen = [e for e in read_events(whole.folder / "events.jsonl") if isinstance(e, WireChosen)]
    assert [choice.client for choice in chosen] == [client["name"] for client in whole.summary["clients"]]
    with pytest.raises(StoppedError):
        splitft.train(config(), tmp_path / "stopped", listeners=[stop_at(StepDone, round=2, count=2)])
    again = splitft.train(config(), tmp_path / "stopped", resume=True)
    assert adapter_bytes(again.folder) == adapter_bytes(whole.folder)
    assert again.summary["bytes"] == whole.summary["bytes"]


def test_the_choice_does_not_change_what_is_trained_on(tmp_path, config):
    auto = prepare(config(wire={"hidden": "auto", "gradient": "auto", "budget": 1e-9}))
    fixed = prepare(config(wire={"hidden": "bf16", "gradient": "bf16"}))
    if all((wire.hidden, wire.gradient) == ("bf16", "bf16") for wire in auto.wires.values()):
        one, other = ([event.loss for event in _losses_of(prepared)] for prepared in (auto, fixed))
        assert one == other
    else:
        pytest.fail(f"a budget of nothing took {auto.wires}")


def _losses_of(prepared):
    from laws.federations import play

    _, events = play(prepared)
    return [event for event in events if isinstance(event, StepDone)]


def test_auto_is_for_both_and_wrong_names_are_told(config):
    assert WireSpec.model_validate("auto") == WireSpec(hidden="auto", gradient="auto")
    assert WireSpec(hidden={"codec": "bounded", "rel": 0.01}).hidden == "bounded:rel=0.01"
    for wire, due in [
        ({"hidden": "intt4"}, "did you mean int4"),
        ({"hidden": "bounded:rel=-1"}, "give a number above 0"),
        ({"hidden": "bounded:rel=1,abs=1"}, "give abs or rel, not both"),
        ({"hidden": "int4:bits=3"}, "int4 has no option 'bits'"),
        ({"hidden": "principal:bits=99"}, "give 1 to 8"),
        ({"gradient": "topk:share=2.5"}, "whole number"),
        ({"hidden": "temporal:skip=2"}, "below 1"),
        ({"hidden": 7}, "give fp64 | fp32"),
        ({"adapter": "int4"}, "fp32"),
    ]:
        with pytest.raises(ConfigError, match=due.replace("|", r"\|")):
            config(wire=wire)
