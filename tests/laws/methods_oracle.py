"""The field's methods as plain loops over one whole model: no split, no messages, no code of splitft.

    start (A, B by layer), batches[round][client][step]  --a loop--> factors after the last round

LoRA is a hook on each adapted linear layer; AdamW is torch's. A "client's blocks" are nothing but the layers
whose factors it has for itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

Layer = tuple[int, str]
Factors = dict[Layer, tuple[torch.Tensor, torch.Tensor]]
"""(A, B) by block and target."""
Batch = tuple[torch.Tensor, torch.Tensor]
"""Right-padded token ids (B, T), and the same with -100 where there is no loss."""
Batches = Sequence[Sequence[Sequence[Batch]]]
Order = Sequence[tuple[int, bool]]
"""Clients whose step begins (True) or completes (False), in order."""


class Whole:
    """One model in float64, run with whatever factors are given."""

    def __init__(self, folder: Path, scale: float) -> None:
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
        self.model.requires_grad_(False)
        self._scale, self._factors = scale, Factors()
        for index, block in enumerate(self.model.model.layers):
            for name, module in block.named_modules():
                module.register_forward_hook(self._hook((index, name)))

    def _hook(self, layer: Layer) -> Any:
        def add(module: Any, inputs: Any, output: torch.Tensor) -> Any:
            if layer not in self._factors:
                return None
            A, B = self._factors[layer]
            return output + self._scale * (inputs[0] @ A.T) @ B.T

        return add

    def loss(self, factors: Factors, batch: Batch) -> torch.Tensor:
        """Mean loss over labelled tokens."""
        self._factors = factors
        ids, labels = batch
        positions = torch.arange(ids.shape[1]).expand_as(ids)
        lengths = torch.where(labels != -100, positions, -1).max(1).values + 1
        mask = (positions < lengths[:, None]).long()
        return self.model(input_ids=ids, attention_mask=mask, labels=labels).loss


def alone(whole: Whole, start: Factors, steps: Sequence[Batch], lr: float) -> Factors:
    """Ordinary fine-tuning with one optimizer: in one place, at one client, or handed through all."""
    own = _leaves(start)
    optimizer = _adam(own, lr)
    for batch in steps:
        _step(optimizer, whole.loss(own, batch))
    return _detached(own)


def averaged(whole: Whole, start: Factors, batches: Batches, lr: float) -> Factors:
    """FedAvg of A and of B: whole models at clients, or a server's copy for each."""
    for clients in batches:
        trained = [(_tokens(steps), alone(whole, start, steps, lr)) for steps in clients]
        start = _mean(trained)
    return start


def averaged_products(
    whole: Whole, start: Factors, batches: Batches, lr: float, ranks: Sequence[Mapping[int, int]]
) -> Factors:
    """The mean of B A by full singular value decomposition; `ranks` by client and block."""

    for clients in batches:
        starts = [_cut_down(start, own) for own in ranks]
        trained = [
            (_tokens(steps), alone(whole, one, steps, lr)) for steps, one in zip(clients, starts, strict=True)
        ]
        start = Factors({layer: _united_products(trained, layer) for layer in start})
    return start


def _united_products(
    trained: Sequence[tuple[int, Factors]], layer: Layer
) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors of the mean product cut down to the largest rank, near the mean of the rows of A."""
    total = sum(tokens for tokens, _ in trained)
    mean = sum(tokens / total * (one[layer][1] @ one[layer][0]) for tokens, one in trained)
    rows = []
    for row in range(max(len(one[layer][0]) for _, one in trained)):
        having = [(tokens, one[layer][0][row]) for tokens, one in trained if row < len(one[layer][0])]
        rows.append(sum(tokens * A for tokens, A in having) / sum(tokens for tokens, _ in having))
    return _near(mean, torch.stack(rows))


def _near(product: torch.Tensor, frame: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A = clamped(frame V) V^T, and B from the product by the pseudo-inverse of A."""
    _, S, Vh = torch.linalg.svd(product, full_matrices=False)
    rank = min(len(frame), int((S[0] * torch.finfo(torch.float64).eps < S).sum()))
    u, s, vh = torch.linalg.svd(frame[:rank] @ Vh[:rank].T)
    A = u @ torch.diag(torch.clamp(s, min=0.3 / math.sqrt(3))) @ vh @ Vh[:rank]
    return A, product @ torch.linalg.pinv(A)


def _cut_down(factors: Factors, ranks: Mapping[int, int]) -> Factors:
    """To a client's ranks; nothing is decomposed before the first round, when B is 0."""
    return {
        (block, name): _near(B @ A, A[: ranks[block]]) if B.any() and len(A) > ranks[block]
        else (A[: ranks[block]], B[:, : ranks[block]])
        for (block, name), (A, B) in factors.items()
    }  # fmt: skip


def client_by_client(
    whole: Whole, start: Factors, batches: Batches, lr: float, cut: int, orders: Mapping[tuple[int, int], Any]
) -> Factors:
    """SplitFed v2: the server's factors step after each client's batch; `orders` by (round, step)."""
    for number, clients in enumerate(batches):
        server = _leaves(_deeper(start, cut))
        at_server = _adam(server, lr)
        own = [_leaves(_shallower(start, cut)) for _ in clients]
        at_clients = [_adam(one, lr) for one in own]
        for step in range(len(clients[0])):
            for client in orders[number, step]:
                loss = whole.loss({**own[client], **server}, clients[client][step])
                _step(at_server, loss, at_clients[client])
        mean = _mean([(_tokens(steps), _detached(one)) for steps, one in zip(clients, own, strict=True)])
        start = {**mean, **_detached(server)}
    return start


def by_arrival(
    whole: Whole,
    start: Factors,
    batches: Batches,
    lr: float,
    cuts: Sequence[int],
    orders: Sequence[Order],
    rate: Callable[[int], float] = lambda step: 1.0,
) -> Factors:
    """Delayed gradients: a step's gradient is of the server's factors as they were when it began.

    `orders` are by round: clients whose step begins (True) or completes (False), in order; `cuts` by client.
    `rate` is the factor of the learning rate at a client's step of the run, on both sides.
    """
    for number, (clients, order) in enumerate(zip(batches, orders, strict=True)):
        server = _leaves(_deeper(start, min(cuts)))
        at_server = _adam(server, lr)
        own = [_leaves(_shallower(start, cut)) for cut in cuts]
        at_clients = [_adam(one, lr) for one in own]
        seen: dict[int, Factors] = {}
        taken = [0 for _ in clients]
        for client, begins in order:
            if begins:
                seen[client] = _leaves(_detached(_deeper(server, cuts[client])))
                continue
            loss = whole.loss({**own[client], **seen[client]}, clients[client][taken[client]])
            loss.backward()
            for optimizer in (at_server, at_clients[client]):
                optimizer.param_groups[0]["lr"] = lr * rate(number * len(clients[client]) + taken[client])
            taken[client] += 1
            at_clients[client].step()
            at_clients[client].zero_grad()
            for layer, pair in seen[client].items():  # given to the factors of today
                for today, old in zip(server[layer], pair, strict=True):
                    today.grad = old.grad
            at_server.step()
            at_server.zero_grad()
        ends = [  # whole models train by themselves
            {**_deeper(_detached(server), cut), **_detached(one)} if count else alone(whole, start, steps, lr)
            for cut, one, count, steps in zip(cuts, own, taken, clients, strict=True)
        ]
        start = _mean([(_tokens(steps), one) for steps, one in zip(clients, ends, strict=True)])
    return start


def all_at_once(whole: Whole, start: Factors, batches: Batches, lr: float, cut: int) -> Factors:
    """SplitLoRA: the server's factors step on the loss of the concatenated batch; moments live on."""
    server = _leaves(_deeper(start, cut))
    at_server = _adam(server, lr)
    own = [_leaves(_shallower(start, cut)) for _ in batches[0]]
    at_clients = [_adam(one, lr) for one in own]
    for clients in batches:
        for step in range(len(clients[0])):
            together = [steps[step] for steps in clients]
            total = sum(_tokens([batch]) for batch in together)
            gradient: dict[Layer, list[torch.Tensor]] = {}
            for one, optimizer, batch in zip(own, at_clients, together, strict=True):
                _step(optimizer, whole.loss({**one, **server}, batch))
                for layer, pair in server.items():  # the loss of one client, for its share of all tokens
                    parts = [tensor.grad * (_tokens([batch]) / total) for tensor in pair]
                    before = gradient.get(layer, [torch.zeros_like(part) for part in parts])
                    gradient[layer] = [old + new for old, new in zip(before, parts, strict=True)]
                at_server.zero_grad()
            for layer, pair in server.items():
                for tensor, grad in zip(pair, gradient[layer], strict=True):
                    tensor.grad = grad
            at_server.step()
            at_server.zero_grad()
        _average(clients, own)
    return {**_detached(own[0]), **_detached(server)}


def public_splitlora(
    folder: Path, scale: float, start: Factors, batches: Batches, lr: float, cut: int
) -> Factors:
    """SplitLoRA's public loop: two models, the server's optimizer steps once a client, in fixed order.

    Each client's hidden states are cut out of its graph; the server steps, then the client goes on from their
    gradient with an optimizer of its own. After each round's steps the clients' adapters are averaged, by
    tokens; no optimizer is ever reset.
    """
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    model.requires_grad_(False)
    server = _leaves(_deeper(start, cut))
    at_server = _adam(server, lr)
    own = [_leaves(_shallower(start, cut)) for _ in batches[0]]
    at_clients = [_adam(one, lr) for one in own]
    blocks = model.model.layers
    for clients in batches:
        for step in range(len(clients[0])):
            for client, optimizer in enumerate(at_clients):
                ids, labels = clients[client][step]
                hidden = _through(model, blocks[:cut], own[client], scale, model.model.embed_tokens(ids))
                received = hidden.clone().detach().requires_grad_(True)
                last = model.model.norm(_through(model, blocks[cut:], server, scale, received))
                logits, targets = model.lm_head(last)[:, :-1], labels[:, 1:]
                loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, ignore_index=-100)
                loss.backward()
                at_server.step()
                at_server.zero_grad()
                hidden.backward(received.grad)
                optimizer.step()
                optimizer.zero_grad()
        _average(clients, own)
    return {**_detached(own[0]), **_detached(server)}


def _average(clients: Any, own: list[Factors]) -> None:
    """Give every client the mean of all clients' factors, weighted by their tokens."""
    mean = _mean([(_tokens(steps), _detached(one)) for steps, one in zip(clients, own, strict=True)])
    for one in own:
        for layer, pair in one.items():
            for tensor, value in zip(pair, mean[layer], strict=True):
                tensor.data.copy_(value)


def _through(model: Any, blocks: Any, factors: Factors, scale: float, hidden: torch.Tensor) -> torch.Tensor:
    """Run these blocks with LoRA on their layers; right padding needs no mask beside the causal one."""
    length = hidden.shape[1]
    positions = torch.arange(length)[None]
    causal = torch.full((length, length), -torch.inf, dtype=hidden.dtype).triu(1)[None, None]
    turned = model.model.rotary_emb(hidden, positions)
    hooks = []
    for (index, name), (A, B) in factors.items():
        module = model.model.layers[index].get_submodule(name)
        hooks.append(module.register_forward_hook(
            lambda module, inputs, output, A=A, B=B: output + scale * (inputs[0] @ A.T) @ B.T
        ))  # fmt: skip
    for block in blocks:
        hidden = block(hidden, attention_mask=causal, position_ids=positions, position_embeddings=turned)
    for hook in hooks:
        hook.remove()
    return hidden


def _leaves(factors: Factors) -> Factors:
    return {layer: tuple(t.clone().requires_grad_() for t in pair) for layer, pair in factors.items()}


def _detached(factors: Factors) -> Factors:
    return {layer: tuple(t.detach().clone() for t in pair) for layer, pair in factors.items()}


def _adam(factors: Factors, lr: float) -> torch.optim.AdamW:
    return torch.optim.AdamW([t for pair in factors.values() for t in pair], lr=lr, weight_decay=0.0)


def _step(optimizer: torch.optim.AdamW, loss: torch.Tensor, other: torch.optim.AdamW | None = None) -> None:
    loss.backward()
    for one in (optimizer, other):
        if one is not None:
            one.step()
            one.zero_grad()


def _tokens(steps: Sequence[Batch]) -> int:
    return sum(int((labels[:, 1:] != -100).sum()) for _, labels in steps)


def _mean(trained: Sequence[tuple[int, Factors]]) -> Factors:
    total = sum(tokens for tokens, _ in trained)
    return {
        layer: tuple(
            sum(tokens / total * factors[layer][place] for tokens, factors in trained) for place in (0, 1)
        )
        for layer in trained[0][1]
    }


def _shallower(factors: Factors, cut: int) -> Factors:
    return {layer: pair for layer, pair in factors.items() if layer[0] < cut}


def _deeper(factors: Factors, cut: int) -> Factors:
    return {layer: pair for layer, pair in factors.items() if layer[0] >= cut}
