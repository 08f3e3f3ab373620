"""Which modules can be adapted, that those which are get called, and which are not to be merged."""

from collections import Counter

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .layer import S2LoraLinear
from .quantized import is_quantized


def map_to_adapt(target: nn.Module, name: str, parent: nn.Module, key: str) -> nn.Linear:
    """The frozen map of a target, which is the child `name` of `parent`, and `key` in the model.

    Raises:
        ValueError: it is no `nn.Linear`, has another method's adapter, is quantised in an unknown way, or is never
            called.
    """
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    if not isinstance(base, nn.Linear):
        raise ValueError(
            f"target {key} is a {type(base).__name__}; S2-LoRA adapts nn.Linear only: "
            "leave it out of target_modules or name it in exclude_modules"
        )
    if isinstance(target, BaseTunerLayer) and not isinstance(target, S2LoraLinear):
        raise ValueError(
            f"target {key} has an adapter of {type(target).__module__} already, which S2-LoRA would put "
            "out of use: call merge_and_unload() on it first"
        )
    reader = _reader_of_weights(parent, name)
    if reader is not None:
        raise ValueError(
            f"target {key} is of a {reader}, which reads it and calls no map; "
            "an adapter there would do nothing: leave it out of target_modules or name it in exclude_modules"
        )
    stored = base.weight
    if not is_quantized(base) and (not stored.is_floating_point() or stored.element_size() < 2):
        raise ValueError(
            f"target {key} is quantised ({stored.dtype}) in a way that S2-LoRA does not know: quantise by "
            "bitsandbytes or torchao, or load the model without quantization_config"
        )
    return base


def _reader_of_weights(parent: nn.Module, name: str) -> str | None:
    """The attention that hands the weight of its child `name` to one function of PyTorch; None for any other."""
    if isinstance(parent, nn.MultiheadAttention):
        return "torch.nn.MultiheadAttention"
    if type(parent).__name__ == "WavLMAttention" and name.endswith("_proj"):  # transformers'
        return "WavLMAttention"
    return None


def let_maps_be_called(model: nn.Module) -> None:
    """Keeps an adapted `nn.TransformerEncoder` from PyTorch's fast inference, which reads weights and calls no map."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder | nn.TransformerEncoderLayer) and any(
            isinstance(one, S2LoraLinear) for one in module.modules()
        ):
            if isinstance(module, nn.TransformerEncoder):
                module.use_nested_tensor = False
            else:
                module.activation_relu_or_gelu = 0  # of which that inference alone asks


def check_weights_are_their_own(model: nn.Module) -> None:
    """Raises ValueError: an adapted map has its weight in common with another module, which merging would change."""
    owners = Counter(id(parameter) for module in model.modules() for parameter in module._parameters.values())
    for name, module in model.named_modules():
        weight = module.base_linear._parameters.get("weight") if isinstance(module, S2LoraLinear) else None
        if weight is not None and owners[id(weight)] > 1:
            raise ValueError(
                f"{name} has its weight in common with another module, as an output that is tied to the embedding, and "
                "merging would change both: before the adapter is added give it its own, as by layer.weight = "
                "nn.Parameter(layer.weight.detach().clone()), and set the model's config.tie_word_embeddings to False"
            )
