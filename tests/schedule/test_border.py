"""The map of methods: each method's time by its own arithmetic, and what the map says of it."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest

from schedule.cases import SHAPE, costs
from splitft.run.border_map import verdict
from splitft.schedule.border import FLEETS, ONE_CUT, Terrain, border, crossing_steps
from splitft.schedule.clock import client_round, simulate_round
from splitft.schedule.cost import round_seconds
from splitft.schedule.presets import DEVICES, device_preset, link_preset
from splitft.schedule.profile import ServerProfile
from splitft.schedule.sizes import sizes_of
from splitft.schedule.workload import ClientProfile, Workload
from splitft.specs import LoraSpec

WORK = Workload(tokens=1024, labelled_tokens=1020, sequences=4, padded_length=256, steps=6)


def _costs(blocks=30, width=1, **changes):
    """SmolLM2-135M, or a model so many times as wide and with so many blocks, with an A100 as server."""
    shape = replace(
        SHAPE, blocks=blocks, width=576 * width, inner=1536 * width, heads=9 * width, kv_heads=3 * width
    )
    sizes = sizes_of(shape)
    server = ServerProfile(device_preset("server-gpu", sizes))
    return costs(sizes=sizes, server=server, lora=LoraSpec(rank=16, rank_at_cut=None), **changes)


def _place(our_costs, devices, link="fibre", steps=6, launch=0.0):
    (found,) = border(our_costs, WORK, Terrain({"mine": devices}, (link,), (steps,), 256, launch))
    return found


def _clients(our_costs, devices, link="fibre"):
    return [
        ClientProfile(f"c{n}", device_preset(name, our_costs.sizes, 256), link_preset(link), WORK)
        for n, name in enumerate(devices)
    ]


def test_fedlora_takes_the_slowest_clients_own_round():
    devices = ("phone", "workstation")
    place, clients = _place(_costs(), devices), _clients(_costs(), devices)
    own = [sum(round_seconds(_costs(), one, 30).values()) for one in clients]
    assert place.methods["fedlora"].seconds == max(own)
    assert place.methods["fedlora"].cuts == (30, 30)


@pytest.mark.parametrize("method", ONE_CUT)
def test_a_method_with_one_cut_has_the_best_one_by_trying_all_on_the_clock(method):
    devices = ("laptop", "edge-gpu", "workstation")
    our_costs = _costs()
    found = _place(our_costs, devices).methods[method]
    ours = replace(our_costs, server=replace(our_costs.server, adapters=ONE_CUT[method]))
    clients = _clients(ours, devices)
    every = [
        simulate_round([client_round(ours, one, cut) for one in clients], ours.server).round_s
        for cut in range(1, 30)
    ]
    assert found.seconds == pytest.approx(min(every), rel=1e-9)  # 6 steps are simulated in full
    assert set(found.cuts) == {1 + every.index(min(every))}


@pytest.mark.parametrize("link", ["lte", "lan"])
@pytest.mark.parametrize("steps", [3, 100])
@pytest.mark.parametrize("fleet", ["4 x laptop", "one of each"])
def test_splitft_is_a_point_no_slower_than_any_method(fleet, steps, link):
    place = _place(_costs(), FLEETS[fleet], link, steps)
    assert place.methods["splitft"].seconds == place.seconds()


def test_below_the_memory_of_the_whole_model_only_a_split_fits_and_below_one_block_nothing():
    large = _costs(blocks=32, width=7)
    place = _place(large, ("laptop",) * 2)
    assert place.methods["fedlora"].seconds is None
    assert place.seconds(*ONE_CUT) is not None
    nothing = _place(_costs(blocks=2, width=40), ("phone",) * 2)
    assert nothing.seconds() is None
    assert verdict(asdict(nothing), 2) == "none fits"


def test_the_servers_memory_counts():
    small = replace(
        _costs(), server=replace(_costs().server, device=replace(_costs().server.device, memory_bytes=1e6))
    )
    place = _place(small, ("workstation",) * 2)
    assert place.seconds(*ONE_CUT) is None
    assert place.methods["splitft"] == place.methods["fedlora"]


def test_launch_overhead_makes_every_method_slower_by_the_launches_of_its_blocks():
    without, with_it = (_place(_costs(), ("phone",), launch=one).methods["fedlora"].seconds for one in (0, 2))
    passes = 2 * 30 * WORK.steps
    assert with_it - without == pytest.approx(2 * 81 * DEVICES["phone"].launch_us * 1e-6 * passes)


def test_the_crossing_is_where_two_lines_meet():
    whole, split = [(3, 10 + 3 * 1.0), (300, 10 + 300 * 1.0)], [(3, 2 + 3 * 1.5), (300, 2 + 300 * 1.5)]
    assert crossing_steps(whole, split) == pytest.approx(16)  # 10 + s = 2 + 1.5 s
    assert crossing_steps(split, whole) is None  # quicker at first, and only then
    assert crossing_steps([(3, 1.0), (300, 2.0)], split) == 0.0
    assert crossing_steps(split, [(3, 1.0), (300, 2.0)]) is None


def _said(blocks=30, **methods) -> str:
    found = {
        name: {"seconds": seconds, "cuts": cuts if isinstance(cuts, tuple) else (cuts,) * 2}
        for name, (seconds, cuts) in methods.items()
    }
    return verdict({"methods": found}, blocks)


def test_the_map_names_the_quickest_and_its_lead_over_another_kind():
    split = {"splitfed-v1": (6.0, 2), "splitlora": (9.0, 2)}
    assert _said(fedlora=(3.0, 30), **split, splitft=(3.0, 30)) == "fedlora, 2.0x split 2"
    assert _said(fedlora=(30.0, 30), **split, splitft=(6.0, 2)) == "split 2, 5.0x fedlora"
    assert _said(fedlora=(None, ()), **split, splitft=(6.0, 2)) == "split 2, 1.5x splitlora 2"
    mixed = _said(fedlora=(12.0, 30), **split, splitft=(4.0, (3, 30)))
    assert mixed == "splitft (3, whole), 1.5x split 2"
    assert _said(fedlora=(3.0, 30), splitft=(3.0, 30)) == "fedlora, alone"
    assert _said(fedlora=(None, ()), splitft=(None, ())) == "none fits"
