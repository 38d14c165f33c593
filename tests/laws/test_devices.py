"""A run is the same on every device: losses, adapters, checkpoints; and little crosses between devices.

The devices are the fake ones of `accelerator`. `pytest --fake-device` runs any other test on them.
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch

import splitft
from deploy.network import serve_with, site_thread
from laws.federations import federation, largest_relative_difference, play, write_text
from runs import StoppedError, adapter_bytes, settings, stop_at
from splitft.config import from_mapping
from splitft.deploy.run_terms import load_run_terms
from splitft.deploy.server.session import ServerSession
from splitft.specs import SiteSpec
from splitft.specs.rules import RULES
from splitft.tracking.events import Evaluated, RunStarted, StepDone
from splitft.tracking.log import read_events
from splitft.training.checkpoint import load_latest
from splitft.training.sent_batch import SentBatch, split_batch

CPU = {"server": "cpu", "clients": "cpu"}
PLACES = {
    "all on one": {"server": "acc", "clients": "acc:0"},
    "the server alone": {"server": "acc", "clients": "cpu"},
    "the clients alone": {"server": "cpu", "clients": ["acc:1", "cpu"]},
    "the server on two": {"server": ["acc:0", "acc:1"], "clients": "acc:1"},
}
TWO = PLACES["the server on two"]
SHORT = {"rounds": 2, "steps": 2, "batch_size": 2}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "notes.jsonl")


@pytest.fixture
def trained(tiny_llama, text):
    """The losses of all steps, and the adapters that a configuration ends with; exact by default."""

    def run(devices, cuts=(1, 3), moves=lambda number, cuts: cuts, **sections):
        plain = {"training": SHORT}
        merged = {name: {**plain.get(name, {}), **sections.get(name, {})} for name in {**plain, **sections}}
        prepared = federation(tiny_llama, text, list(cuts), devices=devices, **merged)
        state, events = play(prepared, moves)
        losses = [event.loss for event in events if isinstance(event, StepDone) and event.loss is not None]
        evaluated = [event.loss for event in events if isinstance(event, Evaluated)]
        return torch.tensor([*losses, *evaluated], dtype=torch.float64), state.adapters.tensors()

    return run


def _the_same(one, other):
    """Rounding aside, which in float64 leaves nine digits even of what Adam makes of small gradients."""
    torch.testing.assert_close(one[0], other[0], rtol=1e-9, atol=1e-9)
    assert all(tensor.device.type == "cpu" for tensor in one[1].values())
    assert largest_relative_difference(one[1], other[1]) < 1e-7


@pytest.mark.parametrize("devices", PLACES.values(), ids=PLACES)
def test_losses_are_those_of_the_cpu_wherever_the_parties_are(devices, trained, fake_devices):
    exact = dict.fromkeys(("hidden", "gradient", "adapter"), "fp32")
    sections = {"model": {"dtype": "float32"}, "wire": exact}
    (one, _), (other, _) = trained(devices, **sections), trained(CPU, **sections)
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert fake_devices.copies["to"] > 0


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_runs_on_devices(rule, trained, fake_devices):
    sections = {"aggregate": {"rule": rule}, "lora": {"rank_at_cut": None if rule == "factors" else 2}}
    _the_same(trained(TWO, **sections), trained(CPU, **sections))


OPTIONS = {
    "dora": {"lora": {"method": "dora"}},
    "rslora and lora+": {"lora": {"scaling": "rslora", "lr_ratio": 4.0}},
    "labels on the server": {"split": {"labels": "server"}},
    "shared factors": {"split": {"server_adapters": "shared"}},
    "shared in turn": {"split": {"server_adapters": "shared-in-turn"}},
    "shared by arrival": {"split": {"server_adapters": "shared-by-arrival"}},
    "micro-batches and kept moments": {"training": {**SHORT, "micro_batches": 2, "optimizer_state": "keep"}},
    "one after the other": {
        "training": {**SHORT, "order": "in-turn"},
        "split": {"server_adapters": "shared"},
        "clients": {"count": 3, "cuts": 2},
    },
    "blocks computed again": {"training": {**SHORT, "checkpoint_blocks": True}},
    "every linear layer": {"lora": {"targets": "all-linear"}},
    "noise": {"privacy": {"hidden": {"defence": "gaussian", "noise": 0.1}}},
    "noise on labels": {"privacy": {"labels": {"defence": "randomised", "epsilon": 2.0}}},
}


@pytest.mark.parametrize("sections", OPTIONS.values(), ids=OPTIONS)
def test_every_way_to_train_runs_on_devices(sections, trained, fake_devices):
    again = "checkpoint_blocks" in sections.get("training", {})  # see `accelerator`
    devices = PLACES["all on one"] if again else TWO
    _the_same(trained(devices, **sections), trained(CPU, **sections))


ADAPTERS = ("bf16", "int8")
"""Codecs that round adapters little enough."""


@pytest.mark.parametrize("codec", ["bf16", "int8", "int4", "fp8", "topk"])
def test_codecs_take_their_tensors_from_devices(codec, trained, fake_devices):
    """Rounding may tip a number to the next code, so losses are near each other, no more."""
    sections = {
        "model": {"dtype": "float32"},
        "wire": {"hidden": codec, "gradient": codec, "adapter": codec if codec in ADAPTERS else "fp32"},
    }
    (one, adapters), (other, _) = trained(TWO, **sections), trained(CPU, **sections)
    assert all(tensor.device.type == "cpu" for tensor in adapters.values())
    torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-2)


def test_cuts_that_move_take_their_blocks_to_other_devices(trained, fake_devices):
    def moves(number, cuts):
        return dict(zip(cuts, [[1, 3], [3, 2]][number - 1], strict=True))

    keep = {"training": {**SHORT, "optimizer_state": "keep"}}
    _the_same(trained(TWO, moves=moves, **keep), trained(CPU, moves=moves, **keep))


@pytest.mark.parametrize(
    ("server", "clients", "expected"),
    [
        # tokens, last hidden states, gradient; hidden states, gradient, the loss
        ("cpu", "acc", {"to": 3, "from": 3}),
        ("acc", "cpu", {"to": 2, "from": 2}),
        (["acc:0", "acc:1"], "cpu", {"to": 2, "from": 2, "across": 2}),
    ],
    ids=["client", "server", "server on two"],
)
def test_the_copies_of_a_step_are_those_of_its_messages(
    server, clients, expected, tiny_llama, text, fake_devices
):
    prepared = federation(
        tiny_llama, text, [2], model={"dtype": "float32"}, training={"rounds": 1, "steps": 3},
        devices={"server": server, "clients": clients},
    )  # fmt: skip
    counts = []

    def listener(event):
        if isinstance(event, StepDone):
            counts.append((Counter(fake_devices.copies), fake_devices.waits))

    prepared.trainer(prepared.simulation(), listener).train(prepared.initial())
    (_, _), (before, waits), (after, waits_after) = counts
    assert after - before == expected
    assert waits_after - waits <= 4, "a mask of each pass, and the loss"


def test_the_clock_is_read_when_the_devices_have_done_the_work_of_a_leg(
    tiny_llama, text, fake_devices, monkeypatch
):
    prepared = federation(
        tiny_llama,
        text,
        [2],
        training={"rounds": 1, "steps": 2},
        devices={"server": "acc:0", "clients": "acc:1"},
    )
    simulation, log = prepared.simulation(), fake_devices.log

    def clock():
        log.append(("clock", "read"))
        return 0.0

    monkeypatch.setattr("splitft.training.simulation.time.perf_counter", clock)
    prepared.trainer(simulation, lambda event: None).train(prepared.initial())
    readings = [place for place, line in enumerate(log) if line == ("clock", "read")]
    ends = readings[1::2]
    assert len(ends) == 2 * 5, "forward, server, head, server, backward"
    for end in ends:
        assert set(log[end - 2 : end]) == {("acc:0", "synchronize"), ("acc:1", "synchronize")}


def test_several_devices_get_the_work_of_all_groups_before_the_first_reply_is_awaited(
    tiny_llama, text, fake_devices
):
    prepared = federation(
        tiny_llama, text, [1, 1, 1], model={"dtype": "float32"}, split={"group_tokens": 1},
        devices={"server": ["acc:0", "acc:1"], "clients": "cpu"},
    )  # fmt: skip
    server, clients = prepared.server, {client.name: client for client in prepared.clients}
    server.place(dict.fromkeys(clients, 1))
    server.start(1, list(clients), server.initial())
    messages = [_first_batch(client) for client in prepared.clients]
    groups = server.groups(messages)
    assert len(groups) == 3
    fake_devices.log.clear()
    launched = [server.launch(group) for group in groups]
    log = [line for line in fake_devices.log if line[1] in ("to", "from", "across")]
    assert log == [("acc:0", "to"), ("acc:1", "across")] * 3
    hidden = {name: reply.hidden for group in launched for name, reply in server.replies(group).items()}
    alone = {}
    for name in clients:
        server.forget(name)
    for message in messages:
        alone.update({name: reply.hidden for name, reply in server.forward([message]).items()})
    assert all(torch.equal(hidden[name], alone[name]) for name in clients)


def _first_batch(client):
    """The first batch of a client, as training sends it."""
    [(micro_batch, batch)] = split_batch(client.setup.stream.batch(0), 1, 1, 0)
    sent = SentBatch(micro_batch, batch, client.blocks.hidden(batch, "training"))
    return sent.activations(client.blocks, training=True, numbered=False)


def test_a_run_on_a_device_resumes_to_the_last_bit(tiny_llama, text, tmp_path, fake_devices):
    keep = {"optimizer_state": "keep"}
    sections = {
        "aggregate": {"rule": "factors"},
        "lora": {"rank_at_cut": None},
        "training": {**SHORT, **keep},
    }
    config = from_mapping(settings(tiny_llama, text, devices=TWO, **sections))
    whole = splitft.train(config, tmp_path / "whole")
    with pytest.raises(StoppedError):
        splitft.train(config, tmp_path / "stopped", listeners=[stop_at(StepDone, 2, 2)])
    resumed = splitft.train(config, tmp_path / "stopped", resume=True)
    assert adapter_bytes(resumed.folder) == adapter_bytes(whole.folder)
    started = next(e for e in read_events(whole.folder / "events.jsonl") if isinstance(e, RunStarted))
    assert started.devices == "server on acc:0 and acc:1, clients on acc:1"
    snapshot = load_latest(tmp_path / "whole")
    tensors = [
        *snapshot.state.adapters.tensors().values(),
        *(value for moments in snapshot.server_moments.values() for value in moments.values()),
        *(value for moments in snapshot.client_moments.values() for value in moments.values()),
    ]
    assert len(tensors) > 40
    assert {tensor.device.type for tensor in tensors} == {"cpu"}


def test_a_deployed_step_is_that_of_the_cpu(tiny_llama, text, tmp_path, fake_devices):
    """The server divides its blocks among two devices; each site computes where its own file says."""
    losses = {}
    for name, devices, sites in (
        ("cpu", "cpu", ["cpu", "cpu"]),
        ("acc", ["acc:0", "acc:1"], ["acc:1", "cpu"]),
    ):
        losses[name] = _deployed(tiny_llama, text, tmp_path / name, devices, sites)
    torch.testing.assert_close(losses["acc"], losses["cpu"], rtol=1e-5, atol=1e-5)
    assert fake_devices.copies["across"] > 0


def _deployed(model, text, folder, devices, sites):
    """Losses of all steps of a session with the sites on threads, by site and step."""
    config = from_mapping({
        "model": {"name": str(model), "dtype": "float32"},
        "data": {"source": str(text), "max_tokens": 32},
        "clients": {"count": 2, "cuts": [1, 2]},
        "lora": {"rank": 4, "rank_at_cut": None},
        "training": {"rounds": 1, "steps": 3, "batch_size": 2},
        "wire": dict.fromkeys(("hidden", "gradient", "adapter"), "fp32"),
        "devices": {"server": devices, "clients": "xpu"},
        "deploy": {"window_ms": 2, "min_clients": 2},
    })  # fmt: skip
    terms, key = load_run_terms(config), bytes(16)
    server = ServerSession(terms, folder, ("client-1", "client-2"), key)
    threads = []
    for name, device in zip(("client-1", "client-2"), sites, strict=True):
        own = write_text(folder.with_name(f"{folder.name}-{name}.jsonl"), seed=len(threads))
        site = SiteSpec.model_validate({"text": {"source": str(own)}, "machine": {"runs_on": device}})
        threads.append(site_thread(config, name, server, key, site))
    serve_with(server, threads)
    steps = [event for event in read_events(folder / "events.jsonl") if isinstance(event, StepDone)]
    assert len(steps) == 6
    ordered = sorted(steps, key=lambda event: (event.client, event.step))
    return torch.tensor([event.loss for event in ordered], dtype=torch.float64)
