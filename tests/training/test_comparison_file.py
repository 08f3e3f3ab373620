"""What a comparison's file may say."""

import re
from dataclasses import asdict

import pytest
import yaml

from fused_s2lora.training.comparison import read_comparison
from fused_s2lora.training.errors import UserError
from fused_s2lora.training.methods import METHODS
from tests.training.comparisons import REPRODUCTION, write


def test_names_in_other_scripts_give_folders_of_their_own(tmp_path, quick):
    names = ("方法一", "方法二", "Größe_α₁")
    rows = [{"name": name, "method": "lora", "lr": lr} for name, lr in zip(names, (1e-3, 2e-3, 3e-3), strict=True)]
    comparison = read_comparison(write(tmp_path, quick, rows), tmp_path / "out")
    assert [cell.name for cell in comparison.cells] == ["方法一-r8-seed0", "方法二-r8-seed0", "größe-a-r8-seed0"]


def test_a_name_or_title_over_several_lines_is_one_line(tmp_path, quick):
    rows = [{"name": "S2-LoRA\nof old\n", "method": "s2lora"}]
    comparison = read_comparison(write(tmp_path, quick, rows, title="Two\nlines\n"), tmp_path / "out")
    assert (comparison.title, comparison.cells[0].row) == ("Two lines", "S2-LoRA of old")


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
            "two different cells are called a-r8: lr is None in 'a' and 1.0 in 'a'; give one of the rows another name",
        ),
        (
            {"rows": [{"method": "lora"}, {"method": "lora", "lr": 0.1, "seed": [1, 2]}]},
            "two different cells are called lora-r8: lr is None in 'lora' and 0.1 in 'lora'",
        ),
        (
            {"rows": [{"name": "a!", "method": "lora"}, {"name": "A", "method": "glora", "seed": 1}]},
            "two different cells are called a-r8: method is 'lora' in 'a!' and 'glora' in 'A'",
        ),
        (
            {"rows": [{"name": "a", "method": "lora"}, {"name": "a", "method": "full"}]},
            "two rows, a-r8 and a, are called 'a'; give one another name",
        ),
        ({"rows": [{"name": "x", "method": "zero-shot", "seed": [0, 1]}]}, "are called x: seed is 0 in 'x' and 1 in"),
        (
            {"rows": [{"method": "lora", "test": ["a=x"]}, {"method": "glora", "test": ["a=y"]}]},
            "two test sets are named 'a', x@en and y@en; name them apart in `test`",
        ),
        (
            {"rows": [{"method": "lora", "test": ["x@de"]}, {"method": "glora", "test": ["x"], "task": "translate"}]},
            "two test sets are named 'x', x@de and x@en, translated; name them apart",
        ),
        ({"train": {"data": "x", "rank": 0}}, "--rank is 0"),
        ({"train": {"data": "x", "epochs": 0}}, "--epochs is 0"),
        ({"train": {"data": "x", "rank": "eight"}}, "rank of 'LoRA' is 'eight', not a whole number"),
        ({"train": {"data": ["x"], "test": [1]}}, "test of 'LoRA' is [1], not a list of names"),
        ({"train": {"data": "x", "strict": "no"}}, "strict of 'LoRA' is 'no', not true or false"),
        ({"train": "x"}, "`train` is 'x'"),
        ({"train": {}}, "'LoRA' has no `data`"),
        ({"seeds": [1, 2]}, "'seeds' is not one of title, timed, train, methods, rows"),
        ({"methods": ["lora"]}, "`methods` is ['lora'], not methods with their options"),
        ({"methods": {"lora": 1e-3}}, "`methods` is {'lora': 0.001}, not methods with their options"),
        ({"methods": {"magic": {}}}, "the method 'magic' under `methods` is not one of s2lora"),
        ({"methods": {"lora": {"rate": 1}}}, "'rate' in 'LoRA' is not an option"),
        ({"methods": {"lora": {"lr": "quick"}}}, "lr of 'LoRA' is 'quick', not a number"),
        ({"rows": [{"name": "*", "method": "zero-shot"}]}, "the row name '*' has no letter or digit"),
        ({"rows": [{"name": "é" * 200, "method": "lora"}]}, "é' is too long to call a folder by; give it a"),
        ({"timed": "no"}, "`timed` is 'no', not true or false"),
        ({"rows": [{"method": "lora", "seed": []}]}, "seed of 'lora' is an empty list"),
        ({"rows": [{"method": "s2lora", "sharing": "some"}]}, "'s2lora': S2-LoRA cannot be set up so: sharing='some'"),
        ({"rows": [{"method": "s2lora", "preset": "papr"}]}, "--preset 'papr' is not one of"),
    ],
)
def test_a_wrong_file_is_refused_in_one_sentence(change, message, quick, tmp_path):
    content = {"train": quick, "rows": [{"name": "LoRA", "method": "lora"}], **change}
    file = tmp_path / "file.yaml"
    file.write_text(yaml.safe_dump(content))
    with pytest.raises(UserError, match=re.escape(message)):
        read_comparison(file, tmp_path)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("rows: [{method: lora}]\ntrain: {data: x}\nrows: [{method: glora}]\n", "'rows' comes twice .* line 3"),
        ("train: {data: x}\nrows:\n  - {method: lora, rank: 8, rank: 4}\n", "'rank' comes twice .* line 3"),
    ],
)
def test_what_is_said_twice_is_refused(text, told, tmp_path):
    (tmp_path / "file.yaml").write_text(text)
    with pytest.raises(UserError, match=told):
        read_comparison(tmp_path / "file.yaml", tmp_path)


def test_a_row_may_take_over_and_change_what_another_says(tmp_path):
    text = "train: {data: x}\nrows:\n  - &a {method: lora, lr: 1e-3}\n  - {<<: *a, name: b, lr: 2e-3}\n"
    (tmp_path / "file.yaml").write_text(text)
    rates = [cell.options.lr for cell in read_comparison(tmp_path / "file.yaml", tmp_path).cells]
    assert rates == [1e-3, 2e-3]


def test_a_file_that_is_not_yaml_is_refused(tmp_path):
    (tmp_path / "file.yaml").write_text("rows: [")
    with pytest.raises(UserError, match="not to be read as YAML"):
        read_comparison(tmp_path / "file.yaml", tmp_path)
    with pytest.raises(UserError, match="not to be read as YAML"):
        read_comparison(tmp_path / "missing.yaml", tmp_path)
    (tmp_path / "file.yaml").write_bytes("title: Straßen".encode("latin-1"))
    with pytest.raises(UserError, match="not to be read as YAML"):
        read_comparison(tmp_path / "file.yaml", tmp_path)


def test_the_committed_comparison_can_be_read():
    file = REPRODUCTION / "whisper-base.yaml"
    comparison = read_comparison(file, "out")
    methods = {cell.options.method for cell in comparison.cells}
    assert methods == {*METHODS, "zero-shot"}
    assert all(cell.options.window == "trim" for cell in comparison.cells if cell.options.method != "zero-shot")
    assert {asdict(cell.options)["epochs"] for cell in comparison.cells} == {1}
    rows = {cell.row for cell in comparison.cells}
    cost = read_comparison(REPRODUCTION / "whisper-base-cost.yaml", "out")
    assert {cell.row for cell in cost.cells} <= rows | {"Full fine-tuning"}
    ran = {(cell.options.method, cell.options.rank, cell.options.seed) for cell in comparison.cells}
    assert ran >= {(method, rank, 0) for method in ("s2lora", "lora", "adalora") for rank in (1, 8, 32)}
    assert ran >= {(method, 8, seed) for method in ("s2lora", "lora") for seed in (0, 1, 2)}
    ours = [cell.options for cell in comparison.cells if cell.options.method == "s2lora"]
    assert {options.sharing for options in ours} == {None, "none", "stack", "all"}  # unset: module
    assert {options.penalty for options in ours} == {None, "proximal"}


@pytest.mark.parametrize(
    "name", ["whisper-base-spaced", "whisper-base", "whisper-base-three-epochs", "whisper-base-cost"]
)
def test_every_committed_run_is_finished_as_its_file_says_today(name):
    """Also where a default has changed since: then the file has the option of before."""
    comparison = read_comparison(REPRODUCTION / f"{name}.yaml", REPRODUCTION / name)
    assert [cell.name for cell in comparison.cells if not cell.finished()] == []


def test_values_as_yaml_writes_them(tmp_path):
    file = tmp_path / "file.yaml"
    file.write_text("train: {data: speech}\nrows: [{method: lora, lr: [1e-4, 3.0e-4]}, {method: bitfit, rank: 8}]")
    cells = read_comparison(file, tmp_path).cells
    assert [cell.options.lr for cell in cells] == [1e-4, 3e-4, None]
    assert cells[0].options.data == ["speech"]
