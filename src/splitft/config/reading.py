"""From text to `RunConfig`: YAML with line numbers, overrides, and all faults at once.

YAML as people write it: `5e-4` is a number here (plain YAML 1.1 reads a string), and a key given twice
is a fault rather than a silent choice.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from splitft.config.explain import Place, explain
from splitft.config.run import RunConfig
from splitft.errors import ConfigError, PluginError
from splitft.methods import METHODS, filled, without_contradictions
from splitft.plugins import PluginFile, find_approved
from splitft.plugins import find as find_plugin
from splitft.plugins import load as load_plugins
from splitft.specs import Spec
from splitft.specs.extensions import PluginSpec

S = TypeVar("S", bound=Spec)

FLOAT = (
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?([0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)[eE][-+]?[0-9]+$"),
)
"""Numbers that YAML 1.1 reads as strings: 5e-4 (it requires 5.0e-4)."""


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 5e-4 as a number, and refuses repeated keys and aliases (which may be cycles)."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.composer.ComposerError(None, None, "aliases (*name) are not read; write it out", mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be one word", key.start_mark)
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key.value!r} stands here twice; keep one", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(*FLOAT, list("-+.0123456789"))


def load(path: Path | str, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a configuration file, load its plug-ins, apply `key.path=value` overrides, check everything.

    Raises ConfigError with one line for each fault, each with the file's line where it has one.
    """
    data, lines = _read(Path(path), "`splitft init`")
    return _check(
        data, _origins(path, lines), f"{path}: ", overrides, partial(find_plugin, folder=Path(path).parent)
    )


def load_spec(path: Path | str, kind: type[S], written_by: str) -> S:
    """Read a file with a single specification; `written_by` is the command that writes such a file.

    Raises ConfigError as `load` does.
    """
    data, lines = _read(Path(path), written_by)
    plain = _plain(
        {key: {} if value is None and _is_section(key, kind) else value for key, value in data.items()}
    )
    try:
        return kind.model_validate_json(json.dumps(plain), strict=True)
    except ValidationError as error:
        faults = explain(error, kind, plain, _origins(path, lines), f"{path}: ")
        raise ConfigError("\n".join(faults)) from error


def _read(path: Path, written_by: str) -> tuple[dict[str, Any], dict[Place, int]]:
    """Return the mapping in a YAML file, and the line of every key."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not a text file in UTF-8; give a YAML configuration") from error
    except OSError as error:
        advice = (
            f"write one with {written_by}" if isinstance(error, FileNotFoundError) else "give a YAML file"
        )
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); {advice}") from error
    return _parse(text, str(path))


def _origins(path: Path | str, lines: Mapping[Place, int]) -> dict[Place, str]:
    """Return the prefix of messages about each key: file and line."""
    return {key: f"{path}:{line}: " for key, line in lines.items()}


def from_mapping(
    data: Mapping[str, Any], overrides: Sequence[str] = (), owner: Path | None = None
) -> RunConfig:
    """Do the same for a mapping, such as one that a Python caller wrote.

    With `owner`, the mapping comes from elsewhere: plug-ins are loaded from `owner/plugins` alone, by hash.
    """
    find = partial(find_plugin, folder=Path.cwd()) if owner is None else partial(find_approved, owner=owner)
    return _check(dict(data), {}, "", overrides, find)


def _parse(text: str, name: str) -> tuple[dict[str, Any], dict[Place, int]]:
    """Return the mapping in a YAML text, and the line of every key."""
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        data = {} if node is None else loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{name}:{mark.line + 1}" if mark else name
        raise ConfigError(f"{where}: not YAML that can be read: {error.problem or error.context}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{name}: not YAML that can be read: {str(error).splitlines()[0]}") from error
    finally:
        if loader:
            loader.dispose()
    if node is None or data is None:
        return {}, {}
    if not isinstance(data, dict):
        found = "a list" if isinstance(data, list) else repr(data)
        raise ConfigError(f"{name}: found {found}; a configuration is `key: value` lines (`splitft init`)")
    lines: dict[Place, int] = {}
    _note_lines(node, (), lines)
    return data, lines


def _note_lines(node: yaml.Node, place: Place, lines: dict[Place, int]) -> None:
    """Record the line of every key and list item below a node."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            lines[(*place, key.value)] = key.start_mark.line + 1
            _note_lines(value, (*place, key.value), lines)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            lines[(*place, index)] = value.start_mark.line + 1
            _note_lines(value, (*place, index), lines)


def _check(
    data: dict[str, Any],
    origins: dict[Place, str],
    default: str,
    overrides: Sequence[str],
    find: Callable[..., PluginFile],
) -> RunConfig:
    """Apply overrides and validate; `origins` has each key's prefix of messages, `default` that of others."""
    data = {
        key: {} if value is None and _is_section(key, RunConfig) else value for key, value in data.items()
    }
    faults, overridden = [], list[str]()
    for override in overrides:
        try:
            place = _apply(data, override)
        except ConfigError as error:
            faults.append(str(error))
            continue
        origins = {key: origin for key, origin in origins.items() if key[: len(place)] != place}
        origins[place] = f"{override}: "
        overridden.append(override)
    plain = _plain(_with_method(data, overridden))
    try:
        plain = _with_plugins(plain, find)
    except PluginError as error:
        raise ConfigError(
            "\n".join([*faults, f"{origins.get(('plugins',), default)}plugins: {error}"])
        ) from error
    name = plain.get("method", RunConfig.model_fields["method"].default)
    if isinstance(name, str) and name in METHODS:
        plain = filled(name, plain)
    try:
        config = RunConfig.model_validate_json(json.dumps(plain), strict=True)
    except ValidationError as error:
        faults += explain(error, RunConfig, plain, origins, default)
    if faults:
        raise ConfigError("\n".join(faults))
    return config


def _with_plugins(plain: dict[str, Any], find: Callable[..., PluginFile]) -> dict[str, Any]:
    """Load the plug-ins that the data name; returns the data with each one's path and hash.

    What is no list of files is left for the check of all keys to refuse.
    """
    try:
        specs = [PluginSpec.model_validate(one) for one in plain.get("plugins", [])]
    except (ValidationError, TypeError):
        return plain
    if not specs:
        return plain
    found = [find(spec.file, sha256=spec.sha256) for spec in specs]
    load_plugins(found)
    return {**plain, "plugins": [{"file": str(one.path.resolve()), "sha256": one.sha256} for one in found]}


def _with_method(data: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Remove keys of the file that contradict a method given as an override; other overrides stay."""
    name = data.get("method")
    overridden = any(one.partition("=")[0].strip() == "method" for one in overrides)
    if not overridden or not isinstance(name, str) or name not in METHODS:
        return data
    adapted = without_contradictions(name, data)
    for override in overrides:
        _apply(adapted, override)
    return adapted


def _apply(data: dict[str, Any], override: str) -> Place:
    """Put one `key.path=value` into the data, in place; the value is read as YAML."""
    name, equals, text = override.partition("=")
    place = tuple(part.strip() for part in name.split("."))
    if not equals or not all(place):
        raise ConfigError(f"{override!r} is not an override; write key.path=value, such as training.rounds=5")
    try:
        value = yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{override!r}: the value is not YAML; quote it, such as 'a.b=\"text\"'") from error
    below = data
    for part in place[:-1]:
        if not isinstance(below.get(part, {}), dict):
            raise ConfigError(f"{override!r}: {part} is not a section; it holds {below[part]!r}")
        below[part] = dict(below.get(part, {}))  # the caller's own mapping stays as it is
        below = below[part]
    below[place[-1]] = value
    return place


def _plain(value: Any) -> Any:
    """Return the value with everything that JSON lacks (dates, infinities, other keys) as text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def _is_section(key: object, kind: type[Spec]) -> bool:
    """Return True if a key is a section, which may be empty."""
    field = kind.model_fields.get(key) if isinstance(key, str) else None
    return field is not None and isinstance(field.default, Spec)
