"""How much of Whisper's 30 s window is computed.

Whisper pads every utterance to 30 s, 1,500 encoder positions of 20 ms. An adapted model can do with the positions of
the longest utterance of the batch and a margin, if it is trained and decoded alike (docs/defaults.md).
"""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from peft import PeftModel
from torch import nn

from .errors import UserError

POSITIONS = 1500
SAMPLES_PER_POSITION = 320  # 20 ms
FRAMES_PER_POSITION = 2


@dataclass(frozen=True)
class AudioWindow:
    """`full`: 1,500 positions always. `trim`: those of the longest utterance and `margin` more, at most 1,500."""

    mode: str = "full"
    margin: int = 64

    def __post_init__(self) -> None:
        if self.mode not in ("full", "trim"):
            raise UserError(f"audio window {self.mode!r} is not one of full, trim")
        if self.margin < 0:
            raise UserError(f"audio window margin {self.margin} is negative; give encoder positions of 20 ms")

    def mel_frames(self, longest_samples: int) -> int:
        """Log-mel frames (10 ms) for a batch whose longest utterance has that many samples at 16 kHz."""
        if self.mode == "full":
            return POSITIONS * FRAMES_PER_POSITION
        positions = math.ceil(longest_samples / SAMPLES_PER_POSITION) + self.margin
        return min(POSITIONS, max(1, positions)) * FRAMES_PER_POSITION


@contextlib.contextmanager
def window_of(model: nn.Module, mel_frames: int) -> Iterator[None]:
    """Inside, the Whisper `model` (or a PEFT model around it) takes features of `mel_frames` frames, generate() too.

    The encoder uses the first `mel_frames` / 2 of its position embeddings: what a Whisper with that many
    `max_source_positions` and these weights would compute. Outside, the model is as before.

    Raises:
        ValueError: mel_frames is odd, not positive, or more than the model has positions for.
    """
    whisper: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    encoder = whisper.get_encoder()
    trained = encoder.embed_positions.weight.shape[0]
    positions, odd = divmod(mel_frames, FRAMES_PER_POSITION)
    if odd or not 0 < positions <= trained:
        raise ValueError(
            f"mel_frames is {mel_frames}, not an even number between 2 and {trained * FRAMES_PER_POSITION}"
        )
    configs = {id(config): config for config in (whisper.config, encoder.config)}.values()
    try:
        encoder.embed_positions.num_embeddings = positions
        for config in configs:
            config.max_source_positions = positions
        yield
    finally:
        encoder.embed_positions.num_embeddings = trained
        for config in configs:
            config.max_source_positions = trained
