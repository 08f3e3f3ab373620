"""Audio files to text, recordings of any length."""

import contextlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress, track

from .data import MAX_AUDIO_S, Skipped, checked_duration, in_threads
from .decoding import Decoding, Segment, transcribe_speech
from .errors import UserError
from .models import as_it_is, check_language, load_for_use, window_for
from .output import alone, check_name, check_writable, write_text, writing
from .precision import autocast_dtype
from .segmentation import SHORTEST_S

AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".opus", ".mp3")
# What is looked at in folders; what of it cannot be read is skipped and counted.
_LOOKED_AT = (
    *AUDIO_SUFFIXES, ".aac", ".aif", ".aiff", ".amr", ".au", ".caf", ".m4a", ".mka", ".mp2", ".mp4", ".oga", ".webm",
    ".wma", ".w64",
)  # fmt: skip
_WRITTEN_AFTER_S = 600.0  # of audio


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
    model: str | None = None,
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

    The model defaults to the one the adapter was trained on, without an adapter to the packaged Whisper-base. Language,
    task, window and its margin default to those of the adapter's training; without an adapter language and task to
    those of the model's generation configuration, else detected and transcription, and the window is full.
    With more than one of `beams` each transcript is the best of so many; with `decode_once` one without an end is left
    so. `output` also writes a TSV: file and text, or with `timestamps` a line for each segment, which `load_speech`
    reads. Its paths are relative to where it is, but for absolute ones. It is written ten minutes of audio at a time,
    and what was stopped goes on when called again with the same options. A table that is there already stays as it is.

    Raises:
        UserError: no audio found, a bad file with `strict`, a bad model or adapter, `max_segment` not from 2 to 30,
            `output` not writable, there already and not of a transcription that was stopped, or another process's.
    """
    dtype, decoding = autocast_dtype(precision), Decoding(beams, decode_once)
    if not SHORTEST_S <= max_segment <= MAX_AUDIO_S:
        raise UserError(f"--max-segment is {max_segment}; give {SHORTEST_S:.0f} to {MAX_AUDIO_S:.0f} seconds")
    files = _audio_files(inputs)
    if output is not None:
        if Path(output).suffix.lower() in _LOOKED_AT:
            raise UserError(f"--output {output}: is named as a recording; give a .tsv")
        _check_unfinished(Path(output))
        check_writable(Path(output))
    usable, skipped = _usable(files, strict)
    name, adapted, processor, trained = load_for_use(model, adapter)
    code = check_language(adapted, language or trained.get("language"))
    chosen = window_for(trained, window, margin)
    settings = {
        "model": as_it_is(name), "adapter": as_it_is(adapter), "language": language, "task": task,
        "window": window, "margin": margin, "max_segment": max_segment, "beams": beams, "decode_once": decode_once,
        "precision": precision,
    }  # fmt: skip
    with _recording(output, settings, usable, timestamps) as record:
        done = {} if record is None else record.done
        left = [file for file in usable if file not in done]
        with Progress(transient=True, console=Console(stderr=True)) as bars:
            if done:
                bars.console.print(f"{output}: {len(done)} of {len(usable)} recordings are in it already", markup=False)
            bar = bars.add_task("transcribing", total=len(usable), completed=len(done))
            heard = transcribe_speech(
                adapted,
                processor,
                ({"path": str(file)} for file in left),
                window=chosen,
                language=code,
                task=task or trained.get("task"),
                decoding=decoding,
                batch_size=batch_size,
                dtype=dtype,
                longest_s=max_segment,
                at_once_s=_WRITTEN_AFTER_S,
                on_batch=lambda utterances: bars.advance(bar, utterances),
            )
            for file, one in zip(left, heard, strict=True):
                done[file] = Transcript(file, one.text, one.ended, one.segments)
                if record is not None:
                    record.add(done[file])
        transcripts = [done[file] for file in usable]
        if record is not None:
            record.finish(transcripts)
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
    if "" in inputs:  # a variable of the shell that is not set; as a path it is the folder one is in
        raise UserError("the name of a recording is empty; give files or folders")
    files: list[Path] = []
    for path in map(Path, inputs):
        if path.is_dir():
            found = (file for file in _below(path) if file.suffix.lower() in _LOOKED_AT)
            files += sorted(file for file in found if file.is_file() or not file.exists())  # a link to what is gone
        else:
            files.append(path)
    if not files:
        raise UserError(f"no audio in {', '.join(map(str, inputs))}; give files ending in {', '.join(AUDIO_SUFFIXES)}")
    return list(dict.fromkeys(files))  # named by itself and by its folder a file is one


def _below(folder: Path) -> Iterator[Path]:
    """What is not a folder in this one and those below, of linked ones too, each once: a link may lead back."""
    seen: set[str] = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:
            folders.clear()
        else:
            seen.add(real)
            folders.sort()
            yield from (Path(place, name) for name in names)


def _usable(files: Sequence[Path], strict: bool) -> tuple[list[Path], list[Skipped]]:
    """Files that can be read to their end, and the others."""
    usable, skipped = [], []
    console = Console(stderr=True)
    found = track(in_threads(_problem, files), "checking", total=len(files), transient=True, console=console)
    for file, problem in zip(files, found, strict=True):
        if problem is None:
            usable.append(file)
        elif strict:
            raise UserError(problem)
        else:
            skipped.append(Skipped(str(file).encode(errors="backslashreplace").decode(), problem))
    if not usable:
        raise UserError(f"none of the {len(files)} audio files is usable; the first problem: {skipped[0].reason}")
    return usable, skipped


def _problem(file: Path) -> str | None:
    try:
        check_name(file)
        checked_duration(str(file), {"path": str(file), "bytes": None}, math.inf)
    except UserError as error:
        return str(error)
    return None


def _unfinished(table: Path) -> Path:
    return table.with_name(f"{table.name}.unfinished")


def _check_unfinished(table: Path) -> None:
    """Raises UserError where a table is there that is no stopped transcription's: somebody may have corrected it."""
    if table.is_file() and table.stat().st_size and not _unfinished(table).is_file():
        raise UserError(f"{table}: exists already, and was finished; give another --output, or delete it")


@contextlib.contextmanager
def _recording(
    output: str | Path | None, settings: dict[str, Any], files: Sequence[Path], timestamps: bool
) -> Iterator["_Record | None"]:
    """The table, if one is asked for, for this process alone: two would each write over what the other heard."""
    if output is None:
        yield None
        return
    table = Path(output)
    with contextlib.ExitStack() as held:
        with writing(table):
            lock = table.with_name(f"{table.name}.alone")
            held.enter_context(alone(lock, f"{table}: another process is writing it"))
        _check_unfinished(table)  # the other may have finished it meanwhile
        yield _Record(table, settings, files, timestamps)


class _Record:
    """The table of what was heard and, until all of it is, a file beside it from which a stopped run goes on.

    That one has a line of settings and one for each transcript, with the time its recording was last modified and its
    size. What was heard with other settings, or of a recording that has changed, is heard again.
    """

    def __init__(self, table: Path, settings: dict[str, Any], files: Sequence[Path], timestamps: bool) -> None:
        self.table, self.timestamps = table, timestamps
        self.file = _unfinished(table)
        self.states = {file: [file.stat().st_mtime_ns, file.stat().st_size] for file in files}
        heading = json.dumps(settings)
        found = self.file.read_text(encoding="utf-8").split("\n")[:-1] if self.file.is_file() else []
        read = map(_from_line, found[1:] if found[:1] == [heading] else [])
        self.done = {one.file: one for one, state in read if self.states.get(one.file) == state}
        with writing(table):
            write_text(self.file, "".join(f"{line}\n" for line in (heading, *map(self._to_line, self.done.values()))))
        self._write(self.done.values())

    def add(self, transcript: Transcript) -> None:
        with writing(self.table):
            _append(self.table, self._lines([transcript]))
            _append(self.file, [self._to_line(transcript)])

    def finish(self, transcripts: Sequence[Transcript]) -> None:
        self._write(transcripts)
        self.file.unlink(missing_ok=True)

    def _write(self, transcripts: Iterable[Transcript]) -> None:
        heading = "file\toffset\tduration\ttext" if self.timestamps else "file\ttext"
        with writing(self.table):
            write_text(self.table, "".join(f"{line}\n" for line in (heading, *self._lines(transcripts))))

    def _lines(self, transcripts: Iterable[Transcript]) -> list[str]:
        """Not quoted, as `load_speech` reads a .tsv."""
        there = [replace(one, file=_seen_from(self.table.parent, one.file)) for one in transcripts]
        return table(there, self.timestamps)

    def _to_line(self, one: Transcript) -> str:
        segments = [[part.offset_s, part.duration_s, part.text] for part in one.segments]
        row = {"file": str(one.file), "state": self.states[one.file], "text": one.text, "ended": one.ended}
        return json.dumps(row | {"segments": segments})


def _from_line(line: str) -> tuple[Transcript, list[int] | None]:
    row = json.loads(line)
    segments = tuple(Segment(*segment) for segment in row["segments"])
    return Transcript(Path(row["file"]), row["text"], row["ended"], segments), row.get("state")


def _append(file: Path, lines: Iterable[str]) -> None:
    with file.open("a", encoding="utf-8") as stream:
        stream.writelines(f"{line}\n" for line in lines)


def _seen_from(folder: Path, file: Path) -> Path:
    """`..` of a folder that is a link leads out of what it links to."""
    return file if file.is_absolute() else Path(os.path.relpath(file.absolute(), folder.resolve()))
