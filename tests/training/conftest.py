"""Fixtures of the tests that train: small recordings, quick options, a finished comparison."""

from pathlib import Path

import pytest

from fused_s2lora.training.comparison import read_comparison, run_comparison
from fused_s2lora.training.options import TrainOptions
from fused_s2lora.training.train import train
from tests.training.comparisons import QUIET, ROWS, write
from tests.training.speech import write_folder


@pytest.fixture(scope="session")
def tones(tmp_path_factory) -> Path:
    """An audiofolder of six tones."""
    return write_folder(tmp_path_factory.mktemp("tones"))


@pytest.fixture
def short_decoding(monkeypatch):
    """Four tokens an utterance at most, for an untrained model never stops by itself."""
    monkeypatch.setattr("fused_s2lora.training.decoding.MAX_NEW_TOKENS", 4)


@pytest.fixture(scope="session")
def options(tiny_folder, tones):
    """Options of a quick run; fields can be given."""

    def make(output: Path, **fields) -> TrainOptions:
        quick = {
            "model": str(tiny_folder), "data": [str(tones)], "window": "trim", "precision": "fp32", "batch_size": 2,
            "epochs": 2.0, "save_steps": 2, "logging_steps": 1,
        }  # fmt: skip
        return TrainOptions(output=str(output), **{**quick, **fields})

    return make


@pytest.fixture(scope="session")
def finished(options, tones, tmp_path_factory) -> Path:
    """The folder of a finished run with a test set."""
    output = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fused_s2lora.training.decoding.MAX_NEW_TOKENS", 4)
        train(options(output, test=[f"same={tones}"], group_by=["age"]), console=QUIET)
    return output


@pytest.fixture(scope="session")
def quick(tiny_folder, tones) -> dict:
    """Options of quick runs."""
    return {
        "model": str(tiny_folder), "data": [str(tones)], "window": "trim", "precision": "fp32", "batch_size": 2,
        "epochs": 1, "save_steps": 2, "logging_steps": 1, "before": False, "test": [f"same={tones}"],
        "group_by": ["age"],
    }  # fmt: skip


@pytest.fixture(scope="session")
def compared(quick, tmp_path_factory) -> Path:
    """The folder of a finished comparison, in `out`."""
    folder = tmp_path_factory.mktemp("comparison")
    comparison = read_comparison(write(folder, quick, ROWS), folder / "out")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fused_s2lora.training.decoding.MAX_NEW_TOKENS", 4)
        assert len(list(run_comparison(comparison, console=QUIET))) == 10
    return folder
