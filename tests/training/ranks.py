"""Code run in two processes of one world, as torchrun starts them."""

import os
import socket
import subprocess
import sys
from typing import Any


def run_ranks(code: str, *arguments: Any) -> None:
    """Runs `code` with these `sys.argv[1:]` in two ranks and waits for both to end well."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    world |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}  # NCCL does not give one GPU to two
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", code, *map(str, arguments)],
            env={**os.environ, **world, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    try:
        assert [rank.wait(timeout=300) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()  # else it waits for the one that failed
