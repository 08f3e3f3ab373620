"""Tiles of the kernels, timed beside those in use, where one would look for better ones.

    python -m bench.tiles [--minutes 3] [--results FOLDER]

A CUDA GPU is needed. All builds are compiled first, by as many processes as there are cores; then each is timed alone,
with the L2 cache written over between calls. Nothing is checked here, nor changed: what is faster goes by hand into
`kernels/configs.py`, where tests hold it to float64 and to no spilled register on any target.
"""

import contextlib
import functools
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import torch
import typer
from torch import Tensor
from triton.testing import do_bench

from bench.measure import RESULTS, reason_of, record
from fused_s2lora.kernels import configs, layer_norm, merge
from fused_s2lora.kernels.activation import gelu_input_gradient
from fused_s2lora.kernels.adapter_gradients import adapter_gradients
from fused_s2lora.kernels.configs import LinearConfig, MergeConfig, PassConfig, PassTiles, TallConfig
from fused_s2lora.kernels.fused import fused_linear
from fused_s2lora.kernels.project import project
from fused_s2lora.kernels.row_sums import tall_product

RANK = 8
Call = Callable[[], Any]


@dataclass(frozen=True)
class Trial:
    """A kernel on operands of some size with some tiles; `place` is where the tiles in use are."""

    kernel: str
    sizes: dict[str, int]
    tiles: Any
    place: Callable[[], contextlib.AbstractContextManager]
    make: Callable[..., Call]


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16, device: str = "cuda") -> Tensor:
    """Random operands of unit scale."""
    return torch.randn(*shape, device=device).to(dtype)


def _adapter_gradients(device: str, dtype: torch.dtype, M: int, N: int, G: int) -> Call:
    dys, z = [normal(M, N, dtype=dtype, device=device) for _ in range(G)], normal(M, RANK, dtype=dtype, device=device)
    up, g, d_up = (normal(size, RANK, dtype=torch.float32, device=device) for size in (N, M, N))
    coefficients = normal(G, RANK, dtype=torch.float32, device=device)
    return lambda: adapter_gradients(dys, z, up, coefficients, g, d_up, None, None, add_to_g=False)


def _project(device: str, dtype: torch.dtype, M: int, K: int) -> Call:
    x, down = normal(M, K, dtype=dtype, device=device), normal(RANK, K, dtype=torch.float32, device=device)
    return lambda: project(x, down)


def _tall(device: str, dtype: torch.dtype, M: int, K: int, of_gelu: bool) -> Call:
    x = normal(M, K, dtype=dtype, device=device)
    g = normal(M, RANK, dtype=torch.float32, device=device)
    return lambda: tall_product([x], g, None, of_gelu=of_gelu)


def _merge(device: str, dtype: torch.dtype, N: int, K: int, G: int) -> Call:
    weights = [normal(N, K, dtype=dtype, device=device) for _ in range(G)]
    factors = [normal(*shape, dtype=torch.float32, device=device) for shape in ((RANK, K), (N, RANK), (G, RANK))]
    seed = torch.ones(1, dtype=torch.int64)
    return lambda: merge.merge_weights(weights, *factors, dtype, seed)


def _fused(device: str, dtype: torch.dtype, M: int, N: int, K: int) -> Call:
    x, weight = normal(M, K, dtype=dtype, device=device), normal(N, K, dtype=dtype, device=device)
    down, up = normal(RANK, K, dtype=dtype, device=device), normal(N, RANK, dtype=dtype, device=device)
    coefficients = normal(RANK, dtype=torch.float32, device=device)
    return lambda: fused_linear(x, weight, None, down, up, coefficients, want_z=False, variant="tiles")


def _layer_norm(device: str, dtype: torch.dtype, M: int, K: int) -> Call:
    x, down, weight = (normal(*s, dtype=torch.float32, device=device) for s in ((M, K), (RANK, K), (K,)))
    return lambda: layer_norm.layer_norm_project(x, weight, weight, 1e-5, down, dtype, 0)


def _layer_norm_gradient(device: str, dtype: torch.dtype, M: int, K: int) -> Call:
    x, weight, mean = (normal(*s, dtype=torch.float32, device=device) for s in ((M, K), (K,), (M,)))
    dh = normal(M, K, dtype=dtype, device=device)
    return lambda: layer_norm.layer_norm_input_gradient(dh, x, weight, mean, mean)


def _gelu_gradient(device: str, dtype: torch.dtype, M: int, K: int) -> Call:
    dh, x = normal(M, K, dtype=dtype, device=device), normal(M, K, dtype=dtype, device=device)
    return lambda: gelu_input_gradient(dh, x)


def _pass_tiles(few: bool, group: int) -> list[PassConfig]:
    in_use = configs.PASS[configs.pass_config_name(512 if few else 24_000, group, 16, torch.bfloat16)]
    rows = (16, 32) if few else (16, 32, 64, 128)
    shapes = [(m, n) for m in rows for n in (64, 128, 256) if m * n * group <= 1 << 14]
    return [in_use, *(PassConfig(m, n, warps, stages) for m, n in shapes for warps, stages in ((4, 4), (4, 3), (8, 3)))]


def trials(rows: Sequence[int], width: int) -> Iterator[Trial]:
    """What is tried for Whispers of that width, for many and for few rows; the tiles in use first, in bfloat16."""
    inner = 4 * width

    def trial(kernel: str, sizes: dict[str, int], make: Any, tiles: Any, table: dict[str, Any], name: str) -> Trial:
        return Trial(kernel, sizes, tiles, lambda: mock.patch.dict(table, {name: tiles}), make)

    for M in rows:
        few = M <= 4096
        for N, G in ((width, 1), (inner, 1), (width, 3)):
            for tiles in _pass_tiles(few, G):
                name = configs.pass_config_name(M, G, 16, torch.bfloat16)
                yield trial("output gradients", {"M": M, "N": N, "G": G}, _adapter_gradients, tiles, configs.PASS, name)
        for K in (width, inner):
            name = configs.pass_config_name(M, 1, 16, torch.bfloat16)
            for tiles in [configs.PROJECT[name], *_pass_tiles(few, 1)]:
                yield trial("project", {"M": M, "K": K}, _project, tiles, configs.PROJECT, name)
            for gelu in (False, True):
                make = functools.partial(_tall, of_gelu=gelu)
                name = configs.tall_config_name(16, torch.bfloat16, gelu)
                shapes = ((c, m, w, s) for c in (128, 256) for m in (32, 64) for w, s in ((4, 4), (8, 3), (8, 4)))
                others = [TallConfig(*shape, programs=count) for shape in shapes for count in (264, 528)]
                for tiles in [configs.TALL[name], *others]:
                    kernel = "tall product" + (", GELU" if gelu else "")
                    yield trial(kernel, {"M": M, "K": K}, make, tiles, configs.TALL, name)
        for N, K in ((width, width), (inner, width), (width, inner)) if few else ():
            name = configs.fused_config_name(M, 16, torch.bfloat16, configs.SHARED_MEMORY["90"], accumulate=False)
            in_use = configs.LINEAR[name]
            shapes = ((m, n, k) for m in (64, 128) for n in (64, 128) for k in (64, 128))
            others = [LinearConfig(*shape, 4, w, s) for shape in shapes for w, s in ((4, 3), (4, 4), (8, 3))]
            for tiles in [in_use, *others]:
                yield trial("fused tiles", {"M": M, "N": N, "K": K}, _fused, tiles, configs.LINEAR, name)
        for kernel, make, attribute in (
            ("layer norm", _layer_norm, "NORM"),
            ("layer norm, gradient", _layer_norm_gradient, "NORM_INPUT_GRADIENT"),
        ):
            others = [PassTiles(m, k, w) for m in (2, 4, 8, 16) for k, w in ((128, 4), (128, 8), (256, 8))]
            for tiles in [getattr(layer_norm, attribute), *others]:
                place = _attribute(layer_norm, attribute, tiles)
                yield Trial(kernel, {"M": M, "K": width}, tiles, place, make)
        others = [PassTiles(m, k, 4) for m, k in ((64, 64), (32, 128), (16, 256), (8, 512))]
        for tiles in [configs.ACTIVATION_INPUT_GRADIENT["half precision"], *others]:
            table = configs.ACTIVATION_INPUT_GRADIENT
            yield trial("GELU, gradient", {"M": M, "K": inner}, _gelu_gradient, tiles, table, "half precision")
    for N, K, G in ((width, width, 3), (width, width, 1), (inner, width, 1), (width, inner, 1)):
        others = [MergeConfig(n, k, w) for n in (16, 32, 64) for k in (64, 128, 256) for w in (4, 8)]
        for tiles in [merge.MERGE, *others]:
            yield Trial("merge", {"N": N, "K": K, "G": G}, tiles, _attribute(merge, "MERGE", tiles), _merge)


def _attribute(module: Any, name: str, value: Any) -> Callable[[], contextlib.AbstractContextManager]:
    return lambda: mock.patch.object(module, name, value)


def run(trial: Trial, time_ms: Callable[[Call], float], device: str, dtype: torch.dtype) -> dict[str, Any]:
    """A result row: microseconds, or why the tiles cannot be used."""
    row = {"section": "tiles", "kernel": trial.kernel, **trial.sizes, "tiles": str(trial.tiles)}
    try:
        with trial.place():
            call = trial.make(device, dtype, **trial.sizes)
            call()
            return row | {"kind": "measured", "us": round(1e3 * time_ms(call), 2)}
    except Exception as error:  # too much shared memory, say
        return row | {"kind": "refused", "reason": reason_of(error)}


def _on_gpu(call: Call) -> float:
    return do_bench(call, warmup=4, rep=20, return_mode="median")


def _build(indices: Sequence[int], rows: Sequence[int], width: int) -> None:
    chosen = list(trials(rows, width))
    for index in indices:
        run(chosen[index], lambda call: 0.0, "cuda", torch.bfloat16)


def main(
    minutes: Annotated[float, typer.Option(help="Time nothing more after so many.")] = 3.0,
    width: Annotated[int, typer.Option(help="Of the Whisper: 1280 is large-v3.")] = 1280,
    rows: Annotated[list[int], typer.Option(help="Rows M. Repeat.")] = [24_000, 512],  # noqa: B006
    results: Annotated[Path, typer.Option(help="Folder of tiles.jsonl.")] = RESULTS,
) -> None:
    """Times tiles of every kernel and prints the five fastest of each, and those in use."""
    if not torch.cuda.is_available():
        raise typer.BadParameter("tiles are timed on a CUDA GPU, and torch sees none")
    began = time.monotonic()
    chosen = list(trials(rows, width))
    workers = min(16, os.cpu_count() or 1)
    context = multiprocessing.get_context("spawn")
    with context.Pool(workers) as pool:
        pool.starmap(_build, [(range(first, len(chosen), workers), rows, width) for first in range(workers)])
    found: dict[str, list[dict[str, Any]]] = {}
    for trial in chosen:
        if time.monotonic() - began > 60 * minutes:
            print("no time for the rest: give --minutes more")
            break
        row = run(trial, _on_gpu, "cuda", torch.bfloat16)
        found.setdefault(f"{trial.kernel} {trial.sizes}", []).append(row)
    record(results / "tiles.jsonl", [row for rows_of in found.values() for row in rows_of])
    for name, rows_of in found.items():
        print(name, "· in use:", rows_of[0].get("us", rows_of[0].get("reason")), "µs")
        for row in sorted((row for row in rows_of if "us" in row), key=lambda row: row["us"])[:5]:
            print(f"    {row['us']:8.1f} µs  {row['tiles']}")


if __name__ == "__main__":
    typer.run(main)
