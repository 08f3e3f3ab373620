"""Every method of the paper in one harness: what each trains, as published."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from peft import AdaLoraModel, PeftModel
from transformers import (
    TrainerControl,
    TrainerState,
    TrainingArguments,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from fused_s2lora import S2LoraLinear
from fused_s2lora.training import published
from fused_s2lora.training.errors import UserError
from fused_s2lora.training.fitting import parameter_counts
from fused_s2lora.training.methods import METHODS, PRESETS, adalora_start, adapt, interpolation, learning_rate
from fused_s2lora.training.models import load_base
from fused_s2lora.training.rank_maps import rank_maps
from fused_s2lora.training.sets import training_speech
from fused_s2lora.training.train import train
from fused_s2lora.training.trainer import AdaLoraCallback, _orthogonality
from tests.fused_s2lora.adapters import batch
from tests.training.comparisons import QUIET, UNSCORED, options
from tests.training.kills import train_until
from tests.training.speech import TEXTS, write_folder

ADALORA = [name for name in METHODS if name.startswith("adalora")]


def of_rank_2(method: str) -> dict[str, int]:
    """The option, where the method has ranks."""
    return {"rank": 2} if "rank" in METHODS[method].reads else {}


def whisper_medium() -> WhisperForConditionalGeneration:
    sizes = {"d_model": 1024, "encoder_layers": 24, "decoder_layers": 24}
    sizes |= {"encoder_attention_heads": 16, "decoder_attention_heads": 16}
    with torch.device("meta"):
        return WhisperForConditionalGeneration(
            WhisperConfig(**sizes, encoder_ffn_dim=4096, decoder_ffn_dim=4096, vocab_size=51865)
        )


def trained_of_medium(method: str) -> int:
    with torch.device("meta"):
        return parameter_counts(adapt(whisper_medium(), options(method=method), steps=100))[0]


@pytest.mark.parametrize(
    ("method", "count"),
    [("lora", 2_359_296), ("adalora", 3_540_672), ("bitfit", 593_920), ("ia3", 196_608), ("s2lora", 134_144)],
)
def test_trainable_parameters_on_whisper_medium_are_the_published_ones(method, count):
    assert trained_of_medium(method) == count


def test_shares_of_whisper_medium_round_to_the_published_ones():
    whole = 763_857_920
    shares = {method: share for method, (share, _) in published.METHODS.items() if method in METHODS}
    found = {method: round(100 * trained_of_medium(method) / whole, 2) for method in shares}
    # PEFT's GLoRA gives C [d_in, 1] no second factor, so it has fewer parameters than the paper's; Whisper's sinusoidal
    # positions in the encoder stay fixed in full fine-tuning.
    assert found == {**shares, "glora": 0.77, "full": 99.8}


def test_what_each_method_trains(tiny_whisper):
    names = {}
    for method in METHODS:
        model = adapt(tiny_whisper(), options(method=method, **of_rank_2(method)), steps=100)
        names[method] = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(name.endswith(".bias") for name in names["bitfit"])
    assert len(names["bitfit"]) > 20
    assert {name.split(".")[-3] for name in names["ia3"]} == {"k_proj", "v_proj", "fc2"}
    assert any("conv1" in name for name in names["full"])
    assert not any("encoder.embed_positions" in name for name in names["full"])
    assert all("s2lora" in name for name in names["alpha-lora"] | names["s2lora"])


def test_full_fine_tuning_leaves_the_sinusoids(tiny_folder):
    model = adapt(load_base(str(tiny_folder))[0], options(method="full"), steps=100)
    fixed = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert fixed == ["model.encoder.embed_positions.weight"]


def test_alpha_lora_has_one_scalar_a_weight_and_nothing_shared(tiny_whisper):
    model = adapt(tiny_whisper(), options(method="alpha-lora", rank=2), steps=100)
    scalars = [p for name, p in model.named_parameters() if "s2lora_coefficients" in name]
    assert {parameter.numel() for parameter in scalars} == {1}
    # q and v of two encoder layers and of two kinds of attention in two decoder layers.
    assert len(scalars) == 2 * (2 + 2 * 2)
    assert parameter_counts(model)[0] == len(scalars) * (2 * 32 * 2 + 1)


def test_maps_can_be_left_out_by_name(tiny_whisper):
    given = options(method="s2lora", exclude_modules=r".*decoder\.layers.*(fc1|fc2|self_attn.*)")
    model = adapt(tiny_whisper(), given, steps=10)
    names = {name for name, module in model.named_modules() if isinstance(module, S2LoraLinear)}
    assert any("encoder_attn" in name for name in names)
    assert any(".encoder." in name and name.endswith("fc1") for name in names)
    assert not any(".decoder." in name and "encoder_attn" not in name for name in names)


def test_frozen_factors_train_coefficients_alone(tiny_whisper):
    model = adapt(tiny_whisper(), options(rank=2, freeze_factors=True), steps=100)
    assert all("coefficients" in name for name, p in model.named_parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("given", "share"),
    [
        ({}, PRESETS["default"].interpolation),
        ({"preset": "unshared"}, PRESETS["default"].interpolation),
        ({"preset": "paper"}, 1.0),
        ({"method": "lora"}, 1.0),
        ({"method": "full"}, 1.0),
        ({"interpolation": 0.3}, 0.3),
        ({"method": "lora", "interpolation": 0.3}, 0.3),
    ],
)
def test_the_papers_methods_keep_the_whole_update(given, share):
    assert interpolation(options(**given)) == share


@pytest.mark.parametrize(
    ("given", "share_of_rate"),
    [
        ({"rank": 1}, 1.0),
        ({"rank": 8}, 1.0),
        ({"rank": 32}, 0.5),
        ({"rank": 32, "preset": "unshared"}, 0.5),
        ({"rank": 32, "preset": "paper"}, 1.0),
        ({"rank": 32, "method": "lora"}, 1.0),
    ],
)
def test_above_rank_8_the_default_rate_falls_with_the_root_of_the_rank(given, share_of_rate):
    at_8 = {name: value for name, value in given.items() if name != "rank"}
    assert learning_rate(options(**given)) == pytest.approx(share_of_rate * learning_rate(options(**at_8)))
    assert learning_rate(options(**given, lr=1e-4)) == 1e-4


@pytest.mark.parametrize(("rank", "start"), [(1, 12), (8, 12), (32, 48)])
def test_adalora_starts_as_published(rank, start):
    assert adalora_start(rank) == start


def test_adalora_without_a_part_lacks_it(tiny_whisper):
    def config(method):
        return adapt(tiny_whisper(), options(method=method), steps=200).peft_config["default"]

    assert {name: config(name).orth_reg_weight > 0 for name in ADALORA} == {
        "adalora": True, "adalora-without-orthogonality": False,
        "adalora-without-allocation": True, "adalora-without-both": False,
    }  # fmt: skip
    assert {name: config(name).target_r for name in ADALORA} == {
        "adalora": 8, "adalora-without-orthogonality": 8, "adalora-without-allocation": 12, "adalora-without-both": 12,
    }  # fmt: skip
    schedule = config("adalora")
    assert (schedule.tinit, schedule.tfinal, schedule.total_step) == (20, 60, 200)


def test_methods_are_set_up_as_published():
    """LoRA's scale, α-LoRA without penalties, when AdaLoRA gives up ranks, and the learning rates."""

    def config(method):
        return METHODS[method].config(options(method=method, rank=4), 1000)

    assert (config("lora").r, config("lora").lora_alpha) == (4, 8)
    alpha = config("alpha-lora")
    assert (alpha.coefficient, alpha.init, alpha.coefficient_lr_ratio) == ("scalar", "normal", 1.0)
    assert (alpha.sparsity_weight, alpha.norm_weight) == (0.0, 0.0)
    schedule = config("adalora")
    assert (schedule.tinit, schedule.tfinal, schedule.deltaT, schedule.lora_alpha) == (100, 300, 10, 24)
    rates = {method: learning_rate(options(method=method)) for method in METHODS}
    assert rates == {**dict.fromkeys(METHODS, 1e-3), "s2lora": 8e-3, "full": 1e-4}
    assert {learning_rate(options(preset=preset)) for preset in ("paper", "unshared")} == {1e-3}


@pytest.mark.parametrize("method", ["adalora", "adalora-without-orthogonality"])
def test_a_killed_adalora_run_starts_anew_and_says_so(method, quick, tmp_path, capsys):
    """What its ranks are given up by is in no checkpoint."""
    run = tmp_path / "run"
    made = options(**{**quick, **UNSCORED, "output": str(run), "method": method, "rank": 2})

    train_until(3, made)
    assert (run / "checkpoints" / "checkpoint-2").is_dir()
    assert "anew" not in capsys.readouterr().err
    train(made, console=QUIET)
    assert "run: AdaLoRA does not go on from a checkpoint; its training begins anew" in capsys.readouterr().err
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["resumed_at_step"], summary["steps"]) == (0, 3)


@pytest.mark.parametrize("method", [name for name in METHODS if name not in ("s2lora", "lora")])
def test_every_method_trains_and_is_read_again(method, quick, tmp_path, short_decoding, monkeypatch):
    made = options(
        **{**quick, "output": str(tmp_path / "run"), "method": method, "epochs": 10, "lr": 1e-2, **of_rank_2(method)}
    )
    train(made, console=QUIET)
    history = json.loads((tmp_path / "run" / "metrics.json").read_text())
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert sum(map(float, losses[-3:])) < sum(map(float, losses[:3])) - 0.05
    assert (tmp_path / "run" / "model").is_dir() == (METHODS[method].config is None)
    first = (tmp_path / "run" / "after" / "same.tsv").read_text()
    shutil.rmtree(tmp_path / "run" / "after")
    monkeypatch.setattr("fused_s2lora.training.train.fit", lambda *args: pytest.fail("trained again"))
    train(made, console=QUIET)
    assert (tmp_path / "run" / "after" / "same.tsv").read_text() == first


def test_adalora_gives_up_ranks_and_adds_its_orthogonality(quick, tmp_path, tiny_whisper):
    found = {}
    for method in ADALORA:
        run = tmp_path / method
        made = options(**{**quick, **UNSCORED, "output": str(run), "method": method, "epochs": 12, "rank": 2})
        train(made, console=QUIET)
        patterns = json.loads((run / "rank_pattern.json").read_text())
        live = sum(sum(value or 0 for value in row) for pattern in patterns for row in pattern["live"])
        first = json.loads((run / "metrics.json").read_text())[0]["loss"]
        found[method] = (live, float(first))
    weights = 12
    assert found["adalora"][0] == found["adalora-without-orthogonality"][0] == 2 * weights
    assert found["adalora-without-allocation"][0] == 12 * weights
    # At the start the factors are far from orthogonal and the loss says so.
    assert found["adalora"][1] > found["adalora-without-orthogonality"][1] + 1
    assert found["adalora-without-allocation"][1] > found["adalora-without-both"][1] + 1


def test_orthogonality_is_that_of_peft(tiny_whisper):
    model = adapt(tiny_whisper(), options(method="adalora"), steps=100)
    with torch.no_grad():
        added = model.base_model(**batch()).loss - model.get_base_model()(**batch()).loss
    assert _orthogonality(model.base_model).item() == pytest.approx(added.item(), rel=1e-5)
    assert added > 1


def test_rank_map_of_adalora_counts_what_is_not_zero(tiny_whisper):
    model = adapt(tiny_whisper(), options(method="adalora"), steps=100)
    assert isinstance(model, PeftModel)
    diagonals = [p for name, p in model.named_parameters() if "lora_E" in name]
    with torch.no_grad():
        for parameter in diagonals:
            parameter.fill_(0.5)
        diagonals[0][3:] = 0.0
    encoder, decoder = rank_maps(model)
    assert encoder.live[0] == [12, 3]  # the modules of a layer are k, v, q
    assert encoder.mean_magnitude[0] == pytest.approx([0.5, 0.5 * 3 / 12])
    assert decoder.matrices == ["q", "v", "cross q", "cross v"]
    assert rank_maps(tiny_whisper()) == []
    assert rank_maps(adapt(tiny_whisper(), options(method="lora"), steps=1)) == []


def test_development_speech_is_limited_too(quick, tones):
    speech, dev = training_speech(options(**quick, dev=str(tones), limit=2))
    assert (len(speech), len(dev)) == (2, 2)


def test_targets_are_in_the_letters_of_their_language(quick):
    def last(**given):
        return training_speech(options(**quick, **given))[0].dataset["target"][-1]

    assert last(language="Turkish") == " It ıs red."
    assert last(language="tr", task="translate") == " It is red."


def test_transcripts_are_read_as_asked(quick, tones, tmp_path):
    """Also of several sources, whose bad utterances are all told."""
    other = write_folder(tmp_path, TEXTS[:2])
    (other / "u1.flac").unlink()
    given = {**quick, "data": [str(tones), str(other)], "keep_case": True, "leading_space": False}
    speech, _ = training_speech(options(**given))
    assert speech.dataset["target"][:] == [*TEXTS, TEXTS[0]]
    assert [item.utterance for item in speech.skipped] == ["u1.flac"]


def test_whole_speakers_are_held_out_by_seed(quick):
    held = [training_speech(options(**quick, dev_share=0.34, seed=seed))[1] for seed in range(6)]
    speakers = [dev.dataset["speaker"][:] for dev in held]
    assert all(first == second for first, second in speakers)
    assert len({first for first, _ in speakers}) > 1
    most = training_speech(options(**quick, dev_share=0.6))[1]  # of three
    assert len({*most.dataset["speaker"]}) == 2


def test_utterances_are_drawn_by_seed(quick):
    chosen = [
        training_speech(options(**quick, utterances=3, seed=seed))[0].dataset["utterance"][:] for seed in (0, 0, 1)
    ]
    assert chosen[0] == chosen[1] != chosen[2]
    assert len(chosen[0]) == 3
    with pytest.raises(UserError, match="--utterances is 999, but there are"):
        training_speech(options(**quick, utterances=999))


def test_a_step_that_overflowed_in_fp16_allocates_no_ranks(tiny_whisper, tmp_path, monkeypatch):
    """Its gradients are not finite, and would be in the importances for good."""
    steps = []
    monkeypatch.setattr(AdaLoraModel, "update_and_allocate", lambda model, step: steps.append(step))
    model = adapt(tiny_whisper(), options(method="adalora", rank=2), steps=10)
    state, control = TrainerState(global_step=4), TrainerControl()
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    for skipped in (True, False):
        optimizer = SimpleNamespace(step_was_skipped=skipped)
        AdaLoraCallback().on_optimizer_step(arguments, state, control, model=model, optimizer=optimizer)
    assert steps == [5]
