"""Reading audio: any format libsndfile knows, any sample rate, any number of channels."""

import contextlib
import io
import math
import os
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import soundfile
import soxr

from .errors import UserError
from .mp3 import counts_its_frames, piped

SAMPLE_RATE = 16_000
_BLOCK_FRAMES = 2**20
_ROUNDING_S = 0.05  # by how much a segment may be said to end after its file
# Where libsndfile finds the very sample; in Vorbis it ends some beside, in GSM 6.10 and ADPCM it cannot.
_SOUGHT_IN = ("WAV", "WAVEX", "RF64", "FLAC", "OGG", "MP3")
_SOUGHT = ("FLOAT", "DOUBLE", "ULAW", "ALAW", "OPUS", "MPEG_LAYER_III")
_CHUNKS: dict[bytes, Literal["little", "big"]] = {b"RIFF": "little", b"FORM": "big"}  # WAV, AIFF
_MISCOUNTED_BYTES = 4096  # by which their headers may be wrong, 0.1 s
_OGG_PAGE_BYTES = 27 + 255 + 255 * 255  # of the longest: its header, the lengths of its parts, and they
_MISCOUNTED_S = 0.1  # by which that of an MP3 may be
_MP3_FRAMES = 1024  # read at once
_LOUDEST = 1e15  # where 1 is full scale; the spectrum of what is much louder is not finite
_UNKNOWN_BYTES = 0x7FFF_0000  # and more: written to a pipe
_UNKNOWN_FRAMES = 2**62  # and more: a FLAC written to a pipe, which has no length in its header


class _Stream(soundfile.SoundFile):
    """Read from its start to its end only: a FLAC without a length cannot be sought in, as soundfile does otherwise."""

    def seekable(self) -> bool:
        return False


@contextlib.contextmanager
def _opened(entry: dict[str, Any]) -> Iterator[_Stream]:
    content = entry.get("bytes")
    try:
        with _Stream(io.BytesIO(content) if content is not None else entry["path"]) as file:
            yield file
    except (soundfile.LibsndfileError, OSError) as error:
        raise UserError(unreadable(entry, error)) from error


def _blocks(file: _Stream, entry: dict[str, Any]) -> Iterator[np.ndarray]:
    """All samples of the segment that the entry names, else of the file, in parts of [n, channels] in float32."""
    start_s, length_s = entry.get("offset_s"), entry.get("length_s")
    left = math.inf if start_s is None else round(length_s * file.samplerate)
    at_end = start_s is not None and not _go_to(file, round(start_s * file.samplerate))
    while not at_end and left > 0:
        samples = file.read(int(min(left, _BLOCK_FRAMES)), dtype="float32", always_2d=True)
        if not (np.abs(samples) < _LOUDEST).all():
            raise UserError(
                f"{_name(entry)}: it has samples that are not finite numbers or, where 1 is full scale, above "
                f"{_LOUDEST:.0e}; write it again without them"
            )
        left -= len(samples)
        at_end = not len(samples)
        if not at_end:
            yield samples
    if at_end and start_s is not None and left > _ROUNDING_S * file.samplerate:
        raise UserError(
            f"{_name(entry)}: it ends before the segment of {length_s:.10g} s from {start_s:.10g} s on does; correct "
            "offset and duration, which are in seconds"
        )


def _go_to(file: _Stream, frame: int) -> bool:
    """Lets the next samples read be those from `frame` on; whether the file is as long."""
    exact = file.format in _SOUGHT_IN and (file.subtype in _SOUGHT or file.subtype.startswith("PCM_"))
    if exact and file.frames < _UNKNOWN_FRAMES:
        if frame > file.frames:
            return False
        if frame:
            file.seek(frame)
        return True
    while frame and (passed := len(file.read(min(frame, _BLOCK_FRAMES), dtype="float32"))):
        frame -= passed
    return not frame


def read_audio(entry: dict[str, Any]) -> np.ndarray:
    """Samples [n] in float32, mono (mean of the channels), 16 kHz.

    `entry` holds "path" or "bytes" as in `datasets`, and of a segment also "offset_s", where it begins, and "length_s",
    both in seconds. Ogg Vorbis and some others are read from their start to it.

    Raises:
        UserError: the file is missing, is no audio that libsndfile can read to its end, ends before the segment, or has
            samples that are not finite, as their spectrum would not be.
    """
    with _opened(entry) as file:
        rate = file.samplerate
        blocks = [samples.mean(axis=1) for samples in _blocks(file, entry)]
    mono = np.concatenate(blocks) if blocks else np.zeros(0, np.float32)
    return mono if rate == SAMPLE_RATE else soxr.resample(mono, rate, SAMPLE_RATE)


def duration_s(entry: dict[str, Any], longest_s: float = math.inf) -> float:
    """Length in seconds of audio that `read_audio` can read.

    All of it is decoded, for damage in its middle is not seen otherwise. Integers without compression are not, for any
    bytes are such, but for segments, nor is what is longer than `longest_s` by its header or as a segment.

    Raises:
        UserError: as `read_audio`, a WAV, AIFF, MP3 or Ogg that was cut short, or an MP3 of unknown length that would
            be.
    """
    with _opened(entry) as file:
        if entry.get("offset_s") is None:
            _check_whole(entry)
        header_s = file.frames / file.samplerate
        plain = file.format != "FLAC" and file.subtype.startswith("PCM_")
        if entry.get("offset_s") is not None:
            if entry["length_s"] > longest_s:
                return entry["length_s"]
        elif plain or (header_s > longest_s and file.frames < _UNKNOWN_FRAMES):
            return header_s
        found_s = sum(len(samples) for samples in _blocks(file, entry)) / file.samplerate
        if file.format == "MP3" and entry.get("offset_s") is None:
            _check_whole_mp3(entry, header_s, found_s)
        return found_s


def _check_whole_mp3(entry: dict[str, Any], header_s: float, found_s: float) -> None:
    """Raises UserError where there is less than the header tells of, or more than is guessed without one."""
    content = entry.get("bytes")
    with io.BytesIO(content) if content is not None else open(entry["path"], "rb") as stream:
        if counts_its_frames(stream):
            if found_s + _MISCOUNTED_S < header_s:
                raise UserError(
                    f"{_name(entry)}: was cut short, for its header tells of {header_s:.1f} s and there are "
                    f"{found_s:.1f} s"
                )
            return
        frames = 0
        with piped(stream) as pipe, _Stream(pipe, closefd=False) as file:
            with contextlib.suppress(soundfile.LibsndfileError):  # a last frame that is cut short
                while read := len(file.read(_MP3_FRAMES, dtype="float32")):
                    frames += read
            whole_s = frames / file.samplerate
    if whole_s > found_s + _MISCOUNTED_S:
        raise UserError(
            f"{_name(entry)}: an MP3 of a bit rate that changes, without its length in it, of whose {whole_s:.1f} s "
            f"only {found_s:.1f} s would be read; write it again, as FLAC"
        )


def _check_whole(entry: dict[str, Any]) -> None:
    """Raises UserError where a WAV or AIFF lacks what its header tells of, or an Ogg half of its last page.

    Libsndfile takes the rest for all of it.
    """
    content = entry.get("bytes")
    with io.BytesIO(content) if content is not None else open(entry["path"], "rb") as stream:
        head, size = stream.read(8), stream.seek(0, os.SEEK_END)
        if head[:4] == b"OggS":
            stream.seek(max(0, size - _OGG_PAGE_BYTES))
            if not _ends_with_a_page(stream.read()):
                raise UserError(f"{_name(entry)}: was cut short, for its last page is not whole")
    if (order := _CHUNKS.get(head[:4])) is None:
        return
    told = 8 + int.from_bytes(head[4:], order)
    if size + _MISCOUNTED_BYTES < told < _UNKNOWN_BYTES:
        raise UserError(f"{_name(entry)}: was cut short, for its header tells of {told} bytes and there are {size}")


def _ends_with_a_page(ogg: bytes) -> bool:
    """Whether the last page in the end of an Ogg is whole; after 27 bytes a page has the lengths of its parts."""
    start = ogg.rfind(b"OggS\0")  # and the version: four bytes alone are among the audio of one file in 65,000
    page = ogg[start:]
    parts = page[26] if len(page) > 26 else 255
    return start < 0 or len(page) >= 27 + parts + sum(page[27 : 27 + parts])


def unreadable(entry: dict[str, Any], error: Exception) -> str:
    """One sentence on why an audio entry cannot be read."""
    path = entry.get("path")
    if entry.get("bytes") is None and (path is None or not os.path.isfile(path)):  # nor is a name that is too long
        return f"{path}: no such audio file"
    why = str(getattr(error, "error_string", error)).rstrip(".")
    return f"{_name(entry)}: not readable as audio ({why}); convert it to FLAC, as ffmpeg -i FILE FILE.flac does"


def _name(entry: dict[str, Any]) -> str:
    return entry.get("path") or "audio in the data set"
