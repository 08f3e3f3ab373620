"""How an adapted model may be called: what it returns, what it refuses, what a failed call leaves behind."""

import gc
import weakref
from typing import NamedTuple

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

from fused_s2lora import S2Linear, S2LoraConfig, S2LoraLinear, fuse_whisper, rank_pattern, unfuse_whisper
from tests.fused_s2lora.adapters import adapted, assert_same, awaken, batch, in_float64, logits, step
from tests.training.ranks import run_ranks


class LossFirst(NamedTuple):
    """An output with names."""

    loss: Tensor
    output: Tensor


class OtherName(NamedTuple):
    """An output whose loss has another name."""

    objective: Tensor
    output: Tensor


class Returning(nn.Module):
    """A linear map with a loss, in whatever `kind` makes of them."""

    def __init__(self, kind):
        super().__init__()
        self.fc1 = nn.Linear(4, 4)
        self.kind = kind

    def forward(self, x):
        y = self.fc1(x)
        return self.kind(y.pow(2).mean(), y)


@pytest.mark.parametrize(
    ("kind", "key"),
    [
        (lambda loss, y: {"loss": loss, "output": y}, "loss"),
        (lambda loss, y: (loss, y), 0),
        (LossFirst, 0),
        (OtherName, 0),
    ],
    ids=["mapping", "tuple", "named tuple", "other name"],
)
def test_penalties_are_in_the_loss_of_every_kind_of_output(kind, key):
    config = S2LoraConfig(r=2, target_modules=["fc1"], sparsity_weight=100.0)
    model = get_peft_model(Returning(kind), config)
    awaken(model)
    x = torch.randn(3, 4)
    outputs = model.train()(x)
    penalty = sum(model.base_model.penalty()).item()
    assert penalty > 1
    assert type(outputs) is type(model.get_base_model().kind(x, x))
    y = outputs[1] if isinstance(outputs, tuple) else outputs["output"]
    assert outputs[key].item() == pytest.approx(y.pow(2).mean().item() + penalty)
    # What is not a loss stays as it is.
    model.get_base_model().kind = lambda loss, y: (y, loss)
    assert torch.equal(model(x)[0], y)


def test_penalties_are_in_the_loss_of_a_whisper_that_returns_tuples(tiny_whisper):
    model = adapted(tiny_whisper, sparsity_weight=10.0).train()
    with_names = model(**batch()).loss
    assert model(**batch(), return_dict=False)[0].item() == pytest.approx(with_names.item())
    model.eval()
    assert model(**batch(), return_dict=False)[0].item() < with_names.item() - 1


def test_a_forward_that_raised_holds_no_activations(tiny_whisper, monkeypatch):
    """As where memory ran out between q and v, and a smaller batch is tried."""
    model = adapted(tiny_whisper, r=4, backend="merged").train()
    fuse_whisper(model)
    alive = []
    model.get_base_model().model.encoder.layers[0].fc1.register_forward_hook(
        lambda module, inputs, output: alive.append(weakref.ref(output))
    )
    second = model.get_base_model().model.encoder.layers[1].self_attn
    hook = second.v_proj.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("full")))
    with pytest.raises(torch.OutOfMemoryError):
        model(**batch())
    gc.collect()
    assert alive[0]() is None
    hook.remove()
    unfused = adapted(tiny_whisper, r=4, backend="merged")
    torch.testing.assert_close(logits(model.eval()), logits(unfused))


@pytest.mark.parametrize("fused", [False, True])
def test_a_merged_adapter_is_taken_out_to_be_disabled(tiny_whisper, fused):
    """As PEFT's own layers do, or what is asked for as the original model would be the adapted one."""
    model = adapted(tiny_whisper, r=4)
    if fused:
        fuse_whisper(model)
    expected = logits(model)
    original = logits(tiny_whisper())
    assert (expected - original).abs().max() > 1e-3
    model.merge_adapter()
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), original, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("safe_merge", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_a_model_merged_in_inference_mode_is_trained_afterwards(tiny_whisper, fused, safe_merge):
    """As between epochs, where transcripts are made with merged weights and the original model's for comparison."""
    model = in_float64(tiny_whisper)
    if fused:
        fuse_whisper(model)
    expected = step(model)
    for leave in (model.unmerge_adapter, model.disable_adapter_layers):
        with torch.inference_mode():
            model.eval().merge_adapter(safe_merge=safe_merge)
            leave()
            model(**{**batch(), "input_features": batch()["input_features"].double()})
        model.train().enable_adapter_layers()
        assert_same(step(model), expected)


def test_a_model_made_in_inference_mode_is_merged_there(tiny_whisper):
    with torch.inference_mode():
        model = adapted(tiny_whisper, r=4)
        expected = logits(model)
        for change in (model.merge_adapter, model.unmerge_adapter):
            change()
            torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)


def test_biases_written_in_inference_mode_are_seen(tiny_whisper):
    """Where PyTorch counts no writes."""
    with torch.inference_mode():
        model = adapted(tiny_whisper, r=4)
        fuse_whisper(model)
        before = logits(model)
        for layer in model.modules():
            if isinstance(layer, S2LoraLinear) and layer.base_linear.bias is not None:
                layer.base_linear.bias.add_(1.0)
        fused = logits(model)
        unfuse_whisper(model)
        torch.testing.assert_close(fused, logits(model))
    assert (fused - before).abs().max() > 0.1


def test_an_adapter_may_be_switched_between_q_and_k(tiny_whisper):
    """Where they are computed together, with the adapter that was active when q was asked for."""
    model = adapted(tiny_whisper)
    model.add_adapter("other", S2LoraConfig())
    awaken(model, seed=3)
    fuse_whisper(model)
    attention = model.get_base_model().model.encoder.layers[0].self_attn
    x = torch.randn(2, 5, 32)
    attention.q_proj(x)
    model.set_adapter("other")
    other = attention.k_proj(x)
    unfuse_whisper(model)
    torch.testing.assert_close(other, attention.k_proj(x))
    model.set_adapter("default")
    assert not torch.allclose(other, attention.k_proj(x))


def test_an_adapter_for_each_row_is_refused(tiny_whisper):
    model = adapted(tiny_whisper)
    with pytest.raises(ValueError, match="leave out adapter_names"):
        model(**batch(), adapter_names=["default", "__base__"])
    with pytest.raises(ValueError, match="leave out adapter_names"):
        model.generate(input_features=batch()["input_features"], adapter_names=["default", "default"])
    model(**batch(), adapter_names=None)


def test_without_an_adapter_left_there_is_no_penalty_and_no_pattern(tiny_whisper):
    model = adapted(tiny_whisper)
    model.delete_adapter("default")
    assert [value.item() for value in model.base_model.penalty()] == [0.0, 0.0]
    with pytest.raises(ValueError, match="every S2-LoRA adapter of the model was deleted"):
        rank_pattern(model)


SHARED_OUT = """
import os

import torch
from peft import get_peft_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from fused_s2lora import S2LoraConfig, rank_pattern

model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), S2LoraConfig(target_modules=["0"]))
model.base_model.model[0].s2lora_coefficients["default"].data.copy_(torch.arange(8))
expected = rank_pattern(model)
fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
assert rank_pattern(model) == expected, rank_pattern(model)
torch.distributed.barrier()
os._exit(0)  # as PyTorch 2.11 ends in order, gloo's threads may abort
"""


def test_the_pattern_of_a_model_that_two_processes_share():
    run_ranks(SHARED_OUT)


def test_the_pattern_of_two_stacks_of_one_name():
    """As the encoders of CLIP have it: no layer is left out."""

    def tower(layers: int) -> nn.ModuleDict:
        blocks = [nn.ModuleDict({"fc1": nn.Linear(4, 4)}) for _ in range(layers)]
        return nn.ModuleDict({"encoder": nn.ModuleDict({"layers": nn.ModuleList(blocks)})})

    model = nn.ModuleDict({"text": tower(2), "vision": tower(3)})
    patterns = rank_pattern(get_peft_model(model, S2LoraConfig(r=2, target_modules=["fc1"])))
    assert [pattern.stack for pattern in patterns] == ["text.encoder.layers", "vision.encoder.layers"]
    assert [pattern.layers for pattern in patterns] == [["0", "1"], ["0", "1", "2"]]


class _Traced(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, features: Tensor, tokens: Tensor) -> Tensor:
        return self.model(input_features=features, decoder_input_ids=tokens, use_cache=False).logits


@pytest.mark.filterwarnings("ignore")  # TorchScript is deprecated, and tells of every size it looks at
def test_a_traced_model_is_saved(tiny_whisper, tmp_path):
    model = adapted(lambda: tiny_whisper(encoder_layers=1, decoder_layers=1), r=4)
    fuse_whisper(model)
    whole = _Traced(model)
    features, tokens = batch()["input_features"], batch()["labels"]
    torch.jit.trace(whole, (features, tokens), check_trace=False).save(tmp_path / "traced.pt")
    features = batch(1)["input_features"]
    torch.testing.assert_close(torch.jit.load(tmp_path / "traced.pt")(features, tokens), whole(features, tokens))


@pytest.mark.parametrize("fused", [False, True])
def test_func_grad_is_autograds(tiny_whisper, fused):
    model = adapted(tiny_whisper, r=4).train()
    if fused:
        fuse_whisper(model)
    model.get_base_model().set_attn_implementation("eager")
    model(**batch()).loss.backward()
    parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}

    def loss(values):
        return torch.func.functional_call(model, values, (), batch()).loss

    gradients = torch.func.grad(loss)({name: value.detach() for name, value in parameters.items()})
    for name, value in parameters.items():
        torch.testing.assert_close(gradients[name], value.grad, rtol=1e-3, atol=1e-5, msg=name)


def test_a_functional_call_leaves_the_model_as_it_was(tiny_whisper):
    model = adapted(tiny_whisper, r=4)
    expected = logits(model)
    zeros = {name: torch.zeros_like(value) for name, value in model.named_parameters() if ".s2lora_" in name}
    with torch.no_grad():
        got = torch.func.functional_call(model, zeros, (), batch(), tie_weights=False).logits
    torch.testing.assert_close(got, logits(tiny_whisper()))
    assert torch.equal(logits(model), expected)


def test_a_layer_has_a_jacobian():
    layer = S2Linear(nn.Linear(8, 6), r=2)
    torch.nn.init.normal_(layer.coefficients)
    x = torch.randn(200, 8)  # more rows than are left to the reference anyway
    jacobian = torch.func.vmap(torch.func.jacrev(layer))(x)
    weight = layer.linear.weight + (layer.up * layer.coefficients) @ layer.down
    torch.testing.assert_close(jacobian, weight.expand(200, 6, 8))


def test_a_backend_that_dropout_puts_out_of_use_is_told():
    with pytest.warns(UserWarning, match=r"backend='merged' is used without dropout only.*set dropout=0\.0"):
        S2LoraConfig(dropout=0.05, backend="merged")
