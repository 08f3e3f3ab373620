"""A benchmark's case with all its providers, small enough for a test."""

import pytest

from bench import cases
from bench.cases import PRECISIONS, Case, Operands, make_operands
from bench.providers import Provided, providers
from bench.roofline import Device
from tests.oracle import DEVICE

TINY = (32, 1, 1, 80)  # width, layers of encoder and decoder, mel bins
DEVICE_IN_HAND = Device(DEVICE, 10.0, dict.fromkeys(PRECISIONS, 0.1))
NO_COMPILER = ("s2-compiled",)  # takes seconds each; tests of its own


def built(case: Case) -> tuple[dict[str, list[Provided]], list[Operands]]:
    """Every provider but the compiled one, for each group of the case, and the groups' operands."""
    groups = make_operands(case, DEVICE)
    found = providers(case, DEVICE).items()
    return {name: [build(group) for group in groups] for name, build in found if name not in NO_COMPILER}, groups


def make_small(patch: pytest.MonkeyPatch) -> None:
    """Sizes of a test's own under the names `tiny` and `base`."""
    patch.setitem(cases.SIZES, "tiny", TINY)
    patch.setitem(cases.SIZES, "base", (64, 1, 1, 80))
