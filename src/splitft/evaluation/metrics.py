"""What was written against what was to be written, in numbers that the field knows.

    BLEU     n-gram precision of the corpus (Papineni et al. 2002), chrF its character n-grams (Popovic 2015):
             sacrebleu, https://aclanthology.org/W18-6319, with its standard tokens and smoothing
    ROUGE-L  longest common subsequence (Lin 2004): rouge-score, F measure with stems, best reference
    exact    the number behind `####`, as GSM8K's answers end (Cobbe et al. 2021, arXiv 2110.14168)

BLEU and chrF are of 0 to 100, ROUGE-L and exact match of 0 to 1. With several references a hypothesis is held
against all of them. No library's data are downloaded.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation
from typing import Any

from splitft.errors import RunError

FINAL = "####"
"""What stands before the final answer."""
_NUMBER = re.compile(r"[-+]?[$€£]?\s*[-+]?\d[\d,]*(?:\.\d+)?|[-+]?[$€£]?\.\d+")


def overlap(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """BLEU, chrF and ROUGE-L of each hypothesis against its own references, at least one each.

    Raises RunError if the libraries are not installed.
    """
    sacrebleu, rouge_scorer = _libraries()
    most = max(map(len, references))
    streams = [[own[place] if place < len(own) else None for own in references] for place in range(most)]
    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)
    rouge = [
        scorer.score_multi(list(own), said)["rougeL"].fmeasure
        for own, said in zip(references, hypotheses, strict=True)
    ]
    return {
        "bleu": float(sacrebleu.corpus_bleu(list(hypotheses), streams).score),
        "chrf": float(sacrebleu.corpus_chrf(list(hypotheses), streams).score),
        "rouge_l": sum(rouge) / len(rouge),
    }


def final_number(text: str) -> Decimal | None:
    """The number behind the first `####`; None where there is none.

    Behind the first, because a model that does not stop may go on with another problem.
    """
    _, mark, rest = text.partition(FINAL)
    found = _NUMBER.search(rest.partition("\n")[0]) if mark else None
    if found is None:
        return None
    try:
        return Decimal(re.sub(r"[,$€£\s]", "", found.group()))
    except InvalidOperation:
        return None


def exact_match(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Share of hypotheses with the final number of a reference, and share with any final number."""
    said = [final_number(hypothesis) for hypothesis in hypotheses]
    wanted = [{final_number(one) for one in own} - {None} for own in references]
    return {
        "exact_match": sum(one in own for one, own in zip(said, wanted, strict=True)) / len(said),
        "answered": sum(one is not None for one in said) / len(said),
    }


def _libraries() -> tuple[Any, Any]:
    try:
        import sacrebleu
        from rouge_score import rouge_scorer
    except ImportError as error:
        raise RunError(
            f"BLEU, chrF and ROUGE-L need {error.name}, which is not installed; "
            f"install it with: pip install 'splitft[eval]', or give --task perplexity"
        ) from error
    return sacrebleu, rouge_scorer
