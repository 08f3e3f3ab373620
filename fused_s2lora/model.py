"""S2-LoRA as a PEFT tuner: injection, shared state, penalties, saving."""

import re
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

import torch
from peft.config import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import register_peft_method
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .config import S2LoraConfig
from .kernels import device
from .kernels.shared import SharedPair
from .layer import S2LoraLinear, adapter_device, adapter_dtype
from .quantized import keep_layout
from .sharing import AdapterParameters, FactorPair, SharedFactors, place_of
from .targets import check_weights_are_their_own, let_maps_be_called, map_to_adapt
from .whisper_fusion import unfuse_whisper


class S2LoraModel(BaseTuner):
    """The model with its `nn.Linear` targets replaced by `S2LoraLinear` and the shared factors in `s2lora_factors`.

    Made by `get_peft_model(model, S2LoraConfig(...))`. In training, the `loss` of a model's output gets the two
    penalties of the active adapters added to it (equation 5 of arXiv 2309.11756); `last_penalties` keeps their values.
    Of a tuple without names it is a scalar in the first place, as in transformers with `return_dict=False`. None is
    added where the adapters are disabled, as for a reference loss, or merged: the loss then does not depend on them.

    Gradient checkpoints are best non-reentrant, as transformers makes them. With `use_reentrant=True` the recomputed
    layers give the gradients of shared factors one by one, which `DistributedDataParallel` takes only with
    `static_graph=True`.

    FSDP is to shard the model as a whole: `fully_shard(model)`, in accelerate `fsdp_auto_wrap_policy: NO_WRAP`. Layers
    sharded one by one cannot share parameters, and `fully_shard` of the second one raises a TypeError.

    `torch.func.functional_call` is to be given `tie_weights=False`. Otherwise it puts what it is given in the place of
    shared factors once for each layer, and what it puts back is not what was there.

    Raises:
        ValueError: where an adapter is added: a target that is no `nn.Linear`, is never called, has another method's
            adapter or is quantised in an unknown way; a name with a dot or of an attribute of ParameterDict; factors
            shared otherwise than by the adapters already there, or a weight's own under a name that is taken. Where
            one is loaded: its tensors are not this model's. In a call: `adapter_names`.
        RuntimeError: in a call: the model runs in `torch.nn.DataParallel`, or its layers were sharded one by one.
    """

    prefix = "s2lora_"
    tuner_layer_cls = S2LoraLinear
    uses_shared_state = True
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012  # declared so in PEFT
    peft_config: dict[str, S2LoraConfig]  # type: ignore[assignment]

    def _pre_injection_hook(self, model: nn.Module, config: PeftConfig, adapter_name: str) -> None:
        if any(isinstance(module, S2LoraLinear) for module in model.modules()):
            raise ValueError(
                "the model has S2-LoRA layers already: take them off with unload() of the PeftModel around it, or give "
                "that one a further adapter with add_adapter()"
            )
        self.s2lora_factors = SharedFactors()
        self.last_penalties: dict[str, Tensor] = {}
        self._hooks: list[Any] = []

    def _post_injection_hook(self, model: nn.Module, config: PeftConfig, adapter_name: str) -> None:
        # PEFT calls the wrapped model directly for some task types, so the penalties hang on the model itself.
        self._hooks = [
            model.register_forward_pre_hook(self._share_factors),
            model.register_forward_hook(self._end_forward, always_call=True),
        ]
        for module in model.modules():
            if isinstance(module, GradientCheckpointingLayer):
                self._hooks.append(module.register_forward_pre_hook(_let_gradients_through_checkpoints))

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Adds the adapter's layers and factors, as PEFT does; where that raises, the model is left as it was."""
        if not adapter_name or "." in adapter_name or hasattr(AdapterParameters(), adapter_name):
            raise ValueError(
                f"adapter_name {adapter_name!r} is empty, has a dot or is an attribute of torch's ParameterDict, which "
                "keeps parameters by it: give the adapter another name"
            )
        trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            let_maps_be_called(model)
        except Exception:
            self._take_back(model, adapter_name)
            for parameter, requires_grad in trained:
                parameter.requires_grad_(requires_grad)
            raise

    def _take_back(self, model: nn.Module, adapter_name: str) -> None:
        for name, layer in list(model.named_modules()):
            if isinstance(layer, S2LoraLinear):
                layer.delete_adapter(adapter_name)
                if not layer.configs:
                    parent, _, child = name.rpartition(".")
                    setattr(model.get_submodule(parent), child, layer.base_layer)
        self.s2lora_factors.forget(adapter_name)

    def _create_and_replace(  # type: ignore[override]
        self,
        peft_config: S2LoraConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **optional_kwargs: Any,
    ) -> None:
        base = map_to_adapt(target, target_name, parent, current_key)
        keep_layout(base)
        place = place_of(current_key, base.out_features, base.in_features, peft_config)
        like = torch.empty(0, device=adapter_device(base), dtype=adapter_dtype(base))
        pair = self.s2lora_factors.pair(place, adapter_name, peft_config, like)
        if isinstance(target, S2LoraLinear):
            if not target.configs:  # all its adapters were deleted
                target.share(pair, place.transposed)
            self._check_same_pair(target, pair, current_key, adapter_name)
            target.update_layer(adapter_name, peft_config)
            return
        layer = S2LoraLinear(base, adapter_name, pair, place.transposed, peft_config)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT's would move a shared pair to the device of each layer that gets it.
        setattr(parent, child_name, new_module)

    @staticmethod
    def _check_same_pair(layer: S2LoraLinear, pair: FactorPair, key: str, adapter_name: str) -> None:
        if layer.s2lora_up is not pair.up:
            raise ValueError(
                f"adapter {adapter_name!r} shares factors in another way than the adapters already on {key}: "
                "give it the same sharing and tie_ffn, or load it on a model of its own"
            )

    # Gradients of the shared factors

    def _share_factors(self, module: nn.Module, inputs: Any) -> None:
        """For the forward pass that begins: every trainable pair with one buffer for the gradients of all its uses.

        Raises:
            RuntimeError: the model runs in `torch.nn.DataParallel`, whose copies would share the buffers and hooks, or
                its layers have been sharded each by itself.
        """
        if getattr(module, "_is_replica", False):
            raise RuntimeError(
                "S2-LoRA does not run in torch.nn.DataParallel: start one process for each GPU with torchrun or "
                "accelerate launch, or show a single GPU with CUDA_VISIBLE_DEVICES"
            )
        shares = torch.is_grad_enabled() and device.runs_as_written()
        for pair in self.s2lora_factors.pairs():
            pair.in_use.pairs.clear()
            for name in self.active_adapters:
                if name not in pair.up:
                    continue
                up, down = pair.up[name], pair.down[name]
                if up.dim() != 2:
                    raise RuntimeError(
                        "the factors, which layers share, are split up layer by layer: shard the model as a whole, in "
                        "accelerate with fsdp_auto_wrap_policy NO_WRAP, or use DistributedDataParallel"
                    )
                if shares and (up.requires_grad or down.requires_grad):
                    pair.in_use.pairs[name] = SharedPair(up, down)

    # Penalties

    def penalty(self) -> tuple[Tensor, Tensor]:
        """Sparsity α₁ mean_i ‖s_i‖₁ and norm α₂ mean_pairs (1/2r) Σ_k (‖B[:,k]‖ + ‖A[k,:]‖) of the active adapters.

        Two float32 scalars, differentiable, weights included. Sparsity is zero for penalty "proximal", which acts in
        `proximal_step`.
        """
        first = next(self.s2lora_factors.parameters(), None)
        zero = torch.zeros((), dtype=torch.float32, device=None if first is None else first.device)
        sparsity, norm = zero, zero
        for name in self.active_adapters:
            config = self.peft_config[name]
            if config.penalty == "soft" and config.sparsity_weight > 0:
                coefficients = [coefficient.to(zero.device) for coefficient in self._coefficients(name)]
                norms = torch.cat(coefficients).float().abs().sum()
                sparsity = sparsity + config.sparsity_weight * norms / len(coefficients)
            if config.norm_weight > 0:
                pairs = [pair for pair in self.s2lora_factors.pairs() if name in pair.up]
                columns = [_column_norms(pair.up[name]) + _column_norms(pair.down[name].mT) for pair in pairs]
                columns = [norms.to(zero.device) for norms in columns]
                norm = norm + config.norm_weight * torch.stack(columns).mean() / (2 * config.r)
        return sparsity, norm

    def _layers(self) -> Iterator[S2LoraLinear]:
        return (module for module in self.model.modules() if isinstance(module, S2LoraLinear))

    def _coefficients(self, adapter_name: str) -> list[Tensor]:
        return [
            layer.s2lora_coefficients[adapter_name]
            for layer in self._layers()
            if adapter_name in layer.s2lora_coefficients
        ]

    def _end_forward(self, module: nn.Module, inputs: Any, outputs: Any) -> Any:
        """Also called, with `outputs` None, where the forward pass raised."""
        for pair in self.s2lora_factors.pairs():
            pair.in_use.pairs.clear()
        if outputs is None:
            for group in {layer.group for layer in self._layers() if layer.group is not None}:
                group.forget()
        loss = _loss_of(outputs)
        trains = module.training and torch.is_grad_enabled()
        if trains and isinstance(loss, Tensor) and any(layer.names_at_work() for layer in self._layers()):
            sparsity, norm = self.penalty()
            self.last_penalties = {"sparsity": sparsity.detach(), "norm": norm.detach()}
            return _with_loss(outputs, loss + (sparsity + norm).to(loss.device))
        return outputs

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """PEFT's place to choose adapters row by row, which it calls before a forward pass or `generate`.

        Raises:
            ValueError: `adapter_names` is given.
        """
        if kwargs.get("adapter_names") is not None:
            raise ValueError(
                "S2-LoRA does not choose an adapter for each row of a batch: leave out adapter_names, and call the "
                "model once for each adapter, after set_adapter()"
            )
        yield

    @torch.no_grad()
    def proximal_step(self, lr: float) -> None:
        """s ← sign(s) · max(|s| − lr · α₁, 0) for the trained s of every active adapter with penalty "proximal".

        Called after each optimizer step with the coefficients' learning rate (`S2LoraCallback` does it in a Trainer).
        The step is the proximal operator of α₁‖s_i‖₁, apart from the optimizer's scaling as AdamW's weight decay.
        """
        for name in self.active_adapters:
            config = self.peft_config[name]
            if config.penalty == "proximal" and config.sparsity_weight > 0:
                step = lr * config.sparsity_weight
                for coefficient in self._coefficients(name):
                    if coefficient.requires_grad:
                        coefficient.copy_(torch.nn.functional.softshrink(coefficient, step))

    # Leaving PEFT

    def merge_adapter(self, *args: Any, **kwargs: Any) -> None:
        """PEFT's; also raises ValueError where a weight is another module's too."""
        check_weights_are_their_own(self.model)
        super().merge_adapter(*args, **kwargs)

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> Any:
        if merge:
            check_weights_are_their_own(self.model)
        unfuse_whisper(self.model)
        model = super()._unload_and_optionally_merge(merge, *args, **kwargs)
        for hook in self._hooks:
            hook.remove()
        return model

    # Saving: each pair once, under base_model.s2lora_factors; layers hold the same tensors under their own keys.

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        selected = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        # A `state_dict` made of `named_parameters()` has each tensor once, under the name of the first layer.
        for layer_key, key in _factor_keys(model, adapter_name):
            if layer_key in selected:
                selected.setdefault(key, selected[layer_key])
        return {key: value for key, value in selected.items() if not _LAYER_FACTOR.search(key)}

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        loaded = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        state = model.state_dict()
        expected = {
            key: value
            for key, value in state.items()
            if key.endswith(f".{adapter_name}") and ".s2lora_" in f".{key}" and not _LAYER_FACTOR.search(key)
        }
        others = state.keys() - expected.keys()  # as of `modules_to_save`, which may be called s2lora_ too
        _check_fits({key: value for key, value in loaded.items() if key not in others}, expected, adapter_name)
        loaded.update({layer_key: loaded[key] for layer_key, key in _factor_keys(model, adapter_name)})
        return loaded


def tuner_of(model: nn.Module) -> S2LoraModel | None:
    """The S2-LoRA tuner in a model, however it is wrapped: by PEFT, `torch.compile` or `DistributedDataParallel`."""
    return next((module for module in model.modules() if isinstance(module, S2LoraModel)), None)


def _loss_of(outputs: Any) -> Any:
    """The loss in a model's output: by name, or of a plain tuple the scalar in the first place; None without one."""
    if hasattr(outputs, "loss"):
        return outputs.loss
    if isinstance(outputs, MutableMapping):
        return outputs.get("loss")
    first = outputs[0] if isinstance(outputs, tuple) and outputs else None
    return first if isinstance(first, Tensor) and first.dim() == 0 and first.requires_grad else None


def _with_loss(outputs: Any, loss: Tensor) -> Any:
    """The output with another loss, itself where it can be written to."""
    if isinstance(outputs, tuple):
        if not hasattr(outputs, "_replace"):
            return loss, *outputs[1:]
        fields: tuple[str, ...] = outputs._fields  # type: ignore[attr-defined]
        return outputs._replace(**{"loss" if "loss" in fields else fields[0]: loss})
    if hasattr(outputs, "loss"):
        outputs.loss = loss
    else:
        outputs["loss"] = loss
    return outputs


_LAYER_FACTOR = re.compile(r"\.s2lora_(up|down)\.[^.]+$")


def _column_norms(factor: Tensor) -> Tensor:
    return factor.float().norm(dim=0).sum()


def _factor_keys(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, str]]:
    """For each factor of each layer its key in the state of the model, and the pair's own key for the same tensor."""
    pairs = {
        id(getattr(pair, attribute)): f"{name}.{attribute}"
        for name, pair in model.named_modules()
        if isinstance(pair, FactorPair)
        for attribute in ("up", "down")
    }
    for name, layer in model.named_modules():
        if isinstance(layer, S2LoraLinear) and adapter_name in layer.s2lora_coefficients:
            for attribute in ("s2lora_up", "s2lora_down"):
                key = pairs.get(id(getattr(layer, attribute)))
                if key is not None:  # as in the model without the tuner around it
                    yield f"{name}.{attribute}.{adapter_name}", f"{key}.{adapter_name}"


def _check_fits(loaded: dict[str, Tensor], expected: dict[str, Tensor], adapter_name: str) -> None:
    """Raises ValueError where the file's tensors are not those of the model's adapter."""
    suffix = f".{adapter_name}"
    missing = sorted(expected.keys() - loaded.keys())
    surplus = sorted(key for key in loaded.keys() - expected.keys() if "s2lora_" in key)
    if missing or surplus:
        problem, key = ("lacks", missing[0]) if missing else ("has", surplus[0])
        raise ValueError(
            f"the adapter file does not fit this model: it {problem} {key.removesuffix(suffix)}; "
            "load it on the model it was trained on"
        )
    for key, value in expected.items():
        if loaded[key].shape != value.shape:
            here, there = tuple(value.shape), tuple(loaded[key].shape)
            raise ValueError(
                f"the adapter file does not fit this model: {key.removesuffix(suffix)} is {there} in the file and "
                f"{here} here; model size and rank must be those of training"
            )


def _let_gradients_through_checkpoints(layer: nn.Module, inputs: tuple) -> tuple | None:
    """Reentrant checkpoints pass no gradient where no input needs one, as behind Whisper's frozen convolutions."""
    if not (getattr(layer, "gradient_checkpointing", False) and layer.training and torch.is_grad_enabled()):
        return None
    options = getattr(layer._gradient_checkpointing_func, "keywords", {})  # those of torch's checkpoint
    hidden = inputs[0] if inputs else None
    if options.get("use_reentrant") is False or not isinstance(hidden, Tensor) or hidden.requires_grad:
        return None
    return (hidden.detach().requires_grad_(), *inputs[1:]) if hidden.is_floating_point() else None


def _register() -> None:
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
    from peft.utils import PeftType

    if PeftType.S2LORA not in PEFT_TYPE_TO_TUNER_MAPPING:  # type: ignore[attr-defined]
        register_peft_method(name="s2lora", config_cls=S2LoraConfig, model_cls=S2LoraModel)


_register()
