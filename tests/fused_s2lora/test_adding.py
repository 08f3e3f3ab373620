"""Adapters added beside others, to models that have had some, that refuse them, and whose weights are elsewhere."""

import pytest
import torch
from accelerate import cpu_offload
from peft import PeftModel, get_peft_model
from torch import nn

from fused_s2lora import S2LoraConfig, S2LoraLinear, fuse_whisper, parameter_groups
from fused_s2lora.sharing import FactorPair
from tests.fused_s2lora.adapters import adapted, awaken, batch, logits


def trained(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize(
    "refused",
    [{"sharing": "stack"}, {"target_modules": ["q_proj", "embed_tokens"]}, {"target_modules": ["nothing"]}],
    ids=["shares in another way", "not linear", "no target"],
)
def test_an_adapter_that_is_refused_leaves_nothing_behind(tiny_whisper, tmp_path, refused):
    model = adapted(tiny_whisper, r=4, target_modules=["v_proj", "q_proj"])
    model.set_requires_grad("default", False)
    before, names = trained(model), [name for name, _ in model.named_parameters()]
    with pytest.raises(ValueError, match=r"target|sharing"):
        model.add_adapter("other", S2LoraConfig(r=4, **refused))
    assert trained(model) == before
    assert [name for name, _ in model.named_parameters()] == names
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(tiny_whisper(), tmp_path).eval()), logits(model))
    model.add_adapter("other", S2LoraConfig(r=8))
    model.set_adapter("other")
    awaken(model)
    assert (logits(model) - logits(tiny_whisper())).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["v1.0", "values", ""])
def test_a_name_that_parameters_cannot_have_is_refused(tiny_whisper, name):
    model = adapted(tiny_whisper, r=4)
    before, expected = trained(model), logits(model)
    with pytest.raises(ValueError, match=f"adapter_name '{name}' is empty, has a dot or is an attribute"):
        model.add_adapter(name, S2LoraConfig(r=4))
    assert list(model.peft_config) == ["default"]
    assert trained(model) == before
    assert torch.equal(logits(model), expected)
    with pytest.raises(ValueError, match=f"adapter_name '{name}'"):
        get_peft_model(tiny_whisper(), S2LoraConfig(r=4), adapter_name=name)


def test_a_model_that_refused_its_first_adapter_is_as_it_was(tiny_whisper):
    whisper = tiny_whisper()
    before, names = trained(whisper), [name for name, _ in whisper.named_modules()]
    with pytest.raises(ValueError, match="embed_tokens is a Embedding"):
        get_peft_model(whisper, S2LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"]))
    assert trained(whisper) == before
    assert [name for name, _ in whisper.named_modules()] == names
    model = get_peft_model(whisper, S2LoraConfig(r=4, sharing="stack"))
    torch.testing.assert_close(logits(model), logits(tiny_whisper()))


def test_a_second_model_around_the_same_whisper_is_refused(tiny_whisper):
    whisper = tiny_whisper()
    model = get_peft_model(whisper, S2LoraConfig(r=4))
    with pytest.raises(ValueError, match=r"S2-LoRA layers already: take them off with unload\(\)"):
        get_peft_model(whisper, S2LoraConfig(r=4))
    assert get_peft_model(model.unload(), S2LoraConfig(r=8)).get_nb_trainable_parameters()[0] > 0


@pytest.mark.parametrize("fused", [False, True])
def test_layers_whose_adapters_are_gone_share_anew(tiny_whisper, fused):
    attention = ["q_proj", "k_proj", "v_proj"]
    model = adapted(tiny_whisper, r=4, target_modules=["fc1"])
    model.add_adapter("first", S2LoraConfig(r=4, sharing="stack", target_modules=attention))
    if fused:
        fuse_whisper(model)
    model.delete_adapter("first")
    model.add_adapter("second", S2LoraConfig(r=4, target_modules=attention))
    model.set_adapter("second")
    awaken(model)
    model.base_model.s2lora_factors.pairs()[-1].up["second"].data.mul_(2.0)
    alone = get_peft_model(tiny_whisper(), S2LoraConfig(r=4, target_modules=attention))
    values = {name.removesuffix(".second"): value for name, value in model.named_parameters()}
    with torch.no_grad():
        for name, parameter in alone.named_parameters():
            if "s2lora_" in name:
                parameter.copy_(values[name.removesuffix(".default")])
    torch.testing.assert_close(logits(model), logits(alone.eval()))
    for one in (model, alone):
        one.train()
        one(**batch()).loss.backward()
    gradients = {name.removesuffix(".second"): value.grad for name, value in model.named_parameters()}
    for name, parameter in alone.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(gradients[name.removesuffix(".default")], parameter.grad, msg=name)


def test_frozen_factors_stay_frozen_where_another_adapter_covers_more(tiny_whisper):
    model = adapted(tiny_whisper, r=4)
    model.add_adapter("narrow", S2LoraConfig(r=4, train_factors=False, target_modules=["k_proj"]))
    model.set_adapter("narrow")
    assert {group["name"] for group in parameter_groups(model, 1e-3)} == {"coefficients"}
    model.set_adapter("default")
    assert {group["name"] for group in parameter_groups(model, 1e-3)} == {"coefficients", "factors"}
    model.delete_adapter("narrow")
    model.add_adapter("narrow", S2LoraConfig(r=4, target_modules=["k_proj"]))
    model.set_adapter("narrow")
    assert {group["name"] for group in parameter_groups(model, 1e-3)} == {"coefficients", "factors"}


def test_each_layer_tells_its_own_adapters(tiny_whisper):
    model = adapted(tiny_whisper, r=4, target_modules=["q_proj", "k_proj"])
    model.add_adapter("other", S2LoraConfig(r=4, target_modules=["k_proj", "v_proj"]))
    available = {status.name.split(".")[-1]: status.available_adapters for status in model.get_layer_status()}
    assert available == {"q_proj": ["default"], "k_proj": ["default", "other"], "v_proj": ["other"]}
    assert model.get_model_status().available_adapters == ["default", "other"]


@pytest.mark.parametrize("names", [("a_b", "a.b"), ("pairs", "b")], ids=["of another weight", "of the container"])
def test_factors_of_a_weights_own_whose_name_is_taken_are_refused(names):
    maps = nn.ModuleDict({"a_b": nn.Linear(8, 8), "a": nn.ModuleDict({"b": nn.Linear(8, 8)}), "pairs": nn.Linear(8, 8)})
    before = [name for name, _ in maps.named_modules()]
    with pytest.raises(ValueError, match="which is taken: rename the module"):
        get_peft_model(maps, S2LoraConfig(r=2, sharing="none", target_modules=[*names]))
    assert [name for name, _ in maps.named_modules()] == before
    assert get_peft_model(maps, S2LoraConfig(r=2, target_modules=[*names])).get_nb_trainable_parameters()[0] > 0


@pytest.mark.parametrize("first", ["offloaded", "adapted"])
def test_weights_that_are_fetched_when_they_are_called(tiny_whisper, first):
    whisper = tiny_whisper()

    def offload() -> None:
        for module in list(whisper.modules()):
            if isinstance(module, nn.Linear):
                cpu_offload(module, execution_device=torch.device("cpu"))

    if first == "offloaded":
        offload()
    model = adapted(lambda: whisper, r=4)
    if first == "adapted":
        offload()
    fuse_whisper(model)
    layer = model.base_model.model.model.encoder.layers[0].fc1
    assert layer.base_layer.weight.is_meta
    torch.testing.assert_close(logits(model), logits(adapted(tiny_whisper, r=4)))
    model.train()
    model(**batch()).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


def test_a_pair_of_layers_on_two_devices():
    """The meta device stands for the second one: what reaches the operation is on the weight's device."""
    stack = nn.ModuleDict({"0": nn.ModuleDict({"fc1": nn.Linear(8, 8)}), "1": nn.ModuleDict({"fc1": nn.Linear(8, 8)})})
    stack["1"].to("meta")
    model = get_peft_model(stack, S2LoraConfig(r=4, target_modules=["fc1"]))
    layers = [module for module in model.modules() if isinstance(module, S2LoraLinear)]
    (pair,) = [module for module in model.modules() if isinstance(module, FactorPair)]
    assert pair.up["default"].device.type == "cpu"
    model.base_model._share_factors(stack, ())
    for layer, device in zip(layers, ("cpu", "meta"), strict=True):
        assert {operand.device.type for operand in layer.operands("default")} == {device}
        assert (layer.sink("default") is None) == (device == "meta")
