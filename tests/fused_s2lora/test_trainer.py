"""The adapter under Hugging Face's own Trainer: resuming, accumulation, the best checkpoint, the proximal step."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

from fused_s2lora import S2LoraCallback, S2LoraConfig, S2LoraModel, parameter_groups
from tests.fused_s2lora.adapters import adapted, batch

LR = 1e-2
DATA = [{name: values[row] for name, values in batch(seed).items()} for seed in range(6) for row in range(2)]


def trainer(
    model: PeftModel, folder: Path, optimizer: torch.optim.Optimizer | None = None, **arguments: Any
) -> Trainer:
    """Trainer as a PEFT script has it, but for the two learning rates: six steps unless told otherwise."""
    settings = {
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "max_grad_norm": 0.0,
        **arguments,
    }
    return Trainer(
        model=model,
        args=TrainingArguments(
            str(folder), use_cpu=True, report_to="none", disable_tqdm=True, remove_unused_columns=False, **settings
        ),
        train_dataset=DATA,
        eval_dataset=DATA[:4],
        optimizers=(optimizer or torch.optim.AdamW(parameter_groups(model, LR)), None),
        callbacks=[S2LoraCallback()],
    )


def trained(model: PeftModel) -> dict[str, Tensor]:
    """A copy of every trainable parameter."""
    return {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}


def losses(finished: Trainer) -> list[float]:
    return [entry["loss"] for entry in finished.state.log_history if "loss" in entry]


@pytest.mark.parametrize("config", [{}, {"penalty": "proximal", "dropout": 0.2, "sharing": "stack"}], ids=str)
def test_resumed_run_is_the_uninterrupted_one(tiny_whisper, tmp_path, config):
    """Same losses and parameters to the last bit, with the model's and the adapter's dropout drawing numbers."""
    config = {"sparsity_weight": 0.5, **config}
    whole = trainer(adapted(lambda: tiny_whisper(dropout=0.1), **config), tmp_path, save_strategy="steps", save_steps=3)
    whole.train()
    model = adapted(lambda: tiny_whisper(dropout=0.1), **config)
    with torch.no_grad():  # everything must come from the checkpoint
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.fill_(7.0)
    resumed = trainer(model, tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert resumed.state.global_step == 6
    assert losses(resumed)[-3:] == losses(whole)[-3:]
    got = trained(model)
    for name, expected in trained(whole.model).items():
        assert torch.equal(got[name], expected), name
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "checkpoint-3").iterdir()}
    assert "model.safetensors" not in sizes
    assert sizes["adapter_model.safetensors"] < 60_000


def test_best_checkpoint_is_loaded_at_the_end(tiny_whisper, tmp_path):
    model = adapted(tiny_whisper)
    run = trainer(
        model,
        tmp_path,
        torch.optim.SGD(parameter_groups(model, 3.0)),  # leaps about, so that the best step is seldom the last
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
    )
    run.train()
    history = [entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry]
    assert history[-1] > min(history)
    assert run.evaluate()["eval_loss"] == pytest.approx(min(history), rel=1e-6)


@pytest.mark.parametrize("divides", [True, False])
def test_penalty_keeps_its_share_when_gradients_accumulate(tiny_whisper, tmp_path, divides):
    """Two micro-batches of two step where one batch of four does: cross-entropy and penalties grow or shrink as one.

    `accepts_loss_kwargs` tells the Trainer whether the model divides its loss itself; Whisper does not, whatever its
    signature says, so left alone the whole step is twice as long.
    """
    moves = []
    for batch_size, accumulation in ((4, 1), (2, 2)):
        whisper = tiny_whisper()
        whisper.accepts_loss_kwargs = not divides
        model = adapted(lambda whisper=whisper: whisper, sparsity_weight=1.0, norm_weight=1.0)
        start = trained(model)
        trainer(
            model,
            tmp_path,
            torch.optim.SGD(parameter_groups(model, 1e-3)),
            max_steps=1,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
        ).train()
        moves.append(torch.cat([(value - start[name]).flatten() for name, value in trained(model).items()]))
    together, apart = moves
    factor = 1.0 if divides else 2.0
    torch.testing.assert_close(apart, factor * together, rtol=1e-2, atol=1e-3 * float(together.abs().max()))


def test_callback_takes_one_proximal_step_an_update(tiny_whisper, tmp_path, monkeypatch):
    """With the learning rate that the update had, after it, once for all its micro-batches."""
    model = adapted(tiny_whisper, penalty="proximal", sparsity_weight=0.5, coefficient_lr_ratio=5.0)
    rates = []
    step = S2LoraModel.proximal_step

    def recorded(tuner: S2LoraModel, lr: float) -> None:
        rates.append(lr)
        step(tuner, lr)

    monkeypatch.setattr(S2LoraModel, "proximal_step", recorded)
    run = trainer(model, tmp_path, max_steps=3, gradient_accumulation_steps=2)
    run.train()
    assert rates == pytest.approx([5 * LR, 5 * LR * 2 / 3, 5 * LR / 3])


def test_callback_finds_the_adapter_in_a_wrapped_model(tiny_whisper, tmp_path):
    model = adapted(tiny_whisper, penalty="proximal", sparsity_weight=1e3)
    wrapped = nn.Sequential(model)
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    optimizer = torch.optim.SGD(parameter_groups(wrapped, LR))
    S2LoraCallback().on_optimizer_step(arguments, TrainerState(), TrainerControl(), model=wrapped, optimizer=optimizer)
    assert not any(value.any() for name, value in trained(model).items() if "s2lora_coefficients" in name)


def test_a_step_that_overflowed_in_fp16_takes_no_proximal_one(tiny_whisper, tmp_path):
    """Accelerate's optimizer left out its own; with that the coefficients are to stay as they were."""
    model = adapted(tiny_whisper, penalty="proximal", sparsity_weight=1e3)
    before = trained(model)
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    optimizer: Any = torch.optim.SGD(parameter_groups(model, LR))
    for skipped in (True, False):
        optimizer.step_was_skipped = skipped
        S2LoraCallback().on_optimizer_step(
            arguments, TrainerState(), TrainerControl(), model=model, optimizer=optimizer
        )
        after = trained(model)
        assert all(torch.equal(after[name], before[name]) for name in before) == skipped


def test_proximal_penalty_leaves_exact_zeros_and_soft_does_not(tiny_whisper, tmp_path):
    zeros = {}
    for penalty in ("soft", "proximal"):
        model = adapted(tiny_whisper, penalty=penalty, sparsity_weight=1.0)
        trainer(model, tmp_path).train()
        coefficients = torch.cat([value for name, value in trained(model).items() if "s2lora_coefficients" in name])
        zeros[penalty] = int((coefficients == 0).sum())
    assert zeros["soft"] == 0
    assert zeros["proximal"] > 20


def test_callback_leaves_other_adapters_alone(tiny_whisper, tmp_path):
    model = get_peft_model(tiny_whisper(), LoraConfig(target_modules=["q_proj"]))
    before = trained(model)
    optimizer = torch.optim.SGD(parameter_groups(model, LR))
    assert [group["name"] for group in optimizer.param_groups] == ["other"]
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    S2LoraCallback().on_optimizer_step(arguments, TrainerState(), TrainerControl(), model=model, optimizer=optimizer)
    after = trained(model)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_paper_preset_trains_at_one_learning_rate(tiny_whisper):
    model = get_peft_model(tiny_whisper(), S2LoraConfig.paper())
    assert {group["lr"] for group in parameter_groups(model, LR)} == {LR}
    config = model.peft_config["default"]
    assert (config.sparsity_weight, config.norm_weight, config.r) == (0.05, 0.1, 8)
    assert S2LoraConfig.paper(norm_weight=0.0, r=4).norm_weight == 0.0


def test_data_parallel_is_refused(tiny_whisper):
    """Its copies of a model share hooks and buffers with the original."""
    model = adapted(tiny_whisper)
    model.get_base_model()._is_replica = True  # as `torch.nn.parallel.replicate` marks them
    with pytest.raises(RuntimeError, match="torchrun"):
        model(**batch())
