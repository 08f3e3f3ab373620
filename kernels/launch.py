"""Launching a kernel as it was launched before, with less of the host's time.

Triton looks at every argument of every launch to find the build that fits: the types, whether sizes and addresses are
multiples of 16, whether a size is 1. That takes longer than all else the host does for a launch, and small models wait
for the host. A build that served the same sizes, strides, types and aligned addresses serves again, so it is looked up
by these; `tests/kernels/test_launch.py` holds both ways to the same build and arguments.
"""

from typing import Any

import torch
from torch import Tensor
from triton.compiler import CompiledKernel

from . import device

_ALIGNED = 16  # bytes
# Depth of the pipeline that a launch may ask for: None where any.
_most_stages = device.AMD_STAGES if torch.version.hip else None
_MOST = 8192  # builds remembered; lengths of audio are many
_known: dict[tuple[Any, ...], tuple[CompiledKernel, tuple[str, ...]]] = {}


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, any_value: int | None = None, **constants: Any) -> None:
    """`kernel[grid](*args, **constants)`: args by position, compile-time arguments and options by name.

    The first argument is a tensor on the current GPU. `any_value` is the index of an argument whose value the kernel
    is not specialised for (`do_not_specialize`).
    """
    if _most_stages is not None and constants.get("num_stages", 0) > _most_stages:
        constants["num_stages"] = _most_stages
    if device.INTERPRETING:
        kernel[grid](*args, **constants)
        return
    addresses = 0
    key = [id(kernel), args[0].get_device(), *constants.values()]
    for arg in args:
        # `type` answers for an int in a sixth of the time.
        if type(arg) is int or not isinstance(arg, Tensor):
            key.append(arg)
        else:
            addresses |= arg.data_ptr()
            key.append(arg.dtype)
    if addresses % _ALIGNED:  # which of them decides the build
        kernel[grid](*args, **constants)
        return
    if any_value is not None:
        key[any_value - len(args)] = None
    identity = tuple(key)
    known = _known.get(identity)
    if known is None:
        build = kernel[grid](*args, **constants)
        if isinstance(build, CompiledKernel):
            if len(_known) >= _MOST:
                _known.clear()
            _known[identity] = build, tuple(kernel.arg_names[len(args) :])
        return
    build, names = known
    build[(*grid, 1, 1)[:3]](*args, *[constants[name] for name in names])
