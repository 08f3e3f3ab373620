"""How figures look, and the one of a single run: its learning curve."""

import io
from collections.abc import Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

STYLE: Any = {
    "svg.hashsalt": "fused_s2lora", "svg.fonttype": "none", "font.size": 9, "axes.spines.top": False,
    "axes.spines.right": False, "legend.frameon": False, "text.parse_math": False,
}  # fmt: skip


def svg_of(figure: Figure) -> str:
    """The figure as SVG, the same for equal figures, laid out and closed."""
    figure.tight_layout()
    drawn = io.StringIO()
    figure.savefig(
        drawn, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")), bbox_inches="tight"
    )
    plt.close(figure)
    return drawn.getvalue()


def scale_by_logarithm(axes: Axes) -> None:
    """A logarithmic y axis with its numbers written out: every tick's where there are few, else those of 1, 2 and 5."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    if high > 4 * low:
        write_out(axes.yaxis)
    else:
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")


def write_out(axis: Axis) -> None:
    """The numbers 1, 2 and 5 of each power of ten along a logarithmic axis."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def training_curve(metrics: Sequence[dict[str, Any]] | None) -> tuple[list[int], list[float]]:
    """Steps and cross-entropy per token of a run's metrics.json, without penalties where they were logged apart."""
    logged = [entry for entry in metrics or () if "loss" in entry and "step" in entry]
    return [entry["step"] for entry in logged], [float(entry.get("cross_entropy", entry["loss"])) for entry in logged]


def running_mean(steps: list[int], values: list[float]) -> tuple[list[int], np.ndarray]:
    """Means over three values or a tenth of them, and the step of the last of each."""
    window = max(min(3, len(values)), len(values) // 10)
    return steps[window - 1 :], np.convolve(values, np.ones(window) / window, mode="valid")


def run_svg(metrics: Sequence[dict[str, Any]]) -> str | None:
    """Cross-entropy per token over steps, in training and on the development set; None where there is no curve."""
    steps, losses = training_curve(metrics)
    if len(steps) < 2:
        return None
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(7.5, 3.6))
        axes.plot(steps, losses, linewidth=0.7, color="tab:blue", alpha=0.35)
        axes.plot(*running_mean(steps, losses), linewidth=1.3, color="tab:blue", label="training")
        held_out = [(entry["step"], entry["eval_loss"]) for entry in metrics if "eval_loss" in entry]
        if held_out:
            axes.plot(*zip(*held_out, strict=True), marker="o", markersize=4, color="tab:orange", label="development")
            axes.legend(fontsize=8)
        axes.set(xlabel="step", ylabel="cross-entropy per token")
        if min(losses) > 0:
            scale_by_logarithm(axes)
        return svg_of(figure)
