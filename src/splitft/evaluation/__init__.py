"""How good a model is at a task: held-out loss, and what it writes against what was to be written.

    examples --likelihood--> loss, perplexity
    prompts --generation--> continuations --metrics--> BLEU, chrF, ROUGE-L, exact match

`tasks` has every task by name. All of it works on whole models of transformers and peft: what is measured is
what a user gets who loads the exported adapter.
"""

from splitft.evaluation.tasks import TASKS, Advance, Reader, TaskResult, suitable_tasks

__all__ = ["TASKS", "Advance", "Reader", "TaskResult", "suitable_tasks"]
