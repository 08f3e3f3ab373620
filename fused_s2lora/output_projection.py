"""Whisper's frozen projection to its vocabulary, the largest weight of the small models and adapted by nobody."""

from collections.abc import MutableMapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from .kernels import device
from .kernels.shared import Sources, lasts

_casts: MutableMapping[Tensor, tuple[Sources, Tensor]] = WeakTensorKeyDictionary()


class OutputProjection(nn.Linear):
    """A linear map whose frozen weight is cast once, where autocast does it at every call; made by `let_cast_once`.

    In training on a CPU alone: there the cast takes some percent of a step, and is held to its end by autograd anyway.
    """

    def forward(self, input: Tensor) -> Tensor:
        """[..., K] -> [..., N]."""
        # Nothing here asks for the class: a hook around it may call it after `let_cast_always`.
        weight = _kept_cast(self.weight, input)
        return F.linear(input, self.weight if weight is None else weight, self.bias)


def _kept_cast(weight: Tensor, x: Tensor) -> Tensor | None:
    """W in the dtype of the products with x; None where it is not to be kept."""
    dtype = device.autocast_dtype(x)
    if dtype is None or dtype == weight.dtype or weight.requires_grad or x.device.type != "cpu":
        return None
    if not (torch.is_grad_enabled() and device.runs_as_written()):
        return None
    made_from, cast = _casts.get(weight, (None, None))
    if made_from is None or cast is None or cast.dtype != dtype or not made_from.are([weight]):
        cast = weight.detach().to(dtype)
        if lasts(cast):
            _casts[weight] = Sources([weight]), cast
    return cast


def let_cast_once(linear: nn.Linear) -> None:
    """Makes `linear` keep its cast; its parameters and their names stay."""
    linear.__class__ = OutputProjection


def let_cast_always(linear: OutputProjection) -> None:
    """Takes `let_cast_once` back."""
    linear.__class__ = nn.Linear  # type: ignore[assignment]
    _casts.pop(linear.weight, None)
