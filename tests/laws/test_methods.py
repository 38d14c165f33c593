"""Every method trains what a plain loop over one whole model trains, and resumes bit for bit."""

from __future__ import annotations

from html import unescape
from itertools import chain

import pytest
import torch

import splitft
from laws import methods_oracle as oracle
from laws.federations import write_text
from runs import StoppedError, adapter_bytes, stop_at
from splitft.config import from_mapping
from splitft.run.setup import prepare
from splitft.tracking.events import RoundDone, RoundTimed, StepDone

ROUNDS, STEPS, LR, CUT = 2, 4, 5e-3, 2
EXACT = {"hidden": "fp64", "gradient": "fp64", "adapter": "fp64"}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "notes.jsonl")


@pytest.fixture
def configured(tiny_llama, text):
    def make(method, **sections):
        base = {
            "method": method,
            "model": {"name": str(tiny_llama), "dtype": "float64"},
            "data": {"source": str(text), "max_tokens": 32},
            "clients": {"count": 3, "shares": {"by": "length", "alpha": 1.0}},
            "lora": {"rank": 4, "alpha": 8},
            "training": {"rounds": ROUNDS, "steps": STEPS, "batch_size": 3, "lr": LR},
            "wire": EXACT,
        }
        for name, values in sections.items():
            base[name] = {**base[name], **values} if isinstance(values, dict) and name in base else values
        return from_mapping(base)

    return make


class Played:
    """A run of a method, with what its oracle needs."""

    def __init__(self, config, folder):
        self.prepared = prepare(config)
        initial = self.prepared.initial()
        self.start = {key: (factors.A, factors.B) for key, factors in initial.adapters.items()}
        training = self.prepared.config.training
        self.batches = [
            [
                [_with_labels(client.setup.stream.batch(step)) for step in steps]
                for client in self.prepared.clients
            ]
            for steps in _by_round(training.rounds, training.steps)
        ]
        self.events = []
        trainer = self.prepared.trainer(self.prepared.simulation(), self.events.append)
        self.state = trainer.train(initial)
        self.whole = oracle.Whole(folder, self.prepared.ranks.scale)

    def learnt(self, client=None):
        """The global adapters, or those that a client keeps for itself."""
        adapters = self.state.adapters if client is None else self.prepared.clients[client].private()
        return {key: (factors.A, factors.B) for key, factors in adapters.items()}

    def steps_of(self, client):
        return list(chain.from_iterable(clients[client] for clients in self.batches))


@pytest.fixture
def played(configured, tiny_llama):
    return lambda method, **sections: Played(configured(method, **sections), tiny_llama)


def test_centralized_is_ordinary_fine_tuning_on_everyones_text(played):
    run = played("centralized")
    assert len(run.steps_of(0)) == 3 * STEPS * ROUNDS  # as many as all clients take together
    _assert_equal(run.learnt(0), oracle.alone(run.whole, run.start, run.steps_of(0), LR))


def test_local_is_ordinary_fine_tuning_at_each_client(played):
    run = played("local")
    for client in range(3):
        _assert_equal(run.learnt(client), oracle.alone(run.whole, run.start, run.steps_of(client), LR))
    _assert_equal(run.learnt(), run.start)  # nobody shared anything


@pytest.mark.parametrize("method", ["fedlora", "splitfed-v1"])
def test_fedlora_and_splitfed_v1_average_what_whole_models_learn(played, method):
    sections = {"clients": {"cuts": CUT}} if method == "splitfed-v1" else {}
    run = played(method, **sections)
    _assert_equal(run.learnt(), oracle.averaged(run.whole, run.start, run.batches, LR))


@pytest.mark.parametrize("method", ["centralized", "local", "fedlora"])
def test_whole_models_need_no_server_and_send_adapters_at_most(played, method):
    run = played(method)
    steps = [event for event in run.events if isinstance(event, StepDone)]
    assert all(not event.traffic.up and not event.traffic.down for event in steps)
    sent = {role for event in run.events if isinstance(event, RoundDone)
            for traffic in event.traffic.values() for role in (*traffic.up, *traffic.down)}  # fmt: skip
    assert sent <= {"adapter"}
    for timed in (event for event in run.events if isinstance(event, RoundTimed)):
        assert timed.idle["server"] == timed.seconds  # it computes nothing
        legs = {leg for by_leg in timed.legs.values() for leg in by_leg}
        travelling = {"adapters_up", "adapters_down"} if method == "fedlora" else set()
        assert legs == {"client_forward", "head", "client_backward"} | travelling


def test_clients_in_turn_wait_for_one_another_on_the_simulated_clock(played):
    run = played("split", clients={"cuts": CUT})
    at_once = played("splitfed-v1", clients={"cuts": CUT})
    for timed, other in zip(*(
        [event for event in one.events if isinstance(event, RoundTimed)] for one in (run, at_once)
    ), strict=True):  # fmt: skip
        alone = [sum(by_leg.values()) for by_leg in timed.legs.values()]
        assert timed.seconds == pytest.approx(sum(alone), rel=1e-9)
        assert other.seconds < 0.6 * timed.seconds


@pytest.mark.parametrize("method", ["flexlora", "hlora"])
def test_flexlora_averages_products_of_unequal_ranks(played, method):
    run = played(method)
    ranks = [dict.fromkeys(range(4), rank) for rank in (4, 2, 1)]
    _assert_equal_products(
        run.learnt(), oracle.averaged_products(run.whole, run.start, run.batches, LR, ranks)
    )


@pytest.mark.parametrize(
    ("method", "cuts"), [("splitft-fixed", 2), ("splitft", [1, 2, 3]), ("splitft", [1, 4, 2])]
)
def test_splitft_averages_products_of_ranks_lowered_at_each_cut(played, method, cuts):
    run = played(method, clients={"cuts": cuts}, lora={"rank_at_cut": 2})
    lowered = [  # a whole model has no cut
        {cut - 1, cut} if cut < 4 else set() for cut in (cuts if isinstance(cuts, list) else [cuts] * 3)
    ]
    ranks = [{block: 2 if block in near else 4 for block in range(4)} for near in lowered]
    _assert_equal_products(
        run.learnt(), oracle.averaged_products(run.whole, run.start, run.batches, LR, ranks)
    )


@pytest.mark.parametrize("state", ["keep", "reset"])
def test_split_trains_one_model_through_all_clients_in_turn(played, state):
    run = played("split", clients={"cuts": CUT}, training={"optimizer_state": state})
    rounds = [list(chain.from_iterable(clients)) for clients in run.batches]
    if state == "keep":
        wanted = oracle.alone(run.whole, run.start, list(chain.from_iterable(rounds)), LR)
    else:
        wanted = run.start
        for steps in rounds:
            wanted = oracle.alone(run.whole, wanted, steps, LR)
    _assert_equal(run.learnt(), wanted)


def test_splitfed_v2_steps_the_servers_copy_client_by_client_in_random_order(played):
    run = played("splitfed-v2", clients={"cuts": CUT})
    names = [client.name for client in run.prepared.clients]
    orders = {}
    for event in run.events:
        if isinstance(event, StepDone):
            orders.setdefault((event.round - 1, event.step % STEPS), []).append(names.index(event.client))
    assert len({tuple(order) for order in orders.values()}) > 1
    wanted = oracle.client_by_client(run.whole, run.start, run.batches, LR, CUT, orders)
    _assert_equal(run.learnt(), wanted)


def test_splitlora_steps_the_servers_copy_on_all_activations_together(played):
    run = played("splitlora", clients={"cuts": CUT}, training={"optimizer_state": "keep"})
    _assert_equal(run.learnt(), oracle.all_at_once(run.whole, run.start, run.batches, LR, CUT))


def test_splitlora_code_is_the_loop_of_the_public_code(played, tiny_llama):
    run = played("splitlora-code", clients={"cuts": CUT}, training={"optimizer_state": "keep"})
    steps = [event.client for event in run.events if isinstance(event, StepDone)]
    names = [client.name for client in run.prepared.clients]
    assert steps == names * ROUNDS * STEPS
    scale = run.prepared.ranks.scale
    wanted = oracle.public_splitlora(tiny_llama, scale, run.start, run.batches, LR, CUT)
    _assert_equal(run.learnt(), wanted)


RESUMED = ["centralized", "local", "fedlora", "flexlora", "split", "splitfed-v2", "splitlora"]
"""Those that train in a way of their own; the rest are what `test_resume.py` tries."""


@pytest.mark.parametrize("method", RESUMED)
def test_every_method_resumes_bit_for_bit_and_is_named(tmp_path, configured, method):
    config = configured(method, training={"steps": 2}, data={"eval_examples": 2})
    whole = splitft.train(config, tmp_path / "whole")
    with pytest.raises(StoppedError):
        splitft.train(config, tmp_path / "stopped", listeners=[stop_at(StepDone, round=2, count=2)])
    again = splitft.train(config, tmp_path / "stopped", resume=True)
    assert again.summary["method"] == method
    assert _learnt_bytes(again) == _learnt_bytes(whole)
    for key in ("eval_loss", "bytes", "simulated_seconds", "clients"):
        assert again.summary[key] == whole.summary[key]
    page = (whole.folder / "report.html").read_text(encoding="utf-8")
    assert method in page
    assert whole.summary["privacy"] in unescape(page)


def _learnt_bytes(run):
    own = sorted((run.folder / "personal").glob("*/adapter_model.safetensors"))
    return [path.read_bytes() for path in own] or [adapter_bytes(run.folder)]


def _by_round(rounds, steps):
    return [range(number * steps, (number + 1) * steps) for number in range(rounds)]


def _with_labels(batch):
    labels = torch.full_like(batch.tokens, -100)
    for row, (first, length) in enumerate(zip(batch.labelled_from, batch.lengths, strict=True)):
        labels[row, first:length] = batch.tokens[row, first:length]
    return batch.tokens, labels


def _assert_equal(ours, wanted, relative=1e-5):
    assert ours.keys() == wanted.keys()
    for key in wanted:
        for one, other in zip(ours[key], wanted[key], strict=True):
            assert float((one - other).norm()) <= relative * float(other.norm())


def _assert_equal_products(ours, wanted):
    products = [{key: (B @ A,) for key, (A, B) in factors.items()} for factors in (ours, wanted)]
    # both losses are float32 inside, and new factors of small singular values magnify that
    _assert_equal(*products, relative=5e-5)
