"""Every method of the paper in one harness; comparisons: cells, resuming, tables, figures, reports."""

import csv
import json
import math
import re
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from rich.console import Console
from transformers import WhisperConfig, WhisperForConditionalGeneration
from transformers.initialization import no_init_weights
from typer.testing import CliRunner

from fused_s2lora.training import comparison as comparison_module
from fused_s2lora.training import published
from fused_s2lora.training.cli import app
from fused_s2lora.training.comparison import read_comparison, read_part, results_of, run_comparison
from fused_s2lora.training.comparison_figures import draw_figures
from fused_s2lora.training.comparison_tables import columns_of, lines_of, write_tables
from fused_s2lora.training.errors import UserError
from fused_s2lora.training.methods import METHODS, adalora_start, adapt
from fused_s2lora.training.options import TrainOptions
from fused_s2lora.training.rank_maps import rank_maps
from fused_s2lora.training.report import marked, write_report
from fused_s2lora.training.train import parameter_counts, train, training_speech
from tests.training.speech import write_folder

QUIET = Console(quiet=True)
ADALORA = [name for name in METHODS if name.startswith("adalora")]


def options(**fields) -> TrainOptions:
    return TrainOptions(**{"data": ["x"], "output": "y", **fields})


def whisper_medium() -> WhisperForConditionalGeneration:
    sizes = {"d_model": 1024, "encoder_layers": 24, "decoder_layers": 24}
    sizes |= {"encoder_attention_heads": 16, "decoder_attention_heads": 16}
    with no_init_weights():
        return WhisperForConditionalGeneration(
            WhisperConfig(**sizes, encoder_ffn_dim=4096, decoder_ffn_dim=4096, vocab_size=51865)
        )


@pytest.mark.parametrize("method", published.PARAMETERS)
def test_trainable_parameters_on_whisper_medium_are_the_published_ones(method):
    trainable, _ = parameter_counts(adapt(whisper_medium(), options(method=method), steps=100))
    assert trainable == published.PARAMETERS[method]


def test_shares_of_whisper_medium_round_to_the_published_ones():
    whole = 763_857_920
    for method, (share, _) in published.METHODS.items():
        # PEFT's GLoRA gives C [d_in, 1] no second factor, so it has fewer parameters than the paper's.
        if method in METHODS and method not in ("full", "glora"):
            trainable, _ = parameter_counts(adapt(whisper_medium(), options(method=method), steps=100))
            assert round(100 * trainable / whole, 2) == share, method


def test_what_each_method_trains(tiny_whisper):
    names = {}
    for method in METHODS:
        model = adapt(tiny_whisper(), options(method=method, rank=2), steps=100)
        names[method] = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(name.endswith(".bias") for name in names["bitfit"])
    assert len(names["bitfit"]) > 20
    assert {name.split(".")[-3] for name in names["ia3"]} == {"k_proj", "v_proj", "fc2"}
    assert any("conv1" in name for name in names["full"])
    assert not any("encoder.embed_positions" in name for name in names["full"])
    assert all("s2lora" in name for name in names["alpha-lora"] | names["s2lora"])


def test_alpha_lora_has_one_scalar_a_weight_and_nothing_shared(tiny_whisper):
    model = adapt(tiny_whisper(), options(method="alpha-lora", rank=2), steps=100)
    scalars = [p for name, p in model.named_parameters() if "s2lora_coefficients" in name]
    assert {parameter.numel() for parameter in scalars} == {1}
    # q and v of two encoder layers and of two kinds of attention in two decoder layers.
    assert len(scalars) == 2 * (2 + 2 * 2)
    assert parameter_counts(model)[0] == len(scalars) * (2 * 32 * 2 + 1)


def test_frozen_factors_train_coefficients_alone(tiny_whisper):
    model = adapt(tiny_whisper(), options(rank=2, freeze_factors=True), steps=100)
    assert all("coefficients" in name for name, p in model.named_parameters() if p.requires_grad)


@pytest.mark.parametrize(("rank", "start"), [(1, 12), (8, 12), (32, 48)])
def test_adalora_starts_as_published(rank, start):
    assert adalora_start(rank) == start


def test_adalora_without_a_part_lacks_it(tiny_whisper):
    def config(method):
        return adapt(tiny_whisper(), options(method=method), steps=200).peft_config["default"]

    assert {name: config(name).orth_reg_weight > 0 for name in ADALORA} == {
        "adalora": True, "adalora-without-orthogonality": False,
        "adalora-without-allocation": True, "adalora-without-both": False,
    }  # fmt: skip
    assert {name: config(name).target_r for name in ADALORA} == {
        "adalora": 8, "adalora-without-orthogonality": 8, "adalora-without-allocation": 12, "adalora-without-both": 12,
    }  # fmt: skip
    schedule = config("adalora")
    assert (schedule.tinit, schedule.tfinal, schedule.total_step) == (20, 60, 200)


@pytest.fixture(scope="module")
def speech(tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("speech"))


@pytest.fixture(scope="module")
def short_decoding():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fused_s2lora.training.evaluation.MAX_NEW_TOKENS", 4)
        yield


@pytest.fixture(scope="module")
def quick(tiny_folder, speech) -> dict:
    """Options of quick runs."""
    return {
        "model": str(tiny_folder), "data": [str(speech)], "window": "trim", "precision": "fp32", "batch_size": 2,
        "epochs": 1, "save_steps": 2, "logging_steps": 1, "before": False, "test": [f"same={speech}"],
        "group_by": ["age"],
    }  # fmt: skip


@pytest.mark.parametrize("method", [name for name in METHODS if name not in ("s2lora", "lora")])
def test_every_method_trains_and_is_read_again(method, quick, tmp_path, short_decoding, monkeypatch):
    made = options(**{**quick, "output": str(tmp_path / "run"), "method": method, "epochs": 10, "lr": 1e-2, "rank": 2})
    train(made, console=QUIET)
    history = json.loads((tmp_path / "run" / "metrics.json").read_text())
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert sum(map(float, losses[-3:])) < sum(map(float, losses[:3])) - 0.05
    assert (tmp_path / "run" / "model").is_dir() == (METHODS[method].config is None)
    first = (tmp_path / "run" / "after" / "same.tsv").read_text()
    shutil.rmtree(tmp_path / "run" / "after")
    monkeypatch.setattr("fused_s2lora.training.train._train", lambda *args: pytest.fail("trained again"))
    train(made, console=QUIET)
    assert (tmp_path / "run" / "after" / "same.tsv").read_text() == first


def test_adalora_gives_up_ranks_and_adds_its_orthogonality(quick, tmp_path, tiny_whisper):
    found = {}
    for method in ADALORA:
        run = tmp_path / method
        made = options(**{**quick, "output": str(run), "method": method, "epochs": 12, "rank": 2, "test": []})
        train(made, console=QUIET)
        patterns = json.loads((run / "rank_pattern.json").read_text())
        live = sum(sum(value or 0 for value in row) for pattern in patterns for row in pattern["live"])
        first = json.loads((run / "metrics.json").read_text())[0]["loss"]
        found[method] = (live, float(first))
    weights = 12
    assert found["adalora"][0] == found["adalora-without-orthogonality"][0] == 2 * weights
    assert found["adalora-without-allocation"][0] == 12 * weights
    # At the start the factors are far from orthogonal and the loss says so.
    assert found["adalora"][1] > found["adalora-without-orthogonality"][1] + 1
    assert found["adalora-without-allocation"][1] > found["adalora-without-both"][1] + 1


def test_rank_map_of_adalora_counts_what_is_not_zero(tiny_whisper):
    model = adapt(tiny_whisper(), options(method="adalora"), steps=100)
    assert isinstance(model, PeftModel)
    diagonals = [p for name, p in model.named_parameters() if "lora_E" in name]
    with torch.no_grad():
        for parameter in diagonals:
            parameter.fill_(0.5)
        diagonals[0][3:] = 0.0
    encoder, decoder = rank_maps(model)
    assert encoder.live[0] == [12, 3]  # the modules of a layer are k, v, q
    assert encoder.mean_magnitude[0] == pytest.approx([0.5, 0.5 * 3 / 12])
    assert decoder.matrices == ["q", "v", "cross q", "cross v"]
    assert rank_maps(tiny_whisper()) == []
    assert rank_maps(adapt(tiny_whisper(), options(method="lora"), steps=1)) == []


def test_utterances_are_drawn_by_seed(quick):
    chosen = [
        training_speech(options(**quick, utterances=3, seed=seed))[0].dataset["utterance"][:] for seed in (0, 0, 1)
    ]
    assert chosen[0] == chosen[1] != chosen[2]
    assert len(chosen[0]) == 3
    with pytest.raises(UserError, match="--utterances is 999, but there are"):
        training_speech(options(**quick, utterances=999))


def write(path: Path, train: dict, rows: list[dict], **fields) -> Path:
    file = path / "comparison-file.yaml"
    file.write_text(
        yaml.safe_dump({"title": "A comparison", "train": train, "rows": rows, **fields}, allow_unicode=True)
    )
    return file


ROWS = [
    {"name": "zero-shot", "method": "zero-shot", "window": "full"},
    {"name": "S2-LoRA", "method": "s2lora", "seed": [0, 1]},
    {"name": "S2-LoRA, as published", "method": "s2lora", "preset": "paper"},
    {"name": "LoRA", "method": "lora"},
    {"name": "LoRA", "method": "lora", "rank": [2]},
    {"name": "AdaLoRA", "method": "adalora"},
    {"name": "S2-LoRA by α₁", "method": "s2lora", "sparsity_weight": [0.0, 0.3]},
    {"name": "S2-LoRA on less", "method": "s2lora", "utterances": [2]},
]


@pytest.fixture(scope="module")
def compared(quick, short_decoding, tmp_path_factory) -> Path:
    """The folder of a finished comparison."""
    folder = tmp_path_factory.mktemp("comparison")
    comparison = read_comparison(write(folder, quick, ROWS), folder / "out")
    assert len(list(run_comparison(comparison, console=QUIET))) == 10
    return folder


def test_cells_of_a_file(compared):
    comparison = read_comparison(compared / "comparison-file.yaml", compared / "out")
    assert [cell.name for cell in comparison.cells] == [
        "zero-shot", "s2-lora-r8-seed0", "s2-lora-r8-seed1", "s2-lora-as-published-r8-seed0", "lora-r8-seed0",
        "lora-r2-seed0", "adalora-r8-seed0", "s2-lora-by-a-r8-sparsity-weight-0.0-seed0",
        "s2-lora-by-a-r8-sparsity-weight-0.3-seed0", "s2-lora-on-less-r8-utterances-2-seed0",
    ]  # fmt: skip
    assert comparison.cells[5].options.rank == 2
    assert comparison.cells[7].options.sparsity_weight == 0.0


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
        comparison_module, "_run_cell", lambda cell, console: ran.append(cell.path.mkdir() or cell.name)
    )
    assert [cell.name for cell in run_comparison(comparison, console=QUIET)] == ran == ["lora-r2-seed0"]


def test_parts_share_the_work(tmp_path, quick, monkeypatch):
    monkeypatch.setattr(comparison_module, "_run_cell", lambda cell, console: cell.path.mkdir())
    comparison = read_comparison(write(tmp_path, quick, ROWS), tmp_path / "out")
    names = [cell.name for cell in comparison.cells]
    second = [cell.name for cell in run_comparison(comparison, part=read_part("2/3"), console=QUIET)]
    assert second == names[1::3]
    assert [cell.name for cell in run_comparison(comparison, console=QUIET)] == [n for n in names if n not in second]
    for wrong in ("0/2", "3/2", "2", "a/b"):
        with pytest.raises(UserError, match="I/N with I from 1"):
            read_part(wrong)


def test_a_cell_whose_loss_breaks_is_named_and_the_rest_runs(quick, tmp_path, short_decoding):
    rows = [{"name": "Broken", "method": "full", "lr": 1e30}, {"name": "LoRA", "method": "lora"}]
    comparison = read_comparison(write(tmp_path, quick, rows), tmp_path / "out")
    broken, lora = run_comparison(comparison, console=QUIET)
    assert "the loss is" in results_of(broken)["cell"]["failed"]
    assert results_of(lora)["cell"]["failed"] is None
    assert re.search(r"\| Broken \(failed: the loss is .*\| – \|", write_tables(comparison))


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
        assert entry["utc"] == cell["utc"] == row["utc"]
        assert entry["commit"] == cell["commit"]
        assert entry["command"]
        results = json.loads((compared / "out" / entry["cell"] / "results.json").read_text())[-1]
        assert entry["same WER rate"] == results["sets"]["same"]["groups"]["all"]["wer"]["rate"]


def test_checkpoints_are_cleared_and_adapters_kept(compared):
    assert not list((compared / "out").glob("*/checkpoints"))
    assert len(list((compared / "out").glob("*/adapter/adapter_config.json"))) == 9


def test_figures_are_drawn_and_repeat(compared):
    comparison = read_comparison(compared / "comparison-file.yaml", compared / "out")
    drawn = draw_figures(comparison)
    assert {file.stem for file in drawn.values()} == {"rank-map", "parameters", "data", "learning", "sparsity"}
    first = {name: file.read_text() for name, file in drawn.items()}
    assert {name: file.read_text() for name, file in draw_figures(comparison).items()} == first
    assert "AdaLoRA" in first["Ranks kept, layer by matrix"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": []}, "needs `rows`"),
        ({"rows": [{"name": "x"}]}, "has no `method`"),
        ({"rows": [{"method": "magic"}]}, "'magic' is not one of zero-shot, s2lora"),
        ({"rows": [{"method": "lora", "learning_rate": 1}]}, "'learning_rate' in 'lora' is not an option"),
        ({"rows": [{"method": "lora", "output": "x"}]}, "'output' in 'lora' is not an option"),
        (
            {"rows": [{"name": "a", "method": "lora"}, {"name": "a", "method": "lora", "lr": 1.0}]},
            "two different cells",
        ),
        ({"train": {"data": "x", "rank": 0}}, "--rank is 0"),
    ],
)
def test_a_wrong_file_is_refused_in_one_sentence(change, message, quick, tmp_path):
    content = {"train": quick, "rows": [{"name": "LoRA", "method": "lora"}], **change}
    file = tmp_path / "file.yaml"
    file.write_text(yaml.safe_dump(content))
    with pytest.raises(UserError, match=re.escape(message)):
        read_comparison(file, tmp_path)


def test_a_file_that_is_not_yaml_is_refused(tmp_path):
    (tmp_path / "file.yaml").write_text("rows: [")
    with pytest.raises(UserError, match="not to be read as YAML"):
        read_comparison(tmp_path / "file.yaml", tmp_path)
    with pytest.raises(UserError, match="not to be read as YAML"):
        read_comparison(tmp_path / "missing.yaml", tmp_path)


def test_the_committed_comparison_can_be_read():
    file = Path(__file__).parents[2] / "docs" / "reproduction" / "whisper-base.yaml"
    comparison = read_comparison(file, "out")
    methods = {cell.options.method for cell in comparison.cells}
    assert methods == {*METHODS, "zero-shot"}
    assert all(cell.options.window == "trim" for cell in comparison.cells if cell.options.method != "zero-shot")
    assert {asdict(cell.options)["epochs"] for cell in comparison.cells} == {1}


def test_errors_are_marked():
    assert marked("we call it bear", "we call a bear now") == {
        "html": "we call <s>it</s><b>a</b> bear <b>now</b>", "errors": 2,
    }  # fmt: skip
    assert marked("a b", "b") == {"html": "<s>a</s> b", "errors": 1}
    assert marked("<i>", "<i>") == {"html": "&lt;i&gt;", "errors": 0}
    assert marked("", "x y") == {"html": "<b>x</b> <b>y</b>", "errors": 2}
    assert marked("你好吗", "你号吗", by_character=True) == {"html": "你<s>好</s><b>号</b>吗", "errors": 1}


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds neither a run"):
        write_report(tmp_path)


def test_report_of_a_run_is_one_file_that_needs_no_network(compared):
    result = CliRunner().invoke(app, ["report", str(compared / "out" / "s2-lora-r8-seed0")])
    assert result.exit_code == 0, result.output
    text = (compared / "out" / "s2-lora-r8-seed0" / "report.html").read_text()
    assert not re.search(r"""(?:src|href)\s*=|url\(|@import|https?://(?!www\.w3\.org)""", text)


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine to open the report with")
    playwright = pytest.importorskip("playwright.sync_api")
    flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield opened
        opened.close()


@pytest.fixture
def page(browser, compared):
    """The comparison's report, open; errors of its script end the test."""
    file = write_report(compared / "out")
    opened = browser.new_page()
    problems: list[str] = []
    opened.on("pageerror", lambda error: problems.append(str(error)))
    opened.on("request", lambda request: None if request.url.startswith("file:") else problems.append(request.url))
    opened.goto(file.as_uri())
    yield opened
    opened.close()
    assert problems == []


def column(page, heading: str, table: str = "#tables table") -> list[str]:
    names = page.locator(f"{table} >> nth=0 >> thead th").all_inner_texts()
    index = [name.rstrip(" ↑↓") for name in names].index(heading)
    return [row.locator("td").nth(index).inner_text() for row in page.locator(f"{table} >> nth=0 >> tbody tr").all()]


def test_the_page_sorts_and_filters(page):
    assert page.title() == "A comparison"
    before = column(page, "seed")
    page.locator("#tables table >> nth=0 >> th", has_text="trainable_parameters").click()
    counts = [int(value.replace(",", "")) for value in column(page, "trainable_parameters") if value != "–"]
    assert counts == sorted(counts)
    page.locator("#tables table >> nth=0 >> th", has_text="trainable_parameters").click()
    assert column(page, "trainable_parameters")[0] == f"{max(counts):,}"
    page.get_by_label("filter Methods").fill("adalora")
    assert column(page, "row") == ["AdaLoRA"]
    page.get_by_label("filter Methods").fill("")
    assert len(column(page, "row")) == len(before) == 10


def test_the_page_shows_figures_and_rank_values_on_hover(page):
    assert page.locator("figure svg").count() == 5
    cell = page.locator(".map td").first
    cell.hover()
    assert re.fullmatch(r"encoder layer 0, q: \d+ of 8 ranks, mean \|s\| \S+", page.locator("#value").inner_text())
    assert cell.get_attribute("title") == page.locator("#value").inner_text()
    page.locator("#map-name").select_option(label="AdaLoRA, r = 8")
    assert "of 12 ranks" in page.locator(".map caption").first.inner_text()


def test_the_page_shows_transcripts_with_errors_marked(page):
    rows = page.locator("#utterances tbody tr")
    total = rows.count()
    assert total >= 4
    assert page.locator("#count").inner_text() == f"{total} of {total} utterances"
    assert page.locator("#utterances tbody s").count() > 0
    page.locator("#search").fill("bear")
    assert 0 < rows.count() < total
    assert all("BEAR" in text.upper() for text in rows.all_inner_texts())
    page.locator("#search").fill("")
    page.locator("#right").select_option(page.locator("#left").input_value())
    page.locator("#changed").check()
    assert rows.count() == 0
    page.locator("#changed").uncheck()
    page.locator("#utterances th", has_text="word errors").first.click()
    assert rows.count() == total
