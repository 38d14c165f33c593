"""The benchmark of a large model: the shards that a client opens, and what is said without a GPU."""

from __future__ import annotations

import sys

import pytest

import gpu
from client_memory import client_step
from large_model import CUT, SHARDS, OpenedFiles, client_shards
from random_checkpoint import SMALL, random_checkpoint
from splitft.model import open_model
from splitft.specs import ModelSpec

linux = pytest.mark.skipif(sys.platform != "linux", reason="inotify is Linux's")


@linux
def test_the_kernel_names_the_files_that_are_opened_and_no_other(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).write_text(name)
    opened = OpenedFiles(tmp_path)
    assert opened.names() == set()
    (tmp_path / "two").read_text()
    assert opened.names() == {"two"}


@linux
def test_a_client_opens_the_shards_of_its_blocks_and_head_alone(tmp_path):
    parameters = random_checkpoint(tmp_path / "model", SMALL, SHARDS, "float32")
    assert parameters == 2 * 1000 * 128 + 128 + 8 * (2 * 128**2 + 2 * 128 * 64 + 3 * 128 * 512 + 2 * 128)
    model = open_model(ModelSpec(name=str(tmp_path / "model"), dtype="float32"))
    own, every = client_shards(model), set(model.checkpoint.files(dict(model.skeleton().named_parameters())))
    assert len(every) == SHARDS
    assert own < every
    opened = OpenedFiles(tmp_path / "model")
    client_step(model, CUT, "client", seed=0)
    assert {name for name in opened.names() if name.endswith(".safetensors")} == own


def test_without_a_cuda_device_the_gpu_benchmark_says_what_to_do(monkeypatch):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    with pytest.raises(SystemExit, match=r"finds none here: devices.server: .*--device cpu --quick"):
        gpu.main(["--device", "cuda"])
