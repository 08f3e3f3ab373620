"""A small comparison for tests: its rows, its file, and quick options."""

from pathlib import Path

import yaml
from rich.console import Console

from fused_s2lora.training.options import TrainOptions

QUIET = Console(quiet=True)
UNSCORED = {"test": [], "group_by": []}  # options of a run that is trained alone
REPRODUCTION = Path(__file__).parents[2] / "docs" / "reproduction"
ROWS = [
    {"name": "zero-shot", "method": "zero-shot", "window": "full"},
    {"name": "S2-LoRA", "method": "s2lora", "seed": [0, 1]},
    {"name": "S2-LoRA, as published", "method": "s2lora", "preset": "paper"},
    {"name": "LoRA", "method": "lora"},
    {"name": "LoRA", "method": "lora", "rank": [2]},
    {"name": "AdaLoRA", "method": "adalora"},
    {"name": "S2-LoRA by α₁", "method": "s2lora", "sparsity_weight": [0.0, 0.3]},
    {"name": "S2-LoRA on less", "method": "s2lora", "utterances": [2]},
]


def options(**fields) -> TrainOptions:
    return TrainOptions(**{"data": ["x"], "output": "y", **fields})


def write(path: Path, train: dict, rows: list[dict], **fields) -> Path:
    file = path / "comparison-file.yaml"
    file.write_text(
        yaml.safe_dump({"title": "A comparison", "train": train, "rows": rows, **fields}, allow_unicode=True)
    )
    return file
