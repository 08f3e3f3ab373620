"""The paper's two tables with our figures beside the published ones, as Markdown, CSV and JSON."""

import csv
import dataclasses
import statistics
from dataclasses import dataclass
from typing import Any

from . import published
from .comparison import ZERO_SHOT, Cell, Comparison, results_of
from .evaluation import unit_of
from .options import TrainOptions
from .output import replacing, write_json, write_text

ALL = "all"
METHOD_OPTIONS = (
    "preset", "target_modules", "exclude_modules", "sharing", "sparsity_weight", "norm_weight", "penalty",
    "freeze_factors", "lr", "coefficient_lr_ratio", "interpolation", "utterances", "keep_share", "keep_languages",
    "learn_language",
)  # fmt: skip


@dataclass(frozen=True)
class Column:
    """A set, or a group of it, and the error unit that is read for its language: "wer" or "cer"."""

    set: str
    group: str
    unit: str

    def __str__(self) -> str:
        name = self.set if self.group == ALL else f"{self.set}, {self.group}"
        return f"{name} {self.unit.upper()}"


@dataclass(frozen=True)
class Line:
    """A row of a table: all seeds of one set-up. Rates in percent, a list with one entry a seed."""

    label: str
    cells: list[dict[str, Any]]

    @property
    def first(self) -> dict[str, Any]:
        """The first seed that did not fail, which has all there is to have; the very first where all did."""
        return next((cell for cell in self.cells if not cell["cell"]["failed"]), self.cells[0])

    @property
    def method(self) -> str:
        """The method's name."""
        return self.first["config"]["method"]

    @property
    def rank(self) -> int:
        """The rank that was asked for."""
        return self.first["config"]["rank"]

    @property
    def trainable(self) -> int | None:
        """Trainable parameters; None without training."""
        summary = self.first["summary"]
        return summary["trainable_parameters"] if summary else None

    @property
    def varied(self) -> bool:
        """Whether it is one of several that a row of the file gives for a list of values (other than rank and seed)."""
        return bool(self.first["varied"])

    @property
    def changed(self) -> set[str]:
        """The options of the method that are not as the file has them for all its rows, by default the method's own."""
        return self._unlike(self.first["base"])

    def _unlike(self, base: dict[str, Any]) -> set[str]:
        default = dataclasses.asdict(TrainOptions(["-"], "-"))
        config, usual = {**default, **self.first["config"]}, {**default, **base}
        return {name for name in METHOD_OPTIONS if config[name] != usual[name]}

    @property
    def published(self) -> str | None:
        """The method's name where this is the paper's own set-up of it, and not an ablation of ours."""
        if self.varied:
            return None
        config, changed = self.first["config"], self._unlike({})
        if self.method == "s2lora":
            as_published = config["preset"] == "paper" and changed == {"preset"}
        elif self.method == "full":
            as_published = config["lr"] in (None, 1e-4) and changed <= {"lr"}
        else:
            as_published = not changed
        return self.method if as_published else None

    def rates(self, column: Column, kind: str = "rate") -> list[float]:
        """Error rates of each seed; `kind` is a field of `ErrorRate`."""
        found = []
        for cell in self.cells:
            groups = (cell["results"] or {"sets": {}})["sets"].get(column.set, {"groups": {}})["groups"]
            if column.group in groups:
                found.append(groups[column.group][column.unit][kind])
        return found

    def mean(self, key: str) -> float | None:
        """Mean of a figure of the runs' summaries."""
        values = [cell["summary"][key] for cell in self.cells if cell["summary"] and cell["summary"][key] is not None]
        return statistics.fmean(values) if values else None


def lines_of(comparison: Comparison) -> list[Line]:
    """Every finished set-up in the file's order; cells that differ in nothing but the seed are one line."""
    groups: dict[str, list[tuple[Cell, dict[str, Any]]]] = {}
    for cell in comparison.cells:
        found = results_of(cell)
        if found is not None:
            if found["summary"] and not comparison.timed:
                found["summary"] |= {"step_s": None, "peak_memory_mib": None}
            groups.setdefault(cell.line, []).append((cell, found))
    return [Line(_label(cells[0][0]), [found for _, found in cells]) for cells in groups.values()]


def _label(cell: Cell) -> str:
    return ", ".join([cell.row, *(f"{key} {value}" for key, value in cell.varied.items())])


def columns_of(lines: list[Line]) -> list[Column]:
    """Sets and groups of all lines in the order in which they first appear, groups before the whole."""
    units: dict[str, str] = {}
    groups: dict[str, dict[str, None]] = {}
    for cell in (cell for line in lines for cell in line.cells if cell["results"]):
        for name, result in cell["results"]["sets"].items():
            units.setdefault(name, unit_of(result))
            groups.setdefault(name, {}).update(dict.fromkeys(group for group in result["groups"] if group != ALL))
    columns = []
    for name, unit in units.items():
        # One group alone says what the whole says.
        columns += [Column(name, group, unit) for group in (groups[name] if len(groups[name]) > 1 else [])]
        columns.append(Column(name, ALL, unit))
    return columns


def write_tables(comparison: Comparison) -> str:
    """Writes comparison.md, .csv and .json into the comparison's folder, and returns the Markdown."""
    lines = lines_of(comparison)
    columns = columns_of(lines)
    text = markdown(comparison, lines, columns)
    comparison.path.mkdir(parents=True, exist_ok=True)
    write_text(comparison.path / "comparison.md", text)
    records = [record(line, cell, columns) for line in lines for cell in line.cells]
    write_json(comparison.path / "comparison.json", records)
    flat = [{key: value for key, value in entry.items() if key != "config"} for entry in records]
    with (
        replacing(comparison.path / "comparison.csv") as unfinished,
        unfinished.open("w", encoding="utf-8", newline="") as stream,
    ):
        writer = csv.DictWriter(stream, fieldnames=list(flat[0]) if flat else ["row"])
        writer.writeheader()
        writer.writerows(flat)
    return text


def record(line: Line, cell: dict[str, Any], columns: list[Column]) -> dict[str, Any]:
    """Everything about one cell, flat: what made it, what it cost, every error rate, and the paper's figures."""
    single = dataclasses.replace(line, cells=[cell])
    summary = cell["summary"] or {}
    made = cell["cell"] | {name: summary[name] for name in ("commit", "device", "precision", "utc") if name in summary}
    entry = {
        "row": line.label,
        "cell": cell["name"],
        "method": line.method,
        "rank": line.rank,
        "seed": cell["config"]["seed"],
        "trainable_parameters": line.trainable,
        "step_s": summary.get("step_s"),
        "peak_memory_mib": summary.get("peak_memory_mib"),
        "failed": cell["cell"]["failed"],
        "command": cell["command"],
        "utc": made["utc"],
        "commit": made["commit"],
        "device": made["device"],
        "precision": made.get("precision", cell["config"]["precision"]),  # older runs did not write what auto was
    }
    for column in columns:
        for kind in ("rate", "low", "high", "capped_rate"):
            entry[f"{column} {kind}"] = next(iter(single.rates(column, kind)), None)
    share, rates = published.METHODS.get(line.published or "", (None, ())) if line.rank == 8 else (None, ())
    entry["published_trainable_percent"] = share
    for index, name in enumerate(published.SETS):
        entry[f"published_{name}"] = rates[index] if rates else None
    return entry | {"config": cell["config"]}


def markdown(comparison: Comparison, lines: list[Line], columns: list[Column]) -> str:
    """Methods at rank 8, runs over lists of values, the rank sweep, and every run with what made it."""
    records = [record(line, cell, columns) for line in lines for cell in line.cells]
    missing = len(comparison.cells) - len(records)
    devices = sorted({entry["device"] for entry in records if entry["step_s"]})
    head = [
        f"# {comparison.title}",
        "Error rates in percent, with errors capped at the length of an utterance in parentheses; for several seeds "
        "the mean ± the sample standard deviation. On the right the paper's own figures (Whisper-medium, r = 8, 1 K "
        "utterances of Mandarin child speech, arXiv 2309.11756, Table 2); ours are of another model and other speech.",
        *([] if comparison.timed else ["Step times and memory are left out: the runs shared a machine."]),
        *([f"{missing} of {len(comparison.cells)} runs are not finished."] if missing else []),
        *([f"Step times are of different devices ({'; '.join(devices)}): do not compare them."] * (len(devices) > 1)),
    ]
    base = [line for line in lines if line.method == ZERO_SHOT or line.rank == 8]
    methods = [line for line in base if not line.varied]
    varied = [line for line in base if line.varied]
    parts = [
        _methods("Methods (the paper's Table 2)", methods, columns) if methods else None,
        _sweep(lines, columns),
        _methods("One option varied", varied, columns, beside_paper=False) if varied else None,
        _runs(records),
    ]
    return "\n\n".join([*head, *filter(None, parts)]) + "\n"


def _methods(title: str, lines: list[Line], columns: list[Column], *, beside_paper: bool = True) -> str:
    timed = any(line.mean("step_s") for line in lines)
    heads = ["method", "trainable", *map(str, columns), *(["step s", "peak MiB"] if timed else []), "seeds"]
    heads += ["published: trainable", *published.SETS] if beside_paper else []
    rows = []
    for line in lines:
        share, rates = published.METHODS.get(line.published or "", (None, ()))
        failures = [cell["cell"]["failed"] for cell in line.cells if cell["cell"]["failed"]]
        trainable = f"{line.trainable:,}" if line.trainable else "–"
        step, peak = line.mean("step_s"), line.mean("peak_memory_mib")
        rows.append(
            [
                line.label + (f" (failed: {failures[0]})" if failures else ""),
                trainable,
                *(_rate(line, column) for column in columns),
                *([f"{step:.2f}" if step else "–", f"{peak:,.0f}" if peak else "–"] if timed else []),
                str(len(line.cells) - len(failures)),
                f"{share:g} %" if share else "–",
                *(f"{rate:.2f}" for rate in rates),
                *(["–"] * (len(published.SETS) - len(rates))),
            ][: len(heads)]
        )
    return f"## {title}\n\n" + _table(heads, rows)


def _rate(line: Line, column: Column) -> str:
    rates, capped = line.rates(column), line.rates(column, "capped_rate")
    if not rates:
        return "–"
    spread = f" ± {statistics.stdev(rates):.1f}" if len(rates) > 1 else ""
    return f"{statistics.fmean(rates):.1f}{spread} ({statistics.fmean(capped):.1f})"


def _sweep(lines: list[Line], columns: list[Column]) -> str | None:
    """Rank by rank: the plain set-ups that ran at several ranks, and the other methods of the paper's Table 1."""
    by_label: dict[str, dict[int, Line]] = {}
    for line in lines:
        if line.method != ZERO_SHOT and not line.varied:
            by_label.setdefault(line.label, {})[line.rank] = line
    if all(len(by_rank) == 1 for by_rank in by_label.values()):
        return None
    paper = {label: next(iter(by_rank.values())).published for label, by_rank in by_label.items()}
    shown = [label for label, name in paper.items() if len(by_label[label]) > 1 or name in published.RANK_SWEEP]
    ranks = sorted({rank for label in shown for rank in by_label[label]})
    totals = [column for column in columns if column.group == ALL]
    heads = ["method", *(f"{column}, r = {' / '.join(map(str, ranks))}" for column in totals)]
    heads += [f"published {name}, r = {' / '.join(map(str, published.RANKS))}" for name in published.SETS[:2]]
    rows = []
    for label in shown:
        found = by_label[label]
        rates = [
            " / ".join(_rate(found[rank], column) if rank in found else "–" for rank in ranks) for column in totals
        ]
        theirs = published.RANK_SWEEP.get(paper[label] or "", ())
        rows.append([label, *rates, *([" / ".join(f"{value:.2f}" for value in values) for values in theirs] or "––")])
    return "## Ranks (the paper's Table 1)\n\n" + _table(heads, rows)


def _runs(records: list[dict[str, Any]]) -> str:
    rows = [
        [entry["row"], entry["cell"], str(entry["seed"]), entry["utc"][:10], str(entry["commit"]),
         f"`{entry['command']}`", entry["device"], entry["precision"]]
        for entry in records
    ]  # fmt: skip
    return "## Runs\n\n" + _table(["row", "folder", "seed", "date", "commit", "command", "device", "precision"], rows)


def _table(heads: list[str], rows: list[list[str]]) -> str:
    rule = ["---" if index == 0 else "--:" for index in range(len(heads))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [heads, rule, *rows])
