"""Another share of what a finished run learnt: by the command, and in a comparison without training again."""

import json
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from fused_s2lora.training.cli import app
from fused_s2lora.training.comparison import read_comparison, run_comparison
from fused_s2lora.training.comparison_figures import draw_figures
from fused_s2lora.training.comparison_lines import lines_of
from fused_s2lora.training.errors import UserError
from fused_s2lora.training.interpolate import interpolate_run, recorded_share
from fused_s2lora.training.models import remembered_speech
from fused_s2lora.training.output import read_json
from fused_s2lora.training.train import train
from tests.training.comparisons import QUIET, write

SCALED = {"s2lora": "coefficients", "lora": "lora_B", "adalora": "lora_E"}


def tensors(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def check_scaled(found, original, method, factor):
    """`found` is `original` with its update times `factor`, which is not zero."""
    assert found.keys() == original.keys()
    for name, value in original.items():
        scaled = SCALED[method] in name
        torch.testing.assert_close(found[name], factor * value if scaled else value, msg=name)
    assert any(value.abs().max() > 0 for name, value in original.items() if SCALED[method] in name)


@pytest.mark.parametrize(("method", "kept"), [("s2lora", 0.75), ("lora", 1.0), ("adalora", 1.0)])
def test_a_run_gives_any_share_of_what_it_learnt(options, tmp_path, method, kept):
    run = tmp_path / "run"
    train(options(run, method=method, max_steps=4, language="sw", margin=32), console=QUIET)
    arguments = ["interpolate", str(run), "0.6"]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    assert f"adapter with 0.6 of the update: {run}/adapter-0.6" in result.output.replace("\n", "")
    check_scaled(tensors(run / "adapter-0.6"), tensors(run / "adapter"), method, 0.6 / kept)
    interpolate_run(run, 1.0, tmp_path / "whole")
    check_scaled(tensors(tmp_path / "whole"), tensors(run / "adapter"), method, 1 / kept)
    for folder in (run / "adapter-0.6", tmp_path / "whole"):
        told = remembered_speech(folder)
        assert told == remembered_speech(run / "adapter")
        assert (told["audio_window"], told["audio_window_margin"], told["language"]) == ("trim", 32, "sw")


def test_what_cannot_be_had_is_said_in_one_sentence(finished, tmp_path):
    def spoilt(name, *, without=(), summary=None, method=None):
        run = tmp_path / name
        shutil.copytree(finished, run)
        for part in without:
            shutil.rmtree(run / part) if (run / part).is_dir() else (run / part).unlink()
        if summary is not None:
            (run / "summary.json").write_text(json.dumps(summary))
        if method is not None:
            (run / "config.json").write_text(json.dumps(read_json(run / "config.json") | {"method": method}))
        return run

    full = tmp_path / "full"
    full.mkdir()
    (full / "something").touch()
    for run, share, output, told in (
        (tmp_path / "none", 0.5, "a", "none: no run of `s2lora train` in it"),
        (spoilt("begun", without=["summary.json"]), 0.5, "a", "begun: not trained to its end"),
        (spoilt("whole-model", without=["adapter"]), 0.5, "a", "whole-model: has no adapter"),
        (spoilt("older", summary={}), 0.5, "a", "older: does not say what share"),
        (spoilt("bitfit", method="bitfit"), 0.5, "a", "bitfit: the update of bitfit is not to be scaled"),
        (finished, 1.2, "a", "SHARE is 1.2; give one above 0"),
        (finished, 0.0, "a", "SHARE is 0.0; give one above 0"),
        (finished, 0.5, "full", "full: exists already; give an empty --output"),
        (spoilt("bad", without=["adapter/adapter_config.json"]), 0.5, "a", "bad/adapter: no adapter_config.json"),
    ):
        with pytest.raises(UserError, match=told):
            interpolate_run(run, share, tmp_path / output)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("method", "asked", "written", "share"),
    [
        ("lora", None, {}, 1.0),
        ("s2lora", None, {}, None),
        ("s2lora", 0.5, {}, 0.5),
        ("s2lora", 0.5, {"interpolation": 0.6}, 0.6),
    ],
)
def test_the_share_of_runs_from_before_it_was_written(method, asked, written, share):
    assert recorded_share({"method": method, "interpolation": asked}, written) == share


def test_a_model_that_has_moved_and_an_adapter_without_a_language(finished, tiny_folder, tmp_path):
    run, moved = tmp_path / "run", tmp_path / "moved"
    shutil.copytree(finished, run)
    shutil.copytree(tiny_folder, moved)
    (run / "config.json").write_text(json.dumps(read_json(run / "config.json") | {"model": str(tmp_path / "gone")}))
    config = run / "adapter" / "adapter_config.json"
    config.write_text(json.dumps({key: value for key, value in read_json(config).items() if key != "language"}))
    with pytest.raises(UserError, match="gone: not to be had as a Whisper model"):
        interpolate_run(run, 0.5, tmp_path / "half")
    arguments = ["interpolate", str(run), "0.5", "--output", str(tmp_path / "half"), "--model", str(moved)]
    assert CliRunner().invoke(app, arguments, catch_exceptions=False).exit_code == 0
    check_scaled(tensors(tmp_path / "half"), tensors(run / "adapter"), "s2lora", 0.5 / 0.75)


def test_a_comparison_trains_once_for_all_shares(quick, tmp_path, short_decoding, monkeypatch):
    module = sys.modules["fused_s2lora.training.train"]
    trained, training = [], module.fit
    monkeypatch.setattr(module, "fit", lambda options, *rest: trained.append(options) or training(options, *rest))
    rows = [
        {"name": "zero-shot", "method": "zero-shot"},
        {"name": "S2-LoRA", "method": "s2lora"},
        {"name": "S2-LoRA by share", "method": "s2lora", "interpolation": [0.5, 1.0]},
        {"name": "S2-LoRA by rate", "method": "s2lora", "interpolation": 0.5, "lr": 1e-3},
        {"name": "LoRA", "method": "lora"},
        {"name": "LoRA, a half", "method": "lora", "interpolation": 0.5},
        {"name": "AdaLoRA", "method": "adalora"},
        {"name": "AdaLoRA, a half", "method": "adalora", "interpolation": 0.5},
        {"name": "BitFit", "method": "bitfit"},
        {"name": "BitFit again", "method": "bitfit"},
    ]
    train_options = {**quick, "test": [*quick["test"], f"other={quick['test'][0].partition('=')[2]}@sw"]}
    comparison = read_comparison(write(tmp_path, train_options, rows), tmp_path / "out")
    assert len(list(run_comparison(comparison, console=QUIET))) == len(comparison.cells) == 11
    by_name = {cell.name: cell.path for cell in comparison.cells}
    assert [options.output.rpartition("/")[2] for options in trained] == [
        "s2-lora-r8-seed0", "s2-lora-by-rate-r8-seed0", "lora-r8-seed0", "adalora-r8-seed0", "bitfit-seed0",
        "bitfit-again-seed0",
    ]  # fmt: skip
    usual = by_name["s2-lora-r8-seed0"]
    for share, name in (
        (0.5, "s2-lora-by-share-r8-interpolation-0.5-seed0"),
        (1.0, "s2-lora-by-share-r8-interpolation-1.0-seed0"),
    ):
        path = by_name[name]
        check_scaled(tensors(path / "adapter"), tensors(usual / "adapter"), "s2lora", share / 0.75)
        assert read_json(path / "metrics.json", list) == read_json(usual / "metrics.json", list)
        assert read_json(path / "summary.json") == read_json(usual / "summary.json") | {"interpolation": share}
        ours, theirs = (read_json(one / "rank_pattern.json", list)[0]["mean_magnitude"][0][0] for one in (path, usual))
        assert ours == pytest.approx(theirs * share / 0.75)
        assert read_json(path / "results.json", list)[-1]["sets"]
    for method in ("lora", "adalora"):
        half, whole = by_name[f"{method}-a-half-r8-seed0"], by_name[f"{method}-r8-seed0"]
        check_scaled(tensors(half / "adapter"), tensors(whole / "adapter"), method, 0.5)
        assert (half / "rank_pattern.json").is_file() == (whole / "rank_pattern.json").is_file() == (method != "lora")
    assert {line.label: line.share for line in lines_of(comparison)} == {
        "zero-shot": None, "S2-LoRA": 0.75, "S2-LoRA by share, interpolation 0.5": 0.5,
        "S2-LoRA by share, interpolation 1.0": 1.0, "S2-LoRA by rate": 0.5, "LoRA": 1.0, "LoRA, a half": 0.5,
        "AdaLoRA": 1.0, "AdaLoRA, a half": 0.5, "BitFit": 1.0, "BitFit again": 1.0,
    }  # fmt: skip
    figure = draw_figures(comparison)["Error in other speech, by the share of the update"].read_text()
    # One curve for each that was trained with several shares, its shares beside it, and a line for zero-shot.
    for text, times in {">S2-LoRA<": 1, ">LoRA<": 1, ">BitFit<": 1, ">zero-shot<": 1, ">0.75<": 1, ">0.5<": 3}.items():
        assert figure.count(text) == times, text
    for text in ("S2-LoRA by share", "S2-LoRA by rate", "a half"):
        assert text not in figure
