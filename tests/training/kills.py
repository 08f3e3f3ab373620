"""A run that is killed in the middle, for tests of what goes on."""

import pytest

from fused_s2lora.training import fitting
from fused_s2lora.training.options import TrainOptions
from fused_s2lora.training.train import train
from tests.training.comparisons import QUIET


def train_until(step: int, options: TrainOptions) -> None:
    """Trains as asked and is stopped as by Ctrl-C at the end of that step."""

    def killed(self, args, state, control, **kwargs):
        if state.global_step == step:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fitting.StepTimes, "on_step_end", killed)
        with pytest.raises(KeyboardInterrupt):
            train(options, console=QUIET)
