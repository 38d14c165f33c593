"""Sites compare the files that they read with the server's, and only those."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from model.weights.hub_server import running, visit
from quantized import needs_bitsandbytes
from splitft.deploy.manifest import (
    MOST_TENSORS,
    ParameterNames,
    manifest_of,
    needed,
    tensors_of,
    verify,
    verify_tensors,
)
from splitft.deploy.site.policy import SitePolicy
from splitft.deploy.tokenizer_files import verify_tokenizer
from splitft.errors import ForbiddenError
from splitft.geometry import Span
from splitft.model import open_model, quantized_weights
from splitft.model.weights import on_hub
from splitft.model.weights.tensor_table import table_of
from splitft.protocol import Join, MessageSerializer
from splitft.protocol.control import BaseTensor
from splitft.specs import ModelSpec, SiteSpec, WireSpec


@pytest.fixture(scope="module")
def sharded(tmp_path_factory, tiny_llama):
    """The tiny model in many shards."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("sharded")
    AutoModelForCausalLM.from_pretrained(tiny_llama).save_pretrained(folder, max_shard_size="20KB")
    return open_model(ModelSpec(name=str(folder), dtype="float32"))


def files_at(model, cut: int) -> tuple[str, ...]:
    return needed(model, names_at(model, cut))


def names_at(model, cut: int) -> list[str]:
    return ParameterNames.of(model, head=True).at(cut)


def copied(model, to):
    """The same model elsewhere."""
    shutil.copytree(model.path, to)
    return open_model(ModelSpec(name=str(to), dtype="float32"))


def files_of_blocks(model, wanted) -> set[str]:
    """By the index that transformers wrote: an independent way to the same files."""
    index = json.loads((model.checkpoint.fetch("model.safetensors.index.json")).read_text())["weight_map"]
    return {
        file for name, file in index.items()
        if ".layers." not in name or int(name.split(".layers.")[1].split(".")[0]) in wanted
    }  # fmt: skip


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_a_client_needs_the_shards_of_its_blocks_and_no_others(sharded, cut):
    files = files_at(sharded, cut)
    assert set(files) == files_of_blocks(sharded, range(cut)) | {"config.json"}
    assert len(files) < len(manifest_of(sharded))


def test_a_client_without_the_head_needs_less(sharded):
    with_head = ParameterNames.of(sharded, head=True).at(1)
    without = ParameterNames.of(sharded, head=False).at(1)
    assert set(without) < set(with_head)
    assert any("embed_tokens" in name for name in without)
    assert not any(name.startswith("model.norm") for name in without)


def test_a_segment_reads_no_other_tensors_than_those_foretold(sharded):
    read: set[str] = set()

    class Listening(type(sharded.checkpoint)):
        def read(self, names):
            names = list(names)
            read.update(names)
            return super().read(names)

    checkpoint = Listening(sharded.path, sharded.checkpoint.fetch, sharded.checkpoint.prefixes)
    object.__setattr__(sharded, "checkpoint", checkpoint)
    sharded.segment(Span(0, 2), embedding=True, head=True)
    assert read == set(ParameterNames.of(sharded, head=True).at(2))


def test_a_manifest_has_every_file_with_its_hash(sharded):
    for one in manifest_of(sharded):
        if one.name != "config.json":
            data = sharded.checkpoint.fetch(one.name).read_bytes()
            assert (one.size, one.sha256) == (len(data), hashlib.sha256(data).hexdigest())


@pytest.mark.hostile("a file of the base model differs in one bit", "the site declines and names the file")
def test_a_file_that_differs_in_one_bit_is_named(sharded, tmp_path):
    manifest, own = manifest_of(sharded), copied(sharded, tmp_path / "own")
    names = files_at(own, 2)
    verify(own, names, manifest, None)
    path = tmp_path / "own" / names[1]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ForbiddenError, match=f"{names[1]} of the base model here is not the server's"):
        verify(own, names, manifest, None)
    others = [name for name in names if name != names[1]]
    verify(own, others, manifest, None)


def test_another_configuration_is_another_model_unless_only_its_writer_differs(sharded, tmp_path):
    manifest, own = manifest_of(sharded), copied(sharded, tmp_path / "own")
    path = tmp_path / "own" / "config.json"
    said = json.loads(path.read_text())
    path.write_text(json.dumps({**said, "transformers_version": "0.0"}))
    verify(own, ["config.json"], manifest, None)
    path.write_text(json.dumps({**said, "rms_norm_eps": 0.1}))
    with pytest.raises(ForbiddenError, match=r"config\.json"):
        verify(own, ["config.json"], manifest, None)


@pytest.mark.hostile(
    "the server's base model is not the one that the site trusts", "the site declines before it loads"
)
def test_only_files_that_the_site_trusts_are_used(sharded):
    manifest = manifest_of(sharded)
    names = files_at(sharded, 1)
    trusted = {one.name: one.sha256 for one in manifest}
    verify(sharded, names, manifest, trusted)
    with pytest.raises(ForbiddenError, match=f"{names[0]}.* does not list it"):
        verify(sharded, names, manifest, {})
    with pytest.raises(ForbiddenError, match=f"{names[0]}.* trusts 000000000000... there"):
        verify(sharded, names, manifest, {**trusted, names[0]: "0" * 64})


def test_a_file_that_the_server_does_not_have_is_named(sharded):
    names = files_at(sharded, 1)
    with pytest.raises(ForbiddenError, match=names[0]):
        verify(sharded, names, manifest_of(sharded)[1:], None)


# --- tensor by tensor -----------------------------------------------------------------------------


def site_with(model, folder, names):
    """A site that has these tensors alone, in one file of its own."""
    folder.mkdir()
    for file in Path(model.path).iterdir():
        if not file.name.startswith("model"):
            shutil.copy(file, folder)
    save_file(model.checkpoint.read(names), folder / "model.safetensors")
    return open_model(ModelSpec(name=str(folder), dtype="float32"))


def test_a_tensors_digest_is_that_of_its_type_shape_and_bytes(sharded):
    found = {one.name: one for one in tensors_of(sharded)}
    whole = sharded.checkpoint.read(names_at(sharded, 4))
    assert set(found) == set(whole)
    for name, tensor in whole.items():
        data = tensor.numpy().tobytes()
        said = f"F32 {list(tensor.shape)}\n".encode()
        assert (found[name].size, found[name].sha256) == (len(data), hashlib.sha256(said + data).hexdigest())


def test_a_site_that_holds_some_tensors_in_files_of_its_own_checks_them(sharded, tmp_path):
    own = site_with(sharded, tmp_path / "own", names_at(sharded, 2))
    policy = SitePolicy(SiteSpec(), own, head=True)
    policy.check_join(2, manifest_of(sharded), tensors_of(sharded))
    with pytest.raises(ForbiddenError, match=r"does not have model\.safetensors"):
        policy.check_join(2, manifest_of(sharded))  # a server of an earlier version


@pytest.mark.hostile(
    "a tensor of the base model differs in one bit", "the site declines and names the tensor"
)
@pytest.mark.parametrize("cut", [1, 2])
def test_a_tensor_that_differs_in_one_bit_is_named_by_whoever_needs_it(sharded, tmp_path, cut):
    own = copied(sharded, tmp_path / "own")
    bent = "model.layers.1.mlp.up_proj.weight"
    path = Path(own.path) / own.checkpoint.files([bent])[0]
    place, data = table_of(path)[bent], bytearray(path.read_bytes())
    data[place.start + place.size // 2] ^= 1
    path.write_bytes(data)
    policy = SitePolicy(SiteSpec(), own, head=True)
    if cut == 1:  # the block is the server's
        policy.check_join(cut, manifest_of(sharded), tensors_of(sharded))
        with pytest.raises(
            ForbiddenError, match=rf"tensor {bent} of the base model here is not the server's"
        ):
            policy.check_move(2)
    else:
        with pytest.raises(
            ForbiddenError, match=rf"tensor {bent} of the base model here is not the server's"
        ):
            policy.check_join(cut, manifest_of(sharded), tensors_of(sharded))


def test_a_site_that_reads_parts_of_a_hub_model_checks_them_without_the_rest(sharded, tmp_path, monkeypatch):
    with running("owner/tiny", Path(sharded.path)) as hub:
        visit(hub, tmp_path, monkeypatch)
        own = replace(sharded, checkpoint=on_hub("owner/tiny", sharded.checkpoint.prefixes))
        policy, files = SitePolicy(SiteSpec(), own, head=True), set(files_at(sharded, 1))
        policy.check_join(1, manifest_of(sharded), tensors_of(sharded))
        assert {file for file in hub.asked if file.endswith(".safetensors")} < files
        downloaded = tmp_path / "hub-cache" / "models--owner--tiny"
        assert not list(downloaded.rglob("*.safetensors"))
        assert manifest_of(own) == manifest_of(sharded)  # published by the hub, with nothing downloaded whole
        assert not list(downloaded.rglob("*.safetensors"))
        policy.check_join(1, manifest_of(sharded))  # a server of an earlier version: file by file
        assert {path.name for path in downloaded.rglob("*.safetensors")} == files - {"config.json"}
        policy.check_move(2)
        hub.sent.clear()
        assert own.checkpoint.read(names_at(own, 2)).keys() == set(names_at(own, 2))
        assert not hub.sent  # a file that is here whole is read from there


def test_equal_bytes_of_another_type_or_shape_are_another_tensor(sharded, tmp_path):
    names = names_at(sharded, 1)
    name = next(one for one in names if one.endswith("q_proj.weight"))  # 32 by 32
    tensor = sharded.checkpoint.read([name])[name]
    for number, other in enumerate((tensor.view(16, 64), tensor.view(torch.int32))):
        folder = tmp_path / str(number)
        own = site_with(sharded, folder, names)
        save_file({**own.checkpoint.read(names), name: other}, folder / "model.safetensors")
        with pytest.raises(ForbiddenError, match=f"tensor {name} .* is not the server's"):
            verify_tensors(own, names, tensors_of(sharded), None)


def test_a_site_may_trust_tensors_or_files(sharded):
    tensors, names = tensors_of(sharded), names_at(sharded, 1)
    by_name = {one.name: one.sha256 for one in tensors}
    assert verify_tensors(sharded, names, tensors, by_name) == []
    assert verify_tensors(sharded, names, tensors, None) == []
    assert verify_tensors(sharded, names, tensors, {"model.safetensors": "0" * 64}) == names  # file by file
    with pytest.raises(ForbiddenError, match=rf"{names[0]} .* trusts 000000000000... there"):
        verify_tensors(sharded, names, tensors, {**by_name, names[0]: "0" * 64})
    policy = SitePolicy(SiteSpec.model_validate({"model": {"trusted": by_name}}), sharded, head=True)
    with pytest.raises(ForbiddenError, match=r"config\.json .* does not list it"):
        policy.check_join(1, manifest_of(sharded), tensors)


def test_a_model_of_very_many_tensors_is_compared_by_file(sharded, monkeypatch):
    monkeypatch.setattr("splitft.deploy.manifest.MOST_TENSORS", 3)
    assert tensors_of(sharded) == ()


def test_the_most_tensors_that_a_manifest_lists_fit_into_a_message():
    name = "model.layers.{}.block_sparse_moe.experts.127.up_proj.weight"
    tensors = tuple(BaseTensor(name.format(number), 2**40, "f" * 64) for number in range(MOST_TENSORS))
    join = Join(round=1, cut=1, steps=0, tensors=tensors)
    serializer = MessageSerializer(32, torch.float32, torch.float32, WireSpec(hidden="fp32", gradient="fp32"))
    assert serializer.from_bytes(serializer.to_bytes(join)).tensors == tensors
    assert "tensors" not in serializer.pack(Join(round=1, cut=1, steps=0)).fields  # as before there were any


# --- the tokenizer --------------------------------------------------------------------------------


@pytest.fixture
def two_models(tiny_llama, tmp_path):
    """The same model and tokenizer on the server and on a site."""
    models = []
    for side in ("server", "site"):
        shutil.copytree(tiny_llama, tmp_path / side)
        models.append(open_model(ModelSpec(name=str(tmp_path / side), dtype="float32")))
    return models


def changed(folder, name, change):
    path = Path(folder) / name
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content, indent=7), encoding="utf-8")


def another_token(content):
    vocabulary = content["model"]["vocab"]
    first, second = list(vocabulary)[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]


def test_the_tokenizer_is_a_part_of_the_manifest(two_models):
    server, site = two_models
    manifest = manifest_of(server)
    assert {"tokenizer.json", "tokenizer_config.json"} <= {one.name for one in manifest}
    verify_tokenizer(site, manifest)


def test_a_tokenizer_that_numbers_two_tokens_differently_is_named(two_models):
    server, site = two_models
    changed(site.path, "tokenizer.json", another_token)
    with pytest.raises(ForbiddenError, match=r"tokenizer\.json of the tokenizer here is not the server's"):
        verify_tokenizer(site, manifest_of(server))
    policy = SitePolicy(SiteSpec(), site, head=True)
    with pytest.raises(ForbiddenError, match=r"tokenizer\.json"):
        policy.check_join(1, manifest_of(server))


def test_another_end_of_text_is_another_tokenizer(two_models):
    server, site = two_models
    changed(site.path, "tokenizer_config.json", lambda content: content.update(eos_token="the"))
    with pytest.raises(ForbiddenError, match=r"tokenizer_config\.json"):
        verify_tokenizer(site, manifest_of(server))


def test_the_same_tokenizer_in_another_spelling_is_the_same(two_models):
    server, site = two_models
    changed(
        site.path, "tokenizer.json", lambda content: content.update(truncation={"max_length": 5}, version="9")
    )
    changed(
        site.path,
        "tokenizer_config.json",
        lambda content: content.update(name_or_path="/x", model_max_length=7),
    )
    verify_tokenizer(site, manifest_of(server))


def test_a_site_without_the_servers_vocabulary_is_told_so(two_models):
    server, site = two_models
    manifest = manifest_of(server)
    (Path(site.path) / "tokenizer.json").rename(Path(site.path) / "vocab.json")
    with pytest.raises(ForbiddenError, match=r"is in tokenizer\.json.* this site's in vocab\.json"):
        verify_tokenizer(site, manifest)


def test_a_server_without_a_tokenizer_is_not_compared(two_models, caplog):
    server, site = two_models
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (Path(server.path) / name).unlink(missing_ok=True)
    verify_tokenizer(site, manifest_of(server))
    assert "no tokenizer to compare" in caplog.text


@needs_bitsandbytes
def test_a_site_whose_bitsandbytes_rounds_otherwise_would_hold_another_base(sharded, monkeypatch):
    spec = sharded.spec.model_copy(update={"quantize": "nf4", "embedding": "int8"})
    model = open_model(spec)
    manifest, names = tensors_of(model), names_at(model, 2)
    assert {one.name for one in manifest if ":" in one.name} == {"quantizer:nf4", "quantizer:int8"}
    assert verify_tensors(model, names, manifest, None) == []
    monkeypatch.setattr(quantized_weights, "BLOCK", 128)
    with pytest.raises(ForbiddenError, match="nf4 weights are rounded otherwise here than on the server"):
        verify_tensors(model, names, manifest, None)
    assert verify_tensors(sharded, names, manifest, None) == []  # full weights need no quantizer
    assert not any(":" in one.name for one in tensors_of(sharded))
