"""Kernels as PyTorch operators: a fake for shapes, no dispatcher where nobody asks for it, and the right GPU."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode


def kernel_op(
    name: str, fake: Callable[..., Any], *, mutates: Iterable[str] = ()
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a launcher as the operator `fused_s2lora::name`, with `fake` for shapes, and returns what to call.

    The operator is what torch.compile, fake tensors and dispatch modes see. A plain call goes straight to the launcher:
    the dispatcher would cost tens of microseconds a launch, as much as a decoder's kernels. `.op` is the operator.
    Either way kernels run on the GPU of the first argument, whichever GPU is current.
    """

    def wrap(launcher: Callable[..., Any]) -> Callable[..., Any]:
        launch = _on_its_device(launcher)
        operator = torch.library.custom_op(f"fused_s2lora::{name}", launch, mutates_args=tuple(mutates))
        operator.register_fake(fake)

        def call(*args: Any, **kwargs: Any) -> Any:
            plain = not torch.compiler.is_compiling() and _get_current_dispatch_mode() is None
            return launch(*args, **kwargs) if plain else operator(*args, **kwargs)

        call.op = operator  # type: ignore[attr-defined]
        call.__doc__ = launcher.__doc__
        return call

    return wrap


def _on_its_device(launcher: Callable[..., Any]) -> Callable[..., Any]:
    """Triton launches on the current GPU, wherever the operands lie: makes theirs the current one."""

    @functools.wraps(launcher)
    def launch(first: Tensor | list[Tensor], *args: Any, **kwargs: Any) -> Any:
        tensor = first if isinstance(first, Tensor) else first[0]
        if not tensor.is_cuda or tensor.get_device() == torch.cuda.current_device():
            return launcher(first, *args, **kwargs)
        with torch.cuda.device_of(tensor):
            return launcher(first, *args, **kwargs)

    return launch
