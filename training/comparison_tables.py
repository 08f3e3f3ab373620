"""The paper's two tables with our figures beside the published ones, and differences, as Markdown, CSV and JSON."""

import dataclasses
import statistics
from pathlib import Path
from typing import Any

from . import published
from .comparison import ZERO_SHOT, Comparison
from .comparison_differences import Gap, gaps_of, told_of
from .comparison_lines import Column, Line, columns_of, lines_of, names_of
from .evaluation import ALL
from .metrics import Difference
from .output import literal, markdown_table, write_json, write_rows, write_text


def write_tables(comparison: Comparison, gaps: list[Gap] | None = None) -> str:
    """Writes comparison.md, .csv and .json and differences.csv into the comparison's folder; returns the Markdown.

    `gaps` are the comparison's, where they are known already: drawing their intervals takes seconds.

    Raises:
        UserError: a finished run's file is damaged.
    """
    lines = lines_of(comparison)
    columns = columns_of(lines)
    gaps = list(gaps_of(names_of(lines), columns)) if gaps is None else gaps
    text = markdown(comparison, lines, columns, gaps)
    comparison.path.mkdir(parents=True, exist_ok=True)
    write_text(comparison.path / "comparison.md", text)
    records = [record(line, cell, columns) for line in lines for cell in line.cells]
    write_json(comparison.path / "comparison.json", records)
    flat = [{key: value for key, value in entry.items() if key != "config"} for entry in records]
    _write_csv(comparison.path / "comparison.csv", flat)
    if gaps:
        _write_csv(comparison.path / "differences.csv", [gap_record(gap) for gap in gaps])
    else:
        (comparison.path / "differences.csv").unlink(missing_ok=True)
    return text


def _write_csv(file: Path, rows: list[dict[str, Any]]) -> None:
    write_rows(file, [rows[0] if rows else ["row"], *(row.values() for row in rows)])


def record(line: Line, cell: dict[str, Any], columns: list[Column]) -> dict[str, Any]:
    """Everything about one cell, flat: what made it, what it cost, every error rate, and the paper's figures."""
    single = dataclasses.replace(line, cells=[cell])
    summary = cell["summary"] or {}
    made = cell["cell"] | {name: summary[name] for name in ("commit", "device", "precision", "utc") if name in summary}
    entry = {
        "row": line.label,
        "cell": cell["name"],
        "method": line.method,
        "rank": line.own_rank,
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


def gap_record(gap: Gap) -> dict[str, Any]:
    """A gap to the first row, flat: of which rows and set, and its two differences with their intervals."""
    entry = {"row": gap.name, "less": gap.against, "seeds": gap.seeds, "error": str(gap.column)}
    for kind, found in (("", gap.plain), ("capped_", gap.capped)):
        entry |= {f"{kind}{name}": round(getattr(found, name), 3) for name in ("points", "low", "high")}
    return entry


def markdown(comparison: Comparison, lines: list[Line], columns: list[Column], gaps: list[Gap]) -> str:
    """Methods at rank 8, runs over lists of values, the rank sweep, gaps, and every run with what made it."""
    records = [record(line, cell, columns) for line in lines for cell in line.cells]
    missing = len(comparison.cells) - len(records)
    devices = sorted({entry["device"] for entry in records if entry["step_s"]})
    head = [
        f"# {literal(comparison.title)}",
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
        _differences(gaps) if gaps else None,
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
    return f"## {title}\n\n" + markdown_table(heads, rows)


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
    return "## Ranks (the paper's Table 1)\n\n" + markdown_table(heads, rows)


def _differences(gaps: list[Gap]) -> str:
    """Each row less the first that was trained, the sets side by side."""
    columns = list(dict.fromkeys(gap.column for gap in gaps))
    by_name: dict[str, dict[Column, Gap]] = {}
    for gap in gaps:
        by_name.setdefault(gap.name, {})[gap.column] = gap
    heads = ["row", *(f"{column}{kind}" for column in columns for kind in ("", ", capped")), "seeds"]
    rows = []
    for name, found in by_name.items():
        gaps_shown = [(gap.plain, gap.capped) if gap else (None, None) for gap in map(found.get, columns)]
        shown = [_points(one) for both in gaps_shown for one in both]
        rows.append([name, *shown, str(max(gap.seeds for gap in found.values()))])
    told = f"{literal(told_of(gaps))} Bold where it does not hold 0."
    return f"## Differences from {literal(gaps[0].against)}\n\n{told}\n\n" + markdown_table(heads, rows)


def _points(found: Difference | None) -> str:
    if found is None:
        return "–"
    shown = (round(value, 1) + 0.0 for value in (found.points, found.low, found.high))  # no -0.0
    points, low, high = (f"{value:+.1f}".replace("-", "−") for value in shown)
    return f"{f'**{points}**' if found.sure else points} [{low}, {high}]"


def _runs(records: list[dict[str, Any]]) -> str:
    rows = [
        [entry["row"], entry["cell"], str(entry["seed"]), entry["utc"][:10], str(entry["commit"]),
         f"`{entry['command']}`", entry["device"], entry["precision"]]
        for entry in records
    ]  # fmt: skip
    return "## Runs\n\n" + markdown_table(
        ["row", "folder", "seed", "date", "commit", "command", "device", "precision"], rows
    )
