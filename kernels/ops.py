"""Kernels as PyTorch operators: a fake for shapes, and no dispatcher where nobody asks for it."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode


def kernel_op(
    name: str, fake: Callable[..., Any], *, mutates: Iterable[str] = ()
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a launcher as the operator `fused_s2lora::name`, with `fake` for shapes, and returns what to call.

    The operator is what torch.compile, fake tensors and dispatch modes see. A plain call goes straight to the launcher:
    the dispatcher would cost tens of microseconds a launch, as much as a decoder's kernels. `.op` is the operator.
    """

    def wrap(launcher: Callable[..., Any]) -> Callable[..., Any]:
        operator = torch.library.custom_op(f"fused_s2lora::{name}", launcher, mutates_args=tuple(mutates))
        operator.register_fake(fake)

        def call(*args: Any, **kwargs: Any) -> Any:
            plain = not torch.compiler.is_compiling() and _get_current_dispatch_mode() is None
            return launcher(*args, **kwargs) if plain else operator(*args, **kwargs)

        call.op = operator  # type: ignore[attr-defined]
        call.__doc__ = launcher.__doc__
        return call

    return wrap
