import csv
import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from fused_s2lora.training import synthesis
from fused_s2lora.training.data import load_speech
from fused_s2lora.training.demo import TEST_UTTERANCES, TRAINING_UTTERANCES
from fused_s2lora.training.errors import UserError
from fused_s2lora.training.synthesis import (
    TEST_CHILDREN,
    TEST_PATTERNS,
    TRAINING_CHILDREN,
    TRAINING_PATTERNS,
    Child,
    Synthesizer,
    sentences,
    write_speech,
)

TEXT = "The rabbit is sleeping in the garden."


@pytest.fixture(scope="module")
def synthesizer() -> Synthesizer:
    pytest.importorskip("espeakng_loader", reason='needs pip install -e ".[demo]"')
    return Synthesizer()


def test_sentences_of_the_test_are_not_in_the_training() -> None:
    tested = sentences(TEST_UTTERANCES, 1, TEST_PATTERNS)
    training = sentences(TRAINING_UTTERANCES, 2, TRAINING_PATTERNS)
    assert not set(TRAINING_PATTERNS) & set(TEST_PATTERNS)
    assert len(set(training)) == TRAINING_UTTERANCES >= 200
    assert len(set(tested)) == TEST_UTTERANCES
    assert not set(training) & set(tested)


def test_sentences_repeat_with_the_seed_and_change_with_it() -> None:
    first, again, other = (sentences(20, seed, TRAINING_PATTERNS) for seed in (3, 3, 4))
    assert first == again != other


def test_sentences_are_written_as_sentences() -> None:
    for sentence in sentences(300, 0, TRAINING_PATTERNS + TEST_PATTERNS):
        assert sentence[0].isupper()
        assert sentence[-1] in ".?"
        assert "{" not in sentence
        words = sentence.lower().split()
        assert not any(word == "a" and after[0] in "aeio" for word, after in itertools.pairwise(words)), sentence


def test_voices_of_the_test_are_not_in_the_training() -> None:
    assert not {child.voice for child in TRAINING_CHILDREN} & {child.voice for child in TEST_CHILDREN}
    assert not {child.name for child in TRAINING_CHILDREN} & {child.name for child in TEST_CHILDREN}


@pytest.mark.parametrize("child", TRAINING_CHILDREN + TEST_CHILDREN, ids=lambda child: child.voice)
def test_every_voice_speaks(synthesizer: Synthesizer, child: Child) -> None:
    samples = synthesizer.speak(TEXT, child, np.random.default_rng(0))
    assert samples.dtype == np.float32
    assert 1.5 < len(samples) / 16_000 < 5
    assert 0.5 < np.abs(samples).max() < 1


def test_raising_makes_it_shorter_and_higher(synthesizer: Synthesizer) -> None:
    def spoken(raised: float) -> np.ndarray:
        return synthesizer.speak(TEXT, Child("c", "en-us+f2", 130, 50, 50, raised, 8), np.random.default_rng(0))

    def centroid_hz(samples: np.ndarray) -> float:
        power = np.abs(np.fft.rfft(samples)) ** 2
        return float((np.fft.rfftfreq(len(samples), 1 / 16_000) * power).sum() / power.sum())

    adult, child = spoken(1.0), spoken(1.4)
    silence = round(0.5 * 16_000)
    assert (len(adult) - silence) / (len(child) - silence) == pytest.approx(1.4, rel=0.02)
    assert centroid_hz(child) > 1.15 * centroid_hz(adult)


def test_an_unknown_voice_is_named(synthesizer: Synthesizer) -> None:
    with pytest.raises(UserError, match="no voice 'xx-none'"):
        synthesizer.speak(TEXT, Child("c", "xx-none", 130, 50, 50, 1.3, 8), np.random.default_rng(0))


def test_a_missing_library_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    with pytest.raises(UserError, match=r"fused-s2lora\[demo\]"):
        Synthesizer()


def test_a_written_folder_is_read_back(synthesizer: Synthesizer, tmp_path: Path) -> None:
    texts = sentences(5, 0, TEST_PATTERNS)
    write_speech(tmp_path / "set", texts, TEST_CHILDREN, seed=0)
    with (tmp_path / "set" / "metadata.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["text"] for row in rows] == texts
    assert [row["speaker"] for row in rows] == ["iris", "jack", "kate", "liam", "iris"]
    assert soundfile.info(tmp_path / "set" / rows[0]["file_name"]).samplerate == 16_000
    speech = load_speech(tmp_path / "set")
    assert len(speech) == 5
    assert not speech.skipped
    assert speech.dataset["age"][:] == ["7", "8", "9", "6", "7"]


def test_a_folder_that_cannot_be_written_is_named(synthesizer: Synthesizer, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        write_speech(tmp_path / "file" / "set", sentences(1, 0, TEST_PATTERNS), TEST_CHILDREN, seed=0)


@pytest.mark.slow
def test_new_processes_write_the_same_audio(synthesizer: Synthesizer, tmp_path: Path) -> None:
    code = f"""
import sys
from pathlib import Path
from {synthesis.__name__} import TRAINING_CHILDREN, TRAINING_PATTERNS, sentences, write_speech
write_speech(Path(sys.argv[1]), sentences(12, 5, TRAINING_PATTERNS), TRAINING_CHILDREN, seed=6)
"""
    for name in "ab":
        subprocess.run([sys.executable, "-c", code, str(tmp_path / name)], check=True)
    files = sorted(file.name for file in (tmp_path / "a").iterdir())
    assert len(files) == 13
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
