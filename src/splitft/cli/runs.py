"""Verbs for a run before or after training: plan, report, generate, export."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from splitft.cli.app import AsJson, ConfigFile, RunFolder, console, say, verb

if TYPE_CHECKING:
    from splitft.config import RunConfig
    from splitft.tracking.table import Table

MAX_CUTS = 8
"""Cuts shown of each client; `--json` has all."""


@verb
def plan(
    file: ConfigFile,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Such as schedule.server=laptop")
    ] = None,
    as_map: Annotated[
        bool,
        typer.Option(
            "--map", help="Show which method is quickest, by clients' machines, links and steps a round."
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Predict seconds, bytes and memory of every client at every cut, without training."""
    from splitft.config import load
    from splitft.run.plan import plan as plan_run

    if as_map:
        _show_map(load(file, overrides or []), as_json)
        return
    data = plan_run(load(file, overrides or [])).to_json()
    if as_json:
        typer.echo(json.dumps(data, indent=2))
        return
    screen = console()
    for heading, table in price_tables(data):
        say(screen, heading)
        screen.print(table.to_rich())
        screen.print()
    screen.print(choice_table(data).to_rich())
    screen.print()
    screen.print(alternative_table(data).to_rich())
    say(screen, "", *choice_sentences(data))
    if data["assumption"]:
        say(screen, "", f"Assumed  {data['assumption']}")


def _show_map(config: RunConfig, as_json: bool) -> None:
    """Print which method is quickest where."""
    from splitft.run.border_map import LEGEND, border_map, map_table, memory_lines

    data = border_map(config).to_json()
    if as_json:
        typer.echo(json.dumps(data, indent=2))
        return
    screen = console()
    say(screen, f"{data['model']}, {data['blocks']} blocks", *memory_lines(data), "")
    screen.print(map_table(data).to_rich())
    say(screen, "", LEGEND)


@verb
def report(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR...", help="One or several run folders.")],
    to: Annotated[
        Path | None, typer.Option(help="HTML file.", show_default="report.html in the first DIR")
    ] = None,
) -> None:
    """Write one self-contained HTML page about a run, or about several side by side."""
    from splitft.report.page import write_report
    from splitft.report.run_record import read_run
    from splitft.tracking.comparability import differences

    page = write_report(folders, to or folders[0] / "report.html")
    if len(folders) > 1:
        for difference in differences([(str(folder), read_run(folder).summary) for folder in folders]):
            typer.echo(f"splitft: warning: these runs do not compare: {difference}", err=True)
    typer.echo(page)


@verb
def generate(
    folder: RunFolder,
    prompt: Annotated[str, typer.Argument(help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum length, in tokens.")] = 60,
    base: Annotated[bool, typer.Option("--base", help="Use the base model without the adapter.")] = False,
) -> None:
    """Continue a prompt with the fine-tuned model."""
    from splitft.run.folder import generate as continue_prompt

    typer.echo(prompt + continue_prompt(folder, prompt, max_new_tokens=max_new_tokens, adapter=not base))


@verb
def export(
    folder: RunFolder,
    to: Annotated[Path, typer.Option(help="Folder to write.")],
    merged: Annotated[
        bool, typer.Option("--merged", help="Write the whole model with the adapter merged into it.")
    ] = False,
) -> None:
    """Write the adapter as a PEFT folder, or the merged model."""
    from splitft.run.folder import export as export_run

    typer.echo(export_run(folder, to, merged=merged))


def price_tables(data: Mapping[str, Any]) -> Iterator[tuple[str, Table]]:
    """Yield, for each client, a heading and its seconds, MB and memory at up to MAX_CUTS cuts."""
    from splitft.tracking.table import Table

    for client in data["clients"]:
        prices = list(client["prices"])
        step = max(1, -(-(len(prices) - 1) // (MAX_CUTS - 1)))
        shown = prices[::step] + ([prices[-1]] if (len(prices) - 1) % step else [])
        rows = [
            ("seconds a round", *(f"{price['seconds']:.3g}" for price in shown)),
            ("MB up", *(f"{price['up_mb']:.1f}" for price in shown)),
            ("MB down", *(f"{price['down_mb']:.1f}" for price in shown)),
            ("GB of memory", *(f"{price['memory_gb']:.2f}" for price in shown)),
            ("fits", *("yes" if price["fits"] else "no" for price in shown)),
        ]
        heading = f"{client['name']}: {client['device']}; {client['link']}"
        yield heading, Table(("", *(f"cut {price['cut']}" for price in shown)), rows)


def choice_table(data: Mapping[str, Any]) -> Table:
    """Return the cuts that each controller chooses, and its round on the simulated clock."""
    from splitft.tracking.table import Table

    rows = []
    for choice in data["choices"]:
        seconds = choice["round_seconds"]
        cuts = " ".join(str(cut) for cut in choice["cuts"].values())
        rows.append(
            (
                choice["controller"],
                "–" if seconds is None else f"{seconds:.3g}",
                cuts or "–",
                choice["reason"],
            )
        )
    return Table(("controller", "seconds a round", "cuts", "why"), rows, "lrll")


def alternative_table(data: Mapping[str, Any]) -> Table:
    """Return the round of `quickest` and of the methods of the field on the same clients."""
    from splitft.tracking.table import Table

    rows = []
    for one in data["alternatives"]:
        seconds, cuts = one["round_seconds"], [str(cut) for cut in one["cuts"].values()]
        each = f"{cuts[0]} for all" if len(set(cuts)) == 1 else " ".join(cuts)
        name = "quickest" if one["method"] == "chosen" else one["method"]
        rows.append(
            (
                name,
                "–" if seconds is None else f"{seconds:.3g}",
                each if cuts else f"– ({one['lack']})",
                one["adapters"],
            )
        )
    return Table(("method", "seconds a round", "cuts", "server's factors step"), rows, "lrll")


def choice_sentences(data: Mapping[str, Any]) -> Iterator[str]:
    """Yield what the choice of `quickest` means: who is not split, and its time against the others'."""
    chosen, *others = data["alternatives"]
    if chosen["round_seconds"] is None:
        yield f"quickest finds no cuts: {chosen['lack']}."
        return
    whole = [name for name, cut in chosen["cuts"].items() if cut == data["blocks"]]
    if len(whole) == len(chosen["cuts"]):
        yield (
            "quickest splits nothing: every client trains the whole model, and only adapters travel "
            f"(schedule.max_cut={data['blocks'] - 1} splits all)."
        )
    elif whole:
        yield (
            f"quickest does not split {', '.join(whole)}: the whole model trains there, and only adapters "
            f"travel (schedule.max_cut={data['blocks'] - 1} splits all)."
        )
    parts = [one for one in others if one["method"].startswith("training.")]
    for one in parts:
        share = 1 - one["round_seconds"] / chosen["round_seconds"]
        yield f"{one['method']} would shorten the round by {100 * share:.0f} % and change no result."
    timed = [one for one in others if one["round_seconds"] is not None and one not in parts]
    if timed:
        next_best = min(timed, key=lambda one: one["round_seconds"])
        ratio = next_best["round_seconds"] / chosen["round_seconds"]
        yield (
            f"A round takes {chosen['round_seconds']:.3g} s; the quickest other method, "
            f"{next_best['method']}, takes {ratio:.2f} times as long. One step of every client is taken to "
            "be worth as much in each of them (specs/server_stepping.py)."
        )
