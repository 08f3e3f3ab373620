"""How many ranks of each weight an adapter of S2-LoRA or AdaLoRA keeps: layers by matrices (the paper's figure 3)."""

from pathlib import Path
from typing import Any

from peft import AdaLoraModel, PeftModel

from fused_s2lora import S2LoraModel, rank_pattern
from fused_s2lora.rank_pattern import RankPattern, tabulate

from .output import write_json

_TINY = 1e-12  # allocation sets what it gives up to zero itself


def rank_maps(model: Any) -> list[RankPattern]:
    """One `RankPattern` for each stack of an S2-LoRA or AdaLoRA model; of any other model, none.

    AdaLoRA's ranks are the entries of E that allocation has not set to zero, with their mean magnitude.
    """
    if not isinstance(model, PeftModel):
        return []
    tuner = model.base_model
    if isinstance(tuner, S2LoraModel):
        return rank_pattern(model)
    if not isinstance(tuner, AdaLoraModel):
        return []
    adapter = model.active_adapter
    config: Any = tuner.peft_config[adapter]
    diagonals = {
        key: module.lora_E[adapter].detach().flatten()
        for key, module in tuner.model.named_modules()
        if hasattr(module, "lora_E") and adapter in module.lora_E
    }
    return tabulate(diagonals, config.init_r, threshold=_TINY)


def write_rank_maps(model: Any, run: Path) -> None:
    """Writes the rank maps into `rank_pattern.json` of the run in this folder, if the model has any."""
    if maps := rank_maps(model):
        write_json(run / "rank_pattern.json", [pattern.to_dict() for pattern in maps])
