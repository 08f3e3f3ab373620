"""Every benchmark, or those selected: measured, counted and static results as JSON lines, then tables and plots.

python -m bench.run                                          # what fits this machine, most important first
python -m bench.run --section layer --layer fc1 --size small --rows 1500 --rows 24000 --provider s2-auto
"""

import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.markdown import Markdown
from rich.markup import escape

from bench import layer as layers
from bench import plan, report, static, step
from bench.cases import LAYERS, PRECISIONS, SIZES
from bench.counted import count_layer, count_step
from bench.measure import RESULTS, record
from bench.providers import PROVIDERS
from bench.roofline import Device, measure_device
from fused_s2lora.kernels.arguments import MAX_RANK
from fused_s2lora.training.options import QUANTIZATIONS

SECTIONS = ("device", "step", "layer", "counted", "static")
Many = list[str] | None


def main(
    section: Annotated[Many, typer.Option(help=f"Only these of {', '.join(SECTIONS)}. Repeat.")] = None,
    layer: Annotated[Many, typer.Option(help=f"Linear maps, of {', '.join(LAYERS)}. Repeat.")] = None,
    size: Annotated[Many, typer.Option(help=f"Whispers, of {', '.join(SIZES)}. Repeat.")] = None,
    rows: Annotated[list[int] | None, typer.Option(min=1, help="Rows M of a layer's input. Repeat.")] = None,
    rank: Annotated[
        list[int] | None,
        typer.Option(min=1, max=MAX_RANK, help="Ranks. Repeat. Of static: every rank if asked for alone, else 8."),
    ] = None,
    precision: Annotated[Many, typer.Option(help=f"Of {', '.join(PRECISIONS)}. Repeat.")] = None,
    provider: Annotated[Many, typer.Option(help="Only these providers of a layer. Repeat.")] = None,
    batch: Annotated[list[int] | None, typer.Option(min=1, help="Batch sizes of a step. Repeat.")] = None,
    window: Annotated[Many, typer.Option(help="Of a step: full, trim. Repeat.")] = None,
    tokens: Annotated[
        list[int] | None, typer.Option(min=1, max=448, help="Tokens of a step's transcripts. Repeat.")
    ] = None,
    quantize: Annotated[str | None, typer.Option(help="Of a step: int8, nf4: adapted maps stored so.")] = None,
    method: Annotated[Many, typer.Option(help=f"Of a step: {', '.join(step.METHODS)}. Repeat.")] = None,
    target: Annotated[Many, typer.Option(help=f"Of static: {', '.join(static.TARGETS)}. Repeat.")] = None,
    rounds: Annotated[
        int | None, typer.Option(min=3, help="Calls of each; without it as many as fit the time planned, at least 3.")
    ] = None,
    minutes: Annotated[float, typer.Option(help="Begin nothing more after so many.")] = 14.0,
    results: Annotated[
        Path, typer.Option(file_okay=False, writable=True, help="Folder of the JSON lines, tables and plots.")
    ] = RESULTS,
) -> None:
    """Measures, counts and compiles; each result is on disk before the next is begun."""
    known = {
        "--section": (section, SECTIONS), "--layer": (layer, LAYERS), "--size": (size, SIZES),
        "--precision": (precision, PRECISIONS), "--method": (method, step.QUANTIZABLE if quantize else step.METHODS),
        "--window": (window, ("full", "trim")), "--target": (target, static.TARGETS),
        "--quantize": (quantize and [quantize], QUANTIZATIONS), "--provider": (provider, PROVIDERS),
    }  # fmt: skip
    for option, (given, allowed) in known.items():
        for value in given or ():
            if value not in allowed:
                raise typer.BadParameter(f"{value!r} is not one of {', '.join(allowed)}", param_hint=option)
    chosen = plan.cuda() if torch.cuda.is_available() else plan.cpu()
    sections = set(section or SECTIONS)
    if layer or rows or precision or ((size or rank) and sections & {"layer", "counted"}):
        defaults = (layer or ["encoder-layer"], size or ["base"], rows or [1040], rank or [8], precision or ["bf16"])
        cases = plan.layer_cases(*defaults)
        chosen = replace(chosen, layers=cases, sweep=[], counted_layers=cases)
    if batch or window or tokens or quantize or ((size or rank) and sections & {"step", "counted"}):
        steps = plan.step_cases(size or ["base"], batch or [4], window or ["full"], tokens or [16], rank or [8])
        chosen = replace(chosen, counted_steps=steps, steps=[replace(one, quantize=quantize) for one in steps])
    # Builds of every rank take several minutes more, so that they have to be asked for.
    static_ranks = rank or ([] if section and "static" in section else [8])
    methods = method or list(step.METHODS)
    if rounds:
        chosen = replace(chosen, rounds=rounds, seconds=math.inf)
    run = Run(chosen, results, minutes, provider, methods, target, static_ranks)
    for name in chosen.order:
        if not section or name in section or (name == "sweep" and "layer" in section):
            run.section(name)
    run.end()


class Run:
    """One call of the command: what to do, where results go, and until when."""

    def __init__(
        self, chosen: plan.Plan, results: Path, minutes: float, providers: Many, methods: list[str],
        targets: Many, static_ranks: list[int],
    ) -> None:  # fmt: skip
        self.plan, self.results = chosen, results
        self.providers, self.methods, self.targets = providers, methods, targets or list(static.TARGETS)
        self.static_ranks = static_ranks
        self.until = time.monotonic() + 60 * minutes
        self.console = Console()
        self.rows: list[dict[str, Any]] = []
        self.left_out: list[str] = []
        self._device: Device | None = None

    @property
    def device(self) -> Device:
        """The device in hand with its measured rates."""
        if self._device is None:
            self._device = measure_device()
            rates = {"copy_gb_per_s": self._device.copy_gb_per_s, "matrix_tflops": self._device.matrix_tflops}
            self.keep([{"section": "device", "provider": "torch", "kind": "measured", **rates}])
        return self._device

    def section(self, name: str) -> None:
        """Runs one section of the plan."""
        if name == "device":
            _ = self.device
        elif name in ("layer", "sweep"):
            for case in self.within(self.plan.layers if name == "layer" else self.plan.sweep):
                limits = {"rounds": self.plan.rounds, "seconds": self.plan.seconds}
                self.keep(layers.measure(case, self.device, only=self.providers, **limits))
        elif name == "step":
            for case in self.within(self.plan.steps):
                seconds = 3 * self.plan.seconds
                for row in step.measure(case, methods=self.methods, rounds=self.plan.rounds, seconds=seconds):
                    self.keep([row])
        elif name == "counted":
            for case in self.within(self.plan.counted_layers):
                self.keep(count_layer(case, only=self.providers))
            for case in self.within(self.plan.counted_steps):
                self.keep(count_step(case, self.methods))
        else:
            ranks = f"of rank {', '.join(map(str, self.static_ranks))}" if self.static_ranks else "of every rank"
            for name in self.within([f"kernels {ranks} for sm_{target}" for target in self.targets]):
                self.keep(static.report([name.rpartition("_")[2]], self.static_ranks))

    def within(self, cases: Iterable[Any]) -> Iterator[Any]:
        """The cases that can still be begun in time, each announced."""
        for case in cases:
            if time.monotonic() > self.until:
                self.left_out.append(str(case))
                continue
            left = math.ceil((self.until - time.monotonic()) / 60)
            self.console.print(f"[dim]{case}  ({left} min left)[/dim]", soft_wrap=True)
            yield case

    def keep(self, rows: Iterable[dict[str, Any]]) -> None:
        """Appends rows to the results, and shows what was refused."""
        rows = list(rows)
        for section in {row["section"] for row in rows}:
            mine = [row for row in rows if row["section"] == section]
            self.rows += record(self.results / f"{section}.jsonl", mine)
        for refused in (row for row in rows if row["kind"] == "refused"):
            self.console.print("[red]refused[/red]", escape(f"{refused['provider']}: {refused['reason']}"))

    def end(self) -> None:
        """Draws tables and plots of all results in the folder, prints those of this run."""
        if self.left_out:
            self.console.print(f"no time for: {'; '.join(self.left_out)}; give --minutes more, or select")
        if not self.rows:
            return
        report.write(self.results)
        text = report.tables(self.rows)
        if self.console.is_terminal:
            self.console.print(Markdown(text))
        else:
            print(text)
        self.console.print(f"results, tables.md and plots: {self.results}", markup=False, soft_wrap=True)


if __name__ == "__main__":
    typer.run(main)
