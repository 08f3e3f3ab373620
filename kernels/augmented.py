"""The adapted map as one product of depth K + R, with R spare columns beside x and beside W.

    y  = [x | z | 0] [W | B diag(e) | 0]ᵀ + b                                     z  = x Aᵀ
    [d | ge | 0]  = dy [W | B diag(e) | 0]                                        dx = d + ge A,   ge = g ⊙ e

[x | z | 0] comes from what makes x (`producers.py`). W is not rounded with the update, and neither x nor y is read for
the low-rank part. The same product backward gives ge; adding ge A is one pass over dx.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from . import device
from .activation import activation_project, add_low_rank_
from .configs import SPARE_BLOCK_N, cdiv, rank_block
from .launch import launch
from .ops import kernel_op
from .producers import split_spare
from .shared import Sources, is_of_use
from .variants import Variant


@triton.jit
def _write_spare_columns_kernel(
    spare_ptr,
    up_ptr,
    coefficients_ptr,
    N,
    rank,
    stride_sn,
    stride_un,
    stride_ur,
    stride_eg,
    stride_er,
    R: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """spare[g N + n, j] = up[n, j] · coefficients[g, j], zero for j >= rank

    up [N, rank], coefficients [G, rank] -> spare [G N, R]
    """
    group = tl.program_id(1)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_r = tl.arange(0, R)
    mask_n = offs_n < N
    mask_r = offs_r < rank
    rows = offs_n.to(tl.int64)
    up_tile_ptr = up_ptr + rows[:, None] * stride_un + offs_r[None, :] * stride_ur
    up_tile = tl.load(up_tile_ptr, mask=mask_n[:, None] & mask_r[None, :], other=0.0).to(tl.float32)
    coefficients = tl.load(coefficients_ptr + group * stride_eg + offs_r * stride_er, mask=mask_r, other=0.0)
    scaled = up_tile * coefficients.to(tl.float32)[None, :]
    spare_tile_ptr = spare_ptr + (group.to(tl.int64) * N + rows)[:, None] * stride_sn + offs_r[None, :]
    tl.store(spare_tile_ptr, scaled.to(spare_ptr.dtype.element_ty), mask=mask_n[:, None])


def _fake_write_spare_columns(spare, up, coefficients):
    return None


@kernel_op("write_spare_columns_", _fake_write_spare_columns, mutates=("spare",))
def write_spare_columns_(spare: Tensor, up: Tensor, coefficients: Tensor) -> None:
    """One launch: up [N, r], coefficients e [G, r] -> up diag(e_g) in spare [G N, rank_block(r)], zeros behind."""
    outputs, rank = up.shape
    launch(
        _write_spare_columns_kernel, (cdiv(outputs, SPARE_BLOCK_N), coefficients.shape[0]),
        spare, up, coefficients, outputs, rank, spare.stride(0), *up.stride(), *coefficients.stride(),
        R=rank_block(rank), BLOCK_N=SPARE_BLOCK_N, num_warps=4,
    )  # fmt: skip


class AugmentedWeight:
    """[W | B diag(e) | 0] of one frozen weight, or of a group of up to 3 that read one x, stacked along its rows.

    `buffer` [G N, K + R] holds a copy of the weights, made once; `update` writes the R = `rank_block(rank)` columns
    behind them and nothing else.

    Args:
        weights: G weights [N, K].
        rank: r, 1 to 256.
        dtype: of `buffer`, by default the weights'. A narrower one rounds the copy once, as autocast would each time.
    """

    def __init__(self, weights: Sequence[Tensor], rank: int, dtype: torch.dtype | None = None) -> None:
        self.group, self.rank = len(weights), rank
        self.outputs, self.inputs = weights[0].shape
        dtype = weights[0].dtype if dtype is None else dtype
        # Not an inference tensor, which training could not write to.
        with torch.inference_mode(False), torch.no_grad():
            stacked = torch.cat(list(weights)).to(dtype)
            # Zeros behind W until the first update: nothing uninitialised is ever multiplied.
            self.buffer = F.pad(stacked, (0, rank_block(rank)))
        self._sources = Sources(weights)

    def update(self, up: Tensor, coefficients: Tensor) -> None:
        """Writes B diag(e_g), up [N, r] and coefficients [G, r] or [r], behind each weight."""
        up, coefficients = up.detach(), coefficients.detach().view(self.group, self.rank)
        if device.runs_triton(self.buffer):
            write_spare_columns_(self.buffer[:, self.inputs :], up, coefficients)
        else:
            wide = torch.promote_types(up.dtype, self.buffer.dtype)
            scaled = up.to(wide) * coefficients[:, None, :]  # [G, N, r]
            self.buffer[:, self.inputs : self.inputs + self.rank].copy_(scaled.flatten(0, 1))

    def is_copy_of(self, weights: Sequence[Tensor]) -> bool:
        """Whether these are the weights it was made from, neither replaced, moved nor written to since.

        Never of a copy made under a FakeTensorMode that is over, which has no data.
        """
        return is_of_use(self.buffer) and self._sources.are(weights)


def with_spare_columns(x: Tensor, down: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
    """x [M, K], down [r, K] -> [x | z | 0] [M, K + rank_block(r)] in x's dtype or `out_dtype`, in one launch.

    For an x that did not come from a producer. It copies x: 2 · M · K elements moved, where a plain z = x Aᵀ reads
    M · K. This copy is what makes the augmented strategy slow there, unless x had to be cast anyway.
    """
    spare, out_dtype = rank_block(down.shape[0]), x.dtype if out_dtype is None else out_dtype
    if device.runs_triton(x) and device.runs_triton(x.new_empty(0, dtype=out_dtype)):
        return activation_project(x, down, False, out_dtype, spare)[0]
    x = x.to(out_dtype)
    return torch.cat([x, F.pad(F.linear(x, down.to(out_dtype)), (0, spare - down.shape[0]))], dim=1)


def spare_buffer(h: Tensor, z: Tensor) -> Tensor | None:
    """[h | z | 0] [M, K + R] behind h [M, K] and z [M, r], without a gradient, if z lies in h's spare columns.

    None if it does not, as when h was copied or z comes from elsewhere.
    """
    rows, inputs = h.shape
    width = inputs + rank_block(z.shape[1])
    if h.stride() != (width, 1) or z.stride() != (width, 1) or z.shape[0] != rows:
        return None
    if h.untyped_storage()._cdata != z.untyped_storage()._cdata or z.storage_offset() != h.storage_offset() + inputs:
        return None
    return h.detach().as_strided((rows, width), (width, 1))


def augmented_forward(h_buffer: Tensor, augmented: AugmentedWeight, bias: Tensor | None) -> Tensor:
    """[x | z | 0] [M, K + R], bias [G N] or None -> y [M, G N], one product by the library."""
    return F.linear(h_buffer, augmented.buffer, bias)


def augmented_input_gradient(dys: Sequence[Tensor], augmented: AugmentedWeight, down: Tensor) -> Tensor:
    """dx [M, K], the gradient of the whole map; a view of [dx | ge | 0] [M, K + R] with ge = Σ_g g_g ⊙ e_g.

    The G of dys [M, N] are multiplied one after the other into one result, which saves concatenating them. ge A is
    added in place by one launch that reads and writes dx once more, 2 · M · K elements.
    """
    first, *others = zip(dys, augmented.buffer.split(augmented.outputs), strict=True)
    d_buffer = first[0] @ first[1]
    for dy, weight in others:
        d_buffer.addmm_(dy, weight)
    if device.runs_triton(d_buffer):
        add_low_rank_(d_buffer, down)
    else:
        dx, ge = split_spare(d_buffer, down)
        dx.addmm_(ge, down.to(dx.dtype))
    return d_buffer[:, : augmented.inputs]


def variants(target: str) -> list[Variant]:
    """What `AugmentedWeight.update` launches."""
    types = {"up_ptr": "*fp32", "coefficients_ptr": "*fp32"}
    return [
        Variant(
            "spare columns", "all", "forward", dtype, rank, _write_spare_columns_kernel,
            {"R": rank, "BLOCK_N": SPARE_BLOCK_N, "stride_ur": 1, "stride_er": 1}, 4, 1, types, ("N", "stride_sn"),
            rare=dtype == "fp16",
        )
        for dtype in ("bf16", "fp16", "fp32")
        for rank in (16, 32, 64, 128, 256)
    ]  # fmt: skip
