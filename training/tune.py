"""Timing the strategies for every layer of a Whisper ahead of training, and showing what is remembered."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, WhisperConfig

from fused_s2lora.kernels.choice import REFERENCE_ROWS, VARIABLE, Chooser
from fused_s2lora.kernels.s2_linear import STRATEGIES, s2_linear_group
from fused_s2lora.kernels.strategy_record import (
    FROZEN,
    REFERENCE,
    Record,
    Shape,
    StrategyFile,
    committed_table,
    record_from,
    rows_bucket,
    shape_of,
)
from fused_s2lora.kernels.strategy_timing import candidates_of

from .audio_window import AudioWindow
from .errors import UserError
from .models import PACKAGED
from .precision import autocast_dtype, check_precision

# d_model, encoder layers, decoder layers, mel bins
SIZES = {
    "tiny": (384, 4, 4, 80),
    "base": (512, 6, 6, 80),
    "small": (768, 12, 12, 80),
    "medium": (1024, 24, 24, 80),
    "large": (1280, 32, 32, 80),
    "large-v2": (1280, 32, 32, 80),
    "large-v3": (1280, 32, 32, 128),
    "turbo": (1280, 32, 4, 128),
}
NO_GPU = (
    "there is no CUDA GPU here, and strategies are timed on a GPU only: on a CPU the choice is `reference` up to "
    f"{REFERENCE_ROWS} rows and `merged` beyond, or `split` where a weight is large for its rows or stored in half "
    f"precision, unless {VARIABLE} or the argument `backend` names another"
)
_SHORTEST_AUDIO = 16_000  # samples, 1 s: the shortest batch that --window trim is tuned for


def whisper_config(model: str) -> WhisperConfig:
    """The configuration of a size by name, "packaged-base", a folder or a hub id.

    Raises:
        UserError: there is no such model, or it is not a Whisper.
    """
    size = "base" if model == PACKAGED else model
    if size in SIZES:
        width, encoder_layers, decoder_layers, mel_bins = SIZES[size]
        return WhisperConfig(
            d_model=width, encoder_layers=encoder_layers, decoder_layers=decoder_layers, num_mel_bins=mel_bins,
            encoder_ffn_dim=4 * width, decoder_ffn_dim=4 * width,
        )  # fmt: skip
    try:
        config = AutoConfig.from_pretrained(model)
    except (OSError, ValueError, KeyError, HFValidationError) as error:
        reason = str(error).strip().splitlines()[0]
        names = ", ".join(SIZES)
        raise UserError(
            f"{model}: not to be had as a Whisper ({reason}); give {names}, a hub id or a model folder"
        ) from error
    if not isinstance(config, WhisperConfig):
        raise UserError(f"{model}: a {config.model_type} model; give a Whisper, such as openai/whisper-small")
    return config


def encoder_positions(window: str, batch: int, most: int) -> list[int]:
    """Encoder positions that batches of `batch` utterances can have, one for each bucket of rows.

    Raises:
        UserError: `window` is neither full nor trim.
    """
    shortest = AudioWindow(window).mel_frames(_SHORTEST_AUDIO) // 2
    if window == "full" or shortest >= most:
        return [most]
    buckets = {rows_bucket(batch * positions): positions for positions in range(shortest, most + 1)}
    return list(buckets.values())


def layer_shapes(
    config: WhisperConfig,
    *,
    batches: Sequence[int] = (4,),
    tokens: int = 32,
    window: str = "full",
    rank: int = 8,
    dtype: torch.dtype = torch.bfloat16,
    weight_dtype: torch.dtype = torch.float32,
) -> dict[Shape, list[str]]:
    """The shapes of a training step of this Whisper, each with the names of the layers that have it.

    q, k and v of self-attention are a group of three, k and v of cross-attention a group of two.
    """
    width = config.d_model
    encoder_ffn, decoder_ffn = config.encoder_ffn_dim, config.decoder_ffn_dim
    on_audio = [
        ("encoder q, k, v", 3, width, width),
        ("encoder out", 1, width, width),
        ("encoder fc1", 1, width, encoder_ffn),
        ("encoder fc2", 1, encoder_ffn, width),
        ("cross k, v", 2, width, width),
    ]
    on_text = [
        ("decoder q, k, v", 3, width, width),
        ("decoder out, cross q, out", 1, width, width),
        ("decoder fc1", 1, width, decoder_ffn),
        ("decoder fc2", 1, decoder_ffn, width),
    ]
    shapes: dict[Shape, list[str]] = {}
    for batch in batches:
        audio = encoder_positions(window, batch, config.max_source_positions)
        for rows, maps in [*((batch * positions, on_audio) for positions in audio), (batch * tokens, on_text)]:
            for layers, group, inputs, outputs in maps:
                shape = shape_of(rows, inputs, outputs, rank, group, dtype, weight_dtype, True)
                named = shapes.setdefault(shape, [])
                if layers not in named:
                    named.append(layers)
    return shapes


def tune(
    model: str = PACKAGED,
    *,
    batches: Sequence[int] = (4,),
    tokens: int = 32,
    window: str = "full",
    rank: int = 8,
    precision: str = "auto",
    half_base: bool = False,
    chooser: Chooser | None = None,
    device: torch.device | None = None,
    console: Console | None = None,
) -> dict[Shape, Record | None]:
    """Times every strategy for every layer shape of `model`, remembers the fastest and prints a table.

    Raises:
        UserError: bad input.
    """
    check_precision(precision)
    for option, values in (("--batch", batches), ("--tokens", [tokens]), ("--rank", [rank])):
        if not values or min(values) < 1:
            raise UserError(f"{option} is {min(values, default=0)}; give at least 1")
    if rank > 256:
        raise UserError(f"--rank is {rank}; give at most 256")
    console, chooser = console or Console(), chooser or Chooser()
    dtype = autocast_dtype(precision) or torch.float32
    shapes = layer_shapes(
        whisper_config(model), batches=batches, tokens=tokens, window=window, rank=rank, dtype=dtype,
        weight_dtype=dtype if half_base else torch.float32,
    )  # fmt: skip
    device = device or torch.device("cuda", torch.cuda.current_device())
    candidates = candidates_of(s2_linear_group, (REFERENCE, *STRATEGIES))
    records: dict[Shape, Record | None] = {}
    for shape in shapes:
        with console.status(f"timing {shape.key}"):
            try:
                records[shape] = chooser.tune(shape, device, candidates)
            except torch.OutOfMemoryError:
                records[shape] = None
                console.print(f"no memory to time {shape.key}", style="yellow", markup=False, soft_wrap=True)
    labels = {shape.key: ", ".join(layers) for shape, layers in shapes.items()}
    _print_records(console, model, {shape.key: record for shape, record in records.items()}, labels)
    console.print(f"remembered in {chooser.file.path}", markup=False, soft_wrap=True)
    return records


def show(
    console: Console | None = None, file: StrategyFile | None = None, table: Mapping[str, Any] | None = None
) -> None:
    """Prints what is remembered, from which file, and the committed table."""
    console, file = console or Console(), file or StrategyFile()
    sections = file.read()
    if sections:
        console.print(f"remembered in {file.path}", markup=False, soft_wrap=True)
    else:
        console.print(f"nothing is remembered in {file.path}", markup=False, soft_wrap=True)
    _print_sections(console, sections)
    table = committed_table() if table is None else table
    console.print("shipped with this version:" if table else "no GPU's choices are shipped with this version")
    _print_sections(console, table)
    if os.environ.get(VARIABLE):
        console.print(f"{VARIABLE}={os.environ[VARIABLE]} overrides all of it")


def forget(file: StrategyFile | None = None) -> tuple[Path, bool]:
    """Deletes the file of remembered choices; its path and whether there was one.

    Raises:
        UserError: the file cannot be deleted.
    """
    file = file or StrategyFile()
    try:
        return file.path, file.forget()
    except OSError as error:
        raise UserError(f"{file.path}: cannot be deleted ({error.strerror})") from error


def _print_sections(console: Console, sections: Mapping[str, Any]) -> None:
    for section, records in sections.items():
        _print_records(console, section, {key: record_from(value) for key, value in records.items()}, {})


def _print_records(
    console: Console, title: str, records: Mapping[str, Record | None], layers: Mapping[str, str]
) -> None:
    """One row a shape: milliseconds of each strategy, the chosen one in bold, and its time over the frozen maps'."""
    tried = {name for record in records.values() if record for name in (*record.ms, *record.errors)}
    names = [REFERENCE, *sorted(tried - {REFERENCE, FROZEN}), FROZEN]
    table = Table(title=title, title_justify="left")
    for column in (*(["layers"] if layers else []), "shape"):
        table.add_column(column, overflow="fold")
    for column in (*(f"{name} ms" for name in names), "chosen", "/ frozen"):
        table.add_column(column, justify="right" if column != "chosen" else "left", overflow="fold")
    failed: dict[str, str] = {}
    for key, record in records.items():
        first = [layers[key], key] if layers else [key]
        if record is None:
            table.add_row(*first, *("" for _ in names), "none ran" if layers else "not readable", "")
            continue
        cells = [_cell(record, name) for name in names]
        over = f"{record.ms[record.strategy] / record.ms[FROZEN]:.2f}" if FROZEN in record.ms else ""
        table.add_row(*first, *cells, record.strategy, over)
        failed |= {f"{name}, {key}": error for name, error in record.errors.items()}
    console.print(table)
    for what, error in failed.items():
        console.print(f"{what}: {error}", style="yellow", markup=False, soft_wrap=True)


def _cell(record: Record, name: str) -> str:
    if name in record.errors:
        return "failed"
    if name not in record.ms:
        return ""
    milliseconds = f"{record.ms[name]:.3f}"
    return f"[bold]{milliseconds}[/bold]" if name == record.strategy else milliseconds
