"""y_i = x W_iᵀ + b_i + ((x Aᵀ) ⊙ e_i) Bᵀ as one differentiable operation with frozen W_i and b_i.

`s2_linear` is one map; `s2_linear_group` is up to three that read one x, as q, k and v of an attention do. Both check
their arguments, choose a strategy (`choice.py`) and call `S2LinearFunction`, whose products are the strategy's
(`strategies.py`) and whose gradients of A, B and e are one pass over each dy and one over x (`adapter_gradients.py`).
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from . import device
from .adapter_gradients import adapter_gradients
from .arguments import check_arguments
from .choice import AUTO, VARIABLE, named_backend, pick
from .project import project
from .reference import s2_linear_reference
from .shared import GradientSink, SharedInput, wide
from .strategies import STRATEGIES, Group, cast
from .strategy_record import REFERENCE, shape_of
from .strategy_timing import candidates_of

Backend = Literal["auto", "merged", "split", "fused", "augmented", "reference"]
BACKENDS = ("auto", *STRATEGIES, REFERENCE)
Remake = Sequence[Callable[[], Tensor]]


_BY_VARIABLE = f"the environment variable {VARIABLE}=fused", f"unset it or use {VARIABLE}=auto"
_FIXED = 11  # arguments of `S2LinearFunction` before the weights
_NO_SEED = torch.zeros(1, dtype=torch.int64, device="cpu")


class S2LinearFunction(torch.autograd.Function):
    """x [M, K], z [M, r] or None, bias [G · N] or None, down [r, K], up [N, r], at last `made_from`, G weights and G
    coefficients -> G outputs [M, N].

    `made_from` [M, K], if given, is u of x = GELU(u), and is kept for dA in place of x.

    Gradients flow to x, down, up and the coefficients, each computed only if asked for; with a `sink` those of down and
    up go there, with a `shared` input that of x goes there. With `remake` the weights are not kept, but made again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        z: Tensor | None,
        bias: Tensor | None,
        down: Tensor,
        up: Tensor,
        strategy: str,
        seed: Tensor,
        sink: GradientSink | None,
        shared: SharedInput | None,
        remake: Remake | None,
        *others: Any,
    ) -> tuple[Tensor, ...]:
        # `made_from` has no name of its own: as many parameters as arguments, and torch.compile takes `ctx` for one.
        made_from, *weights_and_coefficients = others
        size = len(weights_and_coefficients) // 2
        weights, coefficients = weights_and_coefficients[:size], weights_and_coefficients[size:]
        stacked = coefficients[0].unsqueeze(0) if size == 1 else torch.stack(coefficients)
        group = Group(weights, bias, down, up, stacked, seed)
        result = STRATEGIES[strategy].forward(x, group, z)
        needs_down, needs_up = ctx.needs_input_grad[3:5]
        needs_z = needs_up or any(ctx.needs_input_grad[_FIXED + size :])
        z = result.z if needs_z else None
        if needs_z and z is None and (made_from is not None or not needs_down):
            z = project(x, down)  # x itself will not be at hand
        kept = x if made_from is None else made_from
        kept = kept if needs_down and shared is None else None
        of_weights = (result.dense, *weights) if remake is None else ()
        ctx.save_for_backward(kept, z, down, up, stacked, *of_weights)
        dtypes = [e.dtype for e in coefficients]
        ctx.call = strategy, seed, sink, shared, remake, made_from is not None, dtypes, needs_z
        return tuple(result.ys)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError("s2_linear has no second derivative; use backend='reference' with create_graph=True")
        with device.without_autocast(dys[0]):
            return _gradients(ctx, dys)


def _gradients(ctx: Any, dys: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
    x, z, down, up, stacked, *of_weights = ctx.saved_tensors
    name, seed, sink, shared, remake, of_gelu, dtypes, needs_z = ctx.call
    strategy, size = STRATEGIES[name], len(stacked)
    needs_x, _, _, needs_down, needs_up = ctx.needs_input_grad[:5]
    if remake is None:
        dense, *weights = of_weights
    else:
        reads_weights = needs_x if shared is None else shared.wants_dx
        dense, weights = None, [make() for make in remake] if reads_weights else []
    group = Group(weights, None, down, up, stacked, seed)
    needs_coefficients = any(ctx.needs_input_grad[_FIXED + size :])

    if needs_z and z is None:
        z = project(x, down) if shared is None else shared.z
    g = dx = d_down = d_up = d_coefficients = None
    if needs_up:
        d_up = torch.zeros_like(up, dtype=wide(up.dtype)) if sink is None else sink.up
    # What other maps of a shared input left in its g is not this group's: `split` adds (g ⊙ e) A to dx here.
    alone = shared is None or strategy.needs_g
    wants_g = needs_down or (needs_x and strategy.needs_g)
    if wants_g:
        rows, rank = dys[0].shape[0], down.shape[0]
        g = dys[0].new_empty(rows, rank, dtype=wide(dys[0].dtype)) if alone else shared.g
    if needs_down and shared is None:
        d_down = torch.zeros_like(down, dtype=wide(down.dtype)) if sink is None else sink.down
    if wants_g or needs_z:
        d_coefficients = adapter_gradients(
            list(dys), z if needs_z else None, up, group.coefficients, g, d_up, x, d_down,
            needs_coefficients=needs_coefficients, add_to_g=not alone, of_gelu=of_gelu,
        )  # fmt: skip
    if shared is not None:
        if shared.wants_dx:
            shared.add_dx(lambda so_far: strategy.input_gradient(dys, group, g, dense, so_far))
        if alone and needs_down:
            shared.g.add_(g)
    elif needs_x:
        dx = strategy.input_gradient(dys, group, g, dense, None)
    if sink is not None:
        d_up = d_down = None
    each: list[Tensor | None] = [None] * size
    if needs_coefficients:
        assert d_coefficients is not None
        rows_of = d_coefficients.unbind() if size > 1 else (d_coefficients.view(-1),)
        each = [cast(d, dtype) for d, dtype in zip(rows_of, dtypes, strict=True)]
    return (
        dx, None, None, cast(d_down, down.dtype), cast(d_up, up.dtype), *[None] * (_FIXED - 5), *[None] * size,
        *each,
    )  # fmt: skip


def s2_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    coefficients: Tensor,
    *,
    backend: Backend = "auto",
) -> Tensor:
    """A frozen linear map with a low-rank path in shared factors: y = x Wᵀ + b + ((x Aᵀ) ⊙ e) Bᵀ.

    The update B diag(e) A is the paper's ΔW (arXiv 2309.11756, section 2) with any scaling already in e.

    Args:
        x: [..., K], any leading dimensions and strides.
        weight: W, [N, K], frozen.
        bias: b, [N] or None, frozen.
        down: A, [r, K] with 1 <= r <= 256; its dtype may be wider than x's (fp32 factors on a half-precision model).
        up: B, [N, r].
        coefficients: e, [r].
        backend: "auto" chooses (see `choice.py`); "merged" forms W + B diag(e) A for one product, rounded at random
            where W is stored in half precision; "split" adds the low-rank path to the product; "fused" is one Triton
            kernel; "augmented" is one product of depth K + R with a second copy of W ("split" under torch.compile,
            which keeps no copies); "reference" is plain PyTorch, differentiable twice, and what "auto" takes within
            transforms of `torch.func`, which the others do not support.

    Returns:
        y, [..., N], in x's dtype; under `torch.autocast`, in its dtype, as `torch.nn.functional.linear`.

    Raises:
        ValueError: shapes or devices that do not fit together; x of another dtype than weight, but under autocast; x or
            weight of integers; a weight or bias that requires a gradient; a backend, here or in S2LORA_BACKEND, that
            there is not.
        RuntimeError: backend "fused" where no Triton kernel can run; a second derivative of another than "reference".
    """
    (y,) = s2_linear_group(x, [weight], bias, down, up, [coefficients], backend=backend)
    return y


def s2_linear_group(
    x: Tensor,
    weights: Sequence[Tensor],
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    coefficients: Sequence[Tensor],
    *,
    z: Tensor | None = None,
    made_from: Tensor | None = None,
    sink: GradientSink | None = None,
    remake: Remake | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, ...]:
    """G = 1 to 3 maps of one input as one operation: y_i = x W_iᵀ + b_i + ((x Aᵀ) ⊙ e_i) Bᵀ.

    x is read once for z and once for dA, however many maps there are. Arguments as in `s2_linear`, but

    Args:
        x: [..., K]. If it comes from `share_input`, its gradient is added up with that of its other readers.
        weights: G tensors [N, K].
        bias: all b_i one after the other, [G · N], or None.
        coefficients: G tensors [r].
        z: x Aᵀ, [..., r] in the dtype of the products, where something computed it already.
        made_from: u of x = GELU(u), of x's shape and dtype, where u is kept for the GELU's backward anyway. It is kept
            for dA in place of x, and x computed again there.
        sink: takes the gradients of down and up in place of autograd, see `shared.py`.
        remake: one function a weight that makes it again, for weights that are not to be kept until the backward pass,
            as those that are stored quantised. Not for backend "reference", which keeps them.

    Returns:
        G tensors [..., N]; of a group possibly views of one tensor, which PyTorch lets nobody write to in place.

    Raises:
        ValueError: as `s2_linear`; no weight or more than three, weights unlike each other, not as many coefficients,
            or `z` or `made_from` unlike x.
        RuntimeError: as `s2_linear`.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}, not one of {', '.join(BACKENDS)}")
    check_arguments(x, weights, bias, down, up, coefficients)
    shared = SharedInput.of(x, down)
    autocast = device.autocast_dtype(x)
    if autocast is not None:
        x = x.to(autocast)
    elif x.dtype != weights[0].dtype:
        raise ValueError(f"x is {x.dtype} and weight {weights[0].dtype}: cast one of them or run under torch.autocast")
    if shared is not None and shared.rows.dtype != x.dtype:
        raise ValueError(f"x was shared as {shared.rows.dtype} and is read as {x.dtype}: share it as its maps read it")
    if made_from is not None and (made_from.shape != x.shape or made_from.dtype != x.dtype):
        raise ValueError(
            f"made_from is {made_from.dtype} {tuple(made_from.shape)}, x {x.dtype} {tuple(x.shape)}: not alike"
        )
    leading = x.shape[:-1]
    rows = x.reshape(-1, x.shape[-1])
    if z is not None and (z.shape[-1] != down.shape[0] or z.shape[:-1].numel() != len(rows)):
        raise ValueError(f"z has shape {tuple(z.shape)}, not {(*leading, down.shape[0])} as x {tuple(x.shape)} needs")
    operands = (rows, weights, bias, down, up, coefficients)
    strategy = _strategy(*operands, backend)
    if strategy == REFERENCE:
        biases = [None] * len(weights) if bias is None else bias.chunk(len(weights))
        return tuple(
            s2_linear_reference(x, weight, b, down, up, e)
            for weight, b, e in zip(weights, biases, coefficients, strict=True)
        )
    with device.without_autocast(x):
        z = None if z is None else z.reshape(-1, z.shape[-1])
        if z is None and shared is not None and STRATEGIES[strategy].reads_z:
            z = shared.z
        if made_from is not None:
            made_from = made_from.detach().reshape(rows.shape)
        ys = _apply(strategy, *operands, z=z, sink=sink, shared=shared, remake=remake, made_from=made_from)
    return tuple(y.view(*leading, y.shape[-1]) for y in ys)


def _apply(
    strategy: str,
    x: Tensor,
    weights: Sequence[Tensor],
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    coefficients: Sequence[Tensor],
    *,
    z: Tensor | None = None,
    sink: GradientSink | None = None,
    shared: SharedInput | None = None,
    remake: Remake | None = None,
    made_from: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """The operation by a strategy of `STRATEGIES`, for x [M, K] in the dtype of the products."""
    # Half-precision weights are rounded anew at every step, so that the mean is right; always alike for inference.
    drawn = strategy == "merged" and weights[0].dtype.itemsize == 2 and torch.is_grad_enabled()
    seed = torch.randint(2**31, (1,), device="cpu") if drawn else _NO_SEED
    return S2LinearFunction.apply(
        x, z, bias, down, up, strategy, seed, sink, shared, remake, made_from, *weights, *coefficients
    )


def _strategy(
    x: Tensor,
    weights: Sequence[Tensor],
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    coefficients: Sequence[Tensor],
    backend: str,
) -> str:
    """The strategy for operands x [M, K] of the products' dtype."""
    if backend == "auto" and device.in_transform():
        return REFERENCE
    outputs, inputs = weights[0].shape
    trained = any(tensor.requires_grad for tensor in (x, down, up, *coefficients)) and torch.is_grad_enabled()
    shape = shape_of(x.shape[0], inputs, outputs, down.shape[0], len(weights), x.dtype, weights[0].dtype, trained)
    without_kernels = x.is_cuda and not device.runs_triton(x) and named_backend(backend) == AUTO
    chosen = pick(backend, shape, x.device, _WITHOUT_FUSED if without_kernels else _CANDIDATES)
    if chosen == "fused" and not device.runs_triton(x):
        usable, reason = device.triton_is_usable(x)
        if not usable:
            asked, way_out = ("backend='fused'", "use backend='auto'") if backend == "fused" else _BY_VARIABLE
            raise RuntimeError(f"{asked} cannot run here: {reason}; {way_out}")
    if chosen == "augmented" and torch.compiler.is_compiling():
        return "split"
    return chosen


_CANDIDATES = candidates_of(s2_linear_group, (REFERENCE, *STRATEGIES))
_WITHOUT_FUSED = {name: candidate for name, candidate in _CANDIDATES.items() if name != "fused"}
