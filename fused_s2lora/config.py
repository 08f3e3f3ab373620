"""Every choice of an S2-LoRA adapter in one PEFT configuration."""

import enum
import math
import warnings
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

from peft.config import PeftConfig
from peft.utils import PeftType

from .kernels.arguments import MAX_RANK
from .kernels.s2_linear import BACKENDS

WHISPER_LINEAR_MAPS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")


def _register_peft_type() -> None:
    """Adds the member S2LORA to PEFT's enumeration of methods, once."""
    if "S2LORA" in PeftType.__members__:
        return
    member = str.__new__(PeftType, "S2LORA")
    member._name_, member._value_ = "S2LORA", "S2LORA"
    PeftType._member_names_.append("S2LORA")
    PeftType._member_map_["S2LORA"] = member
    PeftType._value2member_map_["S2LORA"] = member
    type.__setattr__(PeftType, "S2LORA", member)


_register_peft_type()


class Sharing(enum.StrEnum):
    """Which weights share one pair of factors (section 2 of arXiv 2309.11756 uses `module`)."""

    MODULE = "module"
    STACK = "stack"
    ALL = "all"
    NONE = "none"


_CHOICES: dict[str, tuple[str, ...]] = {
    "sharing": tuple(Sharing),
    "coefficient": ("rank", "scalar"),
    "init": ("unit", "normal", "lora"),
    "penalty": ("soft", "proximal"),
    "backend": BACKENDS,
    "audio_window": ("full", "trim"),
    "task": ("transcribe", "translate"),
}
_NUMBERS = (
    "dropout", "sparsity_weight", "norm_weight", "threshold", "audio_window_margin", "scaling", "init_std",
    "coefficient_lr_ratio",
)  # fmt: skip


@dataclass
class S2LoraConfig(PeftConfig):
    """Configuration of Sparsely Shared LoRA: ΔW_i = B diag(s_i) A with A and B shared (arXiv 2309.11756).

    The defaults are tuned on child speech (docs/defaults.md); `S2LoraConfig.paper()` is the method as published,
    `S2LoraConfig.unshared()` gives every weight its own factors.

    Raises:
        ValueError: a value outside its range, naming the field.
    """

    r: int = field(default=8, metadata={"help": "Rank of the shared factors, 1 to 256."})
    target_modules: list[str] | str | None = field(
        default_factory=lambda: list(WHISPER_LINEAR_MAPS),
        metadata={"help": "Names of the nn.Linear modules to adapt, or one regular expression."},
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names of modules to leave alone, or one regular expression."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Further modules to train fully and save with the adapter."}
    )
    sharing: str = field(
        default="module",
        metadata={
            "help": "One pair of factors per `module` (five in Whisper: encoder and decoder self-attention and "
            "feed-forward, cross-attention), per `stack`, for `all`, or `none` shared."
        },
    )
    tie_ffn: bool = field(
        default=True,
        metadata={"help": "A weight [d, f] uses the transposed factors of its partner [f, d] (fc2 those of fc1)."},
    )
    coefficient: str = field(
        default="rank", metadata={"help": "One coefficient per `rank`, or one `scalar` per weight (α-LoRA)."}
    )
    scaling: float = field(default=1.0, metadata={"help": "Constant factor on every ΔW."})
    init: str = field(
        default="unit",
        metadata={
            "help": "Start: A and B `normal` with `init_std`, or with rows of A and columns of B of `unit` norm, and "
            "s = 0; or, as in `lora`, B = 0 and s = 1, with rows of A of unit norm."
        },
    )
    init_std: float = field(default=0.02, metadata={"help": "Standard deviation of the factors for init `normal`."})
    dropout: float = field(
        default=0.0,
        metadata={
            "help": "Dropout on the input of the low-rank path. In training the maps are then computed as in other "
            "adapters, the low-rank path apart from the frozen map, which costs their time and memory."
        },
    )
    sparsity_weight: float = field(default=0.05, metadata={"help": "α₁, weight of the mean L1 norm of s_i."})
    norm_weight: float = field(default=0.0, metadata={"help": "α₂, weight of the mean norm of B's columns, A's rows."})
    penalty: str = field(
        default="soft",
        metadata={
            "help": "How α₁ acts: `soft` adds it to the loss; `proximal` soft-thresholds s after each optimizer step, "
            "apart from the optimizer's scaling, and gives exact zeros."
        },
    )
    threshold: float = field(default=1e-4, metadata={"help": "A rank with |s| below this is counted as dead."})
    train_factors: bool = field(default=True, metadata={"help": "False: A and B stay random, only s is trained."})
    coefficient_lr_ratio: float = field(
        default=1.0, metadata={"help": "Learning rate of s over that of A and B, see `parameter_groups`."}
    )
    backend: str = field(
        default="auto",
        metadata={
            "help": "Strategy: auto, merged, split, fused, augmented, reference; see `s2_linear`. `augmented` keeps a "
            "copy of W and does not see W written in place through `.data`, as by `W.data.add_(1)`."
        },
    )
    audio_window: str = field(
        default="full",
        metadata={"help": "Encoder input the adapter was trained on: `full` 30 s, or `trim`med to the utterances."},
    )
    audio_window_margin: int = field(
        default=64, metadata={"help": "Encoder positions (20 ms) kept after the longest utterance of a trimmed batch."}
    )
    language: str | None = field(default=None, metadata={"help": "Language code the adapter was trained for."})
    task: str = field(default="transcribe", metadata={"help": "Whisper's task: transcribe or translate."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.S2LORA  # type: ignore[attr-defined]
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r} is not one of {', '.join(map(str, choices))}")
        if type(self.r) is not int or not 1 <= self.r <= MAX_RANK:
            raise ValueError(f"r={self.r} is not a whole number between 1 and {MAX_RANK}")
        for name in _NUMBERS:
            if not isinstance(getattr(self, name), Real):
                raise ValueError(f"{name}={getattr(self, name)!r} is not a number")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout={self.dropout} is not in [0, 1)")
        for name in ("sparsity_weight", "norm_weight", "threshold", "audio_window_margin"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} is not a finite number of 0 or more")
        for name in ("scaling", "init_std", "coefficient_lr_ratio"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} is not a finite number above 0")
        if self.dropout > 0 and self.backend not in ("auto", "reference"):
            warnings.warn(
                f"backend={self.backend!r} is used without dropout only, so not in training with "
                f"dropout={self.dropout}: set dropout=0.0 to train with it",
                stacklevel=3,
            )
        if self.init == "lora" and not self.train_factors:
            raise ValueError("init='lora' starts with B = 0, and train_factors=False would leave it there; use 'unit'")

    @classmethod
    def paper(cls, **overrides: Any) -> "S2LoraConfig":
        """The method as published: α₁ = 0.05, α₂ = 0.1, one learning rate; std 0.02 where the paper is silent."""
        published: dict[str, Any] = {
            "init": "normal",
            "init_std": 0.02,
            "sparsity_weight": 0.05,
            "norm_weight": 0.1,
            "penalty": "soft",
            "coefficient_lr_ratio": 1.0,
        }
        return cls(**{**published, **overrides})

    @classmethod
    def unshared(cls, **overrides: Any) -> "S2LoraConfig":
        """Factors of each weight's own from LoRA's start: LoRA with a coefficient for each rank, without penalties.

        It has LoRA's number of parameters and learns as much. Its learning rate is LoRA's, 1e-3.
        """
        own: dict[str, Any] = {"sharing": "none", "init": "lora", "sparsity_weight": 0.0, "norm_weight": 0.0}
        return cls(**{**own, **overrides})
