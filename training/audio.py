"""Reading audio: any format libsndfile knows, any sample rate, any number of channels."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import soxr

from .errors import UserError

SAMPLE_RATE = 16_000


def _source(entry: dict[str, Any]) -> str | io.BytesIO:
    return io.BytesIO(entry["bytes"]) if entry.get("bytes") is not None else entry["path"]


def read_audio(entry: dict[str, Any]) -> np.ndarray:
    """Samples [n] in float32, mono (mean of the channels), 16 kHz. `entry` holds "path" or "bytes" as in `datasets`.

    Raises:
        UserError: the file is missing, or is no audio that libsndfile can read.
    """
    try:
        samples, rate = soundfile.read(_source(entry), dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, OSError) as error:
        raise UserError(unreadable(entry, error)) from error
    mono = samples.mean(axis=1)
    return mono if rate == SAMPLE_RATE else soxr.resample(mono, rate, SAMPLE_RATE)


def duration_s(entry: dict[str, Any]) -> float:
    """Length in seconds, from the header alone.

    Raises:
        UserError: as `read_audio`.
    """
    try:
        return soundfile.info(_source(entry)).duration
    except (soundfile.LibsndfileError, OSError) as error:
        raise UserError(unreadable(entry, error)) from error


def unreadable(entry: dict[str, Any], error: Exception) -> str:
    """One sentence on why an audio entry cannot be read."""
    path = entry.get("path")
    if entry.get("bytes") is None and (path is None or not Path(path).is_file()):
        return f"{path}: no such audio file"
    return f"{path or 'audio in the data set'}: not readable as audio ({getattr(error, 'error_string', error)})"
