from pathlib import Path

import pytest
from rich.console import Console

from fused_s2lora.training import demo as demo_module
from fused_s2lora.training.data import load_speech
from fused_s2lora.training.demo import demo
from fused_s2lora.training.errors import UserError
from fused_s2lora.training.evaluation import Evaluation, Heard, TestSet, score_set
from fused_s2lora.training.options import TrainOptions
from fused_s2lora.training.synthesis import TEST_CHILDREN, TEST_PATTERNS, TRAINING_CHILDREN, sentences, write_speech


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[TrainOptions]:
    """Stands in for training: keeps the options, and hears every second word before, all of them after."""
    asked: list[TrainOptions] = []

    def train(options: TrainOptions, *, fresh: bool, console: Console) -> list[Evaluation]:
        asked.append(options)
        speech = load_speech(options.test[0].removeprefix("test="), progress=False)
        texts = speech.dataset["text"][:]
        heard = {"before": [" ".join(text.split()[::2]) for text in texts], options.method: texts}
        return [
            Evaluation(label, [score_set("test", TestSet(speech, "en"), [Heard(text, True) for text in said])])
            for label, said in heard.items()
        ]

    monkeypatch.setattr(demo_module, "train", train)
    return asked


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("espeakng_loader", reason='needs pip install -e ".[demo]"')
    monkeypatch.setattr(demo_module, "TRAINING_UTTERANCES", 10)
    monkeypatch.setattr(demo_module, "TEST_UTTERANCES", 6)


def test_synthetic_speech_is_made_and_trained_on(small: None, trained: list[TrainOptions], tmp_path: Path) -> None:
    console = Console(record=True, width=200)
    demo(output=str(tmp_path), console=console)
    (options,) = trained
    assert options.method == "s2lora"
    assert options.window == "trim"
    assert options.epochs == 1
    training = load_speech(options.data[0], progress=False)
    test = load_speech(options.test[0].removeprefix("test="), progress=False)
    assert (len(training), len(test)) == (10, 6)
    for column in ("text", "speaker"):
        assert not set(training.dataset[column][:]) & set(test.dataset[column][:])
    assert Path(options.output).is_relative_to(tmp_path)
    shown = console.export_text()
    assert test.dataset["text"][0] in shown
    assert "heard before" in shown


def test_called_again_it_keeps_its_speech_and_run(small: None, trained: list[TrainOptions], tmp_path: Path) -> None:
    demo(output=str(tmp_path), console=Console(quiet=True))
    written = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.flac")}
    assert len(written) == 16
    demo(output=str(tmp_path), console=Console(quiet=True))
    assert written == {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.flac")}
    assert trained[0] == trained[1]


def test_own_recordings_are_used_as_they_are(small: None, trained: list[TrainOptions], tmp_path: Path) -> None:
    write_speech(tmp_path / "mine", sentences(4, 0, TEST_PATTERNS), TRAINING_CHILDREN, seed=0)
    write_speech(tmp_path / "theirs", sentences(3, 1, TEST_PATTERNS), TEST_CHILDREN, seed=1)
    output = tmp_path / "out"
    demo(data=str(tmp_path / "mine"), test=str(tmp_path / "theirs"), output=str(output), console=Console(quiet=True))
    (options,) = trained
    assert options.data == [str(tmp_path / "mine")]
    assert options.test == [f"test={tmp_path / 'theirs'}"]
    assert options.epochs is None  # little speech is passed over until there are steps enough
    assert not list(output.rglob("*.flac"))


@pytest.mark.parametrize("given", [{"data": "a"}, {"test": "a"}])
def test_data_and_test_go_together(given: dict[str, str], trained: list[TrainOptions], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--data and --test together"):
        demo(**given, output=str(tmp_path))
    assert trained == []


def test_misheard_utterances_are_shown_with_both_transcripts(
    small: None, trained: list[TrainOptions], tmp_path: Path
) -> None:
    console = Console(record=True, width=240)
    before, after = demo(output=str(tmp_path), console=console)
    shown = console.export_text()
    heard = zip(before.sets[0].hypotheses, after.sets[0].hypotheses, strict=True)
    rows = [now for first, now in heard if first in shown and now in shown]
    assert len(rows) >= 5
