"""Read a checkpoint on the Hugging Face hub: of the files with weights only the tensors that are needed.

    file --header by range--> table --ranges of the tensors--> CACHE/tensors/REPOSITORY/ETAG/*.safetensors

A client with two of thirty blocks downloads two blocks, not the shards that they are in. Small files are
downloaded whole to the hub's own cache, and a file with weights that is whole there already is read from
there. All files are of the commit of `config.json`, also when the repository changes meanwhile. Without a
connection, what is on this machine can be read.
"""

from __future__ import annotations

import base64
import json
import logging
import threading
from collections.abc import Collection, Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from splitft.cache import KeyedCache, cache_folder
from splitft.errors import ModelError
from splitft.model.weights.checkpoint_files import INDEX, WEIGHTS, Checkpoint, LocalShard, Shard
from splitft.model.weights.parts import TensorFolder
from splitft.model.weights.ranges import NoRanges, RemoteFile
from splitft.model.weights.tensor_table import parse_header
from splitft.names import file_safe_name

CONFIG = "config.json"
RUN_BYTES = 2**28
"""Adjacent tensors up to this size are one request."""
REQUESTS = 4
"""Requests at once."""

logger = logging.getLogger(__name__)


def on_hub(repo: str, prefixes: tuple[str, ...] = ()) -> Checkpoint:
    """Return a checkpoint on the Hugging Face hub, of which only the tensors in use are downloaded."""
    files = HubFiles(repo)
    return Checkpoint(repo, files.fetch, prefixes, files.open_shard)


@dataclass(frozen=True)
class Published:
    """The facts of a file on the hub from which its tensors can be found."""

    etag: str
    """Hash of the content: SHA-256 of a large file."""
    size: int
    """Bytes."""
    header: bytes

    def dump(self) -> bytes:
        """Return the facts as JSON."""
        header = base64.b64encode(self.header).decode()
        return json.dumps({"etag": self.etag, "size": self.size, "header": header}).encode()

    @classmethod
    def load(cls, data: bytes) -> Published:
        """Return the facts of a JSON text."""
        found = json.loads(data)
        return cls(found["etag"], found["size"], base64.b64decode(found["header"]))


class HubFiles:
    """The files of one repository, as of one commit."""

    def __init__(self, repo: str) -> None:
        self.repo = repo
        self._commit: str | None = None
        self._shards: dict[str, Shard] = {}
        config = self.fetch(CONFIG, absent_offline=True)
        if config is not None:
            self._commit = config.parent.name

    def fetch(self, name: str, absent_offline: bool = False) -> Path | None:
        """Return the path of a whole file, downloaded if necessary; None if the repository has none.

        Raises ModelError if there is no connection, unless it counts as absent then.
        """
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        with _said(self.repo, name):
            try:
                path = Path(hf_hub_download(self.repo, name, revision=self._commit))
            except LocalEntryNotFoundError:
                if absent_offline or (name == INDEX and self._is_unsharded()):
                    return None
                raise
            except EntryNotFoundError:
                return None
        if name in self._shards:  # whole from now on
            self._shards[name] = LocalShard(path)
        return path

    def open_shard(self, name: str) -> Shard | None:
        """Return a file with weights: whole, if it is in the hub's cache, or else its tensors by range.

        None if the repository has no such file. Raises ModelError if there is no connection and nothing of it
        on this machine.
        """
        if name not in self._shards:
            shard = self._whole(name) or self._ranged(name)
            if shard is None:
                return None
            self._shards[name] = shard
        return self._shards[name]

    def download(self, name: str) -> LocalShard:
        """Return a file with weights as a whole, downloaded if necessary."""
        path = self.fetch(name)
        if path is None:
            raise ModelError(f"{self.repo} has no {name} any more")
        self._shards[name] = shard = LocalShard(path)
        return shard

    def _whole(self, name: str) -> LocalShard | None:
        from huggingface_hub import try_to_load_from_cache

        path = try_to_load_from_cache(self.repo, name, revision=self._commit)
        return LocalShard(Path(path)) if isinstance(path, str) else None

    def _ranged(self, name: str) -> Shard | None:
        from huggingface_hub import hf_hub_url
        from huggingface_hub.errors import EntryNotFoundError
        from huggingface_hub.file_download import get_hf_file_metadata

        source = f"{self.repo}/{name}"
        kept = KeyedCache(cache_folder() / "hub", Published.dump, Published.load)
        published = kept.find((self.repo, self._commit, name)) if self._commit else None
        url = hf_hub_url(self.repo, name, revision=self._commit)
        if published is None:
            with _said(self.repo, name):
                try:
                    found = get_hf_file_metadata(url)
                except EntryNotFoundError:
                    return None
                if found.etag is None or found.size is None or found.commit_hash is None:
                    return self.download(name)
                url = hf_hub_url(self.repo, name, revision=found.commit_hash)
                try:
                    header = RemoteFile(source, url, found.size).header()
                except NoRanges as error:
                    logger.warning("%s is downloaded whole: the server sends no parts (%s)", source, error)
                    return self.download(name)
                published = Published(found.etag, found.size, header)
                kept.put((self.repo, found.commit_hash, name), published)
        return RangedShard(self, name, RemoteFile(source, url, published.size), published)

    def _is_unsharded(self) -> bool:
        """Return whether this machine knows, without a connection, that the model is in one file."""
        from huggingface_hub import try_to_load_from_cache

        absent = try_to_load_from_cache(self.repo, INDEX, revision=self._commit)
        return (absent is not None and not isinstance(absent, str)) or self._whole(WEIGHTS) is not None


class RangedShard:
    """A file with weights on the hub, of which the tensors in use are on this machine."""

    def __init__(self, files: HubFiles, name: str, remote: RemoteFile, published: Published) -> None:
        self._files, self._name, self._remote, self._published = files, name, remote, published
        self._table = parse_header(published.header, published.size, remote.name)
        repository, content = file_safe_name(files.repo), file_safe_name(published.etag)
        folder = cache_folder() / "tensors" / repository / content
        self._kept = TensorFolder(folder, self._table)

    def keys(self) -> Collection[str]:
        """Return the names of the file's tensors."""
        return self._table.keys()

    def read(self, keys: Collection[str]) -> dict[str, torch.Tensor]:
        """Return tensors, downloaded if necessary and compared with what had arrived."""
        self.digests(keys)
        return {key: self._kept.load(key) for key in keys}

    def state(self) -> Hashable:
        """Return the hash of the file's content."""
        return self._remote.name, self._published.etag

    def sizes(self, keys: Collection[str]) -> dict[str, int]:
        """Return the bytes of tensors."""
        return {key: self._table[key].size for key in keys}

    def digests(self, keys: Collection[str]) -> dict[str, str]:
        """Return the SHA-256 of tensors, downloaded if necessary."""
        absent = sorted(key for key in keys if key not in self._table)
        if absent:
            raise ModelError(f"{self._remote.name} lacks {absent[0]!r}, which the index says is there")
        for _ in range(2):
            self._download([key for key in keys if not self._kept.holds(key)])
            found = {key: self._kept.digest(key) for key in keys}
            digests = {key: digest for key, digest in found.items() if digest is not None}
            if len(digests) == len(found):
                return digests
            lost = [key for key in found if key not in digests]
            logger.warning(
                "%s: %s is damaged in %s; read anew", self._remote.name, lost[0], self._kept.folder
            )
        raise ModelError(
            f"{self._kept.folder} does not keep what is written there ({lost[0]}): check the disk, or set "
            "SPLITFT_CACHE to another folder"
        )

    def whole(self) -> tuple[int, str]:
        """Return bytes and SHA-256 of the whole file, as the hub publishes it."""
        if len(self._published.etag) == 64:
            return self._published.size, self._published.etag
        return self._files.download(self._name).whole()  # a small file, kept in git

    def _download(self, keys: Sequence[str]) -> None:
        """Read tensors from the hub, several adjacent ones in one request and several requests at once."""
        from huggingface_hub.utils import WeakFileLock, tqdm

        if not keys:
            return
        self._kept.folder.mkdir(parents=True, exist_ok=True)
        stopped = threading.Event()
        with (
            _said(self._files.repo, self._name),
            WeakFileLock(self._kept.folder / "lock"),  # two processes may need the same tensors
            ThreadPoolExecutor(REQUESTS) as pool,
        ):
            runs = self._runs([key for key in keys if not self._kept.holds(key)])
            size = sum(self._table[key].size for run in runs for key in run)
            with tqdm(total=size, unit="B", unit_scale=True, desc=self._remote.name, leave=False) as bar:
                try:
                    for _ in pool.map(lambda run: self._receive(run, bar, stopped), runs):
                        pass
                except BaseException:  # also Ctrl-C: what is underway ends with its next chunk
                    stopped.set()
                    raise

    def _runs(self, keys: Sequence[str]) -> list[list[str]]:
        """Divide tensors into runs of neighbours in the file, each of at most RUN_BYTES or of one tensor.

        A tensor of which a part has arrived begins a run.
        """
        runs: list[list[str]] = []
        begin = last = -1
        for key in sorted(keys, key=lambda key: (self._table[key].start, self._table[key].stop)):
            place = self._table[key]
            if place.start == last and place.stop - begin <= RUN_BYTES and not self._kept.has_begun(key):
                runs[-1].append(key)
            else:
                runs.append([key])
                begin = place.start
            last = place.stop
        return runs

    def _receive(self, run: Sequence[str], bar: Any, stopped: threading.Event) -> None:
        """Read the tensors of a run, from the first byte that has not arrived."""
        chunks: Iterator[bytes] | None = None
        left = memoryview(b"")
        for key in run:
            with self._kept.draft(key, resume=chunks is None) as draft:
                bar.update(draft.have)
                if chunks is None:
                    start = self._table[key].start + draft.have
                    chunks = self._remote.stream(start, self._table[run[-1]].stop)
                while draft.missing:
                    if stopped.is_set():
                        return
                    left = left or memoryview(next(chunks))
                    taken = draft.write(left)
                    left = left[taken:]
                    bar.update(taken)
                draft.finish()


@contextmanager
def _said(repo: str, name: str) -> Iterator[None]:
    """Turn errors of the hub and the connection into a ModelError that says what can be done."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalEntryNotFoundError

    try:
        yield
    except NoRanges as error:
        raise ModelError(
            f"{repo}: the server sends no parts of {name} ({error}); `hf download {repo}` gets it whole"
        ) from error
    except HfHubHTTPError as error:
        raise ModelError(f"{repo}: the hub refused {name}: {error}") from error
    except (LocalEntryNotFoundError, HTTPError, ConnectionError) as error:
        raise ModelError(f"{repo}: {name} is neither in the hub cache nor reachable") from error
    except OSError as error:
        raise ModelError(
            f"{repo}: {name} cannot be kept on this machine: {error}; SPLITFT_CACHE and HF_HOME choose where"
        ) from error
