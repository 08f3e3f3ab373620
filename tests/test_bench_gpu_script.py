"""bench/gpu.sh without a GPU: a stand-in for Python, and tests that have a second instead of three minutes."""

import os
import re
import signal
import stat
import subprocess
from pathlib import Path

from tests.conftest import ROOT

# Its tests end when they are interrupted, and tell then what failed, as pytest does; its benchmarks are cut short.
PYTHON = """#!/usr/bin/env bash
trap 'echo "FAILED test_of_a_kernel"; exit 2' INT
echo "$@" >> "$CALLS"
if [ "$2" = pytest ]; then
    for _ in $(seq 300); do sleep 0.1; done
fi
[ "$2" != bench.run ] || exit 124
"""
TIMEOUT = """#!/usr/bin/env bash
exec "$REAL" "${@/#180/1}"
"""


def script(folder: Path, name: str, text: str) -> Path:
    file = folder / name
    file.write_text(text)
    file.chmod(file.stat().st_mode | stat.S_IXUSR)
    return file


def test_what_takes_too_long_leaves_what_was_found(tmp_path):
    commands = tmp_path / "commands"
    commands.mkdir()
    python = script(commands, "python-in-hand", PYTHON)
    real = subprocess.run(["which", "timeout"], capture_output=True, text=True, check=True).stdout.strip()
    script(commands, "timeout", TIMEOUT)
    calls, results = tmp_path / "calls.txt", tmp_path / "results"
    environment = {"PATH": f"{commands}:{os.environ['PATH']}", "PYTHON": str(python), "CALLS": str(calls), "REAL": real}
    done = subprocess.run(
        ["bash", str(ROOT / "bench" / "gpu.sh"), "results"], cwd=tmp_path, env={**os.environ, **environment},
        capture_output=True, text=True, timeout=60,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )  # fmt: skip
    assert "FAILED test_of_a_kernel" in (results / "gpu-tests.txt").read_text()
    assert "FAILED test_of_a_kernel" in done.stdout
    assert done.returncode == 1
    asked, tests, benchmarks, tables = calls.read_text().splitlines()
    assert "cuda.is_available" in asked
    assert "-m pytest tests/training/test_cuda_graphs.py tests/kernels tests/fused_s2lora" in tests
    assert re.fullmatch(rf"-m bench\.run --minutes [67] --results {re.escape(str(results))}", benchmarks)
    assert tables == f"-m bench.report {results}"
