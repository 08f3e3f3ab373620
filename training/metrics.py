"""Error rates: substitutions, deletions and insertions by utterance, their sum and differences with intervals."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import jiwer
import numpy as np
import numpy.typing as npt

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


@dataclass(frozen=True)
class Difference:
    """How many points one system's error rate is above another's on the same utterances, with a 95 % interval."""

    points: float
    low: float
    high: float

    @property
    def sure(self) -> bool:
        """Whether the interval is on one side of 0."""
        return self.low > 0 or self.high < 0


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
        output = process(reference, hypothesis)
        counts = (output.hits, output.substitutions, output.deletions, output.insertions)
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


def difference(
    ours: npt.ArrayLike, theirs: npt.ArrayLike, lengths: npt.ArrayLike, *, seed: int = 0, resamples: int = 1000
) -> Difference:
    """The error rate of one system less that of another, in points, with a 95 % percentile bootstrap interval.

    ours [S, U] and theirs [S', U] are counts of errors, one row a seed, over the same utterances of lengths [U]. Each
    resample draws the utterances once for both systems (Bisani and Ney, ICASSP 2004, "Bootstrap estimates for
    confidence intervals in ASR performance evaluation") and, where a system has several seeds, the seeds of each, whose
    spread is widened by sqrt(S / (S - 1)), for a sample's is too narrow by that. With two or three seeds the interval
    is short still, and of one it says nothing of what another would give.

    Raises:
        ValueError: shapes that do not fit, or no utterance with a length.
    """
    ours, theirs, lengths = (np.asarray(values, dtype=float) for values in (ours, theirs, lengths))
    if {array.ndim for array in (ours, theirs)} != {2} or not ours.shape[1:] == theirs.shape[1:] == lengths.shape:
        raise ValueError(f"ours {ours.shape} and theirs {theirs.shape} are not [seeds, utterances] of {lengths.shape}")
    if lengths.sum() == 0:
        raise ValueError("lengths has no reference with a word in it, so there is no error rate")
    drawn = _drawn(len(lengths), seed, resamples)
    rng = np.random.default_rng([seed, 1])
    length = np.maximum(drawn @ lengths, 1)

    def errors(counts: np.ndarray) -> np.ndarray:
        seeds = len(counts)
        shares = np.full((resamples, seeds), 1 / seeds)
        if seeds > 1:
            several = rng.multinomial(seeds, shares[0], size=resamples) / seeds
            shares = shares + (several - shares) * np.sqrt(seeds / (seeds - 1))
        return (drawn @ counts.T * shares).sum(axis=1)

    points = 100 * (errors(ours) - errors(theirs)) / length
    low, high = np.percentile(points, [2.5, 97.5])
    mean = 100 * (ours.mean(axis=0).sum() - theirs.mean(axis=0).sum()) / lengths.sum()
    return Difference(float(mean), float(low), float(high))


@functools.lru_cache(maxsize=8)
def _drawn(utterances: int, seed: int, resamples: int) -> np.ndarray:
    """How often each resample has each utterance, [resamples, utterances]; a comparison asks for it by the hundred."""
    shares = np.full(utterances, 1 / utterances)
    return np.random.default_rng(seed).multinomial(utterances, shares, size=resamples)
