"""Time and peak memory of callables, side by side, and the JSON line each result becomes."""

import datetime
import functools
import importlib.metadata
import json
import math
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fused_s2lora.kernels.choice import VARIABLE
from fused_s2lora.training.run import peak_memory_mib, reset_peak_memory, source_commit

RESULTS = Path(__file__).parent / "results"
_HEAD_START_CYCLES = 60_000_000  # 30 ms of a GPU at 2 GHz, several times what the host takes for a layer


@dataclass(frozen=True)
class Latency:
    """Percentiles of one callable's wall time, and how often it was timed."""

    p20_ms: float
    p50_ms: float
    p80_ms: float
    rounds: int


@dataclass(frozen=True)
class Staged:
    """A call `run(prepare())` of which only `run` is timed."""

    prepare: Callable[[], Any]
    run: Callable[[Any], Any]


def latencies(
    providers: Mapping[str, Callable[[], Any] | Staged],
    *,
    rounds: int,
    warmup: int = 2,
    seconds: float = math.inf,
    queued: bool = False,
    clock: Callable[[], float] | None = None,
) -> dict[str, Latency]:
    """Wall time of every provider, one call of each per round, so that drift of the machine meets all of them alike.

    On CUDA a call is timed between two events after a write over the L2 cache; on CPU by the host clock. After
    `seconds` no further round is begun, though three are always made. `queued`, on CUDA alone, keeps the GPU busy until
    the host has issued the whole call: what is timed is the GPU's own time, as in a model that is ahead of its GPU.
    `clock`, in seconds, times calls on the host whatever the device.
    """
    samples: dict[str, list[float]] = {name: [] for name in providers}
    timer = functools.partial(_host_ms, clock=clock or time.perf_counter)
    if torch.cuda.is_available() and clock is None:
        timer = functools.partial(_cuda_ms, queued=queued)
    began = time.perf_counter()
    for index in range(warmup + rounds):
        if index >= warmup + 3 and time.perf_counter() - began > seconds:
            break
        for name, call in providers.items():
            elapsed = timer(_ready(call))
            if index >= warmup:
                samples[name].append(elapsed)
    return {name: _percentiles(values) for name, values in samples.items()}


def _ready(call: Callable[[], Any] | Staged) -> Callable[[], Any]:
    if not isinstance(call, Staged):
        return call
    prepared, run = call.prepare(), call.run
    return lambda: run(prepared)


def _percentiles(values: list[float]) -> Latency:
    if len(values) == 1:
        return Latency(values[0], values[0], values[0], 1)
    cuts = statistics.quantiles(values, n=10, method="inclusive")
    return Latency(cuts[1], cuts[4], cuts[7], len(values))


def _host_ms(call: Callable[[], Any], *, clock: Callable[[], float]) -> float:
    start = clock()
    call()
    return (clock() - start) * 1e3


def _cuda_ms(call: Callable[[], Any], *, queued: bool) -> float:
    torch.empty(256 << 20, dtype=torch.int8, device="cuda").zero_()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    if queued:
        torch.cuda._sleep(_HEAD_START_CYCLES)
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def peak_mib(build: Callable[..., Callable[[], Any]], *args: Any) -> float:
    """Memory that two calls of `build(*args)` add at their peak, in MiB, measured in a process of its own.

    Above what the built model holds: the allocator's peak on CUDA, on CPU the largest resident size. `build` and `args`
    are pickled, so `build` is a module-level function.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_peak_worker, args=(sender, build, args))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        raise RuntimeError(
            f"measuring the memory of {build.__name__}{args} failed; its error is printed above"
        ) from None
    finally:
        process.join()


def _peak_worker(sender: Any, build: Callable[..., Callable[[], Any]], args: tuple) -> None:
    call = build(*args)
    reset_peak_memory()
    before = peak_memory_mib()
    call(), call()
    sender.send(peak_memory_mib() - before)


def device_name() -> str:
    """The GPU's name, else the processor's with the number of threads torch uses."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    return f"{model}, {torch.get_num_threads()} threads"


def provenance() -> dict[str, Any]:
    """Device, versions, commit, command and UTC time: what a result line needs to be repeated."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "triton", "transformers", "peft")}
    return {
        "device": device_name(),
        "python": platform.python_version(),
        "versions": versions,
        "commit": _commit(),
        "command": " ".join([*_variables(), "python", "-m", *_module_and_arguments()]),
        "utc": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _variables() -> list[str]:
    return [f"{VARIABLE}={os.environ[VARIABLE]}"] if VARIABLE in os.environ else []


def _module_and_arguments() -> Iterable[str]:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return [spec.name if spec else Path(sys.argv[0]).name, *sys.argv[1:]]


def _commit() -> str:
    head = source_commit()
    if head is None:
        return "unknown"
    # Results themselves, written as a run goes, are no change of what is measured.
    status = ["git", "status", "--porcelain", "-uno", "--", ":/", ":!results"]
    changed = subprocess.run(status, cwd=Path(__file__).parent, capture_output=True, text=True)
    return head + ("+changes" if changed.stdout.strip() else "")


def record(file: Path, rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Appends one JSON line a row, each with its provenance, and returns them so."""
    file.parent.mkdir(parents=True, exist_ok=True)
    common = provenance()
    rows = [{**row, **common} for row in rows]
    unfinished = file.exists() and not file.read_bytes().endswith(b"\n")  # by a run that was killed, or a full disk
    with file.open("a", encoding="utf-8") as stream:
        stream.write("\n" * unfinished + "".join(json.dumps(row) + "\n" for row in rows))
    return rows


def of_one_run(row: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two result lines are of one run, whose times can be compared."""
    return all(row.get(name) == other.get(name) for name in ("device", "commit", "command"))


def reason_of(error: Exception) -> str:
    """The kind of error and its first line, for a row of what could not run."""
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def latency_fields(latency: Latency) -> dict[str, float]:
    """The fields of a `Latency`, rounded for a result line."""
    return {key: round(value, 4) for key, value in asdict(latency).items()}
