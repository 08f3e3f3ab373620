"""The adapted linear layer, inside PEFT (`S2LoraLinear`) and on its own (`S2Linear`)."""

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from .config import S2LoraConfig
from .kernels import device
from .kernels.arguments import MAX_RANK
from .kernels.s2_linear import Backend, s2_linear, s2_linear_group
from .kernels.shared import GradientSink, SharedPair, gelu_input, known_z
from .projection_group import ProjectionGroup, live_operands, ranks_computed
from .quantized import backend_for, frozen_weights, is_quantized
from .sharing import AdapterParameters, FactorPair, initial_coefficients, initial_factors


class S2LoraLinear(nn.Module, BaseTunerLayer):
    """A frozen `nn.Linear` with ΔW = B diag(s) A in factors shared with other layers.

    x [..., in_features] -> [..., out_features]. Several active adapters add up: their ranks are laid side by side and
    computed as one.
    """

    adapter_layer_names = ("s2lora_coefficients", "s2lora_up", "s2lora_down")
    other_param_names = ("configs", "_frozen_ranks")

    def __init__(
        self, base_layer: nn.Linear, adapter_name: str, pair: FactorPair, transposed: bool, config: S2LoraConfig
    ) -> None:
        super().__init__()
        self.base_layer: nn.Module = base_layer
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self.configs: dict[str, S2LoraConfig] = {}
        self.s2lora_coefficients = AdapterParameters()
        self.group: ProjectionGroup | None = None
        self.share(pair, transposed)
        self._frozen_ranks: dict[str, tuple[Tensor, Any, Tensor]] = {}
        self._union: tuple[list[Tensor], Tensor] | None = None
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    def share(self, pair: FactorPair, transposed: bool) -> None:
        """Makes `pair` this layer's, for all its adapters to come."""
        # The pair's own dictionaries: registered here too, so that PEFT finds and moves them; one copy, many owners.
        self.s2lora_up, self.s2lora_down = pair.up, pair.down
        self._in_use, self.frozen_peft_weight_names = pair.in_use, pair.frozen
        self.transposed = transposed
        for layer in self.group.layers if self.group else ():  # which computed one pair's layers
            layer.group = None

    def update_layer(self, adapter_name: str, config: S2LoraConfig, inference_mode: bool = False) -> None:
        """Adds an adapter whose pair is already in the shared dictionaries; its coefficients start as `init` says."""
        self.configs[adapter_name] = config
        self._frozen_ranks.pop(adapter_name, None)
        linear = self.base_linear
        start = initial_coefficients(config, torch.empty(0, device=adapter_device(linear), dtype=adapter_dtype(linear)))
        self.s2lora_coefficients[adapter_name] = nn.Parameter(start)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    @property
    def base_linear(self) -> nn.Linear:
        """The frozen map."""
        linear = self.base_layer  # in which `get_base_layer`, as slow as an operation, would look for a further one
        assert isinstance(linear, nn.Linear)  # `S2LoraModel` adapts nothing else
        return linear

    def operands(self, adapter_name: str) -> tuple[Tensor, Tensor, Tensor]:
        """down A [r, in_features], up B [out_features, r] and coefficients e = scaling · s [r], on e's device."""
        pair = self._pair_in_use(adapter_name)
        up, down = (pair.up, pair.down) if pair else (self.s2lora_up[adapter_name], self.s2lora_down[adapter_name])
        if self.transposed:
            up, down = down.mT, up.mT
        config = self.configs[adapter_name]
        coefficients = self.s2lora_coefficients[adapter_name]
        if up.device != coefficients.device:
            down, up = down.to(coefficients.device), up.to(coefficients.device)
        if config.coefficient == "scalar":
            coefficients = coefficients.expand(config.r)
        return down, up, coefficients * config.scaling if config.scaling != 1.0 else coefficients

    def sink(self, adapter_name: str) -> GradientSink | None:
        """Where the gradients of this weight's factors are added up in the forward pass under way, if anywhere."""
        pair = self._pair_in_use(adapter_name)
        if pair is None or pair.up.device != self.s2lora_coefficients[adapter_name].device:
            return None
        return GradientSink(pair.gradients, self.transposed)

    def _pair_in_use(self, adapter_name: str) -> SharedPair | None:
        # Without gradients there may be one left of a training step that was interrupted.
        # A layer that is compiled by itself could not trace the one there is: its gradients go to autograd.
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return None
        return self._in_use.pairs.get(adapter_name)

    def _get_available_adapters(self) -> set[str]:
        # In `get_layer_status`: the shared dictionaries also have adapters that only other layers have.
        return {*self.s2lora_coefficients}

    def names_at_work(self) -> list[str]:
        """The adapters whose ΔW is added in a forward pass; none where they are disabled or merged."""
        if self.disable_adapters or self.merged:
            return []
        return [name for name in self.active_adapters if name in self.s2lora_coefficients]

    def fusable(self, names: list[str]) -> bool:
        """Whether one operation computes frozen map and adapters: no dropout, W and b neither trained nor offloaded.

        A map with a forward of its own or with hooks is called, and not passed over; a quantised one is in inference.
        """
        dropped = self.training and any(self.configs[name].dropout > 0 for name in names)
        linear = self.base_linear
        bias = linear.bias
        trained = linear.weight.requires_grad or (bias is not None and bias.requires_grad)
        if is_quantized(linear):
            # In training also without gradients, as a reentrant checkpoint runs what it computes again with them.
            known = (self.training or torch.is_grad_enabled()) and not torch.compiler.is_compiling()
        else:
            known = type(linear).forward is nn.Linear.forward
        hooks = (linear._forward_pre_hooks, linear._forward_hooks, linear._backward_pre_hooks, linear._backward_hooks)
        return known and not any(hooks) and not dropped and not trained and not _offloaded(linear)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x [..., in_features] -> [..., out_features]."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        names = self.names_at_work()
        if not names:
            return self.base_layer(x, *args, **kwargs)
        if not self.fusable(names):
            return self._separate_paths(x, names)
        if self.group is not None and (result := self.group.output(self, x)) is not None:
            return result
        base = self.base_linear
        updating = [name for name in names if self.updates(name)]
        if not updating:
            return self.base_layer(x, *args, **kwargs)
        operands = [live_operands([self], name) for name in updating]
        down, up, (coefficients,), sink = operands[0]
        if len(operands) > 1:
            down = torch.cat([found[0] for found in operands])
            up = torch.cat([found[1] for found in operands], dim=1)
            coefficients = torch.cat([found[2][0] for found in operands])
            sink = None
        if len(down) > MAX_RANK:
            return self._separate_paths(x, updating)
        backend: Any = backend_for(base, self.configs[names[0]].backend)
        weights, remake = frozen_weights([base], x)
        (y,) = s2_linear_group(
            x, weights, base.bias, down, up, [coefficients], z=known_z(x, down), made_from=gelu_input(x), sink=sink,
            remake=remake, backend=backend,
        )  # fmt: skip
        return y

    def updates(self, adapter_name: str) -> bool:
        """Whether the adapter can change this layer's output: not where its coefficients are zero for good."""
        alive = self.ranks_alive_for_good(adapter_name)
        return alive is None or len(alive) > 0

    def projects_whole_pair(self, adapter_name: str) -> bool:
        """Whether z = x Aᵀ of all ranks is what this layer's operation reads."""
        layers = [self] if self.group is None else self.group.together_with(self, adapter_name)
        return ranks_computed(layers, adapter_name) is None

    def ranks_alive_for_good(self, adapter_name: str) -> Tensor | None:
        """Ranks with a coefficient that is not zero, where the coefficients are frozen; None where they are trained.

        None also where they cannot be looked at, as under torch.compile. On a GPU they are looked up once; a write
        through `.data`, which PyTorch does not count, is not seen there.
        """
        values = self.s2lora_coefficients[adapter_name]
        if values.requires_grad or values.is_inference() or not device.has_values(values):
            return None
        state = (values._version, values.data_ptr())
        known, then, live = self._frozen_ranks.get(adapter_name, (None, None, values))
        if known is values and then == state:  # held, so that no others come to lie where they are
            return live
        with torch.inference_mode(False):  # an index made for inference could not be kept for a backward pass
            live = values.expand(self.configs[adapter_name].r).nonzero().flatten()
        if values.is_cuda:  # which the line above waited for
            self._frozen_ranks[adapter_name] = values, state, live
        return live

    def together_with_others(self, alive: list[Tensor]) -> Tensor:
        """All ranks in `alive`, of this layer and others it is computed with, in order.

        Put together once for what was looked up once: on a GPU each time would wait for all that it has to do.
        """
        if self._union is not None:
            known, union = self._union
            if len(known) == len(alive) and all(one is other for one, other in zip(known, alive, strict=True)):
                return union
        with torch.inference_mode(False):
            union = torch.cat(alive).unique()
        self._union = alive, union
        return union

    def _separate_paths(self, x: Tensor, names: list[str]) -> Tensor:
        """The frozen map and the low-rank path apart, where they cannot be one operation (see `fusable`)."""
        result = self.base_layer(x)
        for name in names:
            down, up, coefficients = (operand.to(x.device) for operand in self.operands(name))
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
            ValueError: the weight is quantised or made anew at each call; or `safe_merge` and the result is not finite.
                It is left as it was.
        """
        if is_quantized(self.base_linear):
            raise ValueError("S2-LoRA is not merged into quantised weights: merge it on the model as it was before")
        if "weight" not in self.base_linear._parameters:
            raise ValueError(
                "a weight that is made anew at each call, as by weight_norm, would lose what is merged into it: take "
                "that off the model, as by torch.nn.utils.remove_weight_norm, before the adapter is added or loaded"
            )
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.s2lora_coefficients:
                continue
            merged = self._weight_with(name, 1)
            if safe_merge and not torch.isfinite(merged).all():
                raise ValueError(f"adapter {name!r} gives a weight that is not finite; it was not merged")
            self.base_linear.weight.data = merged
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Takes every merged ΔW out of the weight again."""
        if not self.merged:
            warnings.warn("no adapter is merged; nothing to unmerge", stacklevel=2)
        while self.merged_adapters:
            self.base_linear.weight.data = self._weight_with(self.merged_adapters.pop(), -1)

    def _weight_with(self, adapter_name: str, share: int) -> Tensor:
        """W + share · ΔW, in W's dtype."""
        weight = self.base_linear.weight
        # Also in inference mode: nothing could be trained with a weight that was made for inference.
        with torch.inference_mode(weight.is_inference()), torch.no_grad():
            return torch.add(weight, self.get_delta_weight(adapter_name), alpha=share).to(weight.dtype)

    def __repr__(self) -> str:
        return "s2lora." + super().__repr__()


def adapter_device(linear: nn.Linear) -> torch.device:
    """Where an adapter of `linear` has its parameters: beside the weight, on the CPU where that is offloaded."""
    return torch.device("cpu") if _offloaded(linear) else linear.weight.device


def adapter_dtype(linear: nn.Linear) -> torch.dtype:
    """What an adapter of `linear` has its parameters in: the weight's own, float32 where that is quantised."""
    return torch.float32 if is_quantized(linear) else linear.weight.dtype


def _offloaded(linear: nn.Linear) -> bool:
    """Whether accelerate fetches the weight when `linear` is called: until then it is on no device."""
    hook = linear.__dict__.get("_hf_hook")
    return hook is not None and any(getattr(one, "offload", False) for one in getattr(hook, "hooks", (hook,)))


class S2Linear(nn.Module):
    """A frozen linear layer with its own pair of factors, for use without PEFT: y = x (W + B diag(s) A)ᵀ + b.

    `down` A [r, in], `up` B [out, r] and `coefficients` s [r] are the trainable parameters; x [..., in] -> [..., out].
    s starts at 0, and `linear` itself is kept and frozen.

    Raises:
        ValueError: r is not from 1 to 256, or there is no such backend; of a call what `s2_linear` raises.
    """

    def __init__(self, linear: nn.Linear, r: int = 8, *, backend: Backend = "auto") -> None:
        super().__init__()
        config = S2LoraConfig(r=r, backend=backend)
        self.linear = linear.requires_grad_(False)
        self.backend: Backend = backend
        weight = linear.weight
        # At least float32: in half precision the steps of an optimizer are lost.
        like = torch.empty(0, device=weight.device, dtype=torch.promote_types(weight.dtype, torch.float32))
        up, down = initial_factors(linear.out_features, linear.in_features, config, like)
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
