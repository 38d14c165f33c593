"""Of a model on the hub only the bytes of the tensors in use are read, once, whatever breaks meanwhile.

Against an HTTP server on this machine that speaks the hub's protocol.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from model.weights.hub_server import TOKEN, LocalHub, running, visit
from splitft.errors import ModelError
from splitft.model.weights import hub as hub_module
from splitft.model.weights import on_hub, ranges
from splitft.model.weights.checkpoint_files import INDEX, WEIGHTS

REPO = "owner/large-model"
ROWS, WIDTH = 96, 1024
TENSOR_BYTES = 4 * ROWS * WIDTH
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def large_checkpoint(folder: Path, seed: int = 0) -> Path:
    """Two shards of four tensors, far larger than what is read of a file at first."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(seed)
    index = {}
    for number, file in enumerate((FIRST, SECOND)):
        tensors = {
            f"block.{2 * number + one // 2}.{'ab'[one % 2]}": torch.randn(ROWS, WIDTH, generator=generator)
            for one in range(4)
        }
        save_file(tensors, folder / file, metadata={"format": "pt"})
        index.update(dict.fromkeys(tensors, file))
    (folder / INDEX).write_text(json.dumps({"weight_map": index}))
    (folder / "config.json").write_text(json.dumps({"seed": seed}))
    return folder


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The hub, with empty caches on this side."""
    with running(REPO, large_checkpoint(tmp_path / "published")) as hub:
        visit(hub, tmp_path, monkeypatch)
        yield hub


def published(hub: LocalHub) -> dict[str, torch.Tensor]:
    """All tensors, read from the server's own disk."""
    _, folder = hub.folder("main")
    return {name: one for file in (FIRST, SECOND) for name, one in load_file(folder / file).items()}


def assert_equal(found, hub: LocalHub) -> None:
    wanted = published(hub)
    for name, tensor in found.items():
        assert torch.equal(tensor, wanted[name]), name


def tensors_sent(hub: LocalHub, file: str) -> int:
    """Bytes of a file that went out beside its beginning."""
    return sum(one.sent for one in hub.sent if one.file == file and one.start > 0)


def test_only_the_bytes_of_the_tensors_are_read_and_the_other_shard_is_never_opened(hub):
    found = on_hub(REPO).read(["block.0.a", "block.0.b"])
    assert_equal(found, hub)
    assert tensors_sent(hub, FIRST) == 2 * TENSOR_BYTES
    assert SECOND not in hub.asked
    assert len([one for one in hub.sent if one.start > 0]) == 1  # neighbours come in one request
    on_hub(REPO).read(["block.1.b", "block.2.a"])
    assert tensors_sent(hub, FIRST) == 3 * TENSOR_BYTES
    assert tensors_sent(hub, SECOND) == TENSOR_BYTES


def test_a_model_in_one_file_is_read_in_parts_too(hub, tmp_path):
    folder = tmp_path / "single"
    folder.mkdir()
    tensors = {name: one.clone() for name, one in published(hub).items()}
    save_file(tensors, folder / WEIGHTS)
    (folder / "config.json").write_text("{}")
    hub.push(folder)
    checkpoint = on_hub(REPO)
    assert torch.equal(checkpoint.read(["block.3.a"])["block.3.a"], tensors["block.3.a"])
    assert tensors_sent(hub, WEIGHTS) == TENSOR_BYTES
    assert "block.3.b" in checkpoint
    assert "block.4.a" not in checkpoint


def test_what_was_read_is_not_read_again_and_needs_no_connection(hub, monkeypatch):
    names = ["block.0.a", "block.3.b"]
    on_hub(REPO).read(names)
    before = len(hub.sent)
    assert_equal(on_hub(REPO).read(names), hub)
    assert len(hub.sent) == before
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert_equal(on_hub(REPO).read(names), hub)
    with pytest.raises(ModelError, match=rf"{FIRST} is neither in the hub cache nor reachable"):
        on_hub(REPO).read(["block.1.a"])


def test_a_download_that_breaks_goes_on_at_the_byte_where_it_did(hub):
    checkpoint = on_hub(REPO)
    checkpoint.read(["block.1.b"])  # the header is known from now on
    hub.sent.clear()
    hub.breaks = [1000, 300_001, 70_000]
    found = checkpoint.read(["block.0.a", "block.0.b", "block.1.a"])
    assert_equal(found, hub)
    assert sum(one.sent for one in hub.sent) == 3 * TENSOR_BYTES
    for earlier, later in zip(hub.sent, hub.sent[1:], strict=False):
        assert later.start == earlier.start + earlier.sent


def test_a_connection_without_any_byte_is_given_up_and_a_later_start_goes_on(hub):
    checkpoint = on_hub(REPO)
    checkpoint.read(["block.1.b"])
    hub.breaks = [200_000] + [0] * ranges.ATTEMPTS
    with pytest.raises(ModelError, match=rf"{FIRST}: the download broke off 5 times without a byte"):
        checkpoint.read(["block.0.a"])
    hub.sent.clear()
    hub.breaks.clear()
    assert_equal(on_hub(REPO).read(["block.0.a"]), hub)
    assert [one.sent for one in hub.sent] == [TENSOR_BYTES - 200_000]


READING = """
import sys
from splitft.model.weights import on_hub
on_hub(sys.argv[1]).read(sys.argv[2:])
"""


@pytest.mark.fault("a process is killed while it downloads weights", "the next goes on at the byte")
def test_a_killed_process_is_continued_by_the_next(hub, tmp_path):
    on_hub(REPO).read(["block.1.b"])
    hub.sent.clear()
    hub.stall_after = TENSOR_BYTES + 2**17
    places = {"HF_ENDPOINT": hub.url, "HF_HUB_CACHE": constants.HF_HUB_CACHE, "HF_HUB_OFFLINE": "0"}
    process = subprocess.Popen(
        [sys.executable, "-c", READING, REPO, "block.0.a", "block.0.b"], env={**os.environ, **places}
    )
    assert hub.stalled.wait(60)
    folder = tmp_path / "splitft-cache" / "tensors"
    for _ in range(200):  # until the bytes are through the sockets
        if any(part.stat().st_size > 2**16 for part in folder.rglob("block-0-b*.part")):
            break
        threading.Event().wait(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    hub.stall_after = None
    hub.go_on.set()
    (part,) = folder.rglob("*.part")
    begun = part.stat().st_size
    hub.sent.clear()
    assert_equal(on_hub(REPO).read(["block.0.a", "block.0.b"]), hub)
    assert 0 < sum(one.sent for one in hub.sent) < TENSOR_BYTES  # the first was there, and a part of the next
    assert begun > 2**16


@pytest.mark.parametrize("place", [-1, 40_000])
def test_a_kept_tensor_that_the_disk_has_changed_is_read_anew(hub, tmp_path, place, monkeypatch):
    on_hub(REPO).read(["block.0.a"])
    (path,) = (tmp_path / "splitft-cache" / "tensors").rglob("*.safetensors")
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
    assert_equal(on_hub(REPO).read(["block.0.a"]), hub)
    assert tensors_sent(hub, FIRST) == 2 * TENSOR_BYTES
    path.write_bytes(data)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="neither in the hub cache nor reachable"):
        on_hub(REPO).read(["block.0.a"])


def test_a_server_that_sends_no_parts_sends_the_whole(hub):
    hub.ranges = False
    assert_equal(on_hub(REPO).read(["block.0.a"]), hub)
    assert SECOND not in hub.asked
    hub.ranges = True
    before = len(hub.sent)
    assert_equal(on_hub(REPO).read(["block.1.a"]), hub)  # from the hub's own cache
    assert len(hub.sent) == before


def test_a_server_that_sends_another_range_is_not_believed(hub):
    checkpoint = on_hub(REPO)
    checkpoint.read(["block.1.b"])
    hub.shift = 4
    with pytest.raises(ModelError, match=r"the server sends no parts of .*; `hf download"):
        checkpoint.read(["block.0.a"])


def test_the_token_goes_to_the_hub_alone(hub, monkeypatch):
    hub.private = True
    with pytest.raises(ModelError, match=r"the hub refused config\.json"):
        on_hub(REPO)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert_equal(on_hub(REPO).read(["block.0.a"]), hub)
    assert hub.leaked == []


def test_all_tensors_are_of_one_commit_even_if_the_repository_changes_meanwhile(hub, tmp_path):
    before = published(hub)
    checkpoint = on_hub(REPO)
    hub.push(large_checkpoint(tmp_path / "newer", seed=1))
    assert torch.equal(checkpoint.read(["block.3.a"])["block.3.a"], before["block.3.a"])
    assert_equal(on_hub(REPO).read(["block.3.a"]), hub)  # whoever starts later has the newer
    assert not torch.equal(before["block.3.a"], published(hub)["block.3.a"])


def test_segments_that_read_at_once_download_once(hub):
    names = [f"block.0.{one}" for one in "ab"]
    on_hub(REPO).read(["block.1.b"])
    hub.sent.clear()
    found = []
    threads = [threading.Thread(target=lambda: found.append(on_hub(REPO).read(names))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    for one in found:
        assert_equal(one, hub)
    assert sum(one.sent for one in hub.sent) == 2 * TENSOR_BYTES


def test_large_tensors_come_in_several_requests_at_once(hub, monkeypatch):
    monkeypatch.setattr(hub_module, "RUN_BYTES", TENSOR_BYTES)
    assert_equal(on_hub(REPO).read([f"block.{number}.{one}" for number in (0, 1) for one in "ab"]), hub)
    assert len([one for one in hub.sent if one.start > 0]) == 4


def test_the_digest_of_a_whole_file_is_the_one_that_the_hub_publishes(hub):
    from splitft.model.weights.digests import kept_digest

    shard = on_hub(REPO).shard(FIRST)
    _, folder = hub.folder("main")
    assert shard.whole() == ((folder / FIRST).stat().st_size, kept_digest(folder / FIRST))
    assert tensors_sent(hub, FIRST) == 0


def test_a_tensor_that_the_shard_lacks_is_named(hub, tmp_path):
    _, folder = hub.folder("main")
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["block.9.a"] = SECOND
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(ModelError, match=rf"{SECOND} lacks 'block.9.a', which the index says is there"):
        on_hub(REPO).read(["block.9.a"])


def test_a_cache_that_cannot_be_written_is_named(hub, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SPLITFT_CACHE", str(tmp_path / "file"))
    with pytest.raises(ModelError, match=r"cannot be kept on this machine: .*SPLITFT_CACHE"):
        on_hub(REPO).read(["block.0.a"])


SEGMENT = """
import sys
import torch
from splitft.geometry import Span
from splitft.model import open_model
from splitft.specs import ModelSpec

segment = open_model(ModelSpec(name=sys.argv[1], dtype="float32")).segment(Span(0, 2), embedding=True)
with torch.no_grad():
    torch.save(segment.run(torch.arange(1, 9)[None]), sys.argv[2])
"""


def test_a_client_with_two_blocks_of_a_hub_model_reads_their_shards_alone(tmp_path, tiny_llama):
    from splitft.geometry import Span
    from splitft.model import open_model
    from splitft.specs import ModelSpec
    from tiny import tiny_model

    folder = tiny_model(tmp_path / "sharded", "llama", sharded=True)
    index = json.loads((folder / INDEX).read_text())["weight_map"]
    starts = ("model.embed", "model.layers.0.", "model.layers.1.")
    wanted = {file for name, file in index.items() if name.startswith(starts)}
    assert len(set(index.values()) - wanted) >= 3
    with running("owner/tiny", folder) as hub:
        places = {
            "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0",
            "SPLITFT_CACHE": str(tmp_path / "cache"),
        }  # fmt: skip
        out = tmp_path / "hidden.pt"
        subprocess.run(
            [sys.executable, "-c", SEGMENT, "owner/tiny", str(out)],
            env={**os.environ, **places},
            check=True,
            timeout=300,
        )
        assert {file for file in hub.asked if file.endswith(".safetensors")} == wanted
    segment = open_model(ModelSpec(name=str(tiny_llama), dtype="float32")).segment(Span(0, 2), embedding=True)
    with torch.no_grad():
        assert torch.equal(torch.load(out), segment.run(torch.arange(1, 9)[None]))


@pytest.mark.slow
def test_a_run_of_a_hub_model_downloads_no_shard_whole_and_goes_on_without_a_connection(tmp_path):
    from runs import COMMAND, settings_file
    from tiny import tiny_model, tiny_tokenizer

    folder = tiny_tokenizer(tiny_model(tmp_path / "sharded", "llama", sharded=True))
    file = settings_file(tmp_path, folder, model={"name": "owner/tiny"}, training={"rounds": 1, "steps": 1})
    command = [*COMMAND, "train", str(file), "--out", str(tmp_path / "out")]
    home = tmp_path / "home"
    with running("owner/tiny", folder) as hub:
        places = {
            **os.environ,
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(home),
            "SPLITFT_CACHE": str(tmp_path / "c"),
        }
        subprocess.run(command, env={**places, "HF_HUB_OFFLINE": "0"}, check=True, timeout=300)
        assert not list(home.rglob("*.safetensors"))
    resumed = [*command, "--resume", "training.rounds=2"]
    subprocess.run(resumed, env={**places, "HF_HUB_OFFLINE": "1"}, check=True, timeout=300)
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["rounds"] == 2
