"""Fused projections and shared inputs against the unfused model: outputs, every gradient, and what must still work."""

import copy
from unittest import mock

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from fused_s2lora import S2LoraConfig, S2LoraLinear, fuse_whisper, unfuse_whisper
from fused_s2lora.kernels import choice, device, strategies
from fused_s2lora.kernels import s2_linear as s2_linear_module
from fused_s2lora.kernels import shared as shared_module
from tests.fused_s2lora.adapters import adapted, assert_same, awaken, batch, in_float64, logits, step
from tests.oracle import DEVICE

# Self-attention of two encoder and two decoder layers, cross-attention of two decoder layers.
ALL_GROUPS = 6
WAYS = {
    "plain": {},
    "one for all": {"sharing": "all"},
    "a scalar a weight": {"coefficient": "scalar"},
    "scaled": {"scaling": 2.0},
    "factors frozen": {"train_factors": False},
    "q, k and v alone": {"target_modules": ["q_proj", "k_proj", "v_proj"]},
    "v and fc2": {"target_modules": ["v_proj", "k_proj", "fc2"]},
    "split": {"backend": "split"},
}


def assert_as_exact(
    got: dict[str, torch.Tensor], plain: dict[str, torch.Tensor], oracle: dict[str, torch.Tensor], floor: float
) -> None:
    """Relative to its largest entry, every gradient is off by at most twice what `plain` is in any of its kind.

    Of its kind, because the four coefficients of one weight are too few to say how large errors of rounding can be.
    """

    def off(values: dict[str, torch.Tensor], name: str) -> float:
        return ((values[name].cpu() - oracle[name]).abs().max() / oracle[name].abs().max()).item()

    def kind(name: str) -> str:
        return name.removesuffix(".default").rpartition(".")[2]

    allowed: dict[str, float] = {}
    for name in oracle:
        allowed[kind(name)] = max(allowed.get(kind(name), 0.0), 2 * off(plain, name) + floor)
    for name in oracle:
        assert off(got, name) <= allowed[kind(name)], name


def groups_of(model: nn.Module) -> int:
    return len({id(layer.group) for layer in model.modules() if isinstance(layer, S2LoraLinear) and layer.group})


@pytest.mark.parametrize("backend", ["merged", "split", "augmented"])
def test_backward_may_be_called_within_autocast(tiny_whisper, backend):
    """Where the forward pass was left out of it: gradients are those without autocast."""

    def gradients(within: bool) -> dict[str, torch.Tensor]:
        model = adapted(tiny_whisper, r=4, backend=backend).train()
        fuse_whisper(model)
        loss = model(**batch()).loss
        with torch.autocast("cpu", torch.bfloat16, enabled=within):
            loss.backward()
        return {name: value.grad for name, value in model.named_parameters() if value.requires_grad}

    expected = gradients(False)
    for name, gradient in gradients(True).items():
        # What PyTorch's own maps do in between is in bfloat16.
        assert (gradient - expected[name]).abs().max() <= 0.05 * expected[name].abs().max() + 1e-6, name


@pytest.mark.parametrize("config", WAYS.values(), ids=WAYS)
def test_fused_model_is_the_reference_in_every_gradient(tiny_whisper, config):
    oracle = step(in_float64(tiny_whisper, **{**config, "backend": "reference"}))
    model = in_float64(tiny_whisper, **config)
    assert_same(step(model), oracle)
    assert fuse_whisper(model) == ALL_GROUPS == groups_of(model)
    assert_same(step(model), oracle)
    assert_same(step(model), oracle)  # nothing is left over from the step before
    unfuse_whisper(model)
    assert groups_of(model) == 0
    assert_same(step(model), oracle)


def test_a_fault_in_a_group_shows(tiny_whisper):
    """What a dropped dx, a swapped map or a forgotten gradient does to the comparison above."""
    oracle = step(in_float64(tiny_whisper))
    model = in_float64(tiny_whisper)
    fuse_whisper(model)
    with (
        mock.patch.object(shared_module.SharedInput, "take", lambda self: (None, self.g)),
        pytest.raises(AssertionError),
    ):
        assert_same(step(model), oracle)
    layers = next(layer.group for layer in model.modules() if isinstance(layer, S2LoraLinear) and layer.group).layers
    layers[0], layers[1] = layers[1], layers[0]
    assert_same(step(model), oracle)  # the order within a group does not matter
    layers[0].base_linear.weight.data[0] *= 1.01
    with pytest.raises(AssertionError):
        assert_same(step(model), oracle)


def test_z_is_computed_once_for_all_cross_attentions(tiny_whisper):
    model = in_float64(tiny_whisper)
    project = shared_module.project
    seen = []

    def counted(x, down):
        seen.append(tuple(x.shape))
        return project(x, down)

    with mock.patch.object(shared_module, "project", counted):
        step(model)
        assert seen == []
        fuse_whisper(model)
        step(model)
    assert seen == [(100, 32)]


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_gradient_checkpointing(tiny_whisper, reentrant):
    oracle = step(in_float64(tiny_whisper))
    model = in_float64(tiny_whisper)
    fuse_whisper(model)
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_same(step(model), oracle)


def test_accumulation_and_two_forwards_before_a_backward(tiny_whisper):
    model = in_float64(tiny_whisper)
    fuse_whisper(model)
    once = step(model)
    model.zero_grad()
    first, second = (model(**{**batch(), "input_features": batch()["input_features"].double()}).loss for _ in "ab")
    (first + second).backward()
    for name, value in model.named_parameters():
        if value.requires_grad:
            torch.testing.assert_close(value.grad, 2 * once[name], msg=name)


def test_autocast_is_as_exact_as_unfused(tiny_whisper):
    """On a GPU with every strategy, so that a whole model's kernels are held to float64 there."""
    oracle = step(in_float64(tiny_whisper))

    def gradients(fused: bool, backend: str = "reference") -> dict[str, torch.Tensor]:
        model = adapted(tiny_whisper, r=4, backend=backend).train().to(DEVICE)
        if fused:
            fuse_whisper(model)
        with torch.autocast(DEVICE, torch.bfloat16):
            return step(model, torch.float32)

    plain = gradients(False)
    for backend in ("auto", "merged", "split", *(["fused"] if DEVICE == "cuda" else [])):
        assert_as_exact(gradients(True, backend), plain, oracle, 8e-3)


@pytest.mark.parametrize("backend", ["merged", "augmented", "augmented by variable", "fused"])
def test_kernels_and_norms_that_project(tiny_whisper, monkeypatch, backend):
    """The whole model by Triton's kernels, as exact as unfused PyTorch; LayerNorm and GELU leave nothing to project."""
    oracle = step(in_float64(tiny_whisper))
    plain = step(adapted(tiny_whisper, r=4, backend="reference").train().to(DEVICE), torch.float32)
    if backend == "augmented by variable":
        monkeypatch.setenv(choice.VARIABLE, "augmented")
        backend = "auto"
    model = adapted(tiny_whisper, r=4, backend=backend).train().to(DEVICE)
    fuse_whisper(model)
    monkeypatch.setattr(device, "runs_triton", lambda x: device.triton_is_usable(x)[0])
    copied = []
    copy = strategies.with_spare_columns
    monkeypatch.setattr(strategies, "with_spare_columns", lambda x, down: copied.append(x.shape) or copy(x, down))
    projected = []
    project = s2_linear_module.project
    monkeypatch.setattr(s2_linear_module, "project", lambda x, down: projected.append(x.shape) or project(x, down))
    of_gelu = []
    gradient = s2_linear_module.adapter_gradients
    monkeypatch.setattr(
        s2_linear_module,
        "adapter_gradients",
        lambda *operands, **how: of_gelu.append(how["of_gelu"]) or gradient(*operands, **how),
    )
    got = step(model, torch.float32)
    assert of_gelu.count(True) == 4  # fc2 of every layer holds the GELU's input, and not its output
    # Only what attention makes has no producer: the input of its out projections, two self and one cross, and of
    # merged weights none is projected before the backward pass asks for it.
    outs = 2 + 2 + 2
    assert len(projected) == (outs if backend == "merged" else 0)
    crossing = 2  # k and v of each decoder layer as one; what they share has a LayerNorm that projects for nobody
    assert len(copied) == (outs + crossing if backend in ("augmented", "auto") else 0)
    assert_as_exact(got, plain, oracle, 2e-6)
    unfuse_whisper(model)
    assert not any("Projecting" in type(module).__name__ for module in model.modules())


@pytest.mark.parametrize("backend", ["merged", "split"])
def test_an_output_that_a_hook_writes_to_is_read_anew(tiny_whisper, monkeypatch, backend):
    def hooked(model: nn.Module) -> nn.Module:
        for layer in model.get_base_model().model.encoder.layers:
            for module in (layer.self_attn_layer_norm, layer.final_layer_norm, layer.activation_fn):
                module.register_forward_hook(lambda module, inputs, output: output.mul_(0.5).add_(0.3))
        return model

    expected = step(hooked(adapted(tiny_whisper, r=4).train().to(DEVICE)), torch.float32)
    model = adapted(tiny_whisper, r=4, backend=backend).train().to(DEVICE)
    fuse_whisper(model)
    monkeypatch.setattr(device, "runs_triton", lambda x: device.triton_is_usable(x)[0])
    for name, gradient in step(hooked(model), torch.float32).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-4, msg=name)


def test_the_reference_has_nothing_projected(tiny_whisper, monkeypatch):
    """It is differentiable twice, which a norm or GELU that projects is not."""
    monkeypatch.setattr(device, "runs_triton", lambda x: device.triton_is_usable(x)[0])
    model = adapted(tiny_whisper, r=4, backend="reference").train().to(DEVICE)
    fuse_whisper(model)
    norm = model.get_base_model().model.encoder.layers[0].self_attn_layer_norm
    x = torch.randn(3, 32, device=DEVICE, requires_grad=True)
    (gradient,) = torch.autograd.grad(norm(x).pow(3).sum(), x, create_graph=True)
    assert torch.autograd.grad(gradient.square().sum(), x)[0].abs().sum() > 0
    model.peft_config["default"].backend = "merged"
    (gradient,) = torch.autograd.grad(norm(x).pow(3).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.square().sum().backward()


def test_few_rows_by_reference_and_many_merged_in_one_model(tiny_whisper, monkeypatch):
    """The rule of a CPU as it is outside the tests: the decoder's 10 rows are left to the reference."""
    oracle = step(in_float64(tiny_whisper, backend="reference"))
    monkeypatch.setattr(choice, "REFERENCE_ROWS", 64)  # the encoder has 100 rows here
    monkeypatch.setattr(choice, "_chooser", None)
    taken = set()
    choose = s2_linear_module._strategy

    def noted(x, *operands):
        strategy = choose(x, *operands)
        taken.add((len(x), strategy))
        return strategy

    monkeypatch.setattr(s2_linear_module, "_strategy", noted)
    model = in_float64(tiny_whisper)
    fuse_whisper(model)
    got = step(model)
    assert taken == {(10, "reference"), (100, "merged")}
    assert_same(got, oracle)


def test_generation_with_a_cache_and_disabled_adapters(tiny_whisper):
    model = adapted(tiny_whisper)
    features = batch()["input_features"]
    plain, scores = model.generate(features, max_new_tokens=8), logits(model)
    with model.disable_adapter():
        base = logits(model)
    fuse_whisper(model)
    assert torch.equal(model.generate(features, max_new_tokens=8), plain)
    torch.testing.assert_close(logits(model), scores)
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    torch.testing.assert_close(logits(model), scores)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), scores, rtol=1e-4, atol=1e-5)


def test_saving_loading_and_copying(tiny_whisper, tmp_path):
    model = adapted(tiny_whisper)
    names = list(model.state_dict())
    fuse_whisper(model)
    assert list(model.state_dict()) == names
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_whisper(), tmp_path).eval()
    fuse_whisper(loaded)
    torch.testing.assert_close(logits(loaded), logits(model))
    twin = copy.deepcopy(model)
    awaken(twin, seed=5)
    fused_twin = logits(twin)
    unfuse_whisper(twin)
    torch.testing.assert_close(fused_twin, logits(twin))
    assert groups_of(twin) == 0
    assert groups_of(model) == ALL_GROUPS
    assert not torch.allclose(logits(model), fused_twin)


def test_what_cannot_be_fused_is_computed_apart(tiny_whisper):
    """Several adapters, dropout, factors of each weight's own: no group, the same result."""
    model = adapted(tiny_whisper, r=4)
    fuse_whisper(model)
    model.add_adapter("other", S2LoraConfig(r=2))
    awaken(model, seed=3)
    model.base_model.set_adapter(["default", "other"])
    both = logits(model)
    unfuse_whisper(model)
    torch.testing.assert_close(logits(model), both)

    apart = adapted(tiny_whisper, sharing="none")
    assert fuse_whisper(apart) == 0
    dropout = adapted(tiny_whisper, dropout=0.5).train()
    fuse_whisper(dropout)
    step(dropout, torch.float32)


def test_two_adapters_in_cross_attention_keep_their_gradients_apart(tiny_whisper):
    """One reads the shared input with the pair it was shared for, the other, of the same rank, must not."""

    def two() -> PeftModel:
        model = adapted(tiny_whisper, r=4, target_modules=r".*decoder\.layers\.0\.encoder_attn\.(k_proj|v_proj)")
        other = S2LoraConfig(r=4, target_modules=r".*decoder\.layers\.1\.encoder_attn\.v_proj")
        model.add_adapter("other", other)
        awaken(model)
        model.base_model.set_adapter(["default", "other"])
        return model.double().train()

    oracle, model = step(two()), two()
    assert fuse_whisper(model) == 1
    assert_same(step(model), oracle)


def test_an_adapter_that_has_a_part_of_a_group(tiny_whisper):
    """k has another adapter than q and v beside it."""

    def two() -> PeftModel:
        model = adapted(tiny_whisper, r=4, target_modules=["q_proj", "v_proj"])
        model.add_adapter("other", S2LoraConfig(r=4, target_modules=["k_proj"]))
        awaken(model)
        return model.double().train()

    for name in ("default", "other"):
        oracle, model = two(), two()
        fuse_whisper(model)
        for one in (oracle, model):
            one.set_adapter(name)
        assert_same(step(model), step(oracle))


def test_trained_layer_norms_are_left_alone(tiny_whisper):
    config = {"modules_to_save": ["final_layer_norm"]}
    oracle, model = step(in_float64(tiny_whisper, **config)), in_float64(tiny_whisper, **config)
    assert any("final_layer_norm" in name for name in oracle)
    fuse_whisper(model)
    assert_same(step(model), oracle)
    unfuse_whisper(model)
    assert_same(step(model), oracle)


def test_outputs_of_a_group_are_of_the_state_they_are_asked_in(tiny_whisper):
    model = adapted(tiny_whisper)
    fuse_whisper(model)
    attention = model.get_base_model().model.encoder.layers[0].self_attn
    q, k, v = attention.q_proj, attention.k_proj, attention.v_proj
    x = torch.randn(2, 5, 32)
    with torch.no_grad():
        q(x)
    assert k(x).requires_grad
    q.base_linear.bias.data = q.base_linear.bias.data + 1
    q(x)
    with torch.no_grad():
        k.s2lora_coefficients["default"].add_(0.5)
    fused = [layer(x).detach() for layer in (k, v, q)]
    q(x)
    x.mul_(2)
    twice = [layer(x).detach() for layer in (v, q, k)]
    q(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert k(x).dtype == torch.bfloat16
    unfuse_whisper(model)
    torch.testing.assert_close(twice, [layer(x).detach() for layer in (v, q, k)])
    torch.testing.assert_close(fused, [layer(x / 2).detach() for layer in (k, v, q)])


@pytest.mark.parametrize("leave", ["merge_and_unload", "unload"])
def test_what_leaves_peft_is_not_fused(tiny_whisper, leave):
    model = adapted(tiny_whisper)
    fuse_whisper(model)
    plain = getattr(model, leave)()
    assert plain.config._attn_implementation == "sdpa"
    assert not any("Projecting" in type(module).__name__ for module in plain.modules())
    assert not plain.get_decoder()._forward_pre_hooks


def test_models_that_cannot_be_fused_are_named(tiny_whisper):
    with pytest.raises(ValueError, match="no S2-LoRA adapter"):
        fuse_whisper(tiny_whisper())
    model = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(ValueError, match="no WhisperAttention"):
        fuse_whisper(get_peft_model(model, S2LoraConfig(r=2, target_modules=["0"])))
