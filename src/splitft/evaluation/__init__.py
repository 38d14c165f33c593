"""Evaluation of a model: held-out loss, and what it writes compared with references.

    examples --likelihood--> loss, perplexity
    prompts --generation--> continuations --metrics--> BLEU, chrF, ROUGE-L, exact match

`tasks` has every task by name. They run on whole models of transformers and peft, so the metrics are those of
a user who loads the exported adapter.
"""
