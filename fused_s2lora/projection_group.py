"""Adapted linear maps that read one input and share one pair, computed as one operation when the first is asked for."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .kernels import device
from .kernels.configs import rank_block
from .kernels.s2_linear import s2_linear_group
from .kernels.shared import GradientSink, Sources, known_z, lasts, write_count
from .quantized import backend_for, frozen_weights

if TYPE_CHECKING:
    from .layer import S2LoraLinear


class _Made:
    """Outputs of one operation, by id of the layer that will ask for them, and what they depend on."""

    def __init__(self, outputs: dict[int, Tensor], made_from: list[Tensor], layer: S2LoraLinear) -> None:
        self.outputs, self.made_from, self._layer = outputs, made_from, layer  # x first, then the parameters
        self.made_in = self.state()

    def state(self) -> tuple[Any, ...]:
        """What the outputs depend on besides which tensors they are made from."""
        counts = [write_count(value) for value in self.made_from]
        modes = (torch.is_grad_enabled(), device.autocast_dtype(self.made_from[0]))
        return *modes, *self._layer.active_adapters, *counts


class _Waiting(threading.local):
    """What each thread has computed and not yet asked for; a copy begins with nothing."""

    made: _Made | None = None

    def __reduce__(self) -> tuple[type[_Waiting], tuple[()]]:
        return _Waiting, ()


class ProjectionGroup:
    """q, k and v of one attention: up to three `S2LoraLinear` of one shape with one pair.

    An attention asks for its projections one after the other with the same tensor. The first call computes all; the
    others are handed their output.
    """

    def __init__(self, layers: list[S2LoraLinear]) -> None:
        self.layers = layers
        self._bias: tuple[list[bool], Sources, Tensor] | None = None  # which layers have one, and all of them
        self._waiting = _Waiting()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_bias": None}  # it knows the biases by their storages, which no file can hold

    def output(self, layer: S2LoraLinear, x: Tensor) -> Tensor | None:
        """The output of `layer` for x; None where it cannot, or need not, be computed with others now."""
        if torch.compiler.is_compiling():
            return None
        made = self._waiting.made
        if made is not None and (made.made_from[0] is not x or made.state() != made.made_in):
            made = self._waiting.made = None
        if made is None or id(layer) not in made.outputs:
            made = self._compute(layer, x)
            if made is None:
                return None
            self._waiting.made = made
        output = made.outputs.pop(id(layer))
        if not made.outputs:
            self._waiting.made = None
        return output

    def forget(self) -> None:
        """Lets go of outputs that were computed and will not be asked for, as where the forward pass raised."""
        self._waiting.made = None

    def name_at_work(self) -> str | None:
        """The one adapter at work in all layers; None where that is not so, or a layer cannot be fused."""
        names = self.layers[0].names_at_work()
        alike = len(names) == 1 and all(
            layer.names_at_work() == names and layer.fusable(names) for layer in self.layers
        )
        return names[0] if alike else None

    def together_with(self, layer: S2LoraLinear, adapter_name: str) -> list[S2LoraLinear]:
        """The layers computed in one operation with `layer`, itself among them: those with an update, if it has one."""
        at_work = [one for one in self.layers if adapter_name in one.configs and one.updates(adapter_name)]
        return at_work if layer in at_work else [layer]

    def _compute(self, layer: S2LoraLinear, x: Tensor) -> _Made | None:
        name = self.name_at_work()
        if name is None:
            return None
        layers = self.together_with(layer, name)
        if len(layers) < 2:
            return None
        first = layers[0]
        down, up, coefficients, sink = live_operands(layers, name)
        backend: Any = backend_for(first.base_linear, first.configs[name].backend)
        weights, remake = frozen_weights([one.base_linear for one in layers], x)
        outputs = s2_linear_group(
            x, weights, self._stacked_bias(layers), down, up, coefficients,
            z=known_z(x, down), sink=sink, remake=remake, backend=backend,
        )  # fmt: skip
        parameters = [one.s2lora_coefficients[name] for one in layers]
        made_from = [x, *parameters, first.s2lora_up[name], first.s2lora_down[name]]
        return _Made({id(one): output for one, output in zip(layers, outputs, strict=True)}, made_from, first)

    def _stacked_bias(self, layers: list[S2LoraLinear]) -> Tensor | None:
        """All biases one after the other, zeros for a layer without; made anew when one of them has changed."""
        biases = [layer.base_linear.bias for layer in layers]
        if all(bias is None for bias in biases):
            return None
        given = [bias for bias in biases if bias is not None]
        places = [bias is not None for bias in biases]
        if self._bias is not None and self._bias[0] == places and self._bias[1].are(given):
            return self._bias[2]
        stacked = torch.cat([torch.zeros_like(given[0]) if bias is None else bias.detach() for bias in biases])
        if lasts(stacked):
            self._bias = places, Sources(given), stacked
        return stacked


def live_operands(
    layers: Sequence[S2LoraLinear], adapter_name: str
) -> tuple[Tensor, Tensor, list[Tensor], GradientSink | None]:
    """down A [r, K] and up B [N, r] of the layers' pair, each one's coefficients, and where gradients of A and B go.

    Ranks whose coefficients are zero for good in all of the layers are left out where that saves work.
    """
    operands = [layer.operands(adapter_name) for layer in layers]
    down, up, _ = operands[0]
    coefficients = [e for _, _, e in operands]
    live = ranks_computed(layers, adapter_name)
    if live is None:
        return down, up, coefficients, layers[0].sink(adapter_name)
    return down[live], up[:, live], [e[live] for e in coefficients], None


def ranks_computed(layers: Sequence[S2LoraLinear], adapter_name: str) -> Tensor | None:
    """The ranks that are not left out by `live_operands`; None where that is all."""
    known: list[Tensor] = []
    for layer in layers:
        ranks = layer.ranks_alive_for_good(adapter_name)
        if ranks is None:
            return None
        known.append(ranks)
    live = known[0] if len(known) == 1 else layers[0].together_with_others(known)
    saves = not len(live) or rank_block(len(live)) < rank_block(layers[0].configs[adapter_name].r)
    return live if saves else None
