"""How many ranks of each weight are alive: the paper's figure 3."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .layer import S2LoraLinear
from .model import tuner_of

_COLUMNS = {
    "self_attn.q_proj": "q",
    "self_attn.k_proj": "k",
    "self_attn.v_proj": "v",
    "self_attn.out_proj": "out",
    "encoder_attn.q_proj": "cross q",
    "encoder_attn.k_proj": "cross k",
    "encoder_attn.v_proj": "cross v",
    "encoder_attn.out_proj": "cross out",
    "fc1": "fc1",
    "fc2": "fc2",
}


@dataclass(frozen=True)
class RankPattern:
    """Live ranks (|s| ≥ threshold) and mean |s| of one stack, layers by matrices; None where not adapted.

    s is that of the adapter as it is: where a share of the update was kept, this share of what was learnt.
    """

    stack: str
    layers: list[str]
    matrices: list[str]
    live: list[list[int | None]]
    mean_magnitude: list[list[float | None]]
    r: int
    threshold: float

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers, for JSON."""
        return dict(vars(self))

    def __str__(self) -> str:
        width = max(9, *(len(name) for name in self.matrices)) + 1
        lines = [
            f"{self.stack}, live ranks of {self.r}",
            " " * 8 + "".join(f"{name:>{width}}" for name in self.matrices),
        ]
        for layer, row in zip(self.layers, self.live, strict=True):
            lines.append(f"{layer:<8}" + "".join(f"{'–' if value is None else value:>{width}}" for value in row))
        return "\n".join(lines)


def rank_pattern(
    model: nn.Module, adapter_name: str | None = None, threshold: float | None = None
) -> list[RankPattern]:
    """Live ranks by layer and matrix, one `RankPattern` for each stack (encoder and decoder in Whisper).

    adapter_name defaults to the active adapter, threshold to its config's. A model without an encoder or a decoder is
    one stack named "model"; where two stacks would have one name, each has its path. Of a model that `fully_shard` has
    shared out every process is to ask at once.

    Raises:
        ValueError: the model has no S2-LoRA adapter of that name.
    """
    tuner = tuner_of(model)
    if tuner is None:
        raise ValueError("the model has no S2-LoRA adapter: wrap it with get_peft_model(model, S2LoraConfig())")
    if not tuner.peft_config:
        raise ValueError("every S2-LoRA adapter of the model was deleted: give it another with add_adapter()")
    name = adapter_name or tuner.active_adapters[0]
    if name not in tuner.peft_config:
        raise ValueError(f"no adapter named {name!r}; the model has {', '.join(tuner.peft_config)}")
    config = tuner.peft_config[name]
    limit = config.threshold if threshold is None else threshold
    coefficients = {
        key: _whole(layer.s2lora_coefficients[name])
        for key, layer in tuner.model.named_modules()
        if isinstance(layer, S2LoraLinear) and name in layer.s2lora_coefficients
    }
    return tabulate(coefficients, config.r, limit)


def _whole(values: Tensor) -> Tensor:
    return values.full_tensor() if isinstance(values, DTensor) else values


def tabulate(coefficients: Mapping[str, Tensor], r: int, threshold: float) -> list[RankPattern]:
    """Rank coefficients ([r] or one scalar) by module path, as one `RankPattern` for each stack."""
    places = {key: _cell(key) for key in coefficients}
    if len({*places.values()}) < len(places):  # several stacks of one name, as the two encoders of CLIP
        places = {key: _cell(key, by_path=True) for key in coefficients}
    cells: dict[str, dict[tuple[str, str], Tensor]] = {}
    for key, (stack, row, column) in places.items():
        cells.setdefault(stack, {})[row, column] = coefficients[key]
    return [_pattern(stack, table, r, threshold) for stack, table in cells.items()]


def _cell(key: str, by_path: bool = False) -> tuple[str, str, str]:
    """Stack, layer and matrix of a module path; `by_path` the stack is all that comes before the layer's number."""
    parts = key.split(".")
    stack = next((part for part in parts if part in ("encoder", "decoder")), "model")
    number = next((index for index, part in enumerate(parts) if part.isdigit()), None)
    if number is None or number + 1 == len(parts):
        return stack, "", key
    matrix = ".".join(parts[number + 1 :])
    if by_path:
        stack = ".".join(parts[:number]) or stack
    return stack, parts[number], _COLUMNS.get(matrix, matrix)


def _pattern(stack: str, table: dict[tuple[str, str], Tensor], r: int, threshold: float) -> RankPattern:
    layers = list(dict.fromkeys(row for row, _ in table))
    found = {column for _, column in table}
    known = [column for column in _COLUMNS.values() if column in found]
    matrices = known + sorted(found - set(known))

    def live(values: Tensor) -> int:
        ranks = values.detach().expand(r) if values.numel() == 1 else values.detach()
        return int((ranks.abs() >= threshold).sum())

    rows = [[table.get((layer, matrix)) for matrix in matrices] for layer in layers]
    return RankPattern(
        stack=stack,
        layers=layers,
        matrices=matrices,
        live=[[None if value is None else live(value) for value in row] for row in rows],
        mean_magnitude=[
            [None if value is None else value.detach().abs().mean().item() for value in row] for row in rows
        ],
        r=r,
        threshold=threshold,
    )
