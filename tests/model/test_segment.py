"""A model run in pieces against the same model run whole by transformers: equal to the last bit."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from splitft.adapters import AdapterBank, attach, initial_state
from splitft.errors import GeometryError, ModelError
from splitft.geometry import Span
from splitft.model import Model, Segment, open_model
from splitft.model.anatomy import locate
from splitft.specs import ModelSpec
from tiny import FAMILIES, VOCAB, tiny_model

BLOCKS = 4
LENGTHS = (12, 9, 4)
"""Real tokens of the three sequences; the longest is longer than any attention window."""


def _model(folder, dtype="float32", attention="sdpa") -> Model:
    return open_model(ModelSpec(name=str(folder), dtype=dtype, attention=attention))


def _whole(folder, attention="sdpa", dtype=torch.float32):
    for attempt in (attention, "eager"):
        try:
            whole = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attempt, dtype=dtype)
        except ValueError:  # a family without sdpa
            continue
        return whole.eval().requires_grad_(False)
    raise AssertionError(f"{folder} cannot be loaded")


def _tokens(padded: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens (B, T), and their mask, which is all ones without padding."""
    tokens = torch.randint(1, VOCAB, (len(LENGTHS), max(LENGTHS)), generator=torch.manual_seed(5))
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    return (tokens * mask, mask) if padded else (tokens, torch.ones_like(mask))


def _halves(model: Model, cut: int) -> tuple[Segment, Segment]:
    return (
        model.segment(Span(0, cut), embedding=True),
        model.segment(Span(cut, model.shape.blocks), head=True),
    )


def _logits(client: Segment, server: Segment, tokens: torch.Tensor) -> torch.Tensor:
    hidden = server.run(client.run(tokens))
    return server.logits(hidden.flatten(0, 1)).unflatten(0, tokens.shape)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
def test_at_every_cut_the_logits_are_those_of_the_whole(tiny_folders, family, attention, padded):
    folder = tiny_folders[family]
    tokens, mask = _tokens(padded)
    whole = _whole(folder, attention)
    expected = whole(tokens, attention_mask=mask.long()).logits if padded else whole(tokens).logits
    model = _model(folder, attention=attention)
    for cut in range(BLOCKS + 1):
        logits = _logits(*_halves(model, cut), tokens)
        if padded:  # with a mask transformers may choose another kernel
            torch.testing.assert_close(logits[mask], expected[mask], rtol=0, atol=1e-5)
        else:
            assert torch.equal(logits, expected), f"cut {cut}"


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("opt", {"word_embed_proj_dim": 16, "do_layer_norm_before": False}),
        ("opt", {"word_embed_proj_dim": 16}),
        ("falcon", {"alibi": True, "new_decoder_architecture": False, "multi_query": True}),
        ("llama", {"tie_word_embeddings": True}),
        ("gpt2", {"tie_word_embeddings": False, "scale_attn_by_inverse_layer_idx": True}),
        ("phi", {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}),
        ("bloom", {"hidden_size": 32, "n_head": 4}),
        ("apertus", {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}),
    ],
)
def test_the_odd_members_of_the_families_are_split_too(tmp_path, family, options):
    """No final norm, projections, alibi, block numbers in a scaling, a norm before block 0, saved buffers."""
    folder = tiny_model(tmp_path, family, **options)
    tokens, _ = _tokens(padded=False)
    model = _model(folder)
    expected = _whole(folder)(tokens).logits
    for cut in range(BLOCKS + 1):
        assert torch.equal(_logits(*_halves(model, cut), tokens), expected), f"cut {cut}"


@torch.no_grad()
@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
def test_a_split_is_exact_in_other_types_too(tiny_folders, family, dtype):
    tokens, _ = _tokens(padded=False)
    client, server = _halves(_model(tiny_folders[family], dtype), 2)
    hidden = client.run(tokens)
    assert hidden.dtype == getattr(torch, dtype)
    expected = _whole(tiny_folders[family], dtype=hidden.dtype)(tokens).logits
    assert torch.equal(_logits(client, server, tokens), expected)


@torch.no_grad()
def test_a_span_may_be_run_in_pieces_in_any_order_of_mounting(tiny_folders, family):
    tokens, _ = _tokens(padded=False)
    whole = _model(tiny_folders[family]).segment(Span(0, BLOCKS), embedding=True, head=True)
    expected = whole.run(tokens)
    for k in range(1, BLOCKS):
        hidden = whole.run(tokens, Span(0, 0))
        for start, stop in ((0, k), (k, k), (k, BLOCKS)):
            hidden = whole.run(hidden, Span(start, stop))
        assert torch.equal(hidden, expected)
    assert torch.equal(whole.run(tokens), expected)


@torch.no_grad()
def test_the_rows_of_a_group_are_what_they_are_alone(tiny_folders, family):
    """An on-ramp: one client joins at block 1, another at block 3, and both leave at the end."""
    server = _model(tiny_folders[family]).segment(Span(1, BLOCKS))
    a, b = torch.randn(2, 7, 32, generator=torch.manual_seed(0)), torch.randn(1, 7, 32)
    joined = server.run(torch.cat([server.run(a, Span(1, 3)), b]), Span(3, BLOCKS))
    alone = torch.cat([server.run(a, Span(1, BLOCKS)), server.run(b, Span(3, BLOCKS))])
    torch.testing.assert_close(joined, alone, rtol=0, atol=1e-5)


@given(
    family=st.sampled_from(FAMILIES),
    cut=st.integers(0, BLOCKS),
    tail=st.integers(0, 5),
    seed=st.integers(0, 9),
)
def test_what_stands_in_the_padding_never_matters(tiny_folders, family, cut, tail, seed):
    tokens = torch.randint(1, VOCAB, (2, 8), generator=torch.manual_seed(seed))
    padded = torch.nn.functional.pad(tokens, (0, tail), value=seed)
    with torch.no_grad():
        segment = _client(tiny_folders[family])
        plain = segment.run(tokens, Span(0, cut))
        torch.testing.assert_close(segment.run(padded, Span(0, cut))[:, :8], plain, rtol=0, atol=1e-5)


@cache
def _client(folder: Path) -> Segment:
    return _model(folder).segment(Span(0, BLOCKS), embedding=True)


def _with_lora(segment: Segment) -> AdapterBank:
    """Factors away from zero on every linear layer, in the one slot."""
    bank = attach(segment.blocks, "all-linear", 0.5, torch.float32)
    state = initial_state(bank.sizes, dict.fromkeys(range(BLOCKS), 3), 0, torch.float32)
    held = state.within(segment.span)
    for (block, _), factors in held.items():
        factors.B.normal_(std=0.1, generator=torch.manual_seed(block))
    bank.put("one", held)
    return bank


@pytest.mark.parametrize("cut", range(BLOCKS + 1))
def test_a_split_model_has_the_gradients_of_the_whole(tiny_folders, family, cut):
    """At every factor of every block, and at the embeddings that enter block 0."""
    model, (tokens, _) = _model(tiny_folders[family]), _tokens(padded=False)
    weights = torch.randn(*tokens.shape, VOCAB, generator=torch.manual_seed(1))

    def gradients(client: Segment, server: Segment) -> dict[object, torch.Tensor]:
        banks = [_with_lora(segment) for segment in dict.fromkeys((client, server))]
        with banks[0].routed([("one", len(tokens))]), banks[-1].routed([("one", len(tokens))]):
            entered = client.run(tokens, Span(0, 0)).detach().requires_grad_()
            sent = client.run(entered, Span(0, cut))
            arrived = sent.detach().requires_grad_()  # what travels has no graph
            left = server.run(arrived, Span(cut, BLOCKS))
            (server.logits(left.flatten(0, 1)).unflatten(0, tokens.shape) * weights).sum().backward()
            sent.backward(arrived.grad)
        factors = {key: p.grad for bank in banks for key, p in bank.parameters("one").items()}
        return {"embeddings": entered.grad, **factors}

    whole = model.segment(Span(0, BLOCKS), embedding=True, head=True)
    expected = gradients(whole, whole)
    found = gradients(*_halves(model, cut))
    assert found.keys() == expected.keys()
    assert all(float(gradient.abs().max()) > 0 for gradient in expected.values())
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_the_gradient_of_what_enters_block_0_is_that_of_transformers(tiny_folders, family):
    tokens, _ = _tokens(padded=False)
    weights = torch.randn(*tokens.shape, VOCAB, generator=torch.manual_seed(1))
    whole, seen = _whole(tiny_folders[family]), []
    locate(whole).block_list()[0].register_forward_pre_hook(lambda _, x: seen.append(x[0].requires_grad_()))
    (expected,) = torch.autograd.grad((whole(tokens).logits * weights).sum(), seen)
    client, server = _halves(_model(tiny_folders[family]), 2)
    entered = client.run(tokens, Span(0, 0)).requires_grad_()
    logits = server.logits(server.run(client.run(entered)).flatten(0, 1)).unflatten(0, tokens.shape)
    (found,) = torch.autograd.grad((logits * weights).sum(), entered)
    # equal but for gpt_neo, where the head's backward sums in another order
    assert float((found - expected).norm() / expected.norm()) < 2e-6


def test_what_a_segment_does_not_hold_it_does_not_run(tiny_llama):
    tokens, _ = _tokens(padded=False)
    client, server = _halves(_model(tiny_llama), 2)
    hidden = torch.zeros(1, 3, 32)
    with pytest.raises(GeometryError, match="token ids cannot enter at block 2"):
        server.run(tokens)
    with pytest.raises(GeometryError, match=r"a segment that holds .* cannot run blocks"):
        client.run(hidden, Span(1, 3))
    with pytest.raises(GeometryError, match="without the head"):
        client.logits(hidden[0])
    with pytest.raises(GeometryError, match="4 blocks"):
        server.resize(Span(2, 5))


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("granite", {"embedding_multiplier": 3.0}),
        ("nanochat", {}),
        ("mamba", {"hidden_size": 32, "state_size": 4}),
    ],
)
def test_a_family_that_acts_outside_its_blocks_is_refused_and_never_run_wrong(tmp_path, family, options):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    folder = tiny_model(tmp_path, family, **{**(sizes if family != "mamba" else {}), **options})
    with pytest.raises(ModelError, match=f"family '{family}' cannot"):
        _model(folder).segment(Span(1, BLOCKS), head=True)
