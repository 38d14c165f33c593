"""How many tokens a run's batches have, client by client, kept between plans.

    text, tokenizer, division, batches --hash--> counts/KEY.json --> Workload of every client

Reading and tokenising takes seconds, and planning asks again and again with other machines, links or cuts.
The counts depend on none of these, so they are kept in the user's cache folder beside the calibrations, under
a hash of what they do depend on: of a file its content, so that another text is never taken for this one.
"""

from __future__ import annotations

import hashlib
import json
import platform
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import TypeAdapter, ValidationError

from splitft.cache import cache_folder, put
from splitft.config import RunConfig
from splitft.errors import ScheduleError
from splitft.schedule.workload import Workload

if TYPE_CHECKING:  # planning what is kept takes no torch
    from splitft.model import Model

_WORK = TypeAdapter(dict[str, Workload])


def counted(config: RunConfig, model: Model) -> dict[str, Workload]:
    """What each client trains on in a round, as counted before or now. Raises what `gather` raises."""
    from splitft.run.one_place import in_one_place

    path = cache_folder() / "counts" / f"{_key(config, model)}.json"
    steps = in_one_place(config).training.steps
    try:
        kept = _WORK.validate_python(json.loads(path.read_text(encoding="utf-8")))
        return {name: replace(one, steps=steps) for name, one in kept.items()}
    except (OSError, ValueError, ValidationError, ScheduleError):
        pass  # not there, or of another version: count
    from splitft.run.fleet import workload_of
    from splitft.run.setup import gather

    gathered = gather(config)
    work = {client.name: workload_of(gathered.config, client.stream) for client in gathered.clients}
    put(path, json.dumps(_WORK.dump_python(work)))
    return work


def digest_of(path: Path) -> str | None:
    """A hash of a file's content; None if there is no such file."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _key(config: RunConfig, model: Model) -> str:
    """Whatever the counts depend on, as a file name."""
    code = [path.stat().st_mtime_ns for path in sorted(Path(__file__).parent.parent.glob("data/*.py"))]
    facts = (
        config.data.model_dump_json(), digest_of(Path(config.data.source)), platform.python_version(),
        model.path, [digest_of(path) for path in sorted(Path(model.path).glob("*token*"))],
        model.shape.max_positions,
        config.clients.model_dump_json(exclude={"cuts"}), config.seed,
        config.training.batch_size, config.training.batch_tokens, code,
    )  # fmt: skip
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:24]
