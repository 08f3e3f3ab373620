"""One operation for q, k and v of an attention, and one shared input for cross-attention, in Hugging Face's Whisper."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.activations import GELUActivation
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.models.whisper.modeling_whisper import (
    WhisperAttention,
    WhisperDecoder,
    WhisperDecoderLayer,
    WhisperEncoderLayer,
    WhisperForConditionalGeneration,
    WhisperPreTrainedModel,
)

from .kernels import device
from .kernels.attention import attention
from .kernels.shared import share_input
from .layer import S2LoraLinear
from .output_projection import OutputProjection, let_cast_always, let_cast_once
from .projecting import ProjectingGelu, ProjectingLayerNorm, let_norm_be, let_norm_project
from .projection_group import ProjectionGroup
from .quantized import is_quantized

_HANDLE = "_s2lora_fusion_handle"
_ATTENTION = "sdpa_in_blocks"  # the name under which transformers knows `_attention_forward`


def fuse_whisper(model: nn.Module) -> int:
    """Lets every attention of an adapted Whisper compute its projections together, exact to rounding.

    q, k and v of a self-attention become one operation: one z, one pass over x for dA. Cross-attention's k and v are
    one operation in each decoder layer, and all decoder layers read the encoder's output as one shared input: cast
    once, one z, one dA, dx added up in place. On a GPU, LayerNorms and GELU write z of what reads them; on a CPU,
    attention in bfloat16 is computed in blocks where the model's attention is PyTorch's ("sdpa"). Parameters, their
    names and what is saved stay as they are; generate(), gradient checkpointing and disabling, merging or switching
    adapters work as before. `unfuse_whisper` undoes it, which forward hooks need that write to the output of q, k or v
    in place. The biases of q, k and v are kept side by side: one that is written in place through `.data`, as by
    `bias.data.add_(1.0)`, is not seen.

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
    for one in attentions:
        if one not in cross_attentions:
            groups += _grouped(one.q_proj, one.k_proj, one.v_proj)
    for decoder in decoders:
        crossing = [
            group for layer in decoder.layers
            for group in _grouped(layer.encoder_attn.k_proj, layer.encoder_attn.v_proj)
        ]  # fmt: skip
        groups += crossing
        if crossing:
            handle = decoder.register_forward_pre_hook(_CrossAttentionInput(crossing), with_kwargs=True)
            setattr(decoder, _HANDLE, handle)
    for module in model.modules():
        if isinstance(module, WhisperEncoderLayer | WhisperDecoderLayer):
            _let_producers_project(module)
        elif isinstance(module, WhisperForConditionalGeneration) and type(module.proj_out) is nn.Linear:
            let_cast_once(module.proj_out)
    for whisper in _whispers_with("sdpa", model):
        whisper.set_attn_implementation(_ATTENTION)
    return len(groups)


def _whispers_with(implementation: str, model: nn.Module) -> list[WhisperPreTrainedModel]:
    """The Whisper models, each with those in it, whose attention is that of transformers' name `implementation`."""
    whispers = [module for module in model.modules() if isinstance(module, WhisperPreTrainedModel)]
    return [whisper for whisper in whispers if whisper.config._attn_implementation == implementation]


def _attention_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """transformers' "sdpa", or where that is faster and no score is masked, scaled or dropped, `attention`."""
    masked = attention_mask is not None or (module.is_causal and query.shape[2] > 1)
    plain = kwargs.get("scaling") == 1 and not kwargs.get("dropout") and not masked
    if not plain or not device.attends_in_blocks(query):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    return attention(query, key, value).transpose(1, 2), None


AttentionInterface.register(_ATTENTION, _attention_forward)
AttentionMaskInterface.register(_ATTENTION, sdpa_mask)


def _let_producers_project(layer: Any) -> None:
    """LayerNorms and GELU of one layer compute z of what reads them, on a GPU."""
    reads = [(layer.self_attn_layer_norm, layer.self_attn.q_proj), (layer.final_layer_norm, layer.fc1)]
    if isinstance(layer, WhisperDecoderLayer):
        reads.append((layer.encoder_attn_layer_norm, layer.encoder_attn.q_proj))
    for norm, reader in reads:
        if isinstance(reader, S2LoraLinear) and type(norm) is nn.LayerNorm:  # and no `modules_to_save` around one
            let_norm_project(norm, reader)
    exact = isinstance(layer.activation_fn, GELUActivation) and layer.activation_fn.act is nn.functional.gelu
    if isinstance(layer.fc2, S2LoraLinear) and exact and not layer.activation_dropout:
        layer.activation_fn = ProjectingGelu(layer.activation_fn, layer.fc2)


def unfuse_whisper(model: nn.Module) -> None:
    """Takes back what `fuse_whisper` did; without effect on a model that is not fused."""
    for whisper in _whispers_with(_ATTENTION, model):
        whisper.set_attn_implementation("sdpa")
    for module in model.modules():
        if isinstance(module, S2LoraLinear):
            module.group = None
        elif hasattr(module, _HANDLE):
            getattr(module, _HANDLE).remove()
            delattr(module, _HANDLE)
        elif isinstance(module, ProjectingLayerNorm):
            let_norm_be(module)
        elif isinstance(module, OutputProjection):
            let_cast_always(module)
        elif isinstance(gelu := getattr(module, "activation_fn", None), ProjectingGelu):
            module.activation_fn = gelu.gelu


def _grouped(*projections: nn.Module) -> list[ProjectionGroup]:
    """One group of those projections that are adapted and share a pair; none where fewer than two do."""
    adapted = [projection for projection in projections if isinstance(projection, S2LoraLinear)]
    together = [layer for layer in adapted if layer.s2lora_up is adapted[0].s2lora_up]
    kinds = {(layer.out_features, layer.in_features, is_quantized(layer.base_linear)) for layer in together}
    if len(together) < 2 or len(kinds) > 1:
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
        if states is None or not (torch.is_grad_enabled() and device.runs_as_written()):
            return inputs, kwargs
        names = {group.name_at_work() for group in self.groups}
        first = self.groups[0].layers[0]
        pairs = {id(group.layers[0].s2lora_up) for group in self.groups}
        (name,) = names if len(names) == 1 else (None,)
        if name is None or len(pairs) > 1:
            return inputs, kwargs
        states = states.to(device.autocast_dtype(states) or states.dtype)
        down, _, _ = first.operands(name)
        return inputs, {**kwargs, "encoder_hidden_states": share_input(states, down, first.sink(name))}
