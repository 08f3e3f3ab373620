"""What an optimizer needs to know of an S2-LoRA model: two learning rates and the proximal step."""

from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .layer import S2LoraLinear
from .model import tuner_of

COEFFICIENTS = "coefficients"


def parameter_groups(model: nn.Module, lr: float, *, weight_decay: float = 0.0) -> list[dict[str, Any]]:
    """Optimizer groups: factors at `lr`, coefficients at `lr` × the config's `coefficient_lr_ratio`, never decayed.

    Each group carries a `name`: "coefficients", "factors", or "other" (modules_to_save). Groups without a trainable
    parameter are left out, so for any other model this is the one group "other". The model may be wrapped, as by
    `torch.compile` or `DistributedDataParallel`.

    Raises:
        ValueError: nothing in the model is trainable, or active adapters have different `coefficient_lr_ratio`.
    """
    layers = [module for module in model.modules() if isinstance(module, S2LoraLinear)]
    configs = [layer.configs[name] for layer in layers for name in layer.active_adapters if name in layer.configs]
    ratios = sorted({config.coefficient_lr_ratio for config in configs}) or [1.0]
    if len(ratios) > 1:
        raise ValueError(
            f"the active adapters have coefficient_lr_ratio {' and '.join(map(str, ratios))}: train them one after the "
            "other, or give the optimizer groups of your own"
        )
    groups: dict[str, dict[str, Any]] = {
        COEFFICIENTS: {"lr": lr * ratios[0], "weight_decay": 0.0},
        "factors": {"lr": lr, "weight_decay": weight_decay},
        "other": {"lr": lr, "weight_decay": weight_decay},
    }
    parameters: dict[str, list[nn.Parameter]] = {name: [] for name in groups}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kind = COEFFICIENTS if ".s2lora_coefficients." in name else "factors" if ".s2lora_" in name else "other"
            parameters[kind].append(parameter)
    result = [{"name": name, "params": parameters[name], **groups[name]} for name in groups if parameters[name]]
    if not result:
        raise ValueError("no parameter of the model requires a gradient: there is nothing to train")
    return result


def was_skipped(optimizer: Any) -> bool:
    """Whether the gradients of fp16 overflowed, so that accelerate's optimizer left out its last step."""
    return bool(getattr(optimizer, "step_was_skipped", False))


class S2LoraCallback(TrainerCallback):
    """Runs `S2LoraModel.proximal_step` after each optimizer step of a Hugging Face Trainer.

    Only needed for penalty "proximal"; without effect otherwise, and where mixed precision skipped the step.
    """

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        tuner = tuner_of(kwargs["model"])
        if tuner is not None and not was_skipped(kwargs["optimizer"]):
            groups = kwargs["optimizer"].param_groups
            lr = next((group["lr"] for group in groups if group.get("name") == COEFFICIENTS), groups[0]["lr"])
            tuner.proximal_step(lr)
