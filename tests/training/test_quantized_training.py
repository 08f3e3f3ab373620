"""Runs on a Whisper whose maps are stored in 8 bits or 4."""

import importlib.util
import json

import pytest
import torch
from peft import PeftModel
from torch import nn

from fused_s2lora.quantized import is_quantized
from fused_s2lora.training import train as train_module
from fused_s2lora.training.decoding import _for_decoding
from fused_s2lora.training.errors import UserError
from fused_s2lora.training.methods import METHODS
from fused_s2lora.training.models import load_adapter, load_base, quantization_of
from fused_s2lora.training.train import train
from tests.training.comparisons import QUIET

pytest.importorskip("bitsandbytes")
ROWS = [("s2lora", "int8"), *((method, "nf4") for method, one in METHODS.items() if "quantize" in one.reads)]


def quantized_maps(model: nn.Module) -> int:
    return sum(isinstance(module, nn.Linear) and is_quantized(module) for module in model.modules())


@pytest.mark.parametrize(("method", "kind"), ROWS)
def test_every_method_trains_on_quantised_maps(options, tones, tmp_path, short_decoding, monkeypatch, method, kind):
    """And the adapter is scored with the model as it was."""
    seen, scored = [], []
    adapt = train_module.adapt
    monkeypatch.setattr(
        train_module, "adapt", lambda model, *args, **more: seen.append(model) or adapt(model, *args, **more)
    )
    evaluate = train_module.evaluate_sets
    monkeypatch.setattr(
        train_module,
        "evaluate_sets",
        lambda model, *args, **more: scored.append(model) or evaluate(model, *args, **more),
    )
    run = tmp_path / "run"
    train(options(run, method=method, quantize=kind, test=[f"same={tones}"], max_steps=3), console=QUIET)
    assert quantized_maps(seen[-1]) == 2 * 6 + 2 * 10
    assert [quantized_maps(model) for model in scored] == [0, 0]
    assert isinstance(scored[1], PeftModel)
    summary = json.loads((run / "summary.json").read_text())
    whisper, _ = load_base(options(run).model)
    frozen = sum(parameter.numel() for parameter in whisper.parameters())
    if not method.startswith("adalora"):  # whose counts of ranks are parameters too
        assert summary["parameters"] == frozen + summary["trainable_parameters"]
    adapted = load_adapter(whisper, run / "adapter")
    assert isinstance(adapted, PeftModel)
    assert f"| frozen weights | {kind} |" in (run / "adapter" / "README.md").read_text()
    losses = [entry["cross_entropy"] for entry in json.loads((run / "metrics.json").read_text()) if "loss" in entry]
    assert len(losses) == 3


def test_quantised_maps_are_decoded_as_ordinary_ones(tiny_folder, finished):
    """With the adapter merged, in the dtype that was asked for; the model itself stays as it is."""
    model, _ = load_base(str(tiny_folder), quantization=quantization_of("nf4", None))
    adapted = load_adapter(model, finished / "adapter").eval()
    count = quantized_maps(adapted)
    features = torch.randn(2, 80, 3000)
    tokens = torch.tensor([[1001, 1002], [1001, 1002]])
    with torch.no_grad():
        expected = adapted(input_features=features, decoder_input_ids=tokens).logits
        decoder = _for_decoding(adapted, None)
        assert quantized_maps(decoder) == 0
        found = decoder(input_features=features, decoder_input_ids=tokens).logits
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert quantized_maps(adapted) == count > 0
    maps = [module for module in _for_decoding(adapted, torch.bfloat16).modules() if isinstance(module, nn.Linear)]
    assert {module.weight.dtype for module in maps} == {torch.bfloat16}
    assert _for_decoding(model, None) is not model


def test_what_is_missing_is_said(options, tmp_path, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else found(name))
    with pytest.raises(
        UserError, match=r"--quantize nf4 needs bitsandbytes; run: pip install .fused-s2lora\[quantized\]"
    ):
        train(options(tmp_path / "run", quantize="nf4"), console=QUIET)
    assert not (tmp_path / "run").exists()
