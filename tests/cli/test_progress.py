"""What one sees of a run: a moving line on a terminal, plain lines in a pipe, and the table at the end."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from splitft.cli.progress import Progress
from splitft.tracking.events import Evaluated, RunResumed, Warned
from splitft.tracking.summary import client_table, summarise
from tracking.story import ANN, BOB, started, step, story


def console(terminal: bool, width: int = 120) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=width, color_system=None)


def shown(told: Console) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", told.file.getvalue())


def lines(events, terminal: bool = False) -> list[str]:
    """What a run leaves in a pipe, line by line."""
    told = console(terminal)
    with Progress(told) as progress:
        for event in events:
            progress(event)
    return shown(told).splitlines()


def test_in_a_pipe_a_run_tells_what_matters_in_plain_lines():
    first, *others = lines(story())
    assert first == f"splitft: tiny, 6 blocks, 2 clients. {started().privacy}"
    assert others == [
        "warning: 4 of 14 examples were cut off",
        "before training: held-out loss 4.000",
        "round 1: cuts ann 2, bob 3",
        "round 1/2: step 1/8 · loss 4.000",
        "after round 1: held-out loss 3.500 (before training 4.000)",
        "round 2: cuts ann 4 (ann is quick)",
        "round 2/2: step 5/8 · loss 2.500",
        "after round 2: held-out loss 3.000 (before training 4.000)",
    ]


def test_the_first_line_says_the_type_and_why():
    why = "float32 (this processor has no bfloat16 instructions)"
    assert lines([started(precision=why)])[0].startswith(f"splitft: tiny in {why}, 6 blocks, 2 clients")


def test_in_a_pipe_lines_of_progress_keep_a_distance():
    events = [started(), *(step(t, 1, t, ANN, 2.0, 10) for t in range(12))]
    assert [line[:20] for line in lines(events)[1:]] == [
        "round 1/2: step 1/8 ",
        "round 1/2: step 6/8 ",
        "round 1/2: step 11/8",
    ]


def test_the_token_accuracy_is_told_where_it_is_known():
    told = Evaluated(round=0, loss=4.0, by_client={ANN: 4.0}, accuracy=0.3125)
    assert lines([told]) == ["before training: held-out loss 4.000, token accuracy 31.2 %"]


def test_speed_and_time_left_are_those_of_the_last_steps():
    # one step of 10 tokens each 2 s: 5 tokens/s; after the fourth of eight steps, 8 s are left
    events = [started(), *(step(2.0 * n, 1, n, ANN, 2.0, 10) for n in range(4))]
    assert "round 1/2: step 4/8 · 5 tokens/s · loss 2.000 · 0:00:08 left" in lines(events)


def test_a_line_in_a_pipe_is_one_line_however_long():
    assert lines([Warned(message="long " * 100)]) == ["warning: " + "long " * 100]


def test_on_a_terminal_the_bar_moves_and_the_lines_stay():
    told = console(terminal=True)
    with Progress(told) as progress:
        for event in story():
            progress(event)
    text = shown(told)
    assert "round 2/2" in text
    assert "step 6/8" in text
    assert "after round 2: held-out loss 3.000 (before training 4.000)" in text
    assert "reading the model and the text" in text


def test_names_and_messages_are_text_never_markup():
    events = [Warned(message="[bold]not bold[/bold] [/]"), started(model="[red]tiny[/red]")]
    text = "\n".join(lines(events))
    assert "[bold]not bold[/bold] [/]" in text
    assert "[red]tiny[/red]" in text


def test_a_resumed_run_goes_on_counting_where_its_checkpoint_was():
    told = console(terminal=False)
    with Progress(told) as progress:
        progress.remember(event for event in story() if event.t <= 115)
        progress(RunResumed(t=200, round=2))
        progress(step(201, 2, 2, ANN, 2.5, 20))
    assert shown(told).splitlines() == ["continuing with round 2", "round 2/2: step 5/8 · loss 2.500"]


def test_an_event_before_the_beginning_does_no_harm():
    assert lines([step(1, 1, 0, ANN, 2.0, 3)]) == ["round 1/1: step 1/? · loss 2.000"]


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_at_the_end_has_a_row_a_client(width):
    told = console(terminal=False, width=width)
    told.print(client_table(summarise(story())).to_rich())
    heading, ann, bob = (line.split() for line in shown(told).splitlines())
    assert " ".join(heading) == "client cut examples tokens loss before loss after MB up MB down"
    assert ann == [ANN, "2", "→", "4", "8", "80", "5.000", "3.000", "0.0", "0.0"]
    assert bob == [BOB, "3", "4", "40", "3.500", "3.750", "0.0", "0.0"]


def test_a_name_in_the_table_is_text_never_markup():
    summary = summarise(story())
    summary["clients"][0]["name"] = "[/]ward"
    told = console(terminal=False)
    told.print(client_table(summary).to_rich())
    assert "[/]ward" in shown(told)


def test_a_loss_that_is_not_reported_is_said_to_be_so():
    events = [started(rounds=1), step(1, 1, 0, ANN, None, 3)]
    assert lines(events)[-1].endswith("loss not reported")
    assert "loss not reported" in " ".join(lines(events, terminal=True))
