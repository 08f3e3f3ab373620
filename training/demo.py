"""The demonstration: a real Whisper adapted to child-like speech, its errors before and after."""

from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .errors import UserError
from .evaluation import Evaluation
from .options import TrainOptions
from .synthesis import (
    TEST_CHILDREN,
    TEST_PATTERNS,
    TRAINING_CHILDREN,
    TRAINING_PATTERNS,
    sentences,
    write_speech,
)
from .train import train

TRAINING_UTTERANCES = 480
TEST_UTTERANCES = 60
_SHOWN = 5


def demo(
    *,
    data: str | None = None,
    test: str | None = None,
    output: str = "demo-run",
    fresh: bool = False,
    console: Console | None = None,
) -> list[Evaluation]:
    """Adapts the packaged Whisper-base with the default S2-LoRA in the trimmed window and prints what changed.

    Without `data`, synthetic child-like speech is made in `output`/speech: sentences and voices of the test are not in
    the training. With `data` (and `test`) the same is done with real recordings, passed over as often as `train` does.
    Called again, it goes on where it was, or with `fresh` trains anew.

    Raises:
        UserError: `test` without `data` or the other way round; anything `train` refuses.
    """
    console = console or Console()
    if (data is None) != (test is None):
        raise UserError("give --data and --test together: recordings to train on, and others to test on")
    folder = Path(output)
    epochs = None
    if data is None or test is None:
        data, test = _synthetic(folder / "speech", console)
        epochs = 1.0  # which is enough here, and quick
    run = str(folder / "run")
    evaluations = train(
        TrainOptions(data=[data], test=[f"test={test}"], output=run, window="trim", epochs=epochs, seed=0),
        fresh=fresh,
        console=console,
    )
    console.print(_transcripts(*evaluations))
    return evaluations


def _synthetic(folder: Path, console: Console) -> tuple[str, str]:
    training, test = folder / "train", folder / "test"
    if not (test / "metadata.csv").is_file():
        with console.status("synthesising child-like speech"):
            trained = sentences(TRAINING_UTTERANCES, 2, TRAINING_PATTERNS)
            write_speech(training, trained, TRAINING_CHILDREN, seed=3)
            write_speech(test, sentences(TEST_UTTERANCES, 1, TEST_PATTERNS), TEST_CHILDREN, seed=4)
    return str(training), str(test)


def _transcripts(before: Evaluation, after: Evaluation) -> Table:
    """A few utterances that were wrong before, with what is heard now."""
    first, last = before.sets[0], after.sets[0]
    wrong = [index for index, errors in enumerate(first.words) if errors.errors]
    gained = sorted(wrong, key=lambda index: last.words[index].errors - first.words[index].errors)
    table = Table(title="some utterances that were misheard before")
    for column in ("said", "heard before", "heard now"):
        table.add_column(column)
    for index in gained[:: max(1, len(gained) // _SHOWN)][:_SHOWN]:
        said = first.speech.dataset["text"][index]
        heard = (one.hypotheses[index][:200] for one in (first, last))
        table.add_row(escape(said), *map(escape, heard))
    return table
