"""Train from Python, print the summary, and load the adapter with peft."""

from __future__ import annotations

import sys
from pathlib import Path

import splitft
from splitft.config import from_mapping


def main(out: Path) -> None:
    config = from_mapping(
        {
            "data": {"source": "python-docs", "max_tokens": 48, "eval_examples": 4},
            "clients": {"count": 2, "cuts": [2, 12]},
            "training": {"rounds": 1, "steps": 3, "batch_size": 2, "lr": 1e-3},
        }
    )
    run = splitft.train(config, out)
    before, after = run.summary["eval_loss"]
    print(f"held-out loss {before:.3f} before, {after:.3f} after")
    for client in run.summary["clients"]:
        print(f"{client['name']}: cut {client['cut'][0]}, {client['bytes_up'] / 1e6:.1f} MB up")

    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from splitft.model import open_model

    base = AutoModelForCausalLM.from_pretrained(open_model(config.model).path)
    model = PeftModel.from_pretrained(base, str(run.adapter_dir))
    print(
        f"peft loaded {sum(p.numel() for n, p in model.named_parameters() if 'lora_' in n):,} LoRA parameters"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/from-python"))
