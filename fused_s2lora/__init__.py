"""Sparsely Shared LoRA for Whisper with fused kernels: a PEFT adapter, a plain layer and the bare operation.

from peft import get_peft_model
from fused_s2lora import S2LoraConfig

model = get_peft_model(whisper, S2LoraConfig(r=8))
"""

from . import quiet  # noqa: F401
from .config import S2LoraConfig
from .interpolation import interpolate
from .kernels.reference import s2_linear_reference
from .kernels.s2_linear import s2_linear, s2_linear_group
from .layer import S2Linear, S2LoraLinear
from .model import S2LoraModel
from .optimization import S2LoraCallback, parameter_groups
from .rank_pattern import RankPattern, rank_pattern
from .whisper_fusion import fuse_whisper, unfuse_whisper

__version__ = "0.1.0"
__all__ = [
    "RankPattern",
    "S2Linear",
    "S2LoraCallback",
    "S2LoraConfig",
    "S2LoraLinear",
    "S2LoraModel",
    "fuse_whisper",
    "interpolate",
    "parameter_groups",
    "rank_pattern",
    "s2_linear",
    "s2_linear_group",
    "s2_linear_reference",
    "unfuse_whisper",
]
