"""What a finished run is good for: continue a prompt, or export the adapter or the merged model."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

from splitft.errors import RunError
from splitft.export import with_adapter, write_merged
from splitft.model import open_model
from splitft.model.quiet import silence_transformers
from splitft.run.folder import Run


def generate(folder: Path | str, prompt: str, *, max_new_tokens: int = 60, adapter: bool = True) -> str:
    """Continue a prompt with a run's model, by greedy decoding; without its adapter if so asked."""
    run = Run(Path(folder))
    with silence_transformers():
        model = open_model(run.config.model)
        tokenizer = model.tokenizer()
        whole = with_adapter(run.adapter_dir, model.path, model.dtype)
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        if not inputs["input_ids"].shape[1]:
            raise RunError("the prompt is empty; give some words to continue")
        options = {"max_new_tokens": max_new_tokens, "do_sample": False, "repetition_penalty": 1.1}
        with contextlib.nullcontext() if adapter else whole.disable_adapter():
            tokens = whole.generate(**inputs, **options, pad_token_id=tokenizer.eos_token_id)
    continuation: str = tokenizer.decode(tokens[0][inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return continuation


def export(folder: Path | str, to: Path | str, *, merged: bool = False) -> Path:
    """Copy a run's adapter as a PEFT folder, or write the base model with it folded in.

    Raises RunError if `to` exists and is not empty, or the run has no adapter yet.
    """
    run, to = Run(Path(folder)), Path(to)
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise RunError(f"{to} exists already; choose another --to")
    if not (run.adapter_dir / "adapter_config.json").is_file():
        raise RunError(f"{run.folder} holds no adapter; it is written when a run has finished a round")
    if merged:
        with silence_transformers():
            return write_merged(run.adapter_dir, open_model(run.config.model), to)
    shutil.copytree(run.adapter_dir, to, dirs_exist_ok=True)
    return to
