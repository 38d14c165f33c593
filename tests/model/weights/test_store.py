"""A tensor is in memory once, while somebody holds it, in each form that is asked for."""

from __future__ import annotations

import gc
import os
import shutil
import threading
import weakref

import pytest
import torch

from splitft.errors import ModelError
from splitft.geometry import Span
from splitft.model import open_model
from splitft.model.weights import PlainWeight, WantedWeight, WeightStore, in_folder
from splitft.model.weights.store import WEIGHTS
from splitft.specs import ModelSpec

CPU = torch.device("cpu")
NAMES = [f"model.layers.{block}.mlp.up_proj.weight" for block in range(2)]


@pytest.fixture
def folder(tmp_path, tiny_llama):
    """A model of this test's own, which no other holds."""
    return shutil.copytree(tiny_llama, tmp_path / "own")


def taken(store, folder, dtype=torch.float32, names=tuple(NAMES), read=None):
    checkpoint = in_folder(folder)
    origins, shape = checkpoint.origins(names), torch.Size((48, 32))
    wanted = {name: WantedWeight(origins[name], shape, PlainWeight(dtype, CPU)) for name in names}
    return store.take(wanted, read or checkpoint.read)


def test_a_tensor_is_read_once_for_all_who_hold_it(folder):
    store, read = WeightStore(), []

    def listening(names):
        read.extend(names)
        return in_folder(folder).read(names)

    first = taken(store, folder, names=NAMES[:1], read=listening)
    second = taken(store, folder, read=listening)
    assert read == NAMES
    assert first[NAMES[0]] is second[NAMES[0]]
    assert torch.equal(second[NAMES[1]], in_folder(folder).read(NAMES)[NAMES[1]])


def test_it_is_freed_with_its_last_holder(folder):
    store = WeightStore()
    first, second = taken(store, folder, torch.float64), taken(store, folder, torch.float64)
    gone = weakref.ref(first[NAMES[0]])
    del first
    gc.collect()
    assert gone() is not None
    assert len(store) == 2
    del second
    gc.collect()
    assert gone() is None
    assert len(store) == 0
    assert taken(store, folder)  # and can be read again


def test_a_tensor_that_a_gradient_needs_is_kept_and_found(folder):
    store = WeightStore()
    held = taken(store, folder, names=NAMES[:1])
    x = torch.ones(1, 32, requires_grad=True)
    y = x @ held.pop(NAMES[0]).T
    gc.collect()
    again = taken(store, folder, names=NAMES[:1])[NAMES[0]]
    y.sum().backward()
    assert torch.allclose(x.grad, again.sum(0, keepdim=True))


def test_other_types_and_devices_are_held_apart(folder):
    store = WeightStore()
    single, double = taken(store, folder), taken(store, folder, torch.float64)
    assert single[NAMES[0]].dtype == torch.float32
    assert double[NAMES[0]].dtype == torch.float64
    assert len(store) == 4
    forms = {PlainWeight(torch.float32, torch.device(name)) for name in ("cpu", "meta", "cuda:0", "cuda:1")}
    assert len(forms) == 4


def test_a_file_that_was_changed_is_read_anew(folder):
    store, path = WeightStore(), folder / "model.safetensors"
    first = taken(store, folder, torch.float64)
    data, times = bytearray(path.read_bytes()), path.stat()
    data[-4:] = bytes(4)
    (folder / "new").write_bytes(data)
    os.replace(folder / "new", path)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert taken(store, folder, torch.float64)[NAMES[0]] is not first[NAMES[0]]


def test_a_tensor_that_was_written_in_place_is_not_given_to_others(folder):
    store = WeightStore()
    first = taken(store, folder)
    with torch.no_grad():
        first[NAMES[0]].mul_(2)
    with pytest.raises(ModelError, match=rf"{NAMES[0]} was written in place"):
        taken(store, folder)


def test_weights_that_were_first_read_for_inference_can_be_trained_on(folder):
    store = WeightStore()
    with torch.inference_mode():
        held = taken(store, folder, torch.float64)
    x = torch.ones(1, 32, dtype=torch.float64, requires_grad=True)
    (x @ held[NAMES[0]].T).sum().backward()
    assert x.grad.abs().sum() > 0
    assert taken(store, folder, torch.float64)[NAMES[0]] is held[NAMES[0]]


def test_threads_that_need_a_tensor_at_once_hold_one(folder):
    store, read, all_there = WeightStore(), [], threading.Barrier(8)
    found = []

    def reading(names):
        read.extend(names)
        return in_folder(folder).read(names)

    def take():
        all_there.wait()
        found.append(taken(store, folder, torch.float64, read=reading))

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(read) == NAMES
    assert len({id(one[NAMES[0]]) for one in found}) == 1


def test_a_tensor_that_cannot_be_read_leaves_the_store_as_it_was(folder):
    store = WeightStore()
    first = taken(store, folder, names=NAMES[:1])

    def failing(names):
        raise ModelError("the disk is gone")

    with pytest.raises(ModelError, match="the disk is gone"):
        taken(store, folder, read=failing)
    assert len(store) == 1
    assert taken(store, folder)[NAMES[0]] is first[NAMES[0]]


def test_segments_of_models_that_were_opened_apart_share_weights(folder):
    gc.collect()
    others = len(WEIGHTS)
    spec = ModelSpec(name=str(folder), dtype="float64")
    one = open_model(spec).segment(Span(0, 2), embedding=True, head=True)
    held = len(WEIGHTS)
    other = open_model(spec).segment(Span(0, 2), embedding=True, head=True)
    assert len(WEIGHTS) == held > others
    for mine, theirs in zip(one.blocks[0].parameters(), other.blocks[0].parameters(), strict=True):
        assert mine is theirs
    other.resize(Span(0, 1))
    with torch.no_grad():
        assert one.run(torch.arange(4)[None]).isfinite().all()
    assert not any(parameter.is_meta for parameter in one.blocks[1].parameters())
