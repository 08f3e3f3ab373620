"""Tables and plots, drawn from result lines only.

python -m bench.report [results folder]
"""

import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from bench.cases import Case
from bench.measure import RESULTS, of_one_run
from bench.plots import draw
from bench.step import StepCase
from fused_s2lora.training.output import markdown_table

Row = dict[str, Any]
_NO_FIGURE = {"measured": "refused", "counted": "not counted"}
_CASE = tuple(Case.__dataclass_fields__)
_STEP_CASE = tuple(StepCase.__dataclass_fields__)
_IDENTITY = (
    "section", "device", "kind", "provider", "pass", "kernel", "config", "direction", "dtype", "R", "target",
    *_CASE, *_STEP_CASE,
)  # fmt: skip


def load(results: Path) -> list[Row]:
    """The newest line of each case, provider, pass and device in the folder's JSON lines, in the order of the files.

    What is no JSON, as the last line of a run that was killed, is left out and told on stderr. Of what does not depend
    on the device that it was found on, what is counted or static, the newest is that of any device.
    """
    newest: dict[tuple, Row] = {}
    for file in sorted(results.glob("*.jsonl")):
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            try:
                row = json.loads(line)
            except ValueError:
                print(f"{file}, line {number}: no result, and left out", file=sys.stderr)
                continue
            anywhere = row["kind"] in ("counted", "not counted", "static")
            identity = tuple(str(row.get(name)) for name in _IDENTITY if not (anywhere and name == "device"))
            newest.pop(identity, None)
            newest[identity] = row
    return list(newest.values())


def write(results: Path = RESULTS) -> None:
    """Draws `tables.md` and `plots/` of a results folder anew."""
    rows = load(results)
    (results / "tables.md").write_text(
        "# Results\n\nDrawn by `python -m bench.report` from the JSON lines beside this file; how to read them is in "
        "`bench/README.md`.\n\n" + tables(rows),
        encoding="utf-8",
    )
    draw(rows, results / "plots")


def tables(rows: Iterable[Row]) -> str:
    """All tables of these rows, in Markdown."""
    rows = list(rows)
    parts = [
        _devices([row for row in rows if row["section"] == "device"]),
        *_each_case(rows, "step", "measured", _measured_step),
        *_each_case(rows, "layer", "measured", _measured_layer),
        *_host([row for row in rows if row["section"] == "host"]),
        *_each_case(rows, "layer", "counted", _counted),
        *_each_case(rows, "step", "counted", _counted),
        _static([row for row in rows if row["section"] == "static"]),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _each_case(rows: list[Row], section: str, kind: str, table: Callable[[list[Row]], str]) -> list[str]:
    """One table for every case and, where it was measured, device; refusals are named under it."""
    grouped: dict[tuple, list[Row]] = {}
    for row in rows:
        if row["section"] != section or row["kind"] not in (kind, _NO_FIGURE[kind]):
            continue
        device = _device(row) if kind == "measured" else ""
        grouped.setdefault((case_of(row), device), []).append(row)
    parts = []
    for (case, device), lines in grouped.items():
        latest = {row["provider"]: row["kind"] for row in lines}  # what was refused may have been measured since
        found = [row for row in lines if row["kind"] == latest[row["provider"]]]
        heading = f"### {case}, {kind}" + (f" · {device}" if device else "")
        left_out = [f"{row['provider']}: {row['kind']}, {row['reason']}" for row in found if "reason" in row]
        body = [row for row in found if "reason" not in row]
        parts.append("\n\n".join([heading, *([table(body)] if body else []), *left_out]))
    return parts


def case_of(row: Row) -> str:
    """What a row of a layer or a step is about."""
    if row["section"] == "layer":
        return str(Case(**{name: row[name] for name in _CASE}))
    return str(StepCase(**{name: row[name] for name in _STEP_CASE if name in row}))


def _device(row: Row) -> str:
    return f"{row['device']}, {row['utc'][:10]}"


def _devices(rows: list[Row]) -> str:
    if not rows:
        return ""
    names = list(rows[0]["matrix_tflops"])
    lines = [
        [_device(row), f"{row['copy_gb_per_s']:,.0f}", *(f"{row['matrix_tflops'][name]:.2f}" for name in names)]
        for row in rows
    ]
    heads = ["device", "copy GB/s", *(f"{name} TFLOP/s" for name in names)]
    return "### Devices, measured\n\n" + markdown_table(heads, lines)


def _measured_layer(rows: list[Row]) -> str:
    passes = {(row["provider"], row["pass"]): row for row in rows}
    both = {row["provider"]: row for row in rows if row["pass"] == "both"}
    on_gpu = any("gpu_p50_ms" in row for row in rows)
    lines = []
    for name, row in both.items():
        single = [
            _number(passes[name, which]["p50_ms"]) for which in ("forward", "backward") if (name, which) in passes
        ]
        peak = f"{row['peak_mib']:.0f}" if "peak_mib" in row else f"{row.get('counted_peak_mib', '–')} c"
        percentiles = " / ".join(_number(row[key]) for key in ("p20_ms", "p50_ms", "p80_ms"))
        ratios = [_ratio(row, both.get(other), "p50_ms") for other in ("frozen", "addmm-lora", "peft-lora")]
        over_floor = f"{row['p50_ms'] / row['floor_ms']:.2f}"
        line = [name, *single, percentiles, *ratios, over_floor, peak, str(row.get("counted_launches", "–"))]
        if on_gpu:
            line += _gpu_time(row, both.get("frozen"), "gpu_p50_ms")
        lines.append(line)
    heads = [
        "provider", "forward ms", "backward ms", "both p20 / p50 / p80 ms", "/ frozen", "/ addmm-lora", "/ peft-lora",
        "/ floor", "peak MiB", "launches c", *(["both, queued ms", "/ frozen"] if on_gpu else []),
    ]  # fmt: skip
    return markdown_table(heads, lines)


def _measured_step(rows: list[Row]) -> str:
    named = {row["provider"]: row for row in rows}
    frozen, lora = named.get("frozen"), named.get("lora-six")
    on_gpu = any("gpu_ms" in row for row in rows)
    lines = []
    for name, row in named.items():
        line = [
            name,
            " / ".join(_number(row[key]) for key in ("p20_ms", "p50_ms", "p80_ms")),
            _ratio(row, frozen, "p50_ms"),
            _ratio(row, lora, "p50_ms"),
            f"{row['audio_s_per_s']:.1f}",
            f"{row['peak_mib']:.0f}",
            _ratio(row, lora, "peak_mib"),
            str(row.get("launches", "–")),
        ]
        if on_gpu:
            line += _gpu_time(row, frozen, "gpu_ms")
        lines.append(line)
    heads = [
        "method", "p20 / p50 / p80 ms", "/ frozen", "/ lora-six", "audio s / s", "peak MiB", "/ lora-six", "launches",
        *(["GPU ms", "/ frozen"] if on_gpu else []),
    ]  # fmt: skip
    return markdown_table(heads, lines)


def _counted(rows: list[Row]) -> str:
    named = {row["provider"]: row for row in rows}
    frozen = named.get("frozen")
    peft = named.get("peft-lora", named.get("lora-six"))
    gpus = list(rows[0]["implied_ms"])
    lines = []
    for name, row in named.items():
        beyond = [
            f"{(row[key] - frozen[key]) / (peft[key] - frozen[key]):.2f}" if frozen and peft else "–"
            for key in ("counted_launches", "counted_bytes")
        ]
        lines.append(
            [
                name,
                str(row["counted_launches"]),
                f"{row['counted_bytes'] / 1e9:.2f}",
                *beyond,
                f"{row['counted_peak_mib'] + row.get('state_mib', 0):,.0f}",
                *(_number(row["implied_ms"][gpu]) for gpu in gpus),
            ]
        )
    heads = ["provider", "launches", "GB", "launches beyond", "GB beyond", "peak MiB", *(f"{gpu} ms" for gpu in gpus)]
    return markdown_table(heads, lines)


def _host(rows: list[Row]) -> list[str]:
    """A table for every device."""
    devices = dict.fromkeys(_device(row) for row in rows)
    return [_host_of(device, [row for row in rows if _device(row) == device]) for device in devices]


def _host_of(device: str, rows: list[Row]) -> str:
    """Milliseconds of the host's time of each provider, by layer and pass."""
    columns = list(dict.fromkeys((row["layer"], row["pass"]) for row in rows))
    lines = []
    for name in dict.fromkeys(row["provider"] for row in rows):
        found = {(row["layer"], row["pass"]): row for row in rows if row["provider"] == name}
        lines.append([name, *(_number(found[column]["p50_ms"]) if column in found else "–" for column in columns)])
    heads = ["provider", *(f"{layer}, {which}, ms" for layer, which in columns)]
    return f"### The host's time, without a GPU · {device}\n\n" + markdown_table(heads, lines)


def _static(rows: list[Row]) -> str:
    """Registers, spilled bytes, shared memory, blocks on a multiprocessor and matrix instructions, build by target."""
    if not rows:
        return ""
    targets = list(dict.fromkeys(row["target"] for row in rows))
    builds: dict[tuple, dict[str, Row]] = {}
    for row in rows:
        builds.setdefault((row["kernel"], row["config"], row["direction"], row["dtype"], row["R"]), {})[
            row["target"]
        ] = row
    lines = [
        [*map(str, build), *(_resources(found[target]) if target in found else "–" for target in targets)]
        for build, found in builds.items()
    ]
    heads = ["kernel", "config", "direction", "dtype", "R", *(f"sm_{target}" for target in targets)]
    legend = (
        "registers a thread · spilled bytes · shared KiB · blocks a multiprocessor (occupancy) · matrix instructions"
    )
    return f"### Kernels compiled ahead of time, static\n\nEach cell: {legend}.\n\n" + markdown_table(heads, lines)


def _resources(row: Row) -> str:
    matrix = "+".join(f"{number} {name}" for name, number in row["matrix_instructions"].items() if number) or "none"
    blocks = f"{row['blocks_per_multiprocessor']} ({row['occupancy']:.0%})"
    return f"{row['registers']} · {row['spilled']} · {row['shared_memory'] / 1024:.0f} · {blocks} · {matrix}"


def _ratio(row: Row, other: Row | None, key: str) -> str:
    """Of two rows of one run; no figure where there is no other, or it is of another run."""
    return f"{row[key] / other[key]:.2f}" if other and other.get(key) and of_one_run(row, other) else "–"


def _gpu_time(row: Row, frozen: Row | None, key: str) -> list[str]:
    """The GPU's own time and its ratio, where it was measured."""
    return [_number(row[key]), _ratio(row, frozen, key)] if key in row else ["–", "–"]


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def main(
    results: Annotated[Path, typer.Argument(help="Folder of the JSON lines.", exists=True, file_okay=False)] = RESULTS,
) -> None:
    """Draws tables.md and plots of a folder of results anew."""
    if not any(results.glob("*.jsonl")):
        raise typer.BadParameter(f"{results} has no JSON lines of bench.run in it", param_hint="results")
    write(results)


if __name__ == "__main__":
    typer.run(main)
