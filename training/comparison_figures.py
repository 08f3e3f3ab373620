"""Figures of a comparison: rank maps, error against parameters and data, learning curves, sparsity against α₁."""

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from .comparison import Comparison
from .comparison_tables import ALL, Column, Line, columns_of, lines_of

_STYLE: Any = {
    "svg.hashsalt": "fused_s2lora", "svg.fonttype": "none", "font.size": 9, "axes.spines.top": False,
    "axes.spines.right": False, "legend.frameon": False,
}  # fmt: skip


def draw_figures(comparison: Comparison) -> dict[str, Path]:
    """Writes every figure the finished runs have data for into `figures/`, as SVG; equal runs give equal files.

    Returns:
        Title and file of each.
    """
    lines = lines_of(comparison)
    columns = [column for column in columns_of(lines) if column.group == ALL]
    figures: dict[str, tuple[str, Callable[[], Figure | None]]] = {
        "rank-map": ("Ranks kept, layer by matrix", lambda: rank_map_figure(lines)),
        "parameters": ("Error against trainable parameters", lambda: _against_parameters(lines, columns)),
        "data": ("Error against amount of data", lambda: _against_data(lines, columns)),
        "learning": ("Learning curves", lambda: learning_figure(lines)),
        "sparsity": ("Sparsity against α₁", lambda: _sparsity(lines)),
    }
    folder = comparison.path / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    drawn = {}
    for name, (title, build) in figures.items():
        with plt.rc_context(_STYLE):
            figure = build()
            if figure is not None:
                drawn[title] = folder / f"{name}.svg"
                figure.savefig(drawn[title], metadata={"Date": None}, bbox_inches="tight")
                plt.close(figure)
    return drawn


def rank_map_figure(lines: list[Line]) -> Figure | None:
    """One panel for each stack of each line that has a rank map: shade and number are the mean |s|, below it the ranks.

    Methods differ in scale, so each panel has its own shades.
    """
    shown = [line for line in lines if line.cells[0]["rank_pattern"] and line.method in ("s2lora", "adalora")]
    shown = [line for line in shown if line.rank == 8 and not line.cells[0]["varied"]]
    if not shown:
        return None
    stacks = max(len(line.cells[0]["rank_pattern"]) for line in shown)
    sizes: dict[str, Any] = {"squeeze": False, "figsize": (4.2 * stacks, 2.6 * len(shown))}
    figure, grid = plt.subplots(len(shown), stacks, **sizes)
    for line, row in zip(shown, grid, strict=True):
        for axes, pattern in zip(row, line.cells[0]["rank_pattern"], strict=False):
            magnitude = np.array(pattern["mean_magnitude"], dtype=float)
            axes.imshow(magnitude, cmap="Blues", vmin=0, aspect="auto")
            top = np.nanmax(magnitude) or 1.0
            for (layer, matrix), value in np.ndenumerate(magnitude):
                live = pattern["live"][layer][matrix]
                if live is not None:
                    text = f"{live}\n{value:.2g}"
                    colour = "white" if value > 0.6 * top else "black"
                    axes.text(matrix, layer, text, ha="center", va="center", fontsize=5, color=colour)
            axes.set_xticks(range(len(pattern["matrices"])), pattern["matrices"], rotation=45, ha="right", fontsize=7)
            axes.set_yticks(range(len(pattern["layers"])), pattern["layers"], fontsize=7)
            axes.set_title(f"{line.label}, {pattern['stack']}: ranks of {pattern['r']}, mean |s|", fontsize=8)
    figure.tight_layout()
    return figure


def _against_parameters(lines: list[Line], columns: list[Column]) -> Figure | None:
    trained = [line for line in lines if line.trainable and not line.cells[0]["varied"]]
    return _panels(
        trained, columns, lambda line: line.trainable, "trainable parameters", lambda line: line.label.partition(",")[0]
    )


def _against_data(lines: list[Line], columns: list[Column]) -> Figure | None:
    amounts = [line for line in lines if line.cells[0]["config"].get("utterances")]
    methods = {line.method for line in amounts}
    whole = [
        line for line in lines
        if line.method in methods and line.rank == 8 and line not in amounts and _plain(line)
    ]  # fmt: skip
    return _panels(amounts + whole, columns, lambda line: line.cells[0]["summary"]["utterances"], "utterances",
                   lambda line: line.label.partition(",")[0]) if amounts else None  # fmt: skip


def _plain(line: Line) -> bool:
    config = line.cells[0]["config"]
    options = ("lr", "sparsity_weight", "target_modules", "sharing", "penalty")
    return all(config.get(name) is None for name in options) and config["preset"] == "default"


def _panels(
    lines: list[Line],
    columns: list[Column],
    position: Callable[[Line], Any],
    label: str,
    series_of: Callable[[Line], str],
) -> Figure | None:
    """Mean error, capped, over `position`, one panel a column and one series a name; bars span the seeds."""
    lines = [line for line in lines if line.cells[0]["results"]]
    if len(lines) < 2:
        return None
    figure, grid = plt.subplots(1, len(columns), figsize=(4 * len(columns), 3.2), squeeze=False)
    for axes, column in zip(grid[0], columns, strict=True):
        series: dict[str, list[tuple[float, list[float]]]] = {}
        for line in lines:
            rates = line.rates(column, "capped_rate")
            if rates:
                series.setdefault(series_of(line), []).append((position(line), rates))
        for name, points in series.items():
            points.sort(key=lambda point: point[0])
            means = [statistics.fmean(rates) for _, rates in points]
            reach = [[mean - min(rates) for mean, (_, rates) in zip(means, points, strict=True)],
                     [max(rates) - mean for mean, (_, rates) in zip(means, points, strict=True)]]  # fmt: skip
            axes.errorbar(
                [x for x, _ in points], means, yerr=reach, marker="o", markersize=4, linewidth=0.8, label=name
            )
        axes.set(xscale="log", xlabel=label, ylabel=f"{column}, capped, %")
    grid[0][-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    return figure


def learning_figure(lines: list[Line]) -> Figure | None:
    """Training cross-entropy over steps, of each line's first seed."""
    curves = {}
    for line in lines:
        history = [entry for entry in line.cells[0]["metrics"] or [] if "loss" in entry and "step" in entry]
        if history and line.rank == 8 and not line.cells[0]["varied"]:
            curves[line.label] = ([entry["step"] for entry in history], [_cross_entropy(entry) for entry in history])
    if not curves:
        return None
    figure, axes = plt.subplots(figsize=(6.4, 3.6))
    colours = plt.get_cmap("tab20")
    for index, (label, (steps, losses)) in enumerate(curves.items()):
        window = min(3, len(losses))
        smooth = np.convolve(losses, np.ones(window) / window, mode="valid")
        axes.plot(steps[window - 1 :], smooth, linewidth=1, label=label, color=colours(index % 20))
    axes.set(xlabel="step", ylabel="cross-entropy per token", yscale="log")
    axes.legend(fontsize=6, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _cross_entropy(entry: dict[str, Any]) -> float:
    return float(entry.get("cross_entropy", entry["loss"]))


def _sparsity(lines: list[Line]) -> Figure | None:
    """Live ranks and mean |s| by matrix over α₁, for the runs that differ from the default in nothing else."""
    points: dict[float, dict[str, float]] = {}
    for line in lines:
        cell = line.cells[0]
        alpha = cell["config"]["sparsity_weight"]
        plain = line.method == "s2lora" and line.rank == 8 and cell["rank_pattern"] and set(cell["varied"]) <= _ALPHA
        if not plain or not _plain_but_alpha(line):
            continue
        points[0.01 if alpha is None else alpha] = _magnitudes(cell["rank_pattern"])
    if len(points) < 2:
        return None
    alphas = sorted(points)
    figure, axes = plt.subplots(figsize=(5, 3.2))
    for matrix in points[alphas[0]]:
        axes.plot(alphas, [points[alpha][matrix] for alpha in alphas], marker="o", markersize=3, label=matrix)
    axes.set_xscale("symlog", linthresh=min(alpha for alpha in alphas if alpha > 0))
    axes.set(xlabel="α₁", ylabel="mean |s|", yscale="log")
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


_ALPHA = {"sparsity_weight"}


def _plain_but_alpha(line: Line) -> bool:
    config = line.cells[0]["config"]
    others = ("lr", "target_modules", "sharing", "penalty", "utterances")
    return all(config.get(name) is None for name in others) and config["preset"] == "default"


def _magnitudes(patterns: list[dict[str, Any]]) -> dict[str, float]:
    """Mean |s| of each matrix over all layers of both stacks; cross-attention's count with their like."""
    found: dict[str, list[float]] = {}
    for pattern in patterns:
        for row in pattern["mean_magnitude"]:
            for matrix, value in zip(pattern["matrices"], row, strict=True):
                if value is not None:
                    found.setdefault(matrix.removeprefix("cross "), []).append(value)
    return {matrix: statistics.fmean(values) for matrix, values in found.items()}
