"""Every file in examples/plugins does what it says, by name, as a built-in choice would."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import yaml

import splitft
from runs import invoke, settings_file
from splitft.config import from_mapping, json_schema, load
from splitft.errors import ConfigError
from splitft.registry import REGISTRIES

FOLDER = Path(__file__).resolve().parents[1] / "examples/plugins"
KINDS = {
    "rule": ("splitft.rules", "one-vote"),
    "controller": ("splitft.controllers", "shallowest"),
    "codec": ("splitft.codecs", "fp16"),
    "partition": ("splitft.partitions", "dealt"),
    "method": ("splitft.methods", "frugal"),
    "source": ("splitft.sources", "folder"),
    "tracker": ("splitft.trackers", "one-line"),
    "attack": ("splitft.attacks", "most-frequent"),
}


@pytest.fixture(autouse=True)
def _leaves_no_plugin_behind():
    yield
    for group, name in KINDS.values():
        if group in REGISTRIES:
            REGISTRIES[group]._things.pop(name, None)
    for name in [name for name in sys.modules if name.startswith("splitft_plugin_")]:
        del sys.modules[name]


def _plugin(*names: str) -> list[str]:
    return [str(FOLDER / f"{name}.py") for name in names]


def test_there_is_an_example_of_every_kind():
    import splitft.audit.attacks
    import splitft.methods  # noqa: F401

    assert {path.stem for path in FOLDER.glob("*.py")} == set(KINDS)
    assert {group for group, _ in KINDS.values()} == {g for g in REGISTRIES if g.startswith("splitft.")}
    page = (FOLDER.parents[1] / "docs/write-your-own.md").read_text(encoding="utf-8")
    for kind, (group, _) in KINDS.items():
        assert f"`{group}`" in page
        assert f"[{kind}.py](../examples/plugins/{kind}.py)" in page


@pytest.mark.parametrize("kind", KINDS)
def test_an_example_adds_its_name(kind):
    import splitft.audit.attacks
    import splitft.methods  # noqa: F401

    group, name = KINDS[kind]
    assert name not in REGISTRIES[group]
    from_mapping({"plugins": _plugin(kind)})
    assert name in REGISTRIES[group]


def test_all_of_them_train_a_run_together(tmp_path, tiny_llama):
    file = settings_file(
        tmp_path,
        tiny_llama,
        plugins=_plugin("rule", "controller", "codec", "partition", "source", "tracker"),
        data={"source": f"folder:{FOLDER / 'notes'}", "max_tokens": 64},
        clients={"count": 2, "cuts": "auto", "shares": {"by": "dealt"}},
        lora={"rank": 4, "rank_at_cut": None},
        aggregate={"rule": "one-vote"},
        schedule={"controller": "shallowest"},
        wire={"hidden": "fp16"},
        trackers=[{"name": "one-line", "file": "state.txt"}],
    )
    planned = invoke("plan", file)
    assert planned.exit_code == 0, planned.stderr
    assert "shallowest" in planned.stdout

    run = splitft.train(file, tmp_path / "run")
    assert [client["cut"][-1] for client in run.summary["clients"]] == [1, 1]
    sizes = sorted(client["train_examples"] + client["eval_examples"] for client in run.summary["clients"])
    assert sizes == [6, 6]
    loss = run.summary["eval_loss"][-1]
    assert (run.folder / "state.txt").read_text() == f"round 3 of 3: held-out loss {loss:.3f}\n"
    assert (run.folder / "report.html").is_file()


def test_one_vote_is_the_plain_mean_of_unequal_clients():
    from splitft.adapters import AdapterState, Factors, aggregate
    from splitft.adapters.aggregators import Fresh

    from_mapping({"plugins": _plugin("rule")})
    key = (0, "q")
    states = [AdapterState({key: Factors(torch.full((1, 2), a), torch.full((3, 1), b))})
              for a, b in ((1.0, 2.0), (3.0, 8.0))]  # fmt: skip
    mean = aggregate("one-vote", [(1000, states[0]), (1, states[1])], {0: 1}, Fresh(0, 0)).state[key]
    assert torch.equal(mean.A, torch.full((1, 2), 2.0))
    assert torch.equal(mean.B, torch.full((3, 1), 5.0))


def test_the_codec_keeps_the_bound_that_it_states():
    from splitft.codecs import CodecContext, codec_of

    from_mapping({"plugins": _plugin("codec")})
    codec, context = codec_of("fp16"), CodecContext("hidden", 0, {}, ())
    rows = (
        torch.randn(50, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-8, 3, 50)[:, None]
    )
    encoded = codec.encode(rows, context)
    error = (codec.decode(encoded, torch.float32, context) - rows).double().norm(dim=1)
    assert bool((error <= codec.error_bound(encoded, context)).all())
    assert encoded.nbytes == codec.bytes_for((50, 64)) == 50 * 64 * 2


def test_a_method_is_refused_what_contradicts_it_in_words_of_its_own(tmp_path, tiny_llama):
    config = from_mapping({"plugins": _plugin("method"), "method": "frugal"})
    assert (config.aggregate.rule, config.wire.hidden) == ("exact", "int8")
    with pytest.raises(ConfigError, match="method frugal hands out the exact mean; give exact"):
        from_mapping({"plugins": _plugin("method"), "method": "frugal", "aggregate": {"rule": "svd"}})


def test_a_plugin_stands_in_the_schema_and_in_did_you_mean():
    with pytest.raises(ConfigError, match="did you mean shallowest"):
        from_mapping({"plugins": _plugin("controller"), "schedule": {"controller": "shalowest"}})
    assert "shallowest" in str(json_schema())
    assert "one-vote" not in str(json_schema())


@pytest.mark.real
@pytest.mark.slow
def test_the_example_configuration_runs_as_it_is(tmp_path, monkeypatch, real_model):
    monkeypatch.chdir(FOLDER.parents[1])
    run = splitft.train(FOLDER / "run.yaml", tmp_path / "run")
    assert run.summary["finished"]
    assert (run.folder / "status.txt").read_text().startswith("round 1 of 1")
    plugins = yaml.safe_load((FOLDER / "run.yaml").read_text())["plugins"]
    assert sorted(path.name for path in (run.folder / "plugins").iterdir()) == sorted(plugins)
    assert load(run.folder / "config.yaml") == run.config
