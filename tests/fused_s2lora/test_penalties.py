"""The two penalties in the loss, and the proximal step in place of one."""

import torch
from peft import get_peft_model

from fused_s2lora import S2LoraConfig, rank_pattern
from tests.fused_s2lora.adapters import adapted, awaken, batch


def test_penalties_are_the_papers(tiny_whisper):
    model = adapted(tiny_whisper, sparsity_weight=0.05, norm_weight=0.1)
    parameters = dict(model.named_parameters())
    s = [value for name, value in parameters.items() if ".s2lora_coefficients." in name]
    assert len(s) == 32
    sparsity = 0.05 * sum(value.abs().sum() for value in s) / 32
    pairs = model.base_model.s2lora_factors.pairs()
    norms = [
        sum(pair.up["default"][:, k].norm() + pair.down["default"][k].norm() for k in range(8)) / 16 for pair in pairs
    ]
    norm = 0.1 * sum(norms) / 5
    plain = model(**batch()).loss
    model.train()
    penalized = model(**batch()).loss
    torch.testing.assert_close(penalized - plain, sparsity + norm, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.base_model.last_penalties["sparsity"], sparsity.detach())
    torch.testing.assert_close(model.base_model.last_penalties["norm"], norm.detach())
    assert not any(kept.requires_grad for kept in model.base_model.last_penalties.values())  # nor their graph
    penalized.backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


def test_penalties_of_two_adapters_add_up(tiny_whisper):
    """Also where one of them is in fewer of the pairs."""
    model = adapted(tiny_whisper, sparsity_weight=0.05, norm_weight=0.1)
    model.add_adapter("other", S2LoraConfig(target_modules=["q_proj"], sparsity_weight=0.2, norm_weight=0.3))
    awaken(model)
    expected = torch.zeros(2)
    for name in ("default", "other"):
        model.set_adapter(name)
        alone = torch.stack(model.base_model.penalty()).detach()
        assert (alone > 0).all()
        expected += alone
    model.base_model.set_adapter(["default", "other"])
    torch.testing.assert_close(torch.stack(model.base_model.penalty()).detach(), expected)


def test_penalties_of_half_precision_are_summed_in_float32(tiny_whisper):
    config = S2LoraConfig(sparsity_weight=0.05, norm_weight=0.1)
    model = get_peft_model(tiny_whisper().bfloat16(), config, autocast_adapter_dtype=False)
    awaken(model)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    got = model.base_model.penalty()
    for value, exact in zip(got, model.double().base_model.penalty(), strict=True):
        assert value.dtype == exact.dtype == torch.float32
        torch.testing.assert_close(value, exact, rtol=1e-5, atol=0)


def test_penalties_reach_the_loss_of_a_task_type(tiny_whisper):
    """PEFT calls the wrapped model by another path for a task type; the loss must hold the penalties there too."""
    model = get_peft_model(tiny_whisper(), S2LoraConfig(sparsity_weight=1.0, task_type="FEATURE_EXTRACTION"))
    awaken(model)
    model.train()
    inputs = batch()
    with_penalty = model.base_model(**inputs).loss
    model.eval()
    assert with_penalty > model.base_model(**inputs).loss + 0.1


def test_proximal_step_gives_exact_zeros(tiny_whisper):
    model = adapted(tiny_whisper, penalty="proximal", sparsity_weight=0.5)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if ".s2lora_coefficients." in n}
    assert float(model.base_model.penalty()[0].detach()) == 0.0
    model.base_model.proximal_step(lr=0.2)
    for name, old in before.items():
        expected = old.sign() * (old.abs() - 0.1).clamp(min=0)
        torch.testing.assert_close(model.get_parameter(name).detach(), expected)
    zeros = sum(int((model.get_parameter(name) == 0).sum()) for name in before)
    assert 0 < zeros < 32 * 8
    live = sum(value for pattern in rank_pattern(model) for row in pattern.live for value in row)
    assert live == 32 * 8 - zeros
    frozen = next(parameter for parameter in map(model.get_parameter, before) if parameter.any())
    old = frozen.requires_grad_(False).clone()
    model.base_model.proximal_step(lr=0.2)
    assert torch.equal(frozen, old)
