"""The report's page: what is in the file, and in a browser sorting, filtering, hovering, transcripts."""

import csv
import json
import re
import shutil
import statistics
from dataclasses import asdict

import pytest
from typer.testing import CliRunner

from fused_s2lora.training.cli import app
from fused_s2lora.training.comparison import read_comparison
from fused_s2lora.training.comparison_figures import draw_figures
from fused_s2lora.training.errors import UserError
from fused_s2lora.training.figures import run_svg
from fused_s2lora.training.report import marked, write_report
from fused_s2lora.training.run import last_command
from tests.training.comparisons import write
from tests.training.speech import TEXTS


def test_errors_are_marked():
    assert marked("we call it bear", "we call a bear now") == {
        "html": "we call <s>it</s><b>a</b> bear <b>now</b>", "errors": 2,
    }  # fmt: skip
    assert marked("a b", "b") == {"html": "<s>a</s> b", "errors": 1}
    assert marked("<i>", "<i>") == {"html": "&lt;i&gt;", "errors": 0}
    assert marked("", "x y") == {"html": "<b>x</b> <b>y</b>", "errors": 2}
    assert marked("你好吗", "你号吗", by_character=True) == {"html": "你<s>好</s><b>号</b>吗", "errors": 1}
    assert marked("", "你好", by_character=True) == {"html": "<b>你</b><b>好</b>", "errors": 2}


def test_utterances_of_one_name_are_all_shown(compared, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(compared / "out" / "lora-r8-seed0", run)
    table = run / "after" / "same.tsv"
    head, first, second, *_ = table.read_text().splitlines()
    table.write_text("\n".join([head, first, second.replace("u1.flac", "u0.flac")]) + "\n")
    text = write_report(run).read_text()
    assert re.findall(r'"utterance": "([^"]*)".*?"reference": "([^"]*)"', text) == [
        ("u0.flac", TEXTS[0]),
        ("u0.flac", TEXTS[1]),
    ]


def test_columns_of_any_name_are_shown_and_a_number_that_json_lacks_is_none(compared, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(compared / "out" / "lora-r8-seed0", run)
    table = run / "after" / "same.tsv"
    table.write_text(table.read_text().replace("\tspeaker\t", "\tspeaker_id\t", 1))
    metrics = json.loads((run / "metrics.json").read_text())
    losses = [entry for entry in metrics if "loss" in entry]
    losses[0]["cross_entropy"] = losses[0]["loss"] = float("nan")
    (run / "metrics.json").write_text(json.dumps(metrics))
    text = write_report(run).read_text()
    data = re.search(r"<script[^>]*application/json[^>]*>(.*?)</script>", text, re.DOTALL)
    page = json.loads(data[1], parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    rows = page["transcripts"]["sets"]["same"]["rows"]
    assert rows[0].keys() == {"utterance", "speaker_id", "age", "reference", "hypothesis"}


def test_a_row_may_have_dollars_in_its_name(compared, quick, tmp_path):
    """They are not mathematics."""
    rows = [{"name": "a $x_r_8 and $y", "method": "s2lora"}, {"name": "$b$", "method": "lora"}]
    comparison = read_comparison(write(tmp_path, quick, rows), tmp_path / "out")
    for cell, like in zip(comparison.cells, ("s2-lora-r8-seed0", "lora-r8-seed0"), strict=True):
        shutil.copytree(compared / "out" / like, cell.path)
        (cell.path / "config.json").write_text(json.dumps(asdict(cell.options)))
    assert ">$b$<" in draw_figures(comparison)["Error against trainable parameters"].read_text()


def test_a_row_may_begin_with_an_underscore_and_be_scored_on_sets_of_its_own(compared, quick, tmp_path, recwarn):
    """Matplotlib leaves such names out of a legend. Colours are those of the row in every panel."""
    rows = [
        {"name": "_a", "method": "lora"},
        {"name": "_b", "method": "lora", "interpolation": [0.5]},
        {"name": "方法", "method": "adalora", "test": ["other=x"]},
    ]
    comparison = read_comparison(write(tmp_path, quick, rows), tmp_path / "out")
    for cell in comparison.cells:
        shutil.copytree(compared / "out" / f"{cell.options.method}-r8-seed0", cell.path)
        (cell.path / "config.json").write_text(json.dumps(asdict(cell.options)))
        summary = json.loads((cell.path / "summary.json").read_text())
        (cell.path / "summary.json").write_text(
            json.dumps(summary | {"interpolation": cell.options.interpolation or 1})
        )
        if cell.options.test != quick["test"]:
            results = (cell.path / "results.json").read_text()
            (cell.path / "results.json").write_text(results.replace('"same": {', '"other": {'))
    drawn = draw_figures(comparison)
    assert "Error in other speech, by the share of the update" not in drawn  # no row is scored on both sets
    learning = drawn["Learning curves"].read_text()
    assert ">_a<" in learning
    assert ">方法<" in learning
    parameters = drawn["Error against trainable parameters"].read_text()
    assert ">_a<" in parameters
    assert ">方法<" in parameters
    assert [str(one.message) for one in recwarn if "Glyph" in str(one.message) or "artists" in str(one.message)] == []


def test_a_damaged_table_of_transcripts_is_named(compared, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(compared / "out" / "lora-r8-seed0", run)
    table = run / "after" / "same.tsv"
    whole = table.read_text()
    table.write_text(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=rf"{re.escape(str(table))}: is damaged \(the columns of utterance"):
        write_report(run)
    table.write_text(whole, encoding="utf-16")
    with pytest.raises(UserError, match=rf"{re.escape(str(table))}: is damaged .*; restore it, or delete it"):
        write_report(run)
    table.unlink()
    write_report(run)


def test_a_folder_without_a_run_is_refused(tmp_path, tiny_folder):
    for folder in (tmp_path, tiny_folder):  # a model has a config.json too
        with pytest.raises(UserError, match="holds neither a run"):
            write_report(folder)


def test_the_last_command_is_the_runs(tmp_path):
    """A run that was stopped as it began has none."""
    assert last_command(tmp_path) == ""
    (tmp_path / "command.txt").touch()
    assert last_command(tmp_path) == ""
    (tmp_path / "command.txt").write_text("s2lora train --seed 0\ns2lora train --seed 1\n")
    assert last_command(tmp_path) == "s2lora train --seed 1"


def test_a_damaged_file_of_a_comparison_is_named(compared, tmp_path):
    shutil.copytree(compared / "out", tmp_path / "out")
    damaged = next((tmp_path / "out").glob("*/summary.json"))
    damaged.write_text(damaged.read_text()[:20])
    with pytest.raises(UserError, match=f"{re.escape(str(damaged))}: is damaged"):
        write_report(tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "content"), [("cell", "null"), ("summary", "[1]"), ("config", "3"), ("results", "{}")]
)
def test_a_file_of_a_comparison_that_holds_something_else_is_named(name, content, compared, tmp_path):
    shutil.copytree(compared / "out", tmp_path / "out")
    damaged = next((tmp_path / "out").glob(f"*/{name}.json"))
    damaged.write_text(content)
    with pytest.raises(UserError, match=rf"{re.escape(str(damaged))}: is damaged \(it holds {re.escape(content)} and"):
        write_report(tmp_path / "out")


def test_a_run_has_its_learning_curve(compared):
    run = compared / "out" / "s2-lora-r8-seed0"
    assert "<h2>Learning curve</h2>" in write_report(run).read_text()
    metrics = json.loads((run / "metrics.json").read_text())
    curve = run_svg(metrics)
    assert ">cross-entropy per token<" in curve
    assert ">development<" not in curve
    assert ">development<" in run_svg([*metrics, {"eval_loss": 3.0, "step": 2}])
    assert "mathdefault" not in curve
    assert run_svg([]) is run_svg([{"loss": 1.0, "step": 1}]) is None


def test_report_of_a_run_is_one_file_that_needs_no_network(compared):
    result = CliRunner().invoke(app, ["report", str(compared / "out" / "s2-lora-r8-seed0")])
    assert result.exit_code == 0, result.output
    text = (compared / "out" / "s2-lora-r8-seed0" / "report.html").read_text()
    assert not re.search(r"""(?:src|href)\s*=(?!"#)|url\((?!#)|@import|https?://(?!www\.w3\.org)""", text)


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


def column(page, heading: str, number: int = 0, tables: str = "#tables table") -> list[str]:
    """Of the table with this number among these on the page."""
    table = page.locator(tables).nth(number)
    names = table.locator("thead th").all_inner_texts()
    index = [name.rstrip(" ↑↓") for name in names].index(heading)
    return [row.locator("td").nth(index).inner_text() for row in table.locator("tbody tr").all()]


def test_the_page_sorts_and_filters(page):
    assert page.title() == "A comparison"
    before = column(page, "seed", 1)
    heading = page.locator("#tables table").nth(1).locator("th", has_text="trainable")
    heading.click()
    counts = [int(value.replace(",", "")) for value in column(page, "trainable", 1) if value != "–"]
    assert counts == sorted(counts)
    heading.click()
    assert column(page, "trainable", 1)[0] == f"{max(counts):,}"
    page.get_by_label("filter Runs: error").fill("adalora")
    assert column(page, "method", 1) == ["AdaLoRA"]
    page.get_by_label("filter Runs: error").fill("")
    assert len(column(page, "method", 1)) == len(before) == 10
    for number in (0, 1):  # methods, runs
        ranks = dict(zip(column(page, "method", number), column(page, "rank", number), strict=True))
        assert (ranks["zero-shot"], ranks["AdaLoRA"]) == ("–", "8")


def test_the_page_has_means_over_seeds(page, compared):
    records = json.loads((compared / "out" / "comparison.json").read_text())
    rates = [entry["same WER rate"] for entry in records if entry["row"] == "S2-LoRA"]
    assert len(rates) > 1
    page.get_by_label("filter Methods").fill("s2-lora")
    assert column(page, "method", 0)[0] == "S2-LoRA"
    shown = [column(page, heading, 0)[0] for heading in ("seeds", "same WER", "same WER, ±")]
    expected = (statistics.fmean(rates), statistics.stdev(rates))
    assert int(shown[0]) == len(rates)
    assert [float(value) for value in shown[1:]] == pytest.approx(expected, abs=0.051)


def test_the_page_sets_rows_against_the_first(page):
    assert page.get_by_role("heading", name="Differences from S2-LoRA, points").count() == 1
    page.get_by_label("filter Differences").fill("as published")
    row = page.locator("#tables table >> nth=2 >> tbody tr")
    assert row.count() == 1
    heads = page.locator("#tables table >> nth=2 >> th").all_inner_texts()
    values = dict(zip(heads, row.locator("td").all_inner_texts(), strict=True))
    assert (values["method"], values["seeds"], values["error"]) == ("S2-LoRA, as published", "1", "same WER")
    assert float(values["points: 95 % from"]) <= float(values["points"]) <= float(values["points: to"])


def test_the_page_shows_figures_and_rank_values_on_hover(page):
    assert page.locator("figure svg").count() == 5
    cell = page.locator(".map td").first
    cell.hover()
    assert re.fullmatch(r"encoder layer 0, q: \d+ of 8 ranks, mean \|s\| \S+", page.locator("#value").inner_text())
    assert cell.get_attribute("title") == page.locator("#value").inner_text()
    page.locator("#map-name").select_option(label="AdaLoRA")
    assert "of 12 ranks" in page.locator(".map caption").first.inner_text()


def test_the_page_shows_transcripts_with_errors_marked(page):
    rows = page.locator("#utterances tbody tr")
    assert page.locator("#left").input_value() == "zero-shot"
    assert page.locator("#right").input_value() == "S2-LoRA"
    offered = page.locator("#right option").all_inner_texts()
    assert {"LoRA, r = 8", "LoRA, r = 2", "S2-LoRA, as published"} <= set(offered)
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
    errors = [int(value) for value in column(page, "word errors", tables="#utterances")]
    assert errors == sorted(errors)
    assert len(errors) == total


def test_the_page_of_one_run_shows_its_transcripts_once(browser, compared):
    opened = browser.new_page()
    opened.goto(write_report(compared / "out" / "s2-lora-r8-seed0").as_uri())
    assert column(opened, "unit") == ["WER"] * len(column(opened, "set"))
    heads = opened.locator("#utterances th").all_inner_texts()
    assert heads[-2:] == ["after", "word errors"]
    assert not opened.locator("#right").is_visible()
    opened.locator(".map td").first.hover()
    assert "of 8 ranks" in opened.locator("#value").inner_text()
    opened.close()


def test_an_endless_repetition_does_not_stretch_the_page(browser, compared, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(compared / "out" / "lora-r8-seed0", run)
    table = run / "after" / "same.tsv"
    lines = table.read_text().split("\n")
    cells = lines[1].split("\t")
    cells[lines[0].split("\t").index("normalized_hypothesis")] = "truly" * 300
    table.write_text("\n".join([lines[0], "\t".join(cells), *lines[2:]]))
    opened = browser.new_page(viewport={"width": 1200, "height": 800})
    opened.goto(write_report(run).as_uri())
    assert opened.locator("td.text", has_text="trulytruly").bounding_box()["width"] < 800
    opened.close()


def test_the_page_finds_marks_sorts_decimals_and_shows_ranks_without_a_size(browser, compared, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(compared / "out" / "s2-lora-r8-seed0", run)
    with (run / "after" / "same.tsv").open(newline="") as stream:
        rows = list(csv.DictReader(stream, delimiter="\t"))
    values = ["0.5", "0.25", "-1", "10", "9", "-2"]
    for row, value in zip(rows, values, strict=True):
        row["age"] = value
    rows[1]["reference"] = "<unk> " + rows[1]["reference"]
    with (run / "after" / "same.tsv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]), delimiter="\t")
        writer.writeheader()
        writer.writerows(rows)
    patterns = json.loads((run / "rank_pattern.json").read_text())
    patterns[0]["mean_magnitude"][0][0] = float("nan")
    (run / "rank_pattern.json").write_text(json.dumps(patterns))
    opened = browser.new_page()
    opened.goto(write_report(run).as_uri())
    opened.locator("#search").fill("<unk>")
    assert column(opened, "reference", tables="#utterances") == [rows[1]["reference"]]
    opened.locator("#search").fill("<s>")  # the marks of errors are no words
    assert column(opened, "reference", tables="#utterances") == []
    opened.locator("#search").fill("")
    opened.locator("#utterances th", has_text="age").click()
    assert column(opened, "age", tables="#utterances") == sorted(values, key=float)
    assert opened.locator(".map td").first.get_attribute("title").endswith("mean |s| –")
    opened.close()


def test_a_rank_map_fits_a_narrow_window_and_is_printed_on_white_in_a_dark_one(browser, compared):
    opened = browser.new_page(viewport={"width": 375, "height": 700}, color_scheme="dark")
    opened.goto(write_report(compared / "out" / "s2-lora-r8-seed0").as_uri())
    assert opened.evaluate("document.documentElement.scrollWidth") == 375
    assert opened.evaluate("(map => map.scrollWidth > map.clientWidth)([...document.querySelectorAll('.map')].at(-1))")
    paper = "getComputedStyle(document.body).backgroundColor"
    assert opened.evaluate(paper) == "rgb(21, 24, 28)"
    opened.emulate_media(media="print")
    assert opened.evaluate(paper) == "rgb(255, 255, 255)"
    assert opened.evaluate("getComputedStyle(document.querySelector('.map td')).printColorAdjust") == "exact"
    opened.close()


def test_a_run_of_any_names_fits_a_narrow_window_and_paper(browser, compared, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(compared / "out" / "lora-r8-seed0", run)
    results = json.loads((run / "results.json").read_text())
    for name in ("b" * 100, "2024"):
        results[-1]["sets"][name] = results[-1]["sets"]["same"]
        table = (run / "after" / "same.tsv").read_text().replace("\tspeaker\t", "\tsaid\t", 1)
        (run / "after" / f"{name}.tsv").write_text(table)
    (run / "after" / "same.tsv").unlink()
    (run / "results.json").write_text(json.dumps(results))
    (run / "after" / "results.json").write_text(json.dumps(results[-1]))
    opened = browser.new_page(viewport={"width": 375, "height": 700})
    opened.goto(write_report(run).as_uri())
    assert opened.locator("#set option").all_inner_texts() == ["b" * 100, "2024"]  # as they were scored
    assert column(opened, "said", tables="#utterances")[:3] == ["s0", "s1", "s2"]
    assert opened.evaluate("document.documentElement.scrollWidth") == 375
    opened.evaluate("find('utterances').tBodies[0].innerHTML = '<tr><td>a<td>b</tr>'.repeat(50)")  # more than is seen
    assert opened.evaluate("(box => box.scrollHeight > box.clientHeight)(find('utterances').parentElement)")
    opened.emulate_media(media="print")
    assert opened.evaluate("(box => box.scrollHeight <= box.clientHeight)(find('utterances').parentElement)")
    opened.close()


def test_the_page_has_no_zero_below_zero(page):
    assert page.evaluate("[-0.04, -0.06, 0.04, -25].map(value => shown(value, 1))") == ["0.0", "-0.1", "0.0", "-25"]
