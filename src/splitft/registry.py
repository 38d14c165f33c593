"""Choices by name: built in, from installed packages, and from files that a configuration names.

    RULES["svd"] ── built in:      {"svd": Rule(...)} or {"svd": "splitft.some.module:THING"}
                 ── a package:     [project.entry-points."splitft.rules"]  mine = "my_package:MINE"
                 ── a file:        plugins: [my_rule.py], which says  RULES.add("mine", Rule(...))

A name is known before its object is imported, so that names can be checked and listed without torch. Objects
given by place (`module:attribute`) are imported when they are first asked for.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

from splitft.errors import PluginError

T = TypeVar("T")

NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,39}")
"""What a choice may be called."""


class Registry(Mapping[str, T], Generic[T]):
    """All choices of one kind: built in, then of installed packages, then of files."""

    def __init__(self, kind: str, group: str, built_in: Mapping[str, T | str]) -> None:
        """`kind` is what one choice is called in messages; `group` the entry points that add to it."""
        self.kind, self.group = kind, group
        self._things: dict[str, T | str | EntryPoint] = dict(built_in)
        self._built_in = frozenset(built_in)
        self._searched = False
        REGISTRIES[group] = self

    def add(self, name: str, thing: T) -> T:
        """Add a choice, or replace one that a plug-in added before; returns it.

        Raises PluginError for a name that is no lower-case word, or that is built in.
        """
        if not NAME.fullmatch(name):
            raise PluginError(
                f"{name!r} cannot be the name of a {self.kind}: give up to 40 lower-case letters, digits "
                "and hyphens"
            )
        if name in self._built_in:
            raise PluginError(f"the {self.kind} {name!r} is built in; give yours another name")
        self._search()
        self._things[name] = thing
        _changed()
        return thing

    def find(self, name: str) -> T:
        """Return the choice of this name. Raises PluginError that lists the choices if there is none."""
        if name in self:
            return self[name]
        near = get_close_matches(name, list(self), 1)
        said = f"; did you mean {near[0]}?" if near else f"; there are {', '.join(self)}"
        raise PluginError(f"no {self.kind} is called {name!r}{said}")

    def __getitem__(self, name: str) -> T:
        self._search()
        thing: Any = self._things[name]
        if isinstance(thing, EntryPoint):
            thing = _imported(thing, f"{self.kind} {name!r} of {thing.value}")
        elif isinstance(thing, str):
            thing = resolve(thing)
        self._things[name] = thing
        found: T = thing
        return found

    def __iter__(self) -> Iterator[str]:
        self._search()
        return iter(tuple(self._things))

    def __len__(self) -> int:
        self._search()
        return len(self._things)

    def __contains__(self, name: object) -> bool:
        self._search()
        return name in self._things

    def _search(self) -> None:
        """Note the names that installed packages add, once; none of them is imported yet."""
        if self._searched:
            return
        self._searched = True
        for entry in entry_points(group=self.group):
            if NAME.fullmatch(entry.name) and entry.name not in self._things:
                self._things[entry.name] = entry


REGISTRIES: dict[str, Registry[Any]] = {}
"""Every registry that has been imported, by the group of its entry points."""


@dataclass(frozen=True)
class Lazy:
    """A function by its place (`module:name`), imported when it is first called."""

    place: str

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """Call it."""
        return resolve(self.place)(*arguments, **options)


def resolve(place: str) -> Any:
    """Return the object at `module:attribute`."""
    module, _, name = place.partition(":")
    return getattr(import_module(module), name)


def generation() -> int:
    """Return a number that grows whenever a choice is added: a key for caches that depend on the choices."""
    return _generation


def _changed() -> None:
    global _generation
    _generation += 1


_generation = 0


def _imported(entry: EntryPoint, what: str) -> Any:
    """Return what a plug-in's entry point names. Raises PluginError for any error of the foreign code."""
    try:
        return entry.load()
    except Exception as error:
        raise PluginError(f"the {what} cannot be loaded: {type(error).__name__}: {error}") from error
