"""Read a checkpoint on the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from splitft.errors import ModelError
from splitft.model.weights.checkpoint import INDEX, WEIGHTS, Checkpoint


def on_hub(repo: str, prefixes: tuple[str, ...] = ()) -> Checkpoint:
    """Return a checkpoint on the Hugging Face hub; each file is downloaded to its cache when first needed."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

    def fetch(name: str) -> Path | None:
        try:
            return Path(hf_hub_download(repo, name))
        except LocalEntryNotFoundError as error:
            if name == INDEX and isinstance(try_to_load_from_cache(repo, WEIGHTS), str):
                return None  # offline, with an unsharded model that was downloaded before
            raise ModelError(f"{repo}: {name} is neither in the hub cache nor reachable") from error
        except EntryNotFoundError:
            return None
        except HfHubHTTPError as error:
            raise ModelError(f"{repo}: the hub refused {name}: {error}") from error

    return Checkpoint(repo, fetch, prefixes)
