"""Whole runs in two processes of one world, as torchrun starts them."""

import json
import math

import pytest
import torch

from fused_s2lora.training.evaluate import evaluate
from fused_s2lora.training.methods import METHODS
from fused_s2lora.training.options import TrainOptions
from fused_s2lora.training.sets import named_sets
from fused_s2lora.training.train import train
from tests.training.comparisons import QUIET, UNSCORED
from tests.training.ranks import run_ranks
from tests.training.speech import TEXTS, adapter_of, write_folder

TRAIN = """
import json, sys
from fused_s2lora.training import decoding
from fused_s2lora.training.options import TrainOptions
from fused_s2lora.training.train import train
from fused_s2lora.training.trainer import StepTimes

if sys.argv[2:] > ["0"]:  # stop after so many steps; 0: delete the run and start anew
    on_step_end = StepTimes.on_step_end
    def stopped(self, args, state, control, **kwargs):
        on_step_end(self, args, state, control, **kwargs)
        if state.global_step == int(sys.argv[2]):
            sys.exit(0)
    StepTimes.on_step_end = stopped
decoding.MAX_NEW_TOKENS = 4
train(TrainOptions(**json.loads(sys.argv[1])), fresh=sys.argv[2:] == ["0"])
"""
TRAIN_EACH = """
import json, sys
from fused_s2lora.training.options import TrainOptions
from fused_s2lora.training.train import train

for options in sys.argv[1:]:
    train(TrainOptions(**json.loads(options)))
"""
RANK_1_DELETES_LATER = """
import os, shutil, time
rmtree = shutil.rmtree
def later(*given, **named):
    time.sleep(2 * int(os.environ["RANK"]))
    rmtree(*given, **named)
shutil.rmtree = later
"""
RANK_1_SAVES_LATER = """
import os, time
from pathlib import Path
import torch
from transformers import TrainerState

save, save_to_json = torch.save, TrainerState.save_to_json
def later(*given, **named):
    time.sleep(2 * int(os.environ["RANK"]))
    save(*given, **named)
def checked(self, file):
    assert (Path(file).parent / "rng_state_1.pth").is_file()
    save_to_json(self, file)
torch.save, TrainerState.save_to_json = later, checked
"""
# The second process finds a recording that is readable no more; each writes how it ended and what it said.
RANK_1_FAILS = """
import contextlib, json, os, sys
from fused_s2lora.training import cli, collate
from fused_s2lora.training.errors import UserError

def gone(entry):
    raise UserError("u3.flac is gone")
if os.environ["RANK"] == "1":
    collate.read_audio = gone
file, *sys.argv[1:] = sys.argv[1:]
with open(f"{file}-{os.environ['RANK']}", "w") as stream, contextlib.redirect_stderr(stream):
    try:
        cli.main()
    except SystemExit as ended:
        print(ended.code, file=stream)
"""
# Model, folder to write, test sets; `heard-RANK` beside the folder has a line for each set with how many were heard.
EVALUATE = """
import os, sys
from fused_s2lora.training import decoding, evaluation
from fused_s2lora.training.evaluate import evaluate
from fused_s2lora.training.sets import named_sets

decoding.MAX_NEW_TOKENS = 4
transcribe_speech = evaluation.transcribe_speech
def counted(model, processor, audio, **options):
    audio = [*audio]
    with open(f"{sys.argv[2]}-heard-{os.environ['RANK']}", "a") as stream:
        print(len(audio), file=stream)
    return transcribe_speech(model, processor, audio, **options)
evaluation.transcribe_speech = counted
evaluate(named_sets(sys.argv[3:], "en"), sys.argv[2], model=sys.argv[1], precision="fp32", group_by=["age"])
"""


def test_a_run_that_was_stopped_ends_as_an_uninterrupted_one(quick, tmp_path):
    data = write_folder(tmp_path / "speech", TEXTS * 2)
    asked = {**quick, **UNSCORED, "data": [str(data)], "epochs": 2, "save_steps": 2}
    whole, stopped = (json.dumps({**asked, "output": str(tmp_path / name)}) for name in ("whole", "stopped"))
    run_ranks(TRAIN, whole, output=tmp_path / "out")
    assert (tmp_path / "out").read_text().count("6 steps, 2 passes over 12 utterances") == 1  # one of them says it
    run_ranks(TRAIN, stopped, 5)  # the last checkpoint is the first of the second epoch's three steps
    run_ranks(TRAIN, stopped)
    summary = json.loads((tmp_path / "stopped" / "summary.json").read_text())
    assert (summary["resumed_at_step"], summary["steps"]) == (4, 6)
    expected, got = adapter_of(tmp_path / "whole"), adapter_of(tmp_path / "stopped")
    assert all(torch.equal(expected[key], got[key]) for key in expected)
    run_ranks(TRAIN, whole, 0)  # anew: one of them deletes the run, and both do it again
    again = adapter_of(tmp_path / "whole")
    assert all(torch.equal(expected[key], again[key]) for key in expected)
    assert (tmp_path / "whole" / "command.txt").read_text().count("\n") == 1


def test_half_a_checkpoint_is_in_nobodys_way(quick, tmp_path):
    run = tmp_path / "run"
    asked = json.dumps({**quick, **UNSCORED, "epochs": 2, "output": str(run)})
    run_ranks(TRAIN, asked, 3)
    half = run / "checkpoints" / "checkpoint-3"
    half.mkdir()
    (half / "optimizer.pt").touch()
    run_ranks(RANK_1_DELETES_LATER + TRAIN, asked)
    assert not half.exists()
    assert json.loads((run / "summary.json").read_text())["resumed_at_step"] == 2


def test_a_checkpoint_is_whole_when_all_have_written_it(quick, tmp_path):
    """Else one whose second process was killed meanwhile would be gone on from with other random numbers, or never."""
    run_ranks(RANK_1_SAVES_LATER + TRAIN, json.dumps({**quick, **UNSCORED, "output": str(tmp_path / "run")}))
    assert (tmp_path / "run" / "checkpoints" / "checkpoint-2" / "trainer_state.json").is_file()


def test_adalora_in_two_processes(quick, tmp_path):
    """Its term is in the loss of a model in DistributedDataParallel, and its budget ends with the steps of one rank."""
    run = tmp_path / "run"
    asked = {**quick, "output": str(run), "method": "adalora", "epochs": 10, "rank": 2, "save_steps": 100}
    run_ranks(TRAIN, json.dumps(asked))
    (scored,) = json.loads((run / "results.json").read_text())
    assert scored["sets"]["same"]["groups"]["all"]["wer"]["utterances"] == 6
    assert json.loads((run / "summary.json").read_text())["steps"] == 20
    first = json.loads((run / "metrics.json").read_text())[0]
    assert float(first["orthogonality"]) > 1
    assert float(first["loss"]) == pytest.approx(
        float(first["cross_entropy"]) + float(first["orthogonality"]), rel=1e-3
    )
    patterns = json.loads((run / "rank_pattern.json").read_text())
    assert sum(sum(value or 0 for value in row) for pattern in patterns for row in pattern["live"]) == 2 * 12


def test_every_method_trains_in_two_processes(quick, tmp_path):
    """DistributedDataParallel is told that every step gives every trained parameter a gradient."""
    runs = {method: {"method": method} for method in METHODS}
    runs |= {
        "checkpointed": {"gradient_checkpointing": True},
        "accumulated": {"accumulation": 2},
        "kept": {"keep_share": 0.5, "keep_languages": ["zh"]},
        "frozen": {"freeze_factors": True},
        "augmented": {"spec_augment": True, "window": "full"},
    }
    asked = {**quick, **UNSCORED, "epochs": None, "max_steps": 3, "batch_size": 1, "save_steps": 100}
    run_ranks(TRAIN_EACH, *(json.dumps({**asked, "output": str(tmp_path / name), **run}) for name, run in runs.items()))
    for name in runs:
        losses = [float(line["loss"]) for line in json.loads((tmp_path / name / "metrics.json").read_text())[:3]]
        assert len(losses) == 3
        assert all(math.isfinite(loss) for loss in losses)


def test_the_loss_of_development_speech_is_that_of_one_process(quick, tones, tmp_path):
    """Before anything is learnt. The batch of two was filled up with the first two utterances, which counted twice."""
    asked = {**quick, **UNSCORED, "dev": str(tones), "eval_batch_size": 4, "max_steps": 1, "save_steps": 1}
    one, two = ({**asked, "output": str(tmp_path / name)} for name in ("one", "two"))
    run_ranks(TRAIN, json.dumps(two))
    train(TrainOptions(**one), console=QUIET)
    histories = [json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("one", "two")]
    expected, got = (next(line["eval_loss"] for line in lines if "eval_loss" in line) for lines in histories)
    assert got == pytest.approx(expected, rel=1e-6)


def test_two_processes_score_as_one_does(quick, tmp_path, monkeypatch):
    """Each hears half of a set, or none of one too small; what one left off is known to both."""
    one, two = tmp_path / "one", tmp_path / "two"
    sets = [f"six={quick['data'][0]}", f"single={write_folder(tmp_path / 'single', TEXTS[:1])}"]
    run_ranks(EVALUATE, quick["model"], two, sets[0], output=tmp_path / "out")
    run_ranks(EVALUATE, quick["model"], two, *sets, output=tmp_path / "out")
    heard = [(tmp_path / f"two-heard-{rank}").read_text().split() for rank in range(2)]
    assert heard == [["3", "1"], ["3", "0"]]
    assert (tmp_path / "out").read_text().count("error rates in percent") == 2  # one of them prints the table
    monkeypatch.setattr("fused_s2lora.training.decoding.MAX_NEW_TOKENS", 4)
    evaluate(named_sets(sets, "en"), one, model=quick["model"], precision="fp32", group_by=["age"])
    for name in ("results.json", "six.tsv", "single.tsv"):
        assert (one / name).read_text() == (two / name).read_text()


def test_a_process_whose_fellow_is_gone_says_so_in_a_sentence(quick, tmp_path):
    """It was 75 lines of a traceback that ends in gloo, below them that of torchrun, and above them the reason."""
    asked = ["--model", quick["model"], "--data", quick["data"][0], "--precision", "fp32", "--window", "trim"]
    run_ranks(RANK_1_FAILS, tmp_path / "said", "train", *asked, "--max-steps", 2, "--output", tmp_path / "run")
    first, second = ((tmp_path / f"said-{rank}").read_text().splitlines() for rank in range(2))
    assert second[-2:] == ["error: u3.flac is gone", "2"]
    assert first[-2].startswith("stopped: another process of the run is gone")
    assert first[-1] == "1"
    assert not any("Traceback" in line for line in first)
