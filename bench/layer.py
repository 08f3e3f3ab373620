"""Section `layer`: the linear maps of one Whisper layer, forward and backward, by provider."""

import gc
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch

from bench.cases import Case, Operands, make_operands
from bench.counter import count
from bench.measure import Staged, latencies, latency_fields, reason_of
from bench.providers import Provided, gradients, providers, refuse_wrong
from bench.roofline import Device

PASSES = ("forward", "backward", "both")


def measure(
    case: Case,
    device: Device,
    *,
    only: Iterable[str] | None = None,
    rounds: int = 15,
    seconds: float = math.inf,
) -> list[dict[str, Any]]:
    """Result rows of one case: a provider that is wrong, or fails, gives one row with the reason and no time.

    Latencies of forward, backward and both, p20, p50 and p80 over `rounds` or what `seconds` allow, on CUDA also the
    median of the GPU's own time (`queued` of `latencies`); peak memory of both (of the allocator on CUDA, counted on
    CPU); bytes, flops and launches as dispatched; and the ratio to the roofline floor of the case. Nothing is timed
    before every output and gradient has been held to float64.
    """
    torch.compiler.reset()
    groups = make_operands(case, device.type)
    calls: dict[str, dict[str, Any]] = {}
    rows = []
    counted: dict[str, dict[str, Any]] = {}
    builders = providers(case, device.type)
    for name in only or ():
        if name not in builders:
            reason = f"not to be had in {case.precision} on {'a GPU' if device.type == 'cuda' else 'a CPU'}"
            rows.append(row(case, name, "refused", reason=reason))
    for name, build in builders.items():
        if only is not None and name not in only:
            continue
        try:
            provided = [build(group) for group in groups]
            for one, group in zip(provided, groups, strict=True):
                refuse_wrong(name, one, group, case.compute_dtype)
            calls[name] = passes(provided, groups)
            counted[name] = _counts(calls[name]["both"], compiled=name == "s2-compiled")
        except Exception as error:  # a provider that cannot run here must not end the run, and is shown
            rows.append(row(case, name, "refused", reason=reason_of(error)))
    for which in PASSES:
        timed = {name: passes[which] for name, passes in calls.items()}
        times = latencies(timed, rounds=rounds, seconds=seconds)
        on_gpu = latencies(timed, rounds=10, seconds=seconds / 2, queued=True) if torch.cuda.is_available() else {}
        floor_ms = device.floor_ms(case, which)
        for name, latency in times.items():
            extra = {} if which != "both" else {**counted[name], **_peak(calls[name]["both"])}
            fields = {"pass": which, **latency_fields(latency), "floor_ms": round(floor_ms, 4), **extra}
            if name in on_gpu:
                fields["gpu_p50_ms"] = round(on_gpu[name].p50_ms, 4)
            rows.append(row(case, name, "measured", **fields))
    del calls, groups
    gc.collect()
    return rows


def row(case: Case, provider: str, kind: str, **fields: Any) -> dict[str, Any]:
    """One result of this section."""
    return {"section": "layer", **case.fields(), "provider": provider, "kind": kind, **fields}


def passes(provided: list[Provided], groups: list[Operands]) -> dict[str, Any]:
    """What is timed for each of `PASSES`, over all groups; the backward pass after a forward that is not timed."""

    def forward() -> list:
        return [one.forward() for one in provided]

    def backward(outputs: list) -> None:
        for one, ys, group in zip(provided, outputs, groups, strict=True):
            gradients(one, ys, group)

    return {"forward": forward, "backward": Staged(forward, backward), "both": lambda: backward(forward())}


def _counts(call: Callable[[], Any], *, compiled: bool) -> dict[str, Any]:
    if compiled:
        call()  # what a compiler launches is not dispatched by PyTorch, so it is not counted
        return {}
    return count(call).fields()


def _peak(call: Callable[[], Any]) -> dict[str, float]:
    """Allocator's peak of one call on CUDA; CPU rows have the counted one alone."""
    if not torch.cuda.is_available():
        return {}
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    return {"peak_mib": round((torch.cuda.max_memory_allocated() - held) / 2**20, 1)}
