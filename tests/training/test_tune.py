"""`s2lora tune`: the shapes of a Whisper, the table, and what is shown, with made-up times, on no GPU."""

import io
import json

import pytest
import torch
from rich.console import Console
from transformers import BertConfig
from typer.testing import CliRunner

from fused_s2lora.kernels.choice import VARIABLE, Chooser
from fused_s2lora.kernels.strategy_record import Record, Shape, StrategyFile, section_of
from fused_s2lora.training import tune as tune_module
from fused_s2lora.training.cli import app
from fused_s2lora.training.errors import UserError
from fused_s2lora.training.tune import SIZES, encoder_positions, layer_shapes, show, tune, whisper_config

GPU = torch.device("cuda", 0)
SHAPE = Shape(2048, 768, 3072, 8, 1, torch.bfloat16, torch.float32, True)
RECORD = Record("merged", {"reference": 3.0, "merged": 2.0, "frozen": 1.6}, {"fused": "RuntimeError: no [kernel]"})


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setenv("S2LORA_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def console():
    return Console(record=True, width=300, file=io.StringIO())


def invoke(*arguments: str):
    return CliRunner().invoke(app, ["tune", *arguments], catch_exceptions=False, env={"COLUMNS": "300"})


def test_shapes_of_a_step():
    shapes = layer_shapes(whisper_config("small"), batches=[4], tokens=30, rank=8)
    found = {(s.rows_bucket, s.inputs, s.outputs, s.group): layers for s, layers in shapes.items()}
    assert found == {
        (8192, 768, 768, 3): ["encoder q, k, v"],
        (8192, 768, 768, 1): ["encoder out"],
        (8192, 768, 3072, 1): ["encoder fc1"],
        (8192, 3072, 768, 1): ["encoder fc2"],
        (8192, 768, 768, 2): ["cross k, v"],
        (128, 768, 768, 3): ["decoder q, k, v"],
        (128, 768, 768, 1): ["decoder out, cross q, out"],
        (128, 768, 3072, 1): ["decoder fc1"],
        (128, 3072, 768, 1): ["decoder fc2"],
    }
    assert all(s.needs_gradient and (s.rank, s.dtype) == (8, torch.bfloat16) for s in shapes)


def test_shapes_that_meet_are_timed_once():
    shapes = layer_shapes(whisper_config("tiny"), batches=[4, 4, 3], tokens=1500)
    layers = {(s.inputs, s.outputs, s.group): names for s, names in shapes.items()}
    assert len(shapes) == len(layers) == 5
    assert layers[384, 384, 3] == ["encoder q, k, v", "decoder q, k, v"]


def test_they_are_the_maps_that_a_whisper_has(tiny_whisper):
    """Width and depth of every linear map that S2-LoRA adapts, from a model of that configuration."""
    model = tiny_whisper(d_model=32, encoder_ffn_dim=64, decoder_ffn_dim=96)
    targets = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
    modules = [module for name, module in model.named_modules() if name.endswith(targets)]
    mapped = {(s.inputs, s.outputs) for s in layer_shapes(model.config)}
    assert mapped == {(module.in_features, module.out_features) for module in modules}


def test_trim_takes_every_bucket_of_rows():
    assert encoder_positions("full", 4, 1500) == [1500]
    positions = encoder_positions("trim", 4, 1500)
    assert [4 * count for count in positions] == [512, 1024, 2048, 4096, 6000]
    assert encoder_positions("trim", 4, 50) == [50]
    with pytest.raises(UserError, match="audio window 'short'"):
        encoder_positions("short", 4, 1500)


@pytest.mark.parametrize("size", SIZES)
def test_sizes_by_name(size):
    config = whisper_config(size)
    assert config.d_model == SIZES[size][0]
    assert config.encoder_ffn_dim == config.decoder_ffn_dim == 4 * config.d_model


def test_models_by_folder(tmp_path, tiny_whisper):
    tiny_whisper().config.save_pretrained(tmp_path / "whisper")
    assert whisper_config(str(tmp_path / "whisper")).d_model == 32
    assert whisper_config("packaged-base").d_model == 512
    BertConfig().save_pretrained(tmp_path / "bert")
    with pytest.raises(UserError, match="a bert model; give a Whisper"):
        whisper_config(str(tmp_path / "bert"))
    with pytest.raises(UserError, match=r"not to be had as a Whisper .*; give tiny, base"):
        whisper_config(str(tmp_path / "nowhere"))


def planted(shape, device, candidates):
    if shape.outputs > shape.inputs:
        return {"reference": 3.0, "merged": 2.0, "frozen": 1.6}, {"triton": "RuntimeError: no [kernel]"}
    return {"reference": 1.0, "merged": 2.0, "triton": 3.0, "frozen": 0.5}, {}


def test_table_of_a_whisper(tmp_path, console):
    path = tmp_path / "strategies.json"
    chooser = Chooser(StrategyFile(path), table={}, timer=planted, device_name=lambda device: "GPU A")
    records = tune("small", precision="bf16", chooser=chooser, device=GPU, console=console)
    assert len(records) == 9
    text = console.export_text()
    (row,) = [line for line in text.splitlines() if "encoder fc1" in line]
    assert [cell.strip() for cell in row.strip("│").split("│")] == [
        "encoder fc1", "rows<=8192 768->3072 rank 8 x1 bfloat16 weights float32 forward+backward",
        "3.000", "2.000", "failed", "1.600", "merged", "1.25",
    ]  # fmt: skip
    assert "triton, rows<=8192 768->3072 rank 8 x1" in text
    assert "RuntimeError: no [kernel]" in text
    assert f"remembered in {path}" in text
    (remembered,) = json.loads(path.read_text()).values()
    assert remembered.keys() == {shape.key for shape in records}
    picked = Chooser(StrategyFile(path), table={}, device_name=lambda device: "GPU A").pick(
        "auto", next(iter(records)), GPU, dict.fromkeys(("reference", "merged"))
    )
    assert picked == "reference"


def test_precision_and_stored_weights(tmp_path, console):
    def shapes(**options):
        path = StrategyFile(tmp_path / "strategies.json")
        chooser = Chooser(path, table={}, timer=planted, device_name=lambda device: "GPU A")
        return {
            (s.dtype, s.weight_dtype) for s in tune("tiny", chooser=chooser, device=GPU, console=console, **options)
        }

    assert shapes(precision="fp32") == {(torch.float32, torch.float32)}
    assert shapes(precision="fp16") == {(torch.float16, torch.float32)}
    assert shapes(precision="bf16", half_base=True) == {(torch.bfloat16, torch.bfloat16)}


def test_shapes_of_which_no_strategy_ran_are_told(tmp_path, console):
    chooser = Chooser(
        StrategyFile(tmp_path / "strategies.json"), table={}, timer=lambda *_: ({}, {"reference": "out of memory"}),
        device_name=lambda device: "GPU A",
    )  # fmt: skip
    assert set(tune("tiny", precision="bf16", chooser=chooser, device=GPU, console=console).values()) == {None}
    assert "none ran" in console.export_text()


def test_a_shape_without_memory_for_its_operands_is_told_and_the_others_are_timed(tmp_path, console):
    def small_gpu(shape, device, candidates):
        if shape.outputs > shape.inputs:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return planted(shape, device, candidates)

    path = tmp_path / "[cache]" / "strategies.json"
    chooser = Chooser(StrategyFile(path), table={}, timer=small_gpu, device_name=lambda device: "GPU A")
    records = tune("tiny", precision="bf16", chooser=chooser, device=GPU, console=console)
    assert {shape.outputs > shape.inputs for shape, record in records.items() if record is None} == {True}
    assert len(json.loads(path.read_text()).popitem()[1]) == sum(record is not None for record in records.values()) == 7
    text = console.export_text()
    assert "no memory to time rows<=8192 384->1536 rank 8" in text
    assert f"remembered in {path}" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "int8"}, "--precision 'int8'"),
        ({"batches": [4, 0]}, "--batch is 0"),
        ({"tokens": 0}, "--tokens is 0"),
        ({"rank": 0}, "--rank is 0"),
        ({"rank": 300}, "at most 256"),
        ({"window": "short"}, "audio window 'short'"),
    ],
    ids=str,
)
def test_bad_options(options, message):
    with pytest.raises(UserError, match=message):
        tune("tiny", device=GPU, **options)


def test_show_prints_file_records_errors_and_committed_table(monkeypatch, console):
    file = StrategyFile()
    file.add(section_of("GPU A"), SHAPE.key, RECORD)
    shown = invoke("--show")
    assert shown.exit_code == 0
    assert f"remembered in {file.path}" in shown.output
    for text in ("GPU A | torch", SHAPE.key, "3.000", "2.000", "failed", "merged", "1.25", "RuntimeError: no [kernel]"):
        assert text in shown.output
    assert "no GPU's choices are shipped" in shown.output
    monkeypatch.setenv(VARIABLE, "fused")
    show(console, file, {"GPU B": {SHAPE.key: {"strategy": "reference", "ms": {"reference": 7.0}}, "other": 3}})
    text = console.export_text()
    assert "shipped with this version" in text
    assert "GPU B" in text
    assert "7.000" in text
    assert "not readable" in text
    assert f"{VARIABLE}=fused overrides" in text


def test_show_with_nothing_remembered(tmp_path):
    shown = invoke("--show")
    assert shown.exit_code == 0
    assert f"nothing is remembered in {tmp_path / 'cache' / 'strategies.json'}" in shown.output


def test_forget(tmp_path):
    file = StrategyFile()
    file.add("GPU A", SHAPE.key, RECORD)
    forgotten = invoke("--forget")
    assert (forgotten.exit_code, forgotten.output) == (0, f"deleted {file.path}\n")
    assert not list(file.path.parent.iterdir())
    assert invoke("--forget").output.startswith("nothing is remembered in")
    file.path.mkdir()
    with pytest.raises(UserError, match="cannot be deleted"):
        tune_module.forget()


def test_forget_deletes_a_corrupt_file():
    file = StrategyFile()
    file.path.parent.mkdir()
    file.path.write_text("{")
    assert invoke("--forget").exit_code == 0
    assert not file.path.exists()


def test_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = invoke("--model", "tiny")
    assert result.exit_code == 1
    (line,) = result.output.splitlines()
    assert "timed on a GPU only" in line
    assert "on a CPU the choice is `reference` up to 128 rows and `merged` beyond, or `split` where" in line


def test_every_option_has_help():
    import typer

    command = typer.main.get_command(app).commands["tune"]
    assert command.help
    assert all(getattr(parameter, "help", None) for parameter in command.params)
