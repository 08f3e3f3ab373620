"""Options of `train` that nothing else would miss: what the trainer is given, and how it is scored and logged."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers.trainer_pt_utils import LengthGroupedSampler

from fused_s2lora import S2LoraCallback
from fused_s2lora.training import fitting
from fused_s2lora.training import train as train_module
from fused_s2lora.training.audio_window import AudioWindow
from fused_s2lora.training.decoding import Decoding
from fused_s2lora.training.evaluation import Evaluation
from fused_s2lora.training.train import train
from fused_s2lora.training.trainer import SeededSampler
from tests.training.comparisons import QUIET
from tests.training.speech import TEXTS, adapter_of


def test_options_reach_the_trainer(options, tmp_path, monkeypatch):
    made = []

    def begun(self, *args, **given):
        made.append(self)
        raise KeyboardInterrupt

    monkeypatch.setattr(fitting.SpeechTrainer, "train", begun)
    given = options(
        tmp_path / "run", weight_decay=0.3, warmup=5, epochs=9.0, accumulation=2, full_share=0.9,
        seed=3, half_base=True, precision="bf16", penalty="proximal", coefficient_lr_ratio=3.0, dev_share=0.34, lr=1e-2,
        gradient_checkpointing=True, eval_batch_size=5,
    )  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        train(given, console=QUIET)
    (trainer,) = made
    arguments, collator, model = trainer.args, trainer.data_collator, trainer.model
    assert (arguments.warmup_steps, arguments.gradient_accumulation_steps) == (5, 2)
    assert arguments.per_device_eval_batch_size == 5
    assert arguments.load_best_model_at_end
    assert (collator.full_share, collator.seed) == (0.9, 3)
    assert model.get_base_model().is_gradient_checkpointing
    assert model.peft_config["default"].penalty == "proximal"
    assert any(isinstance(callback, S2LoraCallback) for callback in trainer.callback_handler.callbacks)
    assert {weight.dtype for weight in model.parameters() if not weight.requires_grad} == {torch.bfloat16}
    groups = {group["name"]: (group["lr"], group["weight_decay"]) for group in trainer.create_optimizer().param_groups}
    assert groups == {"coefficients": (3e-2, 0.0), "factors": (1e-2, 0.3)}
    sampler = trainer._get_train_sampler()
    assert (sampler.batch_size, sampler.seed) == (2 * 2, 3)  # utterances of a step are of like length


def test_the_precision_is_that_of_the_run_not_of_accelerates_configuration(options, tmp_path, monkeypatch):
    """Which `accelerate launch` puts into the environment, and the Trainer would take where the run has fp32."""
    train(options(tmp_path / "own", max_steps=2, warmup=0.0), console=QUIET)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    train(options(tmp_path / "launched", max_steps=2, warmup=0.0), console=QUIET)
    expected, got = adapter_of(tmp_path / "own"), adapter_of(tmp_path / "launched")
    assert all(torch.equal(expected[key], got[key]) for key in expected)


@pytest.mark.parametrize("lengths", [None, [0.5 + (7 * index % 40) / 10 for index in range(40)]], ids=["any", "alike"])
def test_the_order_of_utterances_is_of_seed_and_epoch(lengths):
    def order(seed: int, epoch: int) -> tuple[int, ...]:
        return tuple(SeededSampler(40, lengths=lengths, batch_size=4, seed=seed, epoch=lambda: epoch))

    orders = [order(0, 0), order(5, 0), order(0, 1)]
    assert order(5, 0) == orders[1]
    assert len({*orders}) == 3
    assert all(sorted(one) == [*range(40)] for one in orders)
    if lengths is not None:
        generator = torch.Generator().manual_seed(5)
        assert orders[1] == tuple(LengthGroupedSampler(4, lengths=lengths, generator=generator))


def test_the_best_checkpoint_is_what_is_saved(options, tones, tmp_path, monkeypatch):
    losses = {1: 3.0, 2: 1.0, 3: 2.0}
    monkeypatch.setattr(
        fitting.SpeechTrainer, "evaluate", lambda self, *_, **__: {"eval_loss": losses[self.state.global_step]}
    )
    run = tmp_path / "run"
    train(options(run, dev=str(tones), max_steps=3, save_steps=1, interpolation=1.0), console=QUIET)
    best, last = (load_file(run / "checkpoints" / f"checkpoint-{n}" / "adapter_model.safetensors") for n in (2, 3))
    got = adapter_of(run)
    assert all(torch.equal(got[name], value) for name, value in best.items())
    assert not all(torch.equal(got[name], value) for name, value in last.items())


def test_what_is_logged_of_training_is_of_training_speech(options, tones, tmp_path):
    """Also between checks on development speech, whose losses have no penalties; every epoch ends with a short step."""
    run = tmp_path / "run"
    given = options(run, dev=str(tones), accumulation=2, save_steps=1)
    train(given, console=QUIET)
    logged = [entry for entry in json.loads((run / "metrics.json").read_text()) if "cross_entropy" in entry]
    assert len(logged) == 4 == fitting.steps_of(given, len(TEXTS))  # of three batches an epoch
    for entry in logged:
        parts = ("cross_entropy", "other_languages", "sparsity", "norm")
        assert entry["loss"] == pytest.approx(sum(entry[part] for part in parts), abs=1e-3)


def test_a_run_is_scored_and_logged_as_asked(options, tones, tmp_path, monkeypatch):
    """Before in the full window, as it is without training; what is logged are means over the steps between."""
    scored = []

    def evaluated(model, *_, label, window, decoding, **__):
        scored.append((window, decoding, model.config.use_cache))
        return Evaluation(label, [])

    monkeypatch.setattr(train_module, "evaluate_sets", evaluated)
    run = tmp_path / "run"
    given = options(
        run, test=[f"same={tones}"], margin=8, beams=3, decode_once=True, batch_size=1, accumulation=2, max_steps=3,
        logging_steps=3,
    )  # fmt: skip
    train(given, console=QUIET)
    decoding = Decoding(3, once=True)
    assert scored == [(AudioWindow(), decoding, True), (AudioWindow("trim", 8), decoding, True)]
    (logged,) = (entry for entry in json.loads((run / "metrics.json").read_text()) if "cross_entropy" in entry)
    parts = (logged[name] for name in ("cross_entropy", "sparsity", "norm"))
    assert logged["loss"] == pytest.approx(sum(parts), abs=1e-3)
