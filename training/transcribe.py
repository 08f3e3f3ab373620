"""Audio files to text."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from .data import Skipped, checked_duration
from .decoding import Decoding, transcribe_speech
from .errors import UserError
from .models import check_language, load_adapter, load_base, remembered_speech, to_best_device, window_for
from .output import check_name, check_writable, writing
from .precision import autocast_dtype

AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".opus", ".mp3")
# What is looked at in folders; what of it cannot be read is skipped and counted.
_LOOKED_AT = (
    *AUDIO_SUFFIXES, ".aac", ".aif", ".aiff", ".amr", ".au", ".caf", ".m4a", ".mka", ".mp2", ".mp4", ".oga", ".webm",
    ".wma", ".w64",
)  # fmt: skip


@dataclass(frozen=True)
class Transcript:
    """One file and what was heard in it; `ended` unless decoding stopped before the transcript's end."""

    file: Path
    text: str
    ended: bool = True


def transcribe(
    inputs: Sequence[str | Path],
    *,
    model: str = "packaged-base",
    adapter: str | None = None,
    language: str | None = None,
    task: str | None = None,
    window: str | None = None,
    margin: int | None = None,
    beams: int = 1,
    decode_once: bool = False,
    precision: str = "auto",
    batch_size: int = 8,
    strict: bool = False,
    output: str | Path | None = None,
) -> tuple[list[Transcript], list[Skipped]]:
    """Transcribes audio files and all audio in folders, each file at most 30 s; returns transcripts and skipped files.

    Language, task, window and its margin default to those the adapter was trained with; without an adapter language and
    task to those of the model's generation configuration, else detected and transcription, and the window is full.
    With more than one of `beams` each transcript is the best of so many; with `decode_once` one without an end is left
    so. `output` also writes a TSV of file and text.

    Raises:
        UserError: no audio found, a bad file with `strict`, a bad model or adapter, `output` not writable.
    """
    dtype, decoding = autocast_dtype(precision), Decoding(beams, decode_once)
    files = _audio_files(inputs)
    if output is not None:
        if Path(output).suffix.lower() in _LOOKED_AT:
            raise UserError(f"--output {output}: is named as a recording; give a .tsv")
        check_writable(Path(output))
    entries, skipped = _usable(files, strict)
    whisper, processor = load_base(model)
    trained = remembered_speech(adapter) if adapter else {}
    code = check_language(whisper, language or trained.get("language"))
    chosen = window_for(trained, window, margin)
    adapted = load_adapter(whisper, adapter) if adapter else whisper
    to_best_device(adapted)
    with Progress(transient=True, console=Console(stderr=True)) as bars:
        bar = bars.add_task("transcribing", total=len(entries))
        heard = transcribe_speech(
            adapted,
            processor,
            entries,
            window=chosen,
            language=code,
            task=task or trained.get("task"),
            decoding=decoding,
            batch_size=batch_size,
            dtype=dtype,
            on_batch=lambda done: bars.advance(bar, done),
        )
    transcripts = [
        Transcript(Path(entry["path"]), one.text, one.ended) for entry, one in zip(entries, heard, strict=True)
    ]
    if output is not None:
        _write(Path(output), transcripts)
    return transcripts, skipped


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


def _usable(files: Sequence[Path], strict: bool) -> tuple[list[dict], list[Skipped]]:
    entries, skipped = [], []
    for file in files:
        entry = {"path": str(file), "bytes": None}
        name = str(file).encode(errors="backslashreplace").decode()
        try:
            check_name(file)
            checked_duration(str(file), entry)
            entries.append(entry)
        except UserError as error:
            if strict:
                raise
            skipped.append(Skipped(name, str(error)))
    if not entries:
        raise UserError(f"none of the {len(files)} audio files is usable; the first problem: {skipped[0].reason}")
    return entries, skipped


def _write(file: Path, transcripts: Sequence[Transcript]) -> None:
    # Not quoted, as `load_speech` reads a .tsv.
    lines = ["file\ttext", *(f"{one.file}\t{' '.join(one.text.split())}" for one in transcripts)]
    with writing(file):
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
