"""A benchmark's case with all its providers, small enough for a test."""

from bench.cases import Case, Operands, make_operands
from bench.providers import Provided, providers
from tests.oracle import DEVICE

TINY = (32, 1, 1, 80)  # width, layers of encoder and decoder, mel bins
NO_COMPILER = ("s2-compiled",)  # takes seconds each; tests of its own


def built(case: Case) -> tuple[dict[str, list[Provided]], list[Operands]]:
    """Every provider but the compiled one, for each group of the case, and the groups' operands."""
    groups = make_operands(case, DEVICE)
    found = providers(case, DEVICE).items()
    return {name: [build(group) for group in groups] for name, build in found if name not in NO_COMPILER}, groups
