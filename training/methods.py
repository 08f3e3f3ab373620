"""The adaptation methods: what each wraps the model with, and the learning rate it is used with."""

from collections.abc import Callable
from typing import Any

from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from transformers import WhisperForConditionalGeneration

from fused_s2lora import S2LoraConfig

from .errors import UserError
from .options import TrainOptions

# Of the factors; the coefficients' is `coefficient_lr_ratio` times that. Found by experiment: docs/defaults.md.
LEARNING_RATE = {"s2lora": 5e-3, "s2lora-paper": 1e-3, "lora": 1e-3}


def _s2lora(options: TrainOptions) -> PeftConfig:
    if options.preset not in ("default", "paper"):
        raise UserError(f"--preset {options.preset!r} is not one of default, paper")
    named = {
        "target_modules": options.target_modules,
        "sharing": options.sharing,
        "sparsity_weight": options.sparsity_weight,
        "norm_weight": options.norm_weight,
        "penalty": options.penalty,
        "coefficient_lr_ratio": options.coefficient_lr_ratio,
    }
    given: dict[str, Any] = {name: value for name, value in named.items() if value is not None}
    build = S2LoraConfig.paper if options.preset == "paper" else S2LoraConfig
    try:
        return build(
            r=options.rank, audio_window=options.window, audio_window_margin=options.margin,
            language=options.language, task=options.task, **given,
        )  # fmt: skip
    except ValueError as error:
        raise UserError(f"S2-LoRA cannot be set up so: {error}") from error


def _lora(options: TrainOptions) -> PeftConfig:
    targets = options.target_modules or ["q_proj", "v_proj"]
    return LoraConfig(r=options.rank, lora_alpha=2 * options.rank, target_modules=targets)


_METHODS: dict[str, Callable[[TrainOptions], PeftConfig]] = {"s2lora": _s2lora, "lora": _lora}


def adapt(model: WhisperForConditionalGeneration, options: TrainOptions) -> PeftModel:
    """The model wrapped for `options.method`: S2-LoRA, or PEFT's LoRA with α = 2 r.

    Raises:
        UserError: an unknown method, or targets the model does not have.
    """
    if options.method not in _METHODS:
        raise UserError(f"--method {options.method!r} is not one of {', '.join(_METHODS)}")
    try:
        return get_peft_model(model, _METHODS[options.method](options))
    except ValueError as error:
        raise UserError(f"--target-modules: {error}") from error


def learning_rate(options: TrainOptions) -> float:
    """The learning rate of `options`, or the method's own."""
    if options.lr is not None:
        return options.lr
    paper = options.method == "s2lora" and options.preset == "paper"
    return LEARNING_RATE["s2lora-paper" if paper else options.method]
