"""Load plug-in files: Python files of a user's own, which add rules, codecs and the like by name.

    plugins: [my_rule.py]  --load--> my_rule.py runs:  RULES.add("mine", Rule(...))

A plug-in is code and may do what the user may do. A file is loaded only if a configuration of the user's own
names it. A run that comes from elsewhere brings no code, only hashes: it gets the files that the owner of the
machine has put into a folder of theirs. A file is known by its content: the same content runs once, and a run
folder keeps the hash and a copy of each.
"""

from __future__ import annotations

import hashlib
import sys
import traceback
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

from splitft.errors import PluginError

FOLDER = "plugins"
"""Where a run folder keeps copies of its plug-ins."""
LARGEST_BYTES = 1 << 20


@dataclass(frozen=True)
class PluginFile:
    """One file of a plug-in, as it was found."""

    path: Path
    """Where it lies."""
    sha256: str
    """Of its content."""


def find(file: str, folder: Path, sha256: str | None = None) -> PluginFile:
    """Find a plug-in's file by its path from `folder`, or its copy in `folder/plugins`.

    Raises PluginError if there is none, or none with the content of this hash.
    """
    candidates = [folder / file, folder / FOLDER / Path(file).name]
    if sha256 is not None:
        candidates.append(folder / FOLDER / _name_by_content(Path(file), sha256))
    found = [PluginFile(path, digest(path)) for path in candidates if path.is_file()]
    if not found:
        raise PluginError(f"the plug-in {candidates[0]} is not there; give the path of a Python file")
    for plugin in found:
        if sha256 in (None, plugin.sha256):
            return plugin
    raise PluginError(
        f"the plug-in {found[0].path} is not the one that was used: its SHA-256 is {found[0].sha256[:12]}, "
        f"not {str(sha256)[:12]}; put the old file back, or start a new run with the new one"
    )


def digest(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal. Raises PluginError if it cannot be read."""
    try:
        if path.stat().st_size > LARGEST_BYTES:
            raise PluginError(f"the plug-in {path} is over {LARGEST_BYTES} bytes; give a Python source file")
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise PluginError(f"the plug-in {path} cannot be read ({error.strerror})") from error


def load(plugins: Iterable[PluginFile]) -> None:
    """Run each file, once for the same content. Raises PluginError with the line that failed."""
    for plugin in plugins:
        name = f"splitft_plugin_{plugin.sha256[:16]}"
        if name in sys.modules:
            continue
        spec = spec_from_file_location(name, plugin.path)
        if spec is None or spec.loader is None:
            raise PluginError(f"the plug-in {plugin.path} is not a Python file; its name ends in .py")
        module = module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException as error:
            del sys.modules[name]
            if not isinstance(error, Exception):
                raise
            raise PluginError(f"{_place(plugin.path, error)}: {type(error).__name__}: {error}") from error


def loaded() -> list[PluginFile]:
    """Return the files that have run in this process, for another process of the same program."""
    prefix = "splitft_plugin_"
    return [
        PluginFile(Path(module.__file__), name.removeprefix(prefix))
        for name, module in list(sys.modules.items())
        if name.startswith(prefix) and module.__file__
    ]


def find_approved(file: str, sha256: str | None, owner: Path) -> PluginFile:
    """Find a plug-in that a run from elsewhere asks for, among the files that this machine's owner approved.

    The owner approves a file by putting it into `owner/plugins`; only its content counts, not its name.
    Raises PluginError if no file has the content of this hash.
    """
    for path in sorted((owner / FOLDER).glob("*.py")):
        plugin = PluginFile(path, digest(path))
        if plugin.sha256 == sha256:
            return plugin
    raise PluginError(
        f"the run uses the plug-in {Path(file).name} (SHA-256 {sha256}), which the owner of this machine has "
        f"not approved; read its code, then put the file into {owner / FOLDER}"
    )


def load_approved(owner: Path) -> None:
    """Load every file that this machine's owner approved. Raises PluginError with the line that failed."""
    load(PluginFile(path, digest(path)) for path in sorted((owner / FOLDER).glob("*.py")))


def keep_copies(plugins: Iterable[PluginFile], folder: Path) -> None:
    """Copy the files into `folder/plugins`, so that the folder can be read without the originals.

    Of several files of one name from different folders, all but the first get their hash into the name.
    """
    taken: dict[str, str] = {}
    for plugin in plugins:
        name = plugin.path.name
        if taken.setdefault(name.casefold(), plugin.sha256) != plugin.sha256:
            name = _name_by_content(plugin.path, plugin.sha256)
        copy = folder / FOLDER / name
        if not copy.is_file() or digest(copy) != plugin.sha256:
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(plugin.path.read_bytes())


def _name_by_content(path: Path, sha256: str) -> str:
    return f"{path.stem}~{sha256[:10]}{path.suffix}"


def _place(path: Path, error: Exception) -> str:
    """Return `file:line` of where the plug-in's own code failed."""
    if isinstance(error, SyntaxError) and error.lineno:
        return f"{path}:{error.lineno}"
    lines = [
        frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)
    ]
    return f"{path}:{lines[-1]}" if lines else str(path)
