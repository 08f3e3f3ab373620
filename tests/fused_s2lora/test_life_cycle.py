"""What becomes of the shared factors and the penalties when adapters come, go, are copied, cast, saved and compiled."""

import contextlib
import copy
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.utils import PeftType
from safetensors import safe_open
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import BartConfig, BartForConditionalGeneration, LlamaConfig, LlamaForCausalLM

from fused_s2lora import S2LoraConfig, S2LoraLinear, fuse_whisper, parameter_groups, rank_pattern
from fused_s2lora.config import _register_peft_type
from tests.fused_s2lora.adapters import adapted, awaken, batch, logits


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """After one backward pass in training: the gradient of every trainable parameter, none of them missing."""
    model.train()
    model(**batch()).loss.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(gradient is not None for gradient in found.values())
    return found


@contextlib.contextmanager
def world_of_one(folder: Path) -> Iterator[None]:
    """A process group with this process alone."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def pairs_are_shared(model: PeftModel, adapter: str = "default") -> bool:
    """Whether every layer computes with the very parameters that the model's pairs hold."""
    held = {id(pair.up[adapter]) for pair in model.base_model.s2lora_factors.pairs()}
    layers = [module for module in model.modules() if isinstance(module, S2LoraLinear)]
    return len(layers) == 32 and {id(layer.s2lora_up[adapter]) for layer in layers} == held


def test_enum_member_is_one_and_pickles():
    member = PeftType.S2LORA
    _register_peft_type()
    assert PeftType.S2LORA is member is PeftType("S2LORA")
    assert pickle.loads(pickle.dumps(member)) is member
    assert copy.deepcopy(member) is member
    assert list(PeftType).count(member) == 1


def test_pickled_model_has_factors_and_penalties_of_its_own(tiny_whisper):
    model = adapted(tiny_whisper, sparsity_weight=1.0)
    expected = logits(model)
    for twin in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        torch.testing.assert_close(logits(twin), expected)
        assert pairs_are_shared(twin)
        twin.train()
        loss = twin(**batch()).loss
        awaken(twin, scale=0.0)
        cross_entropy = tiny_whisper()(**batch()).loss
        torch.testing.assert_close(twin(**batch()).loss, cross_entropy)
        assert loss > cross_entropy + 1.0
        assert model.base_model.last_penalties == {}
        torch.testing.assert_close(logits(model), expected)


def test_a_fused_model_that_has_run_can_be_written_and_copied(tiny_whisper, tmp_path):
    model = adapted(tiny_whisper)
    fuse_whisper(model)
    expected = logits(model)
    torch.save(model, tmp_path / "model.pt")
    written = torch.load(tmp_path / "model.pt", weights_only=False)
    for twin in (written, pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        torch.testing.assert_close(logits(twin), expected)
        with torch.no_grad():
            for name, parameter in twin.named_parameters():
                if name.endswith("q_proj.base_layer.bias"):
                    parameter.add_(1.0)
        assert not torch.allclose(logits(twin), expected)
    torch.testing.assert_close(logits(model), expected)


def test_unloading_a_copy_leaves_no_hook_on_it_and_all_on_the_model(tiny_whisper):
    model = adapted(tiny_whisper, sparsity_weight=1.0)
    unloaded = copy.deepcopy(model).unload()
    modules = list(unloaded.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in modules)
    torch.testing.assert_close(logits(unloaded), logits(tiny_whisper()))
    model.train()
    assert model(**batch()).loss > 1.0 + tiny_whisper()(**batch()).loss


def test_penalty_is_of_the_active_adapters(tiny_whisper):
    model = adapted(tiny_whisper, sparsity_weight=1.0, norm_weight=0.5)
    model.train()
    first, alone = model(**batch()).loss, model.base_model.penalty()
    model.add_adapter("other", S2LoraConfig(r=4, sparsity_weight=2.0, norm_weight=0.0))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("s2lora_coefficients.other"):
                parameter.fill_(0.25)
    torch.testing.assert_close(model(**batch()).loss, first)
    model.base_model.set_adapter(["default", "other"])
    sparsity, norm = model.base_model.penalty()
    torch.testing.assert_close(sparsity, alone[0] + 2.0 * 4 * 0.25)
    torch.testing.assert_close(norm, alone[1])


def test_no_penalty_where_the_adapter_does_nothing(tiny_whisper):
    model = adapted(tiny_whisper, sparsity_weight=1.0).train()
    plain = tiny_whisper()(**batch()).loss
    with model.disable_adapter():
        torch.testing.assert_close(model(**batch()).loss, plain)
    assert model(**batch()).loss > plain + 1.0
    expected = model.eval()(**batch()).loss
    model.train().merge_adapter()
    torch.testing.assert_close(model(**batch()).loss, expected)


@pytest.mark.parametrize("interruption", [torch.OutOfMemoryError, KeyboardInterrupt])
@pytest.mark.parametrize("fused", [False, True])
def test_an_interrupted_step_leaves_nothing_behind(tiny_whisper, interruption, fused):
    model = adapted(tiny_whisper).train()
    if fused:
        fuse_whisper(model)
    expected = logits(model)
    attention = model.get_base_model().model.encoder.layers[1].self_attn

    def interrupt(*args):
        raise interruption

    hook = attention.k_proj.register_forward_pre_hook(interrupt)
    with pytest.raises(interruption):
        model(**batch())
    hook.remove()
    torch.testing.assert_close(logits(copy.deepcopy(model)), expected)
    model.double().eval()
    features = batch()["input_features"].double()
    assert model.generate(features, max_new_tokens=2).shape[0] == 2


def test_deleted_adapter_takes_its_factors_along(tiny_whisper):
    model = adapted(tiny_whisper)
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    model.add_adapter("other", S2LoraConfig(r=4))
    model.delete_adapter("other")
    assert {name for name, _ in model.named_parameters(remove_duplicate=False)} == names
    model.add_adapter("other", S2LoraConfig(r=2))
    assert model.base_model.s2lora_factors.enc_sam_32x32.up["other"].shape == (32, 2)


def test_each_adapter_is_saved_and_loaded_on_its_own(tiny_whisper, tmp_path):
    model = adapted(tiny_whisper, r=4)
    model.add_adapter("other", S2LoraConfig(r=6))
    awaken(model, seed=1)
    expected = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        expected[name] = logits(model)
    model.save_pretrained(tmp_path)
    for folder, rank in ((tmp_path, 4), (tmp_path / "other", 6)):
        with safe_open(folder / "adapter_model.safetensors", "pt") as file:
            keys = list(file.keys())
            assert {file.get_slice(key).get_shape()[0] for key in keys if key.endswith("coefficients")} == {rank}
        assert len(keys) == 2 * 5 + 32
        assert (folder / "adapter_model.safetensors").stat().st_size < 40_000
    loaded = PeftModel.from_pretrained(tiny_whisper(), tmp_path).eval()
    torch.testing.assert_close(logits(loaded), expected["default"])
    loaded.load_adapter(tmp_path / "other", adapter_name="second")
    torch.testing.assert_close(logits(loaded), expected["default"])
    loaded.set_adapter("second")
    torch.testing.assert_close(logits(loaded), expected["other"])
    assert pairs_are_shared(loaded, "second")


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("train_factors", [False, True])
def test_loaded_adapter_trains_on(tiny_whisper, tmp_path, train_factors, low_cpu_mem_usage):
    model = adapted(tiny_whisper, r=4, train_factors=train_factors)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_whisper(), tmp_path, is_trainable=True, low_cpu_mem_usage=low_cpu_mem_usage)
    assert pairs_are_shared(loaded)
    expected = gradients(model)
    got = gradients(loaded)
    assert got.keys() == expected.keys()
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, expected[name], msg=name)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("train_factors", [False, True])
def test_what_is_trained_on_a_model_in_half_precision(tiny_whisper, tmp_path, train_factors, low_cpu_mem_usage):
    """PEFT widens the adapter to float32 by putting new parameters in the place of those it has."""
    model = get_peft_model(tiny_whisper().bfloat16(), S2LoraConfig(r=4, train_factors=train_factors))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert any(".s2lora_coefficients." in name for name in trained)
    assert any(".s2lora_factors." in name or ".s2lora_up." in name for name in trained) == train_factors
    model.save_pretrained(tmp_path)
    for is_trainable in (False, True):
        loaded = PeftModel.from_pretrained(
            tiny_whisper().bfloat16(), tmp_path, is_trainable=is_trainable, low_cpu_mem_usage=low_cpu_mem_usage
        )
        assert pairs_are_shared(loaded)
        found = {name for name, parameter in loaded.named_parameters() if parameter.requires_grad}
        assert found == (trained if is_trainable else set())
        assert {parameter.dtype for name, parameter in loaded.named_parameters() if "s2lora" in name} == {torch.float32}


def test_factors_stay_shared_when_the_model_is_cast(tiny_whisper):
    model = adapted(tiny_whisper)
    expected = logits(model)
    model.double()
    assert pairs_are_shared(model)
    features, labels = batch()["input_features"].double(), batch()["labels"]
    with torch.no_grad():
        torch.testing.assert_close(model(input_features=features, labels=labels).logits.float(), expected)


def test_autocast_is_near_full_precision(tiny_whisper):
    expected = gradients(adapted(tiny_whisper))
    model = adapted(tiny_whisper)
    with torch.autocast("cpu", torch.bfloat16):
        got = gradients(model)
    for name, gradient in got.items():
        assert gradient.dtype == torch.float32
        difference = (gradient - expected[name]).norm() / expected[name].norm()
        assert difference < 0.1, f"{name}: {difference}"


def test_half_precision_base_merges_in_its_own_dtype(tiny_whisper):
    model = get_peft_model(tiny_whisper().bfloat16(), S2LoraConfig())
    awaken(model)
    layer = model.base_model.model.model.encoder.layers[0].fc1
    expected = (layer.weight.float() + layer.get_delta_weight("default")).bfloat16()
    assert not torch.equal(expected, layer.weight)
    merged = model.merge_and_unload()
    assert {parameter.dtype for parameter in merged.parameters()} == {torch.bfloat16}
    assert torch.equal(merged.model.encoder.layers[0].fc1.weight, expected)


def test_factors_of_no_length_have_finite_gradients(tiny_whisper):
    """The norm has no derivative at zero, where the published penalty drives whole pairs."""
    model = adapted(tiny_whisper, norm_weight=0.1)
    with torch.no_grad():
        for pair in model.base_model.s2lora_factors.pairs():
            pair.up["default"].zero_()
    assert all(torch.isfinite(gradient).all() for gradient in gradients(model).values())


def test_outputs_without_a_loss_are_left_alone(tiny_whisper):
    model = adapted(tiny_whisper, sparsity_weight=1.0).train()
    features, labels = batch()["input_features"], batch()["labels"]
    plain = adapted(tiny_whisper)(**batch()).loss
    inputs = {"input_features": features, "decoder_input_ids": labels}
    assert model(**inputs).loss is None
    torch.testing.assert_close(model(**inputs, return_dict=False)[0], model(**inputs).logits)
    with torch.no_grad():
        torch.testing.assert_close(model(**batch()).loss, plain)
        torch.testing.assert_close(model(**batch(), return_dict=False)[0], plain)


def test_checkpointing_enabled_before_the_adapter(tiny_whisper):
    expected = gradients(adapted(tiny_whisper))

    def checkpointed() -> nn.Module:
        whisper = tiny_whisper()
        whisper.gradient_checkpointing_enable({"use_reentrant": True})
        return whisper

    for name, gradient in gradients(adapted(checkpointed)).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6, msg=name)


def test_further_modules_are_trained_and_saved(tiny_whisper, tmp_path):
    model = adapted(tiny_whisper, modules_to_save=["conv2"])
    groups = {group["name"]: group["params"] for group in parameter_groups(model, 1e-3)}
    assert [tuple(parameter.shape) for parameter in groups["other"]] == [(32, 32, 3), (32,)]
    with torch.no_grad():
        groups["other"][0].mul_(2.0)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_whisper(), tmp_path).eval()
    torch.testing.assert_close(logits(loaded), logits(model))
    assert (logits(model) - logits(adapted(tiny_whisper))).abs().max() > 1e-3


def test_distributed_data_parallel_has_the_same_gradients(tiny_whisper, tmp_path):
    expected = gradients(adapted(tiny_whisper))
    with world_of_one(tmp_path):
        parallel = DistributedDataParallel(adapted(tiny_whisper, coefficient_lr_ratio=6.0))
        got = gradients(parallel)
        rates = {group["name"]: group["lr"] for group in parameter_groups(parallel, 1e-3)}
        # Before the group: its threads are joined without Python's lock, which a reducer that dies last would hold.
        del parallel
    assert rates == pytest.approx({"coefficients": 6e-3, "factors": 1e-3})
    assert len(got) == len(expected)
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, expected[name.removeprefix("module.")], msg=name)


def test_sharded_as_a_whole_it_has_the_same_gradients_and_file(tiny_whisper, tmp_path):
    expected = gradients(adapted(tiny_whisper))
    with world_of_one(tmp_path):
        model = adapted(tiny_whisper)
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        got = {name: gradient.full_tensor() for name, gradient in gradients(model).items()}
        state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
        model.save_pretrained(tmp_path, state_dict=state)
    assert got.keys() == expected.keys()
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, expected[name], msg=name)
    loaded = PeftModel.from_pretrained(tiny_whisper(), tmp_path).eval()
    torch.testing.assert_close(logits(loaded), logits(adapted(tiny_whisper)))


def test_factors_in_pieces_are_refused(tiny_whisper):
    """As FSDP leaves them before each layer, where it wraps layers one by one."""
    model = adapted(tiny_whisper)
    up = model.base_model.s2lora_factors.pairs()[0].up["default"]
    up.data = up.data.flatten()[::2]
    with pytest.raises(RuntimeError, match="NO_WRAP"):
        logits(model)


def test_whole_model_compiles_in_one_graph(tiny_whisper):
    model = adapted(tiny_whisper, sparsity_weight=1.0)
    expected = gradients(model)
    compiled = adapted(tiny_whisper, sparsity_weight=1.0).train()
    try:
        torch.compile(compiled, backend="aot_eager", fullgraph=True)(**batch()).loss.backward()
    except torch._dynamo.exc.Unsupported as error:
        with pytest.raises(torch._dynamo.exc.Unsupported):
            torch.compile(tiny_whisper(), backend="aot_eager", fullgraph=True)(**batch())
        pytest.skip(f"torch {torch.__version__} does not compile a plain Whisper as one graph: {error.msg[:80]}")
    torch.testing.assert_close(compiled.base_model.last_penalties, model.base_model.last_penalties)
    for name, parameter in compiled.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("fused", [False, True])
def test_layers_compile_each_by_itself(tiny_whisper, fused):
    torch.compiler.reset()
    expected = gradients(adapted(tiny_whisper))
    model = adapted(tiny_whisper)
    if fused:
        fuse_whisper(model)
    whisper = model.get_base_model().model
    for layer in (whisper.encoder.layers[0], whisper.decoder.layers[0]):
        layer.fc1.compile(backend="aot_eager", fullgraph=True)
        layer.self_attn.q_proj.compile(backend="aot_eager", fullgraph=True)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6, msg=name)


def test_task_type_of_a_seq2seq_model():
    """PEFT calls the tuner itself for a task type, not the model inside; BART's modules have Whisper's names."""
    config = BartConfig(
        d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=64, decoder_ffn_dim=64, vocab_size=50, max_position_embeddings=20, dropout=0.0,
    )  # fmt: skip
    model = get_peft_model(
        BartForConditionalGeneration(config), S2LoraConfig(sparsity_weight=1.0, task_type="SEQ_2_SEQ_LM")
    )
    awaken(model)
    assert len(model.base_model.s2lora_factors.pairs()) == 5
    tokens = torch.arange(4, 16).view(2, 6)
    model.eval()
    plain = model(input_ids=tokens, labels=tokens).loss
    model.train()
    penalized = model(input_ids=tokens, labels=tokens).loss
    torch.testing.assert_close(penalized, plain + sum(model.base_model.penalty()))


def test_causal_language_model():
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=50,
    )  # fmt: skip
    base = LlamaForCausalLM(config)
    model = get_peft_model(base, S2LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    awaken(model)
    names = {name for name, _ in model.base_model.s2lora_factors.named_children()}
    assert names == {f"model_layers_{name}" for name in ("self_attn_32x32", "self_attn_32x16", "mlp_64x32")}
    tokens = torch.arange(12).view(2, 6)
    expected = model.eval()(input_ids=tokens).logits
    (pattern,) = rank_pattern(model)
    assert pattern.matrices[:3] == ["q", "k", "v"]
    assert pattern.live == [[2] * 7] * 2
    torch.testing.assert_close(model.merge_and_unload()(input_ids=tokens).logits, expected, rtol=1e-4, atol=1e-5)
