"""A run's folder: what was asked, with what versions, what came of it, and where to go on after a kill."""

import contextlib
import ctypes
import datetime
import gc
import hashlib
import importlib.metadata
import json
import platform
import re
import resource
import shlex
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors import SafetensorError, safe_open
from transformers.trainer_utils import get_last_checkpoint

from .data import Skipped, Speech
from .errors import UserError
from .options import TrainOptions
from .output import alone, check_name, clear_unfinished, holds_files, read_json, write_json, write_text, writing
from .sets import parts_of
from .world import world

_PACKAGES = ("fused-s2lora", "torch", "transformers", "peft", "datasets", "accelerate", "jiwer")
# Options that may differ when a run is resumed: they change what is shown, not what is learned (see `changed_option`).
FREE_TO_CHANGE = {"output", "eval_batch_size", "group_by", "test", "before", "workers", "logging_steps", "save_steps"}
# What an option is in a run that was made before there was the option.
UNSET: dict[str, Any] = asdict(TrainOptions(["-"], "-")) | {"leading_space": False}


class RunFolder:
    """The folder of one training run.

    `config.json` options, `command.txt`, `versions.json`, `checkpoints/`, `adapter/` or `model/`, `before/` and
    `after/` with results.json and transcripts, `results.json` of both, `summary.json` times and memory, `skipped.tsv`,
    `speech.json` a fingerprint of what is trained on, `other_languages.json` what the unadapted model heard in them.

    Raises:
        UserError: the folder cannot be written, holds a run with other options, or one that another process is at.
    """

    def __init__(self, options: TrainOptions, *, fresh: bool = False) -> None:
        self.path = Path(options.output)
        self.checkpoints = self.path / "checkpoints"
        self.adapter = self.path / "adapter"
        self.model = self.path / "model"
        self.other_languages = self.path / "other_languages.json"
        try:
            check_folder(options, fresh=fresh)
            state = world()
            state.wait_for_everyone()  # all have looked before one deletes
            with self.alone():
                if state.is_main_process:
                    self._begin(options, fresh)
            state.wait_for_everyone()
        except OSError as error:
            raise UserError(f"{self.path}: cannot write the run there ({error}); give another --output") from error

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Keeps away processes that are called for the same run while the context lasts, where files can be locked.

        Raises:
            UserError: another process has the run.
        """
        if not world().is_main_process:
            yield
            return
        self.path.mkdir(parents=True, exist_ok=True)
        with alone(self.path / ".alone", f"{self.path}: another process is at this run"):
            yield

    def _begin(self, options: TrainOptions, fresh: bool) -> None:
        if fresh and run_options(self.path) is not None:
            # What tells that it is a run goes last: one who was killed can call again.
            for item in sorted(self.path.iterdir(), key=lambda item: item.name == "config.json"):
                if item.is_dir() and not item.is_symlink():
                    shutil.rmtree(item)
                elif item.name != ".alone":
                    item.unlink()
        for name in ("", "adapter", "model", "before", "after"):
            clear_unfinished(self.path / name)
        self.last_checkpoint()  # removes what was half written, which all of them would be at in `fit`
        write_json(self.path / "config.json", asdict(options))
        with (self.path / "command.txt").open("a") as stream:
            stream.write(called_as() + "\n")
        write_json(self.path / "versions.json", versions())

    def finished(self) -> bool:
        """Whether training is done and the adapter saved."""
        return (self.path / "summary.json").is_file() and self.trained.is_dir()

    @property
    def trained(self) -> Path:
        """What training left: the adapter, or the whole model of a method without one."""
        return self.model if self.model.is_dir() else self.adapter

    def last_checkpoint(self) -> Path | None:
        """The newest checkpoint that is whole; a half-written or damaged newer one is removed."""
        while self.checkpoints.is_dir():
            newest = get_last_checkpoint(str(self.checkpoints))
            if newest is None:
                return None
            if _whole(Path(newest)):
                return Path(newest)
            print(f"{newest}: not written to its end, removed; going on from the one before", file=sys.stderr)
            shutil.rmtree(newest)
        return None

    def write_skipped(self, skipped: Sequence[Skipped], console: Console) -> None:
        """One line in skipped.tsv for each utterance that was left out, with the reason; says how many they are."""
        lines = ["utterance\treason", *(f"{item.utterance}\t{item.reason}" for item in skipped)]
        if world().is_main_process:
            write_text(self.path / "skipped.tsv", "\n".join(lines) + "\n")
        tell_skipped(skipped, self.path / "skipped.tsv", console)

    def check_speech(self, *parts: Speech | None) -> None:
        """Notes what is trained on, or finds it to be what it was when the run was begun.

        Raises:
            UserError: it is other speech, or has other transcripts or recordings.
        """
        state = hashlib.sha256()
        for part in parts:
            for column in ("utterance", "target", "duration_s"):
                state.update(json.dumps([] if part is None else part.dataset[column][:]).encode())
        audio = [None if part is None else part.audio_sha256 for part in parts]
        file, found = self.path / "speech.json", {"sha256": state.hexdigest(), "audio_sha256": audio}
        if not file.is_file():
            if world().is_main_process:
                write_json(file, found)
            return
        noted = read_json(file)
        for key, what in (("sha256", "utterances or transcripts"), ("audio_sha256", "recordings")):
            if noted.get(key, found[key]) != found[key]:  # of recordings an older run has noted nothing
                raise UserError(
                    f"{self.path}: was begun with other {what}; restore them, give another --output, or --fresh to "
                    "delete it and start anew"
                )


def _whole(checkpoint: Path) -> bool:
    """Whether all that training goes on with is there, to its end: without some of it the Trainer begins that anew.

    The Trainer writes its state last, but where the power fails, or a copy does, that may be all that is kept.
    """
    weights = [*checkpoint.glob("*model*.safetensors")]
    random = [*checkpoint.glob("rng_state*.pth")]
    try:
        json.loads((checkpoint / "trainer_state.json").read_text())
        for file in weights:
            with safe_open(file, "pt"):
                pass
    except (OSError, ValueError, SafetensorError):
        return False
    # What `torch.save` writes is a zip, whose directory is at its end.
    zipped = all(map(zipfile.is_zipfile, [checkpoint / "optimizer.pt", checkpoint / "scheduler.pt", *random]))
    return bool(weights and random and zipped)


def tell_skipped(skipped: Sequence[Skipped], listed_in: Path, console: Console) -> None:
    """Says how many utterances were left out, why the first was, and where the others are."""
    if skipped:
        console.print(f"skipped {len(skipped)} utterances, listed in {listed_in}; the first:", markup=False)
        console.print(skipped[0].reason, markup=False)


def check_folder(options: TrainOptions, *, fresh: bool = False) -> None:
    """Nothing, where a run of these options can begin or go on in its folder, or with `fresh` take another's place.

    Raises:
        UserError: the folder holds a run with other options, other files than a run's, or with `fresh` speech that this
            one is to read, or cannot be read.
    """
    path = Path(options.output)
    check_name(path)
    with writing(path):
        found = run_options(path)
        if found is None and holds_files(path):
            raise UserError(f"{path}: the folder holds other files; give an empty --output")
    if found is not None and not fresh:
        _check_same(found, asdict(options), path)
    elif found is not None:
        trained = [source for source, _ in options.learnt_from()]
        tested = [parts_of(specification)[1] for specification in options.test]
        for source in (*trained, *tested):
            if Path(source).exists() and Path(source).resolve().is_relative_to(path.resolve()):
                raise UserError(f"{path}: --fresh would delete {source} with it; move that elsewhere")


def run_options(folder: Path) -> dict[str, Any] | None:
    """The options of the run in this folder; None where there is none, or a model."""
    config = folder / "config.json"
    if not config.is_file():
        return None
    try:
        found = json.loads(config.read_text(encoding="utf-8"))
    except ValueError:
        return None
    return found if isinstance(found, dict) and {"data", "method"} <= found.keys() else None


def changed_option(found: dict[str, Any], wanted: dict[str, Any], free: Iterable[str]) -> str | None:
    """The first option, but those in `free`, that differs between two configurations; one not in `found` is unset.

    With development speech `save_steps` never is free: the best is kept of the checkpoints that are made.
    """
    if wanted["dev"] is not None or wanted["dev_share"]:
        free = set(free) - {"save_steps"}
    return next((key for key in wanted if key not in free and found.get(key, UNSET[key]) != wanted[key]), None)


def _check_same(found: dict[str, Any], wanted: dict[str, Any], path: Path) -> None:
    key = changed_option(found, wanted, FREE_TO_CHANGE)
    if key is not None:
        raise UserError(
            f"{path}: holds a run with {key} = {found.get(key, UNSET[key])!r}, not {wanted[key]!r}; "
            "give another --output, or --fresh to delete it and start anew"
        )


def last_command(folder: Path) -> str:
    """The command that the run in `folder` was last called by; "" where that is not known."""
    file = folder / "command.txt"
    lines = file.read_text().splitlines() if file.is_file() else []
    return lines[-1] if lines else ""


def called_as() -> str:
    """The command line of this process."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def source_commit() -> str | None:
    """The commit of this source checkout, 12 digits; None where it is none, or git is not installed."""
    if shutil.which("git") is None:
        return None
    asked = ["git", "rev-parse", "--short=12", "HEAD"]
    return subprocess.run(asked, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip() or None


def versions() -> dict[str, Any]:
    """Versions, commit of a source checkout, device and UTC time."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    return {
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in _PACKAGES},
        "commit": source_commit(),
        "device": device,
        "utc": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def reset_peak_memory() -> None:
    """Lets `peak_memory_mib` count from now on, where the system can (CUDA, Linux)."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # or what an earlier run of this process freed would count
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_mib() -> float:
    """The most memory since `reset_peak_memory`, in MiB: the GPU's where there is one, else the resident size."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    with contextlib.suppress(OSError):
        peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
        if peak:
            return int(peak[1]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
