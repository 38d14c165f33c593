"""Processes that divide a server's clients train the adapters of one process."""

from __future__ import annotations

import time

import psutil
import pytest
import torch

import splitft
from deploy.network import serve_with, site_thread
from laws.federations import federation, largest_relative_difference, play, write_text
from replica_threads import ReplicaThread
from runs import StoppedError, adapter_bytes, settings, settings_file, started, stop_at
from splitft.config import from_mapping
from splitft.deploy.run_terms import load_run_terms
from splitft.deploy.server.session import ServerSession
from splitft.deploy.server.status import RunStatus
from splitft.errors import ReplicaError, RunError
from splitft.specs import SiteSpec
from splitft.specs.rules import RULES
from splitft.tracking.events import Evaluated, RunStarted, SessionEnded, SiteChanged, StepDone
from splitft.tracking.log import read_events
from splitft.training.checkpoint import load_latest

SHORT = {"rounds": 2, "steps": 2, "batch_size": 2}
KEEP = {"training": {**SHORT, "optimizer_state": "keep"}}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "notes.jsonl")


@pytest.fixture
def threads(monkeypatch):
    """Run replicas on threads; the setups of those that were started."""
    monkeypatch.setattr("splitft.training.replicas.pool.start_replica", ReplicaThread)
    monkeypatch.setattr(ReplicaThread, "started", [])
    return ReplicaThread.started


@pytest.fixture
def trained(tiny_llama, text):
    """The losses, the adapters and the kept moments that a configuration ends with."""

    def run(replicas, cuts=(1, 2, 3, 2), moves=lambda number, cuts: cuts, **sections):
        plain = {"training": SHORT, "devices": {"server_replicas": replicas}}
        merged = {name: {**plain.get(name, {}), **sections.get(name, {})} for name in {**plain, **sections}}
        prepared = federation(tiny_llama, text, list(cuts), **merged)
        try:
            state, events = play(prepared, moves)
            moments = {f"{name}/{key}": one for name, kept in prepared.server.moments.items()
                       for key, one in kept.items()}  # fmt: skip
        finally:
            prepared.server.close()
        steps = [event for event in events if isinstance(event, StepDone)]
        steps.sort(key=lambda event: (event.client, event.step))  # groups are others, and so is their order
        losses = [event.loss for event in (*steps, *(one for one in events if isinstance(one, Evaluated)))]
        return torch.tensor(losses, dtype=torch.float64), state.adapters.tensors(), moments

    return run


def _the_same(one, other):
    """In float64, but for the last digits, in which batches of other clients differ."""
    torch.testing.assert_close(one[0], other[0], rtol=1e-12, atol=0)
    assert largest_relative_difference(one[1], other[1]) < 1e-11
    assert one[2].keys() == other[2].keys()
    for name, moment in one[2].items():
        torch.testing.assert_close(moment, other[2][name], rtol=1e-9, atol=1e-12)


OPTIONS = {
    "plain": {},
    "kept moments": KEEP,
    "micro-batches": {"training": {**SHORT, "batch_size": 4, "micro_batches": 2, "in_flight": 2}},
    "labels on the server": {"split": {"labels": "server"}},
    "dora": {"lora": {"method": "dora"}},
    "dropout": {"lora": {"dropout": 0.3}},
    "half of the clients": {"training": {**SHORT, "rounds": 3, "participation": 0.5}},
    "ranks of each client": {"lora": {"client_ranks": [2, 4, 3, 4]}, "aggregate": {"rule": "svd"}},
    "small groups": {"split": {"group_tokens": 1}},
}


@pytest.mark.parametrize("sections", OPTIONS.values(), ids=OPTIONS)
def test_two_replicas_train_the_adapters_of_one_server(sections, trained, threads):
    _the_same(trained(2, **sections), trained(1, **sections))
    assert len(threads) == 2


@pytest.mark.parametrize("rule", [name for name, rule in RULES.items() if rule.keeps_own_b or rule.folds])
def test_replicas_keep_what_rules_leave_on_the_server(rule, trained, threads):
    _the_same(trained(2, aggregate={"rule": rule}), trained(1, aggregate={"rule": rule}))


def test_moments_follow_the_cuts_and_the_clients_to_other_replicas(trained, threads):
    def moves(number, cuts):
        return dict(zip(cuts, [[3, 1, 1, 2], [1, 3, 2, 1]][number - 1], strict=True))

    _the_same(trained(2, moves=moves, **KEEP), trained(1, moves=moves, **KEEP))
    (one, two) = (trained(count, moves=moves, **KEEP) for count in (3, 1))
    _the_same(one, two)


ON_CPU = {"server": "cpu", "clients": "cpu"}
"""A fake device is known to the process of the tests alone."""
DEPLOYED = {
    "model": {"dtype": "float64"},
    "clients": {"count": 3, "cuts": [1, 2, 2]},
    "lora": {"rank_at_cut": None},
    "training": {**SHORT, "optimizer_state": "keep"},
    "aggregate": {"rule": "factors"},
    "wire": {"hidden": "fp64", "gradient": "fp64", "adapter": "fp64"},
    "deploy": {"window_ms": 2, "min_clients": 3},
}


def _session(model, text, folder, replicas):
    """A session whose server divides its clients, and its sites on threads."""
    config = from_mapping(settings(model, text, devices={"server_replicas": replicas}, **DEPLOYED))
    key, names = bytes(16), ("client-1", "client-2", "client-3")
    server, threads = ServerSession(load_run_terms(config), folder, names, key), []
    for name in names:
        own = write_text(folder.with_name(f"{name}.jsonl"), seed=len(threads))
        site = SiteSpec.model_validate({"text": {"source": str(own)}})
        threads.append(
            site_thread(config, name, server, key, site, folder.with_name(f"{folder.name} {name}"))
        )
    return server, threads


def _learnt(folder):
    """Losses and adapters of a run folder, and the moments that its server keeps."""
    events = list(read_events(folder / "events.jsonl"))
    steps = {(event.client, event.step): event.loss for event in events if isinstance(event, StepDone)}
    losses = [steps[key] for key in sorted(steps)] + [e.loss for e in events if isinstance(e, Evaluated)]
    snapshot = load_latest(folder)
    moments = {f"{slot}/{key}": one for slot, kept in snapshot.server_moments.items()
               for key, one in kept.items()}  # fmt: skip
    return torch.tensor(losses, dtype=torch.float64), snapshot.state.adapters.tensors(), moments


def test_a_deployed_server_of_two_replicas_trains_the_adapters_of_one(tiny_llama, text, tmp_path, threads):
    for replicas in (1, 2):
        serve_with(*_session(tiny_llama, text, tmp_path / str(replicas), replicas))
    one, two = _learnt(tmp_path / "1"), _learnt(tmp_path / "2")
    assert len(threads) == 2
    assert one[2], "moments are kept"
    _the_same(two, one)


def test_a_deployed_run_goes_on_after_a_replica_that_has_died(
    tiny_llama, text, tmp_path, threads, monkeypatch
):
    """The session fails and says why; no site is blamed; the next session ends as if nothing had been."""
    whole = tmp_path / "whole"
    serve_with(*_session(tiny_llama, text, whole, 1))
    server, sites = _session(tiny_llama, text, tmp_path / "run", 2)
    listens, steps = RunStatus.__call__, []

    def dies(status, event):
        listens(status, event)
        if isinstance(event, StepDone) and event.round == 2 and not steps:
            steps.append(event)
            ReplicaThread.running[-1].close()

    monkeypatch.setattr(RunStatus, "__call__", dies)
    with pytest.raises(ReplicaError, match="of 2 of the server has ended"):
        serve_with(server, sites)
    events = list(read_events(tmp_path / "run" / "events.jsonl"))
    ended = [event for event in events if isinstance(event, SessionEnded)]
    assert [event.reason for event in ended] == ["failed"]
    assert "devices.server_replicas" in ended[0].detail
    assert not [event for event in events if isinstance(event, SiteChanged)], "no site is at fault"
    serve_with(*_session(tiny_llama, text, tmp_path / "run", 2))
    _the_same(_learnt(tmp_path / "run"), _learnt(whole))


def test_a_run_with_replicas_resumes_to_the_last_bit(tiny_llama, text, tmp_path, threads):
    config = from_mapping(settings(
        tiny_llama, text, devices={**ON_CPU, "server_replicas": 2}, aggregate={"rule": "factors"},
        lora={"rank_at_cut": None}, **KEEP,
    ))  # fmt: skip
    whole = splitft.train(config, tmp_path / "whole")
    with pytest.raises(StoppedError):
        splitft.train(config, tmp_path / "stopped", listeners=[stop_at(StepDone, 2, 2)])
    resumed = splitft.train(config, tmp_path / "stopped", resume=True)
    assert adapter_bytes(resumed.folder) == adapter_bytes(whole.folder)
    begun = next(e for e in read_events(whole.folder / "events.jsonl") if isinstance(e, RunStarted))
    assert begun.devices == "server in 2 processes on cpu, clients on cpu"


def test_replicas_take_their_share_of_several_devices(trained, threads, fake_devices):
    devices = {"server": ["acc:0", "acc:1"], "clients": "cpu"}
    on_devices = trained(2, devices={**devices, "server_replicas": 2})
    assert [[str(one) for one in setup.devices] for setup in threads] == [["acc:0"], ["acc:1"]]
    one = trained(1)
    torch.testing.assert_close(on_devices[0], one[0], rtol=1e-9, atol=1e-9)
    assert largest_relative_difference(on_devices[1], one[1]) < 1e-7


# --- real processes -----------------------------------------------------------------------------------


def _children():
    return psutil.Process().children(recursive=True)


@pytest.mark.slow
def test_processes_train_as_one_and_a_killed_one_ends_the_run_with_words(tiny_llama, text, tmp_path):
    """The run ends readably, leaves no process, and goes on with fewer of them to the adapters of one."""
    sections = {"model": {"dtype": "float64"}, "wire": DEPLOYED["wire"], **KEEP,
                "aggregate": {"rule": "factors"}, "lora": {"rank_at_cut": None}}  # fmt: skip
    config = {
        n: from_mapping(settings(tiny_llama, text, devices={**ON_CPU, "server_replicas": n}, **sections))
        for n in (1, 2)
    }
    before = set(_children())
    splitft.train(config[1], tmp_path / "one")
    killed = []

    def kill(event):
        if isinstance(event, StepDone) and event.round == 2 and not killed:
            killed.extend(set(_children()) - before)
            killed[0].kill()

    with pytest.raises(RunError, match=r"of 2 of the server has ended: it was killed.*--resume"):
        splitft.train(config[2], tmp_path / "two", listeners=[kill])
    assert len(killed) == 2
    assert not set(_children()) - before, "no process is left"
    splitft.train(config[1], tmp_path / "two", resume=True)
    _the_same(_learnt(tmp_path / "two"), _learnt(tmp_path / "one"))


@pytest.mark.slow
def test_replicas_of_a_server_that_is_killed_exit(tiny_llama, tmp_path):
    file = settings_file(tmp_path, tiny_llama, devices={"server_replicas": 2},
                         training={"rounds": 500})  # fmt: skip
    with started("train", file, "--out", tmp_path / "run") as process:
        events = tmp_path / "run" / "events.jsonl"
        while process.poll() is None and not (events.is_file() and "StepDone" in events.read_text()):
            time.sleep(0.2)
        replicas = psutil.Process(process.pid).children(recursive=True)
        assert len(replicas) == 2, process.stderr.read()
        process.kill()
        process.wait()
    _, alive = psutil.wait_procs(replicas, timeout=30)
    assert not alive
