"""What was timed for a shape, and the file that remembers it between runs.

    {"NVIDIA H100 80GB HBM3 | torch 2.13.0 | triton 3.9.0 | kernels 0123abcd": {
        "rows<=2048 768->3072 rank 8 x1 bfloat16 weights float32 forward+backward": {
            "strategy": "merged",
            "ms": {"reference": 0.41, "merged": 0.22, "frozen": 0.19},
            "errors": {"fused": "RuntimeError: ..."}}}}

(The numbers are made up.) Another version of torch or triton, or a change of the kernels, is another section, so it
times anew.
Processes that share the file, ranks of a distributed run among them, decide each for themselves and add to it.
"""

import contextlib
import functools
import hashlib
import json
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton

REFERENCE = "reference"
FROZEN = "frozen"  # the maps without an adapter: timed for comparison, never a choice
OUT_OF_MEMORY = "out of memory"
_BUCKETS = tuple(1 << exponent for exponent in range(4, 17))
_LOCK_S = 2.0


@dataclass(frozen=True)
class Shape:
    """What a strategy is chosen for: `group` weights [outputs, inputs] of one input [rows, inputs] in `dtype`."""

    rows_bucket: int
    inputs: int
    outputs: int
    rank: int
    group: int
    dtype: torch.dtype  # of the product
    weight_dtype: torch.dtype
    needs_gradient: bool

    @property
    def key(self) -> str:
        """The shape as text, as files have it."""
        last = self.rows_bucket == _BUCKETS[-1]
        rows = f"rows>{_BUCKETS[-2]}" if last else f"rows<={self.rows_bucket}"
        direction = "forward+backward" if self.needs_gradient else "forward"
        dtype, weight_dtype = (str(name).removeprefix("torch.") for name in (self.dtype, self.weight_dtype))
        return (
            f"{rows} {self.inputs}->{self.outputs} rank {self.rank} x{self.group} "
            f"{dtype} weights {weight_dtype} {direction}"
        )


def rows_bucket(rows: int) -> int:
    """The next power of two, at least 16 and at most 65,536, which stands for all above 32,768.

    Comparisons only, so that under torch.compile a dynamic number of rows is guarded by its bucket, not its value.
    """
    for bucket in _BUCKETS[:-1]:
        if rows <= bucket:
            return bucket
    return _BUCKETS[-1]


def shape_of(
    rows: int,
    inputs: int,
    outputs: int,
    rank: int,
    group: int,
    dtype: torch.dtype,
    weight_dtype: torch.dtype,
    needs_gradient: bool,
) -> Shape:
    """The shape of a call with that many rows; the same object for the same call, which is quick to look up."""
    if torch.compiler.is_compiling():
        return Shape(rows_bucket(rows), inputs, outputs, rank, group, dtype, weight_dtype, needs_gradient)
    return _interned(rows, inputs, outputs, rank, group, dtype, weight_dtype, needs_gradient)


@functools.lru_cache(maxsize=4096)
def _interned(rows: int, *fields: Any) -> Shape:
    return Shape(rows_bucket(rows), *fields)


@dataclass(frozen=True)
class Record:
    """Milliseconds of each strategy that ran, `FROZEN` among them, and why the others did not."""

    strategy: str
    ms: Mapping[str, float]
    errors: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, ms: Mapping[str, float], errors: Mapping[str, str]) -> "Record | None":
        """The record of these timings, None if no strategy ran."""
        strategy = _fastest(ms, ms.keys() - {FROZEN})
        return None if strategy is None else cls(strategy, ms, errors)

    def best_of(self, names: Iterable[str]) -> str | None:
        """The fastest of `names`; None if one of them was not tried."""
        names = set(names)
        if not names <= self.ms.keys() | self.errors.keys():
            return None
        return self.strategy if self.strategy in names else _fastest(self.ms, names)

    @property
    def lasting(self) -> bool:
        """False where another time may be otherwise: memory ran out, or all failed but reference (no compiler)."""
        if any(error.startswith(OUT_OF_MEMORY) for error in self.errors.values()):
            return False
        return not self.errors or bool(self.ms.keys() - {REFERENCE, FROZEN})


def _fastest(ms: Mapping[str, float], names: Iterable[str]) -> str | None:
    timed = [name for name in names if name in ms]
    return min(timed, key=lambda name: (ms[name], name != REFERENCE, name), default=None)


def record_from(value: Any) -> Record | None:
    """The record that JSON value `value` holds, None if it holds none."""
    if not isinstance(value, dict):
        return None
    strategy, ms, errors = value.get("strategy"), value.get("ms"), value.get("errors", {})
    if not isinstance(ms, dict) or not isinstance(errors, dict) or not isinstance(strategy, str):
        return None
    if strategy not in ms or strategy == FROZEN:
        return None
    if not all(isinstance(number, int | float) and 0 < number <= sys.float_info.max for number in ms.values()):
        return None
    return Record(strategy, ms, {name: str(error) for name, error in errors.items()})


def committed_table() -> dict[str, Any]:
    """{device name: {shape: record}} of the GPUs measured by us, shipped with the package."""
    return json.loads(Path(__file__).with_name("tuned.json").read_text(encoding="utf-8"))


def section_of(device_name: str) -> str:
    """Device, versions and the state of the kernels, under which the file keeps records."""
    versions = {"torch": torch.__version__, "triton": triton.__version__, "kernels": _state_of_kernels()}
    return " | ".join([device_name, *(f"{name} {version}" for name, version in versions.items())])


@functools.cache
def _state_of_kernels() -> str:
    """Eight digits that are others when a module beside this one is."""
    state = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        state.update(file.read_bytes())
    return state.hexdigest()[:8]


def strategies_path() -> Path:
    """`$S2LORA_CACHE/strategies.json`, else `~/.cache/fused_s2lora/strategies.json`."""
    named = os.environ.get("S2LORA_CACHE")
    if named:
        return Path(named) / "strategies.json"
    try:
        home = Path.home()
    except RuntimeError:  # a container's user without a home
        return Path(tempfile.gettempdir()) / "fused_s2lora" / "strategies.json"
    return home / ".cache" / "fused_s2lora" / "strategies.json"


class StrategyFile:
    """Records on disk, and those of this process. A file that cannot be used costs one warning and no more."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = strategies_path() if path is None else path
        self._own: dict[str, dict[str, Record]] = {}
        self._sections: dict[str, Any] | None = None
        self._broken = False

    def find(self, section: str, key: str, *, reread: bool = False) -> Record | None:
        """What is remembered; with `reread` also what other processes have added since."""
        own = self._own.get(section, {}).get(key)
        if own is not None:
            return own
        if self._sections is None or (reread and not self._broken):
            self._sections = self.read()
        return record_from(self._sections.get(section, {}).get(key))

    def add(self, section: str, key: str, record: Record) -> None:
        """Remembers the record, on disk if it is lasting and the file can be written."""
        self._own.setdefault(section, {})[key] = record
        if self._broken or not record.lasting:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with _locked(self.path.with_suffix(".lock")):
                self._write()
        except OSError as error:
            self._give_up(f"cannot be written ({error}); set S2LORA_CACHE to a writable folder")

    def read(self) -> dict[str, Any]:
        """{section: {shape: record as JSON}}, empty where there is no file or none that can be read."""
        if self._broken:
            return {}
        try:
            sections = json.loads(self.path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except NotADirectoryError:
            self._give_up("cannot be read: what should be its folder is a file; set S2LORA_CACHE to a folder")
            return {}
        except (OSError, ValueError, RecursionError) as error:
            self._give_up(f"cannot be read ({error}); delete it with `s2lora tune --forget`")
            return {}
        if not isinstance(sections, dict) or not all(isinstance(records, dict) for records in sections.values()):
            self._give_up("has no strategies in it; delete it with `s2lora tune --forget`")
            return {}
        return sections

    def forget(self) -> bool:
        """Deletes the file; whether there was one."""
        there = self.path.is_file()
        for path in (self.path, self.path.with_suffix(".lock")):
            path.unlink(missing_ok=True)
        self._own, self._sections = {}, None
        return there

    def _write(self) -> None:
        sections = self.read()
        if self._broken:
            return
        for section, records in self._own.items():
            lasting = {key: asdict(record) for key, record in records.items() if record.lasting}
            sections[section] = {**sections.get(section, {}), **lasting}
        descriptor, unfinished = tempfile.mkstemp(prefix=self.path.name, dir=self.path.parent)
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
                json.dump(sections, stream, indent=1, sort_keys=True)
            os.chmod(unfinished, 0o644)  # mkstemp's are for their owner alone; a folder may serve several
            os.replace(unfinished, self.path)
        except BaseException:
            Path(unfinished).unlink(missing_ok=True)
            raise
        self._sections = sections

    def _give_up(self, reason: str) -> None:
        self._broken = True
        warnings.warn(f"{self.path} {reason}. Until then strategies are not remembered", RuntimeWarning, stacklevel=2)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds the lock file, where the system has such; a process that does not let go is waited for 2 s, then passed."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    deadline = time.monotonic() + _LOCK_S
    with path.open("a") as stream:
        while time.monotonic() < deadline:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.01)
            except OSError:
                break  # a file system without locks
        yield
