"""Which shared pair of factors a weight uses, and the container that holds the pairs."""

import threading
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .config import S2LoraConfig, Sharing
from .kernels.shared import SharedPair

_STACKS = {"encoder": "enc", "decoder": "dec"}
_MODULES = {"self_attn": "sam", "encoder_attn": "cam"}


@dataclass(frozen=True)
class Place:
    """A weight's place in the sharing scheme: the pair's name, the pair's shape, and whether it is used transposed."""

    pair: str
    up_rows: int
    down_columns: int
    transposed: bool


def place_of(key: str, out_features: int, in_features: int, config: S2LoraConfig) -> Place:
    """The pair that the module `key` (dotted path) of weight [out_features, in_features] uses (section 2 of the paper).

    For Whisper and sharing "module" the pairs are enc_sam, enc_ffm, dec_sam, dec_cam and dec_ffm. In any other model a
    module is the path of the weight's parent without layer numbers. Weights of different shape never share a pair;
    with `tie_ffn` a weight [d, f] with d < f uses the pair of the weights [f, d], transposed.
    """
    transposed = config.tie_ffn and out_features < in_features
    up_rows, down_columns = (in_features, out_features) if transposed else (out_features, in_features)
    shape = f"{up_rows}x{down_columns}"
    parents = key.split(".")[:-1]
    stack = next((short for name, short in _STACKS.items() if name in parents), "")
    if config.sharing == Sharing.NONE:
        return Place(key.replace(".", "_"), out_features, in_features, transposed=False)
    if config.sharing == Sharing.ALL:
        name = "all"
    elif config.sharing == Sharing.STACK:
        name = stack or "model"
    elif stack and parents[-1] in _MODULES:
        name = f"{stack}_{_MODULES[parents[-1]]}"
    elif stack and parents[-1].isdigit():
        name = f"{stack}_ffm"
    else:
        name = "_".join(part for part in parents if not part.isdigit()) or "model"
    return Place(f"{name}_{shape}", up_rows, down_columns, transposed)


class InUse(threading.local):
    """What the layers use in the forward pass that a thread is in (see `S2LoraModel`); a copy begins empty."""

    def __init__(self) -> None:
        self.pairs: dict[str, SharedPair] = {}  # by adapter name

    def __reduce__(self) -> tuple[type["InUse"], tuple[()]]:
        return InUse, ()


class AdapterParameters(nn.ParameterDict):
    """Parameters by adapter name. What replaces a parameter asks for gradients only if that did.

    PEFT puts `parameter.to(...)` in the place of a parameter, to widen it or to move it, and any `nn.ParameterDict`
    makes of that one which is trained.
    """

    def __getitem__(self, adapter_name: str) -> Tensor:
        """The parameter of that adapter."""
        # Torch's own way there, by attribute, takes microseconds, hundreds of times a step.
        found = self._parameters.get(adapter_name)
        return super().__getitem__(adapter_name) if found is None else found

    def __setitem__(self, adapter_name: str, parameter: Tensor) -> None:
        """Sets the parameter of that adapter."""
        if adapter_name in self and not isinstance(parameter, nn.Parameter):
            parameter = nn.Parameter(parameter.detach(), self[adapter_name].requires_grad)
        super().__setitem__(adapter_name, parameter)


class FactorPair(nn.Module):
    """One shared pair for each adapter: `up` [rows, r] and `down` [r, columns], both dictionaries by adapter name."""

    def __init__(self) -> None:
        super().__init__()
        self.up = AdapterParameters()
        self.down = AdapterParameters()
        self.in_use = InUse()
        self.frozen: dict[str, tuple[str, ...]] = {}  # PEFT's `frozen_peft_weight_names` of every layer with this pair


class SharedFactors(nn.Module):
    """All pairs of a model, as children by name. Layers refer to the same dictionaries: there is one copy of each."""

    def pairs(self) -> list[FactorPair]:
        """All pairs, in the order in which they were made."""
        return [module for module in self.children() if isinstance(module, FactorPair)]

    def pair(self, place: Place, adapter_name: str, config: S2LoraConfig, like: Tensor) -> FactorPair:
        """The pair at `place`, initialised for the adapter on first use, on `like`'s device in its dtype.

        Raises:
            ValueError: the pair is to be one weight's own, and its name is another's.
        """
        if place.pair not in self._modules and not hasattr(self, place.pair):
            self.add_module(place.pair, FactorPair())
        pair = self._modules.get(place.pair)
        if not isinstance(pair, FactorPair) or (config.sharing == Sharing.NONE and adapter_name in pair.up):
            raise ValueError(
                f"factors of a weight's own would have the name {place.pair!r}, which is taken: rename the module, or "
                "name it in exclude_modules"
            )
        if adapter_name not in pair.up:
            up, down = initial_factors(place.up_rows, place.down_columns, config, like)
            pair.up[adapter_name] = nn.Parameter(up)
            pair.down[adapter_name] = nn.Parameter(down)
            if not config.train_factors:
                pair.frozen[adapter_name] = ("s2lora_up", "s2lora_down")
        return pair

    def forget(self, adapter_name: str) -> None:
        """Takes the adapter's factors away, and the pairs that are then nobody's."""
        for name, pair in list(self.named_children()):
            assert isinstance(pair, FactorPair)
            for factors in (pair.up, pair.down, pair.frozen):
                if adapter_name in factors:
                    del factors[adapter_name]
            if not pair.up:
                delattr(self, name)


def initial_factors(up_rows: int, down_columns: int, config: S2LoraConfig, like: Tensor) -> tuple[Tensor, Tensor]:
    """B [up_rows, r] and A [r, down_columns], normal or, for init "lora", B zero.

    For init "unit" B's columns and A's rows have norm 1, for "lora" A's rows.
    """
    up = torch.empty(up_rows, config.r, device=like.device, dtype=like.dtype).normal_(std=config.init_std)
    down = torch.empty(config.r, down_columns, device=like.device, dtype=like.dtype).normal_(std=config.init_std)
    if config.init != "normal":
        up, down = nn.functional.normalize(up, dim=0), nn.functional.normalize(down, dim=1)
    return (torch.zeros_like(up) if config.init == "lora" else up), down


def initial_coefficients(config: S2LoraConfig, like: Tensor) -> Tensor:
    """s at the start, on `like`'s device in its dtype: [r], or [1] for coefficient "scalar"; 0, for init "lora" 1."""
    value = 1.0 if config.init == "lora" else 0.0
    return torch.full((config.r if config.coefficient == "rank" else 1,), value, device=like.device, dtype=like.dtype)
