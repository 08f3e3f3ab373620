"""Between the original model and the adapted one: ΔW scaled down after training."""

from typing import Any

import torch
from peft import PeftModel
from peft.tuners.adalora import AdaLoraLayer
from peft.tuners.lora import LoraLayer
from peft.utils.other import AuxiliaryTrainingWrapper

from .layer import S2LoraLinear


@torch.no_grad()
def interpolate(model: PeftModel, share: float) -> None:
    """Moves the weights to W + share · ΔW, in place, for the active adapters of S2-LoRA or PEFT's LoRA or AdaLoRA.

    Fine-tuning on little speech of one language unlearns others. On the line between the two models most of what was
    unlearnt comes back before much of what was learnt goes (weight-space ensembling: Wortsman et al., "Robust
    fine-tuning of zero-shot models", arXiv 2109.01903). ΔW is linear in s of S2-LoRA, B of LoRA and Λ of AdaLoRA,
    which are multiplied by `share`.

    Args:
        share: 1 leaves the adapter as it is, 0 is the original model.

    Raises:
        ValueError: share is not between 0 and 1; the model has no active adapter of these kinds, or trains whole
            modules beside it (`modules_to_save`), which are not scaled.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share={share} is not between 0 and 1")
    scaled: list[Any] = []
    for module in model.modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            raise ValueError("modules_to_save and trained tokens cannot be interpolated; train without them")
        if isinstance(module, S2LoraLinear):
            scaled += [module.s2lora_coefficients[name] for name in module.names_at_work()]
        elif isinstance(module, AdaLoraLayer):
            scaled += [module.lora_E[name] for name in module.active_adapters if name in module.lora_E]
        elif isinstance(module, LoraLayer):
            scaled += [module.lora_B[name].weight for name in module.active_adapters if name in module.lora_B]
    if not scaled:
        raise ValueError("the model has no active adapter of S2-LoRA, LoRA or AdaLoRA to be scaled")
    for tensor in scaled:
        tensor.mul_(share)
