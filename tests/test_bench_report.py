"""Tables of rows written by hand: every figure is in its column."""

from bench import report
from bench.cases import Case
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
