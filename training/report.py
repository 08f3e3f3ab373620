"""One self-contained HTML page of a run or a comparison: tables, figures, rank maps, transcripts with errors marked."""

import html
import json
import math
import statistics
from pathlib import Path
from typing import Any

import jinja2
import jiwer

from .comparison import Comparison, read_comparison
from .comparison_differences import Gap, gaps_of, told_of
from .comparison_figures import draw_figures
from .comparison_lines import Column, Line, columns_of, lines_of, names_of
from .comparison_tables import record, write_tables
from .errors import UserError
from .evaluation import ALL, SCORED_COLUMNS, read_table, unit_of
from .figures import run_svg
from .output import read_json, writing
from .run import last_command, run_options

_TEMPLATE = Path(__file__).parent / "report.html"
_HIDDEN = ("utterance", "duration_s", *SCORED_COLUMNS)


def write_report(folder: str | Path, output: str | Path | None = None) -> Path:
    """Writes the page of the run or comparison in `folder` (default `report.html` there) and returns its path.

    A comparison's tables and figures are written anew first. The page needs no network and no other file.

    Raises:
        UserError: the folder holds neither, or `output` cannot be written.
    """
    folder = Path(folder)
    output = Path(output) if output else folder / "report.html"
    if (folder / "comparison.yaml").is_file():
        page = _comparison_page(read_comparison(folder / "comparison.yaml", folder))
    elif run_options(folder) is not None:
        page = _run_page(folder)
    else:
        raise UserError(f"{folder}: holds neither a run (config.json) nor a comparison (comparison.yaml)")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    data = json.dumps(_finite(page.pop("data")), ensure_ascii=False, allow_nan=False)
    data = data.replace("<", "\\u003c")  # no tag, no comment in a script
    with writing(output):
        output.write_text(template.render(**page, data=data), encoding="utf-8")
    return output


def _finite(value: Any) -> Any:
    """The same with None for every number that JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _run_page(folder: Path) -> dict[str, Any]:
    """Of one run: what was asked, error rates before and after, its rank map and transcripts."""
    config = read_json(folder / "config.json")
    results = _read(folder / "results.json", [])
    rates = [
        {"set": name, "group": group, "evaluation": evaluation["label"], **_rates(units, unit_of(result))}
        for evaluation in results
        for name, result in evaluation["sets"].items()
        for group, units in result["groups"].items()
    ]
    curve = run_svg(_read(folder / "metrics.json", []))
    labels = [name for name in ("before", "after") if any((folder / name).glob("*.tsv"))]
    return {
        "title": f"{folder.name}: {config['method']}",
        "facts": {
            **_read(folder / "versions.json", {}),
            **_read(folder / "summary.json", {}),
            "command": last_command(folder),
        },
        "figures": [] if curve is None else [("Learning curve", curve)],
        "data": {
            "tables": [{"title": "Error rates, percent", "rows": rates}],
            "maps": _maps(folder.name, _read(folder / "rank_pattern.json", [])),
            "transcripts": _transcripts({label: folder / label for label in labels}),
        },
    }


def _comparison_page(comparison: Comparison) -> dict[str, Any]:
    """Of a comparison: the tables of the paper, every figure, every rank map, transcripts by method."""
    lines = lines_of(comparison)
    columns, names = columns_of(lines), names_of(lines)
    gaps = list(gaps_of(names, columns))
    write_tables(comparison, gaps)
    figures = draw_figures(comparison)
    rows, runs = [], []
    for line in lines:
        for cell in line.cells:
            entry = record(line, cell, columns)
            row = {
                "method": entry["row"], "rank": entry["rank"], "seed": entry["seed"],
                "trainable": entry["trainable_parameters"],
            }  # fmt: skip
            if comparison.timed:
                row |= {"step s": entry["step_s"], "peak MiB": entry["peak_memory_mib"]}
            for column in columns:
                row[str(column)] = entry[f"{column} rate"]
                row[f"{column}, capped"] = entry[f"{column} capped_rate"]
            rows.append(row)
            made = {name: entry[name] for name in ("cell", "seed", "commit", "command", "device", "failed")}
            runs.append({"method": entry["row"], "UTC": entry["utc"][:16].replace("T", " "), **made})
    first = {name: comparison.path / line.first["name"] / "after" for name, line in names.items()}
    chosen = next((name for name, line in names.items() if line.method == "s2lora" and not line.changed), None)
    return {
        "title": comparison.title,
        "facts": {"finished": f"{sum(len(line.cells) for line in lines)} of {len(comparison.cells)} runs"},
        "figures": [(title, file.read_text(encoding="utf-8")) for title, file in figures.items()],
        "data": {
            "tables": [
                *([_means(names, columns)] if any(len(line.cells) > 1 for line in lines) else []),
                {"title": "Runs: error rates, percent", "rows": rows},
                *([_differences(gaps)] if gaps else []),
                {"title": "Runs: what made them", "rows": runs},
            ],
            "maps": [
                entry for name, line in names.items() if line.first["rank_pattern"]
                for entry in _maps(name, line.first["rank_pattern"])
            ],
            "transcripts": _transcripts(
                {name: path for name, path in first.items() if any(path.glob("*.tsv"))}, second=chosen
            ),
        },
    }  # fmt: skip


def _means(names: dict[str, Line], columns: list[Column]) -> dict[str, Any]:
    """One row for all seeds of a method."""
    rows = []
    for name, line in names.items():
        row: dict[str, Any] = {"method": name, "rank": line.own_rank, "trainable": line.trainable}
        row["seeds"] = sum(not cell["cell"]["failed"] for cell in line.cells)
        for column in (column for column in columns if column.group == ALL):
            rates = line.rates(column)
            row[str(column)] = line.mean_rate(column)
            row[f"{column}, ±"] = statistics.stdev(rates) if len(rates) > 1 else None
            row[f"{column}, capped"] = line.mean_rate(column, "capped_rate")
        rows.append(row)
    note = "Means over seeds, ± their sample standard deviation; capped: with errors no more than an utterance is long."
    return {"title": "Methods: error rates, percent", "note": note, "digits": 1, "rows": rows}


def _differences(gaps: list[Gap]) -> dict[str, Any]:
    rows = []
    for gap in gaps:
        row = {"method": gap.name, "seeds": gap.seeds, "error": str(gap.column)}
        for kind, found in (("points", gap.plain), ("capped", gap.capped)):
            row |= {kind: found.points, f"{kind}: 95 % from": found.low, f"{kind}: to": found.high}
        rows.append(row)
    return {"title": f"Differences from {gaps[0].against}, points", "note": told_of(gaps), "digits": 1, "rows": rows}


def _read(file: Path, default: Any) -> Any:
    return read_json(file, type(default)) if file.is_file() else default


def _rates(units: dict[str, Any], unit: str) -> dict[str, Any]:
    rate = units[unit]
    return {
        "utterances": rate["utterances"],
        "unit": unit.upper(),
        "error": rate["rate"],
        "95 % from": rate["low"],
        "to": rate["high"],
        "capped": rate["capped_rate"],
        **{name: rate[name] for name in ("substitutions", "deletions", "insertions")},
    }


def _maps(name: str, patterns: list[dict[str, Any]]) -> list[dict[str, Any]]:
    kept = ("stack", "layers", "matrices", "live", "mean_magnitude", "r")
    return [{"name": name, **{key: pattern[key] for key in kept}} for pattern in patterns]


def _transcripts(folders: dict[str, Path], second: str | None = None) -> dict[str, Any]:
    """By set, in the order they were scored: each utterance's metadata and reference, and by label its hypothesis with
    errors marked and counted; `second` is the label shown beside the first to begin with."""
    units = {
        name: unit_of(result)
        for folder in folders.values()
        for name, result in _read(folder / "results.json", {"sets": {}})["sets"].items()
    }
    sets: dict[str, dict[str, Any]] = {}
    for label, folder in folders.items():
        order = list(units)
        files = folder.glob("*.tsv")
        for file in sorted(files, key=lambda file: (order.index(file.stem) if file.stem in order else 99, file.stem)):
            rows = read_table(file)
            unit = units.get(file.stem, "wer")
            found = sets.setdefault(file.stem, {"unit": unit, "rows": {}})
            for position, row in enumerate(rows):
                metadata = {key: value for key, value in row.items() if key not in _HIDDEN}
                entry = found["rows"].setdefault(
                    (position, row["utterance"], row["reference"]),  # a table may name one file several times
                    {"utterance": row["utterance"], **metadata, "reference": row["reference"], "hypothesis": {}},
                )
                reference, heard = row["normalized_reference"], row["normalized_hypothesis"]
                entry["hypothesis"][label] = marked(reference, heard, by_character=unit == "cer")
    labels = list(folders)
    return {
        "labels": labels,
        "first": "zero-shot" if "zero-shot" in labels else next(iter(labels), None),
        "second": second if second in labels else next(reversed(labels), None),
        "names": list(sets),  # JavaScript would have those that are numbers first
        "sets": {name: {**found, "rows": list(found["rows"].values())} for name, found in sets.items()},
    }


def marked(reference: str, hypothesis: str, *, by_character: bool = False) -> dict[str, Any]:
    """The hypothesis as HTML with its errors marked, and how many: words, or characters of unspaced languages.

    A substitution is <s>said</s><b>heard</b>, a deletion <s>said</s>, an insertion <b>heard</b>.
    """
    joint = "" if by_character else " "
    if not reference:
        units = list(hypothesis) if by_character else hypothesis.split()
        return {"html": joint.join(f"<b>{html.escape(unit)}</b>" for unit in units), "errors": len(units)}
    process = jiwer.process_characters if by_character else jiwer.process_words
    output = process(reference, hypothesis)
    said, heard = output.references[0], output.hypotheses[0]
    parts = []
    for chunk in output.alignments[0]:
        before = html.escape(joint.join(said[chunk.ref_start_idx : chunk.ref_end_idx]))
        after = html.escape(joint.join(heard[chunk.hyp_start_idx : chunk.hyp_end_idx]))
        if chunk.type == "equal":
            parts.append(after)
        else:
            parts.append((f"<s>{before}</s>" if before else "") + (f"<b>{after}</b>" if after else ""))
    return {"html": joint.join(parts), "errors": output.substitutions + output.deletions + output.insertions}
