"""Time of every strategy for one shape, on random operands: forward, or forward and backward.

It runs in a thread of its own, where nothing of the caller is in force: autocast, no_grad, the hooks of gradient
checkpointing. Operands come from a generator of their own, and the caller's random state stays as it is.
"""

import contextlib
import statistics
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .strategy_record import FROZEN, OUT_OF_MEMORY, REFERENCE, Shape

WARMUP, ROUNDS = 3, 6
BURST = 5  # calls one after the other in a round
THREAD = "s2lora-timing"
_FLUSH_BYTES = 256 << 20  # more than the L2 cache of any GPU
# Largest error over the largest entry beside reference. A strategy that is wrong is off by a tenth and more.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-2, torch.float16: 2e-2, torch.bfloat16: 5e-2}


@dataclass
class Operands:
    """One group: x [M, K], and per weight dy [M, N], W [N, K], b [N], e [r]; shared A [r, K] and B [N, r]."""

    x: Tensor
    dys: list[Tensor]
    weights: list[Tensor]
    biases: list[Tensor]
    down: Tensor
    up: Tensor
    coefficients: list[Tensor]


# From the operands, what need not be timed apart, the forward call: y [M, N] of each weight, differentiable.
Candidate = Callable[[Operands], Callable[[], Sequence[Tensor]]]
Clock = Callable[[Callable[[], Any]], float]


def candidates_of(operation: Callable[..., Sequence[Tensor]], names: Sequence[str]) -> dict[str, Candidate]:
    """Candidates that call `operation(x, weights, bias, A, B, coefficients, backend=name)`, as `s2_linear_group`.

    Under autocast where the weight is stored in another dtype than that of the product.
    """

    def candidate(name: str) -> Candidate:
        def build(operands: Operands) -> Callable[[], list[Tensor]]:
            x, weights, bias = operands.x, operands.weights, torch.cat(operands.biases)
            shared = (operands.down, operands.up, operands.coefficients)
            mixed = x.dtype != operands.weights[0].dtype

            def forward() -> list[Tensor]:
                with torch.autocast(x.device.type, x.dtype) if mixed else contextlib.nullcontext():
                    return list(operation(x, weights, bias, *shared, backend=name))

            return forward

        return build

    return {name: candidate(name) for name in names}


def make_operands(shape: Shape, device: torch.device) -> Operands:
    """Random operands of unit scale; factors and coefficients in float32, or float64 with a float64 weight."""
    generator = torch.Generator(device).manual_seed(0)
    wide = torch.promote_types(shape.weight_dtype, torch.float32)
    rows, inputs, outputs, rank, weights = (
        shape.rows_bucket,
        shape.inputs,
        shape.outputs,
        shape.rank,
        range(shape.group),
    )

    def normal(*size: int, dtype: torch.dtype, scale: float = 1.0, trained: bool = False) -> Tensor:
        values = torch.randn(*size, generator=generator, device=device, dtype=dtype).mul_(scale)
        return values.requires_grad_(trained and shape.needs_gradient)

    return Operands(
        x=normal(rows, inputs, dtype=shape.dtype, trained=True),
        dys=[normal(rows, outputs, dtype=shape.dtype) for _ in weights if shape.needs_gradient],
        weights=[normal(outputs, inputs, dtype=shape.weight_dtype, scale=inputs**-0.5) for _ in weights],
        biases=[normal(outputs, dtype=shape.weight_dtype) for _ in weights],
        down=normal(rank, inputs, dtype=wide, scale=inputs**-0.5, trained=True),
        up=normal(outputs, rank, dtype=wide, trained=True),
        coefficients=[normal(rank, dtype=wide, scale=0.1, trained=True) for _ in weights],
    )


def time_candidates(
    shape: Shape, device: torch.device, candidates: Mapping[str, Candidate], clock: Clock | None = None
) -> tuple[dict[str, float], dict[str, str]]:
    """Median milliseconds of each candidate and of the frozen maps, and why a candidate has none.

    Left out are those that raise and those whose output or gradients differ from reference's. `clock` times one call.
    By default it takes the median of a burst, each call between two CUDA events after a write over the L2 cache, with
    no wait between them: where the host gets ahead of the GPU, as in a large model, only the GPU's time counts.
    """
    # Strategies that round at random draw their seed from PyTorch's generator on the CPU.
    with torch.random.fork_rng(devices=[]), ThreadPoolExecutor(1, thread_name_prefix=THREAD) as pool:
        return pool.submit(_time, shape, device, candidates, clock).result()


def _time(
    shape: Shape, device: torch.device, candidates: Mapping[str, Candidate], clock: Clock | None
) -> tuple[dict[str, float], dict[str, str]]:
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.cuda.synchronize()
    clock = _cuda_clock(device) if clock is None else clock
    operands = make_operands(shape, device)
    samples: dict[str, list[float]] = {}
    errors: dict[str, str] = {}
    expected: list[Tensor] | None = None
    steps: dict[str, Callable[[], list[Tensor]]] = {}
    ordered = sorted({**candidates, FROZEN: _frozen}.items(), key=lambda item: item[0] != REFERENCE)
    for name, build in ordered:
        try:
            step = _step(build(operands), operands, frozen=name == FROZEN)
            results = step()
            if name == REFERENCE:
                expected = results
            elif name != FROZEN and expected is not None:
                _compare(results, expected, _TOLERANCE[shape.dtype])
            del results
            for _ in range(WARMUP - 1):
                step()
            steps[name] = step
        except Exception as error:
            errors[name] = _reason(error)
    del expected
    # In turns, so that drift of the clock rate meets all alike.
    for _ in range(ROUNDS):
        for name, step in list(steps.items()):
            try:
                samples.setdefault(name, []).append(clock(step))
            except Exception as error:
                errors[name] = _reason(error)
                del steps[name]
    ms = {name: round(statistics.median(samples[name]), 5) for name in steps}
    errors.pop(FROZEN, None)
    return ms, errors


def _frozen(operands: Operands) -> Callable[[], list[Tensor]]:
    dtype = operands.x.dtype
    maps = list(zip(operands.weights, operands.biases, strict=True))
    return lambda: [F.linear(operands.x, weight.to(dtype), bias.to(dtype)) for weight, bias in maps]


def _step(forward: Callable[[], Sequence[Tensor]], operands: Operands, frozen: bool) -> Callable[[], list[Tensor]]:
    if not operands.dys:

        def inference() -> list[Tensor]:
            with torch.no_grad():
                return list(forward())

        return inference
    trained = [operands.x] if frozen else [operands.x, operands.down, operands.up, *operands.coefficients]

    def training() -> list[Tensor]:
        ys = list(forward())
        return [*(y.detach() for y in ys), *torch.autograd.grad(ys, trained, operands.dys)]

    return training


def _compare(got: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for one, other in zip(got, expected, strict=True):
        if one.shape != other.shape:
            raise ValueError(f"a result has shape {tuple(one.shape)} where reference has {tuple(other.shape)}")
        error = ((one - other).abs().max() / other.abs().max()).item()
        if not error <= tolerance:
            raise ValueError(f"a result differs from reference by {error:.1e} of the largest entry")


def _reason(error: Exception) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        return OUT_OF_MEMORY
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200] if lines else ''}"


def _cuda_clock(device: torch.device) -> Clock:
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=device)
    starts, ends = ([torch.cuda.Event(enable_timing=True) for _ in range(BURST)] for _ in range(2))

    def clock(call: Callable[[], Any]) -> float:
        for start, end in zip(starts, ends, strict=True):
            flush.zero_()
            start.record()
            call()
            end.record()
        ends[-1].synchronize()
        return statistics.median(start.elapsed_time(end) for start, end in zip(starts, ends, strict=True))

    return clock
