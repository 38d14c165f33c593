"""Small costs, clients and problems that the tests of this folder share."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import strategies as st

from splitft.geometry import ModelShape
from splitft.schedule.codec_cost import WireBytes
from splitft.schedule.problem import ClientChoices, CutOption, CutProblem
from splitft.schedule.profile import Device, Link, ServerProfile
from splitft.schedule.sizes import ModelSizes
from splitft.schedule.workload import ClientProfile, SharedCosts, Workload
from splitft.specs import LoraSpec

SHAPE = ModelShape("llama", 30, 576, 49152, 1536, 9, 3, True, 8192)
"""SmolLM2-135M."""

SIZES = ModelSizes(
    blocks=6,
    width=10,
    vocab=100,
    block_parameters=1000,
    embedding_parameters=1000,
    head_parameters=10,
    tied=True,
    adapter_parameters_per_rank=20,
    kept_elements_per_token=70,
)

DEVICE = Device("laptop", 1.0, 2.0, 0.5, 1e9)
LINK = Link("dsl", 100.0, 200.0, 0.25)
SERVER = ServerProfile(Device("rack", 0.5, 1.0, 0.25, 1e9), group_overhead_s=3.0)
WORK = Workload(tokens=12, labelled_tokens=8, sequences=2, padded_length=8, steps=5)
LORA = LoraSpec(rank=4, rank_at_cut=2)


def costs(**changes) -> SharedCosts:
    return replace(SharedCosts(SIZES, SERVER, LORA, WireBytes(2, 2, 4)), **changes)


def client(name="a", speed=1.0, **changes) -> ClientProfile:
    return replace(ClientProfile(name, DEVICE.scaled(speed), LINK, WORK), **changes)


def option(cut, compute_s, server_s, link_s=0.0, memory=0.0, server_memory=0.0, move_s=0.0) -> CutOption:
    seconds = {
        "client_forward": float(compute_s),
        "up_hidden": float(link_s),
        "server_forward": float(server_s),
    }
    return CutOption(cut, seconds, memory, server_memory, move_s)


@st.composite
def problems(draw, clients=3, blocks=4, **fields) -> CutProblem:
    """Whole-numbered prices, so that sums are exact: compute rises with depth, the server's work falls."""
    members = []
    for number in range(draw(st.integers(1, clients))):
        slowness, head, steps = draw(st.integers(1, 9)), draw(st.integers(0, 5)), draw(st.integers(1, 4))
        server = draw(st.lists(st.integers(0, 30), min_size=blocks, max_size=blocks))
        at_server = draw(st.lists(st.integers(0, 9), min_size=blocks, max_size=blocks))
        links = draw(st.lists(st.integers(0, 12), min_size=blocks, max_size=blocks))
        memory = draw(st.lists(st.integers(1, 20), min_size=blocks, max_size=blocks))
        options = tuple(
            option(cut, steps * (slowness * cut + head), work, link, size, held, draw(st.integers(0, 50)))
            for cut, work, link, size, held in zip(
                range(1, blocks + 1),
                sorted(server, reverse=True),
                links,
                sorted(memory),
                sorted(at_server, reverse=True),
                strict=True,
            )
        )
        low = draw(st.integers(1, blocks))
        least = options[low - 1].client_bytes
        members.append(
            ClientChoices(
                f"c{number}",
                draw(st.integers(1, blocks)),
                options,
                min_cut=low,
                max_cut=draw(st.integers(low, blocks)),
                memory_bytes=draw(st.integers(int(least), 20)),
                loss=draw(st.none() | st.floats(0.1, 10)),
                weight=draw(st.integers(1, 5)),
            )
        )
    return CutProblem(tuple(members), rounds_left=draw(st.integers(0, 20)), **fields)
