"""Which precision a run computes in."""

import contextlib

import torch

from .errors import UserError

PRECISIONS = ("auto", "fp32", "bf16", "fp16")


def check_precision(precision: str) -> None:
    """Raises UserError: no such precision."""
    if precision not in PRECISIONS:
        raise UserError(f"--precision {precision!r} is not one of {', '.join(PRECISIONS)}")


def resolved(precision: str) -> str:
    """`precision` itself, or what "auto" is on the device in hand: the fastest safe one.

    On a GPU bf16, or fp16 where that has no bf16 and PyTorch would emulate it; on a CPU bf16 if it multiplies bf16 in
    hardware, else fp32.

    Raises:
        UserError: no such precision.
    """
    check_precision(precision)
    if precision != "auto":
        return precision
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "bf16" if torch.cpu._is_avx512_bf16_supported() else "fp32"


def autocast_dtype(precision: str) -> torch.dtype | None:
    """The autocast dtype of "fp32" (None), "bf16", "fp16" or "auto" (see `resolved`)."""
    return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[resolved(precision)]


def autocast(device: torch.device, dtype: torch.dtype | None) -> contextlib.AbstractContextManager:
    """Autocast to `dtype` on `device`; nothing for None."""
    return torch.autocast(device.type, dtype) if dtype is not None else contextlib.nullcontext()
