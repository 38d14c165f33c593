"""Check a data owner's file before a session does: open the text and the model, and hold a run against it.

    SiteSpec, RunConfig, name --check_site--> [SiteFinding(subject, said, verdict), ...]

A session stops at the first thing that does not fit; here everything is looked at, and each finding says in
words of the file what was found. Nothing is trained, and nothing leaves the machine.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from splitft.config import RunConfig
from splitft.data.corpora import read_records
from splitft.data.tokens import tokenise
from splitft.deploy.manifest import ParameterNames, describe, needed
from splitft.deploy.run_terms import load_run_terms, select_sites, site_names
from splitft.deploy.site.policy import at_site, refusals
from splitft.deploy.site.setup import fixed_cut_of, memory_by_cut
from splitft.deploy.tokenizer_files import tokenizer_files
from splitft.errors import DeployError, SplitftError
from splitft.model import Model, open_model, precision
from splitft.model.devices import find_device, take_devices
from splitft.model.source import silence_transformers
from splitft.model.weights.checkpoint_files import LocalShard
from splitft.protocol import BaseFile
from splitft.run.fleet import workload_of
from splitft.run.inputs import gather
from splitft.schedule.profile import GB
from splitft.specs import DataSpec, ModelSpec, SiteSpec
from splitft.specs.data import EMBEDDED

T = TypeVar("T")
Verdict = Literal["ok", "note", "WARNING", "declines"]
NO_TEXT = (
    "text.source is null: the text of this site is NOT read. A run on {source} trains here on the text that "
    "is part of every installation, which everybody has; any other run is declined. Set text.source"
)


@dataclass(frozen=True)
class SiteFinding:
    """One thing that was looked at."""

    subject: str
    said: str
    verdict: Verdict = "ok"


def check_site(site: SiteSpec, config: RunConfig | None, name: str | None) -> list[SiteFinding]:
    """Look at everything that a run would use here; without a run, at the text and the model alone.

    `name` is the site's in the run; None if nobody knows it.
    """
    with silence_transformers():
        return list(_alone(site) if config is None else _in_run(site, config, name))


def _alone(site: SiteSpec) -> Iterator[SiteFinding]:
    """Look at a site's file without a run."""
    yield from _source(site, "python-docs")
    yield from _device(site)
    model = None
    if site.model.folder is None:
        yield SiteFinding(
            "base model", "the run's own (model.folder is null); not looked at without --run", "note"
        )
    else:
        folder = site.model.folder
        model = yield from _tried("base model", lambda: open_model(ModelSpec(name=folder)))
        if model is not None:
            yield from _files(site, model, ParameterNames.of(model, head=True), model.shape.blocks)
    if site.text.source is not None:
        data = DataSpec.model_validate(site.text.model_dump())
        yield from _counted(data, model)


def _in_run(site: SiteSpec, config: RunConfig, name: str | None) -> Iterator[SiteFinding]:
    """Look at a site's file and all that a run would use."""
    names = site_names(config)
    if name is None and len(names) == 1:
        [name] = names
    if name is not None and name not in names:
        raise DeployError(
            f"{name} is no site of this run; it has {', '.join(names)} (deploy.sites): give --name"
        )
    cut = None if name is None else fixed_cut_of(config, names.index(name))
    found = refusals(site, config, cut)
    for reason in found:
        yield SiteFinding("run", reason, "declines")
    if not found:
        yield SiteFinding("run", "asks for nothing that the file forbids")
    yield from _source(site, config.data.source)
    yield from _device(site)
    if name is None:
        listed = ", ".join(names)
        yield SiteFinding("cut", f"not known: give --name, one of {listed}", "note")
    # the run as this site takes part in it
    own = select_sites(config, (name or names[0],)) if site.text.source is not None else config
    index = 0 if site.text.source is not None else names.index(name or names[0])
    own = at_site(own, site)
    devices = take_devices(own.devices).every
    model = yield from _tried("base model", lambda: open_model(own.model, devices))
    if model is None:
        return
    yield SiteFinding("type", precision.describe(model.spec.dtype, devices))
    blocks = model.shape.blocks
    cut = blocks if config.clients.cuts == "whole" else cut
    if name is not None:
        yield SiteFinding("cut", _cut_in_words(config, cut, blocks, site))
    head, deepest = config.split.labels == "client", cut or site.bounds.min_cut
    yield from _files(site, model, ParameterNames.of(model, head=head), min(deepest, blocks))
    if site.text.source is None and config.data.source not in EMBEDDED:
        return  # it is declined, and only the data owner chooses what is read here
    inputs = yield from _tried("text", lambda: gather(own))
    if inputs is None:
        return
    client = inputs.clients[index]
    facts, stream = client.facts, client.stream
    yield SiteFinding(
        "text",
        f"{facts.train_examples:,} examples to train on, {facts.eval_examples:,} to evaluate on, "
        f"{facts.train_tokens:,} tokens a pass",
    )
    if facts.truncated:
        most = own.data.max_tokens
        yield SiteFinding(
            "text", f"{facts.truncated:,} examples are cut off at {most} tokens (data.max_tokens)", "note"
        )
    if inputs.text.dropped:
        yield SiteFinding(
            "text", f"{inputs.text.dropped:,} rows have nothing to learn and are left out", "note"
        )
    if name is not None:
        work = workload_of(own, stream)
        needs = yield from _tried(
            "memory", lambda: memory_by_cut(load_run_terms(own), name, work)[1](min(deepest, blocks)) / GB
        )
        if needs is not None:
            yield _memory(needs, min(deepest, blocks), site)
    yield SiteFinding("leaves", _what_leaves(site, config))
    yield SiteFinding("limits", _limits_in_words(site, config))


def _tried(subject: str, look: Callable[[], T]) -> Generator[SiteFinding, None, T | None]:
    """Look at one thing: return it, or yield a finding that says what is wrong with it and return None."""
    try:
        return look()
    except SplitftError as error:
        yield SiteFinding(subject, str(error), "declines")
        return None


def _device(site: SiteSpec) -> Iterator[SiteFinding]:
    """Say what the site computes on."""
    name = site.machine.runs_on
    device = yield from _tried("device", lambda: find_device(name, "machine.runs_on"))
    if device is not None:
        yield SiteFinding("device", f"computes on {device} (machine.runs_on: {name})")


def _source(site: SiteSpec, source: str) -> Iterator[SiteFinding]:
    """Say whose text is read."""
    own = site.text.source
    if own is None:
        yield SiteFinding("text", NO_TEXT.format(source=source), "WARNING")
    elif own in EMBEDDED:
        yield SiteFinding(
            "text", f"{own}, which is part of every installation and not this site's own", "WARNING"
        )
    else:
        yield SiteFinding("text", own)
        if not Path(own).expanduser().is_absolute():
            yield SiteFinding(
                "text", "the path is relative: a session looks for it from the kit's folder", "note"
            )


def _counted(data: DataSpec, model: Model | None) -> Iterator[SiteFinding]:
    """Count the rows of a text, and its tokens if there is a model to count with."""
    records = yield from _tried("text", lambda: read_records(data))
    if records is None:
        return
    blank = sum(not one.text.strip() for one in records)
    rows = f"{len(records):,} row{'s' if len(records) > 1 else ''}"
    yield SiteFinding("text", rows + (f", {blank:,} of them blank" if blank else ""))
    if model is not None:
        tokens = yield from _tried(
            "tokens", lambda: tokenise(records, model.tokenizer(), data.max_tokens, data.separator)
        )
        if tokens is not None:
            cut_off = (
                f", {tokens.truncated:,} examples cut off at {data.max_tokens}" if tokens.truncated else ""
            )
            yield SiteFinding("tokens", f"{tokens.tokens:,} in {len(tokens.examples):,} examples{cut_off}")


def _files(site: SiteSpec, model: Model, names: ParameterNames, cut: int) -> Iterator[SiteFinding]:
    """Read the base model at a cut and the tokenizer, and compare what is read with what is trusted."""
    read = names.at(cut)
    files = yield from _tried("base model", lambda: [describe(model, one) for one in needed(model, read)])
    if files is None:
        return
    size, trusted = sum(one.size for one in files), site.model.trusted
    shown = f"{len(files)} files of {size / 1e6:,.1f} MB for cut {cut}: {_hashes(files)}"
    yield SiteFinding("base model", f"{model.path}, {model.shape.blocks} blocks; {shown}")
    if trusted is not None:
        yield from _untrusted(model, read, files, trusted)
    tokenizer = yield from _tried("tokenizer", lambda: (len(model.tokenizer()), tokenizer_files(model)))
    if tokenizer is not None:
        entries, parts = tokenizer
        yield SiteFinding("tokenizer", f"{entries:,} tokens; {_hashes(parts)}")


def _untrusted(
    model: Model, read: list[str], files: list[BaseFile], trusted: Mapping[str, str]
) -> Iterator[SiteFinding]:
    """List files that are not trusted; their tensors if some are trusted by name or only they are here."""
    for file in files:
        if trusted.get(file.name) == file.sha256:
            continue
        tensors = [name for name in read if model.checkpoint.files([name]) == [file.name]]
        parts = tensors and not isinstance(model.checkpoint.shard(file.name), LocalShard)
        found = {file.name: file.sha256}
        if parts or any(name in trusted for name in tensors):
            found = {name: digest for name, (_, digest) in model.checkpoint.digests(tensors).items()}
        for name, digest in found.items():
            if trusted.get(name) != digest:
                yield SiteFinding("base model", f"{name} ({digest}) is not in model.trusted", "declines")


def _hashes(files: list[BaseFile] | tuple[BaseFile, ...]) -> str:
    """Return the names of files with the beginning of their hashes, the first few."""
    listed = ", ".join(f"{one.name} {one.sha256[:8]}" for one in files[:4])
    return listed + (f" and {len(files) - 4} more" if len(files) > 4 else "")


def _cut_in_words(config: RunConfig, cut: int | None, blocks: int, site: SiteSpec) -> str:
    least = site.bounds.min_cut
    if cut is not None:
        return f"{cut} of {blocks} blocks (clients.cuts); this site takes {least} or more"
    return (
        f"chosen by the controller {config.schedule.controller}; this site takes {least} or more of {blocks} "
        f"blocks, and is looked at here with {least}"
    )


def _memory(needs: float, cut: int, site: SiteSpec) -> SiteFinding:
    """Compare what training needs with what the owner gives."""
    budget = site.machine.memory_gb
    said = f"{needs:.3g} GB for training at cut {cut}, as predicted; libraries and text come on top"
    if budget is None:
        return SiteFinding("memory", f"{said}. No bound is set (machine.memory_gb)", "note")
    if needs > budget:
        return SiteFinding(
            "memory",
            f"{needs:.3g} GB at cut {cut}, and this site gives {budget:g} (machine.memory_gb)",
            "declines",
        )
    return SiteFinding("memory", f"{said}; this site gives {budget:g} GB")


def _what_leaves(site: SiteSpec, config: RunConfig) -> str:
    """Return in words what leaves this site in a run."""
    wire, hidden = config.wire, config.privacy.hidden
    noise = max(site.bounds.min_noise, hidden.noise)
    sent = f"hidden states in {wire.hidden}"
    sent += (
        f" with noise {noise:g} ({hidden.defence if hidden.noise else site.bounds.defence})" if noise else ""
    )
    labels = "; TOKEN IDS, so the server can read the text" if config.split.labels == "server" else ""
    return f"{sent}, gradients in {wire.gradient}, adapters in {wire.adapter}{labels}; lengths and counts"


def _limits_in_words(site: SiteSpec, config: RunConfig) -> str:
    """Return in words what the server may ask for."""
    training, limits = config.training, site.limits
    return (
        f"{training.rounds} rounds of {training.steps} steps, as the run says; {limits.hours_a_day:g} hours "
        f"of computing a day, updates up to {limits.adapter_norm:g} times a weight, at most "
        f"{limits.attempts} attempts a round"
    )
