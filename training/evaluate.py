"""Scoring a Whisper, with or without an adapter, on named test sets."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from .decoding import Decoding
from .errors import UserError
from .evaluation import Evaluation, TestSet, evaluate_sets, results_table
from .models import check_language, load_adapter, load_base, model_for, remembered_speech, to_best_device, window_for
from .output import check_writable, writing
from .precision import autocast_dtype
from .run import run_options


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

    The model defaults to the one the adapter was trained on, without an adapter to the packaged Whisper-base. Window,
    margin and task default to those of the adapter's training, else to the full window and the task of the model's
    generation configuration, or transcription.

    Raises:
        UserError: bad model, adapter, window, column or precision, or `output` not writable or a training run's, in one
            sentence.
    """
    dtype, folder = autocast_dtype(precision), Path(output)
    if run_options(folder) is not None:
        raise UserError(f"{folder}: holds a training run, whose results.json stays; give another --output")
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    check_writable(folder / "results.json")
    whisper, processor = load_base(model_for(model, adapter))
    for test in tests.values():
        check_language(whisper, test.language)
    trained = remembered_speech(adapter) if adapter else {}
    chosen = window_for(trained, window, margin)
    adapted = load_adapter(whisper, adapter) if adapter else whisper
    to_best_device(adapted)
    evaluation = evaluate_sets(
        adapted,
        processor,
        tests,
        label="adapted" if adapter else "zero-shot",
        window=chosen,
        task=task or trained.get("task"),
        decoding=decoding,
        batch_size=batch_size,
        dtype=dtype,
        group_by=group_by,
    )
    evaluation.write(folder)
    (console or Console()).print(results_table([evaluation], title=f"error rates in percent, {chosen.mode} window"))
    return evaluation
