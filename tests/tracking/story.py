"""A short run, told event by event, small enough to add up by hand.

Two clients, two rounds of two steps. Ann's cut moves from 2 to 4 in round 2, Bob's stays at 3; Bob
misses round 2.
"""

from __future__ import annotations

from splitft.tracking.events import (
    Bar,
    CheckpointSaved,
    ClientInfo,
    CutsChanged,
    Evaluated,
    Event,
    RoundDone,
    RoundTimed,
    RunDone,
    RunStarted,
    StepDone,
    Traffic,
    Warned,
)

ANN, BOB = "ann", "bob"


def started(t: float = 100.0, **changes) -> RunStarted:
    """The first event; any field can be another."""
    facts = {
        "version": "0.1.0",
        "method": "splitft",
        "seed": 7,
        "model": "tiny",
        "blocks": 6,
        "rounds": 2,
        "steps": 2,
        "labels": "client",
        "clients": (
            ClientInfo(name=ANN, cut=2, train_examples=9, train_tokens=90, eval_examples=1, truncated=4),
            ClientInfo(name=BOB, cut=3, train_examples=5, train_tokens=50, eval_examples=2),
        ),
    }
    return RunStarted(t=t, **(facts | changes))


def step(t: float, round: int, number: int, client: str, loss: float | None, tokens: int) -> StepDone:
    """One step of a batch of two; bytes are ten a token up and eleven down."""
    return StepDone(
        t=t,
        round=round,
        step=number,
        client=client,
        loss=loss,
        tokens=tokens,
        examples=2,
        seconds={"client_forward": 0.25, "server_forward": 0.5},
        traffic=Traffic(
            up={"hidden": 6 * tokens, "gradient": 4 * tokens},
            down={"hidden": 5 * tokens, "gradient": 6 * tokens},
        ),
    )


def adapters(up: int, down: int) -> Traffic:
    return Traffic(up={"adapter": up}, down={"adapter": down})


def timed(t: float, number: int, seconds: float) -> RoundTimed:
    """A round of which Ann's one step is recorded, second by second."""
    bars = (
        (ANN, "client_forward", 0.0, 1.0), (ANN, "wait", 1.0, 2.0), (ANN, "server_forward", 2.0, 4.0),
        ("server", "server_forward", 2.0, 4.0), (ANN, "client_backward", 4.0, 5.0),
    )  # fmt: skip
    return RoundTimed(
        t=t, round=number, seconds=seconds, move_seconds=1.0, weight_bytes=100,
        legs={ANN: {"client_forward": 2.0, "wait": 1.0}}, idle={ANN: 3.0, "server": 4.0},
        bars=tuple(Bar(who=who, leg=leg, start=start, end=end) for who, leg, start, end in bars),
    )  # fmt: skip


def story() -> list[Event]:
    """The whole run, from 100 s to 130 s."""
    return [
        started(100),
        Warned(t=101, message="4 of 14 examples were cut off"),
        Evaluated(
            t=103, round=0, loss=4.0, by_client={ANN: 5.0, BOB: 3.5},
            traffic={ANN: Traffic(up={"hidden": 77})},
        ),
        CutsChanged(t=104, round=1, cuts={ANN: 2, BOB: 3}),
        step(105, 1, 0, ANN, 4.0, 10),
        step(106, 1, 0, BOB, 3.0, 30),
        step(107, 1, 1, ANN, 3.0, 30),
        step(108, 1, 1, BOB, 2.0, 10),
        RoundDone(
            t=110, round=1, participants=(ANN, BOB), aggregation_error=0.25,
            traffic={ANN: adapters(1000, 2000), BOB: adapters(100, 200)},
        ),
        timed(110, 1, 12.0),
        Evaluated(t=112, round=1, loss=3.5, by_client={ANN: 4.5, BOB: 3.0}),
        CheckpointSaved(t=113, round=1, path="checkpoints/round-0001"),
        CutsChanged(t=114, round=2, cuts={ANN: 4}, reason="ann is quick"),
        step(115, 2, 2, ANN, 2.5, 20),
        step(118, 2, 3, ANN, 2.0, 20),
        RoundDone(
            t=120, round=2, participants=(ANN,), aggregation_error=0.0,
            traffic={ANN: adapters(3000, 4000)},
        ),
        timed(120, 2, 8.0),
        Evaluated(t=125, round=2, loss=3.0, by_client={ANN: 3.0, BOB: 3.75}),
        CheckpointSaved(t=126, round=2, path="checkpoints/round-0002"),
        RunDone(t=130, rounds=2),
    ]  # fmt: skip
