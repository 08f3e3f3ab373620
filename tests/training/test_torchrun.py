"""Whole runs in two processes of one world, as torchrun starts them."""

import json

import pytest
import torch

from tests.training.comparisons import UNSCORED
from tests.training.ranks import run_ranks
from tests.training.speech import TEXTS, adapter_of, write_folder

TRAIN = """
import json, sys
from fused_s2lora.training.options import TrainOptions
from fused_s2lora.training.train import StepTimes, train

if sys.argv[2:] > ["0"]:  # stop after so many steps; 0: delete the run and start anew
    on_step_end = StepTimes.on_step_end
    def stopped(self, args, state, control, **kwargs):
        on_step_end(self, args, state, control, **kwargs)
        if state.global_step == int(sys.argv[2]):
            sys.exit(0)
    StepTimes.on_step_end = stopped
train(TrainOptions(**json.loads(sys.argv[1])), fresh=sys.argv[2:] == ["0"])
"""


def test_a_run_that_was_stopped_ends_as_an_uninterrupted_one(quick, tmp_path, capfd):
    data = write_folder(tmp_path / "speech", TEXTS * 2)
    asked = {**quick, **UNSCORED, "data": [str(data)], "epochs": 2, "save_steps": 2}
    whole, stopped = (json.dumps({**asked, "output": str(tmp_path / name)}) for name in ("whole", "stopped"))
    run_ranks(TRAIN, whole)
    assert capfd.readouterr().out.count("6 steps, 2 passes over 12 utterances") == 1  # one of them says it
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


def test_adalora_in_two_processes(quick, tmp_path):
    """Its term is in the loss of a model in DistributedDataParallel, and its budget ends with the steps of one rank."""
    run = tmp_path / "run"
    asked = {**quick, **UNSCORED, "output": str(run), "method": "adalora", "epochs": 10, "rank": 2, "save_steps": 100}
    run_ranks(TRAIN, json.dumps(asked))
    assert json.loads((run / "summary.json").read_text())["steps"] == 20
    first = json.loads((run / "metrics.json").read_text())[0]
    assert float(first["orthogonality"]) > 1
    assert float(first["loss"]) == pytest.approx(
        float(first["cross_entropy"]) + float(first["orthogonality"]), rel=1e-3
    )
    patterns = json.loads((run / "rank_pattern.json").read_text())
    assert sum(sum(value or 0 for value in row) for pattern in patterns for row in pattern["live"]) == 2 * 12
