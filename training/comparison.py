"""Many runs described by one file: which cells there are, and running those that are not finished."""

import contextlib
import dataclasses
import itertools
import re
import shutil
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from .audio_window import AudioWindow
from .errors import DivergedError, UserError
from .evaluate import evaluate
from .interpolate import take_run, trained_share
from .methods import METHODS, check, interpolation
from .options import TrainOptions
from .output import claimed, read_json, write_json, write_text, writing
from .precision import resolved
from .run import FREE_TO_CHANGE, RunFolder, changed_option, last_command, versions
from .sets import parts_of, scored_sets
from .train import train
from .utterance_errors import write_errors

ZERO_SHOT = "zero-shot"
_OPTIONS = {option.name: str(option.type) for option in dataclasses.fields(TrainOptions)}
_LISTS = {name for name, kind in _OPTIONS.items() if "list" in kind}
_LONGEST_NAME = 200  # bytes of a folder's name; file systems take 255, and files beside it are called after it
_KINDS = {
    "list": "a list of names",
    "bool": "true or false",
    "float": "a number",
    "int": "a whole number",
    "str": "text",
}


class _Yaml(yaml.SafeLoader):
    """YAML in which no name comes twice in one place, of which the last would be taken and the others lost."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in names:
                raise yaml.MarkedYAMLError(problem=f"{key.value!r} comes twice", problem_mark=key.start_mark)
            names.add(key.value)
        return super().construct_mapping(node, deep)


@dataclass(frozen=True)
class Cell:
    """One run: the row of the table it belongs to, and its folder's name, with and without the seed."""

    row: str
    name: str
    line: str
    options: TrainOptions
    varied: dict[str, Any] = field(default_factory=dict)  # options with several values in the file, but rank and seed
    base: dict[str, Any] = field(default_factory=dict)  # options that the file gives every row of the method

    @property
    def label(self) -> str:
        """What the row is called, with the values of what is varied in it."""
        return ", ".join([self.row, *(f"{key} {value}" for key, value in self.varied.items())])

    @property
    def path(self) -> Path:
        """The run's folder."""
        return Path(self.options.output)

    def finished(self) -> bool:
        """Whether it has run to its end, well or not.

        Raises:
            UserError: it has run, or begun to, with other options than the file gives it now.
        """
        config, ended = self.path / "config.json", (self.path / "cell.json").is_file()
        if not config.is_file():
            return False
        found, wanted = read_json(config), dataclasses.asdict(self.options)
        # What is scored can be made up for until the end, and not after it.
        key = changed_option(found, wanted, FREE_TO_CHANGE - {"test", "group_by"} if ended else FREE_TO_CHANGE)
        if key is not None:
            raise UserError(
                f"{self.path}: {'was finished' if ended else 'was begun'} with {key} = {found.get(key)!r}, not "
                f"{wanted[key]!r} as the comparison now says; delete that folder to run it anew, or give another "
                "--output"
            )
        return ended


@dataclass(frozen=True)
class Comparison:
    """A comparison file: its cells in the order they are run, and where everything goes."""

    title: str
    path: Path
    cells: list[Cell]
    source: str  # the file's text
    timed: bool = True  # whether the runs had the machine to themselves, so that their times and memory say something


def read_comparison(file: str | Path, output: str | Path) -> Comparison:
    """The cells of a YAML file with `train` (options of every run) and `rows` (a name, a method, its own options).

    `methods`, if there, gives for a method the options of all its rows that say no other: they take the place of the
    method's defaults, also in what figures and tables call changed.
    An option of a row that is a list, of which a run takes one value, gives a cell for each value; several such lists
    give all combinations. The method `zero-shot` scores the model as it is. `timed: false` leaves times and memory out
    of every table, for runs that share a machine.

    Raises:
        UserError: the file cannot be read, says one thing twice, names an option or method that does not exist, or
            gives one name to two set-ups or two test sets.
    """
    file, output = Path(file), Path(output)
    try:
        source = file.read_text(encoding="utf-8")
        content = yaml.load(source, _Yaml)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{file}: not to be read as YAML ({' '.join(str(error).split())})") from error
    if not isinstance(content, dict) or not isinstance(content.get("rows"), list) or not content["rows"]:
        raise UserError(f"{file}: needs `rows`, a list of methods to compare, and `train`, the options of all of them")
    if unknown := sorted(map(str, content.keys() - {"title", "timed", "train", "methods", "rows"})):
        raise UserError(f"{file}: {unknown[0]!r} is not one of title, timed, train, methods, rows")
    if not isinstance(timed := content.get("timed", True), bool):
        raise UserError(f"{file}: `timed` is {timed!r}, not true or false")
    common = content.get("train") or {}
    if not isinstance(common, dict):
        raise UserError(f"{file}: `train` is {common!r}, not options with their values")
    methods = content.get("methods") or {}
    if not isinstance(methods, dict) or not all(isinstance(options, dict) for options in methods.values()):
        raise UserError(f"{file}: `methods` is {methods!r}, not methods with their options")
    if unknown := sorted(map(str, methods.keys() - METHODS.keys())):
        raise UserError(f"{file}: the method {unknown[0]!r} under `methods` is not one of {', '.join(METHODS)}")
    cells: dict[str, Cell] = {}
    firsts: dict[str, Cell] = {}
    lines: dict[tuple[str, int], str] = {}
    for row in content["rows"]:
        if not isinstance(row, dict) or "method" not in row:
            raise UserError(f"{file}: the row {row!r} has no `method`")
        name = " ".join(str(row.get("name") or row["method"]).split())
        own = {key: value for key, value in row.items() if key != "name"}
        base = methods.get(str(row["method"]), {})
        for cell in _cells(file, name, {**common, **base, **own}, base, output):
            _check_same_line(file, firsts.setdefault(cell.line, cell), cell)
            if (line := lines.setdefault((cell.label, cell.options.rank), cell.line)) != cell.line:
                raise UserError(
                    f"{file}: two rows, {line} and {cell.line}, are called {cell.label!r}; give one another name"
                )
            cells.setdefault(cell.name, cell)
    _check_sets(file, cells.values())
    title = " ".join(str(content.get("title") or file.stem).split())
    return Comparison(title, output, list(cells.values()), source, timed)


def _check_same_line(file: Path, first: Cell, cell: Cell) -> None:
    """Refuses two cells that would be averaged as seeds of one row, but are of different options."""
    one, other = dataclasses.asdict(first.options), dataclasses.asdict(cell.options)
    free = {"output"} if cell.name == first.name else {"output", "seed"}
    if key := next((key for key in one if key not in free and one[key] != other[key]), None):
        raise UserError(
            f"{file}: two different cells are called {cell.line}: {key} is {one[key]!r} in {first.row!r} and "
            f"{other[key]!r} in {cell.row!r}; give one of the rows another name"
        )


def _check_sets(file: Path, cells: Iterable[Cell]) -> None:
    """Refuses two test sets of one name, which would stand under one heading."""
    found: dict[str, str] = {}
    for options in (cell.options for cell in cells):
        for name, source, language in map(parts_of, options.test):
            told = f"{source}@{language or options.language}" + ", translated" * (options.task == "translate")
            if found.setdefault(name, told) != told:
                raise UserError(
                    f"{file}: two test sets are named {name!r}, {found[name]} and {told}; name them apart in `test`"
                )


def _cells(file: Path, row: str, given: dict[str, Any], base: dict[str, Any], output: Path) -> Iterator[Cell]:
    for key in given:
        if key not in _OPTIONS or key == "output":
            raise UserError(f"{file}: {key!r} in {row!r} is not an option of a run; `s2lora train --help` lists them")
    if given["method"] not in (*METHODS, ZERO_SHOT):
        raise UserError(f"{file}: the method {given['method']!r} is not one of {ZERO_SHOT}, {', '.join(METHODS)}")
    if "data" not in given:
        raise UserError(f"{file}: {row!r} has no `data`; name the training speech under `train`")
    several = [key for key, value in given.items() if isinstance(value, list) and key not in _LISTS]
    if empty := [key for key in several if not given[key]]:
        raise UserError(f"{file}: {empty[0]} of {row!r} is an empty list; give at least one value")
    given = {
        key: [_typed(file, row, key, one) for one in value] if key in several else _typed(file, row, key, value)
        for key, value in given.items()
    }
    base = {key: _typed(file, row, key, value) for key, value in base.items()}
    for values in itertools.product(*(given[key] for key in several)):
        chosen = given | dict(zip(several, values, strict=True))
        slug = re.sub(r"[\W_₀-₉]+", "-", row.lower().replace("α", "a")).strip("-")
        if not slug:
            raise UserError(f"{file}: the row name {row!r} has no letter or digit to call a folder by; give it another")
        rank, seed = chosen.get("rank", 8), chosen.get("seed", 0)
        ranked = given["method"] != ZERO_SHOT and "rank" in METHODS[given["method"]].reads
        varied = {key: chosen[key] for key in several if key not in ("rank", "seed")}
        further = [f"{key}-{value}".replace("_", "-") for key, value in varied.items()]
        line = "-".join([slug, *([f"r{rank}"] if ranked else []), *further])
        name = f"{line}-seed{seed}"
        if given["method"] == ZERO_SHOT:
            name = line = slug
        if len(name.encode()) > _LONGEST_NAME:
            raise UserError(f"{file}: the row name {row!r} is too long to call a folder by; give it a shorter one")
        try:
            options = TrainOptions(**chosen, output=str(output / name))
            if given["method"] != ZERO_SHOT:
                check(options)
        except UserError as error:
            raise UserError(f"{file}: {row!r}: {error}") from error
        yield Cell(row, name, line, options, varied, base)


def _typed(file: Path, row: str, key: str, value: Any) -> Any:
    """`value` as an option of its kind: one name is a list of one; 1e-4, text in YAML, is a number."""
    kind = next(kind for kind in _KINDS if kind in _OPTIONS[key])
    if kind == "list" and isinstance(value, str):
        return [value]
    if kind == "float" and isinstance(value, str):
        with contextlib.suppress(ValueError):
            return float(value)
    fits = {
        "list": isinstance(value, list) and all(isinstance(one, str) for one in value),
        "bool": isinstance(value, bool),
        "float": isinstance(value, int | float) and not isinstance(value, bool),
        "int": isinstance(value, int) and not isinstance(value, bool),
        "str": isinstance(value, str),
    }
    if not fits[kind] and not (value is None and "None" in _OPTIONS[key]):
        raise UserError(f"{file}: {key} of {row!r} is {value!r}, not {_KINDS[kind]}")
    return value


def run_comparison(
    comparison: Comparison, *, most: int | None = None, console: Console | None = None
) -> Iterator[Cell]:
    """Runs every cell that is not finished, one after the other, `most` of them, and yields each as it ends.

    Several processes that are given the same comparison share it: a cell that one of them has, the others leave to it.
    A cell that was stopped goes on where it was. One whose loss stops being finite is finished with the reason in its
    `cell.json`, and the next is run.

    Raises:
        UserError: a cell has run with other options than these, before any is run; or bad input, naming the cell; or
            `most` is below 1.
    """
    if most is not None and most < 1:
        raise UserError(f"--runs is {most}; give at least 1")
    console = console or Console()
    cells = comparison.cells
    done = sum(cell.finished() for cell in cells)
    with writing(comparison.path):
        comparison.path.mkdir(parents=True, exist_ok=True)
        write_text(comparison.path / "comparison.yaml", comparison.source)
    if done:
        console.print(f"{done} of {len(cells)} cells are finished already")
    ran = 0
    for cell in cells:
        if ran == most:
            return
        with _claimed(cell) as claimed:
            if not claimed:
                continue
            console.rule(_progress(comparison, cell))
            _take_training(cell, cells, console)
            _run_and_record(cell, console)
        ran += 1
        yield cell
    left = sum(not cell.finished() for cell in cells)
    if left:
        console.print(f"{left} of {len(cells)} cells are left to the processes that run them")


@contextlib.contextmanager
def _claimed(cell: Cell) -> Iterator[bool]:
    """Whether this process has the cell to run, for as long as the context lasts: nobody has, or has finished it."""
    if cell.finished():
        _clear(cell)
        yield False
        return
    file = cell.path / ".running"
    with writing(file):
        cell.path.mkdir(parents=True, exist_ok=True)
        stream = file.open("w")
    with stream:
        if not claimed(stream):
            yield False
            return
        yield not cell.finished()
        if cell.finished():  # else another may be waiting for this very file
            _clear(cell)


def _clear(cell: Cell) -> None:
    """Deletes what a finished cell needs no more, also where it was killed before it had."""
    for part in ("checkpoints", "model"):
        shutil.rmtree(cell.path / part, ignore_errors=True)
    (cell.path / ".running").unlink(missing_ok=True)


def _progress(comparison: Comparison, cell: Cell) -> str:
    finished = [one for one in comparison.cells if one.finished()]
    took = [read_json(one.path / "cell.json")["seconds"] for one in finished]
    left = len(comparison.cells) - len(finished)
    work = f", about {_duration(sum(took) / len(took) * left)} of work left" if took else ""
    return f"{len(finished) + 1} of {len(comparison.cells)}: {cell.name}{work}"


def _take_training(cell: Cell, cells: Iterable[Cell], console: Console) -> None:
    """Spares a cell its training where a finished one was trained alike and only keeps another share of it."""
    if any((cell.path / part).exists() for part in ("checkpoints", "summary.json")):
        return  # it was begun, or is trained and left to be scored
    like = next((other for other in cells if _differs_in_share(other, cell)), None)
    if like is not None:
        RunFolder(cell.options)
        shutil.rmtree(cell.path / "adapter", ignore_errors=True)  # taken, but killed before all that goes with it was
        take_run(like.path, interpolation(cell.options), cell.path)
        console.print(f"{cell.name}: trained as {like.name}, of whose update it keeps another share", markup=False)


def _differs_in_share(other: Cell, cell: Cell) -> bool:
    """Whether `other` is finished, has its adapter, and differs in nothing that is trained but the share it keeps."""
    if ZERO_SHOT in (other.options.method, cell.options.method):
        return False
    ours, theirs = (dataclasses.asdict(one.options) for one in (cell, other))
    if changed_option(theirs, ours, FREE_TO_CHANGE | {"interpolation"}) is not None or not other.finished():
        return False
    if interpolation(other.options) == interpolation(cell.options):
        return False
    try:
        trained_share(other.path)
    except UserError:
        return False
    return True


def _run_and_record(cell: Cell, console: Console) -> None:
    start = time.perf_counter()
    failed = None
    try:
        _run_cell(cell, console)
    except DivergedError as error:
        failed = str(error)
        console.print(f"{cell.name}: {failed}", style="red", markup=False)
    except UserError as error:
        raise UserError(f"{cell.name}: {error}") from error
    record = {"row": cell.row, "seconds": round(time.perf_counter() - start, 1), "failed": failed}
    write_json(cell.path / "cell.json", record | {"precision": resolved(cell.options.precision), **versions()})


def _run_cell(cell: Cell, console: Console) -> None:
    options = cell.options
    if options.method != ZERO_SHOT:
        for evaluation in train(options, console=console)[-1:]:  # none without a set to score
            write_errors(cell.path, evaluation)
        return
    RunFolder(options)
    evaluation = evaluate(
        scored_sets(options), cell.path / "after", model=options.model, window=AudioWindow(options.window).mode,
        margin=options.margin, task=options.task, decoding=options.decoding(), precision=options.precision,
        batch_size=options.eval_batch_size, group_by=options.group_by, console=console,
    )  # fmt: skip
    write_json(cell.path / "results.json", [evaluation.to_dict()])
    write_errors(cell.path, evaluation)


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min"


def results_of(cell: Cell) -> dict[str, Any] | None:
    """What a cell left, by file: cell, config, summary, metrics, rank_pattern, results; None where it is unfinished.

    Raises:
        UserError: it was finished with other options than the comparison has.
    """
    if not cell.finished():
        return None
    found: dict[str, Any] = {name: getattr(cell, name) for name in ("name", "path", "row", "varied", "base")}
    found["command"] = last_command(cell.path)
    for part in ("cell", "config", "summary", "metrics", "rank_pattern"):
        file = cell.path / f"{part}.json"
        found[part] = read_json(file, list if part in ("metrics", "rank_pattern") else dict) if file.is_file() else None
    results = cell.path / "results.json"
    found["results"] = read_json(results, list)[-1] if results.is_file() else None
    return found
