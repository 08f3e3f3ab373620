"""The paper's two tables with our figures beside the published ones, as Markdown, CSV and JSON."""

import csv
import dataclasses
import statistics
from dataclasses import dataclass
from typing import Any

from . import published
from .comparison import ZERO_SHOT, Cell, Comparison, results_of
from .run import write_json
from .text import UNSPACED_LANGUAGES

ALL = "all"


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
    def method(self) -> str:
        """The method's name."""
        return self.cells[0]["config"]["method"]

    @property
    def rank(self) -> int:
        """The rank that was asked for."""
        return self.cells[0]["config"]["rank"]

    @property
    def trainable(self) -> int | None:
        """Trainable parameters; None without training."""
        summary = self.cells[0]["summary"]
        return summary["trainable_parameters"] if summary else None

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
        values = [cell["summary"][key] for cell in self.cells if cell["summary"]]
        return statistics.fmean(values) if values else None


def lines_of(comparison: Comparison) -> list[Line]:
    """Every finished set-up in the file's order; cells that differ in nothing but the seed are one line."""
    groups: dict[str, list[tuple[Cell, dict[str, Any]]]] = {}
    for cell in comparison.cells:
        found = results_of(cell)
        if found is not None:
            groups.setdefault(cell.name.rpartition("-seed")[0] or cell.name, []).append((cell, found))
    return [Line(_label(cells[0][0]), [found for _, found in cells]) for cells in groups.values()]


def _label(cell: Cell) -> str:
    return ", ".join([cell.row, *(f"{key} {value}" for key, value in cell.varied.items())])


def columns_of(lines: list[Line]) -> list[Column]:
    """Sets and groups of the first line that was scored, groups before the whole."""
    scored: dict[str, Any] = next(
        (cell["results"] for line in lines for cell in line.cells if cell["results"]), {"sets": {}}
    )
    columns = []
    for name, result in scored["sets"].items():
        unit = "cer" if result["language"] in UNSPACED_LANGUAGES else "wer"
        groups = [group for group in result["groups"] if group != ALL]
        # One group alone says what the whole says.
        columns += [Column(name, group, unit) for group in (groups if len(groups) > 1 else [])]
        columns.append(Column(name, ALL, unit))
    return columns


def write_tables(comparison: Comparison) -> str:
    """Writes comparison.md, .csv and .json into the comparison's folder, and returns the Markdown."""
    lines = lines_of(comparison)
    columns = columns_of(lines)
    text = markdown(comparison, lines, columns)
    comparison.path.mkdir(parents=True, exist_ok=True)
    (comparison.path / "comparison.md").write_text(text, encoding="utf-8")
    records = [record(line, cell, columns) for line in lines for cell in line.cells]
    write_json(comparison.path / "comparison.json", records)
    flat = [{key: value for key, value in entry.items() if key != "config"} for entry in records]
    with (comparison.path / "comparison.csv").open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, fieldnames=list(flat[0]) if flat else ["row"])
        writer.writeheader()
        writer.writerows(flat)
    return text


def record(line: Line, cell: dict[str, Any], columns: list[Column]) -> dict[str, Any]:
    """Everything about one cell, flat: what made it, what it cost, every error rate, and the paper's figures."""
    single = dataclasses.replace(line, cells=[cell])
    summary = cell["summary"] or {}
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
        "utc": cell["cell"]["utc"],
        "commit": cell["cell"]["commit"],
        "device": cell["cell"]["device"],
    }
    for column in columns:
        for kind in ("rate", "low", "high", "capped_rate"):
            entry[f"{column} {kind}"] = next(iter(single.rates(column, kind)), None)
    share, rates = published.METHODS.get(line.method, (None, ()))
    entry["published_trainable_percent"] = share
    for name, rate in zip(published.SETS, rates, strict=False):
        entry[f"published_{name}"] = rate
    return entry | {"config": cell["config"]}


def markdown(comparison: Comparison, lines: list[Line], columns: list[Column]) -> str:
    """Methods at the file's common rank, the rank sweep, and every run with what made it."""
    main = [line for line in lines if line.method == ZERO_SHOT or line.rank == 8]
    missing = len(comparison.cells) - sum(len(line.cells) for line in lines)
    head = [
        f"# {comparison.title}",
        "Error rates in percent, with errors capped at the length of an utterance in parentheses; for several seeds "
        "the mean ± the sample standard deviation. On the right the paper's own figures (Whisper-medium, r = 8, 1 K "
        "utterances of Mandarin child speech, arXiv 2309.11756, Table 2); ours are of another model and other speech.",
        *([f"{missing} of {len(comparison.cells)} runs are not finished."] if missing else []),
    ]
    return "\n\n".join([*head, _methods(main, columns), *_sweep(lines, columns), _runs(lines)]) + "\n"


def _methods(lines: list[Line], columns: list[Column]) -> str:
    heads = ["method", "trainable", *map(str, columns), "step s", "peak MiB", "seeds"]
    heads += ["published: trainable", *published.SETS]
    rows = []
    for line in lines:
        share, rates = published.METHODS.get(line.method, (None, ())) if _is_published(line) else (None, ())
        failures = [cell["cell"]["failed"] for cell in line.cells if cell["cell"]["failed"]]
        trainable = f"{line.trainable:,}" if line.trainable else "–"
        step, peak = line.mean("step_s"), line.mean("peak_memory_mib")
        rows.append(
            [
                line.label + (f" (failed: {failures[0]})" if failures else ""),
                trainable,
                *(_rate(line, column) for column in columns),
                f"{step:.2f}" if step else "–",
                f"{peak:,.0f}" if peak else "–",
                str(len(line.cells)),
                f"{share:g} %" if share else "–",
                *(f"{rate:.2f}" for rate in rates),
                *(["–"] * (len(published.SETS) - len(rates))),
            ]
        )
    return "## Methods\n\n" + _table(heads, rows)


def _is_published(line: Line) -> bool:
    """Whether this is the paper's own set-up of the method and not an ablation of ours."""
    config = line.cells[0]["config"]
    if line.method == "s2lora":
        return config["preset"] == "paper"
    if line.method == "full":
        return config["lr"] in (None, 1e-4)
    return config["target_modules"] is None and config["lr"] is None


def _rate(line: Line, column: Column) -> str:
    rates, capped = line.rates(column), line.rates(column, "capped_rate")
    if not rates:
        return "–"
    spread = f" ± {statistics.stdev(rates):.1f}" if len(rates) > 1 else ""
    return f"{statistics.fmean(rates):.1f}{spread} ({statistics.fmean(capped):.1f})"


def _sweep(lines: list[Line], columns: list[Column]) -> list[str]:
    """Rank by rank, for the plain set-ups that ran at more than one rank."""
    plain: dict[str, dict[int, Line]] = {}
    for line in lines:
        if line.method != ZERO_SHOT and not line.cells[0]["varied"]:
            plain.setdefault(line.label, {})[line.rank] = line
    swept = {label: by_rank for label, by_rank in plain.items() if len(by_rank) > 1}
    if not swept:
        return []
    ranks = sorted({rank for by_rank in swept.values() for rank in by_rank})
    totals = [column for column in columns if column.group == ALL]
    heads = ["method", *(f"{column}, r = {' / '.join(map(str, ranks))}" for column in totals)]
    heads += [f"published {name}, r = {' / '.join(map(str, published.RANKS))}" for name in published.SETS[:2]]
    rows = []
    for label, by_rank in swept.items():
        method = next(iter(by_rank.values())).method
        rates = [
            " / ".join(_rate(by_rank[rank], column) if rank in by_rank else "–" for rank in ranks) for column in totals
        ]
        paper = [" / ".join(f"{value:.2f}" for value in values) for values in published.RANK_SWEEP.get(method, ())]
        rows.append([label, *rates, *(paper or ["–", "–"])])
    return ["## Ranks (the paper's Table 1)\n\n" + _table(heads, rows)]


def _runs(lines: list[Line]) -> str:
    rows = [
        [line.label, cell["name"], str(cell["config"]["seed"]), cell["cell"]["utc"][:10], str(cell["cell"]["commit"]),
         f"`{cell['command']}`", cell["cell"]["device"]]
        for line in lines for cell in line.cells
    ]  # fmt: skip
    return "## Runs\n\n" + _table(["row", "folder", "seed", "date", "commit", "command", "device"], rows)


def _table(heads: list[str], rows: list[list[str]]) -> str:
    rule = ["---" if index == 0 else "--:" for index in range(len(heads))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [heads, rule, *rows])
