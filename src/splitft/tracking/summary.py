"""The summary of a run: a pure fold over its events (`summary_fold`), and how it is shown.

    [RunStarted, CutsChanged, Evaluated(0), StepDone..., RoundDone(1), Evaluated(1), ...] --> summary.json

The run need not be finished: after a crash, the summary holds what is known. Losses are nats per labeled
token. `bytes` counts training and adapters by role and direction; evaluation is counted apart, in
`evaluation_bytes`, because a deployment may evaluate at any time. Numbers that are not finite become null, so
that the file is plain JSON.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from splitft.tracking.events import Event
from splitft.tracking.log import read_events, settled
from splitft.tracking.summary_fold import SummaryFold
from splitft.tracking.summary_writer import put_summary
from splitft.tracking.table import Table


def summarise(events: Iterable[Event]) -> dict[str, Any]:
    """Return the summary of events; empty without a RunStarted.

    `eval_loss`, `eval_accuracy` and each client's `loss` and `accuracy` have one number before training and
    one after each round (no number where accuracy is not reported); `cut`,
    `train_loss` and `aggregation_error` have one for each round. `examples` and `tokens` count what was
    trained on, repetitions included.
    """
    return SummaryFold(settled(events)).summary()


def spent_text(spent: Mapping[str, Any]) -> str:
    """Describe epsilon after a round in one sentence."""
    if spent["epsilon"] is None:
        return f"Updates were bounded without noise ({spent['clipped']} of round {spent['round']} clipped)."
    return (
        f"After round {spent['round']}, epsilon {spent['epsilon']:.3g} at delta {spent['delta']:g} for a "
        f"client that took part in every round ({spent['epsilon_of_round']:.3g} for one round)."
    )


def write_summary(out: Path) -> dict[str, Any]:
    """Write `summary.json` of a run folder from its `events.jsonl`, and return it."""
    return put_summary(summarise(read_events(out / "events.jsonl")), out)


def client_table(summary: Mapping[str, Any]) -> Table:
    """Return one row for each client: what it trained on, its losses and its traffic.

    A loss that does not fit the others' has a question mark.
    """
    outliers = summary.get("loss_outliers") or {}
    rows = [
        (
            client["name"],
            _in_short(client["cut"]),
            f"{client['examples']:,}",
            f"{client['tokens']:,}",
            loss_text(client["loss"], 0),
            loss_text(client["loss"], -1) + " (?)" * (client["name"] in outliers),
            f"{client['bytes_up'] / 1e6:.1f}",
            f"{client['bytes_down'] / 1e6:.1f}",
        )
        for client in summary["clients"]
    ]
    headings = ("client", "cut", "examples", "tokens", "loss before", "loss after", "MB up", "MB down")
    return Table(headings, rows)


def headline(summary: Mapping[str, Any]) -> str:
    """Describe the change of the held-out loss, and name the clients on which it did not fall."""
    losses = summary["eval_loss"]
    if len(losses) < 2 or losses[0] is None or losses[-1] is None:
        return "Held-out loss: not measured before and after."
    text = f"Held-out loss of all clients: {losses[0]:.3f} before, {losses[-1]:.3f} after"
    text += f" ({change_text(losses)})." if losses[0] else "."
    if accuracy := accuracy_text(summary.get("eval_accuracy") or []):
        text += f" Token accuracy: {accuracy}."
    if outliers := summary.get("loss_outliers"):
        text += f" Left out, as their reports do not fit the others': {', '.join(outliers)}."
    lacking, clients = summary["not_improved"], len(summary["clients"])
    if not lacking:
        return f"{text} It fell on every client."
    who = ", ".join(lacking) if len(lacking) <= 5 else f"{len(lacking)} of {clients} clients"
    return f"{text} It did not fall on {who}."


def change_text(losses: Sequence[float | None]) -> str:
    """Return the change from the first loss to the last in percent; a dash where either is unknown."""
    first, last = (losses[0], losses[-1]) if losses else (None, None)
    return f"{100 * (last / first - 1):+.1f} %" if first and last is not None else "–"


def accuracy_text(shares: Sequence[float | None]) -> str:
    """Return the first and the last token accuracy in percent; empty where either is unknown."""
    first, last = (shares[0], shares[-1]) if len(shares) > 1 else (None, None)
    return "" if first is None or last is None else f"{100 * first:.1f} % before, {100 * last:.1f} % after"


def share_text(shares: Sequence[float | None]) -> str:
    """Return the last of the shares in percent; a dash where it is not known."""
    last = shares[-1] if shares else None
    return "–" if last is None else f"{100 * last:.1f} %"


def loss_text(losses: Sequence[float | None], index: int) -> str:
    """Return one of the losses as text; a dash where it was not measured or is not finite."""
    value = losses[index] if losses else None
    return "–" if value is None else f"{value:.3f}"


def clock(seconds: float) -> str:
    """Format seconds as h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"


def _in_short(cuts: Sequence[int]) -> str:
    """Return a client's cuts by round, without repetitions; of more than three, the first and the last."""
    moves = [cut for index, cut in enumerate(cuts) if index == 0 or cut != cuts[index - 1]]
    return " → ".join(map(str, moves)) if len(moves) <= 3 else f"{moves[0]} → … → {moves[-1]}"
