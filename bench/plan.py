"""What `bench.run` measures when nothing is selected, most important first."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import product

from bench.cases import Case
from bench.step import StepCase


@dataclass(frozen=True)
class Plan:
    """Cases of each section, and for how long one case may be timed at most."""

    layers: list[Case]
    steps: list[StepCase]
    counted_layers: list[Case]
    counted_steps: list[StepCase]
    rounds: int
    seconds: float
    sweep: list[Case] = field(default_factory=list)  # layers measured after the steps
    order: tuple[str, ...] = ("device", "step", "layer", "sweep", "counted", "static")


_COUNTED_LAYERS = [
    Case("encoder-layer", "large-v3", 24_000),
    Case("encoder-layer", "large-v3", 24_000, precision="autocast"),
    Case("decoder-layer", "large-v3", 512),
    Case("cross-kv", "large-v3", 24_000),
    Case("encoder-layer", "base", 6_000, precision="autocast"),
]
_COUNTED_STEPS = [StepCase("large-v3", 16, tokens=32), StepCase("small", 16, tokens=32), StepCase("base", 4)]


def cpu() -> Plan:
    """Whisper-base: steps in both windows, layers under autocast at the rows of both windows and of a decoder."""
    layers = [
        *(Case("encoder-layer", "base", rows, precision="autocast") for rows in (1040, 6000)),
        Case("decoder-layer", "base", 64, precision="autocast"),
        *(Case(layer, "base", 1040, precision="autocast") for layer in ("qkv", "out", "fc1", "fc2")),
        Case("cross-kv", "base", 1040, precision="autocast"),
        Case("encoder-layer", "base", 1040, precision="bf16"),
        Case("encoder-layer", "base", 128, precision="autocast"),
    ]
    steps = [StepCase("base", 4, "trim"), StepCase("base", 4, "full")]
    return Plan(layers, steps, _COUNTED_LAYERS, _COUNTED_STEPS, rounds=7, seconds=20.0)


def cuda() -> Plan:
    """large-v3 first: encoder layer, decoder layer, whole steps; then sweeps over rows, rank, dtype and size."""
    first = [
        Case("encoder-layer", "large-v3", 24_000),
        Case("decoder-layer", "large-v3", 512),
        Case("cross-kv", "large-v3", 24_000),
        Case("encoder-layer", "large-v3", 24_000, precision="autocast"),
    ]
    sweep = [
        *(Case("encoder-layer", "large-v3", rows) for rows in (512, 4096, 48_000, 128, 16)),
        *(Case(layer, "large-v3", 24_000) for layer in ("qkv", "out", "fc1", "fc2")),
        *(Case("encoder-layer", "large-v3", 24_000, rank=rank) for rank in (32, 128, 1)),
        *(Case("encoder-layer", size, 24_000) for size in ("small", "base", "medium", "tiny")),
        *(Case("encoder-layer", "large-v3", 24_000, precision=precision) for precision in ("fp16", "fp32")),
    ]
    steps = [
        StepCase("large-v3", 16, tokens=32),
        StepCase("small", 16, tokens=32),
        StepCase("base", 32, tokens=32),
        StepCase("turbo", 16, tokens=32),
        StepCase("medium", 16, tokens=32),
        StepCase("large-v3", 1, tokens=32),
        StepCase("large-v3", 4, tokens=32, quantize="nf4"),
        StepCase("tiny", 32, tokens=32),
    ]
    order = ("device", "layer", "step", "sweep", "counted", "static")
    return Plan(first, steps, _COUNTED_LAYERS, _COUNTED_STEPS, rounds=50, seconds=4.0, sweep=sweep, order=order)


def layer_cases(
    layers: Iterable[str], sizes: Iterable[str], rows: Iterable[int], ranks: Iterable[int], precisions: Iterable[str]
) -> list[Case]:
    """Every combination of what was selected."""
    return [
        Case(layer, size, m, rank, precision)
        for layer, size, m, rank, precision in product(layers, sizes, rows, ranks, precisions)
    ]


def step_cases(
    sizes: Iterable[str],
    batches: Iterable[int],
    windows: Iterable[str],
    tokens: Iterable[int],
    ranks: Iterable[int],
) -> list[StepCase]:
    """Every combination of what was selected."""
    return [
        StepCase(size, batch, window, tokens=count, rank=rank)
        for size, batch, window, count, rank in product(sizes, batches, windows, tokens, ranks)
    ]
