"""Write a session as a job, and check its arguments before anything is done with them.

write_job -->   meta.json                     who takes part: every connected site
                app/config/config_fed_*.json  the arguments of both sides; no code
{"run": name, "link": session key in hexadecimal, "config": YAML in base64, ...}
          --read_arguments--> JobArguments | DeployError

FLARE replaces `{NAME}` in a job's text by a variable, and `{$NAME}` by one of the environment of the machine
that runs the job. A configuration travels as base64, where no brace is, and an argument whose form is not the
expected one is not repeated in the refusal: so no job makes a site tell its environment to the server.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import re
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from splitft.config import RunConfig, dump
from splitft.errors import DeployError
from splitft.names import NAME_RULE, is_file_safe
from splitft.version import __version__

JOBS, TASK = "splitft.deploy.flare.job", "splitft"
"""Module of the classes that a job starts, and the name of its one task."""
LONGEST_CONFIG = 1_000_000
"""Longest configuration, in characters as it travels."""
_KEY = re.compile(r"[0-9a-f]{32}")
_VERSION = re.compile(r"[0-9]{1,3}(\.[0-9a-z]{1,5}){1,4}")


@dataclass(frozen=True)
class JobArguments:
    """What one session is told by its job."""

    run: str
    """Its name, which is a folder on each machine (`names`)."""
    session_key: bytes
    config: str
    """The configuration of the run, as YAML."""
    version: str = ""
    """Version of splitft of whoever submitted it; "" by versions that did not say."""
    rounds: int = 0
    """Rounds that the run has finished at least."""
    restart: bool = False
    """True if the run begins anew, and what is in its folder is set aside."""

    @property
    def digest(self) -> str:
        """Return the digest of the configuration."""
        return digest_of(self.config)

    def check_version(self, machine: str) -> None:
        """Raise DeployError if this machine has another version of splitft."""
        if self.version and self.version != __version__:
            raise DeployError(
                f"{machine} has splitft {__version__}, and the run was submitted with {self.version}; "
                "install the same version on every machine"
            )


def read_arguments(found: Mapping[str, Any]) -> JobArguments:
    """Return the arguments of a job. Raises DeployError that says which of them does not fit."""
    names, optional = ("run", "link", "config"), {"version": str, "rounds": int, "restart": bool}
    if odd := sorted(set(found) - {*names, *optional}):
        raise DeployError(
            f"the job has an argument {odd[0][:80]!r}; a run has {', '.join((*names, *optional))}"
        )
    for name, kind in optional.items():
        if name in found and type(found[name]) is not kind:
            raise DeployError(f"the job's {name!r} is {type(found[name]).__name__}, not {kind.__name__}")
    for name in names:
        if not isinstance(found.get(name), str):
            raise DeployError(
                f"the job's {name!r} is {type(found.get(name)).__name__}, not text; submit it anew"
            )
    run, link, config = (found[name] for name in names)
    if not is_file_safe(run):  # it becomes a folder here
        raise DeployError(f"the job's 'run' is no name of a run, which has {NAME_RULE}")
    if found.get("version") and not _VERSION.fullmatch(found["version"]):
        raise DeployError("the job's 'version' is no version; submit it anew")
    if not _KEY.fullmatch(link):
        raise DeployError("the job's 'link' is no session key of 32 hexadecimal digits; submit it anew")
    if len(config) > LONGEST_CONFIG:
        raise DeployError(f"the job's 'config' has {len(config)} characters; it may have {LONGEST_CONFIG}")
    try:
        text = base64.b64decode(config, validate=True).decode()
    except (binascii.Error, ValueError) as error:
        raise DeployError(
            "the job's 'config' is not as this version of splitft writes it; install the same version on "
            "every machine"
        ) from error
    others = {name: found[name] for name in optional if name in found}
    return JobArguments(run, bytes.fromhex(link), text, **others)


def sent_config(config: RunConfig) -> str:
    """Return a configuration as a job carries it: plug-ins by the name of their file."""
    plugins = tuple(one.model_copy(update={"file": Path(one.file).name}) for one in config.plugins)
    return dump(config.model_copy(update={"plugins": plugins}))


def digest_of(config: str) -> str:
    """Return a digest by which sessions of other configurations are told apart."""
    return hashlib.sha256(config.encode()).hexdigest()[:16]


def write_job(folder: Path, run: str, config: RunConfig, rounds: int = 0, restart: bool = False) -> Path:
    """Write one session of a run as a job folder, with a session key of its own.

    Raises DeployError for a name that no server or site accepts.
    """
    if not is_file_safe(run):
        raise DeployError(f"no run can be called {run!r}; give {NAME_RULE}")
    arguments = {
        "run": run,
        "link": secrets.token_hex(16),
        "config": base64.b64encode(sent_config(config).encode()).decode(),
        "version": __version__,
        "rounds": rounds,
        "restart": restart,
    }
    meta = {"name": run, "resource_spec": {}, "deploy_map": {"app": ["@ALL"]}, "min_clients": 1}
    server = {"id": "splitft", "path": f"{JOBS}.ServerJob", "args": arguments}
    executor = {"path": f"{JOBS}.SiteJob", "args": arguments}
    files = {
        "meta.json": meta,
        "app/config/config_fed_server.json": {"format_version": 2, "workflows": [server], "components": []},
        "app/config/config_fed_client.json": {
            "format_version": 2,
            "executors": [{"tasks": [TASK], "executor": executor}],
            "components": [],
        },
    }
    shutil.rmtree(folder, ignore_errors=True)
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=2), encoding="utf-8")
    return folder
