"""The linear maps of Whisper as benchmark cases: groups of weights that read one input."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from fused_s2lora.training.tune import SIZES

# What x, W and b are stored in. `autocast`: float32 weights under bfloat16 autocast, as the Trainer's bf16=True has it.
PRECISIONS = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "autocast": torch.float32,
}
LAYERS = ("qkv", "out", "fc1", "fc2", "cross-kv", "encoder-layer", "decoder-layer")


@dataclass(frozen=True)
class Group:
    """`weights` maps [outputs, inputs] of one input x [M, inputs]; under autocast a LayerNorm leaves x in float32."""

    weights: int
    inputs: int
    outputs: int
    after_norm: bool = False


@dataclass(frozen=True)
class Case:
    """Some linear maps of a Whisper of `size`, for M = `rows` rows and rank `rank`."""

    layer: str
    size: str
    rows: int
    rank: int = 8
    precision: str = "bf16"

    def groups(self) -> list[Group]:
        """The groups of weights; `decoder-layer` leaves out cross-attention's k and v, which are `cross-kv`."""
        width, _, decoder_layers, _ = SIZES[self.size]
        single = {
            "qkv": Group(3, width, width, after_norm=True),
            "out": Group(1, width, width),
            "fc1": Group(1, width, 4 * width, after_norm=True),
            "fc2": Group(1, 4 * width, width),
            "cross-kv": Group(2 * decoder_layers, width, width, after_norm=True),
        }
        if self.layer == "encoder-layer":
            return [single[name] for name in ("qkv", "out", "fc1", "fc2")]
        if self.layer == "decoder-layer":
            cross_q = Group(1, width, width, after_norm=True)
            return [single["qkv"], single["out"], cross_q, single["out"], single["fc1"], single["fc2"]]
        return [single[self.layer]]

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of the matrix products."""
        return torch.bfloat16 if self.precision == "autocast" else PRECISIONS[self.precision]

    def fields(self) -> dict[str, Any]:
        """The case as fields of a result line."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.size} {self.layer}, M {self.rows}, rank {self.rank}, {self.precision}"

    def minimum(self, backward: bool) -> tuple[int, int]:
        """Bytes and flops no implementation can do without: x, W, y once; dy, W, x and dx once.

        The adapter's own arithmetic, beside W and not merged into it, is in the flops: x Aᵀ, g A and gᵀ x once for
        all weights of a group, which share them. Its factors' few bytes are not counted.
        """
        size = self.compute_dtype.itemsize
        moved = flops = 0
        for group in self.groups():
            weights = group.weights * group.inputs * group.outputs
            low_rank = self.rank * (group.inputs + group.weights * group.outputs)
            moved += size * (self.rows * (group.inputs * (2 if backward else 1) + group.weights * group.outputs))
            moved += size * weights
            flops += 2 * self.rows * (weights + low_rank * (2 if backward else 1))
        return moved, flops


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


def make_operands(case: Case, device: str) -> list[Operands]:
    """Random operands of unit scale for every group, with a low-rank path a tenth of the frozen one's size."""
    generator = torch.Generator(device).manual_seed(case.rows + case.rank)
    stored = PRECISIONS[case.precision]

    def normal(*shape: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
        return (torch.randn(*shape, generator=generator, device=device) * scale).to(dtype)

    groups = []
    for group in case.groups():
        weights, inputs, outputs = range(group.weights), group.inputs, group.outputs
        x_dtype = stored if group.after_norm else case.compute_dtype
        groups.append(
            Operands(
                x=normal(case.rows, inputs, dtype=x_dtype).requires_grad_(),
                dys=[normal(case.rows, outputs, dtype=case.compute_dtype) for _ in weights],
                weights=[normal(outputs, inputs, scale=inputs**-0.5, dtype=stored) for _ in weights],
                biases=[normal(outputs, dtype=stored) for _ in weights],
                down=normal(case.rank, inputs, scale=inputs**-0.5).requires_grad_(),
                up=normal(outputs, case.rank).requires_grad_(),
                coefficients=[normal(case.rank, scale=0.1).requires_grad_() for _ in weights],
            )
        )
    return groups
