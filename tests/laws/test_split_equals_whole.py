"""Client and server together compute the unsplit model's loss and gradients, for every family and cut."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from laws.federations import federation, write_text
from splitft.protocol import CutGradient, LastHidden, RoundStart

FP32 = dict.fromkeys(("hidden", "gradient", "adapter"), "fp32")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "notes.jsonl", examples=12)


@pytest.mark.parametrize("labels", ["client", "server"])
@pytest.mark.parametrize("cut", [1, 2, 3])
def test_one_step_has_the_loss_and_the_gradient_at_the_cut_of_the_unsplit_model(
    family, cut, labels, tiny_folders, text
):
    folder = tiny_folders[family]
    prepared = federation(
        folder, text, [cut], model={"dtype": "float32"}, wire=FP32, split={"labels": labels}
    )
    client, server, state = prepared.clients[0], prepared.server, prepared.initial()
    server.place(state.cuts)
    server.start(1, [client.name], state.adapters)
    client.start(RoundStart(round=1, cut=cut))
    sent = client.forward()
    reply = server.forward([sent])[client.name]
    if isinstance(reply, LastHidden):
        graded = client.head(reply)
        loss = graded.loss
        reply = server.backward([graded])[client.name]
    else:
        loss = reply.loss
    assert isinstance(reply, CutGradient)

    whole_loss, whole_gradient = _unsplit(folder, client.setup.stream.batch(0), cut)
    assert loss == pytest.approx(whole_loss, rel=2e-6)
    scale = whole_gradient.abs().max()
    torch.testing.assert_close(reply.gradient.cpu() / scale, whole_gradient / scale, rtol=0, atol=2e-5)


def _unsplit(folder, batch, cut, dtype=torch.float32):
    """Mean loss, and its gradient at the input of block `cut`, packed (N, D)."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    trunk = model.base_model
    trunk = getattr(trunk, "decoder", trunk)
    blocks = next(getattr(trunk, name) for name in ("layers", "h") if hasattr(trunk, name))
    caught = {}

    def catch(module, args, kwargs):
        hidden = args[0] if args else kwargs["hidden_states"]
        hidden.retain_grad()
        caught["hidden"] = hidden

    blocks[cut].register_forward_pre_hook(catch, with_kwargs=True)
    model.get_input_embeddings().weight.requires_grad_(True)
    mask = (torch.arange(batch.tokens.shape[1]) < torch.tensor(batch.lengths)[:, None]).long()
    logits = model(input_ids=batch.tokens, attention_mask=mask, use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits[batch.positions()], batch.targets())
    loss.backward()
    gradient = caught["hidden"].grad
    rows = [gradient[row, :length] for row, length in enumerate(batch.lengths)]
    return float(loss.detach()), torch.cat(rows)
