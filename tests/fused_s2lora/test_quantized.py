"""Adapters of weights that are stored in 8 bits or 4: values and gradients, what is kept, and what must still work."""

import copy
import gc
import logging
import weakref

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from fused_s2lora import S2LoraConfig, fuse_whisper, s2_linear_reference
from fused_s2lora import quantized as quantized_module
from fused_s2lora.kernels import device
from fused_s2lora.quantized import dequantize_maps, dequantized, is_quantized
from tests.fused_s2lora.adapters import awaken, batch, step
from tests.oracle import FLOOR, check_close

bitsandbytes = pytest.importorskip("bitsandbytes")
KINDS = ("int8", "nf4", "nf4, scales quantised", "torchao")
each_kind = pytest.mark.parametrize("kind", KINDS)


def quantize(linear: nn.Linear, kind: str) -> nn.Linear:
    """The map with its weight stored as `kind` says."""
    if kind == "torchao":
        torchao = pytest.importorskip("torchao.quantization")
        found = copy.deepcopy(linear).requires_grad_(False)
        torchao.quantize_(found, torchao.Int8WeightOnlyConfig())
        return found
    sizes = linear.in_features, linear.out_features, linear.bias is not None
    if kind == "int8":
        found = bitsandbytes.nn.Linear8bitLt(*sizes, has_fp16_weights=False)
    else:
        found = bitsandbytes.nn.Linear4bit(*sizes, quant_type="nf4", compress_statistics="scales" in kind)
    found.load_state_dict(linear.state_dict())
    return found.to("cpu").requires_grad_(False)


def quantize_maps(model: nn.Module, kind: str) -> None:
    """All maps of the encoder and decoder in place, as transformers' `quantization_config` does."""
    for module in list(model.model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                setattr(module, name, quantize(child, kind))


def assert_near(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Loss and gradients of two float32 steps that are to be one computation."""
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert (got[name] - value).abs().max() <= 2e-4 * value.abs().max() + 1e-7, name


def adapted_pair(tiny_whisper, kind: str, **config) -> tuple[nn.Module, nn.Module]:
    """A quantised Whisper with an adapter that is awake, and an ordinary one with the same weights and adapter."""
    model = tiny_whisper(d_model=64, encoder_ffn_dim=128, decoder_ffn_dim=128)
    quantize_maps(model, kind)
    like = copy.deepcopy(model)
    dequantize_maps(like)
    models = []
    for one in (model, like):
        torch.manual_seed(0)
        models.append(get_peft_model(one, S2LoraConfig(r=4, **config)))
        awaken(models[-1])
    return models[0].train(), models[1].train()


@each_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_output_and_gradients_are_those_of_the_weight_that_is_meant(kind, dtype):
    """Against float64: y = x (W + B diag(s) A)ᵀ + b with W as it is dequantised, in training and in inference."""
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(quantize(nn.Linear(64, 96), kind)), S2LoraConfig(r=4, target_modules=["0"]))
    awaken(model)
    layer = model.base_model.model[0]
    x, dy = torch.randn(130, 64).to(dtype), torch.randn(130, 96).to(dtype)
    down, up, coefficients = (operand.detach() for operand in layer.operands("default"))
    weight, bias = dequantized(layer.base_layer), layer.base_layer.bias

    def found(operation, dtype):
        operands = [value.detach().to(dtype).requires_grad_() for value in (x, down, up, coefficients)]
        y = operation(*operands)
        return [y.detach(), *torch.autograd.grad(y, operands, dy.to(y.dtype))]

    def meant(dtype):
        frozen = weight.to(dtype), bias.to(dtype)
        return found(lambda x, *factors: s2_linear_reference(x, *frozen, *factors), dtype)

    trained = layer.s2lora_down["default"], layer.s2lora_up["default"], layer.s2lora_coefficients["default"]
    given = x.clone().requires_grad_()
    y = layer(given)
    got = [y.detach(), *torch.autograd.grad(y, [given, *trained], dy)]
    names = ("y", "x", "down", "up", "coefficients")
    for name, value, oracle, eager in zip(names, got, meant(torch.float64), meant(dtype), strict=True):
        check_close(name, value, oracle, eager.to(value.dtype), FLOOR[dtype])
    with torch.no_grad():
        assert torch.equal(layer(x), got[0]) == (dtype == torch.float32)  # half-precision weights are rounded at random
        heard = layer.eval()(x)
    rounding = 0.02 if kind == "int8" else FLOOR[dtype]  # bitsandbytes may round x to 8 bits too
    assert (heard - got[0]).abs().max() <= rounding * got[0].abs().max()


@pytest.mark.parametrize("kind", ["int8", "nf4"])
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_a_quantised_whisper_trains_as_one_with_its_weights(tiny_whisper, kind, fused):
    """Loss and every gradient, alone and with q, k and v as one operation."""
    model, like = adapted_pair(tiny_whisper, kind)
    if fused:
        fuse_whisper(model)
    got, expected = step(model, torch.float32), step(like, torch.float32)
    assert_near(got, expected)


def test_a_weight_that_is_off_shows(tiny_whisper, monkeypatch):
    """The comparison above fails where one row of one weight is not what is meant."""
    model, like = adapted_pair(tiny_whisper, "nf4")
    spoilt = model.base_model.model.model.decoder.layers[1].fc2.base_layer
    make = quantized_module.dequantized

    def off(linear, dtype=None):
        weight = make(linear, dtype)
        return torch.cat([0 * weight[:1], weight[1:]]) if linear is spoilt else weight

    monkeypatch.setattr(quantized_module, "dequantized", off)
    got, expected = step(model, torch.float32), step(like, torch.float32)
    assert any((got[name] - value).abs().max() > 2e-3 * value.abs().max() for name, value in expected.items())


@pytest.mark.parametrize("checkpointing", [False, True], ids=["whole", "checkpointed"])
def test_no_weight_is_kept_until_the_backward_pass(tiny_whisper, monkeypatch, checkpointing):
    model, like = adapted_pair(tiny_whisper, "nf4")
    fuse_whisper(model)
    expected = step(like, torch.float32)
    if checkpointing:
        model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    made = []
    make = quantized_module.dequantized

    def watched(linear, dtype=None):
        weight = make(linear, dtype)
        made.append(weakref.ref(weight))
        return weight

    monkeypatch.setattr(quantized_module, "dequantized", watched)
    loss = model(**batch()).loss
    gc.collect()
    forward = len(made)
    assert forward == 2 * 6 + 2 * 10
    assert not any(weight() is not None for weight in made)
    loss.backward()
    assert len(made) > forward
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert_near({"loss": loss.detach(), **gradients}, expected)


def test_saving_generating_and_a_second_adapter(tiny_whisper, tmp_path):
    model, like = adapted_pair(tiny_whisper, "nf4")
    features = batch()["input_features"]
    tokens = model.eval().generate(input_features=features, max_new_tokens=6)
    assert torch.equal(tokens, like.eval().generate(input_features=features, max_new_tokens=6))
    model.save_pretrained(tmp_path)
    like.load_adapter(str(tmp_path), "again")
    like.set_adapter("again")
    assert torch.equal(tokens, like.generate(input_features=features, max_new_tokens=6))
    with pytest.raises(ValueError, match="merge it on the model as it was"):
        model.merge_and_unload()
    assert {parameter.dtype for name, parameter in model.named_parameters() if "s2lora_" in name} == {torch.float32}


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_training_after_inference(tiny_whisper, kind):
    """For which bitsandbytes lays weights of 4 bits out anew on some CPUs, in their own place."""
    model, like = adapted_pair(tiny_whisper, kind)
    with torch.no_grad():
        model.eval()(**batch())
        with model.disable_adapter():
            model(**batch())
    got, expected = step(model.train(), torch.float32), step(like, torch.float32)
    assert_near(got, expected)
    linear = quantize(nn.Linear(64, 96), "nf4")
    linear.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(ValueError, match="load the model anew and add the adapter before it is first called"):
        get_peft_model(nn.Sequential(linear), S2LoraConfig(target_modules=["0"]))


def test_maps_are_made_ordinary(tiny_whisper):
    model, like = adapted_pair(tiny_whisper, "nf4")
    dequantize_maps(model)
    assert not any(isinstance(module, nn.Linear) and is_quantized(module) for module in model.modules())
    merged = [one.eval().merge_and_unload() for one in (model, like)]
    with torch.no_grad():
        torch.testing.assert_close(*(one(**batch()).logits for one in merged))


def test_a_named_strategy_is_taken(tiny_whisper):
    expected = None
    fused = ["fused"] if device.INTERPRETING else []  # the model is on a CPU, where else no kernel runs
    for backend in ("auto", "split", *fused, "reference"):
        model, _ = adapted_pair(tiny_whisper, "nf4", backend=backend)
        got = step(model, torch.float32)
        expected = expected or got
        assert_near(got, expected)


def test_lora_of_peft_gives_the_same_update(tiny_whisper):
    """With B and A of the two made equal, a quantised map gives the same output by either."""
    torch.manual_seed(0)
    linear = quantize(nn.Linear(64, 96), "nf4")
    ours = get_peft_model(nn.Sequential(copy.deepcopy(linear)), S2LoraConfig(r=4, target_modules=["0"]))
    theirs = get_peft_model(nn.Sequential(linear), LoraConfig(r=4, lora_alpha=4, target_modules=["0"]))
    awaken(ours)
    mine, lora = ours.base_model.model[0], theirs.base_model.model[0]
    down, up, coefficients = mine.operands("default")
    with torch.no_grad():
        lora.lora_A["default"].weight.copy_(down)
        lora.lora_B["default"].weight.copy_(up * coefficients)
    x = torch.randn(130, 64)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)


def test_of_a_kernel_that_is_not_used_nothing_is_said(caplog):
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    logger.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s.", "No module named 'kernels'")
    logger.warning("of something else")
    assert caplog.messages == ["of something else"]
