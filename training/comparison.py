"""Many runs described by one file: which cells there are, and running those that are not finished."""

import dataclasses
import itertools
import json
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from .audio_window import AudioWindow
from .errors import UserError
from .evaluate import evaluate
from .methods import METHODS
from .options import TrainOptions
from .run import called_as, versions, write_json
from .train import named_sets, train

ZERO_SHOT = "zero-shot"
_OPTIONS = {option.name: str(option.type) for option in dataclasses.fields(TrainOptions)}
_LISTS = {name for name, kind in _OPTIONS.items() if "list" in kind}


@dataclass(frozen=True)
class Cell:
    """One run: the row of the table it belongs to, and its folder's name."""

    row: str
    name: str
    options: TrainOptions
    varied: dict[str, Any] = field(default_factory=dict)  # options with several values in the file, but rank and seed

    @property
    def path(self) -> Path:
        """The run's folder."""
        return Path(self.options.output)

    def finished(self) -> bool:
        """Whether it has run to its end, well or not."""
        return (self.path / "cell.json").is_file()


@dataclass(frozen=True)
class Comparison:
    """A comparison file: its cells in the order they are run, and where everything goes."""

    title: str
    path: Path
    cells: list[Cell]
    source: str  # the file's text


def read_comparison(file: str | Path, output: str | Path) -> Comparison:
    """The cells of a YAML file with `train` (options of every run) and `rows` (a name, a method, its own options).

    An option of a row that is a list, of which a run takes one value, gives a cell for each value; several such lists
    give all combinations. The method `zero-shot` scores the model as it is.

    Raises:
        UserError: the file cannot be read, or names an option or method that does not exist.
    """
    file, output = Path(file), Path(output)
    try:
        source = file.read_text(encoding="utf-8")
        content = yaml.safe_load(source)
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"{file}: not to be read as YAML ({' '.join(str(error).split())})") from error
    if not isinstance(content, dict) or not isinstance(content.get("rows"), list) or not content["rows"]:
        raise UserError(f"{file}: needs `rows`, a list of methods to compare, and `train`, the options of all of them")
    common = content.get("train") or {}
    cells: dict[str, Cell] = {}
    for row in content["rows"]:
        if not isinstance(row, dict) or "method" not in row:
            raise UserError(f"{file}: the row {row!r} has no `method`")
        name = str(row.get("name", row["method"]))
        own = {key: value for key, value in row.items() if key != "name"}
        for cell in _cells(file, name, {**common, **own}, output):
            same = cells.setdefault(cell.name, cell)
            if same.options != cell.options:
                raise UserError(
                    f"{file}: two different cells are called {cell.name}; give one of the rows another name"
                )
    return Comparison(str(content.get("title", file.stem)), output, list(cells.values()), source)


def _cells(file: Path, row: str, given: dict[str, Any], output: Path) -> Iterator[Cell]:
    for key in given:
        if key not in _OPTIONS or key == "output":
            raise UserError(f"{file}: {key!r} in {row!r} is not an option of a run; `s2lora train --help` lists them")
    if given["method"] not in (*METHODS, ZERO_SHOT):
        raise UserError(f"{file}: the method {given['method']!r} is not one of {ZERO_SHOT}, {', '.join(METHODS)}")
    several = [key for key, value in given.items() if isinstance(value, list) and key not in _LISTS]
    for values in itertools.product(*(given[key] for key in several)):
        chosen = given | dict(zip(several, values, strict=True))
        slug = re.sub(r"[^a-z0-9]+", "-", row.lower().replace("α", "a")).strip("-")
        rank, seed = chosen.get("rank", 8), chosen.get("seed", 0)
        ranked = "rank" if given["method"] not in (ZERO_SHOT, "full", "bitfit", "ia3") else ""
        varied = {key: chosen[key] for key in several if key not in ("rank", "seed")}
        further = [f"{key}-{value}".replace("_", "-") for key, value in varied.items()]
        name = "-".join([slug, *([f"r{rank}"] if ranked else []), *further, f"seed{seed}"])
        if given["method"] == ZERO_SHOT:
            name = slug
        try:
            yield Cell(row, name, TrainOptions(**chosen, output=str(output / name)), varied)
        except TypeError as error:
            raise UserError(f"{file}: {row!r} has a value of the wrong kind ({error})") from error


def run_comparison(
    comparison: Comparison, *, part: tuple[int, int] = (1, 1), console: Console | None = None
) -> Iterator[Cell]:
    """Runs every cell that is not finished, one after the other, and yields each as it ends.

    With part (I, N) only every N-th cell from the I-th on, so that N processes share the work and the folder.

    A cell that was stopped goes on where it was. One that cannot be trained (its loss stops being finite, say) is
    finished with the reason in its `cell.json`.
    """
    console = console or Console()
    comparison.path.mkdir(parents=True, exist_ok=True)
    (comparison.path / "comparison.yaml").write_text(comparison.source, encoding="utf-8")
    first, step = part
    cells = comparison.cells[first - 1 :: step]
    waiting = [cell for cell in cells if not cell.finished()]
    done = len(cells) - len(waiting)
    if done:
        console.print(f"{done} of {len(cells)} cells are finished already")
    took: list[float] = []
    for index, cell in enumerate(waiting):
        left = f", about {_duration(sum(took) / len(took) * (len(waiting) - index))} left" if took else ""
        console.rule(f"{done + index + 1} of {len(cells)}: {cell.name}{left}")
        start = time.perf_counter()
        failed = None
        try:
            _run_cell(cell, console)
        except UserError as error:
            failed = str(error)
            console.print(f"[red]{cell.name}[/red]: {failed}")
            if cell.options.method != ZERO_SHOT and "the loss is" not in failed:
                raise
        took.append(time.perf_counter() - start)
        record = {"row": cell.row, "seconds": round(took[-1], 1), "failed": failed, **versions()}
        write_json(cell.path / "cell.json", record)
        shutil.rmtree(cell.path / "checkpoints", ignore_errors=True)
        shutil.rmtree(cell.path / "model", ignore_errors=True)
        yield cell


def read_part(text: str) -> tuple[int, int]:
    """(I, N) of "I/N", with 1 <= I <= N.

    Raises:
        UserError: anything else.
    """
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    part = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 1 <= part[0] <= part[1]:
        raise UserError(f"--part {text!r} is not I/N with I from 1 to N, such as 2/4")
    return part


def _run_cell(cell: Cell, console: Console) -> None:
    options = cell.options
    if options.method != ZERO_SHOT:
        train(options, console=console)
        return
    reading: dict[str, Any] = {"text_column": options.text_column, "audio_column": options.audio_column}
    tests = named_sets(options.test, options.language, limit=options.limit, strict=options.strict, **reading)
    evaluation = evaluate(
        tests, cell.path / "after", model=options.model, window=AudioWindow(options.window).mode,
        margin=options.margin, task=options.task, precision=options.precision, batch_size=options.eval_batch_size,
        group_by=options.group_by, console=console,
    )  # fmt: skip
    write_json(cell.path / "results.json", [evaluation.to_dict()])
    write_json(cell.path / "config.json", dataclasses.asdict(options))
    (cell.path / "command.txt").write_text(called_as() + "\n")


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min"


def results_of(cell: Cell) -> dict[str, Any] | None:
    """What a cell left, by file: cell, config, summary, metrics, rank_pattern, results; None where it is unfinished."""
    if not cell.finished():
        return None
    found: dict[str, Any] = {"name": cell.name, "row": cell.row, "varied": cell.varied}
    command = cell.path / "command.txt"
    found["command"] = command.read_text().splitlines()[-1] if command.is_file() else ""
    for part in ("cell", "config", "summary", "metrics", "rank_pattern"):
        file = cell.path / f"{part}.json"
        found[part] = json.loads(file.read_text()) if file.is_file() else None
    results = cell.path / "results.json"
    found["results"] = json.loads(results.read_text())[-1] if results.is_file() else None
    return found
