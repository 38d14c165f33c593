"""What a site keeps on its disk, and the server in its run folder, from one session of a run to the next."""

from __future__ import annotations

import shutil
import stat

import pytest

from deploy.network import kind_of, site_thread
from laws.federations import largest_relative_difference, write_text
from splitft.config import from_mapping
from splitft.deploy.run_terms import load_run_terms
from splitft.deploy.server.session import ServerSession
from splitft.deploy.site.site_store import SiteStore
from splitft.tracking.events import SiteChanged, WireChosen
from splitft.tracking.log import read_events
from splitft.training.checkpoint import load_snapshot

KEY = bytes(range(16))
SITES = ("client-1", "client-2")
CUTS = (1, 2)
EXACT = {"hidden": "fp64", "gradient": "fp64", "adapter": "fp64"}
PERSONAL = {"aggregate": {"rule": "fedsa"}, "privacy": {"private_blocks": 1}}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "notes.jsonl")


def _config(base, text, rounds: int, **sections):
    return from_mapping({
        "model": {"name": str(base), "dtype": "float64"},
        "data": {"source": str(text), "max_tokens": 32},
        "clients": {"count": 2, "cuts": list(CUTS)},
        "lora": {"rank": 4, "rank_at_cut": None},
        "training": {"rounds": rounds, "steps": 2, "batch_size": 2, "lr": 5e-3, "optimizer_state": "keep"},
        "deploy": {"window_ms": 2, "min_clients": 2},
        "aggregate": {"rule": "factors"},
        "wire": EXACT,
        **sections,
    })  # fmt: skip


def _session(config, folder, dies_at: tuple[str, int] | None = None) -> str:
    """One session with both sites, as jobs wire them; it may die before the n-th message of a kind."""
    server = ServerSession(load_run_terms(config), folder / "run", SITES, KEY)
    if dies_at is not None:
        answer, left = server.inbox.answer, [dies_at[1]]

        def dying(site, data):
            left[0] -= kind_of(data) == dies_at[0]
            if left[0] <= 0:
                server.abort()
            return answer(site, data)

        server.inbox.answer = dying
    threads = [site_thread(config, name, server, KEY, folder=folder / "sites" / name) for name in SITES]
    for thread in threads:
        thread.start()
    try:
        return server.serve().reason
    finally:
        server.abort()
        for thread in threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in threads)


def _result(folder, rounds: int) -> dict:
    """All factors at the end of a run, on the server's disk and on the sites'."""
    snapshot = load_snapshot(folder / "run", rounds)
    found = {f"global/{name}": tensor for name, tensor in snapshot.state.adapters.tensors().items()}
    for owner, own in snapshot.own.items():
        found |= {f"server/{owner}/{n}": t for n, t in own.tensors().items() if t.numel()}
    for name, cut in zip(SITES, CUTS, strict=True):
        kept = SiteStore(folder / "sites" / name).load(rounds, cut, snapshot.steps[name])
        assert kept.own
        found |= {f"{name}/{n}": t for n, t in kept.own.tensors().items() if t.numel()}
    return {name: tensor for name, tensor in found.items() if tensor.abs().max() > 0}


@pytest.fixture(scope="module")
def uninterrupted(tiny_llama, text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    assert _session(_config(tiny_llama, text, 3, **PERSONAL), folder) == "finished"
    return folder


@pytest.mark.parametrize("dies_at", [("RoundReady", 4), ("HeadGradient", 11), ("AdapterUpload", 4)])
@pytest.mark.fault(
    "a session dies at message {dies_at} of a run whose sites keep factors of their own",
    "the next session ends with the factors of a run that nobody interrupted, on the server and at the sites",
)
def test_a_run_that_died_within_a_round_ends_as_if_nothing_had_happened(
    dies_at, tiny_llama, text, tmp_path, uninterrupted
):
    config = _config(tiny_llama, text, 3, **PERSONAL)
    assert _session(config, tmp_path, dies_at) == "paused"
    assert _session(config, tmp_path) == "finished"
    found, expected = _result(tmp_path, 3), _result(uninterrupted, 3)
    assert {name.partition("/")[0] for name in expected} == {"global", "server", *SITES}
    assert largest_relative_difference(found, expected) < 1e-9


def test_what_a_site_keeps_is_for_its_owner_alone(uninterrupted):
    kept = list((uninterrupted / "sites/client-1").iterdir())
    assert {path.name for path in kept} >= {
        "text.txt",
        "kept-0003.safetensors",
        "kept-0003-begun.safetensors",
    }
    assert {stat.S_IMODE(path.stat().st_mode) & 0o077 for path in kept} == {0}


@pytest.mark.fault(
    "the disk of a site is new, in a run whose sites keep factors of their own",
    "the site's log says so; it begins with the factors of before round 1; the others keep theirs",
)
def test_a_site_on_a_new_disk_is_told_and_begins_anew(tiny_llama, text, tmp_path, uninterrupted, caplog):
    shutil.copytree(uninterrupted, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "sites/client-1")
    assert _session(_config(tiny_llama, text, 4, **PERSONAL), tmp_path) == "finished"
    assert "client-1 keeps factors of its own in this run, but found none of its 6 steps" in caplog.text
    assert "client-2 keeps factors" not in caplog.text
    events = read_events(tmp_path / "run/events.jsonl")
    assert not [event for event in events if isinstance(event, SiteChanged)]


@pytest.mark.parametrize("codec", ["temporal", "principal:bits=3"])
@pytest.mark.fault(
    "a run goes on in a new session, codec {codec}", "both ends begin anew, and nothing is refused"
)
def test_codecs_that_learn_begin_anew_with_a_session(codec, tiny_llama, text, tmp_path):
    wire, model = {"hidden": codec, "gradient": codec}, {"name": str(tiny_llama), "dtype": "float32"}
    for rounds in (2, 4):
        config = _config(tiny_llama, text, rounds, wire=wire, model=model)
        assert _session(config, tmp_path) == "finished"
    assert not [one for one in read_events(tmp_path / "run/events.jsonl") if isinstance(one, SiteChanged)]


def test_the_codecs_that_a_site_has_chosen_are_kept(tiny_llama, text, tmp_path):
    wire, model = {"hidden": "auto", "gradient": "auto"}, {"name": str(tiny_llama), "dtype": "float32"}
    for rounds in (1, 2):
        config = _config(tiny_llama, text, rounds, wire=wire, model=model)
        assert _session(config, tmp_path) == "finished"
    events = read_events(tmp_path / "run/events.jsonl")
    assert sorted(one.client for one in events if isinstance(one, WireChosen)) == list(SITES)
    assert not [one for one in events if isinstance(one, SiteChanged)]
