"""A run of the benchmarks: what it writes, tables and plots, and what may be asked of it."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from bench import plan, plots, report, run, step
from bench.cases import Case
from bench.providers import PROVIDERS, providers
from tests.bench_cases import DEVICE_IN_HAND, make_small
from tests.oracle import DEVICE

STATIC = {
    "provider": "s2-fused", "kind": "static", "kernel": "linear", "config": "wide", "direction": "forward",
    "dtype": "bf16", "R": 16, "num_warps": 8, "num_stages": 4, "registers": 213, "spilled": 0, "shared_memory": 1024,
    "shared_memory_limit": 2048, "matrix_instructions": {"wgmma": 9},
    "blocks_per_multiprocessor": 1, "occupancy": 0.125,
}  # fmt: skip


@pytest.fixture(autouse=True)
def small_sizes(monkeypatch):
    make_small(monkeypatch)


def app():
    command = typer.Typer()
    command.command()(run.main)
    return command


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    """Every section of a small run, its folder and what it printed."""
    folder = tmp_path_factory.mktemp("run")
    arguments = ["--size", "tiny", "--rows", "40", "--rows", "80", "--batch", "1", "--window", "trim", "--rounds", "3"]
    for name in ("frozen", "peft-lora", "s2-auto", "s2-merged"):
        arguments += ["--provider", name]
    for name in ("frozen", "lora-six", "s2lora"):
        arguments += ["--method", name]
    with pytest.MonkeyPatch.context() as patch:
        make_small(patch)
        patch.setattr(step, "peak_mib", lambda *args: 1.0)  # a process of its own would not see the small sizes
        patch.setattr(run, "measure_device", lambda: DEVICE_IN_HAND)
        patch.setattr(
            run.static,
            "report",
            lambda targets, ranks: [
                dict(STATIC, target=target, R=16 * rank, section="static") for target in targets for rank in ranks
            ],
        )
        result = CliRunner().invoke(app(), [*arguments, "--results", str(folder)])
    assert result.exit_code == 0, result.output
    return folder, result.output


@pytest.fixture
def one_run(finished_run, tmp_path):
    """It in a folder of the test's own."""
    folder, output = finished_run
    return Path(shutil.copytree(folder, tmp_path / "run")), output


def test_a_provider_without_a_colour_is_drawn_too(one_run):
    folder, _ = one_run
    rows = [{**row, "provider": row["provider"].replace("s2", "new")} for row in report.load(folder)]
    plots.draw(rows, folder / "new")
    assert any((folder / "new").glob("*.svg"))


def test_a_run_writes_lines_tables_and_plots(one_run):
    folder, output = one_run
    assert {file.name for file in folder.glob("*.jsonl")} == {
        "device.jsonl",
        "layer.jsonl",
        "step.jsonl",
        "static.jsonl",
    }
    rows = report.load(folder)
    assert all({"device", "versions", "commit", "utc", "command", "kind"} <= row.keys() for row in rows)
    steps = [row for row in rows if row["section"] == "step" and row["kind"] == "measured"]
    assert [row["provider"] for row in steps] == ["frozen", "lora-six", "s2lora"]
    assert all(row["audio_s_per_s"] == pytest.approx(3.9e3 / row["p50_ms"], rel=0.01) for row in steps)
    text = (folder / "tables.md").read_text()
    for heading in ("Devices, measured", "tiny encoder-layer, M 40", "tiny step, batch 1", ", counted", "static"):
        assert heading in text
    assert "tiny encoder-layer, M 80" in output
    kinds = {file.name.split("-")[0] for file in (folder / "plots").glob("*.svg")}
    assert kinds == {"roofline", "time", "step", "bytes"}


def test_a_table_shows_the_newest_line_and_the_right_ratio(one_run):
    folder, _ = one_run
    lines = [json.loads(line) for line in (folder / "step.jsonl").read_text().splitlines()]
    (lora,) = (row for row in lines if row["provider"] == "lora-six" and row["kind"] == "measured")
    newer = {**lora, "provider": "s2lora", "p20_ms": 1, "p50_ms": lora["p50_ms"] / 4, "p80_ms": 3, "peak_mib": 0.5}
    with (folder / "step.jsonl").open("a") as stream:
        stream.write(json.dumps(newer) + "\n")
    (line,) = (
        line
        for line in report.tables(report.load(folder)).splitlines()
        if line.startswith("| s2lora ") and " 0.25 " in line
    )
    assert " 0.50 " in line


def test_figures_of_equal_rows_are_equal(one_run):
    folder, _ = one_run
    first = {file.name: file.read_text() for file in (folder / "plots").iterdir()}
    plots.draw(report.load(folder), folder / "plots")
    assert {file.name: file.read_text() for file in (folder / "plots").iterdir()} == first


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layer", "fc3"], "'fc3' is not one of"),
        (["--section", "all"], "'all' is not one of"),
        (["--size", "huge"], "'huge'"),
        (["--quantize", "nf4", "--method", "full"], "'full' is not one of"),
        (["--provider", "s2-typo"], "'s2-typo' is not one of"),
        (["--rows", "0"], "--rows"),
        (["--rank", "257"], "--rank"),
        (["--batch", "0"], "--batch"),
        (["--tokens", "449"], "--tokens"),
        (["--results", __file__], "is a file"),
    ],
)
def test_a_selection_that_does_not_exist_is_refused(arguments, message):
    result = CliRunner().invoke(app(), arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("│", " ").split())


@pytest.mark.parametrize("section", ["layer", "step", "counted"])
@pytest.mark.parametrize(("option", "value"), [("size", "tiny"), ("rank", 3)])
def test_a_size_or_a_rank_is_that_of_every_section(monkeypatch, tmp_path, section, option, value):
    begun = []
    monkeypatch.setattr(run.Run, "within", lambda self, cases: begun.extend(cases) or [])
    result = CliRunner().invoke(
        app(), ["--section", section, f"--{option}", str(value), "--results", str(tmp_path / "none")]
    )
    assert result.exit_code == 0, result.output
    assert begun
    assert {getattr(case, option) for case in begun} == {value}


def test_a_provider_that_is_not_to_be_had_here_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr(run, "measure_device", lambda: DEVICE_IN_HAND)
    arguments = ["--section", "layer", "--size", "tiny", "--rows", "40", "--precision", "fp32"]
    result = CliRunner().invoke(app(), [*arguments, "--provider", "peft-lora-half", "--results", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "peft-lora-half: refused, not to be had in fp32" in result.output


def test_every_provider_can_be_asked_for():
    case = Case("fc1", "tiny", 40)
    assert {*providers(case, "cuda"), *providers(case, "cpu", counting=True)} == set(PROVIDERS)


def test_a_reason_is_kept_and_shown_as_it_is(monkeypatch, tmp_path, capsys):
    one = run.Run(plan.cpu(), tmp_path, 1.0, None, [], None, [])
    one.keep([{"section": "layer", "provider": "s2-fused", "kind": "refused", "reason": "OSError: [/tmp/x] is [full]"}])
    assert report.load(tmp_path)[0]["reason"] == "OSError: [/tmp/x] is [full]"
    assert "[/tmp/x] is [full]" in capsys.readouterr().out


@pytest.mark.skipif(DEVICE == "cuda", reason="on a GPU each method has its memory measured in turn")
def test_a_method_whose_memory_cannot_be_measured_ends_no_run(monkeypatch):
    def killed(build, method, case):
        if method == "full":
            raise RuntimeError("measuring the memory failed")
        return 1.0

    monkeypatch.setattr(step, "peak_mib", killed)
    refused, measured = step.measure(step.StepCase("tiny", 1, "trim"), methods=["full", "frozen"], rounds=3)
    assert (refused["provider"], refused["kind"]) == ("full", "refused")
    assert "measuring the memory failed" in refused["reason"]
    assert (measured["provider"], measured["kind"]) == ("frozen", "measured")


def test_what_no_time_is_left_for_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(run, "measure_device", lambda: DEVICE_IN_HAND)
    arguments = ["--section", "layer", "--size", "tiny", "--minutes", "0", "--results", str(tmp_path)]
    result = CliRunner().invoke(app(), arguments)
    assert result.exit_code == 0
    assert "no time for: tiny encoder-layer" in result.output
    assert not (tmp_path / "layer.jsonl").exists()
    result = CliRunner().invoke(app(), [*arguments[:-1], str(tmp_path / "new")])
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(("asked", "made"), [(["--rounds", "5"], 5), ([], 3)])
def test_rounds_asked_for_are_made_whatever_time_is_planned(monkeypatch, tmp_path, asked, made):
    monkeypatch.setattr(run, "measure_device", lambda: DEVICE_IN_HAND)
    planned = replace(getattr(plan, DEVICE)(), seconds=0.0)
    monkeypatch.setattr(plan, DEVICE, lambda: planned)
    arguments = ["--section", "layer", "--size", "tiny", "--rows", "40", "--provider", "frozen", *asked]
    result = CliRunner().invoke(app(), [*arguments, "--results", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert {row["rounds"] for row in report.load(tmp_path) if row["section"] == "layer"} == {made}
