"""Who computes an adapted linear map: the frozen map alone, LoRA by hand, PEFT's adapters, and our strategies.

Every provider but `frozen` computes y = x Wᵀ + b + ((x Aᵀ) ⊙ e) Bᵀ for each weight of a group; LoRA's B is B diag(e).
`refuse_wrong` holds it to float64, output and every gradient, before it is timed.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from peft import AdaLoraConfig, LoraConfig, PeftConfig, VeraConfig, get_peft_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from bench.cases import Case, Operands
from fused_s2lora import s2_linear_group, s2_linear_reference
from fused_s2lora.kernels.arguments import MAX_GROUP
from fused_s2lora.kernels.shared import GradientSink, SharedPair, share_input
from fused_s2lora.kernels.strategies import STRATEGIES

PROVIDERS = (
    "frozen", "addmm-lora", "peft-lora", "peft-lora-half", "peft-adalora", "peft-vera", "s2-reference", "s2-compiled",
    "s2-auto", *(f"s2-{strategy}" for strategy in STRATEGIES),
)  # fmt: skip
# Largest error over the largest entry. An adapter left out is off by a tenth and more.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 2e-2}


class WrongResultError(ValueError):
    """A provider computes something else than the operation it is timed for."""


@dataclass
class Learned:
    """A trainable tensor that is `factor` × a quantity: "down", "up", "coefficients", or "up·e" of LoRA.

    `weight` is the index of its weight in the group, None where the tensor is shared and its gradient the sum.
    """

    tensor: Tensor
    quantity: str
    weight: int | None
    factor: float = 1.0


@dataclass
class Provided:
    """A provider for one group: `forward()` gives y [M, N] of each weight."""

    forward: Callable[[], list[Tensor]]
    learned: list[Learned] = field(default_factory=list)


def providers(case: Case, device: str, *, counting: bool = False) -> dict[str, Callable[[Operands], Provided]]:
    """Builders by name, of those that can run here; with `counting`, of those that fake tensors can be put through."""
    dtype, autocast = case.compute_dtype, case.precision == "autocast"
    found: dict[str, Callable[[Operands], Provided]] = {
        "frozen": lambda group: Provided(_each(F.linear, group, device, autocast)),
        "addmm-lora": lambda group: _addmm_lora(group, dtype),
        "peft-lora": lambda group: _peft(_lora(case.rank), group, device, dtype, autocast=dtype != torch.float32),
    }
    if dtype != torch.float32 and not autocast:
        found["peft-lora-half"] = lambda group: _peft(_lora(case.rank), group, device, dtype, autocast=False)
    found["peft-adalora"] = lambda group: _peft(
        AdaLoraConfig(init_r=case.rank, target_r=case.rank, lora_alpha=case.rank, total_step=100, target_modules=_MAPS),
        group, device, dtype, autocast=dtype != torch.float32,
    )  # fmt: skip
    found["peft-vera"] = lambda group: _peft(
        VeraConfig(r=case.rank, target_modules=_MAPS), group, device, dtype, autocast=dtype != torch.float32
    )
    found["s2-reference"] = lambda group: _one_by_one(group, s2_linear_reference, device, autocast)
    if not counting:
        found["s2-compiled"] = lambda group: _one_by_one(
            group, torch.compile(s2_linear_reference, fullgraph=True, dynamic=False), device, autocast
        )
        found["s2-auto"] = lambda group: _s2(group, "auto", device, autocast)
    for strategy in STRATEGIES:
        if counting or strategy != "fused" or device == "cuda":
            found[f"s2-{strategy}"] = lambda group, strategy=strategy: _s2(group, strategy, device, autocast)
    return found


def _each(function: Callable[..., Tensor], group: Operands, device: str, autocast: bool) -> Callable[[], list[Tensor]]:
    def forward() -> list[Tensor]:
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            return [function(group.x, *operands) for operands in zip(group.weights, group.biases, strict=True)]

    return forward


def _addmm_lora(group: Operands, dtype: torch.dtype) -> Provided:
    """LoRA as one would write it by hand: factors in the dtype of the product, the update added by `addmm`."""
    downs = [group.down.detach().to(dtype).requires_grad_() for _ in group.weights]
    ups = [(group.up * e).detach().to(dtype).requires_grad_() for e in group.coefficients]

    def forward() -> list[Tensor]:
        x = group.x.to(dtype)
        return [
            torch.addmm(F.linear(x, weight.to(dtype), bias.to(dtype)), x @ down.mT, up.mT)
            for weight, bias, down, up in zip(group.weights, group.biases, downs, ups, strict=True)
        ]

    learned = [Learned(down, "down", index) for index, down in enumerate(downs)]
    return Provided(forward, [*learned, *(Learned(up, "up·e", index) for index, up in enumerate(ups))])


def _one_by_one(group: Operands, operation: Callable[..., Tensor], device: str, autocast: bool) -> Provided:
    """The equation for each weight apart."""

    def forward() -> list[Tensor]:
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            return [
                operation(group.x, weight, bias, group.down, group.up, coefficients)
                for weight, bias, coefficients in zip(group.weights, group.biases, group.coefficients, strict=True)
            ]

    return Provided(forward, _learned(group))


def _s2(group: Operands, backend: Any, device: str, autocast: bool) -> Provided:
    """Our operation as `fuse_whisper` has it: q, k and v as one, many weights of one input in pairs that share it."""
    size = len(group.weights) if len(group.weights) <= MAX_GROUP else 2
    starts = range(0, len(group.weights), size)
    biases = [torch.cat(group.biases[start : start + size]) for start in starts]

    def forward() -> list[Tensor]:
        ys: list[Tensor] = []
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            pair = SharedPair(group.up, group.down)
            sink, x = GradientSink(pair.gradients, transposed=False), group.x
            if len(starts) > 1:
                x = share_input(x.to(torch.bfloat16) if autocast else x, pair.down, sink)
            for start, bias in zip(starts, biases, strict=True):
                weights, coefficients = (values[start : start + size] for values in (group.weights, group.coefficients))
                ys += s2_linear_group(x, weights, bias, pair.down, pair.up, coefficients, sink=sink, backend=backend)
        return ys

    if backend == "augmented":
        with torch.no_grad():
            forward()  # the copy of the weights is made once
    return Provided(forward, _learned(group))


def _learned(group: Operands) -> list[Learned]:
    shared = [Learned(group.down, "down", None), Learned(group.up, "up", None)]
    return [*shared, *(Learned(value, "coefficients", index) for index, value in enumerate(group.coefficients))]


_MAPS = r"maps\.\d+"


class _Maps(nn.Module):
    """The frozen maps of a group as a model that PEFT can adapt."""

    def __init__(self, group: Operands) -> None:
        super().__init__()
        self.maps = nn.ModuleList()
        for weight, bias in zip(group.weights, group.biases, strict=True):
            outputs, inputs = weight.shape
            linear = nn.Linear(inputs, outputs, device="meta")
            linear.weight, linear.bias = (nn.Parameter(value, requires_grad=False) for value in (weight, bias))
            self.maps.append(linear)


def _lora(rank: int) -> LoraConfig:
    return LoraConfig(r=rank, lora_alpha=rank, target_modules=_MAPS)


def _peft(config: PeftConfig, group: Operands, device: str, dtype: torch.dtype, *, autocast: bool) -> Provided:
    """PEFT's own layers with our factors in them; float32 adapters under autocast, or all in the stored dtype."""
    wide = autocast or dtype == torch.float32
    model = get_peft_model(_Maps(group), config, autocast_adapter_dtype=wide)
    layers = model.base_model.model.maps
    learned = [one for index, layer in enumerate(layers) for one in _fill(layer, config, group, index)]

    def forward() -> list[Tensor]:
        with torch.autocast(device, dtype, enabled=autocast):
            return [layer(group.x) for layer in layers]

    return Provided(forward, learned)


def _fill(layer: Any, config: PeftConfig, group: Operands, index: int) -> list[Learned]:
    """Puts the factors and coefficients of a weight into PEFT's layer of it."""
    coefficients = group.coefficients[index]
    if isinstance(config, VeraConfig):
        shared = {layer.vera_A["default"]: group.down, layer.vera_B["default"]: group.up}
        values = shared | {layer.vera_lambda_d["default"]: coefficients}
        layer.vera_lambda_b["default"].data.fill_(1)
        learned = [Learned(layer.vera_lambda_d["default"], "coefficients", index)]
    elif isinstance(config, AdaLoraConfig):
        factor = (config.init_r + 1e-5) / layer.scaling["default"]
        down, up, diagonal = (part["default"] for part in (layer.lora_A, layer.lora_B, layer.lora_E))
        values = {down: group.down, up: group.up, diagonal: coefficients[:, None] * factor}
        learned = [
            Learned(down, "down", index),
            Learned(up, "up", index),
            Learned(diagonal, "coefficients", index, factor),
        ]
    else:
        down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        values = {down: group.down, up: group.up * coefficients}
        learned = [Learned(down, "down", index), Learned(up, "up·e", index)]
    if not isinstance(group.x, FakeTensor):
        with torch.no_grad():
            for tensor, value in values.items():
                tensor.copy_(value)
    return learned


def gradients(provided: Provided, ys: list[Tensor], group: Operands) -> list[Tensor]:
    """Gradients of x and of every learned tensor, in that order."""
    inputs = [group.x, *(learned.tensor for learned in provided.learned)]
    return list(torch.autograd.grad(ys, inputs, group.dys))


def refuse_wrong(name: str, provided: Provided, group: Operands, dtype: torch.dtype) -> None:
    """Raises WrongResultError where an output or a gradient is not the float64 one (`frozen` is exempt)."""
    if name == "frozen":
        return
    ys = provided.forward()
    got_dx, *got = gradients(provided, ys, group)
    dx = torch.zeros_like(group.x, dtype=torch.float64)
    sums: dict[tuple[str, int | None], Tensor] = {}
    for index, y in enumerate(ys):
        expected = _oracle(group, index)
        _compare(name, "output", y, expected.pop("y"), dtype)
        dx += expected.pop("x")
        for quantity, gradient in expected.items():
            sums[quantity, index] = gradient
            sums[quantity, None] = sums.get((quantity, None), 0) + gradient
    _compare(name, "input gradient", got_dx, dx, dtype)
    for learned, gradient in zip(provided.learned, got, strict=True):
        wanted = sums[learned.quantity, learned.weight]
        _compare(
            name, f"gradient of {learned.quantity}", gradient.reshape(wanted.shape) * learned.factor, wanted, dtype
        )


def _oracle(group: Operands, index: int) -> dict[str, Tensor]:
    """Output and every gradient of one weight of the group, in float64."""
    wide = {name: getattr(group, name).detach().double().requires_grad_() for name in ("x", "down", "up")}
    weight, bias = group.weights[index].double(), group.biases[index].double()
    coefficients = group.coefficients[index].detach().double().requires_grad_()
    y = s2_linear_reference(wide["x"], weight, bias, wide["down"], wide["up"], coefficients)
    dy = group.dys[index].double()
    dx, d_down, d_up, d_coefficients = torch.autograd.grad(y, [*wide.values(), coefficients], dy)
    scaled_up = dy.mT @ (wide["x"].detach() @ wide["down"].detach().mT)
    return {
        "y": y.detach(), "x": dx, "down": d_down, "up": d_up, "coefficients": d_coefficients, "up·e": scaled_up,
    }  # fmt: skip


def _compare(name: str, what: str, got: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    error = ((got.double() - expected).abs().max() / expected.abs().max()).item()
    if not error <= TOLERANCE[dtype]:
        raise WrongResultError(f"{name}: {what} is off by {error:.1e} of the largest entry; it is not timed")
