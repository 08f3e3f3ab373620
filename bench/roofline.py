"""What a device can do: by its data sheet (counted times), or measured (the floor of every timed row)."""

from dataclasses import dataclass

import torch

from bench.cases import PRECISIONS, Case
from bench.counter import Count
from bench.measure import latencies


@dataclass(frozen=True)
class DataSheet:
    """Vendor's figures: memory in GB/s, dense half-precision (float32 sums) and plain float32 in TFLOP/s."""

    gb_per_s: float
    half_tflops: float
    single_tflops: float

    def floor_ms(self, counted: Count) -> float:
        """Sum over the launches of the least time each can take; what lies between launches is not in it."""
        rates = (self.gb_per_s * 1e9, self.half_tflops * 1e12, self.single_tflops * 1e12)
        return 1e3 * sum(launch.floor_s(*rates) for launch in counted.launches)


DATA_SHEETS = {
    "H100 SXM": DataSheet(3350, 989, 67),
    "A100 SXM 80 GB": DataSheet(2039, 312, 19.5),
    "L4": DataSheet(300, 121, 30.3),
    "RTX 4090": DataSheet(1008, 165.2, 82.6),
}


@dataclass(frozen=True)
class Device:
    """The device in hand, "cuda" or "cpu", with its measured copy rate and matrix rates by precision."""

    type: str
    copy_gb_per_s: float
    matrix_tflops: dict[str, float]

    def floor_ms(self, case: Case, which: str) -> float:
        """The least time of a pass ("forward", "backward" or "both") at the measured rates."""
        passes = {"forward": (False,), "backward": (True,), "both": (False, True)}[which]
        total = 0.0
        for moved, flops in map(case.minimum, passes):
            arithmetic = flops / (self.matrix_tflops[case.precision] * 1e12)
            total += 1e3 * max(moved / (self.copy_gb_per_s * 1e9), arithmetic)
        return total


def measure_device() -> Device:
    """Copies 1 GiB (256 MiB on CPU) and multiplies 8192³ (1024³) matrices of random entries, in every precision.

    Rates of the median time; a copy counts bytes read and bytes written.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    elements, width = (2**30, 8192) if device == "cuda" else (2**28, 1024)
    source = torch.randint(0, 127, (elements,), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    calls = {"copy": lambda: target.copy_(source)}
    operands = {}
    for name, dtype in PRECISIONS.items():
        if name != "autocast":
            operands[name] = [torch.randn(width, width, device=device).to(dtype) for _ in range(2)]
            calls[name] = lambda name=name: operands[name][0] @ operands[name][1]
    times = latencies(calls, rounds=20, seconds=20)
    rates = {name: 2 * width**3 / times[name].p50_ms / 1e9 for name in operands}
    rates["autocast"] = rates["bf16"]
    return Device(device, 2 * elements / times["copy"].p50_ms / 1e6, rates)
