"""Audio files to text, recordings of any length."""

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.progress import Progress, track

from .data import MAX_AUDIO_S, Skipped, checked_duration
from .decoding import Decoding, Segment, transcribe_speech
from .errors import UserError
from .models import check_language, load_adapter, load_base, remembered_speech, to_best_device, window_for
from .output import check_name, check_writable, writing
from .precision import autocast_dtype
from .segmentation import SHORTEST_S

AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".opus", ".mp3")
# What is looked at in folders; what of it cannot be read is skipped and counted.
_LOOKED_AT = (
    *AUDIO_SUFFIXES, ".aac", ".aif", ".aiff", ".amr", ".au", ".caf", ".m4a", ".mka", ".mp2", ".mp4", ".oga", ".webm",
    ".wma", ".w64",
)  # fmt: skip
_AT_ONCE_S = 3600.0  # of audio, held in memory


@dataclass(frozen=True)
class Transcript:
    """One file and what was heard in it; `ended` unless decoding stopped before the end of what a segment says."""

    file: Path
    text: str
    ended: bool = True
    segments: tuple[Segment, ...] = ()


def transcribe(
    inputs: Sequence[str | Path],
    *,
    model: str = "packaged-base",
    adapter: str | None = None,
    language: str | None = None,
    task: str | None = None,
    window: str | None = None,
    margin: int | None = None,
    max_segment: float = MAX_AUDIO_S,
    beams: int = 1,
    decode_once: bool = False,
    precision: str = "auto",
    batch_size: int = 8,
    strict: bool = False,
    output: str | Path | None = None,
    timestamps: bool = False,
) -> tuple[list[Transcript], list[Skipped]]:
    """Transcribes audio files and all audio in folders; returns transcripts and skipped files.

    A file of more than `max_segment` seconds is cut at its pauses into segments of no more, each heard by itself.

    Language, task, window and its margin default to those the adapter was trained with; without an adapter language and
    task to those of the model's generation configuration, else detected and transcription, and the window is full.
    With more than one of `beams` each transcript is the best of so many; with `decode_once` one without an end is left
    so. `output` also writes a TSV, an hour of audio at a time: file and text, or with `timestamps` a line for each
    segment, which `load_speech` reads. Its paths are relative to where it is, but for absolute ones.

    Raises:
        UserError: no audio found, a bad file with `strict`, a bad model or adapter, `max_segment` not from 2 to 30,
            `output` not writable.
    """
    dtype, decoding = autocast_dtype(precision), Decoding(beams, decode_once)
    if not SHORTEST_S <= max_segment <= MAX_AUDIO_S:
        raise UserError(f"--max-segment is {max_segment}; give {SHORTEST_S:.0f} to {MAX_AUDIO_S:.0f} seconds")
    files = _audio_files(inputs)
    if output is not None:
        if Path(output).suffix.lower() in _LOOKED_AT:
            raise UserError(f"--output {output}: is named as a recording; give a .tsv")
        check_writable(Path(output))
    usable, skipped = _usable(files, strict)
    whisper, processor = load_base(model)
    trained = remembered_speech(adapter) if adapter else {}
    code = check_language(whisper, language or trained.get("language"))
    chosen = window_for(trained, window, margin)
    adapted = load_adapter(whisper, adapter) if adapter else whisper
    to_best_device(adapted)
    transcripts: list[Transcript] = []
    with Progress(transient=True, console=Console(stderr=True)) as bars:
        bar = bars.add_task("transcribing", total=len(usable))
        for part in _in_turn(usable):
            heard = transcribe_speech(
                adapted,
                processor,
                [{"path": str(file)} for file in part],
                window=chosen,
                language=code,
                task=task or trained.get("task"),
                decoding=decoding,
                batch_size=batch_size,
                dtype=dtype,
                longest_s=max_segment,
                on_batch=lambda done: bars.advance(bar, done),
            )
            done = [Transcript(file, one.text, one.ended, one.segments) for file, one in zip(part, heard, strict=True)]
            if output is not None:
                _write(Path(output), done, timestamps, first=not transcripts)
            transcripts += done
    return transcripts, skipped


def table(transcripts: Sequence[Transcript], timestamps: bool) -> list[str]:
    """Lines of file and text, or with `timestamps` of file, offset, duration and text for each segment; no heading."""
    if not timestamps:
        return [f"{one.file}\t{_in_a_line(one.text)}" for one in transcripts]
    return [
        f"{one.file}\t{segment.offset_s:.2f}\t{segment.duration_s:.2f}\t{_in_a_line(segment.text)}"
        for one in transcripts
        for segment in one.segments
    ]


def _in_a_line(text: str) -> str:
    return " ".join(text.split())


def _audio_files(inputs: Sequence[str | Path]) -> list[Path]:
    files: list[Path] = []
    for path in map(Path, inputs):
        if path.is_dir():
            found = (file for file in path.rglob("*") if file.suffix.lower() in _LOOKED_AT)
            files += sorted(file for file in found if file.is_file())
        else:
            files.append(path)
    if not files:
        raise UserError(f"no audio in {', '.join(map(str, inputs))}; give files ending in {', '.join(AUDIO_SUFFIXES)}")
    return files


def _usable(files: Sequence[Path], strict: bool) -> tuple[list[tuple[Path, float]], list[Skipped]]:
    """Files that can be read to their end with their seconds, and the others."""
    usable, skipped = [], []
    for file in track(files, "checking", transient=True, console=Console(stderr=True)):
        name = str(file).encode(errors="backslashreplace").decode()
        try:
            check_name(file)
            usable.append((file, checked_duration(str(file), {"path": str(file), "bytes": None}, math.inf)))
        except UserError as error:
            if strict:
                raise
            skipped.append(Skipped(name, str(error)))
    if not usable:
        raise UserError(f"none of the {len(files)} audio files is usable; the first problem: {skipped[0].reason}")
    return usable, skipped


def _in_turn(files: Sequence[tuple[Path, float]]) -> Iterator[list[Path]]:
    """The files in parts of about `_AT_ONCE_S` seconds."""
    part, length_s = [], 0.0
    for file, seconds in files:
        part.append(file)
        length_s += seconds
        if length_s >= _AT_ONCE_S:
            yield part
            part, length_s = [], 0.0
    if part:
        yield part


def _write(file: Path, transcripts: Sequence[Transcript], timestamps: bool, *, first: bool) -> None:
    """Adds to the table, begins it with the `first`; not quoted, as `load_speech` reads a .tsv."""
    there = [replace(one, file=_seen_from(file.parent, one.file)) for one in transcripts]
    heading = ["file\toffset\tduration\ttext" if timestamps else "file\ttext"] if first else []
    with writing(file), file.open("w" if first else "a", encoding="utf-8") as stream:
        stream.writelines(f"{line}\n" for line in [*heading, *table(there, timestamps)])


def _seen_from(folder: Path, file: Path) -> Path:
    return file if file.is_absolute() else Path(os.path.relpath(file, folder))
