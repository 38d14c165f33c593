"""Plan a model that is not here: its `config.json` is enough.

    config.json --> sizes            weights are read by a machine that is `measured`, and nowhere else
    batch_size, max_tokens --> work  where there is no tokenizer to count the tokens of the text

A folder with `config.json` alone is a few hundred bytes, so that a run of a model of many GB can be planned
before anything is downloaded. What is assumed instead of counted is said with the plan.
"""

from __future__ import annotations

from pathlib import Path

from splitft.config import RunConfig
from splitft.schedule.workload import Workload

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model",
)  # fmt: skip
"""Files of which a tokenizer has at least one."""
MEASURED = "measured"


def needs_weights(config: RunConfig) -> bool:
    """Return whether a plan has to run blocks of the model: a machine is measured."""
    devices = config.schedule.devices
    machines = devices if isinstance(devices, tuple) else (devices,)
    return MEASURED in (*machines, config.schedule.server)


def lacks_tokenizer(config: RunConfig) -> bool:
    """Return whether the model is a folder that describes itself and has no tokenizer."""
    folder = Path(config.model.name)
    here = (folder / "config.json").is_file()
    return here and not any((folder / name).is_file() for name in TOKENIZER_FILES)


def assumed_work(config: RunConfig) -> dict[str, Workload]:
    """Return each client's work if every example is as long as `data.max_tokens`, with labels throughout."""
    training, length = config.training, config.data.max_tokens
    sequences = max(1, training.batch_tokens // length) if training.batch_tokens else training.batch_size
    work = Workload(
        tokens=sequences * length,
        labelled_tokens=sequences * (length - 1),
        sequences=sequences,
        padded_length=length,
        steps=training.steps,
    )
    return {f"client-{number}": work for number in range(1, config.clients.count + 1)}


def assumption(config: RunConfig) -> str:
    """Return what a plan of this model assumes, in words; "" if it counts everything."""
    if not lacks_tokenizer(config):
        return ""
    work = next(iter(assumed_work(config).values()))
    return (
        f"{config.model.name} has no tokenizer to count the text with: every step is taken as "
        f"{work.sequences:g} sequences of {work.padded_length:g} tokens (data.max_tokens)"
    )
