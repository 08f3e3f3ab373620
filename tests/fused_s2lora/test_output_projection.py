"""The output projection of a fused model keeps autocast's copy of its weight."""

import contextlib
import copy
import gc
import weakref

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fused_s2lora import fuse_whisper, output_projection, unfuse_whisper
from tests.fused_s2lora.adapters import adapted, batch, logits


class Casts(TorchDispatchMode):
    """Counts casts of tensors of a shape."""

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.shape, self.count = shape, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        cast = function is torch.ops.aten._to_copy.default and args[0].shape == self.shape
        self.count += cast and (kwargs or {}).get("dtype") == torch.bfloat16
        return function(*args, **(kwargs or {}))


def projection(model) -> nn.Linear:
    return model.get_base_model().proj_out


def trained(model, *, gradients: bool = True) -> tuple[int, dict[str, torch.Tensor]]:
    """How often the projection's weight is cast in one step under autocast; logits and every gradient."""
    model.zero_grad()
    model.train()
    mode = contextlib.nullcontext() if gradients else torch.no_grad()
    with Casts(projection(model).weight.shape) as casts, torch.autocast("cpu", torch.bfloat16), mode:
        outputs = model(**batch())
    if gradients:
        outputs.loss.backward()
    found = {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
    return casts.count, {"logits": outputs.logits.detach(), **found}


def assert_equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


@pytest.fixture
def fused(tiny_whisper):
    model = adapted(tiny_whisper)
    fuse_whisper(model)
    return model


def test_it_is_cast_once_and_computes_the_same(fused):
    unkept = copy.deepcopy(fused)
    projection(unkept).__class__ = nn.Linear
    for casts in (1, 0, 0):
        count, found = trained(fused)
        expected_count, expected = trained(unkept)
        assert (count, expected_count) == (casts, 1)
        assert_equal(found, expected)


@pytest.mark.parametrize("write", ["in place", "loaded", "replaced", "replaced twice"])
def test_a_weight_that_was_written_to_is_cast_anew(fused, write):
    trained(fused)
    weight = projection(fused).weight
    changed = weight.detach() * 2
    if write == "in place":
        with torch.no_grad():
            weight.mul_(2)
    elif write == "loaded":
        projection(fused).load_state_dict({"weight": changed})
    else:
        weight.data = changed
        if write == "replaced twice":
            weight.data = weight.data.clone()
    unkept = copy.deepcopy(fused)
    projection(unkept).__class__ = nn.Linear
    count, found = trained(fused)
    assert count == 1
    assert_equal(found, trained(unkept)[1])


def test_a_trained_weight_is_cast_each_time_and_has_its_gradient(fused):
    trained(fused)
    projection(fused).weight.requires_grad_()
    count, found = trained(fused)
    assert count == 1
    name = next(name for name, value in fused.named_parameters() if value is projection(fused).weight)
    assert found[name].abs().max() > 0


def test_products_in_another_dtype_have_a_cast_of_their_own(fused):
    trained(fused)
    x, weight = torch.randn(3, 32), projection(fused).weight
    with torch.autocast("cpu", torch.float16):
        y = projection(fused)(x)
    assert torch.equal(y, nn.functional.linear(x.half(), weight.half()))


def test_nothing_is_kept_where_nothing_is_trained(fused):
    assert trained(fused, gradients=False)[0] == 1
    assert projection(fused).weight not in output_projection._casts
    logits(fused)  # without autocast
    assert projection(fused).weight not in output_projection._casts


def test_it_is_let_go_with_the_model_and_by_unfusing(fused, tiny_whisper):
    trained(fused)
    kept = weakref.ref(output_projection._casts[projection(fused).weight][1])
    names = set(fused.state_dict())
    unfuse_whisper(fused)
    gc.collect()
    assert type(projection(fused)) is nn.Linear
    assert kept() is None
    assert set(fused.state_dict()) == names
    assert trained(fused)[0] == 1
    other = adapted(tiny_whisper)
    fuse_whisper(other)
    trained(other)
    kept = weakref.ref(output_projection._casts[projection(other).weight][1])
    del other
    gc.collect()
    assert kept() is None


def test_a_fake_tensor_is_not_kept(fused):
    with FakeTensorMode(allow_non_fake_inputs=True), torch.autocast("cpu", torch.bfloat16):
        fused(**batch())
    assert projection(fused).weight not in output_projection._casts
    assert type(trained(fused)[1]["logits"]) is torch.Tensor


def test_hooks_put_on_a_fused_model_may_stay(fused):
    """accelerate's keep the method of the class that unfusing takes away."""
    norm = fused.get_base_model().model.encoder.layers[0].self_attn_layer_norm
    for module in (projection(fused), norm):
        add_hook_to_module(module, ModelHook())
    before = logits(fused)
    unfuse_whisper(fused)
    torch.testing.assert_close(logits(fused), before)
    trained(fused)
