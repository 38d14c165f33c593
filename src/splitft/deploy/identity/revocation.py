"""Keep the list of certificates that were withdrawn, which the server checks at every connection.

    authority: DIR/revoked.json --copy--> server: KIT/local/revoked.json --> refused, open connections closed

An entry is the SHA-256 of one certificate, so the same name with a new certificate is admitted again.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from splitft.errors import DeployError
from splitft.files import write_whole

REVOKED = "revoked.json"
_FINGERPRINT = re.compile(r"[0-9a-f]{64}")


def read_revoked(path: Path) -> Mapping[str, str]:
    """Return fingerprints and their names; none without the file. Raises DeployError if it is damaged."""
    if not path.is_file():
        return {}
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))["revoked"]
        found = {str(one["fingerprint"]): str(one["name"]) for one in entries}
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise DeployError(f"{path} cannot be read: {error}; copy it anew from the authority") from error
    if strange := [one for one in found if not _FINGERPRINT.fullmatch(one)]:
        raise DeployError(f"{path}: {strange[0][:80]!r} is no SHA-256 of a certificate")
    return found


def revoke(path: Path, name: str, fingerprints: Iterable[str]) -> None:
    """Add a name's certificates to a list; those that are in it stay."""
    found = dict(read_revoked(path))
    entries = json.loads(path.read_text(encoding="utf-8"))["revoked"] if found else []
    day = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    for one in fingerprints:
        if one not in found:
            entries.append({"fingerprint": one, "name": name, "since": day})
    write_whole(path, json.dumps({"revoked": entries}, indent=2))
