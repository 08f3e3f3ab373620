"""Error rates against counts made by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fused_s2lora.training.metrics import UtteranceErrors, difference, score, summarize


def counts(reference, hypothesis, **kwargs):
    (errors,) = score([reference], [hypothesis], **{"language": "en", **kwargs})
    return errors.substitutions, errors.deletions, errors.insertions, errors.length


@pytest.mark.parametrize(
    ("reference", "hypothesis", "expected"),
    [
        ("we call it bear", "We call it bear.", (0, 0, 0, 4)),
        ("we call it bear", "we call bear", (0, 1, 0, 4)),
        ("we call it bear", "we call it a bear", (0, 0, 1, 4)),
        ("we call it bear", "we tall it beer", (2, 0, 0, 4)),
        ("we call it bear", "", (0, 4, 0, 4)),
        ("[noise]", "and and and", (0, 0, 3, 0)),
    ],
)
def test_words(reference, hypothesis, expected):
    assert counts(reference, hypothesis) == expected


def test_characters_of_chinese_after_simplification():
    assert counts("房价上涨", "訪價上漲", language="zh", unit="cer") == (1, 0, 0, 4)
    assert counts("[noise]", "上", language="zh", unit="cer") == (0, 0, 1, 0)
    assert counts("[lachen]", "Hallo Welt.", language="de", unit="cer") == (0, 0, 10, 0)
    assert counts("[noise]", "$ and", language="en", unit="cer") == (0, 0, 3, 0)  # the sign leaves a space


def test_summary_and_cap():
    errors = score(["a b c d", "e f"], ["a b c x", "e f " + "loop " * 50], language="de")
    rate = summarize(errors)
    assert rate.rate == pytest.approx(100 * 51 / 6)
    assert rate.capped_rate == pytest.approx(100 * 3 / 6)
    assert (rate.substitutions, rate.deletions, rate.insertions) == (1, 0, 50)
    assert (rate.length, rate.utterances) == (6, 2)
    assert rate.low <= rate.rate <= rate.high
    assert summarize(errors) == rate
    half = summarize([UtteranceErrors("", "", k, k, 0, 0) for k in (1, 20, 4)])  # of every utterance is wrong
    assert (half.low, half.rate, half.high) == (50, 50, 50)


def test_interval_covers_as_often_as_it_says():
    """Over many draws of 60 utterances with 20 % errors, about 95 % of the intervals hold the true rate.

    They are as wide as those by the standard error, for all utterances are as long.
    """
    rng = np.random.default_rng(0)
    held, widths = 0, []
    for seed in range(200):
        wrong = rng.binomial(5, 0.2, size=60)
        rate = summarize([UtteranceErrors("", "", 5 - k, k, 0, 0) for k in map(int, wrong)], seed=seed, resamples=300)
        held += rate.low <= 20 <= rate.high
        widths.append(rate.high - rate.low)
    assert 180 <= held <= 199
    assert np.mean(widths) == pytest.approx(2 * 1.96 * 100 * np.sqrt(0.2 * 0.8 / (60 * 5)), rel=0.05)


def test_a_long_utterance_weighs_more_in_an_interval():
    """As by the standard error of a ratio of sums, √Σ(errors − rate · length)² / Σ length."""
    lengths = np.tile([1, 19], 200)
    wrong = np.random.default_rng(0).binomial(lengths, np.tile([0.8, 0.1], 200))
    rate = wrong.sum() / lengths.sum()
    error = 100 * np.sqrt(((wrong - rate * lengths) ** 2).sum()) / lengths.sum()
    utterances = [
        UtteranceErrors("", "", n - k, k, 0, 0) for n, k in zip(lengths.tolist(), wrong.tolist(), strict=True)
    ]
    for found in (summarize(utterances), difference([wrong], [0 * wrong], lengths)):
        assert (found.low + found.high) / 2 == pytest.approx(100 * rate, abs=0.3 * error)
        assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.1)


def test_a_resample_without_a_word_has_no_errors():
    lengths = [1, 0, 0, 0]  # a third of the resamples lack the first
    rate = summarize([UtteranceErrors("", "", n, 0, 0, 0) for n in lengths])
    assert (rate.low, rate.high) == (0, 0)
    found = difference([[1, 0, 0, 0]], [[0, 0, 0, 0]], lengths)
    assert (found.low, found.high) == (0, 100)


def test_differences_made_by_hand():
    lengths = [4, 6, 10]
    same = difference([[1, 0, 2]], [[1, 0, 2]], lengths)
    assert (same.points, same.low, same.high, same.sure) == (0, 0, 0, False)
    shifted = difference([[2, 3, 5]], [[0, 0, 0]], [4, 6, 10])  # half of every utterance is wrong
    assert (shifted.points, shifted.low, shifted.high, shifted.sure) == (50, 50, 50, True)
    assert difference([[0, 0, 0]], [[2, 3, 5]], lengths).sure
    mean = difference([[1, 0, 2], [3, 0, 2]], [[1, 1, 1]], lengths)
    assert mean.points == pytest.approx(100 * (2 + 0 + 2 - 3) / 20)
    assert difference([[1, 1, 1]], [[1, 0, 2], [3, 0, 2]], lengths).points == pytest.approx(-mean.points)


def test_differences_cover_as_often_as_they_say():
    """Systems of four seeds on 200 utterances, hard and easy for both: most intervals hold the true 2 points."""
    rng = np.random.default_rng(0)
    held, widths, unpaired = 0, [], []
    for seed in range(200):
        hard = rng.beta(1, 3, size=200)
        ours, theirs = (
            rng.binomial(10, np.clip(hard + gap + rng.normal(0, 0.01, size=(4, 1)), 0, 1)) for gap in (0.02, 0.0)
        )
        truth = 100 * (np.clip(hard + 0.02, 0, 1) - hard).mean()
        found = difference(ours, theirs, np.full(200, 10), seed=seed, resamples=300)
        held += found.low <= truth <= found.high
        widths.append(found.high - found.low)
        other = difference(ours, rng.permuted(theirs, axis=1), np.full(200, 10), seed=seed, resamples=300)
        unpaired.append(other.high - other.low)
    assert 175 <= held <= 199
    assert np.mean(widths) < 0.6 * np.mean(unpaired)


def test_seeds_that_differ_widen_a_difference():
    """Where all utterances are alike, by the standard error of the means."""
    lengths = np.full(50, 100)
    ours = np.array([[20], [24], [32], [16]]) * np.ones((1, 50))
    theirs = np.array([[10], [12], [11]]) * np.ones((1, 50))
    found = difference(ours, theirs, lengths, resamples=20_000)
    error = np.sqrt(ours[:, 0].var(ddof=1) / 4 + theirs[:, 0].var(ddof=1) / 3)
    assert found.points == pytest.approx(23 - 11)
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.1)
    alone = difference(ours[:1], theirs[:1], lengths)
    assert (alone.low, alone.high) == pytest.approx((10, 10))
    two = difference(ours[:2], theirs[:1], lengths)  # a quarter of the resamples are of one of them alone
    assert (two.low, two.high) == pytest.approx((12 - 2 * np.sqrt(2), 12 + 2 * np.sqrt(2)))


def test_seeds_of_two_systems_are_drawn_apart():
    """A system against one whose seeds differ as its own do: the spread of both is in the interval."""
    counts = np.array([[10], [20], [30]]) * np.ones((1, 50))
    found = difference(counts, counts, np.full(50, 100), resamples=20_000)
    assert found.points == 0
    assert found.high - found.low == pytest.approx(2 * 1.96 * np.sqrt(2 * 100 / 3), rel=0.1)


@given(st.lists(st.sampled_from("abcde"), min_size=1), st.lists(st.sampled_from("abcde")))
def test_counts_agree_with_lengths(reference, hypothesis):
    (errors,) = score([" ".join(reference)], [" ".join(hypothesis)], language="xx")
    assert errors.length == len(reference)
    assert errors.hits + errors.substitutions + errors.insertions == len(hypothesis)
    assert errors.errors <= max(len(reference), len(hypothesis))


def test_bad_input():
    with pytest.raises(ValueError, match="2 entries and hypotheses 1"):
        score(["a", "b"], ["a"], language="en")
    with pytest.raises(ValueError, match="no error rate"):
        summarize(score(["[noise]"], ["a"], language="en"))
    with pytest.raises(ValueError, match=r"ours \(1, 2\) and theirs \(1, 1\) are not .* of \(2,\)"):
        difference([[1, 2]], [[1]], [1, 1])
    with pytest.raises(ValueError, match=r"ours \(2,\)"):
        difference([1, 2], [[1, 2]], [1, 1])
    with pytest.raises(ValueError, match=r"not .* of \(1,\)"):
        difference([[1, 2]], [[1, 2]], [1])
    with pytest.raises(ValueError, match="no error rate"):
        difference([[1]], [[1]], [0])
