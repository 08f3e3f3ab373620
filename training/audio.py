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
    """Length in seconds, from the header, after a look at the end of a FLAC (0.3 ms), the one format whose header still
    promises samples that a cut-off file cannot be read without.

    Raises:
        UserError: as `read_audio`, or a FLAC that is cut off.
    """
    try:
        with soundfile.SoundFile(_source(entry)) as file:
            if file.format == "FLAC" and file.frames > 0 and not _has_last_sample(file):
                raise UserError(f"{entry.get('path') or 'audio in the data set'}: its audio is cut off before the end")
            return file.frames / file.samplerate
    except (soundfile.LibsndfileError, OSError) as error:
        raise UserError(unreadable(entry, error)) from error


def _has_last_sample(file: soundfile.SoundFile) -> bool:
    try:
        file.seek(file.frames - 1)
        return len(file.read(1)) == 1
    except soundfile.LibsndfileError:
        return False


def unreadable(entry: dict[str, Any], error: Exception) -> str:
    """One sentence on why an audio entry cannot be read."""
    path = entry.get("path")
    if entry.get("bytes") is None and (path is None or not Path(path).is_file()):
        return f"{path}: no such audio file"
    return f"{path or 'audio in the data set'}: not readable as audio ({getattr(error, 'error_string', error)})"
