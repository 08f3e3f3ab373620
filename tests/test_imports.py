"""Imports go one way, kernels <- fused_s2lora <- training <- bench, and a wheel holds all three packages."""

import ast
import importlib.metadata
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ORDER = ("kernels", "fused_s2lora", "training", "bench")
MODULES = sorted(
    file for layer in ORDER for file in (ROOT / layer).rglob("*.py") if "/fused_s2lora/kernels/" not in file.as_posix()
    and "/fused_s2lora/training/" not in file.as_posix()
)  # fmt: skip


def package_of(file: Path) -> str:
    """The package the file's relative imports start from."""
    layer = file.relative_to(ROOT).parts[0]
    return layer if layer in ("fused_s2lora", "bench") else f"fused_s2lora.{layer}"


def layer_of(module: str) -> str | None:
    """Which layer an absolute module name belongs to; None for other packages."""
    parts = module.split(".")
    if parts[0] == "bench":
        return "bench"
    if parts[0] != "fused_s2lora":
        return None
    return parts[1] if len(parts) > 1 and parts[1] in ("kernels", "training") else "fused_s2lora"


def imported(source: str, package: str) -> Iterator[str]:
    """Absolute names of every module imported anywhere in `source`, functions included."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            # `from package import name` may import the module package.name.
            yield from (f"{base}.{alias.name}" for alias in node.names)


def violations(source: str, package: str) -> list[str]:
    """Imports that point up the order, or that kernels may not have at all."""
    own = ORDER.index(layer_of(package) or "bench")
    found = []
    for module in imported(source, package):
        layer = layer_of(module)
        outside = module.split(".")[0]
        if layer is not None and ORDER.index(layer) > own:
            found.append(f"{package} imports {module}")
        if own == 0 and layer is None and outside not in {"torch", "triton", *sys.stdlib_module_names}:
            found.append(f"kernels import {module}, not only torch and triton")
    return found


@pytest.mark.parametrize("file", MODULES, ids=lambda file: file.relative_to(ROOT).as_posix())
def test_imports_go_one_way(file: Path) -> None:
    assert violations(file.read_text(), package_of(file)) == []


@pytest.mark.parametrize(
    ("source", "package"),
    [
        ("import numpy", "fused_s2lora.kernels"),
        ("from ..config import S2LoraConfig", "fused_s2lora.kernels"),
        ("from fused_s2lora import S2LoraConfig", "fused_s2lora.kernels"),
        ("def late():\n    from .training.cli import main", "fused_s2lora"),
        ("from . import training", "fused_s2lora"),
        ("import fused_s2lora.training.cli", "fused_s2lora"),
        ("from bench.measure import record", "fused_s2lora.training"),
    ],
)
def test_a_planted_violation_is_found(source: str, package: str) -> None:
    assert violations(source, package)


@pytest.mark.parametrize(
    ("source", "package"),
    [
        ("import os, torch\nimport triton.language as tl\nfrom .configs import LINEAR", "fused_s2lora.kernels"),
        ("from .kernels.s2_linear import s2_linear", "fused_s2lora"),
        ("from fused_s2lora import S2LoraConfig\nfrom .errors import UserError", "fused_s2lora.training"),
    ],
)
def test_an_allowed_import_is_not_reported(source: str, package: str) -> None:
    assert violations(source, package) == []


def test_every_layer_was_looked_at() -> None:
    assert {file.relative_to(ROOT).parts[0] for file in MODULES} == set(ORDER)


@pytest.mark.parametrize("folder", ["kernels", "training"])
def test_real_folders_are_no_top_level_packages(folder: str) -> None:
    assert (ROOT / folder).is_dir()
    assert not (ROOT / folder / "__init__.py").exists()


def run_python(code: str) -> str:
    """What `code` prints in a new Python that starts in the project's root, which is on its path."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_transformers_is_imported_from_the_root_and_the_package_never_reaches_training() -> None:
    code = """
import sys
import transformers
from transformers import WhisperForConditionalGeneration
import fused_s2lora
print([name for name in sys.modules if name.startswith("fused_s2lora.training")], "fused_s2lora.kernels" in sys.modules)
"""
    assert run_python(code) == "[] True"


def test_a_wheel_holds_the_three_packages(tmp_path: Path) -> None:
    version = importlib.metadata.version("setuptools") if _installed("setuptools") else "0"
    if int(version.split(".")[0]) < 77:
        pytest.skip(f"a wheel is built with setuptools 77 or newer; here is {version}")
    tree = tmp_path / "tree"
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if files.returncode != 0:
        pytest.skip("not a git checkout, so there is no list of the project's files")
    for name in filter(None, files.stdout.split("\0")):
        _copy(ROOT / name, tree / name)
    command = ["-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path, tree]
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("fused_s2lora-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        sizes = {entry.filename: entry.file_size for entry in archive.infolist()}
    for name in ("__init__.py", "config.py", "kernels/s2_linear.py", "training/cli.py", "training/train.py"):
        assert sizes.get(f"fused_s2lora/{name}", 0) > 100, f"{name} is missing or no real file in {sorted(sizes)}"
    assert "fused_s2lora/kernels/tuned.json" in sizes
    assert not any(name.startswith(("kernels/", "training/", "bench/", "tests/")) for name in sizes)


def _installed(name: str) -> bool:
    return any(distribution.name == name for distribution in importlib.metadata.distributions())


def _copy(source: Path, target: Path) -> None:
    if not source.exists() and not source.is_symlink():
        return  # deleted in the working tree
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_symlink():
        target.symlink_to(source.readlink())
    else:
        target.write_bytes(source.read_bytes())
