"""Compare generated texts with references: BLEU, chrF, ROUGE-L and exact match.

    BLEU     n-gram precision of the corpus (Papineni et al. 2002), chrF its character n-grams (Popovic 2015):
             sacrebleu, https://aclanthology.org/W18-6319, with its standard tokens and smoothing
    ROUGE-L  longest common subsequence (Lin 2004): rouge-score, F measure with stems, best reference
    exact    the number behind `####`, as GSM8K's answers end (Cobbe et al. 2021, arXiv 2110.14168)

BLEU and chrF range from 0 to 100, ROUGE-L and exact match from 0 to 1. A hypothesis with several references
is compared with all of them. No data are downloaded.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation
from typing import Any

from splitft.errors import RunError

FINAL = "####"
"""Mark before the final answer."""
_NUMBER = re.compile(r"[-+]?[$€£]?\s*[-+]?\d[\d,]*(?:\.\d+)?|[-+]?[$€£]?\.\d+")


def overlap(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Return BLEU, chrF and ROUGE-L of hypotheses against their own references, at least one each.

    Raises RunError if the libraries are not installed.
    """
    sacrebleu, rouge_scorer = _import_libraries()
    most = max(map(len, references))
    streams = [[own[place] if place < len(own) else None for own in references] for place in range(most)]
    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)
    rouge = [
        scorer.score_multi(list(own), hypothesis)["rougeL"].fmeasure
        for own, hypothesis in zip(references, hypotheses, strict=True)
    ]
    return {
        "bleu": float(sacrebleu.corpus_bleu(list(hypotheses), streams).score),
        "chrf": float(sacrebleu.corpus_chrf(list(hypotheses), streams).score),
        "rouge_l": sum(rouge) / len(rouge),
    }


def final_number(text: str) -> Decimal | None:
    """Return the number after the first `####`, or None if there is none.

    It is the first, because a model that does not stop may continue with another problem.
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
    """Return the share of hypotheses with the final number of a reference, and with any final number."""
    answers = [final_number(hypothesis) for hypothesis in hypotheses]
    wanted = [{final_number(one) for one in own} - {None} for own in references]
    return {
        "exact_match": sum(one in own for one, own in zip(answers, wanted, strict=True)) / len(answers),
        "answered": sum(one is not None for one in answers) / len(answers),
    }


def _import_libraries() -> tuple[Any, Any]:
    try:
        import sacrebleu
        from rouge_score import rouge_scorer
    except ImportError as error:
        raise RunError(
            f"BLEU, chrF and ROUGE-L need {error.name}, which is not installed; "
            f"install it with: pip install 'splitft[eval]', or give --task perplexity"
        ) from error
    return sacrebleu, rouge_scorer
