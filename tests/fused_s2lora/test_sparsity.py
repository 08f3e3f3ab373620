"""What sparse or frozen adapters leave out: dead ranks, dead weights, and the input where only e is trained."""

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from fused_s2lora import S2LoraConfig, S2LoraLinear, fuse_whisper, projection_group, s2_linear, unfuse_whisper
from fused_s2lora import layer as layer_module
from tests.fused_s2lora.adapters import adapted, batch, logits
from tests.oracle import DEVICE


@pytest.fixture
def ranks_seen(monkeypatch) -> list[int]:
    """The rank of every operation that a layer asks for."""
    seen = []
    operation = layer_module.s2_linear_group

    def counted(x, weights, bias, down, *rest, **options):
        seen.append(len(down))
        return operation(x, weights, bias, down, *rest, **options)

    for module in (layer_module, projection_group):
        monkeypatch.setattr(module, "s2_linear_group", counted)
    return seen


def one_layer(r: int, live: int) -> tuple[nn.Module, S2LoraLinear]:
    """A linear map with `live` of `r` coefficients that are not zero."""
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(24, 20)), S2LoraConfig(r=r, target_modules=["0"]))
    (layer,) = (module for module in model.modules() if isinstance(module, S2LoraLinear))
    with torch.no_grad():
        layer.s2lora_coefficients["default"][:live] = torch.rand(live) + 0.1
    return model, layer


def frozen(layer: S2LoraLinear) -> None:
    layer.s2lora_coefficients["default"].requires_grad_(False)


def test_all_zero_and_frozen_is_the_plain_linear(ranks_seen):
    _, layer = one_layer(r=8, live=0)
    frozen(layer)
    x = torch.randn(5, 24, requires_grad=True)
    y = layer(x)
    assert torch.equal(y, layer.base_linear(x))
    assert ranks_seen == []
    y.sum().backward()


def test_zero_coefficients_that_learn_are_not_left_out(ranks_seen):
    _, layer = one_layer(r=8, live=0)
    layer(torch.randn(5, 24)).square().sum().backward()
    assert ranks_seen == [8]
    assert layer.s2lora_coefficients["default"].grad.abs().sum() > 0


@pytest.mark.parametrize(("live", "computed"), [(10, 10), (17, 17), (33, 40), (40, 40)])
def test_live_ranks_are_compacted_where_it_saves_a_block(ranks_seen, live, computed):
    """40 ranks are padded to 64; 10 fit a block of 16, 17 one of 32, and 33 need 64 all the same."""
    _, layer = one_layer(r=40, live=live)
    x = torch.randn(5, 24)
    expected = layer(x).detach()
    ranks_seen.clear()
    frozen(layer)
    y = layer(x)
    torch.testing.assert_close(y, expected)
    assert ranks_seen == [computed]


def test_factors_still_learn_behind_compacted_ranks():
    _, layer = one_layer(r=40, live=10)
    x = torch.randn(5, 24)
    factors = (layer.s2lora_up["default"], layer.s2lora_down["default"])
    expected = torch.autograd.grad(layer(x).square().sum(), factors)
    frozen(layer)
    got = torch.autograd.grad(layer(x).square().sum(), factors)
    torch.testing.assert_close(got, expected)


class OnGpu(nn.Parameter):
    """As of a GPU, where ranks are looked up once."""

    is_cuda = True


def test_ranks_looked_up_for_inference_serve_training():
    _, layer = one_layer(r=40, live=10)
    x = torch.randn(5, 24)
    expected = torch.autograd.grad(layer(x).square().sum(), layer.s2lora_up["default"])
    layer.s2lora_coefficients["default"] = OnGpu(layer.s2lora_coefficients["default"].detach(), requires_grad=False)
    with torch.inference_mode():
        layer(x)
    assert layer._frozen_ranks
    torch.testing.assert_close(torch.autograd.grad(layer(x).square().sum(), layer.s2lora_up["default"]), expected)


def test_coefficients_that_come_to_lie_where_others_were_are_noticed(ranks_seen):
    """As two states loaded one after the other with `assign=True`: the second may have the memory of those before."""
    _, layer = one_layer(r=8, live=0)
    memory, x = bytearray(8 * 4), torch.randn(5, 24)
    for computed in ([], [8]):
        values = OnGpu(torch.frombuffer(memory, dtype=torch.float32), requires_grad=False)
        layer.s2lora_coefficients["default"] = values
        with torch.no_grad():
            layer(x)
        assert ranks_seen == computed
        torch.frombuffer(memory, dtype=torch.float32).fill_(0.3)


class Waits(TorchDispatchMode):
    """Counts what has a GPU's host wait for a size."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.overloadpacket in (torch.ops.aten.nonzero, torch.ops.aten._unique2)
        return function(*args, **(kwargs or {}))


def test_a_gpu_is_waited_for_once(tiny_whisper):
    """A pruned attention in inference and in training: what is known of its ranks is no other at the second call."""
    model = adapted(tiny_whisper, r=40)
    fuse_whisper(model)
    attention = model.get_base_model().model.encoder.layers[0].self_attn
    layers = (attention.q_proj, attention.k_proj, attention.v_proj)
    x = torch.randn(1, 50, 32)
    with torch.no_grad():
        for first, layer in enumerate(layers):
            values = layer.s2lora_coefficients["default"]
            values[:first], values[first + 10 :] = 0, 0
        expected = [layer(x) for layer in layers]
        for layer in layers:
            values = layer.s2lora_coefficients["default"].detach()
            layer.s2lora_coefficients["default"] = OnGpu(values, requires_grad=False)
    with Waits() as waits:
        with torch.inference_mode():
            found = [layer(x) for layer in layers]
        assert waits.count == len(layers) + 1
        trained = [layer(x) for layer in layers]
        assert waits.count == len(layers) + 1
        with torch.no_grad():
            layers[2].s2lora_coefficients["default"][30] = 1.0
        woken = layers[2](x)
        assert waits.count == len(layers) + 3
    for one, other, reference in zip(found, trained, expected, strict=True):
        torch.testing.assert_close(one, reference)
        torch.testing.assert_close(other, reference)
    assert not torch.allclose(woken, expected[2])
    sum(y.sum() for y in trained).backward()
    assert layers[0].s2lora_up["default"].grad is not None


def test_a_coefficient_that_wakes_is_noticed(ranks_seen):
    _, layer = one_layer(r=8, live=0)
    frozen(layer)
    x = torch.randn(5, 24)
    with torch.no_grad():
        before = layer(x)
        layer.s2lora_coefficients["default"][3] = 1.0
        after = layer(x)
    assert ranks_seen == [8]
    assert not torch.allclose(before, after)


def test_a_pruned_adapter_when_fused(tiny_whisper, ranks_seen):
    """10 of 40 ranks of every weight, and two k dead: as unfused, with gradients and without."""
    model = adapted(tiny_whisper, r=40).train()
    with torch.no_grad():
        for name, layer in model.named_modules():
            if isinstance(layer, S2LoraLinear):
                layer.s2lora_coefficients["default"][10:] = 0
                if name.endswith(("1.encoder_attn.k_proj", "encoder.layers.1.self_attn.k_proj")):
                    layer.s2lora_coefficients["default"].zero_()
                frozen(layer)

    def step() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        model.zero_grad()
        loss = model(**batch()).loss
        loss.backward()
        return loss.detach(), {name: one.grad for name, one in model.named_parameters() if one.grad is not None}

    expected = step()
    fuse_whisper(model)
    ranks_seen.clear()
    loss, gradients = step()
    torch.testing.assert_close(loss, expected[0])
    for name, gradient in expected[1].items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-3, atol=1e-5)
    assert set(ranks_seen) == {10}
    encoder, decoder = 1 + 1 + 2, (1 + 1) + (1 + 1 + 1) + 2  # q, k and v as one, and k and v of cross-attention
    assert len(ranks_seen) == 2 * encoder + 2 * decoder
    fused = logits(model.eval())
    unfuse_whisper(model)
    torch.testing.assert_close(logits(model), fused)


def test_more_ranks_together_than_one_operation_has():
    model, layer = one_layer(r=200, live=200)
    model.add_adapter("other", S2LoraConfig(r=200, target_modules=["0"]))
    with torch.no_grad():
        layer.s2lora_coefficients["other"].fill_(0.5)
    model.base_model.set_adapter(["default", "other"])
    x = torch.randn(5, 24)
    update = layer.get_delta_weight("default") + layer.get_delta_weight("other")
    torch.testing.assert_close(layer(x), layer.base_linear(x) + x @ update.mT, rtol=1e-4, atol=1e-4)


def test_dead_weights_of_a_fused_attention(tiny_whisper):
    model = adapted(tiny_whisper)
    with torch.no_grad():
        for name, layer in model.named_modules():
            if isinstance(layer, S2LoraLinear) and name.endswith(("q_proj", "k_proj")):
                layer.s2lora_coefficients["default"].zero_()
            if isinstance(layer, S2LoraLinear):
                frozen(layer)
    expected = logits(model)
    fuse_whisper(model)
    torch.testing.assert_close(logits(model), expected)


def test_weights_that_die_after_a_fused_attention_has_run(tiny_whisper):
    """The biases of q, k and v side by side are others than those of q and v, though Whisper's k has none."""
    model = adapted(tiny_whisper)
    fuse_whisper(model)
    logits(model)
    for name, layer in model.named_modules():
        if isinstance(layer, S2LoraLinear):
            frozen(layer)
            if name.endswith("k_proj"):
                with torch.no_grad():
                    layer.s2lora_coefficients["default"].zero_()
    died = logits(model)
    unfuse_whisper(model)
    torch.testing.assert_close(died, logits(model))


@pytest.mark.parametrize("backend", ["merged", "split", "fused"])
def test_frozen_factors_keep_z_and_not_x(backend):
    x, weight, down, up, coefficients = (
        torch.randn(*shape, device=DEVICE) for shape in ((64, 24), (20, 24), (4, 24), (20, 4), (4,))
    )
    for trained in (x, coefficients):
        trained.requires_grad_()

    def kept(*operands) -> set[tuple[int, ...]]:
        shapes = set()
        with torch.autograd.graph.saved_tensors_hooks(lambda kept: shapes.add(tuple(kept.shape)), lambda none: none):
            s2_linear(x, weight, None, *operands, backend=backend)
        return shapes

    assert (64, 24) not in kept(down, up, coefficients)
    assert (64, 4) in kept(down, up, coefficients)
    assert (64, 24) in kept(down.requires_grad_(), up, coefficients)
    assert {(64, 24), (64, 4)}.isdisjoint(kept(down.detach(), up, coefficients.detach()))


@pytest.mark.parametrize("way", ["jvp", "forward mode", "vmap"])
def test_transforms_of_frozen_coefficients_at_zero(way):
    """A derivative in their direction, which is zero where their rank is left out, and several at once."""
    _, layer = one_layer(r=8, live=0)
    frozen(layer)
    name, values = "s2lora_coefficients.default", layer.s2lora_coefficients["default"].detach()
    x, direction = torch.randn(5, 24), torch.randn(8)

    def output(e: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(layer, {name: e}, (x,))

    down, up, _ = layer.operands("default")
    expected = ((x @ down.mT * direction) @ up.mT).detach()
    if way == "jvp":
        _, change = torch.func.jvp(output, (values,), (direction,))
    elif way == "forward mode":
        with forward_ad.dual_level():
            change = forward_ad.unpack_dual(output(forward_ad.make_dual(values, direction))).tangent
        assert change is not None
    else:
        change = torch.vmap(output)(torch.stack([values, direction])).diff(dim=0)[0]
    torch.testing.assert_close(change.detach(), expected)


@pytest.mark.parametrize("without_data", [FakeTensorMode, lambda: torch.device("meta")], ids=["fake", "meta"])
def test_frozen_coefficients_without_data(tiny_whisper, without_data):
    with without_data():
        model = adapted(tiny_whisper, r=4).requires_grad_(False)
        inputs = {name: torch.empty_like(value) for name, value in batch().items()}
        fuse_whisper(model)
        assert model(**inputs).logits.shape == (2, 5, 100)


def test_an_adapter_loaded_under_a_name_used_before_is_noticed(ranks_seen):
    model, layer = one_layer(r=8, live=0)
    frozen(layer)
    x = torch.randn(5, 24)
    layer(x)
    model.add_adapter("other", S2LoraConfig(r=8, target_modules=["0"]))
    model.set_adapter("other")
    model.delete_adapter("default")
    model.add_adapter("default", S2LoraConfig(r=8, target_modules=["0"]))
    model.set_adapter("default")
    with torch.no_grad():
        layer.s2lora_coefficients["default"].data.fill_(0.3)
    frozen(layer)
    layer(x)
    assert ranks_seen == [8]


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen, on a CPU"])
def test_values_written_past_pytorch_s_count_are_noticed(ranks_seen, trained):
    """As tools that average weights or shard them write: through `.data`."""
    _, layer = one_layer(r=8, live=0)
    if not trained:
        frozen(layer)
    x = torch.randn(5, 24)
    with torch.no_grad():
        before = layer(x)
        layer.s2lora_coefficients["default"].data.fill_(0.3)
        assert not torch.allclose(layer(x), before)
    assert ranks_seen[-1] == 8


def test_an_adapter_made_in_inference_mode_works(tiny_whisper):
    expected = logits(adapted(tiny_whisper))
    with torch.inference_mode():
        model = adapted(tiny_whisper)
        fuse_whisper(model)
        torch.testing.assert_close(model(**batch()).logits, expected)
