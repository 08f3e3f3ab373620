"""`--start-utterances`: a run whose shared factors start from gradients."""

import pytest
import torch

from fused_s2lora.training import train as train_module
from fused_s2lora.training.errors import DivergedError, UserError
from fused_s2lora.training.methods import check
from fused_s2lora.training.options import TrainOptions
from fused_s2lora.training.output import read_json
from fused_s2lora.training.train import train
from tests.training.comparisons import QUIET
from tests.training.speech import write_folder


@pytest.fixture
def factors(monkeypatch):
    """The factors that each training began with."""
    found = []
    begin = train_module.SpeechTrainer.train

    def recorded(trainer, *args, **kwargs):
        pairs = trainer.model.base_model.s2lora_factors
        found.append({name: value.detach().clone() for name, value in pairs.named_parameters()})
        return begin(trainer, *args, **kwargs)

    monkeypatch.setattr(train_module.SpeechTrainer, "train", recorded)
    return found


def same(one, other) -> bool:
    assert len(one) == 10
    return all(torch.equal(one[name], other[name]) for name in one)


def test_a_run_starts_from_gradients_once(options, tmp_path, factors, monkeypatch):
    def begun(name, **fields):
        return options(tmp_path / name, epochs=1.0, save_steps=1, **{"start_utterances": 128, **fields})

    train(begun("gradients"), console=QUIET)
    start = read_json(tmp_path / "gradients" / "start.json")
    assert start["batches"] == 3, "all there are"
    assert len(start["explained"]) == 5
    assert all(0.2 < share <= 1 for share in start["explained"].values())
    train(begun("again"), console=QUIET)
    assert same(*factors)
    train(begun("random", start_utterances=0), console=QUIET)
    assert not (tmp_path / "random" / "start.json").exists()
    train(begun("fewer", start_utterances=1), console=QUIET)
    assert read_json(tmp_path / "fewer" / "start.json")["batches"] == 1
    assert not same(factors[0], factors[2])
    assert not same(factors[0], factors[3])

    def killed(self, args, state, control, **kwargs):
        if state.global_step == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train_module.StepTimes, "on_step_end", killed)
        with pytest.raises(KeyboardInterrupt):
            train(begun("resumed"), console=QUIET)
    with monkeypatch.context() as patch:
        patch.setattr(train_module, "start_from_gradients", None)  # what goes on has its factors already
        train(begun("resumed"), console=QUIET)


def test_what_has_no_such_start(tmp_path):
    def options(**fields):
        return TrainOptions(["speech"], str(tmp_path), **fields)

    with pytest.raises(UserError, match="--start-utterances goes with --method s2lora, not lora"):
        check(options(method="lora", start_utterances=8))
    with pytest.raises(UserError, match="does not go with --preset unshared"):
        check(options(preset="unshared", start_utterances=8))
    with pytest.raises(UserError, match="--start-utterances is -1; give 0 or more"):
        options(start_utterances=-1)


def test_gradients_that_are_not_finite_are_told(options, tmp_path, monkeypatch):
    losses = train_module.SpeechTrainer._losses
    monkeypatch.setattr(
        train_module.SpeechTrainer, "_losses",
        lambda *given: {name: loss * float("inf") for name, loss in losses(*given).items()},
    )  # fmt: skip
    with pytest.raises(DivergedError, match=r"no start from gradients: .* is not finite.*leave out --start-utterances"):
        train(options(tmp_path / "run", start_utterances=2), console=QUIET)


def test_audio_that_vanished_is_told_in_one_sentence(options, tmp_path, monkeypatch):
    """Also where a process of its own reads it."""
    data = write_folder(tmp_path / "speech")
    read = train_module.training_speech

    def vanishing(given):
        found = read(given)
        for file in data.glob("*.flac"):
            file.unlink()
        return found

    monkeypatch.setattr(train_module, "training_speech", vanishing)
    with pytest.raises(UserError, match=r"^[^\n]*flac[^\n]*$"):
        train(options(tmp_path / "run", data=[str(data)], workers=1, start_utterances=2), console=QUIET)
