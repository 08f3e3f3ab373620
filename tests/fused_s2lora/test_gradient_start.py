"""Shared factors that start from the gradients of the frozen weights, against gradients and a fit computed apart."""

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

from fused_s2lora import S2LoraConfig, S2LoraLinear, fuse_whisper, start_from_gradients
from fused_s2lora.gradient_start import _let_agree
from tests.fused_s2lora.adapters import awaken, batch, logits, step


def adapter(tiny_whisper, seed: int = 0, **config) -> nn.Module:
    whisper = tiny_whisper()
    torch.manual_seed(seed)
    return get_peft_model(whisper, S2LoraConfig(**{"r": 4, **config})).train()


def backward(model: nn.Module, scale: float = 1.0):
    return lambda: [(scale * model(**batch(seed)).loss).backward() for seed in (0, 1)]


def full_gradients(tiny_whisper) -> dict[str, Tensor]:
    """Of every weight of the plain model, over the same two batches."""
    model = tiny_whisper().train()
    backward(model)()
    return {name: value.grad.double() for name, value in model.named_parameters() if value.grad is not None}


def explained(model: nn.Module, gradients: dict[str, Tensor]) -> dict[int, float]:
    """By shared pair, the share of a weight's gradient that its factors give with the best s, in the mean."""
    shares: dict[int, list[float]] = {}
    for key, layer in model.get_base_model().named_modules():
        if not isinstance(layer, S2LoraLinear):
            continue
        down, up, _ = (operand.detach().double() for operand in layer.operands("default"))
        columns = torch.einsum("nr,rk->nkr", up, down).flatten(0, 1)
        gradient = gradients[f"{key}.weight"].flatten()
        best = torch.linalg.lstsq(columns, gradient[:, None], driver="gelsd").solution
        left = (gradient - (columns @ best)[:, 0]).square().sum() / gradient.square().sum()
        shares.setdefault(id(layer.s2lora_up), []).append(1 - left.item())
    return {pair: sum(found) / len(found) for pair, found in shares.items()}


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("sharing", ["module", "stack", "all", "none"])
def test_factors_explain_the_gradients(tiny_whisper, sharing, fused):
    gradients = full_gradients(tiny_whisper)
    model = adapter(tiny_whisper, sharing=sharing)
    at_random = explained(model, gradients)
    if fused:
        fuse_whisper(model)
    said = start_from_gradients(model, backward(model))
    found = explained(model, gradients)
    assert list(said.values()) == pytest.approx(list(found.values()), abs=1e-4)
    assert all(found[pair] > 20 * at_random[pair] for pair in found)
    for pair in model.base_model.s2lora_factors.pairs():
        torch.testing.assert_close(pair.up["default"].norm(dim=0), torch.ones(4))
        torch.testing.assert_close(pair.down["default"].norm(dim=1), torch.ones(4))


def test_one_weight_alone_gets_its_singular_vectors(tiny_whisper):
    """The best that any factors of this rank can do, by Eckart and Young."""
    gradients = full_gradients(tiny_whisper)
    model = adapter(tiny_whisper, sharing="none", target_modules=["fc1"])
    said = start_from_gradients(model, backward(model))
    for name, share in said.items():
        (key,) = (key for key in gradients if key.replace(".", "_").startswith(name) and key.endswith(".weight"))
        squares = torch.linalg.svdvals(gradients[key]).square()
        assert share == pytest.approx((squares[:4].sum() / squares.sum()).item(), abs=2e-3)


def test_shared_directions_are_found():
    """Slices made of four common directions are explained whole, by the very directions, up to order and sign."""
    generator = torch.Generator().manual_seed(1)
    up, down, s = (torch.randn(*shape, generator=generator) for shape in ((30, 4), (4, 20), (6, 4)))
    gradients = [(up * row) @ down for row in s]
    b, a = torch.randn(30, 4, generator=generator), torch.randn(4, 20, generator=generator)
    assert _let_agree(gradients, b, a) == pytest.approx(1.0, abs=1e-4)
    likeness = (nn.functional.normalize(up, dim=0).mT @ b).abs()
    assert (likeness.amax(dim=0) > 0.99).all()
    assert sorted(likeness.argmax(dim=0).tolist()) == [0, 1, 2, 3]


def test_ranks_that_no_gradient_asks_for_stay_alive():
    """A rank whose column were zero would get no gradient, nor would its coefficient."""
    generator = torch.Generator().manual_seed(2)
    one = torch.outer(torch.randn(12, generator=generator), torch.randn(10, generator=generator))
    for gradients, share in (([one, -2 * one], 1.0), ([torch.zeros(12, 10)], 0.0)):
        b, a = torch.randn(12, 16, generator=generator), torch.randn(16, 10, generator=generator)
        assert _let_agree(gradients, b, a) == pytest.approx(share, abs=1e-3)
        assert b.isfinite().all()
        assert a.isfinite().all()
        assert (b.norm(dim=0) > 0.5).all()
        assert (a.norm(dim=1) > 0.5).all()


def test_the_model_is_left_as_it_was(tiny_whisper):
    model = adapter(tiny_whisper)
    fuse_whisper(model)
    before, asked = logits(model), {name: value.requires_grad for name, value in model.named_parameters()}
    start_from_gradients(model, backward(model))
    assert torch.equal(logits(model), before)
    assert {name: value.requires_grad for name, value in model.named_parameters()} == asked
    assert all(value.grad is None for value in model.parameters())
    with pytest.raises(RuntimeError, match="of the user"):
        start_from_gradients(model, failing)
    assert {name: value.requires_grad for name, value in model.named_parameters()} == asked
    assert not any(layer.disable_adapters for layer in model.modules() if isinstance(layer, S2LoraLinear))
    step(model, torch.float32)


def failing() -> None:
    raise RuntimeError("of the user")


def test_only_directions_count_and_seeds_decide(tiny_whisper):
    starts = []
    for seed, scale in ((0, 1.0), (0, 1024.0), (1, 1.0)):
        model = adapter(tiny_whisper, seed)
        start_from_gradients(model, backward(model, scale))
        starts.append(torch.cat([pair.up["default"].flatten() for pair in model.base_model.s2lora_factors.pairs()]))
    torch.testing.assert_close(starts[1], starts[0], rtol=1e-3, atol=1e-3)
    assert not torch.allclose(starts[2], starts[0], atol=0.1)


def test_what_it_cannot_start(tiny_whisper):
    model = adapter(tiny_whisper)
    with pytest.raises(ValueError, match="without a gradient"):
        start_from_gradients(model, lambda: None)
    with pytest.raises(ValueError, match="not finite"):
        start_from_gradients(model, backward(model, float("inf")))
    awaken(model)
    with pytest.raises(ValueError, match="coefficients that are not 0"):
        start_from_gradients(model, backward(model))
    with pytest.raises(ValueError, match="one active S2-LoRA adapter"):
        start_from_gradients(tiny_whisper(), lambda: None)
    with pytest.raises(ValueError, match="coefficient='rank'"):
        start_from_gradients(adapter(tiny_whisper, coefficient="scalar", sharing="none"), lambda: None)


def test_a_model_stored_in_half_precision(tiny_whisper):
    whole = adapter(tiny_whisper)
    expected = start_from_gradients(whole, backward(whole))
    whisper = tiny_whisper().bfloat16()
    torch.manual_seed(0)
    model = get_peft_model(whisper, S2LoraConfig(r=4)).train()

    def half():
        for seed in (0, 1):
            inputs = batch(seed)
            model(input_features=inputs["input_features"].bfloat16(), labels=inputs["labels"]).loss.backward()

    assert start_from_gradients(model, half) == pytest.approx(expected, abs=0.05)
