"""The adapted linear layer, inside PEFT (`S2LoraLinear`) and on its own (`S2Linear`)."""

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from .config import S2LoraConfig
from .kernels.s2_linear import Backend, s2_linear
from .sharing import FactorPair, initial_factors


class S2LoraLinear(nn.Module, BaseTunerLayer):
    """A frozen `nn.Linear` with ΔW = B diag(s) A in factors shared with other layers.

    x [..., in_features] -> [..., out_features]. Several active adapters add up: their ranks are laid side by side and
    computed as one.
    """

    adapter_layer_names = ("s2lora_coefficients", "s2lora_up", "s2lora_down")
    other_param_names = ("configs",)

    def __init__(
        self, base_layer: nn.Linear, adapter_name: str, pair: FactorPair, transposed: bool, config: S2LoraConfig
    ) -> None:
        super().__init__()
        self.base_layer: nn.Module = base_layer
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        self.transposed = transposed
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self.configs: dict[str, S2LoraConfig] = {}
        self.s2lora_coefficients = nn.ParameterDict()
        # The pair's own dictionaries: registered here too, so that PEFT finds and moves them; one copy, many owners.
        self.s2lora_up, self.s2lora_down = pair.up, pair.down
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: S2LoraConfig, inference_mode: bool = False) -> None:
        """Adds an adapter whose pair is already in the shared dictionaries; its coefficients start at zero."""
        self.configs[adapter_name] = config
        weight = self._linear().weight
        size = config.r if config.coefficient == "rank" else 1
        self.s2lora_coefficients[adapter_name] = nn.Parameter(
            torch.zeros(size, device=weight.device, dtype=weight.dtype)
        )
        if not config.train_factors:
            frozen = {adapter_name: ("s2lora_up", "s2lora_down")}
            self.frozen_peft_weight_names = {**self.frozen_peft_weight_names, **frozen}
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def _linear(self) -> nn.Linear:
        linear = self.get_base_layer()
        assert isinstance(linear, nn.Linear)  # `S2LoraModel` adapts nothing else
        return linear

    def operands(self, adapter_name: str) -> tuple[Tensor, Tensor, Tensor]:
        """down A [r, in_features], up B [out_features, r] and coefficients e = scaling · s [r] of this weight."""
        up, down = self.s2lora_up[adapter_name], self.s2lora_down[adapter_name]
        if self.transposed:
            up, down = down.mT, up.mT
        config = self.configs[adapter_name]
        coefficients = self.s2lora_coefficients[adapter_name]
        if config.coefficient == "scalar":
            coefficients = coefficients.expand(config.r)
        return down, up, coefficients * config.scaling if config.scaling != 1.0 else coefficients

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x [..., in_features] -> [..., out_features]."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        names = [name for name in self.active_adapters if name in self.s2lora_coefficients]
        if self.disable_adapters or self.merged or not names:
            return self.base_layer(x, *args, **kwargs)
        base = self._linear()
        dropped = self.training and any(self.configs[name].dropout > 0 for name in names)
        if dropped or base.weight.requires_grad:
            return self._separate_paths(x, names)
        down, up, coefficients = self.operands(names[0])
        if len(names) > 1:
            operands = [self.operands(name) for name in names]
            down = torch.cat([down for down, _, _ in operands])
            up = torch.cat([up for _, up, _ in operands], dim=1)
            coefficients = torch.cat([coefficients for _, _, coefficients in operands])
        backend: Any = self.configs[names[0]].backend
        return s2_linear(x, base.weight, base.bias, down, up, coefficients, backend=backend)

    def _separate_paths(self, x: Tensor, names: list[str]) -> Tensor:
        """The frozen map and the low-rank path apart: dropout acts on one of them only, or W itself is trained."""
        result = self.base_layer(x)
        for name in names:
            down, up, coefficients = self.operands(name)
            dropped = F.dropout(x, self.configs[name].dropout, self.training).to(down.dtype)
            result = result + F.linear(F.linear(dropped, down) * coefficients, up).to(result.dtype)
        return result

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """ΔW = B diag(e) A, [out_features, in_features], in the adapter's dtype."""
        down, up, coefficients = self.operands(adapter_name)
        return (up * coefficients) @ down

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Adds ΔW of the adapters (default: the active ones) to the weight.

        Raises:
            ValueError: `safe_merge` and the result is not finite; the weight is then left as it was.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.s2lora_coefficients:
                continue
            weight = self._linear().weight
            merged = (weight.data + self.get_delta_weight(name).detach()).to(weight.dtype)
            if safe_merge and not torch.isfinite(merged).all():
                raise ValueError(f"adapter {name!r} gives a weight that is not finite; it was not merged")
            weight.data = merged
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Takes every merged ΔW out of the weight again."""
        if not self.merged:
            warnings.warn("no adapter is merged; nothing to unmerge", stacklevel=2)
        weight = self._linear().weight
        while self.merged_adapters:
            weight.data = (weight.data - self.get_delta_weight(self.merged_adapters.pop()).detach()).to(weight.dtype)

    def __repr__(self) -> str:
        return "s2lora." + super().__repr__()


class S2Linear(nn.Module):
    """A frozen linear layer with its own pair of factors, for use without PEFT: y = x (W + B diag(s) A)ᵀ + b.

    `down` A [r, in], `up` B [out, r] and `coefficients` s [r] are the trainable parameters; x [..., in] -> [..., out].
    """

    def __init__(self, linear: nn.Linear, r: int = 8, *, backend: Backend = "auto") -> None:
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.backend: Backend = backend
        up, down = initial_factors(linear.out_features, linear.in_features, S2LoraConfig(r=r), linear.weight)
        self.down, self.up = nn.Parameter(down), nn.Parameter(up)
        self.coefficients = nn.Parameter(torch.zeros(r, device=up.device, dtype=up.dtype))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> [..., out_features]."""
        factors = (self.down, self.up, self.coefficients)
        return s2_linear(x, self.linear.weight, self.linear.bias, *factors, backend=self.backend)

    @torch.no_grad()
    def merge(self) -> nn.Linear:
        """The wrapped `nn.Linear` with ΔW added to its weight; this layer is not to be used afterwards."""
        self.linear.weight += (self.up * self.coefficients) @ self.down
        return self.linear
