"""Error rates: substitutions, deletions and insertions by utterance, and their sum with a bootstrap interval."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import jiwer
import numpy as np

from .text import normalizer

Unit = Literal["wer", "cer"]


@dataclass(frozen=True)
class UtteranceErrors:
    """One utterance after normalisation; counts are words (unit "wer") or characters ("cer")."""

    reference: str
    hypothesis: str
    hits: int
    substitutions: int
    deletions: int
    insertions: int

    @property
    def length(self) -> int:
        """Words or characters of the reference."""
        return self.hits + self.substitutions + self.deletions

    @property
    def errors(self) -> int:
        """Substitutions, deletions and insertions."""
        return self.substitutions + self.deletions + self.insertions


@dataclass(frozen=True)
class ErrorRate:
    """Error rate over utterances. `rate`, `capped_rate`, `low` and `high` in percent, the rest are counts."""

    rate: float
    low: float  # bootstrap over utterances, 95 % interval
    high: float
    capped_rate: float  # no utterance counts more errors than its reference has words: endless repetition is bounded
    substitutions: int
    deletions: int
    insertions: int
    length: int
    utterances: int


def score(
    references: Sequence[str], hypotheses: Sequence[str], *, language: str | None, unit: Unit = "wer"
) -> list[UtteranceErrors]:
    """Errors of each hypothesis, both sides normalised as Whisper's authors do for the language.

    A reference that is empty after normalisation counts every word of its hypothesis as an insertion.

    Raises:
        ValueError: the two sequences differ in length.
    """
    if len(references) != len(hypotheses):
        raise ValueError(f"references has {len(references)} entries and hypotheses {len(hypotheses)}")
    normalize = normalizer(language)
    process = jiwer.process_words if unit == "wer" else jiwer.process_characters
    scored = []
    for reference, hypothesis in zip(map(normalize, references), map(normalize, hypotheses), strict=True):
        if reference:
            output = process(reference, hypothesis)
            counts = (output.hits, output.substitutions, output.deletions, output.insertions)
        else:
            counts = (0, 0, 0, len(hypothesis.split()) if unit == "wer" else len(hypothesis))
        scored.append(UtteranceErrors(reference, hypothesis, *counts))
    return scored


def summarize(utterances: Sequence[UtteranceErrors], *, seed: int = 0, resamples: int = 1000) -> ErrorRate:
    """The error rate over `utterances`, with a 95 % percentile bootstrap interval over them.

    Raises:
        ValueError: no utterance, or no reference with a word in it.
    """
    errors = np.array([utterance.errors for utterance in utterances], dtype=float)
    lengths = np.array([utterance.length for utterance in utterances], dtype=float)
    if lengths.sum() == 0:
        raise ValueError("utterances has no reference with a word in it, so there is no error rate")
    drawn = np.random.default_rng(seed).integers(len(errors), size=(resamples, len(errors)))
    rates = 100 * errors[drawn].sum(axis=1) / np.maximum(lengths[drawn].sum(axis=1), 1)
    low, high = np.percentile(rates, [2.5, 97.5])
    return ErrorRate(
        rate=100 * errors.sum() / lengths.sum(),
        low=float(low),
        high=float(high),
        capped_rate=100 * np.minimum(errors, lengths).sum() / lengths.sum(),
        substitutions=sum(utterance.substitutions for utterance in utterances),
        deletions=sum(utterance.deletions for utterance in utterances),
        insertions=sum(utterance.insertions for utterance in utterances),
        length=int(lengths.sum()),
        utterances=len(utterances),
    )
