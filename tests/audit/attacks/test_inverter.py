"""Inverters read what a linear map has hidden, and the transformer adds what the context did."""

from __future__ import annotations

import torch

from splitft.audit.attacks.inverter import InverterTraining, fit_context, fit_linear, nearest_embedding, read

VOCAB, WIDTH = 60, 16


def world(seed: int, texts: int, length: int = 12) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Embeddings, tokens, and hidden states that mix each token's with the one before by a fixed map."""
    fixed = torch.Generator().manual_seed(99)
    embedding = torch.randn(VOCAB, WIDTH, generator=fixed)
    turn = torch.randn(WIDTH, WIDTH, generator=fixed)
    tokens = torch.randint(VOCAB, (texts, length), generator=torch.Generator().manual_seed(seed))
    vectors = embedding[tokens]
    before = torch.cat([torch.zeros_like(vectors[:, :1]), vectors[:, :-1]], 1)
    return embedding, tokens, (vectors + 2.0 * before) @ turn


def right(read_tokens: list[list[int]], tokens: torch.Tensor) -> float:
    return float((torch.tensor(read_tokens) == tokens).float().mean())


def test_a_linear_inverter_reads_tokens_it_never_saw():
    embedding, tokens, _ = world(0, 40)
    hidden = embedding[tokens] @ torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(3))
    common = tokens < VOCAB // 2
    inverter = fit_linear(hidden[common], tokens[common], embedding)
    rare = (~common).nonzero()
    guessed = inverter.logits(hidden[~common]).argmax(-1)
    assert len(rare) > 100
    assert bool((guessed == tokens[~common]).all())


def test_a_transformer_undoes_the_context_that_a_linear_map_cannot():
    embedding, tokens, hidden = world(0, 120)
    linear = fit_linear(hidden.flatten(0, 1), tokens.flatten(), embedding)
    generator = torch.Generator().manual_seed(0)
    training = InverterTraining(steps=60, lr=5e-3, batch=16, width=64)
    context = fit_context(linear, hidden, tokens, generator, training=training)
    _, private, seen = world(1, 20)
    by_linear = right(read([linear.logits(one) for one in seen]), private)
    by_context = right(read([context.logits(one) for one in seen]), private)
    assert by_context > by_linear + 0.2


def test_noise_of_known_size_is_counted_in():
    embedding, tokens, _ = world(0, 40)
    uneven = torch.logspace(-2, 1, WIDTH)  # noise of size 1 drowns some directions and not others
    clean = embedding[tokens] * uneven
    noisy = clean + torch.randn(clean.shape, generator=torch.Generator().manual_seed(1))

    def score(deviation: float) -> float:
        inverter = fit_linear(clean.flatten(0, 1), tokens.flatten(), embedding, deviation)
        return right(read([inverter.logits(rows) for rows in noisy]), tokens)

    assert score(1.0) > score(0.0) + 0.1


def test_the_nearest_embedding_is_found_where_nothing_is_done_to_it():
    embedding, tokens, _ = world(0, 4)
    assert (
        right(read([nearest_embedding(embedding, 2.5 * rows) for rows in embedding[tokens]]), tokens) == 1.0
    )
