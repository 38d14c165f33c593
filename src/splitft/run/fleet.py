"""The fleet of a run, which the schedule reads: the machine, link and work of each client, and the server.

    RunConfig, Model, the clients' text --fleet_of--> SharedCosts + a ClientProfile each

A machine is a preset, whose seconds follow from the model's operations and so are the same everywhere, or
numbers that the user gives, or `measured`: the calibration of this machine.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from splitft.adapters import attach
from splitft.codecs import codec_of
from splitft.config import RunConfig
from splitft.data.text import BatchStream
from splitft.model import Model
from splitft.model.anatomy import locate
from splitft.model.devices import RunDevices, take_devices
from splitft.model.quantized_layers import bytes_a_weight, largest_made
from splitft.run.calibration import measured
from splitft.schedule.codec_cost import WireBytes, codec_seconds
from splitft.schedule.presets import device_preset, link_preset
from splitft.schedule.profile import GB, MBIT_PER_S, Device, Link, ServerProfile
from splitft.schedule.sizes import ModelSizes, sizes_of
from splitft.schedule.workload import (
    AdapterTraffic,
    ClientProfile,
    Fleet,
    QuantizedBytes,
    SharedCosts,
    Workload,
)
from splitft.specs import DeviceSpec, LinkSpec, WireSpec
from splitft.specs.wire import AUTO
from splitft.training.ranks import RankPolicy


@dataclass(frozen=True)
class _Machines:
    """The devices and links of a configuration; measures this machine if it is named."""

    model: Model
    sizes: ModelSizes
    ranks: RankPolicy
    config: RunConfig

    def device(self, name: str, given: str | DeviceSpec) -> Device:
        """Return a machine under its owner's name, which is "server" or a client's."""
        if isinstance(given, DeviceSpec):
            return Device(
                name=name,
                block_forward_s_per_token=given.block_forward_ms_per_token / 1e3,
                block_backward_s_per_token=given.block_backward_ms_per_token / 1e3,
                head_s_per_token=given.head_ms_per_token / 1e3,
                memory_bytes=given.memory_gb * GB,
                block_overhead_s=given.block_overhead_ms / 1e3,
            )
        if given == "measured":
            devices = self._devices.server if name == "server" else self._devices.clients
            found = measured(self.model, self.ranks, self.config.training, devices[0])
            return replace(found, name=name)
        context, launches = self.config.data.max_tokens, self.config.schedule.launch_overhead
        return replace(device_preset(given, self.sizes, context, launches), name=name)

    def link(self, name: str, given: str | LinkSpec) -> Link:
        """Return a link under its owner's name."""
        if isinstance(given, LinkSpec):
            up, down = given.up_mbit_per_s * MBIT_PER_S, given.down_mbit_per_s * MBIT_PER_S
            return Link(name, up, down, given.latency_ms / 1e3)
        return replace(link_preset(given), name=name)

    @cached_property
    def _devices(self) -> RunDevices:
        return take_devices(self.config.devices)


def fleet_of(
    config: RunConfig, model: Model, ranks: RankPolicy, names: Sequence[str], workloads: Sequence[Workload]
) -> Fleet:
    """Return the fleet of a run; takes a few seconds the first time if a machine is `measured`."""
    sizes = exact_sizes(model, ranks)
    machines, schedule, count = _Machines(model, sizes, ranks, config), config.schedule, len(names)
    devices, links = _one_each(schedule.devices, count), _one_each(schedule.links, count)
    clients = tuple(
        ClientProfile(
            name,
            machines.device(name, devices[i]),
            machines.link(name, links[i]),
            workload,
            rank=ranks.by_client.get(name),
        )
        for i, (name, workload) in enumerate(zip(names, workloads, strict=True))
    )
    costs = SharedCosts(
        sizes=sizes,
        server=ServerProfile(
            machines.device("server", schedule.server),
            group_tokens=config.split.group_tokens,
            adapters=config.split.way,
        ),
        lora=config.lora,
        wire=wire_costs(config.wire, sizes.width),
        labels=config.split.labels,
        federated=config.aggregate.federated,
        handed_on=config.training.order == "in-turn",
        weight_bytes=model.dtype.itemsize,
        quantized=quantized_bytes(model),
        moments=2 if config.training.optimizer == "adamw" else 0,
        micro_batches=config.training.micro_batches,
        in_flight=config.training.in_flight,
        checkpoint_blocks=config.training.checkpoint_blocks,
        adapter_traffic=_adapter_traffic(config, model, ranks),
    )  # fmt: skip
    return Fleet(costs, clients, schedule.changes)


def quantized_bytes(model: Model) -> QuantizedBytes | None:
    """Return the bytes of frozen weights, counted on the skeleton; None if nothing is quantized."""
    client, server = model.at("clients"), model.at("server")
    if model.spec.embedding == "full" and not client.quantized and not server.quantized:
        return None
    full = float(model.dtype.itemsize)
    skeletons = [side.held_skeleton() for side in (client, server)]
    of_blocks = [bytes_a_weight(locate(skeleton).block_list()[0], full) for skeleton in skeletons]
    return QuantizedBytes(
        client_block=of_blocks[0],
        server_block=of_blocks[1],
        rows=bytes_a_weight(locate(skeletons[0]).embedding, full),
        made=max(map(largest_made, skeletons)) * full,
    )


def _adapter_traffic(config: RunConfig, model: Model, ranks: RankPolicy) -> AdapterTraffic:
    """Return the shares of adapters that the rule sends, counted on one block of the model."""
    blocks = locate(model.skeleton()).block_list()[:1]
    sizes = attach(blocks, ranks.lora.targets, ranks.scale, model.dtype).sizes.values()
    numbers = {"A": sum(width_in for width_in, _ in sizes), "B": sum(width_out for _, width_out in sizes)}
    rule, whole = ranks.sharing, max(1, sum(numbers.values()))
    participants = max(1, round(config.training.participation * config.clients.count))
    return AdapterTraffic(
        up=sum(numbers[half] for half in rule.up) / whole,
        down=sum(numbers[half] for half in rule.down) / whole,
        full_rank=rule.full_rank,
        folded_members=participants if rule.folds else 0,
    )


def wire_costs(wire: WireSpec, width: int) -> WireBytes:
    """Return the bytes and seconds of one number, in a message of many rows; `auto` counts as bf16."""
    chosen = {role: getattr(wire, role) for role in ("hidden", "gradient", "adapter")}
    codecs = {role: codec_of("bf16" if name == AUTO else name) for role, name in chosen.items()}
    shape = (1024, width)
    return WireBytes(
        **{role: codec.bytes_for(shape) / math.prod(shape) for role, codec in codecs.items()},
        hidden_s=codec_seconds(codecs["hidden"].name, "hidden"),
        gradient_s=codec_seconds(codecs["gradient"].name, "gradient"),
    )


def exact_sizes(model: Model, ranks: RankPolicy) -> ModelSizes:
    """Return the model's sizes, counted on its skeleton."""
    skeleton = model.skeleton()
    anatomy = locate(skeleton)
    block = anatomy.block_list()[0]
    block_parameters = sum(parameter.numel() for parameter in block.parameters())
    embedding = sum(parameter.numel() for parameter in anatomy.embedding.parameters())
    whole = sum(parameter.numel() for parameter in skeleton.parameters())
    bank = attach(anatomy.block_list(), ranks.lora.targets, ranks.scale, model.dtype)
    layers = [size for (index, _), size in bank.sizes.items() if index == 0]
    counted = replace(
        sizes_of(model.shape),
        block_parameters=block_parameters,
        embedding_parameters=embedding,
        head_parameters=max(0, whole - embedding - model.shape.blocks * block_parameters),
        adapter_parameters_per_rank=sum(map(sum, layers)),
    )
    if ranks.lora.dropout:  # each layer keeps its own input and a mask of one byte a number
        inputs = sum(width_in for width_in, _ in layers)
        kept = counted.kept_elements_per_token + inputs + -(-inputs // model.dtype.itemsize)
        counted = replace(counted, kept_elements_per_token=kept)
    if ranks.lora.method != "dora":
        return counted
    outputs = sum(width_out for _, width_out in layers)  # each kept twice: from the base, and from B A
    kept = counted.kept_elements_per_token + 2 * outputs
    return replace(counted, magnitudes=outputs, kept_elements_per_token=kept)


def workload_of(config: RunConfig, stream: BatchStream) -> Workload:
    """Return a client's work in a round, from the means over one epoch's batches."""
    batches = stream.sizes()
    count = len(batches)
    return Workload(
        tokens=sum(one.tokens for one in batches) / count,
        labelled_tokens=sum(one.labelled for one in batches) / count,
        sequences=sum(one.sequences for one in batches) / count,
        padded_length=sum(one.sequences * one.longest for one in batches)
        / sum(one.sequences for one in batches),
        steps=config.training.steps,
        largest_tokens=max(one.sequences * one.longest for one in batches),
    )


def _one_each(given: Any, count: int) -> tuple[Any, ...]:
    return given if isinstance(given, tuple) else (given,) * count
