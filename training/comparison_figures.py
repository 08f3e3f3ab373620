"""Figures of a comparison: rank maps, learning curves, sparsity; error over parameters, data and error elsewhere."""

import itertools
import statistics
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, NullFormatter

from fused_s2lora import S2LoraConfig

from .comparison import ZERO_SHOT, Comparison
from .comparison_lines import METHOD_OPTIONS, Column, Line, columns_of, lines_of
from .evaluation import ALL
from .figures import STYLE, running_mean, scale_by_logarithm, svg_of, training_curve
from .output import write_text


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
        "other-speech": ("Error in other speech, by the share of the update", lambda: _other_speech(lines, columns)),
        "learning": ("Learning curves", lambda: learning_figure(lines)),
        "sparsity": ("Sparsity against α₁", lambda: _sparsity(lines)),
    }
    folder = comparison.path / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    drawn = {}
    for name, (title, build) in figures.items():
        with plt.rc_context(STYLE), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing")  # names are text in SVG: the viewer has the fonts
            figure = build()
            if figure is not None:
                drawn[title] = folder / f"{name}.svg"
                write_text(drawn[title], svg_of(figure))
    return drawn


_KEEPING = {"keep_share", "keep_languages", "learn_language"}
_OTHER_MAPS = {
    "s2lora": _KEEPING | {"sharing", "target_modules", "exclude_modules", "freeze_factors", "interpolation"},
    "adalora": _KEEPING,
}


def _own_options(line: Line) -> set[str]:
    """The options of the row itself; one that it leaves to the preset, where the file has another for all, is none."""
    return {name for name in line.changed if line.first["config"][name] is not None}


def rank_map_figure(lines: list[Line]) -> Figure | None:
    """One panel for each stack of S2-LoRA and of AdaLoRA: shade and number are the mean |s|, above it the ranks.

    S2-LoRA by its penalties, all factors shared as published, and AdaLoRA also on all six kinds of weight, both without
    other languages to keep; every other map is in the report. Methods differ in scale: each panel has its own shades.
    """
    shown = [
        line for line in lines
        if line.first["rank_pattern"] and line.rank == 8 and not line.varied
        and line.method in _OTHER_MAPS and not _own_options(line) & _OTHER_MAPS[line.method]
    ]  # fmt: skip
    if not shown:
        return None
    stacks = max(len(line.first["rank_pattern"]) for line in shown)
    sizes: dict[str, Any] = {"squeeze": False, "figsize": (5.2 * stacks, 3.1 * len(shown))}
    figure, grid = plt.subplots(len(shown), stacks, **sizes)
    for line, row in zip(shown, grid, strict=True):
        for axes, pattern in zip(row, line.first["rank_pattern"], strict=False):
            magnitude = np.array(pattern["mean_magnitude"], dtype=float)
            axes.imshow(magnitude, cmap="Blues", vmin=0, aspect="auto")
            top = np.nanmax(magnitude) or 1.0
            for (layer, matrix), value in np.ndenumerate(magnitude):
                live = pattern["live"][layer][matrix]
                if live is not None:
                    text = f"{live}\n{value:.1g}"
                    colour = "white" if value > 0.6 * top else "black"
                    axes.text(
                        matrix, layer, text, ha="center", va="center", fontsize=6.5, linespacing=0.95, color=colour
                    )
            axes.set_xticks(range(len(pattern["matrices"])), pattern["matrices"], rotation=30, ha="right", fontsize=8)
            axes.set_yticks(range(len(pattern["layers"])), pattern["layers"], fontsize=8)
            axes.set_title(f"{line.label}, {pattern['stack']}: ranks of {pattern['r']}, mean |s|", fontsize=9)
    return figure


_OF_SIZE = {"preset", "target_modules", "sharing"}


def _against_size(lines: list[Line]) -> list[Line]:
    """Those trained as the first was, with methods as the file has them but for what decides their size, and rates of
    full fine-tuning."""
    shown: list[Line] = []
    for line in (line for line in lines if line.trainable and not line.varied):
        other = line.unlike(shown[0]) if shown else set()
        allowed = _OF_SIZE | ({"lr"} if line.method == "full" else set())
        if line.changed & other <= allowed and other - {*METHOD_OPTIONS} <= {"method", "rank"}:
            shown.append(line)
    return shown


def _against_parameters(lines: list[Line], columns: list[Column]) -> Figure | None:
    return _panels(
        _against_size(lines), columns, lambda line: line.trainable, "trainable parameters", lambda line: line.label
    )


def _against_data(lines: list[Line], columns: list[Column]) -> Figure | None:
    amounts = [line for line in lines if line.trainable and line.changed == {"utterances"} and line.rank == 8]
    ours = [
        line for line in lines if not line.varied and any(line.unlike(amount) == {"utterances"} for amount in amounts)
    ]
    # Of amounts that are also passed over more often those are shown that are not.
    amounts = [amount for amount in amounts if any(amount.unlike(line) == {"utterances"} for line in ours)]
    names = {line.method: line.label for line in (*amounts, *ours)}
    return _panels(amounts + ours, columns, lambda line: line.first["summary"]["utterances"], "utterances",
                   lambda line: names[line.method]) if amounts else None  # fmt: skip


def _panels(
    lines: list[Line],
    columns: list[Column],
    position: Callable[[Line], Any],
    label: str,
    series_of: Callable[[Line], str],
) -> Figure | None:
    """Mean error, capped, over `position`, one panel a column and one series a name; bars span the seeds."""
    lines = [line for line in lines if line.first["results"]]
    if len(lines) < 2 or not columns:
        return None
    looks = _looks("os^Dv", map(series_of, lines))
    drawn: dict[str, Any] = {}
    height = max(3.6, 0.17 * len(looks))  # of a panel, and of the names beside them
    figure, grid = plt.subplots(1, len(columns), figsize=(4 * len(columns) + 2, height), squeeze=False)
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
            shape, colour = looks[name]
            style = {"marker": shape, "color": colour, "markersize": 4, "linewidth": 0.8}
            drawn[name] = axes.errorbar([x for x, _ in points], means, yerr=reach, **style)
        axes.set(xscale="log", xlabel=label, ylabel=f"{column}, capped, %")
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.xaxis.set_minor_formatter(NullFormatter())
        shown = [rate for points in series.values() for _, rates in points for rate in rates]
        if min(shown, default=0) > 0 and max(shown) > 3 * min(shown):  # a language that is lost
            scale_by_logarithm(axes)
        positions = sorted({position(line) for line in lines})
        if all(after > 1.8 * before for before, after in itertools.pairwise(positions)) and len(positions) < 6:
            axes.set_xticks(positions, [f"{value:,}" for value in positions])
            axes.minorticks_off()
    _name_beside(grid[0][-1], {name: drawn[name] for name in looks if name in drawn}, fontsize=7)
    return figure


def _looks(shapes: Iterable[str], names: Iterable[str]) -> dict[str, tuple[str, Any]]:
    """A shape and a colour of each name, the same in every panel; those of the first again where there are no more."""
    looks = itertools.product(shapes, plt.get_cmap("tab10").colors)  # type: ignore[attr-defined]
    return dict(zip(dict.fromkeys(names), itertools.cycle(looks), strict=False))


def _name_beside(axes: Axes, drawn: dict[str, Any], *, fontsize: float) -> None:
    """A legend of what was drawn by these names, which Matplotlib would leave out where they begin with _."""
    axes.legend([*drawn.values()], [*drawn], fontsize=fontsize, loc="center left", bbox_to_anchor=(1, 0.5))


def _other_speech(lines: list[Line], columns: list[Column]) -> Figure | None:
    """Error in each further set over that in the first, capped, means over seeds; down and left is better.

    Rows that differ in nothing but the share kept of their update are one curve, with the shares at its points, where
    there are two or more of them; the methods with nothing changed are points, zero-shot is a line.
    """
    if len(columns) < 2:
        return None
    curves: list[list[Line]] = []
    for line in lines:
        if not (line.trainable and line.rates(columns[0]) and any(map(line.rates, columns[1:]))):
            continue
        alike = next((curve for curve in curves if line.unlike(curve[0]) <= {"interpolation"}), None)
        curves.append([line]) if alike is None else alike.append(line)
    shown = [curve for curve in curves if len({line.share for line in curve} - {None}) > 1]
    if not shown:
        return None
    shown += [
        curve for curve in curves if curve not in shown and curve[0].rank == 8 and not _own_options(curve[0])
    ]  # fmt: skip
    named = {_curve_name(curve): curve for curve in shown}
    looks = _looks("os^Dv", named)
    drawn: dict[str, Any] = {}
    width = 5.2 * (len(columns) - 1)
    figure, grid = plt.subplots(1, len(columns) - 1, figsize=(width, 4.6), squeeze=False)
    for axes, column in zip(grid[0], columns[1:], strict=True):
        for label, curve in named.items():
            told = [line for line in curve if line.share is not None] or curve
            points = {line.share: [line.mean_rate(one, "capped_rate") for one in (columns[0], column)] for line in told}
            placed = sorted((share or 0, *point) for share, point in points.items() if None not in point)
            if not placed:
                continue  # not scored on both
            shape, colour = looks[label]
            style = {"marker": shape, "color": colour, "markersize": 4, "linewidth": 0.9}
            (drawn[label],) = axes.plot([x for _, x, _ in placed], [y for _, _, y in placed], **style)
            for share, x, y in placed if len(placed) > 1 else []:
                offset = {"xytext": (3, 3), "textcoords": "offset points"}
                axes.annotate(f"{share:g}", (x, y), fontsize=6, color=colour, **offset)
        for line in (line for line in lines if line.method == ZERO_SHOT):
            if (y := line.mean_rate(column, "capped_rate")) is not None:
                drawn[line.label] = axes.axhline(y, color="grey", linewidth=0.8, linestyle=":")
        axes.set(xlabel=f"{columns[0]}, capped, %", ylabel=f"{column}, capped, %")
        if min((y for line in axes.get_lines() for y in line.get_ydata()), default=0) > 0:
            scale_by_logarithm(axes)  # of a language that is lost it may be five times that of one that is kept
    _name_beside(grid[0][-1], drawn, fontsize=7)
    return figure


def _curve_name(curve: list[Line]) -> str:
    plain = min(curve, key=lambda line: (line.varied, len(line.changed)))
    return plain.label + (f", r = {plain.rank}" if plain.rank != 8 else "")


def learning_figure(lines: list[Line]) -> Figure | None:
    """Training cross-entropy over steps, of each line's `first` seed: the methods, and S2-LoRA's ablations.

    Rows trained as long as the first, and one for those that differ in the share of the update alone; running means,
    for batches differ by more than methods.
    """
    panels: dict[str, dict[str, tuple[list[int], list[float]]]] = {"methods": {}, "S2-LoRA": {}}
    trained = [line for line in lines if line.trainable]
    for index, line in enumerate(trained):
        curve = training_curve(line.first["metrics"])
        known = any(line.unlike(other) <= {"interpolation"} for other in trained[:index])
        if not curve[0] or line.rank != 8 or line.varied or known or "epochs" in line.unlike(trained[0]):
            continue
        if line.method == "s2lora":
            panels["S2-LoRA"][line.label] = curve
        if line.method != "s2lora" or not line.changed:
            panels["methods"][line.label] = curve
    panels = {title: curves for title, curves in panels.items() if curves}
    if not panels:
        return None
    figure, grid = plt.subplots(1, len(panels), figsize=(7.5 * len(panels), 4.2), squeeze=False, sharey=True)
    for axes, (title, curves) in zip(grid[0], panels.items(), strict=True):
        drawn = {}
        for label, (dashes, colour) in _looks(("-", "--", ":"), curves).items():
            means = running_mean(*curves[label])
            (drawn[label],) = axes.plot(*means, linewidth=1, linestyle=dashes, color=colour)
        axes.set(xlabel="step", ylabel="cross-entropy per token", title=title)
        scale_by_logarithm(axes)
        _name_beside(axes, drawn, fontsize=6.5)
    return figure


def _sparsity(lines: list[Line]) -> Figure | None:
    """Mean |s| and share of live ranks by matrix over α₁, for the runs that differ from the default in nothing else."""
    points: dict[float, dict[str, tuple[float, float]]] = {}
    able = [
        line for line in lines
        if line.method == "s2lora" and line.rank == 8 and line.changed <= {"sparsity_weight"}
        and line.first["rank_pattern"]
    ]  # fmt: skip
    for line in able:
        if line.unlike(able[0]) <= {"sparsity_weight"}:
            given = line.first["config"]["sparsity_weight"]
            alpha = S2LoraConfig().sparsity_weight if given is None else given
            points.setdefault(alpha, _sizes(line.first["rank_pattern"]))
    if len(points) < 2:
        return None
    alphas = sorted(points)
    figure, grid = plt.subplots(1, 2, figsize=(9, 3.2))
    for index, (axes, label) in enumerate(zip(grid, ("mean |s|", "live ranks, %"), strict=True)):
        for matrix in points[alphas[0]]:
            values = [points[alpha][matrix][index] for alpha in alphas]
            axes.plot(alphas, values, marker="o", markersize=3, label=matrix)
        axes.set_xscale("symlog", linthresh=min(alpha for alpha in alphas if alpha > 0))
        axes.set_xticks(alphas, [f"{alpha:g}" for alpha in alphas])
        axes.minorticks_off()
        axes.set(xlabel="α₁", ylabel=label)
    scale_by_logarithm(grid[0])
    grid[1].set_ylim(0, 105)
    grid[1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _sizes(patterns: list[dict[str, Any]]) -> dict[str, tuple[float, float]]:
    """Mean |s| and percent of live ranks of each matrix over all layers; cross-attention's count with their like."""
    found: dict[str, list[tuple[float, float]]] = {}
    for pattern in patterns:
        for magnitudes, live in zip(pattern["mean_magnitude"], pattern["live"], strict=True):
            for matrix, size, ranks in zip(pattern["matrices"], magnitudes, live, strict=True):
                if size is not None:
                    entry = (size, 100 * ranks / pattern["r"])
                    found.setdefault(matrix.removeprefix("cross "), []).append(entry)
    return {
        matrix: (statistics.fmean(size for size, _ in entries), statistics.fmean(share for _, share in entries))
        for matrix, entries in found.items()
    }
