"""Which tensors are read from a checkpoint, and what is said of one that cannot be read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file

from splitft.errors import ModelError
from splitft.geometry import Span
from splitft.model import open_model
from splitft.model.weights import Checkpoint, in_folder, on_hub
from splitft.model.weights.checkpoint_files import INDEX, WEIGHTS
from splitft.specs import ModelSpec
from tiny import tiny_model


def _segment(folder: Path, start: int, stop: int, **parts: bool):
    return open_model(ModelSpec(name=str(folder), dtype="float32")).segment(Span(start, stop), **parts)


def _rewrite(folder: Path, change) -> None:
    """Pass the tensors of a checkpoint in one file through `change`."""
    save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS, metadata={"format": "pt"})


@pytest.fixture
def llama(tmp_path) -> Path:
    return tiny_model(tmp_path / "llama", "llama")


def test_a_span_is_read_with_the_other_shards_gone(tmp_path, tiny_llama):
    folder = tiny_model(tmp_path / "sharded", "llama", sharded=True)
    shards = json.loads((folder / INDEX).read_text())["weight_map"]
    wanted = {
        shards[name]
        for name in shards
        if name.startswith(("model.embed", "model.layers.0.", "model.layers.1."))
    }
    gone = set(shards.values()) - wanted
    assert len(gone) >= 3
    for shard in gone:
        (folder / shard).unlink()
    tokens = torch.arange(1, 9).view(1, 8)
    expected = _segment(tiny_llama, 0, 2, embedding=True).run(tokens)
    assert torch.equal(_segment(folder, 0, 2, embedding=True).run(tokens), expected)
    with pytest.raises(ModelError, match=r"shard model-.* is named in the index but missing"):
        _segment(folder, 3, 4)


def test_no_tensor_is_read_but_those_of_the_span_and_none_twice(tmp_path, tiny_llama, monkeypatch):
    tiny_llama = shutil.copytree(tiny_llama, tmp_path / "own")  # whose weights nobody else holds
    read, original = [], Checkpoint.read

    def recording(self, names):
        names = list(names)
        read.extend(names)
        return original(self, names)

    monkeypatch.setattr(Checkpoint, "read", recording)
    segment = _segment(tiny_llama, 1, 3, head=True)
    names = load_file(tiny_llama / WEIGHTS)
    starts = ["model.layers.1.", "model.layers.2.", "model.norm.", "lm_head."]
    assert sorted(read) == sorted(name for name in names if name.startswith(tuple(starts)))
    read.clear()
    segment.resize(Span(2, 4))
    assert sorted(read) == sorted(name for name in names if name.startswith("model.layers.3."))


def test_a_tensor_that_is_not_there_is_named(llama):
    lost = "model.layers.2.mlp.up_proj.weight"
    _rewrite(llama, lambda tensors: {name: t for name, t in tensors.items() if name != lost})
    _segment(llama, 0, 2)
    with pytest.raises(ModelError, match=rf"lacks 1 tensors, first '{lost}'"):
        _segment(llama, 2, 3)


def test_a_tensor_of_another_shape_is_named_with_both_shapes(llama):
    bent = "model.layers.0.mlp.up_proj.weight"
    _rewrite(llama, lambda tensors: {**tensors, bent: tensors[bent][:, :5].contiguous()})
    with pytest.raises(ModelError, match=rf"{bent} has shape \(48, 5\) .* needs \(48, 32\)"):
        _segment(llama, 0, 1)


def test_pickled_weights_are_refused_with_the_way_out(llama):
    torch.save(load_file(llama / WEIGHTS), llama / "pytorch_model.bin")
    (llama / WEIGHTS).unlink()
    with pytest.raises(ModelError, match=r"no model.safetensors .* safetensors only .*save_pretrained"):
        _segment(llama, 0, 1)


@pytest.mark.parametrize("content", [b"", b"\x00" * 100, b"half of it"])
def test_a_file_that_is_no_safetensors_is_refused(llama, content):
    whole = (llama / WEIGHTS).read_bytes()
    (llama / WEIGHTS).write_bytes(whole[: len(whole) // 2] if content == b"half of it" else content)
    with pytest.raises(ModelError, match="not a readable safetensors file"):
        _segment(llama, 0, 1)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"weight_map": 3}'])
def test_an_index_that_tells_nothing_is_refused(llama, content):
    (llama / INDEX).write_text(content)
    with pytest.raises(ModelError, match="does not map tensors to shards"):
        _segment(llama, 0, 1)


def test_an_index_that_names_the_wrong_shard_is_refused(llama):
    names = load_file(llama / WEIGHTS)
    save_file({"other": torch.zeros(1)}, llama / "other.safetensors")
    (llama / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, "other.safetensors")}))
    with pytest.raises(ModelError, match=r"other.safetensors lacks 'model.layers..*', which the index says"):
        _segment(llama, 0, 1)


@pytest.mark.parametrize(
    ("family", "new", "old"),
    [
        ("gpt_neox", "lm_head.", "embed_out."),
        ("gpt2", "transformer.", ""),
        ("opt", "model.decoder.", "decoder."),
        ("llama", "model.", ""),
    ],
)
def test_names_of_older_checkpoints_are_understood(tmp_path, tiny_folders, family, new, old):
    folder = tiny_model(tmp_path, family)

    def renamed(tensors):
        return {(old + n[len(new) :] if n.startswith(new) else n): t for n, t in tensors.items()}

    _rewrite(folder, renamed)
    tokens = torch.arange(1, 9).view(1, 8)
    logits = []
    for path in (folder, tiny_folders[family]):
        segment = _segment(path, 0, 4, embedding=True, head=True)
        logits.append(segment.logits(segment.run(tokens)[0]))
    assert torch.equal(*logits)


def _cache(tmp_path: Path, monkeypatch, files: list[Path]) -> str:
    """A hub cache as a download leaves it; returns the repository's id."""
    repo = tmp_path / "models--owner--name"
    snapshot = repo / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0" * 40)
    for file in files:
        (snapshot / file.name).write_bytes(file.read_bytes())
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    return "owner/name"


def test_a_model_in_one_file_that_was_downloaded_before_is_read_offline(tmp_path, monkeypatch, tiny_llama):
    repo = _cache(tmp_path, monkeypatch, [tiny_llama / WEIGHTS])
    name = "model.norm.weight"
    assert torch.equal(on_hub(repo).read([name])[name], in_folder(tiny_llama).read([name])[name])


def test_only_the_shards_that_are_needed_must_have_been_downloaded(tmp_path, monkeypatch):
    folder = tiny_model(tmp_path / "sharded", "llama", sharded=True)
    shards = json.loads((folder / INDEX).read_text())["weight_map"]
    near, far = "model.layers.0.mlp.up_proj.weight", "model.layers.3.mlp.up_proj.weight"
    checkpoint = on_hub(_cache(tmp_path / "hub", monkeypatch, [folder / INDEX, folder / shards[near]]))
    assert checkpoint.read([near])[near].shape == (48, 32)
    with pytest.raises(ModelError, match=rf"{shards[far]} is neither in the hub cache nor reachable"):
        checkpoint.read([far])


def test_a_model_that_was_never_downloaded_is_refused_offline(tmp_path, monkeypatch):
    with pytest.raises(ModelError, match="neither in the hub cache nor reachable"):
        on_hub(_cache(tmp_path, monkeypatch, []))
