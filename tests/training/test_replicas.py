"""Replicas of the server: who computes for whom, packets on the pipe, and errors of requests."""

from __future__ import annotations

import io

import pytest
import torch

from laws.federations import federation, write_text
from replica_threads import ReplicaThread
from splitft.config import from_mapping
from splitft.errors import ConfigError, ModelError, ProtocolError, ReplicaError
from splitft.model.devices import RunDevices
from splitft.protocol import RoundStart
from splitft.training.replicas import ReplicaPlan, ServerReplicas, plan_replicas
from splitft.training.replicas.packet import Packet, read_packet, under, write_packet
from splitft.training.server_blocks import ServerBlocks

GPUS = tuple(torch.device("cuda", index) for index in range(4))


def test_the_largest_work_is_placed_first_where_there_is_least():
    plan = ReplicaPlan(2, tokens={"a": 90, "b": 50, "c": 40, "d": 10, "e": 10})
    assert plan.divide(dict.fromkeys("abcde", 1)) == {"a": 0, "b": 1, "c": 1, "d": 0, "e": 1}


def test_a_client_with_fewer_blocks_on_the_server_is_less_work():
    plan = ReplicaPlan(2, tokens=dict.fromkeys("abc", 10))
    assert plan.divide({"a": 1, "b": 3, "c": 2}) == {"b": 0, "c": 1, "a": 1}


@pytest.mark.parametrize(
    ("count", "devices", "expected"),
    [
        (2, GPUS, [GPUS[:2], GPUS[2:]]),
        (3, GPUS, [GPUS[:1], GPUS[1:2], GPUS[2:]]),
        (4, GPUS[:2], [GPUS[:1], GPUS[:1], GPUS[1:2], GPUS[1:2]]),
        (2, GPUS[:1], [GPUS[:1], GPUS[:1]]),
    ],
)
def test_each_replica_has_its_share_of_the_devices(count, devices, expected):
    plan = ReplicaPlan(count, devices)
    assert [plan.devices_of(number) for number in range(count)] == expected


def test_there_are_no_more_replicas_than_clients():
    devices = RunDevices(server_replicas=3)
    assert plan_replicas(devices, {"a": 1.0, "b": 2.0}).count == 2
    assert plan_replicas(devices, {"a": 1.0}) == devices.server


def test_a_packet_arrives_as_it_was_sent():
    rows = torch.arange(12, dtype=torch.float64).view(3, 4) / 7
    tensors = {
        "x/rows": rows, "x/the same": rows, "x/turned": rows.T, "x/part": rows[1:], "half": rows.bfloat16(),
        "none": torch.empty(2, 0), "one": torch.tensor(3, dtype=torch.int64),
    }  # fmt: skip
    stream = io.BytesIO()
    write_packet(stream, Packet("first", {"cuts": {"a": 1}, "loss": 0.1 + 0.2}, tensors))
    write_packet(stream, Packet("second"))
    stream.seek(0)
    packet = read_packet(stream)
    assert (packet.kind, packet.fields) == ("first", {"cuts": {"a": 1}, "loss": 0.1 + 0.2})
    assert packet.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(packet.tensors[name], tensor)
        assert packet.tensors[name].dtype == tensor.dtype
    assert under("x", packet.part("x")).keys() == {name for name in tensors if name.startswith("x/")}
    assert read_packet(stream) == Packet("second")
    with pytest.raises(EOFError):
        read_packet(stream)


@pytest.mark.parametrize(
    ("sections", "reason"),
    [
        ({"split": {"server_adapters": "shared"}}, "one process holds; give 1, or per-client"),
        ({"clients": {"count": 1, "cuts": 1}}, "found 2 for 1 clients"),
        ({"clients": {"count": 2, "cuts": "whole"}, "method": "fedlora"}, "nothing is on the server"),
        ({"devices": {"server_replicas": 0}}, "devices.server_replicas"),
    ],
)
def test_a_configuration_that_replicas_do_not_fit_is_refused_with_the_reason(sections, reason):
    base = {"clients": {"count": 2, "cuts": 1}, "devices": {"server_replicas": 2}}
    with pytest.raises(ConfigError, match=reason):
        from_mapping({**base, **sections})


def test_all_that_needs_blocks_is_asked_of_the_replicas():
    """A new method of the server's blocks has to be thought of in replicas, whose server holds none."""
    without_blocks = {"shared", "by_arrival", "initial", "begin", "rest", "slot", "evaluation_slot"}
    public = {name for name in vars(ServerBlocks) if not name.startswith("_")}
    assert public - without_blocks == public & vars(ServerReplicas).keys()


@pytest.fixture
def prepared(tiny_llama, tmp_path, monkeypatch):
    """Three clients of cut 1 whose server has two replicas on threads."""
    monkeypatch.setattr("splitft.training.replicas.pool.start_replica", ReplicaThread)
    text = write_text(tmp_path / "notes.jsonl")
    made = federation(tiny_llama, text, [1, 1, 1], devices={"server_replicas": 2})
    yield made
    made.server.close()


@pytest.fixture
def begun(prepared):
    """The server in a round, and a batch of each client."""
    server, names = prepared.server, [client.name for client in prepared.clients]
    server.place(dict.fromkeys(names, 1))
    server.start(1, names, server.initial())
    for client in prepared.clients:
        client.restore(1, server.initial().within(range(1)), 0, {})
        client.start(RoundStart(round=1, cut=1))
    return server, [client.forward() for client in prepared.clients]


def test_a_group_has_batches_for_every_replica(begun):
    server, messages = begun
    first, *_ = server.groups(messages)
    places = {server.blocks._places[message.client] for message in first}
    assert places == {0, 1}
    assert sorted(message.client for group in server.groups(messages) for message in group) == sorted(
        message.client for message in messages
    )


def test_replicas_have_their_requests_before_the_first_reply_is_awaited(begun, monkeypatch):
    from splitft.training.replicas.process import Replica

    server, messages = begun
    calls = []
    for name in ("post", "result"):
        own = getattr(Replica, name)
        monkeypatch.setattr(Replica, name, lambda self, *a, _own=own, _name=name, **k: (
            calls.append((_name, self.name)), _own(self, *a, **k))[1])  # fmt: skip
    server.forward(server.groups(messages)[0])
    assert [name for name, _ in calls] == ["post", "post", "result", "result"] * 2, "forward and outputs"
    assert len({replica for _, replica in calls}) == 2


def test_a_batch_at_which_a_replica_fails_leaves_nothing_of_its_group(begun):
    server, messages = begun
    wrong = messages[0].model_copy(update={"hidden": messages[0].hidden[:, :3]})
    with pytest.raises(RuntimeError, match=r"process [12] of 2"):
        server.launch([wrong, *messages[1:]], checked=True)
    assert not server.in_step(messages[1].client)
    for message in messages:  # each by itself, as the deployed server does to find the one at fault
        assert server.forward([message])[message.client].hidden.shape[0] == message.labelled_tokens


def test_a_step_that_is_forgotten_changes_nothing(begun):
    server, messages = begun
    before = {message.client: server.trained(message.client)[0] for message in messages}
    server.forward(messages)
    for message in messages:
        server.forget(message.client)
    assert all(
        server.trained(name)[0].tensors().keys() == one.tensors().keys() for name, one in before.items()
    )
    assert all(
        torch.equal(tensor, server.trained(name)[0].tensors()[key])
        for name, one in before.items()
        for key, tensor in one.tensors().items()
    )
    assert server.forward(messages[:1]), "and the step may come again"


def test_a_client_that_has_left_is_with_no_replica(begun):
    server, messages = begun
    server.forward(messages)
    server.leave(messages[0].client)
    with pytest.raises(ProtocolError, match="does not take part"):
        server.trained(messages[0].client)
    assert server.trained(messages[1].client)[0]


def test_an_error_of_loading_is_that_of_one_server(prepared, tmp_path, monkeypatch):
    from splitft.training.replicas import worker

    def fails(*arguments):
        raise ModelError("the checkpoint is not there")

    monkeypatch.setattr(worker, "open_model", fails)
    text = write_text(tmp_path / "other.jsonl")
    with pytest.raises(ModelError, match="the checkpoint is not there"):
        federation(prepared.config.model.name, text, [1, 1], devices={"server_replicas": 2})


def test_a_replica_that_is_gone_is_told_of_with_what_to_do(begun):
    server, messages = begun
    server.blocks._replicas._replicas[1]._carrier.close()
    with pytest.raises(ReplicaError, match=r"process 2 of 2 of the server has ended.*--resume"):
        server.forward(messages)
