"""What the kernels need to know of the device they run on; asked at launch, never at import."""

import contextlib
import functools
import os

import torch
import triton
from torch import Tensor
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode, _get_current_dispatch_mode_stack

from .configs import SHARED_MEMORY

# As Triton does, which replaces its compiler by the interpreter where a kernel is decorated.
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
AMD_STAGES = 2  # AMD's pipeliner keeps one stage in registers; deeper ones do not fit 64 KiB of LDS
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_INTERPRETED_MULTIPROCESSORS = 3  # few, so that a persistent program meets several tiles


def triton_is_usable(x: Tensor) -> tuple[bool, str]:
    """Whether the kernels run on x's device and dtype, and if not, why."""
    if x.dtype not in _DTYPES:
        return False, f"no kernel for {x.dtype}"
    if not x.is_cuda and not INTERPRETING:
        return False, f"x is on {x.device.type}, and Triton's interpreter (TRITON_INTERPRET=1) is off"
    if INTERPRETING and x.dtype == torch.bfloat16:
        return False, "Triton's interpreter multiplies bfloat16 wrongly"
    # Under torch.compile what is traced need not ask: each operator does when it runs.
    too_old = _too_old(x.get_device()) if x.is_cuda and not torch.compiler.is_compiling() else ""
    return not too_old, too_old


def runs_triton(x: Tensor) -> bool:
    """Whether operations on x are computed by our kernels: on a GPU, in the dtypes they have. Elsewhere by PyTorch."""
    return x.is_cuda and triton_is_usable(x)[0]


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast makes of a product's operand x; None where it is off, or leaves x alone as it does float64."""
    kind = x.device.type
    if kind == "meta" or x.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def without_autocast(x: Tensor) -> contextlib.AbstractContextManager:
    """Autocast off for products of x, where it is on: `backward` may be called within it."""
    return contextlib.nullcontext() if autocast_dtype(x) is None else torch.autocast(x.device.type, enabled=False)


def in_transform() -> bool:
    """Whether `torch.func`, as by `grad` or `vmap`, forward-mode differentiation or `torch.jit.trace` is under way.

    None of them goes with our autograd Functions: the first two have no rule for them, a traced one cannot be saved.
    """
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0 or torch.jit.is_tracing()


def runs_as_written() -> bool:
    """Whether PyTorch computes what is called as it is called, and neither compiles nor transforms it."""
    return not (torch.compiler.is_compiling() or in_transform())


def has_values(x: Tensor) -> bool:
    """Whether the entries of x can be looked at: not without data, nor while PyTorch traces or transforms what runs."""
    if not runs_as_written() or x.is_meta or isinstance(x, FakeTensor):
        return False
    return _get_current_dispatch_mode() is None or detect_fake_mode() is None


def keeps_products() -> bool:
    """Whether a selective activation checkpoint, which may keep what a product returns, is under way."""
    if _get_current_dispatch_mode() is None:
        return False
    return any(type(mode).__module__ == "torch.utils.checkpoint" for mode in _get_current_dispatch_mode_stack())


def attends_in_blocks(q: Tensor) -> bool:
    """Whether `attention.attention` was found faster than PyTorch's own for q: bfloat16, a CPU that multiplies it.

    Not with AMX, for which PyTorch's kernel has a path of its own that was not compared, and not under torch.compile
    or in a transform.
    """
    if runs_triton(q) or q.device.type != "cpu" or q.dtype != torch.bfloat16 or not runs_as_written():
        return False
    return torch.cpu._is_avx512_bf16_supported() and not torch.cpu._is_amx_tile_supported()


def adds_bias_at_once(x: Tensor) -> bool:
    """Whether oneDNN is to multiply x and add a bias while it does: bfloat16, on a CPU that it has products for.

    Not under torch.compile, which makes it so by itself.
    """
    there = x.device.type == "cpu" and x.dtype == torch.bfloat16 and not torch.compiler.is_compiling()
    return there and _onednn_has_bfloat16()


@functools.cache
def _onednn_has_bfloat16() -> bool:
    there = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return there and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def capability(x: Tensor) -> tuple[int, int] | None:
    """CUDA compute capability of x's device; None where there is none: on a CPU and on AMD."""
    return _capability(x.get_device()) if x.is_cuda else None


def shared_memory(x: Tensor) -> int:
    """Bytes of shared memory one program may use on x's device."""
    return _properties(x.get_device())["max_shared_mem"] if x.is_cuda else SHARED_MEMORY["90"]


def multiprocessors(x: Tensor) -> int:
    """How many programs of a persistent kernel run at once on x's device."""
    return _properties(x.get_device())["multiprocessor_count"] if x.is_cuda else _INTERPRETED_MULTIPROCESSORS


def multiplies_as_tf32(dtype: torch.dtype) -> bool:
    """Whether PyTorch may multiply matrices of `dtype` as TF32 on a GPU."""
    # `allow_tf32` cannot be read once somebody, HF's Trainer for one, has set the newer `fp32_precision`.
    return dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"


def precision(dtype: torch.dtype) -> str:
    """The `input_precision` of products: "tf32" where PyTorch's own may use it, else "ieee"."""
    return "tf32" if multiplies_as_tf32(dtype) else "ieee"


@functools.cache
def _too_old(device: int) -> str:
    """Why Triton's products are not for this GPU; "" where they are.

    Before compute capability 8.0 it multiplies without matrix instructions, and our tiles spill kilobytes a thread.
    """
    found = _capability(device)
    if found is None or found >= (8, 0):
        return ""
    return f"Triton multiplies slowly on compute capability {found[0]}.{found[1]}, it needs 8.0"


def _capability(device: int) -> tuple[int, int] | None:
    # PyTorch numbers AMD's gfx942 (9, 4), which would read as Hopper.
    there = torch.cuda.is_available() and torch.version.hip is None
    return torch.cuda.get_device_capability(device) if there else None


@functools.cache
def _properties(device: int) -> dict[str, int]:
    return triton.runtime.driver.active.utils.get_device_properties(device)
