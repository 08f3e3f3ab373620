"""Section `host`: what the host spends on a layer and on a step of a whole Whisper, without a GPU: Python, PyTorch's
dispatch, Triton's launcher.

    python -m bench.host

Our kernels are compiled for compute capability 9.0 and launched by Triton's own code, up to a driver that does nothing.
PyTorch's operations run as they are, on operands so small that next to nothing is computed. What a CUDA launch takes is
in none of it. Processor time, so that other work on the machine does not count.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from unittest import mock

import torch
import triton
import typer
from peft import PeftModel
from torch import Tensor, nn
from triton.backends.compiler import GPUTarget

from bench import cases, report
from bench.cases import Case, make_operands
from bench.counted import as_on_a_gpu, use_strategy
from bench.layer import passes
from bench.measure import RESULTS, latencies, latency_fields, record
from bench.providers import providers
from bench.step import ADDMM_LORA, Step, StepCase
from fused_s2lora.kernels import device, merge
from fused_s2lora.kernels.configs import SHARED_MEMORY

TARGET = "90"
PROVIDERS = ("frozen", "addmm-lora", "peft-lora", "s2-merged", "s2-split", "s2-fused", "s2-augmented")
STEP = "base's layers"
_METHODS = {"frozen": "frozen", "addmm-lora": ADDMM_LORA, "peft-lora": "lora-six"}  # of a step; all others are S2-LoRA
_WIDTH, _ROWS = 64, 16
_STEP_WIDTH = 16  # a step has some 70 rows, at which wider products are slow where a CPU has no bfloat16


class NoDriver:
    """What Triton asks of a GPU's driver, for a GPU that is not there; `launched` takes what would be launched."""

    def __init__(self, launched: Callable[..., None] = lambda *arguments: None) -> None:
        self.utils = self
        self._launched = launched

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        """The launcher of one build: called with grid, stream, function, metadata, hooks and the kernel's arguments."""
        return lambda *given: self._launched(metadata.name, *given)

    def load_binary(self, name: str, binary: bytes, shared: int, index: int) -> tuple[str, str, int, int, int]:
        """Module, function, registers, spills and threads: the binary itself names the function."""
        return name, f"{name} {hash(binary)}", 0, 0, 1024  # without a module Triton would load it at every launch

    def unload_module(self, module: str) -> None:
        """Nothing is loaded."""

    def get_device_properties(self, index: int) -> dict[str, int]:
        """Of a GPU of capability 9.0."""
        return {"max_shared_mem": SHARED_MEMORY[TARGET], "multiprocessor_count": 132}

    def get_current_target(self) -> GPUTarget:
        """What to compile for."""
        return GPUTarget("cuda", int(TARGET), 32)

    def get_current_device(self) -> int:
        """The one there is."""
        return 0

    def get_current_stream(self, index: int) -> int:
        """The default one."""
        return 0


@contextlib.contextmanager
def launches_do_nothing(driver: NoDriver) -> Iterator[None]:
    """Inside, operations on a CPU take the kernels' path and launch by `driver`.

    Raises:
        RuntimeError: TRITON_INTERPRET=1 is set, which leaves nothing to launch.
    """
    if device.INTERPRETING:
        raise RuntimeError("TRITON_INTERPRET=1 replaces the compiler and the launcher: unset it")
    triton.runtime.driver.set_active(driver)

    def kernel_serves(weight: Tensor, dtype: torch.dtype) -> bool:
        return True

    with as_on_a_gpu(), mock.patch.object(merge, "_kernel_serves", kernel_serves):
        yield


def measure(layer: str, rounds: int = 60) -> list[dict[str, Any]]:
    """A row for every provider and pass: median milliseconds of processor time, with one thread."""
    rows = []
    with mock.patch.object(cases, "SIZES", {"tiny": (_WIDTH, 1, 1, 80)}), launches_do_nothing(NoDriver()):
        case = Case(layer, "tiny", _ROWS, precision="fp32")
        groups = make_operands(case, "cpu")
        builds = providers(case, "cpu", counting=True)
        calls = {name: passes([builds[name](group) for group in groups], groups) for name in PROVIDERS}
        for which in ("forward", "both"):
            rows += _timed(layer, which, {name: calls[name][which] for name in PROVIDERS}, rounds)
    return rows


def measure_step(rounds: int = 60) -> list[dict[str, Any]]:
    """A row for every provider, as of `measure`: forward and backward of a Whisper, 16 wide, of Whisper-base's layers.

    Under autocast, with all six kinds of weight adapted. Optimizers are the same for all, and left out.
    """
    with (
        mock.patch.dict(cases.SIZES, {"tiny": (_STEP_WIDTH, *cases.SIZES["base"][1:])}),
        launches_do_nothing(NoDriver()),
    ):
        return _timed(STEP, "both", {name: _step(name) for name in PROVIDERS}, rounds)


def _timed(layer: str, which: str, calls: Mapping[str, Any], rounds: int) -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    return [
        {"section": "host", "layer": layer, "provider": name, "kind": "measured", "pass": which}
        | latency_fields(latency)
        for name, latency in latencies(calls, rounds=rounds, warmup=3, clock=time.process_time).items()
    ]


def _step(provider: str) -> Callable[[], None]:
    step = Step(_METHODS.get(provider, "s2lora"), StepCase("tiny", 1, "trim", audio_s=0.1, tokens=4), "cpu")
    if provider not in _METHODS:
        use_strategy(step, provider.removeprefix("s2-"))
    # Of all its products that with every word is the one that takes time: here it is with as many as the model is wide.
    whisper: Any = step.model.get_base_model() if isinstance(step.model, PeftModel) else step.model
    whisper.proj_out = nn.Linear(_STEP_WIDTH, _STEP_WIDTH, bias=False).requires_grad_(False)
    whisper.config.vocab_size = _STEP_WIDTH
    step.batch["labels"] %= _STEP_WIDTH

    def call() -> None:
        step.loss().backward()
        for parameter in step.trainable:
            parameter.grad = None

    return call


def main() -> None:
    """Measures the host's time of an encoder layer, a decoder layer and a step, and adds it to results/host.jsonl."""
    for measured in (measure("encoder-layer"), measure("decoder-layer"), measure_step()):
        for row in record(RESULTS / "host.jsonl", measured):
            print(f"{row['layer']} {row['provider']} {row['pass']}: {row['p50_ms']} ms")
    report.write(RESULTS)


if __name__ == "__main__":
    typer.run(main)
