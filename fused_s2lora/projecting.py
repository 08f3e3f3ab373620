"""LayerNorm and GELU that also compute z = h Aᵀ for the adapted map that reads them, a LayerNorm in its own pass."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .kernels import device
from .kernels.choice import named_backend
from .kernels.configs import rank_block
from .kernels.producers import gelu_project, layer_norm_project
from .kernels.shared import remember_gelu, remember_z
from .kernels.strategy_record import REFERENCE

if TYPE_CHECKING:
    from .layer import S2LoraLinear


class _Reader:
    """The adapted map that reads the output: what is to be projected, and in which dtype."""

    def __init__(self, layer: S2LoraLinear) -> None:
        self.layer = layer

    def wanted(self, x: Tensor) -> tuple[Tensor, torch.dtype, int] | None:
        """down A [r, K], the dtype of the products, and spare columns; None where plain PyTorch is to be used."""
        names = self.layer.names_at_work()
        if len(names) != 1 or not self.layer.fusable(names) or not torch.is_grad_enabled():
            return None
        if not self.layer.projects_whole_pair(names[0]):
            return None
        backend = named_backend(self.layer.configs[names[0]].backend)
        if not (device.runs_as_written() and device.runs_triton(x)) or backend == REFERENCE:
            return None
        dtype = device.autocast_dtype(x) or x.dtype
        down, _, _ = self.layer.operands(names[0])
        spare = rank_block(len(down)) if backend == "augmented" else 0
        return down, dtype, spare


class ProjectingLayerNorm(nn.LayerNorm):
    """A frozen LayerNorm that leaves z where its reader finds it; made by giving a LayerNorm this class."""

    reader: _Reader

    def forward(self, input: Tensor) -> Tensor:
        """[..., K] -> [..., K], on the way to a reader in the dtype of the products."""
        reader = self.__dict__.get("reader")  # none where a hook around it calls it after `let_norm_be`
        wanted = None if reader is None else reader.wanted(input)
        if wanted is None or self.weight.requires_grad or self.bias.requires_grad:
            return nn.LayerNorm.forward(self, input)
        down, dtype, spare = wanted
        rows = input.reshape(-1, input.shape[-1])
        h, z = layer_norm_project(rows, self.weight, self.bias, self.eps, down.detach(), dtype, spare)
        h = h.view(input.shape)
        remember_z(h, z, down)
        return h


class ProjectingGelu(nn.Module):
    """`gelu`, the exact one, that leaves z and its own input where its reader finds them."""

    def __init__(self, gelu: nn.Module, layer: S2LoraLinear) -> None:
        super().__init__()
        self.gelu, self.reader = gelu, _Reader(layer)

    def forward(self, x: Tensor) -> Tensor:
        """[..., F] -> [..., F]."""
        wanted = self.reader.wanted(x)
        if wanted is None:
            return self.gelu(x)
        down, dtype, spare = wanted
        h, z = gelu_project(x.reshape(-1, x.shape[-1]), down.detach(), dtype, spare)
        h = h.view(x.shape)
        remember_z(h, z, down)
        if x.dtype == dtype:
            remember_gelu(h, x)  # h itself is then held for no backward
        return h


def let_norm_project(norm: nn.LayerNorm, layer: S2LoraLinear) -> None:
    """Makes `norm` project for `layer`; its parameters and their names stay."""
    norm.__class__ = ProjectingLayerNorm
    norm.__dict__["reader"] = _Reader(layer)


def let_norm_be(norm: nn.LayerNorm) -> None:
    """Takes `let_norm_project` back."""
    norm.__class__ = nn.LayerNorm
    del norm.__dict__["reader"]
