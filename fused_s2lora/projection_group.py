"""Adapted linear maps that read one input and share one pair, computed as one operation when the first is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .kernels.s2_linear import s2_linear_group
from .kernels.shared import known_z, write_count

if TYPE_CHECKING:
    from .layer import S2LoraLinear


class ProjectionGroup:
    """q, k and v of one attention: up to three `S2LoraLinear` of one shape with one pair.

    An attention asks for its projections one after the other with the same tensor. The first call computes all; the
    others are handed their output.
    """

    def __init__(self, layers: list[S2LoraLinear]) -> None:
        self.layers = layers
        self._input: Tensor | None = None
        self._outputs: dict[int, Tensor] = {}
        self._bias: tuple[Any, Tensor | None] = (None, None)

    def output(self, layer: S2LoraLinear, x: Tensor) -> Tensor | None:
        """The output of `layer` for x; None where the group cannot be one operation now."""
        if self._input is not x or id(layer) not in self._outputs:
            outputs = self._compute(x)
            if outputs is None:
                return None
            self._input = x
            self._outputs = {id(one): output for one, output in zip(self.layers, outputs, strict=True)}
        output = self._outputs.pop(id(layer))
        if not self._outputs:
            self._input = None
        return output

    def name_at_work(self) -> str | None:
        """The one adapter at work in all layers; None where that is not so, or a layer cannot be fused."""
        names = self.layers[0].names_at_work()
        alike = len(names) == 1 and all(
            layer.names_at_work() == names and layer.fusable(names) for layer in self.layers
        )
        return names[0] if alike else None

    def _compute(self, x: Tensor) -> tuple[Tensor, ...] | None:
        name = None if torch.compiler.is_compiling() else self.name_at_work()
        if name is None:
            return None
        first = self.layers[0]
        alive = [layer.ranks_alive_for_good(name) for layer in self.layers]
        if any(ranks is not None and not len(ranks) for ranks in alive):
            return None  # a map without an update is best left alone
        down, up, _ = first.operands(name)
        weights = [layer.base_linear.weight for layer in self.layers]
        coefficients = [layer.operands(name)[2] for layer in self.layers]
        backend: Any = first.configs[name].backend
        return s2_linear_group(
            x, weights, self._stacked_bias(), down, up, coefficients, z=known_z(x, down), sink=first.sink(name),
            backend=backend,
        )  # fmt: skip

    def _stacked_bias(self) -> Tensor | None:
        """All biases one after the other, zeros for a layer without; made anew when one of them has changed."""
        biases = [layer.base_linear.bias for layer in self.layers]
        if all(bias is None for bias in biases):
            return None
        key = [(id(bias), write_count(bias), bias.device, bias.dtype) for bias in biases if bias is not None]
        if self._bias[0] != key:
            like = next(bias for bias in biases if bias is not None)
            parts = [torch.zeros_like(like) if bias is None else bias.detach() for bias in biases]
            self._bias = key, torch.cat(parts)
        return self._bias[1]
