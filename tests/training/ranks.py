"""Code run in two processes of one world, as torchrun starts them, but forked from one that has imported all."""

import multiprocessing
import os
import socket
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

ALONE = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}  # NCCL does not give one GPU to two


def run_ranks(code: str, *arguments: Any, output: Path | None = None) -> None:
    """Runs `code` with these `sys.argv[1:]` in two ranks and waits for both to end well; both print to `output`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fused_s2lora.training.train", "transformers.models.whisper.modeling_whisper"])
    ranks = []
    with patch.dict(os.environ, ALONE):  # the first call starts the process that the ranks are forked from
        for rank in range(2):
            environment = {**os.environ, **world, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            ranks.append(context.Process(target=_rank, args=(code, [*map(str, arguments)], environment, output)))
            ranks[-1].start()
    try:
        for rank in ranks:
            rank.join(timeout=300)
        assert [rank.exitcode for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()  # else it waits for the one that failed


def _rank(code: str, arguments: list[str], environment: dict[str, str], output: Path | None) -> None:
    os.environ.clear()
    os.environ.update(environment)
    sys.argv[1:] = arguments
    if output is not None:
        with output.open("a") as stream:
            os.dup2(stream.fileno(), 1)
    exec(compile(code, "<rank>", "exec"), {"__name__": "__main__"})
