"""What the data owner fixes: read from its own file, held against what a run asks, and enforced at the site.

    site.yaml --refusals--> none: it says Hello      some: it says Declined, with the reasons, and leaves
                Guard ----> before a model file is read and before every change of the cut

The server plans with what it is told (shallowest cut, machine), so that an honest one never asks for what is
forbidden. It does not have to be believed: the site checks for itself, last of all at the client, whose noise
and shallowest cut come from this file (`privacy.defence`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from splitft.config import RunConfig, commented, load_spec
from splitft.data.corpora import EMBEDDED
from splitft.deploy.manifest import Parts, needed, verify
from splitft.errors import ForbiddenError
from splitft.model import Model
from splitft.protocol.control import BaseFile
from splitft.schedule.profile import GB
from splitft.specs import DataSpec, SharesSpec, SiteSpec

NAME = "site.yaml"
"""Where a startup kit has it: in `local/`, which belongs to the data owner."""
OPENING = """\
# What this site insists on, whatever the server asks for. It is read at the start of every run and never
# leaves this machine. What it forbids does not happen: the site declines, and both sides log why.
# Every key may be left out; it then has the value written here.
"""


def load_site(path: Path) -> SiteSpec:
    """Read a data owner's file. Raises ConfigError with every fault at once."""
    return load_spec(path, SiteSpec, "`splitft deploy site`")


def site_template() -> str:
    """A commented file to start from."""
    return commented(SiteSpec(), OPENING)


def refusals(site: SiteSpec, config: RunConfig, cut: int | None) -> tuple[str, ...]:
    """Why this site does not take part in a run, one sentence each; `cut` is its own, where it is fixed."""
    found = []
    if config.split.labels == "server" and not site.allows.labels:
        found.append(
            "split.labels is server, and labels do not leave this site (allows.labels): whoever runs the "
            "server would read the text"
        )
    for role in ("hidden", "gradient", "adapter"):
        allowed, asked = getattr(site.allows, role), str(getattr(config.wire, role)).partition(":")[0]
        if allowed is not None and asked not in allowed:
            fits = ", ".join(allowed) or "no codec"
            found.append(f"wire.{role} is {asked}, and this site allows {fits} (allows.{role})")
    if cut is not None and cut < site.bounds.min_cut:
        found.append(
            f"the cut is {cut}, and this site takes part from {site.bounds.min_cut} on (bounds.min_cut)"
        )
    if site.text.source is None and config.data.source not in EMBEDDED:
        found.append(
            f"the run reads {config.data.source!r}, and this site says itself what is read on it: give "
            "text.source"
        )
    return tuple(found)


def at_site(config: RunConfig, site: SiteSpec) -> RunConfig:
    """The run as this site takes part in it: its own text, its own copy of the model, its own machine.

    With a text of its own it is the only client of its configuration, and has all of that text.
    """
    model, data, clients, schedule = config.model, config.data, config.clients, config.schedule
    if site.model.folder is not None:
        model = model.model_copy(update={"name": site.model.folder})
    if site.text.source is not None:
        limits = data.model_dump(include={"max_tokens", "max_examples", "holdout", "eval_examples"})
        data = DataSpec.model_validate({**site.text.model_dump(), **limits})
        clients = clients.model_copy(update={"shares": SharesSpec(by="iid")})
    if site.machine.device is not None:
        schedule = schedule.model_copy(update={"devices": site.machine.device})
    return config.model_copy(update={"model": model, "data": data, "clients": clients, "schedule": schedule})


class SitePolicy:
    """Stands before a site's client, and lets nothing through that the data owner forbids."""

    def __init__(
        self,
        site: SiteSpec,
        model: Model,
        head: bool,
        memory_at: Callable[[int], float] = lambda cut: 0.0,
    ) -> None:
        """`head` says whether the client holds the head; `memory_at` foretells bytes at a cut."""
        self._site, self._model, self._memory_at = site, model, memory_at
        self._parts = Parts.of(model, head=head)
        self._manifest: Sequence[BaseFile] = ()
        self._verified: set[str] = set()

    def join(self, cut: int, manifest: Sequence[BaseFile]) -> None:
        """Before the client is made. Raises ForbiddenError."""
        self._manifest, self._verified = manifest, set()
        self.move(cut)

    def move(self, cut: int) -> None:
        """Before the client takes up another cut. Raises ForbiddenError."""
        least = self._site.bounds.min_cut
        if cut < least:
            raise ForbiddenError(
                f"cut {cut} was asked for; this site takes part from {least} on (bounds.min_cut)"
            )
        self.check_memory(cut)
        names = [name for name in needed(self._model, self._parts, cut) if name not in self._verified]
        verify(self._model, names, self._manifest, self._site.model.trusted)
        self._verified.update(names)

    def check_memory(self, cut: int) -> None:
        """Raise ForbiddenError for a cut that needs more memory than the site gives."""
        budget, needs = self._site.machine.memory_gb, self._memory_at(cut) / GB
        if budget is not None and needs > budget:
            raise ForbiddenError(
                f"cut {cut} would need {needs:.3g} GB; this site gives {budget:g} GB (machine.memory_gb)"
            )

    def check_some_cut_fits(self) -> None:
        """Raise ForbiddenError if not even the shallowest allowed cut fits; deeper ones need more."""
        shallowest = self._site.bounds.min_cut
        if shallowest < self._model.shape.blocks:
            self.check_memory(shallowest)
