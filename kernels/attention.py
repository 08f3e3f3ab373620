"""Attention on a CPU in bfloat16, computed for a few heads at a time so that their scores stay in the cache.

    P = softmax(q kᵀ)        o  = P v
    dv = Pᵀ do               dP = do vᵀ        dS = P ⊙ (dP − rowsum(P ⊙ dP))        dq = dS k        dk = dSᵀ q

Scores are rounded to bfloat16, as in an attention written out in PyTorch, and computed again in the backward pass:
never more of them are held than those of one block. Every product is the library's.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .configs import cdiv

_SCORES_A_THREAD = 2**20  # 2 MiB in bfloat16: about a core's second-level cache


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """o = softmax(q kᵀ) v for every head; q comes scaled, as Whisper scales it. Differentiable once.

    Args:
        q: [batch, heads, T, D], any strides.
        k, v: [batch, heads, S, D], of q's dtype.

    Returns:
        o, [batch, heads, T, D].

    Raises:
        ValueError: shapes or dtypes that do not fit each other.
    """
    if q.dim() != 4 or k.shape != v.shape or q.shape[:2] != k.shape[:2] or q.shape[3:] != k.shape[3:]:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit: "
            "q is [batch, heads, T, D], k and v are [batch, heads, S, D]"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q is {q.dtype}, k {k.dtype} and v {v.dtype}: cast them to one dtype")
    with torch.autocast(q.device.type, enabled=False):
        return _AttentionFunction.apply(q, k, v)


class _AttentionFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        shape = q.shape
        q, k, v = (_by_head(operand) for operand in (q, k, v))
        ctx.save_for_backward(q, k, v)
        o = torch.empty_like(q)
        for heads, (scores, p) in _blocks(q, k, buffers=2):
            _probabilities(q[heads], k[heads], scores, p)
            torch.bmm(p, v[heads], out=o[heads])
        return o.view(shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = ctx.saved_tensors
        leading = do.shape[:2]
        do = _by_head(do)
        dq, dk, dv = (torch.empty_like(operand) for operand in (q, k, v))
        for heads, (scores, p, ds) in _blocks(q, k, buffers=3):
            _probabilities(q[heads], k[heads], scores, p)
            torch.bmm(p.mT, do[heads], out=dv[heads])
            dp = torch.bmm(do[heads], v[heads].mT, out=scores)
            torch._softmax_backward_data(dp, p, -1, p.dtype, grad_input=ds)
            torch.bmm(ds, k[heads], out=dq[heads])
            torch.bmm(ds.mT, q[heads], out=dk[heads])
        dq, dk, dv = (gradient.unflatten(0, leading) for gradient in (dq, dk, dv))
        return dq, dk, dv


def _by_head(operand: Tensor) -> Tensor:
    """[batch, heads, T, D] -> [batch · heads, T, D], contiguous."""
    return operand.reshape(-1, *operand.shape[2:]).contiguous()


def _probabilities(q: Tensor, k: Tensor, scores: Tensor, p: Tensor) -> None:
    """P of some heads into `p`; `scores` is overwritten too."""
    torch.bmm(q, k.mT, out=scores)
    torch.softmax(scores, dim=-1, out=p)


def _blocks(q: Tensor, k: Tensor, *, buffers: int) -> Iterator[tuple[slice, list[Tensor]]]:
    """Slices of heads whose scores fit the cache together, at least one head each, and buffers of their shape."""
    rows, columns = q.shape[1], k.shape[1]
    at_once = max(1, torch.get_num_threads() * _SCORES_A_THREAD // max(1, rows * columns))
    count = cdiv(len(q), at_once)
    at_once = cdiv(len(q), max(1, count))  # as even as can be
    scratch = [q.new_empty(at_once, rows, columns) for _ in range(buffers)]
    for first in range(0, len(q), max(1, at_once)):
        heads = slice(first, min(first + at_once, len(q)))
        yield heads, [buffer[: heads.stop - first] for buffer in scratch]
