"""Figures of result lines: the roofline, time by rows, training throughput, and bytes moved."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from bench.cases import Case
from bench.measure import of_one_run
from fused_s2lora.training.figures import write_out

Row = dict[str, Any]
_CASE = tuple(Case.__dataclass_fields__)
_COLOURS = {
    "frozen": "0.55", "full": "0.25", "addmm-lora": "tab:olive", "peft-lora": "tab:orange",
    "peft-lora-half": "tab:brown", "peft-adalora": "tab:pink", "peft-vera": "tab:purple", "lora-qv": "tab:olive",
    "addmm-lora-six": "black", "lora-six": "tab:orange",
    "adalora-six": "tab:pink", "vera-six": "tab:purple", "s2-reference": "lightblue",
    "s2-compiled": "tab:cyan", "s2-auto": "tab:blue", "s2-merged": "tab:green", "s2-fused": "navy",
    "s2-split": "yellowgreen", "s2-augmented": "slateblue",
    "s2lora": "tab:blue", "s2lora-merged": "tab:green", "s2lora-fused": "navy", "s2lora-split": "yellowgreen",
    "s2lora-augmented": "slateblue", "s2lora-sdpa": "steelblue", "s2lora-unshared": "teal",
}  # fmt: skip


def _colour(provider: str) -> str:
    """A provider's colour in every plot; red for one that has none yet."""
    return _COLOURS.get(provider, "tab:red")


def draw(rows: Iterable[Row], folder: Path) -> None:
    """Writes an SVG for every figure these rows have data for; equal rows give equal files."""
    rows = list(rows)
    folder.mkdir(parents=True, exist_ok=True)
    plt.rcParams.update({"svg.hashsalt": "fused_s2lora", "font.size": 9, "axes.spines.top": False})
    plt.rcParams.update({"axes.spines.right": False, "legend.frameon": False})
    for device in dict.fromkeys(row["device"] for row in rows if row["kind"] == "measured"):
        here = [row for row in rows if row["device"] == device and row["kind"] == "measured"]
        kind = "-".join(device.lower().replace("(", "").replace(")", "").replace(",", "").split())
        _save(_roofline(device, here), folder / f"roofline-{kind}.svg")
        _save(_time_by_rows(device, here), folder / f"time-by-rows-{kind}.svg")
        _save(_throughput(device, here), folder / f"step-throughput-{kind}.svg")
    _save(_bytes([row for row in rows if row["kind"] == "counted"]), folder / "bytes-counted.svg")


def _save(figure: Figure | None, file: Path) -> None:
    if figure is not None:
        figure.savefig(file, metadata={"Date": None}, bbox_inches="tight")
        plt.close(figure)


def _rounded(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _in_order(rows: list[Row]) -> list[Row]:
    """By provider, as all plots and legends have them."""
    order = [*_COLOURS]
    return sorted(rows, key=lambda row: order.index(row["provider"]) if row["provider"] in order else len(order))


def _roofline(device: str, rows: list[Row]) -> Figure | None:
    """Achieved rate of the work a case cannot do without, against that work's flops a byte."""
    limits = [row for row in rows if row["section"] == "device"]
    both = _in_order([row for row in rows if row["section"] == "layer" and row["pass"] == "both"])
    if not (limits and both):
        return None
    bandwidth, matrix = limits[-1]["copy_gb_per_s"] * 1e9, limits[-1]["matrix_tflops"]
    figure, axes = plt.subplots(figsize=(6.4, 4))
    intensities = []
    for provider in dict.fromkeys(row["provider"] for row in both):
        points = []
        for row in (row for row in both if row["provider"] == provider):
            work = [Case(**{name: row[name] for name in _CASE}).minimum(backward) for backward in (False, True)]
            moved, flops = (sum(values) for values in zip(*work, strict=True))
            points.append((flops / moved, flops / row["p50_ms"] / 1e9))
        intensities += [intensity for intensity, _ in points]
        x, y = zip(*points, strict=True)
        axes.scatter(x, y, s=18, label=provider, color=_colour(provider))
    span = [min(intensities) / 2, max(intensities) * 2]
    axes.plot(span, [value * bandwidth / 1e12 for value in span], color="black", linewidth=1)
    for rate in {matrix[row["precision"]] for row in both}:
        precisions = dict.fromkeys(row["precision"] for row in both if matrix[row["precision"]] == rate)
        axes.axhline(rate, color="black", linewidth=1, linestyle=":")
        axes.annotate(f" product in {', '.join(precisions)}", (span[0], rate), va="bottom", fontsize=7)
    axes.set(xscale="log", yscale="log", xlabel="flops / byte (least possible)", ylabel="TFLOP/s", xlim=span)
    write_out(axes.xaxis)
    write_out(axes.yaxis)
    axes.set_title(f"Linear maps, forward + backward, measured\n{device}", fontsize=9)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _time_by_rows(device: str, rows: list[Row]) -> Figure | None:
    """Time of the encoder layer's maps over the frozen ones, by rows."""
    both = [
        row for row in rows if row["section"] == "layer" and row["pass"] == "both" and row["layer"] == "encoder-layer"
    ]
    series: dict[tuple, dict[str, dict[int, Row]]] = {}
    for row in _in_order(both):
        group = series.setdefault((row["size"], row["precision"], row["rank"]), {})
        group.setdefault(row["provider"], {})[row["rows"]] = row
    series = {key: group for key, group in series.items() if len(group.get("frozen", {})) > 1}
    if not series:
        return None
    figure, grid = plt.subplots(1, len(series), figsize=(5 * len(series), 3.6), squeeze=False)
    for axes, ((size, precision, rank), group) in zip(grid[0], series.items(), strict=True):
        for provider, times in group.items():
            frozen = group["frozen"]
            x = sorted(m for m in times if m in frozen and of_one_run(times[m], frozen[m]))
            if not x:
                continue
            y = [times[m]["p50_ms"] / frozen[m]["p50_ms"] for m in x]
            axes.plot(x, y, marker="o", markersize=3, label=provider, color=_colour(provider))
        axes.set(xscale="log", xlabel="rows M", ylabel="time / frozen")
        axes.set_xticks([*group["frozen"]], [f"{m:,}" for m in group["frozen"]])
        axes.minorticks_off()
        axes.set_title(f"{size} encoder layer, {precision}, rank {rank}\n{device}", fontsize=9)
    grid[0][-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _throughput(device: str, rows: list[Row]) -> Figure | None:
    """Audio seconds a second of a training step, by method."""
    steps = [row for row in rows if row["section"] == "step"]
    if not steps:
        return None
    cases: dict[str, list[Row]] = {}
    for row in steps:
        window = "30 s" if row["window"] == "full" else "trimmed"
        window += f", {row['quantize']}" if row.get("quantize") else ""
        case = f"{row['size']}, batch {row['batch']}, {window}, {row['tokens']} tokens, rank {row['rank']}"
        cases.setdefault(case, []).append(row)
    title = f"Training step, bf16 autocast, measured · {device}"
    return _bars(cases, "audio_s_per_s", 1, "audio seconds / second", title)


def _bytes(rows: list[Row]) -> Figure | None:
    """Bytes moved by the maps of one encoder layer, by provider."""
    layers = [row for row in rows if row["section"] == "layer" and row["layer"] == "encoder-layer"]
    if not layers:
        return None
    cases: dict[str, list[Row]] = {}
    for row in layers:
        cases.setdefault(f"{row['size']}, M {row['rows']:,}, {row['precision']}, rank {row['rank']}", []).append(row)
    title = "Bytes read and written by an encoder layer's linear maps, counted"
    return _bars(cases, "counted_bytes", 1e9, "GB, forward + backward", title)


def _bars(cases: dict[str, list[Row]], key: str, unit: float, label: str, title: str) -> Figure:
    """A panel for each case with a bar for each provider: what its row has under `key`, in `unit`s."""
    figure, grid = plt.subplots(1, len(cases), figsize=(4.2 * len(cases), 3), squeeze=False)
    for axes, (case, unordered) in zip(grid[0], cases.items(), strict=True):
        found = _in_order(unordered)
        names = [row["provider"] for row in found]
        amounts = [row[key] / unit for row in found]
        bars = axes.barh(names, amounts, color=[_colour(name) for name in names])
        axes.bar_label(bars, fmt=_rounded, padding=2, fontsize=7)
        axes.invert_yaxis()
        axes.set(xlabel=label)
        axes.set_title(case, fontsize=9)
    figure.suptitle(title, fontsize=9)
    figure.tight_layout()
    return figure
