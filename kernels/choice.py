"""Which strategy computes an S2 linear map, per shape, dtype and device. `pick` is the entry.

In this order: the `backend` argument; the environment variable S2LORA_BACKEND; what was timed earlier, from the file of
`strategy_record.py`; the committed table `tuned.json`; on a CUDA GPU, timing every candidate once and remembering the
fastest. `reference` is always among those timed, so that the choice is never slower than it at the shape timed: rows
count as the next power of two.

On any other device nothing is timed and the choice is `default_strategy`.

Nothing is timed while torch.compile traces, on tensors without data, while a CUDA stream is captured, within a backward
pass (whose thread would wait for itself), or under `torch.use_deterministic_algorithms`, where the choice must not
depend on a clock. What is not known from file or table is then `default_strategy`, for that call only.
"""

import logging
import operator
import os
import threading
import warnings
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch._guards import detect_fake_mode

from .device import multiplies_as_tf32
from .strategy_record import (
    OUT_OF_MEMORY,
    REFERENCE,
    Record,
    Shape,
    StrategyFile,
    committed_table,
    record_from,
    section_of,
)
from .strategy_timing import THREAD, Candidate, time_candidates

VARIABLE = "S2LORA_BACKEND"
AUTO = "auto"
# Up to so many rows a call on a CPU takes a millisecond or two, and what the operation does beside the products is as
# much as what it saves (measured: kernels/README.md).
REFERENCE_ROWS = 128

Timer = Callable[[Shape, torch.device, Mapping[str, Candidate]], tuple[Mapping[str, float], Mapping[str, str]]]
_log = logging.getLogger(__name__)


def named_backend(backend: str) -> str:
    """`backend` or, where that is "auto", what S2LORA_BACKEND names; "auto" where neither names one."""
    return backend if backend != AUTO else os.environ.get(VARIABLE) or AUTO


def default_strategy(shape: Shape, device: torch.device, names: Collection[str]) -> str:
    """The choice without timing, of those in `names`.

    On a CUDA GPU `merged`, measured the fastest or near it for 24,000 rows and for 512 (kernels/README.md). Elsewhere
    `reference` for up to 128 rows, and beyond by memory traffic: `merged` reads W and writes it again once, in float32;
    `split` reads and writes y and dx. Half-precision weights are not merged there.
    """
    outputs, inputs, rows = shape.outputs, shape.inputs, shape.rows_bucket
    if device.type == "cuda":
        order: tuple[str, ...] = ("merged",)
    elif rows <= REFERENCE_ROWS:
        order = ()
    elif shape.weight_dtype.itemsize == 2 or rows * (inputs + outputs) < 2 * inputs * outputs:
        order = ("split", "merged")
    else:
        order = ("merged",)
    return next((name for name in order if name in names), REFERENCE)


def cuda_name(device: torch.device) -> str | None:
    """The GPU's name; None where `device` is no GPU of this machine."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" and torch.cuda.is_available() else None


class Chooser:
    """Choices of one process. `timer` and `device_name` stand for the GPU, so that tests can bring their own."""

    def __init__(
        self,
        file: StrategyFile | None = None,
        *,
        table: Mapping[str, Any] | None = None,
        timer: Timer = time_candidates,
        device_name: Callable[[torch.device], str | None] = cuda_name,
    ) -> None:
        self.file = StrategyFile() if file is None else file
        self.table = committed_table() if table is None else table
        self._timer = timer
        self._device_name = device_name
        self._decided: dict[tuple[Shape, torch.device, tuple[str, ...], bool], str] = {}
        self._names: dict[torch.device, str | None] = {}
        self._lock = threading.RLock()

    def pick(
        self,
        backend: str,
        shape: Shape,
        device: torch.device,
        candidates: Mapping[str, Candidate],
        *,
        may_time: bool = True,
    ) -> str:
        """The name of the candidate that computes this call, of `candidates` that can run it, reference among them.

        Raises:
            ValueError: `backend` or S2LORA_BACKEND is neither "auto" nor one of `candidates`.
        """
        named = named_backend(backend)
        if named != AUTO:
            what = "backend" if named == backend else f"the environment variable {VARIABLE}"
            return _allowed(what, named, candidates)
        known = self._decided.get((shape, device, tuple(candidates), multiplies_as_tf32(shape.dtype)))
        return self._decide(shape, device, candidates, may_time) if known is None else known

    def tune(self, shape: Shape, device: torch.device, candidates: Mapping[str, Candidate]) -> Record | None:
        """Times the candidates whatever is known, and remembers; None, and nothing remembered, if none could run."""
        name = self._name(device)
        if name is None:
            raise ValueError(f"{device} is no CUDA GPU of this machine; strategies are timed on a GPU only")
        with self._lock:
            ms, errors = self._timer(shape, device, candidates)
            for strategy, reason in errors.items():
                if not reason.startswith(OUT_OF_MEMORY):
                    message = f"on {name} the strategy {strategy} failed, and is left out: {reason}"
                    warnings.warn(message, RuntimeWarning, stacklevel=2)
            record = Record.of(ms, errors)
            if record is not None:
                self.file.add(section_of(name), _key(shape), record)
                self._remember(shape, device, candidates, record.best_of(candidates))
        return record

    def _decide(self, shape: Shape, device: torch.device, candidates: Mapping[str, Candidate], may_time: bool) -> str:
        if REFERENCE not in candidates:
            raise ValueError(f"candidates are {', '.join(candidates)}, without {REFERENCE}")
        if device.type != "cuda":
            return self._remember(shape, device, candidates, default_strategy(shape, device, candidates))
        name = self._name(device)
        if name is not None:
            known = self._recorded(name, shape, candidates)
            if known is None and may_time and _timing_is_safe():
                known = self._time(name, shape, device, candidates)
            if known is not None:
                return self._remember(shape, device, candidates, known)
        return default_strategy(shape, device, candidates)

    def _recorded(
        self, name: str, shape: Shape, candidates: Mapping[str, Candidate], *, reread: bool = False
    ) -> str | None:
        key = _key(shape)
        remembered = self.file.find(section_of(name), key, reread=reread)
        for record in (remembered, record_from(self.table.get(name, {}).get(key))):
            if record is not None and (strategy := record.best_of(candidates)) is not None:
                return strategy
        return None

    def _time(self, name: str, shape: Shape, device: torch.device, candidates: Mapping[str, Candidate]) -> str:
        with self._lock:
            # Another thread or process may have timed it meanwhile.
            known = self._recorded(name, shape, candidates, reread=True)
            if known is not None:
                return known
            try:
                record = self.tune(shape, device, candidates)
                known = None if record is None else record.best_of(candidates)
            except Exception as error:  # no memory for the operands, say: training must go on
                warnings.warn(f"strategies for {shape.key} were not timed: {error}", RuntimeWarning, stacklevel=2)
                record = None
            if known is None:
                return default_strategy(shape, device, candidates)
            assert record is not None
            _log.info("%s: %s of %s", shape.key, known, dict(record.ms))
            return known

    def _remember(
        self, shape: Shape, device: torch.device, candidates: Mapping[str, Candidate], strategy: str | None
    ) -> str:
        strategy = default_strategy(shape, device, candidates) if strategy is None else strategy
        self._decided[shape, device, tuple(candidates), multiplies_as_tf32(shape.dtype)] = strategy
        return strategy

    def _name(self, device: torch.device) -> str | None:
        if device not in self._names:
            self._names[device] = self._device_name(device)
        return self._names[device]


def _allowed(what: str, value: str, candidates: Collection[str]) -> str:
    if value not in candidates:
        raise ValueError(f"{what} is {value!r}, not one of {', '.join((AUTO, *candidates))}")
    return value


def _key(shape: Shape) -> str:
    """The shape and, as it decides which kernels run, whether PyTorch multiplies float32 as TF32."""
    return f"{shape.key} tf32" if multiplies_as_tf32(shape.dtype) else shape.key


def _timing_is_safe() -> bool:
    return not (
        (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())
        or torch.are_deterministic_algorithms_enabled()
        or torch.compiler.is_compiling()
        or detect_fake_mode() is not None
        or torch._C._current_graph_task_id() != -1
        or threading.current_thread().name.startswith(THREAD)  # a candidate that asks for a choice itself
    )


_chooser: Chooser | None = None


def chooser() -> Chooser:
    """The process's own chooser, made on first use."""
    global _chooser
    if _chooser is None:
        _chooser = Chooser()
    return _chooser


def pick(backend: str, shape: Shape, device: torch.device, candidates: Mapping[str, Candidate]) -> str:
    """The name of the candidate that computes this call; see `Chooser.pick`.

    Under torch.compile the choice becomes a constant of the graph, taken from file, table or default.
    """
    if torch.compiler.is_compiling():
        if backend != AUTO:
            return _allowed("backend", backend, candidates)
        # As plain numbers, which a graph is made for: the tracer may have sizes that vary.
        sizes = (shape.rows_bucket, shape.inputs, shape.outputs, shape.rank, shape.group)
        fields = (*map(operator.index, sizes), shape.dtype, shape.weight_dtype, shape.needs_gradient)
        return _pick_constant(backend, fields, device, tuple(candidates))
    return (_chooser or chooser()).pick(backend, shape, device, candidates)


@torch.compiler.assume_constant_result
def _pick_constant(backend: str, fields: tuple, device: torch.device, names: tuple[str, ...]) -> str:
    # Called by the tracer with plain values; names stand for the candidates, none of which runs.
    return chooser().pick(backend, Shape(*fields), device, dict.fromkeys(names, _never), may_time=False)


def _never(operands: Any) -> Any:
    raise RuntimeError("a choice made while compiling runs no candidate")
