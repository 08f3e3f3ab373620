"""Between the original model and the adapted one: ΔW scaled down after training."""

from typing import Any

import torch
from peft.tuners.adalora import AdaLoraLayer
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from .layer import S2LoraLinear


def interpolate(model: nn.Module, share: float) -> None:
    """Moves the weights to W + share · ΔW, in place, for the active adapters of S2-LoRA or PEFT's LoRA or AdaLoRA.

    Fine-tuning on little speech of one language unlearns others. On the line between the two models most of what was
    unlearnt comes back before much of what was learnt goes (weight-space ensembling: Wortsman et al., "Robust
    fine-tuning of zero-shot models", arXiv 2109.01903). ΔW is linear in s of S2-LoRA, B of LoRA and Λ of AdaLoRA,
    which are multiplied by `share`.

    Args:
        share: 1 leaves the adapter as it is, 0 is the original model.

    Raises:
        ValueError: share is not between 0 and 1; the model has no active adapter of these kinds, or one of another; an
            adapter is merged; or scaling does not lead to the original model: whole modules or biases are trained
            beside the adapter, it is a variant of LoRA such as DoRA, or starts from a changed W, as PiSSA does.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share={share} is not between 0 and 1")
    scale_update(model, share)


@torch.no_grad()
def scale_update(model: nn.Module, factor: float) -> None:
    """Multiplies ΔW of the active adapters by `factor`, in place.

    Raises:
        ValueError: as `interpolate`, but for the share.
    """
    scaled: list[Any] = []
    for module in model.modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            raise ValueError("modules_to_save and trained tokens cannot be interpolated; train without them")
        if isinstance(module, BaseTuner):
            for name in module.active_adapters:
                _check_is_on_the_line(name, module.peft_config[name])
        if isinstance(module, BaseTunerLayer) and module.merged:
            raise ValueError("a merged adapter cannot be interpolated: call model.unmerge_adapter() first")
        if isinstance(module, S2LoraLinear):
            scaled += [module.s2lora_coefficients[name] for name in module.names_at_work()]
        elif isinstance(module, AdaLoraLayer):
            scaled += [module.lora_E[name] for name in module.active_adapters if name in module.lora_E]
        elif isinstance(module, LoraLayer):
            for name in module.active_adapters:
                if name in module.lora_variant:
                    raise ValueError(f"adapter {name!r} is a variant of LoRA, such as DoRA; train plain LoRA")
                if name in module.lora_B:
                    scaled += module.lora_B[name].parameters()
                if name in module.lora_embedding_B:
                    scaled.append(module.lora_embedding_B[name])
        elif isinstance(module, BaseTunerLayer) and module._get_available_adapters() & {*module.active_adapters}:
            kind = type(module).__module__
            raise ValueError(f"the model has an active adapter of {kind}, which is not to be scaled; unload it")
    if not scaled:
        raise ValueError("the model has no active adapter of S2-LoRA, LoRA or AdaLoRA to be scaled")
    for tensor in scaled:
        tensor.mul_(factor)


_CHANGES_WEIGHTS = ("pissa", "corda", "olora", "loftq", "lora_ga")


def _check_is_on_the_line(name: str, config: Any) -> None:
    """Raises ValueError where the adapter changes more of the model than its ΔW."""
    if getattr(config, "bias", "none") != "none":
        raise ValueError(f"adapter {name!r} trains biases, which are not scaled; train with bias='none'")
    if str(getattr(config, "init_lora_weights", "")).lower().startswith(_CHANGES_WEIGHTS):
        raise ValueError(
            f"adapter {name!r} starts from a changed base model ({config.init_lora_weights}), so scaling does not lead "
            "back to the original; train with init_lora_weights=True"
        )
