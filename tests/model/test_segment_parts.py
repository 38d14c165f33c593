"""What a segment holds, and what it gives back."""

from __future__ import annotations

import gc
import shutil
import weakref
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from splitft.adapters import attach, initial_state
from splitft.errors import ModelError
from splitft.geometry import Span
from splitft.model import Segment, open_model
from splitft.model.anatomy import locate
from splitft.specs import ModelSpec
from tiny import tiny_model

BLOCKS = 4
TOKENS = torch.arange(1, 13).view(2, 6)


def _segment(folder, span: Span, **parts: bool) -> Segment:
    return open_model(ModelSpec(name=str(folder), dtype="float32")).segment(span, **parts)


def _sizes(folder) -> tuple[list[int], int, int]:
    """Parameters by block, of the embedding with its positions, and of the head, counted in the file."""
    tensors = load_file(folder / "model.safetensors")
    blocks, embedding, head = [0] * BLOCKS, 0, 0
    for name, tensor in tensors.items():
        parts = name.split(".")
        numbers = [part for part in parts if part.isdigit()]
        if numbers:
            blocks[int(numbers[0])] += tensor.numel()
        elif {"embed_tokens", "wte", "wpe", "embed_in", "word_embeddings", "embed_positions"} & set(parts):
            embedding += tensor.numel()
        else:
            head += tensor.numel()
    return blocks, embedding, head


@torch.no_grad()
def test_a_segment_holds_its_parts_and_no_other_before_and_after_running(tiny_folders, family):
    folder = tiny_folders[family]
    blocks, embedding, head = _sizes(folder)
    client = _segment(folder, Span(0, 2), embedding=True)
    middle = _segment(folder, Span(1, 4))
    for _ in range(2):
        assert client.parameter_count() == embedding + sum(blocks[:2])
        assert middle.parameter_count() == sum(blocks[1:])
        middle.run(client.run(client.run(TOKENS, Span(0, 1)), Span(1, 2)), Span(2, 4))
    whole = _segment(folder, Span(0, 4), embedding=True, head=True)
    whole.logits(whole.run(TOKENS)[0])
    assert whole.parameter_count() == embedding + head + sum(blocks)  # a tied matrix once


@torch.no_grad()
def test_a_tied_head_alone_holds_the_matrix_once(tiny_folders):
    _, embedding, norm = _sizes(tiny_folders["gemma"])
    head = _segment(tiny_folders["gemma"], Span(4, 4), head=True)
    assert head.parameter_count() == embedding + norm
    assert head.logits(torch.zeros(3, 32)).shape == (3, 272)


def _held(segment: Segment) -> set[int]:
    """Blocks that have any tensor in memory; raises if one is there in part."""
    found = set()
    for index, block in enumerate(segment.blocks):
        meta = {parameter.is_meta for parameter in block.parameters()}
        assert len(meta) == 1
        if meta == {False}:
            found.add(index)
    return found


SPANS = st.tuples(st.integers(0, BLOCKS), st.integers(0, BLOCKS)).map(lambda ends: Span(min(ends), max(ends)))


@given(spans=st.lists(SPANS, min_size=2, max_size=5))
def test_after_any_resizing_the_span_is_held_and_runs_as_if_freshly_read(tiny_llama, spans):
    blocks, _, _ = _sizes(tiny_llama)
    segment = _segment(tiny_llama, spans[0])
    for before, span in pairwise(spans):
        read = segment.resize(span)
        assert read == 4 * sum(blocks[block] for block in set(span) - set(before))
        assert _held(segment) == set(span)
    hidden = torch.randn(2, 6, 32, generator=torch.manual_seed(0))
    fresh = _segment(tiny_llama, spans[-1])
    with torch.no_grad():
        assert torch.equal(segment.run(hidden), fresh.run(hidden))
    assert segment.parameter_count() == fresh.parameter_count()


def test_a_freed_blocks_weights_leave_the_memory(tmp_path, tiny_llama):
    own = shutil.copytree(tiny_llama, tmp_path / "own")  # whose weights nobody else holds
    segment = _segment(own, Span(0, 3), embedding=True)
    segment.run(TOKENS)
    freed = [weakref.ref(parameter) for block in segment.blocks[1:3] for parameter in block.parameters()]
    segment.resize(Span(0, 1))
    gc.collect()
    assert freed
    assert all(ref() is None for ref in freed)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neo"])
def test_adapters_and_base_weights_come_and_go_apart(tiny_folders, family):
    segment = _segment(tiny_folders[family], Span(0, 1), embedding=True)
    count = segment.parameter_count()
    bank = attach(segment.blocks, "all-linear", 1.0, torch.float32)
    state = initial_state(bank.sizes, dict.fromkeys(range(BLOCKS), 2), 0, torch.float32)
    bank.put("one", state)
    assert segment.parameter_count() == count
    segment.resize(Span(0, BLOCKS))
    with bank.routed([("one", 2)]):
        found = segment.run(TOKENS)
    assert torch.equal(found, _segment(tiny_folders[family], Span(0, BLOCKS), embedding=True).run(TOKENS))
    segment.resize(Span(0, 1))
    assert segment.parameter_count() == count
    assert len(bank.take("one")) == len(state)


def test_nothing_of_the_base_model_is_trainable_and_dropout_is_off(tiny_folders):
    """GPT-2 drops out by default; a segment gives the same twice."""
    segment = _segment(tiny_folders["gpt2"], Span(0, BLOCKS), embedding=True)
    assert not segment.run(TOKENS).requires_grad
    assert torch.equal(segment.run(TOKENS), segment.run(TOKENS))


@pytest.mark.parametrize("family", ["llama", "opt", "gpt_neox"])
def test_a_family_that_hides_a_part_is_refused_by_the_name_of_the_part(tiny_folders, family, monkeypatch):
    from transformers import AutoModelForCausalLM

    whole = AutoModelForCausalLM.from_pretrained(tiny_folders[family])
    assert len(locate(whole).block_list()) == BLOCKS
    monkeypatch.setattr(type(whole), "get_output_embeddings", lambda _: None)
    with pytest.raises(ModelError, match=rf"family '{family}'.* for an output matrix; it holds"):
        locate(whole)


def test_an_adapter_inside_a_model_folder_does_not_disturb(tmp_path):
    folder = tiny_model(tmp_path, "llama")
    (folder / "adapter_model.safetensors").write_bytes(b"not read")
    assert _segment(folder, Span(0, 1)).parameter_count() > 0
