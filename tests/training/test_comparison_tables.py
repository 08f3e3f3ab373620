"""What a comparison comes to: its tables, differences and figures."""

import csv
import html
import json
import math
import shutil
from dataclasses import asdict, fields
from types import SimpleNamespace

import pytest
from markdown_it import MarkdownIt

from fused_s2lora.training import comparison_figures, comparison_tables
from fused_s2lora.training.comparison import read_comparison, run_comparison
from fused_s2lora.training.comparison_differences import gaps_of
from fused_s2lora.training.comparison_figures import draw_figures
from fused_s2lora.training.comparison_lines import METHOD_OPTIONS, columns_of, lines_of, names_of
from fused_s2lora.training.comparison_tables import write_tables
from fused_s2lora.training.errors import UserError
from fused_s2lora.training.metrics import Difference
from fused_s2lora.training.options import TrainOptions
from fused_s2lora.training.output import markdown_table
from fused_s2lora.training.report import write_report
from fused_s2lora.training.utterance_errors import read_errors
from tests.training.comparisons import QUIET, REPRODUCTION, ROWS, write

NAME = "<b>a|b</b> *c* `d` [e](f)"


def test_a_row_is_the_papers_only_with_every_option_of_the_method_at_its_default():
    of_every_method = {
        "data", "output", "model", "test", "dev", "dev_share", "language", "task", "text_column", "audio_column",
        "keep_case", "leading_space", "limit", "strict", "method", "rank", "epochs", "max_steps", "batch_size",
        "accumulation", "warmup", "weight_decay", "spec_augment", "early_stopping", "window", "margin", "full_share",
        "precision", "gradient_checkpointing", "half_base", "quantize", "cuda_graphs", "workers", "seed",
        "logging_steps", "save_steps", "before", "beams", "decode_once", "group_by", "eval_batch_size",
    }  # fmt: skip
    options = {option.name for option in fields(TrainOptions)}
    assert of_every_method <= options
    assert options - of_every_method == set(METHOD_OPTIONS)


def test_tables_hold_our_figures_and_the_published_ones(compared):
    comparison = read_comparison(compared / "comparison-file.yaml", compared / "out")
    text = write_tables(comparison)
    lines = {line.label: line for line in lines_of(comparison)}
    assert len(lines["S2-LoRA"].cells) == 2
    column = columns_of(list(lines.values()))[-1]
    assert str(column) == "same WER"
    first, second = lines["S2-LoRA"].rates(column)
    mean, spread = (first + second) / 2, abs(first - second) / math.sqrt(2)
    assert f"{mean:.1f} ± {spread:.1f} (" in text
    (published_row,) = (
        line for line in text.splitlines() if line.startswith("| S2-LoRA, as published") and "%" in line
    )
    assert published_row.endswith("| 0.02 % | 8.67 | 13.19 | 6.81 | 33.71 | 6.72 |")
    (ours,) = (line for line in text.splitlines() if line.startswith("| S2-LoRA |") and "±" in line)
    assert ours.endswith("| – | – | – | – | – | – |")
    assert "10.63 / 9.32 / 9.22" in text
    records = json.loads((compared / "out" / "comparison.json").read_text())
    with (compared / "out" / "comparison.csv").open(encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert len(records) == len(rows) == 10
    for entry, row in zip(records, rows, strict=True):
        cell = json.loads((compared / "out" / entry["cell"] / "cell.json").read_text())
        summary = compared / "out" / entry["cell"] / "summary.json"
        made = json.loads(summary.read_text()) if summary.is_file() else cell  # trained, maybe before it was scored
        assert entry["utc"] == made["utc"] == row["utc"] <= cell["utc"]
        assert entry["commit"] == made["commit"]
        assert entry["device"] == made["device"]
        assert entry["precision"] == made["precision"] == row["precision"] in ("fp32", "bf16", "fp16")
        assert entry["command"]
        results = json.loads((compared / "out" / entry["cell"] / "results.json").read_text())[-1]
        assert entry["same WER rate"] == results["sets"]["same"]["groups"]["all"]["wer"]["rate"]


def test_the_papers_figures_are_of_rank_8(compared):
    comparison = read_comparison(compared / "comparison-file.yaml", compared / "out")
    write_tables(comparison)
    records = {entry["cell"]: entry for entry in json.loads((compared / "out" / "comparison.json").read_text())}
    for cell, expected in (
        ("lora-r8-seed0", [0.31, 9.32, 14.73, 7.52, 33.30, 7.35]),
        ("lora-r2-seed0", [None] * 6),
        ("zero-shot", [None, 11.29, 19.25, 9.79, 31.14, 7.93]),
    ):
        assert [value for name, value in records[cell].items() if name.startswith("published_")] == expected, cell


def test_how_a_cell_is_written():
    rates = {"rate": [130.0, 150.0], "capped_rate": [90.0, 92.0]}
    line = SimpleNamespace(rates=lambda column, kind="rate": rates[kind])
    assert comparison_tables._rate(line, None) == "140.0 ± 14.1 (91.0)"
    assert comparison_tables._points(Difference(-2, -3, -1)) == "**−2.0** [−3.0, −1.0]"
    assert comparison_tables._points(Difference(0.5, -0.5, 1.5)) == "+0.5 [−0.5, +1.5]"
    assert comparison_tables._points(Difference(-0.04, -0.5, 0.4)) == "+0.0 [−0.5, +0.4]"


def test_tables_have_the_sets_of_every_row(compared, tmp_path, quick, tones):
    """In the order they first appear, also where an earlier row was scored on fewer."""
    (name,) = quick["test"]
    rows = [{"method": "lora"}, {"method": "adalora", "test": [name, f"more={tones}"]}]
    comparison = read_comparison(write(tmp_path, quick, rows), tmp_path / "out")
    for cell in comparison.cells:
        shutil.copytree(compared / "out" / "lora-r8-seed0", cell.path)
        (cell.path / "config.json").write_text(json.dumps(asdict(cell.options)))
    file = comparison.cells[1].path / "results.json"
    results = json.loads(file.read_text())
    results[-1]["sets"]["more"] = {**results[-1]["sets"]["same"], "scoring_language": "zh"}
    file.write_text(json.dumps(results))
    columns = [str(column) for column in columns_of(lines_of(comparison)) if column.group == "all"]
    assert columns == ["same WER", "more CER"]
    assert "more CER" in write_tables(comparison)


def test_rows_are_set_against_the_first_that_was_trained(compared):
    comparison = read_comparison(compared / "comparison-file.yaml", compared / "out")
    text = write_tables(comparison)
    records = json.loads((compared / "out" / "comparison.json").read_text())
    rates = {}
    for entry in records:
        rates.setdefault((entry["row"], entry["rank"]), []).append(entry["same WER capped_rate"])
    with (compared / "out" / "differences.csv").open(encoding="utf-8") as stream:
        rows = {row["row"]: row for row in csv.DictReader(stream)}
    assert list(rows) == [line for line in names_of(lines_of(comparison)) if line != "S2-LoRA"]
    assert {(row["less"], row["error"]) for row in rows.values()} == {("S2-LoRA", "same WER")}
    ours = sum(rates["S2-LoRA", 8]) / 2
    for name, key in (("zero-shot", ("zero-shot", None)), ("LoRA, r = 2", ("LoRA", 2)), ("AdaLoRA", ("AdaLoRA", 8))):
        (theirs,) = rates[key]
        assert float(rows[name]["capped_points"]) == pytest.approx(theirs - ours, abs=1e-3)
        assert float(rows[name]["capped_low"]) <= theirs - ours <= float(rows[name]["capped_high"])
    assert "## Differences from S2-LoRA\n" in text
    points = f"{float(rows['LoRA, r = 2']['points']):+.1f}".replace("-", "−")
    assert any(line.startswith("| LoRA, r = 2 |") and points in line for line in text.splitlines())


def test_only_runs_on_the_same_utterances_are_set_against_each_other(compared, tmp_path):
    """Runs that kept no errors of utterances are left out, and a damaged file of them is named."""
    shutil.copytree(compared / "out", tmp_path / "out")
    comparison = read_comparison(compared / "comparison-file.yaml", tmp_path / "out")
    (tmp_path / "out" / "lora-r8-seed0" / "errors.csv").unlink()
    other = tmp_path / "out" / "adalora-r8-seed0" / "errors.csv"
    other.write_text(other.read_text().replace("same,", "same,other-"))
    corrected = tmp_path / "out" / "s2-lora-as-published-r8-seed0" / "errors.csv"
    corrected.write_text(corrected.read_text().replace("same,u0.flac,4,", "same,u0.flac,5,"))
    lines = lines_of(comparison)
    names = {gap.name for gap in gaps_of(names_of(lines), columns_of(lines))}
    assert "LoRA, r = 2" in names
    assert not names & {"S2-LoRA", "LoRA, r = 8", "AdaLoRA", "S2-LoRA, as published"}
    other.write_text("set,utterance\nsame,one\n")
    with pytest.raises(UserError, match=r"adalora-r8-seed0/errors.csv: is damaged"):
        write_tables(comparison)


def test_errors_kept_by_utterance_are_those_of_the_results(compared):
    for run in (compared / "out").glob("*-seed?"):
        rates = json.loads((run / "results.json").read_text())[-1]["sets"]["same"]["groups"]["all"]
        kept = read_errors(run)["same"]
        for unit in ("wer", "cer"):
            assert 100 * kept.errors[unit].sum() / kept.lengths[unit].sum() == pytest.approx(rates[unit]["rate"])


def test_a_comparison_on_some_of_the_data_has_its_figures(tmp_path, quick, short_decoding):
    """Where zero-shot has utterances in its options too, and a name that Markdown takes for columns and HTML."""
    rows = [{"name": name, "method": name} for name in ("zero-shot", "bitfit")] + [{"name": NAME, "method": "lora"}]
    train = {**quick, "utterances": 4, "test": [f"{NAME.replace('/', '')}={quick['data'][0]}"]}
    comparison = read_comparison(write(tmp_path, train, rows, title=None), tmp_path / "out")
    assert len(list(run_comparison(comparison, console=QUIET))) == 3
    assert "parameters" in {file.stem for file in draw_figures(comparison).values()}
    text = write_tables(comparison)
    assert text.startswith("# comparison-file\n")
    rendered = MarkdownIt("commonmark").enable("table").render(text)
    assert f"<td>{html.escape(NAME)}</td>" in rendered
    assert f">{html.escape(NAME.replace('/', ''))} WER</th>" in rendered
    assert "<b>" not in rendered
    assert "<em>" not in rendered
    write_report(tmp_path / "out")


def test_times_of_runs_that_shared_a_machine_are_left_out(compared, tmp_path, quick):
    shutil.copytree(compared / "out", tmp_path / "out")
    timed = write_tables(read_comparison(write(tmp_path, quick, ROWS), tmp_path / "out"))
    text = write_tables(read_comparison(write(tmp_path, quick, ROWS, timed=False), tmp_path / "out"))
    assert "| step s | peak MiB |" in timed
    assert "step s" not in text
    assert "the runs shared a machine" in text
    records = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert {entry["step_s"] for entry in records} == {None}


def test_figures_are_drawn_and_repeat(compared):
    comparison = read_comparison(compared / "comparison-file.yaml", compared / "out")
    drawn = draw_figures(comparison)
    assert {file.stem for file in drawn.values()} == {"rank-map", "parameters", "data", "learning", "sparsity"}
    first = {name: file.read_text() for name, file in drawn.items()}
    assert {name: file.read_text() for name, file in draw_figures(comparison).items()} == first
    assert not [name for name, text in first.items() if "mathdefault" in text]  # what matplotlib writes a power with
    assert "AdaLoRA" in first["Ranks kept, layer by matrix"]
    by_data = first["Error against amount of data"]
    assert by_data.count(">S2-LoRA<") == 1
    assert "on less" not in by_data  # the run on all data is a point of the same line


def test_figures_over_one_option_leave_out_rows_trained_otherwise():
    """Such as those of three epochs, whose method has every option at its default."""
    folder = REPRODUCTION / "whisper-base-spaced"
    lines = lines_of(read_comparison(folder.with_suffix(".yaml"), folder))
    figure = comparison_figures._against_data(lines, columns_of(lines))
    assert [text.get_text() for text in figure.axes[-1].get_legend().get_texts()] == ["LoRA", "S2-LoRA"]
    amounts = [list(line.get_xdata()) for line in figure.axes[0].get_lines()]
    assert amounts.count([130, 520, 1040]) == 2  # none twice, as one passed over more often would be
    sizes = comparison_figures._against_parameters(lines, columns_of(lines))
    shown = {text.get_text() for text in sizes.axes[-1].get_legend().get_texts()}
    assert shown >= {"S2-LoRA", "LoRA", "LoRA, six kinds", "S2-LoRA, not shared", "Full fine-tuning, lr 3e-5", "IA3"}
    assert not [name for name in shown if "kept" in name or "epochs" in name or "of the update" in name]
    curves = comparison_figures.learning_figure(lines).axes[0].get_legend().get_texts()
    assert not [text.get_text() for text in curves if "epochs" in text.get_text() or "update" in text.get_text()]
    magnitudes = comparison_figures._sparsity(lines).axes[0].get_lines()
    assert [list(line.get_xdata()) for line in magnitudes] == [[0, 0.05, 0.2]] * 6
    default = comparison_figures._sizes(json.loads((folder / "s2-lora-r8-seed0" / "rank_pattern.json").read_text()))
    assert [line.get_ydata()[1] for line in magnitudes] == [size for size, _ in default.values()]


def test_a_markdown_table_holds_any_name():
    """Of a test set or a group, too, which are heads."""
    table = markdown_table(["row", "a|b, room c\rd WER"], [["x\ny|z", "1"]]).split("\n")
    assert table == ["| row | a\\|b, room c d WER |", "| --- | --: |", "| x y\\|z | 1 |"]
