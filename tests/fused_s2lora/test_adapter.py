"""The adapter in PEFT: counts, arithmetic, several adapters, merging, checkpointing."""

import copy
import itertools

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import WhisperConfig, WhisperForConditionalGeneration

from fused_s2lora import S2Linear, S2LoraConfig, S2LoraLinear, parameter_groups, rank_pattern
from tests.fused_s2lora.adapters import adapted, awaken, batch, logits

SIZES = {
    "tiny": (384, 4, 4, 80, 51865),
    "tiny.en": (384, 4, 4, 80, 51864),
    "base": (512, 6, 6, 80, 51865),
    "small": (768, 12, 12, 80, 51865),
    "medium": (1024, 24, 24, 80, 51865),
    "large-v2": (1280, 32, 32, 80, 51865),
    "large-v3": (1280, 32, 32, 128, 51866),
    "turbo": (1280, 32, 4, 128, 51866),
}


@pytest.mark.parametrize("size", SIZES)
def test_trainable_parameters_of_every_size(size):
    width, encoder_layers, decoder_layers, mel_bins, vocabulary = SIZES[size]
    config = WhisperConfig(
        d_model=width,
        encoder_layers=encoder_layers,
        decoder_layers=decoder_layers,
        encoder_ffn_dim=4 * width,
        decoder_ffn_dim=4 * width,
        encoder_attention_heads=width // 64,
        decoder_attention_heads=width // 64,
        num_mel_bins=mel_bins,
        vocab_size=vocabulary,
    )
    with torch.device("meta"):
        model = get_peft_model(WhisperForConditionalGeneration(config), S2LoraConfig(r=8))
    trainable, _ = model.get_nb_trainable_parameters()
    weights = 6 * encoder_layers + 10 * decoder_layers
    assert trainable == 3 * 2 * width * 8 + 2 * (width + 4 * width) * 8 + weights * 8
    published = {"small": 99_840, "medium": 134_144, "large-v2": 167_936}
    assert trainable == published.get(size, trainable)


@pytest.mark.parametrize(
    ("config", "pairs"),
    [
        ({"sharing": "module"}, 5),
        ({"sharing": "module", "tie_ffn": False}, 7),
        ({"sharing": "stack"}, 4),
        ({"sharing": "all"}, 2),
        ({"sharing": "none"}, 32),
        ({"sharing": "module", "target_modules": ["q_proj", "v_proj"]}, 3),
    ],
    ids=str,
)
def test_sharing_makes_as_many_pairs(tiny_whisper, config, pairs):
    model = adapted(tiny_whisper, **config)
    assert len(model.base_model.s2lora_factors.pairs()) == pairs


def test_module_sharing_has_the_papers_five_pairs(tiny_whisper):
    names = set(dict(adapted(tiny_whisper).base_model.s2lora_factors.named_children()))
    assert names == {"enc_sam_32x32", "enc_ffm_64x32", "dec_sam_32x32", "dec_cam_32x32", "dec_ffm_64x32"}


@pytest.mark.parametrize("coefficient", ["rank", "scalar"])
@pytest.mark.parametrize("sharing", ["module", "stack", "all", "none"])
def test_output_is_that_of_the_dense_update(tiny_whisper, sharing, coefficient):
    model = adapted(tiny_whisper, sharing=sharing, coefficient=coefficient, scaling=1.5, r=4)
    dense = tiny_whisper()
    with torch.no_grad():
        for name, layer in model.base_model.model.named_modules():
            if isinstance(layer, S2LoraLinear):
                pair = (layer.s2lora_up["default"].double(), layer.s2lora_down["default"].double())
                up, down = (pair[1].mT, pair[0].mT) if name.endswith("fc2") and sharing != "none" else pair
                s = layer.s2lora_coefficients["default"].double().expand(4)
                dense.get_submodule(name).weight += (1.5 * up @ torch.diag(s) @ down).float()
    torch.testing.assert_close(logits(model), logits(dense), rtol=1e-4, atol=1e-5)
    assert (logits(model) - logits(tiny_whisper())).abs().max() > 1e-3


def test_shared_gradient_is_the_sum_over_its_weights(tiny_whisper):
    """Gradients of the shared factors against float64 autograd through dense weights."""
    model = adapted(tiny_whisper, sparsity_weight=0.0)
    model(**batch()).loss.backward()
    oracle = adapted(tiny_whisper, sparsity_weight=0.0, backend="reference").double()
    inputs = batch()
    oracle(input_features=inputs["input_features"].double(), labels=inputs["labels"]).loss.backward()
    expected = {name: parameter.grad for name, parameter in oracle.named_parameters() if parameter.requires_grad}
    got = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert got.keys() == expected.keys()
    for name, gradient in got.items():
        assert gradient is not None, name
        assert expected[name].abs().max() > 0, name
        torch.testing.assert_close(gradient.double(), expected[name], rtol=2e-3, atol=1e-6, msg=name)


def test_several_adapters(tiny_whisper):
    model = adapted(tiny_whisper, r=4)
    first = logits(model)
    model.add_adapter("other", S2LoraConfig(r=6))
    model.set_adapter("other")
    torch.testing.assert_close(logits(model), logits(tiny_whisper()))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("s2lora_coefficients.other"):
                parameter.fill_(0.1)
    second = logits(model)
    assert (first - second).abs().max() > 1e-3
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trainable
    assert all(name.endswith(".other") for name in trainable)
    model.base_model.set_adapter(["default", "other"])
    both = logits(model)
    layer = model.base_model.model.model.encoder.layers[0].fc1
    x = torch.randn(3, 32)
    dense = layer.base_layer.weight + layer.get_delta_weight("default") + layer.get_delta_weight("other")
    torch.testing.assert_close(layer(x), nn.functional.linear(x, dense, layer.base_layer.bias), rtol=1e-4, atol=1e-5)
    weight = layer.base_layer.weight.clone()
    model.merge_adapter()
    torch.testing.assert_close(layer.base_layer.weight, dense)
    model.unmerge_adapter()
    torch.testing.assert_close(layer.base_layer.weight, weight)
    model.set_adapter("default")
    torch.testing.assert_close(logits(model), first)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), logits(tiny_whisper()))
    model.delete_adapter("other")
    torch.testing.assert_close(logits(model), first)
    assert (both - first).abs().max() > 1e-3


def test_adapters_must_share_alike(tiny_whisper):
    model = adapted(tiny_whisper)
    with pytest.raises(ValueError, match="same sharing and tie_ffn"):
        model.add_adapter("other", S2LoraConfig(sharing="all"))


@pytest.mark.parametrize("safe_merge", [False, True])
def test_merge_and_unmerge(tiny_whisper, safe_merge):
    model = adapted(tiny_whisper)
    expected = logits(model)
    model.merge_adapter(safe_merge=safe_merge)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)
    merged = model.merge_and_unload(safe_merge=safe_merge)
    assert not any(isinstance(module, S2LoraLinear) for module in merged.modules())
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=1e-5)
    merged.train()
    merged(**batch()).loss.backward  # noqa: B018  # no hook of the adapter is left to fail


@pytest.mark.parametrize("entries", [slice(None), (0, 0)], ids=["all", "one"])  # of all, infinities make NaN
def test_safe_merge_refuses_what_is_not_finite(tiny_whisper, entries):
    model = adapted(tiny_whisper)
    with torch.no_grad():
        model.base_model.s2lora_factors.pairs()[0].up["default"][entries] = torch.inf
    with pytest.raises(ValueError, match="not finite"):
        model.merge_adapter(safe_merge=True)
    assert all(weight.isfinite().all() for name, weight in model.named_parameters() if "base_layer" in name)


def test_deepcopy_has_its_own_factors(tiny_whisper):
    model = adapted(tiny_whisper)
    expected = logits(model)
    twin = copy.deepcopy(model)
    torch.testing.assert_close(logits(twin), expected)
    with torch.no_grad():
        for pair in twin.base_model.s2lora_factors.pairs():
            pair.up["default"].zero_()
    torch.testing.assert_close(logits(twin), logits(tiny_whisper()))
    torch.testing.assert_close(logits(model), expected)
    assert twin.get_nb_trainable_parameters() == model.get_nb_trainable_parameters()


def test_half_precision_base_keeps_full_precision_factors(tiny_whisper):
    model = get_peft_model(tiny_whisper().bfloat16(), S2LoraConfig())
    awaken(model)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert {parameter.dtype for parameter in trainable} == {torch.float32}
    inputs = batch()
    model.train()
    model(input_features=inputs["input_features"].bfloat16(), labels=inputs["labels"]).loss.backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in trainable)
    assert {parameter.grad.dtype for parameter in trainable} == {torch.float32}


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_reaches_every_coefficient(tiny_whisper, use_reentrant):
    plain = adapted(tiny_whisper).train()
    plain(**batch()).loss.backward()
    model = adapted(tiny_whisper).train()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model(**batch()).loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    for name, parameter in plain.named_parameters():
        if parameter.requires_grad:
            assert gradients[name] is not None, name
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_frozen_factors_train_coefficients_only(tiny_whisper):
    model = adapted(tiny_whisper, train_factors=False).train()
    assert {name.split(".")[-2] for name, p in model.named_parameters() if p.requires_grad} == {"s2lora_coefficients"}
    model(**batch()).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
    assert [group["name"] for group in parameter_groups(model, 1e-3)] == ["coefficients"]


def test_dropout_acts_on_the_low_rank_path_in_training_only(tiny_whisper):
    model = adapted(tiny_whisper, dropout=0.5)
    expected = logits(adapted(tiny_whisper))
    torch.testing.assert_close(logits(model), expected)
    layer = model.base_model.model.model.encoder.layers[0].fc1
    x = torch.randn(500, 32)
    layer.train()
    runs = torch.stack([layer(x) for _ in range(200)]).mean(0)
    layer.eval()
    assert (layer(x) - layer.base_layer(x)).abs().mean() > 5 * (runs - layer(x)).abs().mean()


def test_optimizer_groups(tiny_whisper):
    model = adapted(tiny_whisper, coefficient_lr_ratio=7.0)
    groups = {group["name"]: group for group in parameter_groups(model, 1e-3, weight_decay=0.1)}
    assert groups.keys() == {"coefficients", "factors"}
    assert groups["coefficients"]["lr"] == pytest.approx(7e-3)
    assert groups["coefficients"]["weight_decay"] == 0.0
    assert groups["factors"]["lr"] == 1e-3
    assert groups["factors"]["weight_decay"] == 0.1
    parameters = list(itertools.chain.from_iterable(group["params"] for group in groups.values()))
    assert len(parameters) == len({id(parameter) for parameter in parameters}) == 32 + 10
    compiled = {group["name"]: group for group in parameter_groups(torch.compile(model), 1e-3)}
    assert compiled["coefficients"]["lr"] == pytest.approx(7e-3)
    (other,) = parameter_groups(nn.Linear(2, 2), 1e-3, weight_decay=0.1)
    assert (other["name"], other["lr"], other["weight_decay"]) == ("other", 1e-3, 0.1)
    frozen = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to train"):
        parameter_groups(frozen, 1e-3)


def test_rank_pattern(tiny_whisper):
    model = get_peft_model(tiny_whisper(), S2LoraConfig(r=4))
    layer = model.base_model.model.model.decoder.layers[1].encoder_attn.v_proj
    with torch.no_grad():
        layer.s2lora_coefficients["default"].copy_(torch.tensor([1e-3, -1e-4, 5e-5, 0.0]))
    encoder, decoder = rank_pattern(model)
    assert (encoder.stack, encoder.matrices) == ("encoder", ["q", "k", "v", "out", "fc1", "fc2"])
    assert decoder.matrices[4:8] == ["cross q", "cross k", "cross v", "cross out"]
    assert sum(map(sum, encoder.live)) == 0
    assert decoder.live[1][decoder.matrices.index("cross v")] == 2
    assert sum(map(sum, decoder.live)) == 2
    means = [mean for row in decoder.mean_magnitude for mean in row]
    assert max(means) == sum(means) == pytest.approx((1e-3 + 1e-4 + 5e-5) / 4)
    for threshold, live in ((0.0, 32 * 4), (2e-4, 1)):
        patterns = rank_pattern(model, threshold=threshold)
        assert sum(sum(map(sum, pattern.live)) for pattern in patterns) == live
    assert "cross v" in str(decoder)
    assert decoder.to_dict()["r"] == 4
    assert rank_pattern(torch.compile(model)) == [encoder, decoder]
    scalar = rank_pattern(adapted(tiny_whisper, r=4, coefficient="scalar"))
    assert {value for pattern in scalar for row in pattern.live for value in row} == {4}
    with pytest.raises(ValueError, match="no adapter named"):
        rank_pattern(model, "missing")
    with pytest.raises(ValueError, match="no S2-LoRA adapter"):
        rank_pattern(nn.Linear(2, 2))


def test_generate_and_compile(tiny_whisper):
    model = adapted(tiny_whisper)
    features = batch()["input_features"]
    with torch.no_grad():
        tokens = model.generate(input_features=features, max_new_tokens=6)
        merged = copy.deepcopy(model).merge_and_unload().generate(input_features=features, max_new_tokens=6)
    assert torch.equal(tokens, merged)
    layer = model.base_model.model.model.encoder.layers[0].fc1
    x = torch.randn(4, 32)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))


def test_any_model_with_linear_layers():
    model = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 6), nn.Linear(6, 6))
    wrapped = get_peft_model(model, S2LoraConfig(r=2, target_modules=["0", "2", "3"]))
    awaken(wrapped)
    names = set(dict(wrapped.base_model.s2lora_factors.named_children()))
    assert names == {"model_10x6", "model_6x6"}
    assert rank_pattern(wrapped)[0].matrices == ["0", "2", "3"]
    wrapped(torch.randn(3, 6)).sum().backward()
    with pytest.raises(ValueError, match=r"adapts nn\.Linear only"):
        get_peft_model(nn.Sequential(nn.Conv1d(2, 2, 1)), S2LoraConfig(target_modules=["0"]))


def test_a_map_that_is_never_called_is_refused():
    layer = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True)
    with pytest.raises(ValueError, match=r"target self_attn\.out_proj is of a torch\.nn\.MultiheadAttention"):
        get_peft_model(layer, S2LoraConfig(r=2, target_modules=["out_proj", "linear1"]))
    x = torch.randn(2, 5, 16)
    expected = layer(x)
    model = get_peft_model(
        layer, S2LoraConfig(r=2, target_modules=["out_proj", "linear1"], exclude_modules=["out_proj"])
    )
    torch.testing.assert_close(model(x), expected)
    awaken(model)
    assert not torch.allclose(model(x), expected)


def test_a_quantised_weight_is_refused():
    linear = nn.Linear(4, 4)
    linear.weight = nn.Parameter(torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False)  # as in 4 bits
    eight_bits = nn.Linear(4, 4)
    eight_bits.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(ValueError, match="target 0 is quantised"):
        get_peft_model(nn.Sequential(eight_bits), S2LoraConfig(target_modules=["0"]))
    with pytest.raises(ValueError, match="target 0 is quantised"):
        get_peft_model(nn.Sequential(linear), S2LoraConfig(target_modules=["0"]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_a_plain_layer_trains_in_no_less_than_float32(dtype):
    layer = S2Linear(nn.Linear(12, 9, dtype=dtype), r=4)
    trained = torch.promote_types(dtype, torch.float32)
    assert {parameter.dtype for parameter in (layer.down, layer.up, layer.coefficients)} == {trained}
    assert layer(torch.ones(2, 12, dtype=dtype)).dtype == layer.linear.weight.dtype == dtype


def test_a_plain_layer_refuses_what_there_is_not_before_it_freezes_anything():
    linear = nn.Linear(12, 9)
    for wrong in ({"r": 0}, {"backend": "cuda"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            S2Linear(linear, **wrong)
    assert linear.weight.requires_grad


def test_plain_layer_learns_and_merges():
    linear = nn.Linear(12, 9)
    target = nn.Linear(12, 9)
    layer = S2Linear(copy.deepcopy(linear), r=4)
    x = torch.randn(64, 12)
    torch.testing.assert_close(layer(x), linear(x))
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)
    losses = []
    for _ in range(100):
        loss = nn.functional.mse_loss(layer(x), target(x).detach())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert torch.equal(layer.linear.weight, linear.weight)
    torch.testing.assert_close(copy.deepcopy(layer).merge()(x), layer(x), rtol=1e-4, atol=1e-5)
