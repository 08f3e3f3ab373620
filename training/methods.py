"""The adaptation methods: what each trains, and the learning rate it is used with.

S2-LoRA and α-LoRA are this library's tuner, all else is PEFT's own, configured as in the paper (arXiv 2309.11756,
section 3), or for full fine-tuning and BitFit the model's own parameters.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from peft import AdaLoraConfig, GloraConfig, IA3Config, LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import WhisperForConditionalGeneration

from fused_s2lora import S2LoraConfig, S2LoraModel, fuse_whisper
from fused_s2lora.config import WHISPER_LINEAR_MAPS

from .errors import UserError
from .options import TrainOptions

_QUERY_VALUE = ["q_proj", "v_proj"]
_PAPER_LEARNING_RATE = 1e-3


@dataclass(frozen=True)
class Preset:
    """Settings of S2-LoRA that go together."""

    config: Callable[..., S2LoraConfig] = S2LoraConfig
    learning_rate: float = 8e-3  # of the factors up to `rate_rank`; that of s is `coefficient_lr_ratio` times it
    rate_rank: float = 8  # above it the rate falls with the root of the rank
    interpolation: float = 0.75  # the share of the update kept after training


# Found by experiment (docs/defaults.md), but for the paper's own.
PRESETS = {
    "default": Preset(),
    "paper": Preset(S2LoraConfig.paper, learning_rate=_PAPER_LEARNING_RATE, rate_rank=math.inf, interpolation=1.0),
    "unshared": Preset(S2LoraConfig.unshared, learning_rate=_PAPER_LEARNING_RATE),
}


def _s2lora(options: TrainOptions, steps: int) -> PeftConfig:
    preset = PRESETS[options.preset]
    named = {
        "target_modules": options.target_modules,
        "exclude_modules": options.exclude_modules,
        "sharing": options.sharing,
        "sparsity_weight": options.sparsity_weight,
        "norm_weight": options.norm_weight,
        "penalty": options.penalty,
        "coefficient_lr_ratio": options.coefficient_lr_ratio,
    }
    given: dict[str, Any] = {name: value for name, value in named.items() if value is not None}
    try:
        return preset.config(
            r=options.rank, train_factors=not options.freeze_factors, audio_window=options.window,
            audio_window_margin=options.margin, language=options.language, task=options.task, **given,
        )  # fmt: skip
    except ValueError as error:
        raise UserError(f"S2-LoRA cannot be set up so: {error}") from error


def _alpha_lora(options: TrainOptions, steps: int) -> PeftConfig:
    """ΔW = α B A: factors of each weight's own and one trainable scalar that starts at 0."""
    return S2LoraConfig(
        r=options.rank, target_modules=options.target_modules or _QUERY_VALUE, sharing="none", coefficient="scalar",
        init="normal", sparsity_weight=0.0, norm_weight=0.0, coefficient_lr_ratio=1.0,
        audio_window=options.window, audio_window_margin=options.margin, language=options.language, task=options.task,
    )  # fmt: skip


def _lora(options: TrainOptions, steps: int) -> PeftConfig:
    targets = options.target_modules or _QUERY_VALUE
    return LoraConfig(r=options.rank, lora_alpha=2 * options.rank, target_modules=targets)


def _glora(options: TrainOptions, steps: int) -> PeftConfig:
    return GloraConfig(r=options.rank, target_modules=options.target_modules or _QUERY_VALUE, config_C="lora")


def _ia3(options: TrainOptions, steps: int) -> PeftConfig:
    return IA3Config(target_modules=options.target_modules or ["k_proj", "v_proj", "fc2"], feedforward_modules=[])


def adalora_start(rank: int) -> int:
    """Rank before allocation for a mean rank of `rank` after it: 12 for 1 and 8, 48 for 32, as published."""
    return max(12, rank + rank // 2)


def _adalora(orthogonality: bool, allocation: bool) -> Callable[[TrainOptions, int], PeftConfig]:
    def build(options: TrainOptions, steps: int) -> PeftConfig:
        if allocation and (options.dev is not None or options.dev_share):
            raise UserError(
                f"--method {options.method} has its ranks at the end only and cannot go back to its best checkpoint; "
                "leave out --dev and --dev-share"
            )
        start = adalora_start(options.rank)
        # Allocation from 10 % to 70 % of the steps, then the ranks stay.
        warmup, final = steps // 10, 3 * steps // 10
        return AdaLoraConfig(
            init_r=start,
            target_r=options.rank if allocation else start,
            lora_alpha=2 * start,
            target_modules=options.target_modules or _QUERY_VALUE,
            orth_reg_weight=0.5 if orthogonality else 0.0,
            tinit=warmup,
            tfinal=final,
            deltaT=max(1, steps // 100),
            total_step=steps,
        )

    return build


# The options of one method and not of another; a frozen base can be stored in half precision, trained weights cannot.
_TARGETED = ("target_modules", "half_base")
_RANKED = (*_TARGETED, "rank")
_SCALED = (*_RANKED, "quantize", "interpolation")
_S2LORA = (
    *_SCALED, "preset", "exclude_modules", "sharing", "sparsity_weight", "norm_weight", "penalty", "freeze_factors",
    "coefficient_lr_ratio",
)  # fmt: skip


@dataclass(frozen=True)
class Method:
    """How a method is configured, from the options and the number of steps; None: some of Whisper's own parameters.

    `reads` are the options it takes of those that not every method does.
    """

    title: str
    config: Callable[[TrainOptions, int], PeftConfig] | None = None
    learning_rate: float = _PAPER_LEARNING_RATE
    trains: Callable[[str], bool] = lambda name: True
    reads: tuple[str, ...] = ()


METHODS: dict[str, Method] = {
    "s2lora": Method("S2-LoRA", _s2lora, reads=_S2LORA),
    "lora": Method("LoRA", _lora, reads=_SCALED),
    "glora": Method("GLoRA", _glora, reads=_RANKED),
    "adalora": Method("AdaLoRA", _adalora(orthogonality=True, allocation=True), reads=_SCALED),
    "adalora-without-orthogonality": Method(
        "AdaLoRA without orthogonality", _adalora(orthogonality=False, allocation=True), reads=_SCALED
    ),
    "adalora-without-allocation": Method(
        "AdaLoRA without allocation", _adalora(orthogonality=True, allocation=False), reads=_SCALED
    ),
    "adalora-without-both": Method(
        "AdaLoRA without orthogonality and allocation", _adalora(orthogonality=False, allocation=False), reads=_SCALED
    ),
    "alpha-lora": Method("α-LoRA", _alpha_lora, reads=_SCALED),
    "ia3": Method("IA3", _ia3, reads=(*_TARGETED, "quantize")),
    "bitfit": Method("BitFit", trains=lambda name: name.endswith(".bias")),
    "full": Method("full fine-tuning", learning_rate=1e-4),
}


def check(options: TrainOptions) -> None:
    """Nothing, where method, preset and the method's own options exist and go together; needs no model.

    Raises:
        UserError: they do not.
    """
    if options.method not in METHODS:
        raise UserError(f"--method {options.method!r} is not one of {', '.join(METHODS)}")
    if options.preset not in PRESETS:
        raise UserError(f"--preset {options.preset!r} is not one of {', '.join(PRESETS)}")
    method = METHODS[options.method]
    given = [option.name for option in fields(options) if getattr(options, option.name) != option.default]
    for option in given:
        if option in _S2LORA and option not in method.reads:
            able = ", ".join(name for name, one in METHODS.items() if option in one.reads)
            flag = option.replace("_", "-")
            raise UserError(f"--{flag} goes with --method {able}, not {options.method}; leave it out")
    if options.half_base and options.precision == "fp32":
        raise UserError("--half-base with --precision fp32 has no half precision to store weights in; leave it out")
    if options.full_share and options.window == "full":
        raise UserError("--full-share goes with --window trim; leave it out")
    if options.exclude_modules is not None:
        try:
            re.compile(options.exclude_modules)
        except re.error as error:
            raise UserError(
                f"--exclude-modules {options.exclude_modules!r} is no regular expression ({error}); "
                "the whole name has to match, such as '.*decoder.*'"
            ) from error
    if method.config is not None:
        method.config(options, 100)


def _check_targets(model: WhisperForConditionalGeneration, options: TrainOptions) -> None:
    """As PEFT finds them: by the whole name, or by its end after a dot; what is left out by the whole name."""
    embedding = model.get_input_embeddings().weight
    linear = {name: module.weight for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    found: set[str] = set()
    for target in options.target_modules or WHISPER_LINEAR_MAPS:
        meant = {name for name in linear if name == target or name.endswith(f".{target}")}
        if not meant and options.target_modules:
            known = ", ".join(sorted({name.rpartition(".")[2] for name in linear if linear[name] is not embedding}))
            raise UserError(f"--target-modules: the model has no linear map {target!r}; there are {known}")
        if shared := [name for name in meant if linear[name] is embedding]:
            raise UserError(f"--target-modules: {shared[0]} has the weight of the token embedding; leave it out")
        found |= meant
    if (excluded := options.exclude_modules) is None:
        return
    left_out = {name for name in found if re.fullmatch(excluded, name)}
    if left_out == found:
        raise UserError(f"--exclude-modules {excluded!r} leaves out all that would be adapted; name less")
    if not left_out:
        raise UserError(
            f"--exclude-modules {excluded!r} leaves out nothing that would be adapted; the whole name has to match, "
            f"such as {min(found)}"
        )


def adapt(
    model: WhisperForConditionalGeneration, options: TrainOptions, *, steps: int
) -> PeftModel | WhisperForConditionalGeneration:
    """The model ready to be trained for `steps` steps by `options.method`: wrapped by PEFT, or itself.

    Raises:
        UserError: an unknown method or preset, targets the model does not have, or nothing of them left out as asked.
    """
    check(options)
    _check_targets(model, options)
    method = METHODS[options.method]
    if method.config is None:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and method.trains(name))
        return model
    try:
        adapted = get_peft_model(model, method.config(options, steps))
    except ValueError as error:
        raise UserError(f"--target-modules: {error}") from error
    if isinstance(adapted.base_model, S2LoraModel):
        fuse_whisper(adapted)
    return adapted


def learning_rate(options: TrainOptions) -> float:
    """The learning rate of `options`, or of the preset at this rank, or the paper's of the method."""
    if options.lr is not None:
        return options.lr
    if options.method == "s2lora":
        preset = PRESETS[options.preset]
        return preset.learning_rate * min(1, preset.rate_rank / options.rank) ** 0.5
    return METHODS[options.method].learning_rate


def interpolation(options: TrainOptions) -> float:
    """The share of the update that is kept after training: of `options`, or of the preset, or all of it."""
    if options.interpolation is not None:
        return options.interpolation
    return PRESETS[options.preset].interpolation if options.method == "s2lora" else 1.0
