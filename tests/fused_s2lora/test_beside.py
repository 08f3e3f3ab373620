"""What else may be trained or run beside an adapter: biases, another adapter, checkpoints, a second thread."""

import threading

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from fused_s2lora import S2LoraConfig, fuse_whisper, parameter_groups
from fused_s2lora.projection_group import ProjectionGroup
from tests.fused_s2lora.adapters import adapted, awaken, batch


@pytest.mark.parametrize("fused", [False, True])
def test_a_trained_bias_has_its_gradient(tiny_whisper, fused):
    def bias_gradients(base_layer: str, model: nn.Module) -> dict[str, torch.Tensor]:
        biases = {name: value for name, value in model.named_parameters() if name.endswith(f"_proj{base_layer}.bias")}
        for bias in biases.values():
            bias.requires_grad_(True)
        model.train()
        model(**batch()).loss.backward()
        return {name.rpartition("model.model.")[2].replace(base_layer, ""): bias.grad for name, bias in biases.items()}

    model = adapted(tiny_whisper, r=4)
    expected = bias_gradients("", adapted(tiny_whisper, r=4).merge_and_unload())
    if fused:
        fuse_whisper(model)
    got = bias_gradients(".base_layer", model)
    assert len(got) == len(expected) == 18
    for gradient, reference in zip(got.values(), expected.values(), strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-4, atol=1e-6)


class _Doubling(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("fused", [False, True])
def test_a_map_with_a_forward_or_hooks_of_its_own_is_called(tiny_whisper, fused):
    """The update is added to what it gives; its gradients are those of the plain map."""
    plain = adapted(tiny_whisper, r=4)
    update = plain(**batch()).logits - tiny_whisper()(**batch()).logits
    assert update.abs().max() > 1e-3
    whisper = tiny_whisper()
    asked = []
    layer = whisper.model.encoder.layers[0]
    layer.self_attn.v_proj.register_forward_hook(lambda module, inputs, output: asked.append(1))
    layer.fc1.__class__ = _Doubling
    layer.self_attn.q_proj.register_forward_pre_hook(lambda module, inputs: (inputs[0] / 3,))
    whisper.eval()
    expected = whisper(**batch()).logits
    model = get_peft_model(whisper, S2LoraConfig(r=4)).eval()
    if fused:
        fuse_whisper(model)
    asked.clear()
    torch.testing.assert_close(model(**batch()).logits, expected)
    assert len(asked) == 1
    awaken(model)
    model.train()
    model(**batch()).loss.backward()
    assert all(value.grad is not None for value in model.parameters() if value.requires_grad)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("register", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_backward_hooks_of_a_map_are_called(tiny_whisper, register, fused):
    """As of tools that log gradients; what else is trained has the same gradients."""
    plain = adapted(tiny_whisper, r=4).train()
    plain(**batch()).loss.backward()
    expected = {name: value.grad for name, value in plain.named_parameters() if value.requires_grad}
    model = adapted(tiny_whisper, r=4).train()
    if fused:
        fuse_whisper(model)
    called = []
    attention = model.base_model.model.model.decoder.layers[1].encoder_attn
    for layer in (attention.q_proj, attention.k_proj):
        getattr(layer.base_layer, register)(lambda module, *gradients: called.append(module))
    model(**batch()).loss.backward()
    assert {*called} == {attention.q_proj.base_layer, attention.k_proj.base_layer}
    for name, value in model.named_parameters():
        if value.requires_grad:
            torch.testing.assert_close(value.grad, expected[name], rtol=1e-3, atol=1e-6, msg=name)


def test_a_model_that_carries_another_adapter_is_refused_and_left_as_it_was(tiny_whisper):
    lora = get_peft_model(tiny_whisper(), LoraConfig(r=4, target_modules=["v_proj"], init_lora_weights=False)).eval()
    expected = lora(**batch()).logits
    with pytest.raises(ValueError, match=r"v_proj has an adapter of peft\.tuners\.lora\.layer already"):
        get_peft_model(lora.get_base_model(), S2LoraConfig(r=4))
    torch.testing.assert_close(lora(**batch()).logits, expected)


def test_proximal_step_leaves_frozen_coefficients_alone(tiny_whisper):
    config = {"r": 4, "penalty": "proximal", "sparsity_weight": 1.0}
    model = adapted(tiny_whisper, **config)
    model.add_adapter("second", S2LoraConfig(**config))
    awaken(model)
    model.base_model.set_adapter(["default", "second"])
    model.set_requires_grad("default", False)
    values = {name: [v.clone() for v in model.base_model._coefficients(name)] for name in ("default", "second")}
    model.base_model.proximal_step(0.1)
    for name, changes in (("default", False), ("second", True)):
        now = torch.cat(model.base_model._coefficients(name))
        assert torch.equal(now, torch.cat(values[name])) != changes


@pytest.mark.parametrize("backend", ["auto", "merged", "split", "reference"])
def test_two_adapters_at_once_have_gradients_of_their_own(backend):
    """Two maps with one pair of factors for each adapter: y = x (W + Σ B diag(s) A)ᵀ + b, in float64."""
    config = {"target_modules": ["0", "1"], "backend": backend}
    model = get_peft_model(nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12)).double(), S2LoraConfig(r=4, **config))
    model.add_adapter("second", S2LoraConfig(r=3, scaling=2.0, **config))
    model.base_model.set_adapter(["default", "second"])
    awaken(model)
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    assert len(trained) == 2 * (2 + 2)
    x, dy = torch.randn(2, 70, 12, dtype=torch.float64)
    (model(x) * dy).sum().backward()
    got = {name: value.grad for name, value in trained.items()}
    model.zero_grad()
    (pair,) = model.base_model.s2lora_factors.pairs()
    y = x
    for layer in model.base_model.model:
        weight = layer.base_layer.weight
        for name, scaling in (("default", 1.0), ("second", 2.0)):
            weight = weight + scaling * pair.up[name] @ torch.diag(layer.s2lora_coefficients[name]) @ pair.down[name]
        y = nn.functional.linear(y, weight, layer.base_layer.bias)
    (y * dy).sum().backward()
    for name, value in trained.items():
        torch.testing.assert_close(got[name], value.grad, rtol=1e-9, atol=1e-12, msg=name)


def test_two_ratios_of_learning_rates_are_refused(tiny_whisper):
    model = adapted(tiny_whisper, r=4, coefficient_lr_ratio=2.0)
    model.add_adapter("second", S2LoraConfig(r=4, coefficient_lr_ratio=10.0))
    assert parameter_groups(model, 1e-3)[0]["lr"] == pytest.approx(2e-3)
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match=r"coefficient_lr_ratio 2\.0 and 10\.0"):
        parameter_groups(model, 1e-3)


class _Block(GradientCheckpointingLayer):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(8, 8)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.fc1(hidden)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("by_name", [False, True])
def test_checkpointed_layers_leave_their_input_alone(use_reentrant, by_name):
    model = get_peft_model(nn.Sequential(_Block()), S2LoraConfig(r=4, target_modules=["fc1"]))
    awaken(model)
    (block,) = [module for module in model.modules() if isinstance(module, _Block)]
    block.gradient_checkpointing = True
    block._gradient_checkpointing_func = lambda function, *inputs: torch.utils.checkpoint.checkpoint(
        function, *inputs, use_reentrant=use_reentrant
    )
    block.train()
    hidden = torch.randn(3, 8)
    result = block(hidden=hidden) if by_name else block(hidden)
    assert not hidden.requires_grad
    assert result.requires_grad != (by_name and use_reentrant)  # which PyTorch does not support


def test_two_threads_have_outputs_of_their_own(tiny_whisper, monkeypatch):
    """Each has computed q, k and v together before either asks for its k."""
    model = adapted(tiny_whisper, r=4)
    attention = model.base_model.model.model.encoder.layers[0].self_attn
    inputs = [torch.randn(1, 50, 32) for _ in range(2)]
    with torch.no_grad():
        expected = [attention.k_proj(x) for x in inputs]
    fuse_whisper(model)
    compute, turn = ProjectionGroup._compute, threading.Barrier(2, timeout=60)
    calls = []

    def together(*arguments):
        calls.append(arguments)
        turn.wait()
        made = compute(*arguments)
        turn.wait()
        return made

    monkeypatch.setattr(ProjectionGroup, "_compute", together)
    found = {}

    @torch.no_grad()
    def ask(index: int) -> None:
        attention.q_proj(inputs[index])
        turn.wait()
        found[index] = attention.k_proj(inputs[index])

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 2
    for index, reference in enumerate(expected):
        torch.testing.assert_close(found[index], reference)


def in_training(tiny_whisper, fused: bool) -> tuple[torch.nn.Module, list[torch.nn.Parameter]]:
    """An adapted tiny Whisper, fused or not, and what is trained of it."""
    model = adapted(tiny_whisper, r=4).train()
    if fused:
        fuse_whisper(model)
    return model, [parameter for parameter in model.parameters() if parameter.requires_grad]


@pytest.mark.parametrize("fused", [False, True])
def test_two_threads_have_gradients_of_their_own(tiny_whisper, fused):
    """The second is in its forward pass while the first makes its own, and backward while the first is half done."""
    model, trained = in_training(tiny_whisper, fused)

    def gradients(seed: int) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(model(**batch(seed)).loss, trained)

    expected = [gradients(seed) for seed in range(2)]
    found = {}
    second = threading.Thread(target=lambda: found.update({1: gradients(1)}))
    waits, goes_on = threading.Event(), threading.Event()

    def start_second(*_) -> None:
        if threading.current_thread() is not second:
            second.start()
            waits.wait(60)

    def wait_in_second(*_) -> None:
        if threading.current_thread() is second:
            waits.set()
            goes_on.wait(60)

    def end_second(*_) -> None:
        goes_on.set()
        second.join()

    def end_second_in_backward(module, inputs, output) -> None:
        if threading.current_thread() is not second:
            output.last_hidden_state.register_hook(end_second)

    whisper = model.get_base_model().model
    whisper.encoder.register_forward_pre_hook(start_second)
    whisper.encoder.register_forward_hook(end_second_in_backward)
    whisper.decoder.layers[1].register_forward_pre_hook(wait_in_second)
    found[0] = gradients(0)
    for index, reference in enumerate(expected):
        torch.testing.assert_close(found[index], reference, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("fused", [False, True])
def test_a_backward_pass_within_another_has_gradients_of_its_own(tiny_whisper, fused):
    """Both go through one graph, as where a hook asks how large the gradients are going to be."""
    model, trained = in_training(tiny_whisper, fused)
    expected = torch.autograd.grad(model(**batch()).loss, trained)
    outputs, passes = model(**batch()), []

    def begin_another(*_) -> None:
        if not passes:  # the decoder's maps have left their gradients
            passes.append(None)
            passes[0] = torch.autograd.grad(outputs.loss, trained, retain_graph=True)

    outputs.encoder_last_hidden_state.register_hook(begin_another)
    passes.append(torch.autograd.grad(outputs.loss, trained, retain_graph=True))
    assert len(passes) == 2
    for found in passes:
        for got, reference in zip(found, expected, strict=True):
            torch.testing.assert_close(got, reference, rtol=1e-4, atol=1e-7)
