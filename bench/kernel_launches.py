"""What our kernels launch, counted from their operands: bytes read and written, workspaces among them, and flops."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fused_s2lora.kernels.configs import (
    GROUP_RANK,
    ONE_PASS_RANK,
    PASS,
    PERSISTENT,
    PERSISTENT_MAX_RANK,
    TALL,
    cdiv,
    pass_config_name,
    rank_block,
    rank_tile,
    tall_config_name,
)


@dataclass(frozen=True)
class Launch:
    """One operation: bytes read and written, and its matrix flops in half or in single precision."""

    name: str
    bytes: int
    flops: int
    half: bool

    def floor_s(self, bytes_per_s: float, half_flops_per_s: float, single_flops_per_s: float) -> float:
        """The least time it can take on a device of those rates: its memory's or its arithmetic's."""
        return max(self.bytes / bytes_per_s, self.flops / (half_flops_per_s if self.half else single_flops_per_s))


def touched_bytes(*tensors: Tensor | None) -> int:
    """Of memory behind the tensors: an expanded one is read where it lies."""
    return sum(
        min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())
        for tensor in tensors
        if tensor is not None
    )


def _half(tensor: Tensor) -> bool:
    return tensor.dtype in (torch.bfloat16, torch.float16)


def _merge(
    weights: Sequence[Tensor], down: Tensor, up: Tensor, coefficients: Tensor, dtype: torch.dtype, seed: Tensor
) -> list[Launch]:
    """One launch: every W read, every W_eff written. Its arithmetic is in float32, outside the matrix units."""
    outputs, inputs = weights[0].shape
    entries = len(weights) * outputs * inputs
    moved = touched_bytes(*weights, down, up, coefficients) + entries * dtype.itemsize
    return [Launch("merge", moved, 2 * entries * len(down), half=False)]


def _project(x: Tensor, down: Tensor) -> list[Launch]:
    """One pass over x."""
    z = len(x) * len(down)
    return [Launch("project", touched_bytes(x, down) + z * x.element_size(), 2 * z * x.shape[1], _half(x))]


def _adapter_gradients(
    dys: Sequence[Tensor],
    z: Tensor | None,
    up: Tensor,
    coefficients: Tensor,
    g: Tensor | None,
    d_up: Tensor | None,
    x: Tensor | None,
    d_down: Tensor | None,
    *,
    needs_coefficients: bool = True,
    add_to_g: bool = True,
    of_gelu: bool = False,
) -> list[Launch]:
    """Passes over dy and x into workspaces, and the sum over these; `adapter_gradients.py` says how many."""
    (rows, outputs), (group, rank) = dys[0].shape, coefficients.shape
    tile, half = rank_tile(rank), _half(dys[0])
    needs_coefficients = needs_coefficients and z is not None
    together = group if rank <= GROUP_RANK else 1
    blocks = cdiv(rows, PASS[pass_config_name(rows, together, tile, dys[0].dtype)].BLOCK_M)
    one_pass = rank <= ONE_PASS_RANK and d_up is not None
    partial = 4 * blocks * group * rank if needs_coefficients else 0
    product = 4 * blocks * (group // together) * rank * outputs if one_pass else 0
    launches = []
    if g is not None or needs_coefficients or one_pass:
        count = group // together
        read = z if needs_coefficients or one_pass else None
        # A launch reads the coefficients of its own outputs.
        moved = touched_bytes(*dys, coefficients) + count * touched_bytes(read, up) + partial + product
        moved += 0 if g is None else touched_bytes(g) * (2 * count - (not add_to_g))
        flops = 2 * rows * outputs * rank * group * (2 if one_pass else 1)
        launches += [Launch("output gradients", moved // count, flops // count, half)] * count
    if d_up is not None and not one_pass:
        tall, product = _tall_products(dys, rank, z, coefficients)
        launches += tall
    if x is not None and d_down is not None:
        tall, of_x = _tall_products([x], rank, g, of_gelu=of_gelu)
        launches += tall
        product += of_x
    if d_up is not None or d_down is not None or needs_coefficients:
        written = 2 * touched_bytes(d_up, d_down) + (4 * group * rank if needs_coefficients else 0)
        launches.append(Launch("reduce", product + partial + written, 0, half))
    return launches


def _input_gradient_factor(x: Tensor, g: Tensor, d_down: Tensor) -> list[Launch]:
    """One pass over x into a workspace, and the sum over it."""
    launches, product = _tall_products([x], len(d_down), g)
    return [*launches, Launch("reduce", product + 2 * touched_bytes(d_down), 0, _half(x))]


def _tall_products(
    talls: Sequence[Tensor], rank: int, low: Tensor | None, coefficients: Tensor | None = None, *, of_gelu: bool = False
) -> tuple[list[Launch], int]:
    """A pass over each tall matrix, with its row of coefficients if any, and the bytes of the workspaces they leave."""
    rows, columns = talls[0].shape
    config = TALL[tall_config_name(rank_tile(rank), talls[0].dtype, of_gelu)]
    product = 4 * cdiv(rows, config.split_rows(rows, columns)) * rank * columns
    moved = touched_bytes(talls[0], low) + touched_bytes(coefficients) // len(talls) + product
    one = Launch("tall product", moved, 2 * rows * columns * rank, _half(talls[0]))
    return [one] * len(talls), product * len(talls)


def _fused_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, coefficients: Tensor, z: Tensor | None,
    want_z: bool, variant: str, out: Tensor | None = None,
) -> list[Launch]:  # fmt: skip
    """One launch, added to `out` if that is given; the persistent variant reads factors in x's dtype, cast before."""
    (rows, inputs), (outputs, rank) = x.shape, up.shape
    y = rows * outputs * x.element_size()
    moved = touched_bytes(x, weight, bias, coefficients, z) + y * (1 if out is None else 2)
    moved += rows * rank * x.element_size() if z is None and want_z else 0
    flops = 2 * rows * (inputs * outputs + rank * outputs + (rank * inputs if z is None else 0))
    tiles = cdiv(rows, PERSISTENT[9].BLOCK_M) * cdiv(outputs, PERSISTENT[9].BLOCK_N)
    persistent = _half(x) and rank_block(rank) <= PERSISTENT_MAX_RANK and tiles >= _MULTIPROCESSORS
    casts = []
    for factor in [up] if z is not None else [down, up]:
        read = touched_bytes(factor)
        if persistent and factor.dtype != x.dtype:
            cast = factor.numel() * x.element_size()
            casts.append(Launch("cast", read + cast, 0, half=True))
            read = cast
        moved += read
    return [*casts, Launch("fused linear", moved, flops, _half(x))]


_MULTIPROCESSORS = 132  # of an H100; with fewer tiles than that the plain variant is chosen


def _fused_linear_add(*operands: Any) -> list[Launch]:
    *before, out, want_z, variant = operands
    return _fused_linear(*before, want_z, variant, out=out)


def _write_spare_columns(spare: Tensor, up: Tensor, coefficients: Tensor) -> list[Launch]:
    """The spare columns alone are written; they are a view, behind which lies the whole copy of W."""
    return [
        Launch("spare columns", spare.numel() * spare.element_size() + touched_bytes(up, coefficients), 0, _half(spare))
    ]


def _add_low_rank(buffer: Tensor, down: Tensor) -> list[Launch]:
    """[dh | ge] read, dh written."""
    rank, inputs = down.shape
    moved = touched_bytes(buffer, down) + len(buffer) * inputs * buffer.element_size()
    return [Launch("add low rank", moved, 2 * len(buffer) * rank * inputs, _half(buffer))]


def _activation_project(x: Tensor, down: Tensor, gelu: bool, out_dtype: torch.dtype, spare: int) -> list[Launch]:
    """A GELU and a pass for z, or both in one where z lies in spare columns."""
    (rows, inputs), rank = x.shape, len(down)
    h, z = (rows * columns * out_dtype.itemsize for columns in (inputs, spare or rank))
    flops, half = 2 * rows * rank * inputs, out_dtype.itemsize == 2
    if spare or not gelu:
        return [Launch("activation", touched_bytes(x, down) + h + z, flops, half)]
    casts = [] if x.dtype == out_dtype else [Launch("cast", touched_bytes(x) + h, 0, half)]
    gelu_bytes = 2 * touched_bytes(x)
    return [Launch("gelu", gelu_bytes, 0, half), *casts, Launch("project", h + touched_bytes(down) + z, flops, half)]


KERNELS: dict[str, Callable[..., list[Launch]]] = {
    "fused_s2lora.merge": _merge,
    "fused_s2lora.project": _project,
    "fused_s2lora.adapter_gradients": _adapter_gradients,
    "fused_s2lora.input_gradient_factor": _input_gradient_factor,
    "fused_s2lora.fused_linear": _fused_linear,
    "fused_s2lora.fused_linear_add": _fused_linear_add,
    "fused_s2lora.write_spare_columns_": _write_spare_columns,
    "fused_s2lora.add_low_rank_": _add_low_rank,
    "fused_s2lora.activation_project": _activation_project,
}
