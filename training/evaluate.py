"""Scoring a Whisper, with or without an adapter, on named test sets."""

import contextlib
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from .data import Skipped
from .decoding import Decoding
from .errors import UserError
from .evaluation import Evaluation, TestSet, evaluate_sets, results_table
from .models import as_it_is, check_language, load_for_use, window_for
from .output import alone, check_writable, holds_files, read_json, write_json, writing
from .precision import autocast_dtype, resolved
from .run import called_as, run_options, tell_skipped, versions
from .world import world

_NOTE = "evaluation.json"


def evaluate(
    tests: dict[str, TestSet],
    output: str | Path,
    *,
    model: str | None = None,
    adapter: str | None = None,
    window: str | None = None,
    margin: int | None = None,
    task: str | None = None,
    decoding: Decoding | None = None,
    precision: str = "auto",
    batch_size: int = 8,
    group_by: Sequence[str] = (),
    console: Console | None = None,
) -> Evaluation:
    """Scores the model on every test set, prints the table and writes results.json and transcripts into `output`.

    Each set is written as it is done; what was stopped goes on when called again with the same options. Processes that
    run together share the utterances. `evaluation.json` says of what model the results are, how it was decoded, and
    which utterances were left out.

    The model defaults to the one the adapter was trained on, without an adapter to the packaged Whisper-base. Window,
    margin and task default to those of the adapter's training, else to the full window and the task of the model's
    generation configuration, or transcription.

    Raises:
        UserError: bad model, adapter, window, column or precision, or `output` not writable, a training run's, with
            other files in it, or one that another process writes to, in one sentence.
    """
    state, dtype, folder = world(), autocast_dtype(precision), Path(output)
    if run_options(folder) is not None:
        raise UserError(f"{folder}: holds a training run, whose results.json stays; give another --output")
    if state.is_main_process:
        with writing(folder):
            if not (folder / _NOTE).is_file() and holds_files(folder):  # tables of sets not scored are deleted there
                raise UserError(f"{folder}: the folder holds other files; give an empty --output")
            folder.mkdir(parents=True, exist_ok=True)
        check_writable(folder / "results.json")
    name, adapted, processor, trained = load_for_use(model, adapter)
    for test in tests.values():
        check_language(adapted, test.language)
    chosen = window_for(trained, window, margin)
    console, decoding = console or Console(quiet=not state.is_main_process), decoding or Decoding()
    task = task or trained.get("task")
    made = {
        "model": as_it_is(name), "adapter": as_it_is(adapter), "window": asdict(chosen), "task": task,
        "decoding": asdict(decoding), "precision": resolved(precision),
    }  # fmt: skip
    others = alone(folder / ".alone", f"{folder}: another process is at this evaluation")
    with writing(folder), others if state.is_main_process else contextlib.nullcontext():
        skipped = [item for test in tests.values() for item in test.speech.skipped]
        if state.is_main_process:
            tell_skipped(skipped, _note(folder, made, skipped), console)
        state.wait_for_everyone()  # what is there of another model is deleted before any of them looks
        evaluation = evaluate_sets(
            adapted,
            processor,
            tests,
            label="adapted" if adapter else os.path.basename(os.path.abspath(name)),
            window=chosen,
            task=task,
            decoding=decoding,
            batch_size=batch_size,
            dtype=dtype,
            group_by=group_by,
            folder=folder,
        )
    console.print(results_table([evaluation], title=f"error rates in percent, {chosen.mode} window"))
    return evaluation


def _note(folder: Path, made: dict[str, Any], skipped: Sequence[Skipped]) -> Path:
    """Writes evaluation.json; what the folder has of another model, or decoded otherwise, is not gone on with."""
    file = folder / _NOTE
    found = read_json(file) if file.is_file() else {}
    if made != {name: found.get(name) for name in made}:
        (folder / "results.json").unlink(missing_ok=True)
    noted = {"command": called_as(), "versions": versions(), "skipped": [asdict(item) for item in skipped]}
    write_json(file, made | noted)
    return file
