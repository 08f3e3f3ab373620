"""Bad input ends in one sentence that names it and the way out."""

import json
import math
import re
import shutil
import subprocess
import sys

import pytest
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from fused_s2lora.training import decoding as decoding_module
from fused_s2lora.training.cli import app
from fused_s2lora.training.cli import main as cli_main
from fused_s2lora.training.errors import UserError
from fused_s2lora.training.methods import METHODS, adapt
from fused_s2lora.training.models import load_adapter, load_base, load_for_use, remembered_speech
from fused_s2lora.training.run import RunFolder
from fused_s2lora.training.train import train
from tests.training.comparisons import QUIET
from tests.training.comparisons import options as options_of
from tests.training.speech import adapter_of


def test_bad_input_is_one_sentence_and_status_2(tmp_path):
    code = "from fused_s2lora.training.cli import main; main()"
    result = subprocess.run(
        [sys.executable, "-c", code, "train", "--data", tmp_path / "nowhere", "--output", tmp_path / "run"],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2
    # bitsandbytes tells some CPUs that it lacks a kernel, as soon as PEFT is imported.
    told = (line for line in result.stderr.splitlines() if "kernels-community" not in line)
    (line,) = [line for line in told if line.strip()]
    assert line.startswith(f"error: {tmp_path}/nowhere: no such folder or file")
    assert "Traceback" not in result.stdout + result.stderr


@pytest.mark.parametrize("command", ["compare", "transcribe"])
def test_what_is_for_one_process_is_refused_in_several(command, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(sys, "argv", ["s2lora", command, "x"])
    with pytest.raises(SystemExit) as ended:
        cli_main()
    assert ended.value.code == 2
    assert f"s2lora {command} is for one process, and 2 were started together" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["train", "evaluate", "transcribe", "merge", "demo"])
def test_every_option_has_help(command):
    import typer

    click_command = typer.main.get_command(app).commands[command]
    assert click_command.help
    for parameter in click_command.params:
        assert getattr(parameter, "help", None), f"{command} {parameter.name}"


@pytest.mark.parametrize("command", ["train", "evaluate", "transcribe", "merge", "demo", "tune"])
def test_help_in_a_terminal_of_80_columns_has_every_option_in_full(command):
    import typer

    shown = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "80"}).output
    assert max(map(len, shown.splitlines())) == 80
    options = [name for parameter in typer.main.get_command(app).commands[command].params for name in parameter.opts]
    assert [name for name in options if name.startswith("--") and f"{name} " not in shown] == []


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"data": []}, "no training data"),
        ({"language": "klingon"}, "language 'klingon'"),
        ({"task": "sing"}, "--task 'sing'"),
        ({"precision": "int8"}, "--precision 'int8'"),
        ({"seed": -1}, "--seed is -1; give 0 or more"),
        ({"seed": 2**32}, "--seed is 4294967296; give a number below"),
        ({"workers": -1}, "--workers is -1; give 0 or more"),
        ({"workers": 10**9}, "--workers is 1000000000; give at most 1000 processes"),
        ({"beams": 60_000}, "--beams is 60000; give at most 1000"),
        ({"warmup": -1.0}, "--warmup is -1.0; give 0 or more"),
        ({"warmup": 3.0, "max_steps": 3}, "--warmup 3 is not over in the run's 3 steps; give fewer, or a share"),
        ({"limit": 0}, "--limit is 0; give at least 1"),
        ({"limit": -1}, "--limit is -1; give at least 1"),
        ({"keep_languages": ["de"]}, "--keep-languages needs a share of the utterances; give --keep-share"),
        ({"keep_share": 0.5, "task": "translate"}, "--keep-share goes with --task transcribe only"),
        ({"rank": 0}, "--rank is 0; give at least 1"),
        ({"window": "short"}, "audio window 'short'"),
        ({"full_share": 1.5}, "--full-share is 1.5"),
        ({"dev": "a", "dev_share": 0.1}, "exclude each other"),
        ({"early_stopping": 2}, "needs a development set"),
        ({"lr": 0.0}, "--lr is 0.0"),
        ({"interpolation": 1.5}, "--interpolation is 1.5; give a share above 0, at most 1"),
        ({"method": "bitfit", "interpolation": 0.5}, "--interpolation goes with --method s2lora, .*, not bitfit"),
        ({"exclude_modules": "*decoder*"}, r"--exclude-modules '\*decoder\*' is no regular expression"),
        ({"method": "lora", "exclude_modules": "x"}, "--exclude-modules goes with --method s2lora, not lora"),
        ({"method": "lora", "preset": "paper"}, "--preset goes with --method s2lora, not lora; leave it out"),
        ({"method": "adalora", "sharing": "all"}, "--sharing goes with --method s2lora, not adalora"),
        ({"method": "alpha-lora", "sparsity_weight": 0.0}, "--sparsity-weight goes with --method s2lora, not"),
        ({"method": "ia3", "rank": 4}, "--rank goes with --method s2lora, .*, not ia3"),
        ({"method": "full", "rank": 4}, "--rank goes with --method s2lora, .*, not full"),
        ({"method": "ia3", "norm_weight": 0.1}, "--norm-weight goes with --method s2lora, not ia3"),
        ({"method": "lora", "penalty": "soft"}, "--penalty goes with --method s2lora, not lora"),
        ({"method": "bitfit", "freeze_factors": True}, "--freeze-factors goes with --method s2lora, not bitfit"),
        ({"method": "lora", "coefficient_lr_ratio": 2.0}, "--coefficient-lr-ratio goes with --method s2lora, not lora"),
        ({"method": "full", "target_modules": ["fc1"]}, "--target-modules goes with --method .*, ia3, not full"),
        ({"method": "full", "half_base": True}, "--half-base goes with --method s2lora, .*, not full"),
        ({"method": "bitfit", "half_base": True}, "--half-base goes with --method s2lora, .*, not bitfit"),
        ({"method": "full", "quantize": "nf4"}, "--quantize goes with --method s2lora, .*, not full"),
        ({"method": "glora", "quantize": "int8"}, "--quantize goes with --method s2lora, .*, not glora"),
        ({"quantize": "int4"}, "--quantize 'int4' is not one of int8, nf4"),
        ({"quantize": "nf4", "half_base": True}, "--half-base and --quantize exclude each other"),
        ({"precision": "fp32", "half_base": True}, "--half-base with --precision fp32 has no half precision"),
        ({"method": "adalora", "dev_share": 0.5}, "--method adalora has its ranks at the end only"),
        ({"method": "adalora", "dev": "SPEECH"}, "leave out --dev and --dev-share"),
        ({"target_modules": ["fc1", "missing"]}, "the model has no linear map 'missing'; there are fc1, fc2, k_proj"),
        ({"method": "lora", "target_modules": ["conv1"]}, "--target-modules: the model has no linear map 'conv1'"),
        (
            {"method": "lora", "target_modules": ["proj_out"]},
            "proj_out has the weight of the token embedding",
        ),
        ({"exclude_modules": ".*"}, r"--exclude-modules '\.\*' leaves out all that would be adapted; name less"),
        ({"exclude_modules": "decoder"}, r"--exclude-modules 'decoder' leaves out nothing .* such as model\.decoder"),
        ({"exclude_modules": ".*fc1", "target_modules": ["fc2"]}, r"leaves out nothing .* such as model\..*\.fc2"),
        ({"window": "full", "full_share": 0.5}, "--full-share goes with --window trim; leave it out"),
        ({"keep_share": 0.01}, "--keep-share 0.01 of 6 utterances is none of them; give more"),
        ({"max_steps": 0}, "--max-steps is 0; give at least 1, or -1 for --epochs"),
        ({"epochs": math.inf}, "--epochs is inf; give a finite number"),
        ({"warmup": math.inf}, "--warmup is inf; give a finite number"),
        ({"sparsity_weight": math.nan}, "--sparsity-weight is nan; give a finite number"),
        ({"norm_weight": -0.1}, "--norm-weight is -0.1; give 0 or more"),
        ({"method": "magic"}, "--method 'magic' is not one of s2lora, lora"),
        ({"preset": "best"}, "--preset 'best'"),
        ({"sharing": "some"}, "sharing='some'"),
        ({"target_modules": ["missing"]}, "--target-modules: .*missing"),
        ({"rank": 300}, "r=300 is not a whole number between 1 and 256"),
        ({"group_by": ["town"], "test": ["SPEECH"]}, "no test set has a column 'town' to group by; there is age"),
        ({"group_by": ["age"]}, "--group-by age without a set to score; give --test, or leave it out"),
        ({"test": ["a=SPEECH", "a=SPEECH"]}, "two test sets are named 'a'"),
        ({"test": ["a/b=SPEECH"]}, "the set's name 'a/b' has a / in it; give NAME=SOURCE"),
        ({"dev_share": 0.01}, r"too few to hold out 1%"),
        ({"model": "NOWHERE"}, "not to be had as a Whisper model"),
        ({"text_column": "words"}, "no column 'words'"),
    ],
    ids=str,
)
def test_bad_options(options, tones, tmp_path, fields, message):
    if "test" in fields:
        fields = fields | {"test": [name.replace("SPEECH", str(tones)) for name in fields["test"]]}
    with pytest.raises(UserError, match=message):
        train(options(tmp_path / "run", **fields), console=QUIET)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("evaluate --test t=SPEECH --output FILE", "FILE: cannot be written (File exists); give another --output"),
        ("evaluate --test t=SPEECH --output out --precision int8", "--precision 'int8' is not one of auto, fp32"),
        ("evaluate --test t=SPEECH --output out --eval-batch-size 0", "--eval-batch-size is 0; give at least 1"),
        ("evaluate --test t=SPEECH --output RUN", "run: holds a training run, whose results.json stays; give another"),
        ("merge RUN/adapter FILE/merged", "FILE/merged: cannot be written (Not a directory); give another OUTPUT"),
        ("merge RUN/adapter RUN", "run: exists already; give an empty OUTPUT"),
        ("evaluate --test t=SPEECH --output out --limit 0", "--limit is 0; give at least 1"),
        ("transcribe SPEECH --output no/where.tsv", "no/where.tsv: cannot be written (No such file or directory)"),
        ("transcribe SPEECH --precision int8", "--precision 'int8' is not one of auto, fp32, bf16, fp16"),
        ("transcribe SPEECH --eval-batch-size -1", "--eval-batch-size is -1; give at least 1"),
        ("report RUN --output no/x.html", "no/x.html: cannot be written (No such file or directory); give another"),
    ],
)
def test_bad_arguments_are_told_before_anything_is_decoded(
    command, message, finished, tones, tiny_folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(decoding_module, "_generate", lambda *_, **__: pytest.fail("decoded"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FILE").write_text("mine")
    places = {"SPEECH": str(tones), "RUN": str(finished), "t=SPEECH": f"t={tones}"}
    places["RUN/adapter"] = f"{finished}/adapter"
    arguments = [places.get(word, word) for word in command.split()]
    model = [] if arguments[0] == "report" else ["--model", str(tiny_folder)]
    with pytest.raises(UserError, match=re.escape(message)):
        CliRunner().invoke(app, [*arguments, *model], catch_exceptions=False)
    assert (tmp_path / "FILE").read_text() == "mine"


@pytest.mark.parametrize(
    "fields",
    [
        {"method": "lroa"}, {"preset": "papr"}, {"sharing": "some"}, {"target_modules": ["missing"]},
        {"exclude_modules": ".*"}, {"data": ["no/where"]}, {"dev": "no/where"}, {"test": ["no/where"]},
        {"model": "no/where"}, {"group_by": ["town"]}, {"keep_share": 0.5, "keep_languages": ["yue"]},
    ],
    ids=str,
)  # fmt: skip
def test_a_mistake_costs_neither_a_run_nor_the_time_of_decoding(
    fields, finished, options, tones, tmp_path, monkeypatch
):
    monkeypatch.setattr(decoding_module, "_generate", lambda *_, **__: pytest.fail("decoded"))
    shutil.copytree(finished, tmp_path / "finished")
    before = {file: file.read_bytes() for file in (tmp_path / "finished").rglob("*") if file.is_file()}
    with pytest.raises(UserError):
        train(options(tmp_path / "finished", **{"test": [f"same={tones}"], **fields}), fresh=True, console=QUIET)
    assert {file: file.read_bytes() for file in (tmp_path / "finished").rglob("*") if file.is_file()} == before
    with pytest.raises(UserError):
        train(options(tmp_path / "new", **{"test": [f"same={tones}"], **fields}), console=QUIET)
    assert not (tmp_path / "new").exists()


def test_bad_models(tiny_folder, tmp_path):
    shutil.copytree(tiny_folder, tmp_path / "bert")
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UserError, match="a bert model; give a Whisper"):
        load_base(str(tmp_path / "bert"))
    shutil.copytree(tiny_folder, tmp_path / "damaged")
    (tmp_path / "damaged" / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(UserError, match="damaged: not to be had as a Whisper model"):
        load_base(str(tmp_path / "damaged"))
    shutil.copytree(tiny_folder, tmp_path / "old")
    (tmp_path / "old" / "generation_config.json").unlink()
    with pytest.raises(UserError, match=r"its generation_config\.json knows no languages"):
        load_base(str(tmp_path / "old"))


def test_models_with_parts_missing_are_refused(tiny_folder, tmp_path):
    """Weights that would be left as they were drawn, and a tokenizer that would write nothing."""
    weights = load_file(tiny_folder / "model.safetensors")
    some = {name: weight for name, weight in weights.items() if "decoder.layers.0.fc1" not in name}
    prefixed = {f"base_model.model.{name}": weight for name, weight in weights.items()}
    for name, content in (("some", some), ("prefixed", prefixed)):
        shutil.copytree(tiny_folder, tmp_path / name)
        save_file(content, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(UserError, match=f"{name}: its weights lack model.*; give the folder of a whole"):
            load_base(str(tmp_path / name))
    shutil.copytree(tiny_folder, tmp_path / "wide")
    config = json.loads((tiny_folder / "config.json").read_text())
    (tmp_path / "wide" / "config.json").write_text(json.dumps(config | {"decoder_ffn_dim": 8}))
    with pytest.raises(UserError, match="wide: not to be had as a Whisper model"):
        load_base(str(tmp_path / "wide"))
    files = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "added_tokens.json")
    for name, missing in (("none", files), ("half", files[:1])):
        shutil.copytree(tiny_folder, tmp_path / name)
        for file in missing:
            (tmp_path / name / file).unlink(missing_ok=True)
        with pytest.raises(UserError, match=f"{name}: .*tokenizer"):
            load_base(str(tmp_path / name))


def test_ctrl_c_says_how_to_go_on(monkeypatch, capsys):
    def stopped(*operands, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("fused_s2lora.training.train.train", stopped)
    monkeypatch.setattr("fused_s2lora.training.transcribe.transcribe", stopped)
    for command, told in (
        (["train", "--data", "x", "--output", "y"], "stopped; run the same command again to go on\n"),
        (["transcribe", "x", "--output", "y"], "stopped; run the same command again to go on\n"),
        (["transcribe", "x"], "stopped\n"),
    ):
        monkeypatch.setattr(sys, "argv", ["s2lora", *command])
        with pytest.raises(SystemExit) as caught:
            cli_main()
        assert caught.value.code == 130
        assert capsys.readouterr().err.startswith(told)


def test_bad_adapters(finished, tiny_folder, tmp_path, tiny_whisper):
    model, _ = load_base(str(tiny_folder))
    with pytest.raises(UserError, match=r"no adapter_config\.json in it; give the `adapter` folder"):
        load_adapter(model, finished)
    with pytest.raises(UserError, match=r"cannot be put on this model.*does not fit this model"):
        load_adapter(tiny_whisper(d_model=48, encoder_ffn_dim=96, decoder_ffn_dim=96), finished / "adapter")
    for name in ("rank", "damaged", "missing", "config"):
        shutil.copytree(finished / "adapter", tmp_path / name)
    config = json.loads((tmp_path / "rank" / "adapter_config.json").read_text())
    (tmp_path / "rank" / "adapter_config.json").write_text(json.dumps(config | {"r": 4}))
    with pytest.raises(UserError, match=r"is \(8,\) in the file and \(4,\) here"):
        load_adapter(load_base(str(tiny_folder))[0], tmp_path / "rank")
    file = tmp_path / "damaged" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"adapter_model\.safetensors is damaged"):
        load_adapter(load_base(str(tiny_folder))[0], tmp_path / "damaged")
    tensors = adapter_of(finished)
    tensors.pop(next(iter(tensors)))
    save_file(tensors, tmp_path / "missing" / "adapter_model.safetensors")
    with pytest.raises(UserError, match="it lacks"):
        load_adapter(load_base(str(tiny_folder))[0], tmp_path / "missing")
    (tmp_path / "config" / "adapter_config.json").write_text("{not json")
    with pytest.raises(UserError, match="not readable as JSON"):
        remembered_speech(tmp_path / "config")
    for absent in ("runs/absent", "runs/first/absent"):  # as a hub id is written, and not
        with pytest.raises(UserError, match=rf"^{absent}: no such folder, and not to be had from the hub \(.*give"):
            load_for_use(None, absent)
    for given, option in ((("", None), "model"), ((None, ""), "adapter")):
        with pytest.raises(UserError, match=f"^--{option} is empty; give a hub id or folder, or leave it out$"):
            load_for_use(*given)
    prompts = PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=2)
    get_peft_model(load_base(str(tiny_folder))[0], prompts).save_pretrained(tmp_path / "prompts")
    with pytest.raises(UserError, match=r"cannot be put on this model \(PREFIX_TUNING learns prompts"):
        load_adapter(load_base(str(tiny_folder))[0], tmp_path / "prompts")


@pytest.mark.parametrize("target", ["embed_tokens", "proj_out"])
def test_an_adapter_of_the_weight_that_embedding_and_output_share_is_refused(target, tiny_whisper, tmp_path):
    """Merged, as it is decoded with, it would change both."""
    get_peft_model(tiny_whisper(), LoraConfig(target_modules=[target, "q_proj"])).save_pretrained(tmp_path / "adapter")
    with pytest.raises(UserError, match=f"it is on .*{target}, whose weight is that of both the token embedding and"):
        load_adapter(tiny_whisper(), tmp_path / "adapter")
    tokens = LoraConfig(target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [1, 2]})
    get_peft_model(tiny_whisper(), tokens).save_pretrained(tmp_path / "tokens")
    load_adapter(tiny_whisper(), tmp_path / "tokens")


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.config is not None])
def test_an_adapter_is_for_models_of_its_depth(method, tiny_whisper, tmp_path):
    adapt(tiny_whisper(), options_of(method=method), steps=10).save_pretrained(tmp_path)
    load_adapter(tiny_whisper(), tmp_path)
    for layers in (1, 3):
        with pytest.raises(UserError, match=r"this model \(.* does not fit this model: it (has|lacks)"):
            load_adapter(tiny_whisper(decoder_layers=layers), tmp_path)


def test_an_allocated_adapter_is_for_models_of_its_depth(tiny_whisper, tmp_path):
    model = adapt(tiny_whisper(), options_of(method="adalora"), steps=10)
    diagonals = [name.removeprefix("base_model.model.") for name, _ in model.named_parameters() if "lora_E" in name]
    model.peft_config["default"].rank_pattern = {name: [True] * 8 + [False] * 4 for name in diagonals}
    model.save_pretrained(tmp_path)
    load_adapter(tiny_whisper(), tmp_path)
    with pytest.raises(UserError, match="cannot be put on this model"):
        load_adapter(tiny_whisper(decoder_layers=1), tmp_path)


def test_run_folder_of_other_options_or_files(options, finished, tones, tmp_path):
    with pytest.raises(UserError, match=r"holds a run with epochs = 2\.0, not 3\.0; give another --output, or --fresh"):
        train(options(finished, epochs=3.0), console=QUIET)
    RunFolder(options(finished, save_steps=3, test=[f"same={tones}"], group_by=["age"]))
    for name, held_out in (("with-share", {"dev_share": 0.34}), ("with-dev", {"dev": "dev"})):
        RunFolder(options(tmp_path / name, **held_out))
        with pytest.raises(UserError, match="holds a run with save_steps = 2, not 3"):  # it decides what is kept
            RunFolder(options(tmp_path / name, **held_out, save_steps=3))
    shutil.rmtree(tmp_path / "with-share")
    config = tmp_path / "with-dev" / "config.json"
    older = json.loads(config.read_text())
    del older["leading_space"]  # as written before there was the option
    config.write_text(json.dumps(older))
    with pytest.raises(UserError, match="holds a run with leading_space = False, not True"):
        RunFolder(options(tmp_path / "with-dev", dev="dev"))
    RunFolder(options(tmp_path / "with-dev", dev="dev", leading_space=False))
    shutil.rmtree(tmp_path / "with-dev")
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(UserError, match="holds other files"):
        train(options(tmp_path), console=QUIET)
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "whisper"}')
    with pytest.raises(UserError, match="holds other files"):
        train(options(model), fresh=True, console=QUIET)
    assert (model / "config.json").is_file()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write the run there"):
        train(options(tmp_path / "file"), console=QUIET)


def test_english_only_model_takes_english_only(tiny_folder, tmp_path, options):
    shutil.copytree(tiny_folder, tmp_path / "en")
    config = json.loads((tmp_path / "en" / "generation_config.json").read_text())
    config["is_multilingual"] = False
    (tmp_path / "en" / "generation_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="'zh' on an English-only model"):
        train(options(tmp_path / "run", model=str(tmp_path / "en"), language="zh"), console=QUIET)
    train(options(tmp_path / "ok", model=str(tmp_path / "en"), max_steps=1), console=QUIET)
    assert (tmp_path / "ok" / "adapter" / "adapter_model.safetensors").is_file()
    with pytest.raises(UserError, match=r"--keep-share on .*/en, an English-only model"):
        train(options(tmp_path / "keep", model=str(tmp_path / "en"), keep_share=0.5), console=QUIET)


@pytest.mark.parametrize("way", ["FSDP", "DEEPSPEED"])
def test_a_model_shared_out_by_accelerate_is_refused(way, options, tmp_path, monkeypatch):
    """One process saves the adapter, and would have a part of it; DeepSpeed would be an error of its import."""
    monkeypatch.setenv(f"ACCELERATE_USE_{way}", "true")
    with pytest.raises(UserError, match=r"accelerate is configured for (FSDP|DeepSpeed), .*; start it with torchrun"):
        train(options(tmp_path / "run"), console=QUIET)
    assert not (tmp_path / "run").exists()
