"""Defences inside whole runs: on every message that leaves, repeatable, resumable, and told."""

from __future__ import annotations

import json
import math
import re

import pytest
import torch
from transformers import AutoModelForCausalLM

import splitft
from laws.federations import federation, play, write_text
from runs import StoppedError, adapter_bytes, settings_file, stop_at
from splitft.errors import ConfigError
from splitft.model import pack
from splitft.privacy.accounting import row_epsilon, updates_epsilon
from splitft.privacy.dp_fedavg import update_norm
from splitft.privacy.noise import typical_norm
from splitft.protocol import Activations, AdapterUpload, HeadGradient
from splitft.run.setup import public_text
from splitft.tracking.events import PrivacySpent, RoundDone
from splitft.tracking.log import read_events

ROUNDS = {"training": {"rounds": 2, "steps": 2}}
NOISY = {"hidden": {"defence": "gaussian", "noise": 0.5}, "gradient": {"defence": "laplace", "noise": 0.3}}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "notes.jsonl")


def sent(prepared) -> list:
    """Every message that leaves a client, as the server sees it."""
    messages = []

    def tap(client, direction, data):
        if direction == "up":
            messages.append(prepared.serializer.from_bytes(data))

    play(prepared, tap=tap)
    return messages


def test_every_hidden_state_and_gradient_that_leaves_is_clipped_in_training_and_evaluation(tiny_llama, text):
    clip = {
        "hidden": {"defence": "clip", "clip_norm": 0.5},
        "gradient": {"defence": "clip", "clip_norm": 0.1},
    }
    messages = sent(federation(tiny_llama, text, [1, 2], privacy=clip, **ROUNDS))
    hidden = [message for message in messages if isinstance(message, Activations)]
    assert {message.training for message in hidden} == {True, False}
    assert max(float(message.hidden.norm(dim=1).max()) for message in hidden) == pytest.approx(0.5)
    gradients = [message.gradient for message in messages if isinstance(message, HeadGradient)]
    assert gradients
    assert all(float(rows.norm(dim=1).max()) * len(rows) <= 0.1 * (1 + 1e-9) for rows in gradients)


def base_states(folder, batch):
    """Hidden states of the unsplit base model by cut, real tokens only."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    with torch.no_grad():
        states = model(input_ids=batch.tokens, output_hidden_states=True).hidden_states
    return [pack(state, batch.lengths) for state in states]


def test_noise_on_what_leaves_has_the_size_of_the_public_norm(tiny_llama, text):
    noise = 50.0  # so that the rows are little beside it
    noisy = {"hidden": {"defence": "gaussian", "noise": noise}}
    prepared = federation(tiny_llama, text, [2], privacy=noisy, **ROUNDS)
    public = public_text(prepared.config, prepared.model)
    hidden = base_states(tiny_llama, public)[2]
    norm = typical_norm(hidden)
    rows = torch.cat([m.hidden for m in sent(prepared) if isinstance(m, Activations)])
    assert float(rows.std()) == pytest.approx(noise * norm / math.sqrt(rows.shape[1]), rel=0.02)


def test_the_gradient_at_the_cut_passes_through_the_clipping(tiny_llama, text):
    """With hidden states clipped to a tenth of their size, training still follows the true gradient."""
    clip = {"hidden": {"defence": "clip", "clip_norm": 0.2}}
    _, events = play(federation(tiny_llama, text, [2, 3], privacy=clip))
    losses = [event.loss for event in events if event.event == "Evaluated"]
    assert losses[-1] < losses[0]


def test_a_defended_run_repeats_and_resumes_to_the_byte(tiny_llama, tmp_path):
    privacy = {**NOISY, "updates": {"clip_norm": 0.5, "noise_multiplier": 0.1}, "private_blocks": 1}
    options = {"privacy": privacy, "aggregate": {"rule": "zero-pad"}}
    file = settings_file(tmp_path, tiny_llama, **options)
    whole = splitft.train(file, tmp_path / "whole")
    with pytest.raises(StoppedError):
        splitft.train(file, tmp_path / "again", listeners=[stop_at(RoundDone, 3)])
    again = splitft.train(file, tmp_path / "again", resume=True)
    assert adapter_bytes(again.folder) == adapter_bytes(whole.folder)
    for name in ("client-1", "client-2", "client-3"):
        one, other = (run.folder / "personal" / name / "adapter_model.safetensors" for run in (whole, again))
        assert one.read_bytes() == other.read_bytes()
    losses = [json.loads((run.folder / "summary.json").read_text())["eval_loss"] for run in (whole, again)]
    assert losses[0] == losses[1]
    said = whole.summary
    assert len(said["defences"]) == 5
    assert {mean for client in said["clients"] for mean in client["train_loss"]} == {None}
    assert [spent["round"] for spent in said["privacy_spent"]] == [1, 2, 3]
    page = (whole.folder / "report.html").read_text()
    assert "Spent on updates." in page
    assert "local differential privacy" in page
    assert "Losses of training batches are not reported" in page
    assert all(loss is not None for loss in said["eval_loss"])


def test_private_adapters_never_leave_and_differ_between_clients(tiny_llama, text):
    prepared = federation(tiny_llama, text, [2, 3], privacy={"private_blocks": 2}, **ROUNDS)
    before = prepared.initial().adapters
    uploads = [message for message in sent(prepared) if isinstance(message, AdapterUpload)]
    assert {min(upload.adapters.ranks(), default=None) for upload in uploads} == {None, 2}
    one, other = (client.private() for client in prepared.clients)
    assert one.ranks().keys() == other.ranks().keys() == {0, 1}
    assert update_norm(one, other) > 0
    assert update_norm(before.within({0, 1}), one) > 0


def test_blocks_that_are_private_stay_as_they_began_in_the_global_adapter(tiny_llama, text):
    prepared = federation(tiny_llama, text, [2, 3], privacy={"private_blocks": 1}, **ROUNDS)
    before = prepared.initial().adapters
    state, _ = play(prepared)
    assert update_norm(before.within({0}), state.adapters.within({0})) == 0
    assert update_norm(before.within({1, 2, 3}), state.adapters.within({1, 2, 3})) > 0


@pytest.mark.parametrize("rule", ["factors", "zero-pad"])
def test_with_a_bound_on_updates_the_global_adapter_moves_no_further_in_a_round(tiny_llama, text, rule):
    bound = {"updates": {"clip_norm": 0.01}}
    training = {"rounds": 1, "steps": 3}
    aggregate = {"rule": rule}
    prepared = federation(tiny_llama, text, [1, 2, 3], privacy=bound, aggregate=aggregate, training=training)
    before = prepared.initial().adapters
    state, events = play(prepared)
    assert update_norm(before, state.adapters) <= 0.01 * (1 + 1e-9)
    spent = next(event for event in events if isinstance(event, PrivacySpent))
    assert (spent.clipped, spent.epsilon) == (3, math.inf)


def test_a_text_s_epsilon_counts_every_pass_of_the_longest_text(tiny_llama, tmp_path):
    """Laplace epsilons add up: tokens of the longest text, times epochs or evaluations, whichever is more."""
    noise = {"hidden": {"defence": "laplace", "noise": 1e4}}
    for steps, clients in ((1, 1), (60, 1)):
        folder = tmp_path / str(steps)
        folder.mkdir()
        training = {"rounds": 2, "steps": steps}
        file = settings_file(
            folder, tiny_llama, privacy=noise, training=training, clients={"count": clients, "cuts": 1}
        )
        run = splitft.train(file, folder / "run")
        facts = run.summary["clients"][0]
        passes = max(3, math.ceil(2 * steps * 2 / facts["train_examples"]))
        assert passes == (3 if steps == 1 else 7)
        said = run.summary["defences"][0]
        longest = int(re.search(r"a text of (\d+) tokens", said)[1])
        whole = row_epsilon("laplace", 1e4, 32, 1e-5, rows=longest * passes)
        assert f"{whole:,.3g} for a text" in said


def test_each_round_says_what_it_has_cost(tiny_llama, tmp_path):
    updates = {"clip_norm": 0.01, "noise_multiplier": 4.0}
    file = settings_file(tmp_path, tiny_llama, privacy={"updates": updates}, aggregate={"rule": "zero-pad"})
    run = splitft.train(file, tmp_path / "run")
    spent = [event for event in read_events(run.folder / "events.jsonl") if isinstance(event, PrivacySpent)]
    assert [event.epsilon for event in spent] == [updates_epsilon(4.0, n, 1e-5) for n in (1, 2, 3)]
    assert {event.epsilon_of_round for event in spent} == {updates_epsilon(4.0, 1, 1e-5)}
    assert all(event.clipped == 3 for event in spent)
    assert spent[0].deviation == pytest.approx(0.01 * 4 / 3)


def test_what_a_promise_needs_is_asked_for_before_training(tiny_llama, tmp_path):
    cases = {
        "averages products": {"privacy": {"updates": {"clip_norm": 1.0}}},
        "give per-client": {
            "privacy": {"updates": {"clip_norm": 1.0}},
            "aggregate": {"rule": "zero-pad"},
            "split": {"server_adapters": "shared"},
        },
        "a client holds 1 blocks": {"privacy": {"private_blocks": 2}},
        "raise schedule.min_cut": {
            "privacy": {"private_blocks": 2},
            "schedule": {"controller": "makespan"},
        },
        "sends the text itself": {"privacy": NOISY, "split": {"labels": "server"}},
        "hides nothing: give clip_norm": {"privacy": {"updates": {"noise_multiplier": 1.0}}},
        "adds no noise with noise 0": {"privacy": {"hidden": {"defence": "laplace"}}},
    }
    for said, sections in cases.items():
        with pytest.raises(ConfigError, match=said):
            splitft.train(settings_file(tmp_path, tiny_llama, **sections), tmp_path / "run")
    assert not (tmp_path / "run").exists()
