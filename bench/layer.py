"""One adapted linear map of Whisper, forward and backward, by provider.

    python -m bench.layer --size base --frames 6000

Each provider is first held to the float64 result; one that computes something else is refused before it is timed.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraConfig
from peft.tuners.lora.layer import Linear as PeftLoraLinear
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from bench.measure import RESULTS, device_name, latencies, latency_fields, record
from bench.step import SIZES
from fused_s2lora import s2_linear, s2_linear_reference

TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@dataclass
class Case:
    """One weight [N, K] with M rows of input; the low-rank factors of rank r and the oracle's output and input grad."""

    x: Tensor  # [M, K]
    dy: Tensor  # [M, N]
    weight: Tensor  # [N, K]
    bias: Tensor  # [N]
    down: Tensor  # [r, K]
    up: Tensor  # [N, r]
    coefficients: Tensor  # [r]

    def oracle(self) -> tuple[Tensor, Tensor]:
        """Output [M, N] and gradient of the input [M, K] in float64."""
        wide = {name: value.detach().double() for name, value in vars(self).items()}
        dy = wide.pop("dy")
        x = wide["x"].requires_grad_()
        y = s2_linear_reference(**wide)
        (dx,) = torch.autograd.grad(y, x, dy)
        return y.detach(), dx


def make_case(rows: int, inputs: int, outputs: int, rank: int, dtype: torch.dtype, device: str) -> Case:
    """Random inputs of unit scale and an adapter whose path is a tenth of the frozen one's size."""
    generator = torch.Generator(device).manual_seed(rows + inputs + outputs + rank)

    def normal(*shape: int, scale: float = 1.0, dtype: torch.dtype = dtype) -> Tensor:
        return (torch.randn(*shape, generator=generator, device=device) * scale).to(dtype)

    return Case(
        x=normal(rows, inputs).requires_grad_(),
        dy=normal(rows, outputs),
        weight=normal(outputs, inputs, scale=inputs**-0.5),
        bias=normal(outputs),
        down=normal(rank, inputs, scale=inputs**-0.5, dtype=torch.float32).requires_grad_(),
        up=normal(outputs, rank, dtype=torch.float32).requires_grad_(),
        coefficients=normal(rank, scale=0.1, dtype=torch.float32).requires_grad_(),
    )


def providers(case: Case, device: str) -> dict[str, Callable[[], Tensor]]:
    """Forward calls by name; all but `frozen` compute y = x Wᵀ + b + ((x Aᵀ) ⊙ e) Bᵀ."""
    dtype = case.weight.dtype
    down = case.down.detach().to(dtype).requires_grad_()
    up = (case.up * case.coefficients).detach().to(dtype).requires_grad_()

    def addmm_lora() -> Tensor:
        return torch.addmm(F.linear(case.x, case.weight, case.bias), case.x @ down.T, up.T)

    outputs, inputs = case.weight.shape
    rank = len(case.coefficients)
    base = nn.Linear(inputs, outputs, device=device, dtype=dtype).requires_grad_(False)
    base.weight.copy_(case.weight), base.bias.copy_(case.bias)
    config = LoraConfig(r=rank, lora_alpha=rank)
    peft_lora = PeftLoraLinear(base, "default", config=config, r=rank, lora_alpha=rank).to(device)
    with torch.no_grad():
        peft_lora.lora_A["default"].weight.copy_(case.down)
        peft_lora.lora_B["default"].weight.copy_(case.up * case.coefficients)

    def peft() -> Tensor:
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            return peft_lora(case.x)

    operands = (case.weight, case.bias, case.down, case.up, case.coefficients)
    calls = {
        "frozen": lambda: F.linear(case.x, case.weight, case.bias),
        "addmm-lora": addmm_lora,
        "peft-lora": peft,
        "s2-auto": lambda: s2_linear(case.x, *operands),
        "s2-reference": lambda: s2_linear(case.x, *operands, backend="reference"),
    }
    if device == "cuda":
        calls["s2-triton"] = lambda: s2_linear(case.x, *operands, backend="triton")
    return calls


def refuse_wrong(name: str, forward: Callable[[], Tensor], case: Case) -> None:
    """Raises ValueError if the provider's output or input gradient is not the oracle's (`frozen` is exempt)."""
    if name == "frozen":
        return
    y = forward()
    (dx,) = torch.autograd.grad(y, case.x, case.dy.to(y.dtype))
    for what, got, expected in zip(("output", "input gradient"), (y, dx), case.oracle(), strict=True):
        error = (got.double() - expected).abs().max() / expected.abs().max()
        if not error <= TOLERANCE[case.weight.dtype]:
            raise ValueError(f"{name}: {what} is off by {error:.1e} of the largest entry; it is not timed")


def _both(forward: Callable[[], Tensor], case: Case) -> Callable[[], None]:
    def call() -> None:
        y = forward()
        y.backward(case.dy.to(y.dtype))

    return call


def main() -> None:
    """Command line: the linear maps of one encoder layer, every provider in turns, a table and result lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="base")
    parser.add_argument("--frames", type=int, default=6000, help="rows M: batch × encoder positions")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="bfloat16")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path, default=RESULTS / "layer.jsonl")
    options = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, options.dtype)
    width = SIZES[options.size][0]
    shapes = {"q, k, v, out": (width, width), "fc1": (width, 4 * width), "fc2": (4 * width, width)}
    table = Table(title=f"forward + backward, p50 ms, M = {options.frames}, {options.dtype} · {device_name()}")
    for column in ("weight", "provider", "p20 ms", "p50 ms", "p80 ms", "/ frozen", "/ peft-lora"):
        table.add_column(column, justify="left" if column in ("weight", "provider") else "right")
    rows = []
    for weight, (inputs, outputs) in shapes.items():
        case = make_case(options.frames, inputs, outputs, options.rank, dtype, device)
        forwards = providers(case, device)
        for name, forward in forwards.items():
            refuse_wrong(name, forward, case)
        times = latencies({name: _both(call, case) for name, call in forwards.items()}, rounds=options.rounds)
        for name, latency in times.items():
            ratios = [latency.p50_ms / times[other].p50_ms for other in ("frozen", "peft-lora")]
            figures = (latency.p20_ms, latency.p50_ms, latency.p80_ms)
            table.add_row(weight, name, *(f"{value:.2f}" for value in (*figures, *ratios)))
            label = f"whisper-{options.size} {weight}, M {options.frames}, {options.dtype}, rank {options.rank}"
            rows.append({"case": label, "provider": name, "kind": "measured", **latency_fields(latency)})
    record(options.output, rows)
    Console().print(table)


if __name__ == "__main__":
    main()
