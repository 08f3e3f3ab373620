"""Frozen maps whose weight bitsandbytes or torchao stores in 8 bits or 4, and that is made floating-point to be used.

In training W is made for the product and let go of, and made again in the backward pass: `merged` forms W + B diag(e) A
of it, one product in the place of three. In inference the map's own kernels are used, beside the low-rank path.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from peft.utils.integrations import dequantize_bnb_weight
from torch import Tensor, nn

from .kernels import device
from .kernels.choice import AUTO, named_backend
from .kernels.s2_linear import Remake

_BITSANDBYTES = ("Int8Params", "Params4bit")


def is_quantized(linear: nn.Linear) -> bool:
    """Whether the weight is stored in a way that `dequantized` knows."""
    kind = type(linear.weight)
    if kind is nn.Parameter or kind is Tensor:  # all that torch.compile gets to see
        return False
    return kind.__name__ in _BITSANDBYTES or kind.__module__.startswith("torchao.")


def dequantized(linear: nn.Linear, dtype: torch.dtype | None = None) -> Tensor:
    """W [out_features, in_features] of a map that `is_quantized`, in `dtype`, by default as it was quantised from."""
    # PEFT's `dequantize_module_weight` would put a new parameter into the map at every call on a CPU.
    weight: Any = linear.weight
    if type(weight).__name__ in _BITSANDBYTES:
        found = dequantize_bnb_weight(weight, state=getattr(linear, "state", None))
    else:
        found = weight.dequantize()  # torchao's
    return found if dtype is None else found.to(dtype)


def keep_layout(linear: nn.Linear) -> None:
    """Keeps bitsandbytes from laying a weight of 4 bits out anew, and rounding its scales, for inference on a CPU.

    Raises:
        ValueError: it has done so already.
    """
    if getattr(getattr(linear.weight, "quant_state", None), "packing_format_for_cpu", False):
        raise ValueError(
            "bitsandbytes has laid the weights out for inference on this CPU: load the model anew and add the adapter "
            "before it is first called"
        )
    if hasattr(linear, "support_avx512bf16_for_cpu"):
        setattr(linear, "support_avx512bf16_for_cpu", False)  # noqa: B010


def dequantize_maps(model: nn.Module) -> None:
    """Puts an ordinary map with the same weight in the place of every quantised one."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear) and is_quantized(child):
                plain = nn.Linear(child.in_features, child.out_features, bias=False, device="meta")
                plain.weight = nn.Parameter(dequantized(child), requires_grad=False)
                if child.bias is not None:  # which bitsandbytes may have cast
                    plain.bias = nn.Parameter(child.bias.detach().to(plain.weight.dtype), requires_grad=False)
                setattr(module, name, plain.train(child.training))


def frozen_weights(linears: Sequence[nn.Linear], x: Tensor) -> tuple[list[Tensor], Remake | None]:
    """The weights of maps of x, all quantised or none, and for quantised ones how to make them again."""
    if not is_quantized(linears[0]):
        return [linear.weight for linear in linears], None
    dtype = None if device.autocast_dtype(x) else x.dtype
    make = [functools.partial(dequantized, linear, dtype) for linear in linears]
    return [one() for one in make], make


def backend_for(linear: nn.Linear, backend: str) -> str:
    """`backend`, or where none is named "merged" for a quantised map: others that "auto" may choose keep weights."""
    return "merged" if is_quantized(linear) and named_backend(backend) == AUTO else backend
