"""What PyTorch dispatches while a callable runs: launches, bytes, floating-point operations and peak memory.

Everything here is *counted*, never timed. An operation on tensors that is not a view is one launch; it reads each
tensor it is given once and writes each tensor it returns once. On fake tensors nothing is computed, so that a large
model is counted on a small machine.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from bench.kernel_launches import KERNELS, Launch, touched_bytes

# Allocations and relabellings: nothing is launched for them, though their schemas do not say so.
_FREE = {
    "aten.empty", "aten.empty_like", "aten.empty_strided", "aten.new_empty", "aten.new_empty_strided",
    "aten.promote_types", "aten.randint",  # the latter draws a seed, on the host
    "aten._unsafe_view", "aten._reshape_alias", "aten.lift_fresh", "aten.detach", "aten.alias", "aten.set_",
}  # fmt: skip


@dataclass
class Count:
    """All launches of a callable, the most bytes it held at once beyond what existed before, and those still held."""

    launches: list[Launch] = field(default_factory=list)
    peak_bytes: int = 0
    held_bytes: int = 0

    @property
    def bytes(self) -> int:
        """Bytes read and written by all launches."""
        return sum(launch.bytes for launch in self.launches)

    @property
    def flops(self) -> int:
        """Flops of all matrix products."""
        return sum(launch.flops for launch in self.launches)

    def fields(self) -> dict[str, Any]:
        """Totals as fields of a result line."""
        return {
            "counted_launches": len(self.launches),
            "counted_bytes": self.bytes,
            "counted_flops": self.flops,
            "counted_peak_mib": round(self.peak_bytes / 2**20, 1),
        }


class OpCounter(TorchDispatchMode):
    """Fills `count` with what is dispatched inside the context."""

    def __init__(self) -> None:
        super().__init__()
        self.count = Count()
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = [leaf for leaf in tree_leaves((args, kwargs or {})) if isinstance(leaf, Tensor)]
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        self._hold(given, made)
        if (given or made) and not _launches_nothing(func):  # without tensors: a question to the library
            self.count.launches += _launches(func, args, kwargs or {}, out, given, made)
        return out

    def _hold(self, given: list[Tensor], made: list[Tensor]) -> None:
        """Follows the life of every storage that is new here."""
        old = {id(tensor.untyped_storage()) for tensor in given}
        for tensor in made:
            storage = tensor.untyped_storage()
            if id(storage) in old or id(storage) in self._seen:
                continue
            key, size = id(storage), storage.nbytes()
            self._seen.add(key)
            self.count.held_bytes += size
            self.count.peak_bytes = max(self.count.peak_bytes, self.count.held_bytes)
            weakref.finalize(storage, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.count.held_bytes -= size


def _launches_nothing(func: Any) -> bool:
    if func.namespace == "prim" or str(func.overloadpacket) in _FREE:
        return True
    infos = [result.alias_info for result in func._schema.returns]
    return bool(infos) and all(info is not None and not info.is_write for info in infos)


def _launches(func: Any, args: Any, kwargs: Any, out: Any, given: list[Tensor], made: list[Tensor]) -> list[Launch]:
    name = str(func.overloadpacket)
    written = [tensor for tensor in made if all(tensor is not other for other in given)]
    mutated = [tensor for tensor in made if any(tensor is other for other in given)]
    writes_only = name in ("aten.zero_", "aten.fill_", "aten.copy_")
    read = given[1:] if writes_only and given else given
    moved = touched_bytes(*read, *written, *mutated)
    half = bool(given) and all(tensor.dtype in (torch.bfloat16, torch.float16) for tensor in given)
    if name in KERNELS:
        return KERNELS[name](*args, **kwargs)
    formula = flop_registry.get(func.overloadpacket)
    flops = int(formula(*args, **kwargs, out_val=out)) if formula else _cpu_attention_flops(name, args)
    return [Launch(name, moved, flops, half)]


def _cpu_attention_flops(name: str, args: Any) -> int:
    """PyTorch registers no formula for its attention on CPU: two products forward, five backward."""
    products = {
        "aten._scaled_dot_product_flash_attention_for_cpu": 2,
        "aten._scaled_dot_product_flash_attention_for_cpu_backward": 5,
    }.get(name, 0)
    if not products:
        return 0
    query, key = (args[0], args[1]) if products == 2 else (args[1], args[2])
    batch, heads, length, width = query.shape
    return products * 2 * batch * heads * length * key.shape[2] * width


def count(call: Callable[[], Any]) -> Count:
    """What one call of `call` dispatches; its result is let go."""
    with OpCounter() as counter:
        call()
    return counter.count
