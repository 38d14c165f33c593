"""Rounding is part of the forward pass and not of the backward one, as in the unsplit model so changed."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from laws.federations import federation, write_text
from splitft.codecs import CodecContext, codec_of
from splitft.model import pack, pad, pick
from splitft.protocol import RoundStart
from splitft.protocol.channel import Channel

CUT = 2


@pytest.mark.parametrize("codec", ["int8", "int4", "fp8"])
def test_a_rounded_step_is_that_of_the_unsplit_model_rounded_straight_through(tiny_llama, tmp_path, codec):
    text = write_text(tmp_path / "notes.jsonl", examples=12)
    wire = {"hidden": codec, "gradient": "fp32", "adapter": "fp32"}
    prepared = federation(tiny_llama, text, [CUT], model={"dtype": "float32"}, wire=wire)
    client, server, state = prepared.clients[0], prepared.server, prepared.initial()
    server.place(state.cuts)
    server.start(1, [client.name], state.adapters)
    client.start(RoundStart(round=1, cut=CUT))
    line = Channel(client.name, prepared.serializer)
    sent = line.up(client.forward())
    graded = client.head(line.down(server.forward([sent])[client.name]))
    reply = line.down(server.backward([line.up(graded)])[client.name])

    loss, gradient = _unsplit(tiny_llama, client.setup.stream.batch(0), sent.labelled, codec_of(codec))
    assert graded.loss == pytest.approx(loss, rel=1e-4)
    exact_loss, _ = _unsplit(tiny_llama, client.setup.stream.batch(0), sent.labelled, codec_of("fp32"))
    assert abs(graded.loss - loss) < 0.1 * abs(graded.loss - exact_loss)
    scale = gradient.abs().max()
    torch.testing.assert_close(reply.gradient / scale, gradient / scale, rtol=0, atol=5e-3)


def _unsplit(folder, batch, labelled, codec):
    """Mean loss and its gradient at the input of block CUT (N, D), with both hidden states rounded there."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    caught = {}

    def rounded(rows):
        passage = CodecContext("hidden")
        return codec.decode(codec.encode(rows, passage), torch.float32, passage)

    def at_cut(module, args, kwargs):
        hidden = args[0]
        hidden.retain_grad()
        caught["hidden"] = hidden
        exact = pack(hidden, batch.lengths)
        change = pad((rounded(exact) - exact).detach(), batch.lengths)
        return (hidden + change, *args[1:]), kwargs

    def at_head(module, args):
        hidden, exact = args[0], pick(args[0], labelled)
        change = torch.zeros_like(hidden)
        change[batch.positions()] = (rounded(exact) - exact).detach()
        return (hidden + change,)

    model.model.layers[CUT].register_forward_pre_hook(at_cut, with_kwargs=True)
    model.model.norm.register_forward_pre_hook(at_head)
    model.get_input_embeddings().weight.requires_grad_(True)
    mask = (torch.arange(batch.tokens.shape[1]) < torch.tensor(batch.lengths)[:, None]).long()
    logits = model(input_ids=batch.tokens, attention_mask=mask, use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits[batch.positions()], batch.targets())
    loss.backward()
    return float(loss.detach()), pack(caught["hidden"].grad, batch.lengths)
