"""Whisper's tokenizer with all its special tokens and the first thousand others: it loads in a tenth of the time."""

import json
import shutil
from pathlib import Path
from typing import Any

WORDS = 1000  # byte-pair merges come in the order of their tokens, so any text can be written in the first ones too
SPECIAL = 50257  # the first special token of Whisper's own
BYTES = 256


def few_tokens(folder: Path, target: Path) -> None:
    """Writes the processor of a Whisper's `folder` to `target`, for fewer tokens."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    model = tokenizer["model"]
    model["vocab"] = {token: number for token, number in model["vocab"].items() if number < WORDS}
    model["merges"] = model["merges"][: WORDS - BYTES]
    for name in ("added_tokens", "post_processor"):
        tokenizer[name] = renumbered(tokenizer[name])
    (target / "tokenizer.json").write_text(json.dumps(tokenizer))
    for name in ("tokenizer_config.json", "processor_config.json"):
        shutil.copy(folder / name, target)


def renumbered(value: Any) -> Any:
    """`value` with the numbers of its special tokens lowered, and without tokens that are no more in its lists."""
    if isinstance(value, dict):
        return {name: renumbered(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [renumbered(inner) for inner in value if not (isinstance(inner, int) and WORDS <= inner < SPECIAL)]
    if isinstance(value, int) and value >= SPECIAL:
        return value - (SPECIAL - WORDS)
    return value
