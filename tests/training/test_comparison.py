"""Comparisons: cells of a file, resuming, what stops them and what of them is kept."""

import fcntl
import json
import re
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from rich.console import Console

from fused_s2lora.training import comparison as comparison_module
from fused_s2lora.training.comparison import read_comparison, results_of, run_comparison
from fused_s2lora.training.comparison_figures import learning_figure
from fused_s2lora.training.comparison_lines import columns_of, lines_of
from fused_s2lora.training.comparison_tables import write_tables
from fused_s2lora.training.decoding import Decoding
from fused_s2lora.training.errors import UserError
from fused_s2lora.training.evaluation import Evaluation
from fused_s2lora.training.report import write_report
from fused_s2lora.training.run import RunFolder
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


def test_the_model_as_it_is_is_heard_as_its_row_says(tmp_path, quick, monkeypatch):
    row = {"method": "zero-shot", "margin": 8, "task": "translate", "eval_batch_size": 3}
    comparison = read_comparison(write(tmp_path, quick, [row]), tmp_path / "out")
    asked = []
    monkeypatch.setattr(
        comparison_module, "evaluate", lambda *_, **given: asked.append(given) or Evaluation("zero-shot", [])
    )
    list(run_comparison(comparison, console=QUIET))
    wanted = {
        "model": quick["model"], "window": "trim", "margin": 8, "task": "translate", "precision": "fp32",
        "batch_size": 3, "group_by": ["age"],
    }  # fmt: skip
    assert {name: asked[0][name] for name in wanted} == wanted


def test_what_another_process_finished_meanwhile_is_not_run(tmp_path, quick, monkeypatch):
    comparison = read_comparison(write(tmp_path, quick, ROWS[3:4]), tmp_path / "out")
    (cell,) = comparison.cells
    lock = fcntl.flock

    def finish_and_lock(*arguments):
        monkeypatch.setattr(fcntl, "flock", lock)
        RunFolder(cell.options)
        (cell.path / "cell.json").write_text("{}")
        lock(*arguments)

    monkeypatch.setattr(fcntl, "flock", finish_and_lock)
    monkeypatch.setattr(comparison_module, "_run_cell", lambda *args: pytest.fail("ran again"))
    assert list(run_comparison(comparison, console=QUIET)) == []


@pytest.fixture
def half_run(tmp_path, quick):
    """A comparison of which two cells of four are finished, after an hour and after two."""
    rows = [{"name": name, "method": "lora"} for name in ("LoRA", "LoRA again")]
    rows += [{"name": "LoRA, a half", "method": "lora", "interpolation": 0.5}, {"name": "IA3", "method": "ia3"}]
    comparison = read_comparison(write(tmp_path, quick, rows), tmp_path / "out")
    for hours, cell in zip((1, 2), comparison.cells, strict=False):
        RunFolder(cell.options)
        (cell.path / "cell.json").write_text(json.dumps({"seconds": 3600 * hours}))
    return comparison


def test_the_work_that_is_left_is_told(half_run):
    told = comparison_module._progress(half_run, half_run.cells[2])
    assert told == "3 of 4: lora-a-half-r8-seed0, about 3 h 00 min of work left"


def test_only_another_share_is_taken_from_a_run(half_run, monkeypatch):
    """A run that is asked for twice is trained twice."""
    monkeypatch.setattr(comparison_module, "trained_share", lambda run: ({}, 1.0))
    first, again, half, _ = half_run.cells
    assert comparison_module._differs_in_share(first, half)
    assert not comparison_module._differs_in_share(first, again)
    assert not comparison_module._differs_in_share(half, first)  # it has not been trained


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


def test_checkpoints_are_cleared_and_adapters_kept(compared):
    assert not list((compared / "out").glob("*/checkpoints"))
    assert len(list((compared / "out").glob("*/adapter/adapter_config.json"))) == 9


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


def test_what_is_scored_may_change_until_a_cell_is_finished(compared, tmp_path, quick):
    copy = tmp_path / "out" / "lora-r8-seed0"
    shutil.copytree(compared / "out" / "lora-r8-seed0", copy)
    (copy / "cell.json").unlink()
    row = {"name": "LoRA", "method": "lora", "test": [], "group_by": []}
    (cell,) = read_comparison(write(tmp_path, quick, [row]), tmp_path / "out").cells
    assert not cell.finished()
    (cell,) = read_comparison(write(tmp_path, quick, [row | {"lr": 0.01}]), tmp_path / "out").cells
    with pytest.raises(UserError, match=r"lora-r8-seed0: was begun with lr = None, not 0\.01"):
        cell.finished()


def test_options_added_since_a_cell_was_finished_count_as_unset(compared, tmp_path, quick):
    copy = tmp_path / "out" / "lora-r8-seed0"
    shutil.copytree(compared / "out" / "lora-r8-seed0", copy)
    config = json.loads((copy / "config.json").read_text())
    del config["utterances"], config["keep_case"]
    (copy / "config.json").write_text(json.dumps(config))
    (cell,) = read_comparison(write(tmp_path, quick, [{"name": "LoRA", "method": "lora"}]), tmp_path / "out").cells
    assert cell.finished()


@pytest.mark.parametrize("method", ["lora", "zero-shot"])
def test_missing_speech_stops_in_one_sentence_and_spoils_nothing(method, compared, tmp_path, quick):
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
