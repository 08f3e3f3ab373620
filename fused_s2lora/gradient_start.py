"""Shared factors that start where the gradients of the frozen weights agree, instead of at random."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layer import S2LoraLinear
from .model import S2LoraModel, tuner_of
from .sharing import FactorPair

_SWEEPS = 30  # of alternating least squares; the fit of Whisper-base's gradients changes by less than 1 % after 20
_RIDGE = 1e-6  # of the mean of a normal equation's diagonal: ranks that say the same must not divide by zero


def start_from_gradients(model: nn.Module, backward: Callable[[], Any]) -> dict[str, float]:
    """Puts the factors of the active adapter, which still changes nothing, where the weights' gradients are.

    With B and A shared, ΔW_i = B diag(s_i) A is a decomposition of rank r of the tensor whose slices are the updates
    (CP; Kolda and Bader, "Tensor Decompositions and Applications", SIAM Review 51, 2009, section 3). A first step of
    full fine-tuning has an update of −G_i. So B and A become, for each shared pair,

        argmin_{A, B} min_s Σ_i ‖G_i / ‖G_i‖ − B diag(s_i) A‖²,   columns of B and rows of A of norm 1,

    by alternating least squares from where they are. Weights count alike, as they do for Adam, whose steps are of one
    size for large gradients and small. s stays 0, so the model computes what it did. LoRA-GA (Wang, Yu and Li, arXiv
    2407.05000) does the same for one weight, from the singular vectors of its gradient.

    Call it once, before training and before an optimizer is made. Beside the model it needs the memory of the gradients
    of all adapted weights, as full fine-tuning has.

    Args:
        model: the model with one active S2-LoRA adapter, or what is around it; it may be fused.
        backward: called once; runs forward and backward passes of that model over some batches, as training would.
            The gradients of all of them add up. It may scale the loss: only directions count.

    Returns:
        For each pair by name the share of ‖G_i‖² that the factors reproduce, in the mean of its weights i.

    Raises:
        ValueError: not one active S2-LoRA adapter, or it has one coefficient for each weight, or coefficients that are
            not 0; `backward` left a weight without a gradient or with one that is not finite.
    """
    tuner = tuner_of(model)
    if tuner is None or len(tuner.active_adapters) != 1:
        raise ValueError("start_from_gradients needs a model with one active S2-LoRA adapter: wrap it with "
                         "get_peft_model(model, S2LoraConfig()) first")  # fmt: skip
    (name,) = tuner.active_adapters
    if tuner.peft_config[name].coefficient != "rank":
        raise ValueError(f"adapter {name!r} has coefficient='scalar'; start_from_gradients is for coefficient='rank'")
    layers = {
        key: layer for key, layer in tuner.model.named_modules()
        if isinstance(layer, S2LoraLinear) and name in layer.s2lora_coefficients
    }  # fmt: skip
    if any(layer.s2lora_coefficients[name].any() for layer in layers.values()):
        raise ValueError(
            f"adapter {name!r} has coefficients that are not 0, so it changes the model already; start_from_gradients "
            "is for an adapter of init='unit' or 'normal' before it is trained"
        )
    gradients = _gradients(tuner, layers, backward)
    fits = {}
    for pair_name, pair in tuner.s2lora_factors.named_children():
        assert isinstance(pair, FactorPair)
        sharing = [key for key, layer in layers.items() if layer.s2lora_up is pair.up]
        up, down = pair.up[name], pair.down[name]
        found = [gradients.pop(key) for key in sharing]
        oriented = [
            (g.mT if layers[key].transposed else g).to(up.device) for key, g in zip(sharing, found, strict=True)
        ]
        if oriented:
            fits[pair_name] = _let_agree(oriented, up, down)
    return fits


def _gradients(tuner: S2LoraModel, layers: dict[str, S2LoraLinear], backward: Callable[[], Any]) -> dict[str, Tensor]:
    """The gradient of each layer's frozen weight after `backward`; the model is left as it was."""
    asked = [(parameter, parameter.requires_grad) for parameter in tuner.parameters()]
    weights = {key: layer.base_linear.weight for key, layer in layers.items()}
    try:
        for parameter, _ in asked:
            parameter.requires_grad_(False)
        for weight in weights.values():
            weight.grad = None
            weight.requires_grad_(True)
        with _disabled(tuner, layers.values()):
            backward()
        gradients = {key: weight.grad for key, weight in weights.items()}
    finally:
        for weight in weights.values():
            weight.grad = None
        for parameter, trained in asked:
            parameter.requires_grad_(trained)
    found = {}
    for key, gradient in gradients.items():
        if gradient is None:
            raise ValueError(f"backward left {key} without a gradient; it has to run the whole model, backward too")
        if not gradient.isfinite().all():
            raise ValueError(f"the gradient of {key} is not finite; scale the loss down, or leave the batch out")
        found[key] = gradient
    return found


@contextlib.contextmanager
def _disabled(tuner: S2LoraModel, layers: Iterable[S2LoraLinear]) -> Iterator[None]:
    """Inside, every layer is its frozen map alone."""
    if any(layer.disable_adapters for layer in layers):
        yield
        return
    tuner.disable_adapter_layers()
    try:
        yield
    finally:
        tuner.enable_adapter_layers()


@torch.no_grad()
def _let_agree(gradients: Sequence[Tensor], up: Tensor, down: Tensor) -> float:
    """Writes the factors of the gradients G_i [N, K] into up [N, r] and down [r, K]; returns the share they explain.

    What no gradient asks for stays as it is: a rank beyond those that the gradients have.
    """
    gradients = [F.normalize(gradient.float().flatten(), dim=0).view_as(gradient) for gradient in gradients]
    total = sum(gradient.square().sum() for gradient in gradients)
    if not total:
        return 0.0
    b, a = F.normalize(up.float(), dim=0), F.normalize(down.float(), dim=1)
    for _ in range(_SWEEPS):
        right = torch.stack([gradient @ a.mT for gradient in gradients])  # [weights, N, r]
        s = _solved(torch.einsum("inr,nr->ir", right, b), b.mT @ b, a @ a.mT)
        b = F.normalize(_solved(torch.einsum("inr,ir->nr", right, s), s.mT @ s, a @ a.mT), dim=0)
        left = torch.stack([gradient.mT @ b for gradient in gradients])  # [weights, K, r]
        s = _solved(torch.einsum("ikr,rk->ir", left, a), b.mT @ b, a @ a.mT)
        a = F.normalize(_solved(torch.einsum("ikr,ir->kr", left, s), s.mT @ s, b.mT @ b), dim=0).mT
    products = torch.stack([((gradient @ a.mT) * b).sum(dim=0) for gradient in gradients])  # bₖᵀ G_i aₖ, [weights, r]
    s = _solved(products, b.mT @ b, a @ a.mT)
    # ‖B diag(s) A‖² and its product with G, so that neither is ever made.
    explained = 2 * (s * products).sum() - torch.einsum("ir,rt,it->", s, (b.mT @ b) * (a @ a.mT), s)
    found = (b.norm(dim=0) > 0.5) & (a.norm(dim=1) > 0.5)
    up[:, found] = b[:, found].to(up.dtype)
    down[found] = a[found].to(down.dtype)
    return float(explained / total)


def _solved(right_side: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """X [..., r] of X (one ⊙ other) = right_side, by least squares with a small ridge."""
    matrix = one * other
    ridge = _RIDGE * matrix.diagonal().mean() + torch.finfo(matrix.dtype).tiny
    return torch.linalg.solve(matrix + ridge * torch.eye(len(matrix), device=matrix.device), right_side, left=False)
