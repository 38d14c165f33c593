"""The data owner's policy: read from `site.yaml`, compared with what a run asks, and enforced at the site.

    site.yaml --refusals--> none: the site registers      some: it declines with the reasons, and leaves
              SitePolicy -> checks before a model file is read, and before every change of the cut

The server plans with what the site registers (shallowest cut, machine), so an honest server never asks for
what is forbidden. The site does not rely on that: it checks for itself, last of all in the client, whose
noise and shallowest cut come from this file (`privacy.defence`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from splitft.config import RunConfig, commented, load_spec
from splitft.deploy.manifest import ParameterNames, needed, verify, verify_tensors
from splitft.deploy.site.limits import OrderLimits
from splitft.deploy.tokenizer_files import verify_tokenizer
from splitft.errors import ForbiddenError
from splitft.model import Model
from splitft.plugins import load_approved
from splitft.protocol.control import BaseFile, BaseTensor
from splitft.run.codec_choice import Candidates
from splitft.schedule.profile import GB
from splitft.specs import DataSpec, DevicesSpec, SharesSpec, SiteSpec
from splitft.specs.data import EMBEDDED
from splitft.specs.wire import AUTO

SITE_FILE = "site.yaml"
"""Name of the data owner's file, in the folder `local/` of a startup kit."""
OPENING = """\
# What this site insists on, whatever the server asks for. It is read at the start of every session and never
# leaves this machine. If a run asks for what it forbids, the site declines, and both sides log the reason.
# Every key may be left out; it then has the value written here.
"""


def load_site(path: Path) -> SiteSpec:
    """Load the plug-ins beside a data owner's file, then read it. Raises ConfigError with every mistake."""
    load_approved(Path(path).parent)
    return load_spec(path, SiteSpec, "`splitft deploy site`")


def site_template() -> str:
    """Return a commented file to start from."""
    return commented(SiteSpec(), OPENING)


def refusals(site: SiteSpec, config: RunConfig, cut: int | None) -> tuple[str, ...]:
    """Return why this site takes no part in a run, a sentence for each reason; `cut` is its cut if fixed."""
    found = []
    if config.split.labels == "server" and not site.allows.labels:
        found.append(
            "split.labels is server, and labels do not leave this site (allows.labels): whoever runs the "
            "server would read the text"
        )
    for role in ("hidden", "gradient", "adapter"):
        allowed, asked = getattr(site.allows, role), str(getattr(config.wire, role)).partition(":")[0]
        if asked == AUTO:
            if not getattr(candidates_of(site, config), role):
                found.append(
                    f"wire.{role} is auto, and this site allows none of its candidates (allows.{role})"
                )
        elif allowed is not None and asked not in allowed:
            fits = ", ".join(allowed) or "no codec"
            found.append(f"wire.{role} is {asked}, and this site allows {fits} (allows.{role})")
    if cut is not None and cut < site.bounds.min_cut:
        found.append(
            f"the cut is {cut}, and this site takes part from {site.bounds.min_cut} on (bounds.min_cut)"
        )
    for key in ("rounds", "steps"):
        asked_for, most = getattr(config.training, key), getattr(site.limits, key)
        if asked_for > most:
            found.append(f"training.{key} is {asked_for}, and this site takes at most {most} (limits.{key})")
    if site.text.source is None and config.data.source not in EMBEDDED:
        found.append(
            f"the run reads {config.data.source!r}, and only the data owner chooses what is read on this "
            "site: set text.source"
        )
    return tuple(found)


def candidates_of(site: SiteSpec, config: RunConfig) -> Candidates:
    """Return the codecs that a site may choose from with `wire: auto`; those in flight have no order."""
    ordered = min(config.training.micro_batches, config.training.in_flight) == 1
    return Candidates.within(config.wire, site.allows, ordered)


def at_site(config: RunConfig, site: SiteSpec) -> RunConfig:
    """Return the run as this site takes part in it: with its own text, copy of the model, and machine.

    A site with a text of its own is the only client of its configuration, and has all of that text.
    """
    model, clients, schedule = config.model, config.clients, config.schedule
    most = min(config.data.eval_examples or site.limits.held_out, site.limits.held_out)
    data = config.data.model_copy(update={"eval_examples": most})
    if site.model.folder is not None:
        model = model.model_copy(update={"name": site.model.folder})
    if site.text.source is not None:
        limits = data.model_dump(
            include={"max_tokens", "max_examples", "holdout", "eval_examples", "eval_part"}
        )
        data = DataSpec.model_validate({**site.text.model_dump(), **limits})
        clients = clients.model_copy(update={"shares": SharesSpec(by="iid")})
    if site.machine.device is not None:
        schedule = schedule.model_copy(update={"devices": site.machine.device})
    return config.model_copy(update={
        "model": model, "data": data, "clients": clients, "schedule": schedule,
        "devices": DevicesSpec.everywhere(site.machine.runs_on),
    })  # fmt: skip


class SitePolicy:
    """The checks of a site before its client is made or moved."""

    def __init__(
        self,
        site: SiteSpec,
        model: Model,
        head: bool,
        memory_at: Callable[[int], float] = lambda cut: 0.0,
        limits: OrderLimits | None = None,
    ) -> None:
        """`head` says whether the client holds the head; `memory_at` predicts bytes at a cut."""
        self._site, self._model, self._memory_at = site, model, memory_at
        self.limits = limits or OrderLimits(site.limits)
        """What the server may ask for in this session."""
        self._names = ParameterNames.of(model, head=head)
        self._manifest: Sequence[BaseFile] = ()
        self._tensors: Sequence[BaseTensor] = ()
        self._verified: set[str] = set()

    def check_join(self, cut: int, manifest: Sequence[BaseFile], tensors: Sequence[BaseTensor] = ()) -> None:
        """Check before the client is made, with the server's manifest. Raises ForbiddenError."""
        self._manifest, self._tensors, self._verified = manifest, tensors, set()
        verify_tokenizer(self._model, manifest)
        self.check_move(cut)

    def check_move(self, cut: int) -> None:
        """Check before the client moves to another cut. Raises ForbiddenError."""
        least = self._site.bounds.min_cut
        if cut < least:
            raise ForbiddenError(
                f"cut {cut} was asked for; this site takes part from {least} on (bounds.min_cut)"
            )
        self.check_memory(cut)
        trusted, names = self._site.model.trusted, self._names.at(cut)
        new = [name for name in names if name not in self._verified]
        by_file = verify_tensors(self._model, new, self._tensors, trusted)
        files = [file for file in needed(self._model, by_file) if file not in self._verified]
        verify(self._model, files, self._manifest, trusted)
        self._verified.update(new, files)

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
