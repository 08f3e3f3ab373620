"""The rows of a comparison's tables: all seeds of one set-up, and the sets and groups that they were scored on."""

import statistics
from dataclasses import dataclass
from typing import Any

from .comparison import Cell, Comparison, results_of
from .evaluation import ALL, unit_of
from .interpolate import recorded_share
from .methods import METHODS
from .metrics import Unit
from .run import FREE_TO_CHANGE, UNSET

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
    unit: Unit

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
        """The rank that was asked for, of a method without one the default."""
        return self.first["config"]["rank"]

    @property
    def own_rank(self) -> int | None:
        """The rank of a method that has one."""
        return self.rank if self.method in METHODS and "rank" in METHODS[self.method].reads else None

    @property
    def trainable(self) -> int | None:
        """Trainable parameters; None without training."""
        summary = self.first["summary"]
        return summary["trainable_parameters"] if summary else None

    @property
    def share(self) -> float | None:
        """The share of its update that was kept; None without training, and where a run of S2-LoRA does not say."""
        summary = self.first["summary"]
        return None if summary is None else recorded_share(self.first["config"], summary)

    @property
    def varied(self) -> bool:
        """Whether it is one of several that a row of the file gives for a list of values (other than rank and seed)."""
        return bool(self.first["varied"])

    @property
    def changed(self) -> set[str]:
        """The options of the method that are not as the file has them for all its rows, by default the method's own."""
        return self._unlike(self.first["base"])

    def _unlike(self, base: dict[str, Any]) -> set[str]:
        config, usual = {**UNSET, **self.first["config"]}, {**UNSET, **base}
        return {name for name in METHOD_OPTIONS if config[name] != usual[name]}

    def unlike(self, other: "Line") -> set[str]:
        """The options that the two were trained with and are not the same, seeds aside."""
        ours, theirs = ({**UNSET, **line.first["config"]} for line in (self, other))
        return {name for name in UNSET.keys() - FREE_TO_CHANGE - {"seed"} if ours[name] != theirs[name]}

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

    def mean_rate(self, column: Column, kind: str = "rate") -> float | None:
        """Mean of `rates`."""
        rates = self.rates(column, kind)
        return statistics.fmean(rates) if rates else None

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
    return [Line(cells[0][0].label, [found for _, found in cells]) for cells in groups.values()]


def names_of(lines: list[Line]) -> dict[str, Line]:
    """Each line by its label, with the rank where several lines have it."""
    labels = [line.label for line in lines]
    return {line.label + f", r = {line.rank}" * (labels.count(line.label) > 1): line for line in lines}


def columns_of(lines: list[Line]) -> list[Column]:
    """Sets and groups of all lines in the order in which they first appear, groups before the whole."""
    units: dict[str, Unit] = {}
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
