"""Section `counted`: launches, bytes and peak memory of layers and steps, and the time they imply on known GPUs.

Nothing runs: fake tensors go through each provider's own code, forward and backward, and what PyTorch dispatches is
added up. The implied time is the sum over launches of the least time each can take by the GPU's data sheet. It leaves
out launch gaps and caches, so it is a bound and not a forecast.
"""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from bench.cases import Case, make_operands
from bench.counter import Count, count
from bench.layer import passes, row
from bench.providers import providers
from bench.roofline import DATA_SHEETS
from bench.step import METHODS, Step, StepCase, on_a_gpu, step_row
from fused_s2lora.kernels import device as kernels_device
from fused_s2lora.kernels.strategies import STRATEGIES


def count_layer(case: Case, *, only: Iterable[str] | None = None) -> list[dict[str, Any]]:
    """A row for every provider of a case, none of which needs a GPU; for what a compiler fuses, a row saying so."""
    fake = without_data()
    with fake:
        groups = make_operands(case, "cpu")
    rows = []
    for name, build in providers(case, "cpu", counting=True).items():
        if _wanted(name, only):
            # Ours may run a call when built; PEFT builds its models of real parameters.
            with as_on_a_gpu(), fake if name.startswith("s2-") else contextlib.nullcontext():
                calls = passes([build(group) for group in groups], groups)
            with as_on_a_gpu(), fake:
                rows.append(row(case, name, "counted", **fields(count(calls["both"]))))
    if _wanted("s2-compiled", only):
        reason = "what Inductor launches on a GPU is decided on that GPU"
        rows.append(row(case, "s2-compiled", "not counted", reason=reason))
    return rows


def count_step(case: StepCase, methods: Iterable[str] = METHODS) -> list[dict[str, Any]]:
    """A row for every method, S2-LoRA once by strategy: forward and backward of a training step.

    `state_mib` is what AdamW keeps, by its definition: two float32 numbers for each trainable one. To ours is added
    what the first step makes for all later ones, such as the copy of W of `augmented`; a later one is what is counted.
    """
    rows = []
    for method in on_a_gpu(methods):
        step = Step(method, case, "cpu", initialised=False)
        trainable = sum(parameter.numel() for parameter in step.trainable)
        state = 2 * 4 * trainable
        for strategy in STRATEGIES if method == "s2lora" else (None,):
            kept = 0
            with as_on_a_gpu(), without_data():
                if strategy:
                    use_strategy(step, strategy)
                    kept = count(lambda step=step: gradients(step)).held_bytes
                counted = count(lambda step=step: gradients(step))
            name = f"{method}-{strategy}" if strategy else method
            extra = {"trainable": trainable, "state_mib": round((state + kept) / 2**20, 2)}
            rows.append(step_row(case, name, "counted", **fields(counted), **extra))
    return rows


def use_strategy(step: Step, strategy: str) -> None:
    """Sets the `backend` of the step's adapter, which its LayerNorms and GELUs read as well."""
    for config in step.model.peft_config.values():
        config.backend = strategy


def gradients(step: Step) -> list[Tensor]:
    """Forward and backward without touching `.grad` of real parameters; those of `frozen` end at the front end."""
    loss = step.loss()
    if step.trainable:
        return list(torch.autograd.grad(loss, step.trainable, allow_unused=True))
    loss.backward()
    return []


@contextlib.contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Inside, operations take the kernels' path whatever their device."""
    with mock.patch.object(kernels_device, "runs_triton", lambda x: x.dtype != torch.float64):
        yield


def without_data() -> FakeTensorMode:
    """Inside, tensors have shapes and no data; real ones stand for their shapes."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def fields(counted: Count) -> dict[str, Any]:
    """Fields of a result line: totals, and the implied milliseconds by data sheet."""
    implied_ms = {name: round(sheet.floor_ms(counted), 4) for name, sheet in DATA_SHEETS.items()}
    return counted.fields() | {"implied_ms": implied_ms}


def _wanted(name: str, only: Iterable[str] | None) -> bool:
    return only is None or name in only
