"""Tables of rows written by hand: every figure is in its column."""

import json

import matplotlib.pyplot as plt
import pytest
import typer
from typer.testing import CliRunner

from bench import plots, report
from bench.cases import Case
from bench.measure import record
from bench.step import StepCase


def line_of(provider, rows):
    """The provider's line in the one table of these rows."""
    (line,) = (line for line in report.tables(rows).splitlines() if line.startswith(f"| {provider} |"))
    return line


def heads_of(rows):
    (line,) = (line for line in report.tables(rows).splitlines() if "| launches" in line)
    return line


def timed(provider, which, p50_ms, **more):
    case = {**Case("fc1", "tiny", 40).fields(), "section": "layer", "kind": "measured", "pass": which, "floor_ms": 2.0}
    case |= {"p20_ms": p50_ms - 0.1, "p50_ms": p50_ms, "p80_ms": p50_ms + 0.2, "peak_mib": 55.0}
    return {**case, "device": "a GPU", "utc": "2026-11-26T00:00:00+00:00", "provider": provider, **more}


def test_a_measured_layer_is_set_against_frozen_addmm_peft_and_floor():
    rows = [
        timed("frozen", "both", 3.0), timed("addmm-lora", "both", 3.6), timed("peft-lora", "both", 6.0),
        timed("s2-auto", "forward", 1.5), timed("s2-auto", "backward", 2.75),
        timed("s2-auto", "both", 4.5, peak_mib=123.4, counted_launches=7),
    ]  # fmt: skip
    assert heads_of(rows) == (
        "| provider | forward ms | backward ms | both p20 / p50 / p80 ms | / frozen | / addmm-lora | / peft-lora "
        "| / floor | peak MiB | launches c |"
    )
    assert line_of("s2-auto", rows) == (
        "| s2-auto | 1.5 | 2.75 | 4.4 / 4.5 / 4.7 | 1.50 | 1.25 | 0.75 | 2.25 | 123 | 7 |"
    )


def counted(case, provider, launches, gigabytes, **more):
    row = {"section": "layer", "kind": "counted", "provider": provider, "counted_launches": launches}
    row |= {"counted_bytes": gigabytes * 1e9, "counted_peak_mib": 30.4, "implied_ms": {"H100 SXM": 0.75, "L4": 120.4}}
    return {**case, **row, **more}


def test_what_is_counted_beyond_frozen_is_a_share_of_what_peft_adds():
    layer = Case("fc1", "tiny", 40).fields()
    rows = [
        counted(layer, "frozen", 10, 1.0), counted(layer, "peft-lora", 50, 5.0), counted(layer, "s2-fused", 20, 2.6)
    ]  # fmt: skip
    assert heads_of(rows) == (
        "| provider | launches | GB | launches beyond | GB beyond | peak MiB | H100 SXM ms | L4 ms |"
    )
    assert line_of("s2-fused", rows) == "| s2-fused | 20 | 2.60 | 0.25 | 0.40 | 30 | 0.75 | 120 |"
    assert line_of("frozen", rows) == "| frozen | 10 | 1.00 | 0.00 | 0.00 | 30 | 0.75 | 120 |"
    assert line_of("s2-fused", rows[2:]) == "| s2-fused | 20 | 2.60 | – | – | 30 | 0.75 | 120 |"


def test_the_peak_of_a_counted_step_holds_the_state_of_its_optimizer():
    case = vars(StepCase("tiny", 1, "trim"))
    rows = [
        counted(case, "frozen", 10, 1.0, section="step"), counted(case, "lora-six", 50, 5.0, section="step"),
        counted(case, "s2lora-fused", 20, 2.6, section="step", state_mib=12.3),
    ]  # fmt: skip
    assert line_of("s2lora-fused", rows) == "| s2lora-fused | 20 | 2.60 | 0.25 | 0.40 | 43 | 0.75 | 120 |"


def test_time_on_the_gpu_has_columns_where_it_was_measured():
    rows = [timed("frozen", "both", 4.0, gpu_p50_ms=2.0), timed("s2-auto", "both", 4.0, gpu_p50_ms=2.5)]
    rows.append(timed("s2-split", "both", 4.0))  # of an earlier run
    assert heads_of(rows).endswith("| launches c | both, queued ms | / frozen |")
    assert line_of("s2-auto", rows).endswith("| 2.5 | 1.25 |")
    assert line_of("s2-split", rows).endswith("| – | – |")
    assert "queued" not in report.tables([timed("frozen", "both", 4.0)])


def test_times_of_two_runs_are_not_divided():
    rows = [timed("frozen", "both", 3.0, command="now"), timed("s2-auto", "both", 4.5, command="now")]
    rows.append(timed("s2-split", "both", 4.5, command="before"))
    assert " | 1.50 | – | – | 2.25 |" in line_of("s2-auto", rows)
    assert " | – | – | – | 2.25 |" in line_of("s2-split", rows)


def test_times_by_rows_are_over_the_frozen_ones_of_the_same_run():
    def at(provider, rows, p50_ms, command):
        return timed(provider, "both", p50_ms, layer="encoder-layer", rows=rows, command=command)

    lines = [at(name, m, p50_ms, "now") for m in (16, 64) for name, p50_ms in (("frozen", 2.0), ("s2-auto", 3.0))]
    lines += [at("s2-split", 16, 5.0, "now"), at("s2-split", 64, 5.0, "before"), at("s2-fused", 16, 5.0, "before")]
    figure = plots._time_by_rows("a GPU", lines)
    drawn = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in figure.axes[0].lines}
    plt.close(figure)
    assert drawn == {"frozen": ([16, 64], [1, 1]), "s2-auto": ([16, 64], [1.5, 1.5]), "s2-split": ([16], [2.5])}


def test_steps_that_differ_in_tokens_or_rank_are_drawn_apart():
    step = {"section": "step", "provider": "s2lora", "audio_s_per_s": 5.0}
    cases = [StepCase("tiny", 1), StepCase("tiny", 1, tokens=32), StepCase("tiny", 1, rank=32)]
    figure = plots._throughput("a GPU", [{**vars(case), **step} for case in cases])
    assert [len(axes.patches) for axes in figure.axes] == [1, 1, 1]
    plt.close(figure)
    layer = [Case("encoder-layer", "tiny", 40, rank).fields() for rank in (8, 32)]
    figure = plots._bytes([counted(case, "s2-fused", 20, 2.6) for case in layer])
    assert [len(axes.patches) for axes in figure.axes] == [1, 1]
    plt.close(figure)


def test_what_was_refused_and_then_measured_is_not_refused_and_the_other_way_round():
    refused = timed("s2-auto", None, 1.0, kind="refused", reason="no memory")
    measured = timed("s2-auto", "both", 4.5)
    assert "refused" not in report.tables([refused, measured])
    assert "| s2-auto |" not in report.tables([measured, refused])
    assert "s2-auto: refused, no memory" in report.tables([measured, refused])


def test_the_hosts_time_is_told_by_device():
    rows = [timed("frozen", "both", p50_ms, section="host", device=name) for name, p50_ms in (("A", 1.5), ("B", 2.5))]
    first, second = report.tables(rows).split("### ")[1:]
    assert "A, 2026" in first
    assert "| frozen | 1.5 |" in first
    assert "B, 2026" in second
    assert "| frozen | 2.5 |" in second


def test_the_newest_counted_line_is_that_of_any_device(tmp_path):
    layer = Case("fc1", "tiny", 40).fields()
    lines = [counted(layer, "frozen", launches, 1.0, device=name) for name, launches in (("A", 3), ("B", 4), ("A", 5))]
    lines += [timed("frozen", "both", 1.0, device=name) for name in ("A", "B")]
    (tmp_path / "layer.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    kept = report.load(tmp_path)
    assert [row["counted_launches"] for row in kept if row["kind"] == "counted"] == [5]
    assert [row["device"] for row in kept if row["kind"] == "measured"] == ["A", "B"]


def test_a_line_cut_short_costs_itself_and_no_more(tmp_path, capsys):
    file = tmp_path / "layer.jsonl"
    record(file, [timed("frozen", "both", 1.0)])
    file.write_text(file.read_text() + '{"section": "lay')  # a run that was killed
    record(file, [timed("s2-auto", "both", 2.0)])
    assert [row["provider"] for row in report.load(tmp_path)] == ["frozen", "s2-auto"]
    assert f"{file}, line 2: no result" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["nothing", "empty"])
def test_a_folder_without_results_is_refused_and_left_as_it_is(tmp_path, name):
    (tmp_path / "empty").mkdir()
    command = typer.Typer()
    command.command()(report.main)
    result = CliRunner().invoke(command, [str(tmp_path / name)])
    assert result.exit_code == 2
    assert "Invalid value" in result.output
    assert not list((tmp_path / "empty").iterdir())
