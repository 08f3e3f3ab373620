"""Steps replayed as CUDA graphs: the same losses and gradients, and what they do not go with.

Without a GPU a stand-in for a graph computes again what was recorded, from the recorded inputs into the recorded
outputs: what is left to test is which batches are recorded, and what is read, written and handed over.
"""

import contextlib
import json

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model

from fused_s2lora import S2LoraConfig, fuse_whisper
from fused_s2lora.kernels.choice import VARIABLE
from fused_s2lora.training.audio_window import AudioWindow
from fused_s2lora.training.collate import IGNORED, SpeechCollator
from fused_s2lora.training.cuda_graphs import GraphedBackward
from fused_s2lora.training.data import load_speech
from fused_s2lora.training.errors import UserError
from fused_s2lora.training.train import train
from tests.training.comparisons import QUIET

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA GPU")
ADAPTERS = {
    "s2lora": lambda: S2LoraConfig(r=4),
    "lora": lambda: LoraConfig(r=4, target_modules=["q_proj", "v_proj"]),
    "adalora": lambda: AdaLoraConfig(init_r=4, target_r=2, total_step=100, target_modules=["q_proj", "v_proj"]),
}


@pytest.fixture(autouse=True)
def nothing_is_timed(monkeypatch):
    """Timing every strategy at every shape takes a minute."""
    monkeypatch.setenv(VARIABLE, "merged")


class Stream:
    def wait_stream(self, other):
        pass


@pytest.fixture
def graphed(monkeypatch):
    """Makes a GraphedBackward."""

    def make(losses, parameters, **settings) -> GraphedBackward:
        calls = []

        class Graph:
            def replay(self):
                recorded = next(one for one in made._recorded.values() if one.graph is self)
                inputs = recorded.inputs.items()
                batch = next(call for call in calls if all(call[name] is value for name, value in inputs))
                before = [parameter.grad for parameter in made._parameters]
                for parameter in made._parameters:
                    parameter.grad = None
                for name, loss in made._forward_and_backward(batch).items():
                    recorded.losses[name].copy_(loss)
                for gradient, parameter, left in zip(recorded.gradients, made._parameters, before, strict=True):
                    if gradient is not None:
                        gradient.copy_(parameter.grad)
                    parameter.grad = left

        if DEVICE == "cpu":
            monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
        made = GraphedBackward(lambda batch: calls.append(batch) or losses(batch), parameters, **settings)
        return made

    if DEVICE == "cpu":
        monkeypatch.setattr(torch.cuda, "Stream", Stream)
        monkeypatch.setattr(torch.cuda, "current_stream", Stream)
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
        for name in ("stream", "graph"):
            monkeypatch.setattr(torch.cuda, name, lambda *given, **named: contextlib.nullcontext())
    return make


def adapted(tiny_whisper, adapter: str, *, fused: bool = True) -> torch.nn.Module:
    """A tiny adapted Whisper, whose update is not zero."""
    model = get_peft_model(tiny_whisper(), ADAPTERS[adapter]()).to(DEVICE)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter)
    if adapter == "s2lora" and fused:
        fuse_whisper(model)
    return model.train()


def batches() -> list[dict]:
    """Two shapes, each often enough to be recorded and replayed, never twice the same values."""
    generator = torch.Generator().manual_seed(2)
    return [
        {
            "input_features": torch.randn(2, 8, 100, generator=generator).to(DEVICE),
            "labels": torch.randint(3, 90, (2, tokens), generator=generator).to(DEVICE),
        }
        for tokens in (5, 8, 5, 8, 5, 5, 8, 8, 5)
    ]


def losses_of(model: torch.nn.Module):
    def losses(batch: dict) -> dict:
        with torch.autocast(DEVICE, torch.bfloat16, enabled=DEVICE == "cuda"):
            loss = model(**batch).loss
        return {"loss": loss, "doubled": 2 * loss.detach()}

    return losses


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_replayed_steps_are_the_steps(tiny_whisper, adapter, graphed):
    model, plain = (adapted(tiny_whisper, adapter) for _ in range(2))
    parameters, others = ([p for p in one.parameters() if p.requires_grad] for one in (model, plain))
    optimizers = [torch.optim.AdamW(some, lr=1e-2) for some in (parameters, others)]
    steps = graphed(losses_of(model), parameters)
    last = 0.0
    for index, batch in enumerate(batches()):
        got = steps(batch)
        expected = losses_of(plain)(batch)
        expected["loss"].backward()
        for name in ("loss", "doubled"):
            torch.testing.assert_close(got[name], expected[name].detach(), rtol=1e-3, atol=1e-5)
        assert float(got["loss"]) != last, f"batch {index} was not read"
        last = float(got["loss"])
        for parameter, other in zip(parameters, others, strict=True):
            assert (parameter.grad is None) == (other.grad is None)
            if parameter.grad is not None:
                scale = float(other.grad.abs().max())
                torch.testing.assert_close(parameter.grad, other.grad, rtol=0.02, atol=0.02 * scale + 1e-7)
                parameter.grad.copy_(other.grad)  # or roundings would add up over the steps
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert len(steps._recorded) == 2


def test_shapes_beyond_the_most_are_computed_as_usual(tiny_whisper, graphed):
    model = adapted(tiny_whisper, "s2lora")
    parameters = [p for p in model.parameters() if p.requires_grad]
    steps = graphed(losses_of(model), parameters, most=1)
    expected = [losses_of(model)(batch)["loss"].item() for batch in batches()]
    assert [float(steps(batch)["loss"]) for batch in batches()] == pytest.approx(expected, rel=1e-3)
    assert len(steps._recorded) == 1


def test_values_that_are_no_tensors_are_part_of_the_shape(tiny_whisper, graphed):
    parameter = torch.nn.Parameter(torch.ones(1, device=DEVICE))
    steps = graphed(lambda batch: {"loss": (batch["factor"] * parameter * batch["x"]).sum()}, [parameter])
    for factor in (2, 3, 2, 3, 2, 3):
        batch = {"x": torch.full((1,), 5.0, device=DEVICE), "factor": factor}
        assert float(steps(batch)["loss"]) == 5 * factor
        assert float(parameter.grad) == 5 * factor
    assert len(steps._recorded) == 2


@gpu
@pytest.mark.parametrize("method", ["s2lora", "lora"])
def test_a_run_learns_the_same(options, tmp_path, method):
    fields = {"window": "full", "method": method, "precision": "bf16", "epochs": 4.0}
    for name, graphs in (("plain", False), ("graphs", True)):
        train(options(tmp_path / name, cuda_graphs=graphs, **fields), console=QUIET)
    plain, graphs = (
        [entry for entry in json.loads((tmp_path / name / "metrics.json").read_text()) if "cross_entropy" in entry]
        for name in ("plain", "graphs")
    )
    assert len(plain) == len(graphs) == 12
    for one, other in zip(plain, graphs, strict=True):
        assert one.keys() == other.keys()
        for part in ("loss", "cross_entropy"):
            assert one[part] == pytest.approx(other[part], rel=0.02)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"window": "trim"}, "--window trim"),
        ({"accumulation": 2}, "--accumulation"),
        ({"gradient_checkpointing": True}, "--gradient-checkpointing"),
        ({"half_base": True}, "--half-base"),
        ({"quantize": "nf4"}, "--quantize"),
        ({"spec_augment": True}, "--spec-augment"),
        ({"precision": "fp16"}, "--precision fp16"),
    ],
)
def test_what_a_recorded_step_cannot_have_is_named(options, tmp_path, fields, named):
    with pytest.raises(UserError, match=f"--cuda-graphs does not go with {named}; leave out one of them"):
        options(tmp_path / "run", cuda_graphs=True, **{"window": "full", **fields})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA GPU")
def test_without_a_gpu_nothing_is_begun(options, tmp_path):
    with pytest.raises(UserError, match="--cuda-graphs needs a CUDA GPU, and torch sees none; leave it out"):
        train(options(tmp_path / "run", cuda_graphs=True, window="full"), console=QUIET)
    assert not (tmp_path / "run").exists()


def test_padding_to_a_multiple_is_not_learnt_from(tiny_folder, tones):
    from transformers import WhisperForConditionalGeneration, WhisperProcessor

    tokenizer = WhisperProcessor.from_pretrained(tiny_folder).tokenizer
    tokenizer.set_prefix_tokens(language="en", task="transcribe")
    model = WhisperForConditionalGeneration.from_pretrained(tiny_folder).eval()
    rows = list(load_speech(tones).dataset)[:3]
    short, long = (SpeechCollator(tokenizer, AudioWindow(), token_multiple=multiple)(rows) for multiple in (1, 16))
    tokens = short["labels"].shape[1]
    assert tokens % 16
    assert long["labels"].shape[1] == long["decoder_input_ids"].shape[1] == 16 * (tokens // 16 + 1)
    assert torch.equal(long["labels"][:, :tokens], short["labels"])
    assert bool((long["labels"][:, tokens:] == IGNORED).all())
    features = torch.randn(3, model.config.num_mel_bins, 2 * model.config.max_source_positions)
    losses = [
        model(
            input_features=features, decoder_input_ids=batch["decoder_input_ids"], labels=batch["labels"]
        ).loss.detach()
        for batch in (short, long)
    ]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=0)
