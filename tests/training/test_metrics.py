"""Error rates against counts made by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fused_s2lora.training.metrics import score, summarize


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


def test_summary_and_cap():
    errors = score(["a b c d", "e f"], ["a b c x", "e f " + "loop " * 50], language="de")
    rate = summarize(errors)
    assert rate.rate == pytest.approx(100 * 51 / 6)
    assert rate.capped_rate == pytest.approx(100 * 3 / 6)
    assert (rate.substitutions, rate.deletions, rate.insertions) == (1, 0, 50)
    assert (rate.length, rate.utterances) == (6, 2)
    assert rate.low <= rate.rate <= rate.high
    assert summarize(errors) == rate


def test_interval_covers_as_often_as_it_says():
    """Over many draws of 60 utterances with 20 % errors, about 95 % of the intervals hold the true rate."""
    import numpy as np

    from fused_s2lora.training.metrics import UtteranceErrors

    rng = np.random.default_rng(0)
    held = 0
    for seed in range(200):
        wrong = rng.binomial(5, 0.2, size=60)
        rate = summarize([UtteranceErrors("", "", 5 - k, k, 0, 0) for k in map(int, wrong)], seed=seed, resamples=300)
        held += rate.low <= 20 <= rate.high
    assert 180 <= held <= 199


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
