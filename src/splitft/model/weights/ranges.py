"""Read byte ranges of a file on the Hugging Face hub, over HTTP.

    GET /owner/name/resolve/COMMIT/FILE, Range: bytes=a-b  -> 302 to a content server -> 206, these bytes

The address names a commit, so that all parts are of one version of the file. A range that breaks off is
continued at the byte where it did. The user's token goes to the hub, not to the content server.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass

from splitft.errors import ModelError
from splitft.model.weights.tensor_table import LENGTH_BYTES, header_bytes

FIRST_BYTES = 2**17
"""Read at first of a file; most headers are shorter."""
ATTEMPTS = 5
"""Attempts without a single byte before a download is given up."""
PAUSE_S = 1.0
"""Pause after a download broke off; twice as long after each further time."""

logger = logging.getLogger(__name__)


class NoRanges(Exception):  # noqa: N818
    """A server answers a request for a part of a file with something else."""


@dataclass(frozen=True)
class RemoteFile:
    """A file of one commit."""

    name: str
    """Repository and file, for messages."""
    url: str
    size: int
    """Bytes."""

    def header(self) -> bytes:
        """Return the header of a file in safetensors format. Raises ModelError for a bad one."""
        first = b"".join(self.stream(0, min(FIRST_BYTES, self.size)))
        stop = LENGTH_BYTES + header_bytes(first, self.name)
        if stop > self.size:
            raise ModelError(f"{self.name} is not a readable safetensors file: it ends within its header")
        return (first + b"".join(self.stream(len(first), stop)))[LENGTH_BYTES:stop]

    def stream(self, start: int, stop: int) -> Iterator[bytes]:
        """Yield the bytes [start, stop), continued wherever the connection breaks off.

        Raises NoRanges if the server sends others, and ModelError if nothing arrives any more.
        """
        from huggingface_hub.errors import HfHubHTTPError, HTTPError

        failed, error = 0, None
        while start < stop:
            try:
                for chunk in self._sent(start, stop):
                    start, failed = start + len(chunk), 0
                    yield chunk
            except HfHubHTTPError:
                raise
            except HTTPError as broken:
                error = broken
            if start < stop:
                failed += 1
                self._pause(failed, error)

    def _sent(self, start: int, stop: int) -> Iterator[bytes]:
        """Yield the answer to one request."""
        from huggingface_hub import constants
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff

        wanted = f"bytes={start}-{stop - 1}"
        headers = {**build_hf_headers(), "Range": wanted, "Accept-Encoding": "identity"}
        with http_stream_backoff(
            "GET",
            self.url,
            headers=headers,
            follow_redirects=True,
            timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
            retry_on_exceptions=(),  # `stream` knows where to continue
        ) as response:
            hf_raise_for_status(response)
            found = response.headers.get("Content-Range")
            if response.status_code != 206 or found != f"{wanted.replace('=', ' ')}/{self.size}":
                raise NoRanges(
                    f"{wanted} of {self.size} were due, and status {response.status_code}, {found} came"
                )
            yield from response.iter_bytes()  # as they arrive: a chunk that breaks off would be lost

    def _pause(self, failed: int, error: Exception | None) -> None:
        reason = f" ({error})" if error is not None else ""
        if failed >= ATTEMPTS:
            raise ModelError(
                f"{self.name}: the download broke off {ATTEMPTS} times without a byte{reason}; check the "
                "connection and start again: what has arrived is kept"
            ) from error
        logger.warning("%s: the download broke off%s; it goes on where it was", self.name, reason)
        time.sleep(PAUSE_S * 2 ** (failed - 1))
