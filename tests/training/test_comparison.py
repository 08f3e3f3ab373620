"""Comparisons: cells of a file, resuming, what stops them, tables and figures."""

import csv
import json
import math
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, fields
from pathlib import Path

import pytest
from rich.console import Console

from fused_s2lora.training import comparison as comparison_module
from fused_s2lora.training import comparison_figures
from fused_s2lora.training.comparison import read_comparison, results_of, run_comparison
from fused_s2lora.training.comparison_differences import gaps_of
from fused_s2lora.training.comparison_figures import draw_figures, learning_figure
from fused_s2lora.training.comparison_lines import METHOD_OPTIONS, columns_of, lines_of, names_of
from fused_s2lora.training.comparison_tables import write_tables
from fused_s2lora.training.decoding import Decoding
from fused_s2lora.training.errors import UserError
from fused_s2lora.training.evaluation import Evaluation
from fused_s2lora.training.options import TrainOptions
from fused_s2lora.training.report import write_report
from fused_s2lora.training.run import RunFolder
from fused_s2lora.training.utterance_errors import read_errors
from tests.training.comparisons import QUIET, REPRODUCTION, ROWS, write


def test_cells_of_a_file(compared):
    comparison = read_comparison(compared / "comparison-file.yaml", compared / "out")
    assert [cell.name for cell in comparison.cells] == [
        "zero-shot", "s2-lora-r8-seed0", "s2-lora-r8-seed1", "s2-lora-as-published-r8-seed0", "lora-r8-seed0",
        "lora-r2-seed0", "adalora-r8-seed0", "s2-lora-by-a-r8-sparsity-weight-0.0-seed0",
        "s2-lora-by-a-r8-sparsity-weight-0.3-seed0", "s2-lora-on-less-r8-utterances-2-seed0",
    ]  # fmt: skip
    assert comparison.cells[5].options.rank == 2
    assert comparison.cells[7].options.sparsity_weight == 0.0


def test_options_of_a_method_take_the_place_of_its_defaults(compared, tmp_path, quick):
    """They are options of every row of it that says no other, and a row that has no more is the method as it is."""
    methods = {"s2lora": {"lr": "2e-3", "sparsity_weight": 0.2}}
    rows = [*ROWS, {"name": "Plain", "method": "s2lora", "lr": None, "sparsity_weight": None, "preset": "paper"}]
    comparison = read_comparison(write(tmp_path, quick, rows, methods=methods), tmp_path / "out")
    given = {cell.name: (cell.options.lr, cell.options.sparsity_weight) for cell in comparison.cells}
    assert given["s2-lora-r8-seed0"] == given["s2-lora-on-less-r8-utterances-2-seed0"] == (2e-3, 0.2)
    assert given["s2-lora-by-a-r8-sparsity-weight-0.3-seed0"] == (2e-3, 0.3)
    assert given["plain-r8-seed0"] == given["lora-r8-seed0"] == given["zero-shot"] == (None, None)
    for cell in comparison.cells:  # as if they had been run with these
        shutil.copytree(compared / "out" / "lora-r8-seed0", cell.path)
        (cell.path / "config.json").write_text(json.dumps(asdict(cell.options)))
    lines = {line.label: line for line in lines_of(comparison)}
    assert lines["S2-LoRA"].changed == set()
    assert lines["S2-LoRA on less, utterances 2"].changed == {"utterances"}
    assert lines["S2-LoRA by α₁, sparsity_weight 0.3"].changed == {"sparsity_weight"}
    assert lines["Plain"].changed == {"lr", "sparsity_weight", "preset"}
    published = {label for label, line in lines.items() if line.published}
    assert published == {"zero-shot", "LoRA", "AdaLoRA", "Plain"}


def test_finished_cells_are_not_run_again(compared, monkeypatch):
    monkeypatch.setattr(comparison_module, "_run_cell", lambda *args: pytest.fail("ran again"))
    comparison = read_comparison(compared / "comparison-file.yaml", compared / "out")
    assert list(run_comparison(comparison, console=QUIET)) == []


def test_a_stopped_comparison_goes_on(quick, tmp_path, short_decoding, monkeypatch):
    comparison = read_comparison(write(tmp_path, quick, ROWS[3:5]), tmp_path / "out")
    cells = run_comparison(comparison, console=QUIET)
    next(cells)
    cells.close()
    assert [cell.finished() for cell in comparison.cells] == [True, False]
    ran = []
    monkeypatch.setattr(
        comparison_module, "_run_cell", lambda cell, console: ran.append(RunFolder(cell.options) and cell.name)
    )
    assert [cell.name for cell in run_comparison(comparison, console=QUIET)] == ran == ["lora-r2-seed0"]


def test_processes_share_the_work(tmp_path, quick, monkeypatch):
    """A second process takes what the first has neither finished nor begun, and what was left when that one died."""
    ran = []
    monkeypatch.setattr(
        comparison_module, "_run_cell", lambda cell, console: ran.append(RunFolder(cell.options) and cell.name)
    )
    comparison = read_comparison(write(tmp_path, quick, ROWS), tmp_path / "out")
    names = [cell.name for cell in comparison.cells]
    assert len(list(run_comparison(comparison, most=1, console=QUIET))) == 1
    theirs = comparison.cells[2]
    theirs.path.mkdir(parents=True)
    other = (
        "import fcntl, sys; file = open(sys.argv[1], 'w'); fcntl.flock(file, fcntl.LOCK_EX);"
        "print('has it', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", other, str(theirs.path / ".running")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "has it\n"
        console = Console(record=True, width=120)
        list(run_comparison(comparison, console=console))
        process.kill()
    assert ran == [name for name in names if name != theirs.name]
    assert "1 of 10 cells are left to the processes that run them" in console.export_text()
    assert [cell.name for cell in run_comparison(comparison, console=QUIET)] == [theirs.name]
    assert not list(comparison.path.glob("*/.running"))
    with pytest.raises(UserError, match="--runs is 0; give at least 1"):
        next(run_comparison(comparison, most=0, console=QUIET))


def test_a_row_says_how_its_transcripts_are_decoded(tmp_path, quick, monkeypatch):
    row = {"name": "zero-shot", "method": "zero-shot", "beams": 3, "decode_once": True}
    comparison = read_comparison(write(tmp_path, quick, [row]), tmp_path / "out")
    asked = []

    def evaluate(*arguments, decoding, **options):
        asked.append(decoding)
        return Evaluation("zero-shot", [])

    monkeypatch.setattr(comparison_module, "evaluate", evaluate)
    list(run_comparison(comparison, console=QUIET))
    assert asked == [Decoding(beams=3, once=True)]
    with pytest.raises(UserError, match="'zero-shot': --beams is 0"):
        read_comparison(write(tmp_path, quick, [row | {"beams": 0}]), tmp_path / "out")


def test_what_another_process_finished_meanwhile_is_not_run(tmp_path, quick, monkeypatch):
    comparison = read_comparison(write(tmp_path, quick, ROWS[3:4]), tmp_path / "out")
    (cell,) = comparison.cells
    lock = comparison_module.fcntl.flock

    def finish_and_lock(*arguments):
        RunFolder(cell.options)
        (cell.path / "cell.json").write_text("{}")
        lock(*arguments)

    monkeypatch.setattr(comparison_module.fcntl, "flock", finish_and_lock)
    monkeypatch.setattr(comparison_module, "_run_cell", lambda *args: pytest.fail("ran again"))
    assert list(run_comparison(comparison, console=QUIET)) == []


def test_a_cell_whose_loss_breaks_is_named_and_the_rest_runs(quick, tmp_path, short_decoding):
    rows = [{"name": "Broken", "method": "full", "lr": 1e30}, {"name": "LoRA", "method": "lora"}]
    comparison = read_comparison(write(tmp_path, quick, rows), tmp_path / "out")
    broken, lora = run_comparison(comparison, console=QUIET)
    assert "the loss is" in results_of(broken)["cell"]["failed"]
    assert results_of(lora)["cell"]["failed"] is None
    assert re.search(r"\| Broken \(failed: the loss is .*\| – \|", write_tables(comparison))


def test_a_failed_seed_is_not_counted(compared, tmp_path, quick):
    """And what there is once for all seeds is taken from one that did not fail."""
    row = {"name": "LoRA", "method": "lora", "seed": [0, 1, 2]}
    comparison = read_comparison(write(tmp_path, quick, [row]), tmp_path / "out")
    for cell in comparison.cells:
        shutil.copytree(compared / "out" / "lora-r8-seed0", cell.path)
        (cell.path / "config.json").write_text(json.dumps(asdict(cell.options)))
    failed = comparison.cells[0].path
    for name in ("summary.json", "results.json", "metrics.json"):
        (failed / name).unlink()
    record = json.loads((failed / "cell.json").read_text())
    (failed / "cell.json").write_text(json.dumps(record | {"failed": "the loss is nan"}))
    (line,) = lines_of(comparison)
    cells = write_tables(comparison).split("| LoRA (failed: the loss is nan) |")[1].split("|")
    assert cells[0].strip() == f"{line.trainable:,}"
    seeds = len(columns_of([line])) + 3  # after trainable, the rates, step and peak
    assert cells[seeds].strip() == "2"
    assert learning_figure([line]) is not None


def test_a_row_is_the_papers_only_with_every_option_of_the_method_at_its_default():
    of_every_method = {
        "data", "output", "model", "test", "dev", "dev_share", "language", "task", "text_column", "audio_column",
        "keep_case", "leading_space", "limit", "strict", "method", "rank", "epochs", "max_steps", "batch_size",
        "accumulation", "warmup", "weight_decay", "spec_augment", "early_stopping", "window", "margin", "full_share",
        "precision", "gradient_checkpointing", "half_base", "cuda_graphs", "workers", "seed", "logging_steps",
        "save_steps", "before", "beams", "decode_once", "group_by", "eval_batch_size",
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
    for name, key in (("zero-shot", ("zero-shot", 8)), ("LoRA, r = 2", ("LoRA", 2)), ("AdaLoRA", ("AdaLoRA", 8))):
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
    """Where zero-shot has utterances in its options too, and a name that Markdown takes for columns."""
    rows = [{"name": name, "method": name} for name in ("zero-shot", "bitfit")] + [{"name": "a|b", "method": "lora"}]
    comparison = read_comparison(write(tmp_path, {**quick, "utterances": 4}, rows, title=None), tmp_path / "out")
    assert len(list(run_comparison(comparison, console=QUIET))) == 3
    assert "parameters" in {file.stem for file in draw_figures(comparison).values()}
    text = write_tables(comparison)
    assert text.startswith("# comparison-file\n")
    assert "| a\\|b |" in text
    write_report(tmp_path / "out")


def test_checkpoints_are_cleared_and_adapters_kept(compared):
    assert not list((compared / "out").glob("*/checkpoints"))
    assert len(list((compared / "out").glob("*/adapter/adapter_config.json"))) == 9


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
    magnitudes = comparison_figures._sparsity(lines).axes[0].get_lines()
    assert [list(line.get_xdata()) for line in magnitudes] == [[0, 0.05, 0.2]] * 6
    default = comparison_figures._sizes(json.loads((folder / "s2-lora-r8-seed0" / "rank_pattern.json").read_text()))
    assert [line.get_ydata()[1] for line in magnitudes] == [size for size, _ in default.values()]


def test_a_finished_cell_is_not_shown_for_other_options(compared, tmp_path, quick):
    rows = [{"name": "LoRA", "method": "lora"}, {"name": "S2-LoRA", "method": "s2lora"}]
    shutil.copytree(compared / "out" / "lora-r8-seed0", tmp_path / "out" / "lora-r8-seed0")
    old = "title: as it was"
    (tmp_path / "out" / "comparison.yaml").write_text(old)
    for changed in ({"lr": 0.01}, {"test": []}, {"epochs": 2}):
        comparison = read_comparison(write(tmp_path, quick | changed, rows), tmp_path / "out")
        name = next(iter(changed))
        with pytest.raises(UserError, match=f"lora-r8-seed0: was finished with {name} = .* delete that folder"):
            list(run_comparison(comparison, console=QUIET))
        with pytest.raises(UserError, match="was finished with"):
            write_tables(comparison)
    # Nothing was run or overwritten, and what does not change a result may change.
    assert (tmp_path / "out" / "comparison.yaml").read_text() == old
    assert not (tmp_path / "out" / "s2-lora-r8-seed0").exists()
    comparison = read_comparison(write(tmp_path, quick | {"eval_batch_size": 3}, rows), tmp_path / "out")
    assert [cell.finished() for cell in comparison.cells] == [True, False]


def test_options_added_since_a_cell_was_finished_count_as_unset(compared, tmp_path, quick):
    copy = tmp_path / "out" / "lora-r8-seed0"
    shutil.copytree(compared / "out" / "lora-r8-seed0", copy)
    config = json.loads((copy / "config.json").read_text())
    del config["utterances"], config["keep_case"]
    (copy / "config.json").write_text(json.dumps(config))
    (cell,) = read_comparison(write(tmp_path, quick, [{"name": "LoRA", "method": "lora"}]), tmp_path / "out").cells
    assert cell.finished()


@pytest.mark.parametrize("method", ["lora", "zero-shot"])
def test_missing_speech_stops_in_one_sentence_and_spoils_nothing(method, compared, tmp_path, quick, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    shutil.copytree(compared / "out" / "lora-r8-seed0", tmp_path / "out" / "lora-r8-seed0")
    gone = {"data": ["no/such-folder"]} if method == "lora" else {"test": ["gone=no/such-folder"]}
    rows = [{"name": "LoRA", "method": "lora"}, {"name": "Gone", "method": method, **gone}]
    comparison = read_comparison(write(tmp_path, quick, rows), tmp_path / "out")
    with pytest.raises(UserError, match=r"gone.*: no/such-folder: no such folder or file"):
        list(run_comparison(comparison, console=QUIET))
    assert [cell.finished() for cell in comparison.cells] == [True, False]
    assert "1 of 2 runs are not finished" in write_tables(comparison)


def test_what_git_keeps_of_a_comparison_is_enough(compared, tmp_path, monkeypatch):
    """A clone shows every table, figure and page, and runs nothing again."""
    kept, clone = tmp_path / "kept", tmp_path / "clone"
    write_report(compared / "out")  # as `s2lora compare` does
    shutil.copytree(compared / "out", kept / "whisper-base")
    shutil.copy(REPRODUCTION / ".gitignore", kept)
    subprocess.run(["git", "init", "--quiet", kept], check=True)
    subprocess.run(["git", "add", "."], cwd=kept, check=True)
    listed = subprocess.run(["git", "ls-files"], cwd=kept, check=True, capture_output=True, text=True).stdout.split()
    for name in listed:
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(kept / name, clone / name)
    assert {Path(name).suffix for name in listed if "/" in name} <= {
        ".json",
        ".txt",
        ".tsv",
        ".svg",
        ".md",
        ".csv",
        ".yaml",
    }
    assert "whisper-base/zero-shot/after/same.tsv" in listed
    assert not [name for name in listed if re.search("adapter|checkpoint|as-published-.*/after", name)]
    monkeypatch.setattr(comparison_module, "_run_cell", lambda *args: pytest.fail("ran again"))
    comparison = read_comparison(compared / "comparison-file.yaml", clone / "whisper-base")
    before = (clone / "whisper-base" / "comparison.md").read_text()
    assert list(run_comparison(comparison, console=QUIET)) == []
    page = write_report(clone / "whisper-base").read_text()
    assert page.count("<figure") == 5
    assert '"zero-shot"' in page
    assert (clone / "whisper-base" / "comparison.md").read_text() == before
    assert "rank" in write_report(clone / "whisper-base" / "s2-lora-r8-seed1").read_text()


def test_the_committed_results_belong_to_the_committed_comparison():
    comparison = read_comparison(REPRODUCTION / "whisper-base.yaml", REPRODUCTION / "whisper-base")
    finished = [cell.finished() for cell in comparison.cells]  # refuses a cell of other options
    assert any(finished)
    for file in comparison.path.rglob("*.json"):
        assert not re.search(r'"/\w+/', file.read_text()), f"{file} names a path of one machine"
