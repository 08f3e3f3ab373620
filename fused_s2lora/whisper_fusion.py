"""One operation for q, k and v of an attention, and one shared input for cross-attention, in Hugging Face's Whisper."""

from typing import Any

import torch
from torch import nn
from transformers.models.whisper.modeling_whisper import WhisperAttention, WhisperDecoder

from .kernels.shared import share_input
from .layer import S2LoraLinear
from .projection_group import ProjectionGroup

_HANDLE = "_s2lora_fusion_handle"


def fuse_whisper(model: nn.Module) -> int:
    """Lets every attention of an adapted Whisper compute its projections together, exact to rounding.

    q, k and v of a self-attention become one operation: one z, one pass over x for dA. Cross-attention's k and v are
    one operation in each decoder layer, and all decoder layers read the encoder's output as one shared input: cast
    once, one z, one dA, dx added up in place. Parameters, their names and what is saved stay as they are; generate(),
    gradient checkpointing and disabling, merging or switching adapters work as before. `unfuse_whisper` undoes it.

    Args:
        model: a `WhisperForConditionalGeneration` with an S2-LoRA adapter, or the `PeftModel` around it.

    Returns:
        How many operations now stand for several maps.

    Raises:
        ValueError: the model is no Whisper, or has no S2-LoRA adapter.
    """
    attentions = [module for module in model.modules() if isinstance(module, WhisperAttention)]
    if not attentions:
        raise ValueError("the model has no WhisperAttention: fuse_whisper is for Hugging Face's Whisper")
    if not any(isinstance(module, S2LoraLinear) for module in model.modules()):
        raise ValueError("the model has no S2-LoRA adapter: wrap it with get_peft_model(model, S2LoraConfig()) first")
    unfuse_whisper(model)
    decoders: list[Any] = [module for module in model.modules() if isinstance(module, WhisperDecoder)]
    cross_attentions = [layer.encoder_attn for decoder in decoders for layer in decoder.layers]
    groups = []
    for attention in attentions:
        if attention not in cross_attentions:
            groups += _grouped(attention.q_proj, attention.k_proj, attention.v_proj)
    for decoder in decoders:
        crossing = [
            group for layer in decoder.layers
            for group in _grouped(layer.encoder_attn.k_proj, layer.encoder_attn.v_proj)
        ]  # fmt: skip
        groups += crossing
        if crossing:
            handle = decoder.register_forward_pre_hook(_CrossAttentionInput(crossing), with_kwargs=True)
            setattr(decoder, _HANDLE, handle)
    return len(groups)


def unfuse_whisper(model: nn.Module) -> None:
    """Takes back what `fuse_whisper` did; without effect on a model that is not fused."""
    for module in model.modules():
        if isinstance(module, S2LoraLinear):
            module.group = None
        elif hasattr(module, _HANDLE):
            getattr(module, _HANDLE).remove()
            delattr(module, _HANDLE)


def _grouped(*projections: nn.Module) -> list[ProjectionGroup]:
    """One group of those projections that are adapted and share a pair; none where fewer than two do."""
    adapted = [projection for projection in projections if isinstance(projection, S2LoraLinear)]
    together = [layer for layer in adapted if layer.s2lora_up is adapted[0].s2lora_up]
    shapes = {layer.base_linear.weight.shape for layer in together}
    if len(together) < 2 or len(shapes) > 1:
        return []
    group = ProjectionGroup(together)
    for layer in together:
        layer.group = group
    return [group]


class _CrossAttentionInput:
    """Before the decoder runs: the encoder's output as one shared input of every layer's k and v."""

    def __init__(self, groups: list[ProjectionGroup]) -> None:
        self.groups = groups

    def __call__(self, decoder: nn.Module, inputs: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        states = kwargs.get("encoder_hidden_states")
        if states is None or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return inputs, kwargs
        names = {group.name_at_work() for group in self.groups}
        first = self.groups[0].layers[0]
        pairs = {id(group.layers[0].s2lora_up) for group in self.groups}
        (name,) = names if len(names) == 1 else (None,)
        if name is None or len(pairs) > 1:
            return inputs, kwargs
        if torch.is_autocast_enabled(states.device.type):
            states = states.to(torch.get_autocast_dtype(states.device.type))
        down, _, _ = first.operands(name)
        return inputs, {**kwargs, "encoder_hidden_states": share_input(states, down, first.sink(name))}
