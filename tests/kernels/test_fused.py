"""The fused strategy in both variants: output, z, input gradient, accumulation, against float64."""

from collections.abc import Callable

import pytest
import torch
import triton
from torch import Tensor

from fused_s2lora import s2_linear_reference
from fused_s2lora.kernels import fused
from fused_s2lora.kernels.configs import PERSISTENT, fused_variant, persistent_obstacle
from fused_s2lora.kernels.fused import fused_linear, fused_linear_add_op, fused_linear_op
from fused_s2lora.kernels.fused_persistent import describable, descriptors_serve
from tests.oracle import DEVICE, FLOOR, check_close, eager_linear

ON_GPU = DEVICE == "cuda"
CAN_PERSIST = not ON_GPU or torch.cuda.get_device_capability()[0] in PERSISTENT
HALF = torch.float16
DTYPES = [
    torch.float32,
    torch.float16,
    pytest.param(
        torch.bfloat16,
        marks=pytest.mark.skipif(not ON_GPU, reason="Triton's interpreter multiplies bfloat16 wrongly; needs a GPU"),
    ),
]
VARIANTS = [
    "tiles",
    pytest.param(
        "persistent", marks=pytest.mark.skipif(not CAN_PERSIST, reason="needs compute capability 9.x or 10.x")
    ),
]
SHAPES = {
    "one of each": (1, 1, 1, 1),
    "one row": (1, 64, 48, 8),
    "63": (63, 63, 63, 3),
    "no block divides": (130, 70, 200, 17),
    "rank 32": (65, 40, 72, 32),
    "several tiles a program": (260, 40, 264, 8),
    "rank 256": (66, 70, 40, 256),
    "no rows": (0, 16, 16, 4),
}


def skip_what_cannot_persist(variant: str, dtype: torch.dtype, outputs: int, rank: int) -> None:
    """Skips what the persistent variant does not serve, with the reason."""
    if variant != "persistent":
        return
    if rank > 32:
        pytest.skip("the persistent variant serves ranks up to 32")
    if outputs * dtype.itemsize % 16:
        pytest.skip("a row of y is no multiple of 16 bytes")
    if ON_GPU and dtype == torch.float32:
        pytest.skip("on a GPU the persistent variant is for half precision")


class Operands:
    """Random operands; x, weight and dy lie in larger buffers of NaN whose rows are multiples of 16 bytes."""

    def __init__(self, rows, inputs, outputs, rank, dtype, *, bias=True, factor_dtype=torch.float32, seed=0):
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int, scale: float = 1.0, dtype: torch.dtype = dtype) -> Tensor:
            return (torch.randn(*shape, generator=generator) * scale).to(DEVICE, dtype)

        self.x = padded(normal(rows, inputs))
        self.weight = padded(normal(outputs, inputs, scale=inputs**-0.5))
        self.bias = normal(outputs) if bias else None
        self.down = normal(rank, inputs, scale=inputs**-0.5, dtype=factor_dtype)
        self.up = normal(outputs, rank, dtype=factor_dtype)
        self.coefficients = normal(rank, scale=0.5, dtype=factor_dtype)

    def forward(self) -> tuple[Tensor | None, ...]:
        return self.x, self.weight, self.bias, self.down, self.up, self.coefficients

    def backward(self, dy: Tensor) -> tuple[Tensor | None, ...]:
        """What gives the gradient of x, from `dy` [M, N]."""
        return dy, self.weight.mT, None, self.up.mT, self.down.mT, self.coefficients


def padded(values: Tensor) -> Tensor:
    columns = values.shape[1]
    buffer = torch.full((values.shape[0], -(-columns // 8) * 8 + 16), torch.nan, dtype=values.dtype, device=DEVICE)
    buffer[:, :columns] = values
    return buffer[:, :columns]


def judge(operands, got: tuple[Tensor, Tensor | None], start: Tensor | None = None, z: Tensor | None = None) -> None:
    """Fails unless y (plus `start`) and z are the equation's, by the yardstick of `tests/oracle.py`."""
    floor = FLOOR[operands[0].dtype]
    names = ("x", "weight", "bias", "down", "up", "coefficients")
    double = {name: None if value is None else value.double() for name, value in zip(names, operands, strict=True)}
    expected, eager = s2_linear_reference(**double), eager_linear(**dict(zip(names, operands, strict=True)))
    if start is not None:
        expected, eager = expected + start.double(), eager + start
    y, got_z = got
    check_close("y", y, expected, eager, floor)
    if got_z is not None and z is None:
        x, down = operands[0], operands[3]
        terms = double["x"].abs() @ double["down"].abs().mT
        check_close("z", got_z, double["x"] @ double["down"].mT, x @ down.to(x.dtype).mT, floor, terms)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Outputs start as NaN; what a kernel leaves out would stay so."""
    monkeypatch.setattr(
        torch.Tensor, "new_empty", lambda self, *shape, **kwargs: self.new_full(shape, torch.nan, **kwargs)
    )


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_output_and_z(shape, dtype, variant):
    skip_what_cannot_persist(variant, dtype, shape[2], shape[3])
    operands = Operands(*shape, dtype).forward()
    judge(operands, fused_linear(*operands, variant=variant))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(70, 72, 136, 17), (130, 264, 70, 8), (1, 48, 64, 1)], ids=str)
def test_input_gradient_on_transposed_operands(shape, dtype, variant):
    rows, inputs, outputs, rank = shape
    skip_what_cannot_persist(variant, dtype, inputs, rank)
    problem = Operands(*shape, dtype)
    dy = padded(torch.randn(rows, outputs).to(DEVICE, dtype))
    operands = problem.backward(dy)
    assert variant == "tiles" or descriptors_serve(dy, operands[1], torch.empty(rows, inputs, dtype=dtype))
    judge(operands, fused_linear(*operands, variant=variant))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(130, 70, 136, 17), (66, 40, 72, 70)], ids=["rank 17", "rank 70"])
def test_given_z_is_used(shape, dtype, variant):
    skip_what_cannot_persist(variant, dtype, shape[2], shape[3])
    operands = list(Operands(*shape, dtype).forward())
    x, _, _, down, *_ = operands
    z = padded(x @ down.to(dtype).mT)
    operands[3] = torch.full_like(down, torch.nan)  # nothing reads down
    y, same_z = fused_linear(*operands, z, variant=variant)
    assert same_z is z
    operands[3] = down
    judge(operands, (y, z), z=z)
    doubled, _ = fused_linear(*operands, 2 * z, variant=variant)
    assert not torch.allclose(doubled, y)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("given", [False, True], ids=["z computed", "z given"])
def test_launches_add_up_in_one_output(dtype, variant, given):
    """The input gradient of a group: q, k and v add into one dx."""
    rows, inputs, outputs, rank = 70, 72, 40, 8
    skip_what_cannot_persist(variant, dtype, inputs, rank)
    # A dx that is part of a wider buffer, with NaN beyond its columns.
    dx = padded(torch.zeros(rows, inputs, dtype=dtype, device=DEVICE))
    for seed in range(2):
        dy = padded(torch.randn(rows, outputs).to(DEVICE, dtype))
        operands = Operands(rows, inputs, outputs, rank, dtype, seed=seed).backward(dy)
        g = dy @ operands[3].to(dtype).mT if given else None
        before = dx.clone()
        y, z = fused_linear(*operands, g, dx, variant=variant)
        assert y is dx
        judge(operands, (dx, z), start=before, z=g)


@pytest.mark.parametrize("variant", VARIANTS)
def test_unwanted_z_is_not_written(variant):
    operands = Operands(65, 40, 48, 8, HALF, bias=False).forward()
    y, z = fused_linear(*operands, want_z=False, variant=variant)
    assert z is None
    judge(operands, (y, z))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("factor_dtype", [HALF, torch.float32], ids=str)
def test_factors_of_any_strides_and_dtype(variant, factor_dtype):
    problem = Operands(65, 40, 48, 8, HALF, factor_dtype=factor_dtype)
    x, weight, bias, down, up, coefficients = problem.forward()
    turned = (x, weight, bias, down.T.contiguous().T, up.T.contiguous().T, coefficients)
    judge(turned, fused_linear(*turned, variant=variant))
    spread = (x, weight, bias, torch.stack([down] * 3, 2)[..., 1], torch.stack([up] * 3, 2)[..., 1], coefficients)
    judge(spread, fused_linear(*spread, variant=variant))


@pytest.mark.parametrize("variant", VARIANTS)
def test_coefficients_and_bias_of_any_stride(variant):
    """One scalar a weight comes as an expanded tensor, with nothing of ours behind it in memory."""
    x, weight, bias, down, up, _ = Operands(65, 40, 48, 8, HALF).forward()
    scalar = torch.full((9,), torch.nan, device=DEVICE)
    scalar[0] = 0.5
    spread = torch.stack([bias, torch.full_like(bias, torch.nan)], 1)[:, 0]
    operands = (x, weight, spread, down, up, scalar[:1].expand(8))
    judge(operands, fused_linear(*operands, variant=variant))


def test_tiles_take_any_strides():
    problem = Operands(65, 40, 48, 8, torch.float32)
    x, weight, bias, *factors = problem.forward()
    out = torch.zeros(48, 65, device=DEVICE).T
    turned = (x.T.contiguous().T, torch.stack([weight] * 2, 2)[..., 0], bias, *factors)
    judge(turned, fused_linear(*turned, out=out, variant="tiles"), start=torch.zeros_like(out))


def test_persistent_by_name_never_falls_back():
    x, *rest = Operands(65, 40, 48, 8, HALF).forward()
    with pytest.raises(ValueError, match="cannot serve these operands"):
        fused_linear(x.T.contiguous().T, *rest, variant="persistent")
    with pytest.raises(ValueError, match="cannot serve these operands"):
        fused_linear(*Operands(65, 40, 48, 33, HALF).forward(), variant="persistent")
    with pytest.raises(ValueError, match="variant is 'fast'"):
        fused_linear(x, *rest, variant="fast")


def test_what_tma_can_read():
    matrix = torch.empty(20, 24, dtype=HALF)
    assert describable(matrix)
    assert describable(matrix[:, 8:])
    assert not describable(matrix[:, 4:])  # starts 8 bytes into a 16-byte unit
    assert not describable(matrix.mT)
    assert not describable(torch.empty(20, 20, dtype=HALF))  # rows of 40 bytes
    assert not describable(matrix[:1].expand(20, 24))
    assert not describable(matrix[:0])
    assert descriptors_serve(matrix, matrix.mT, matrix)
    assert not descriptors_serve(matrix, matrix, matrix.mT)


def test_auto_is_persistent_where_it_can_serve_and_has_enough_tiles():
    def chosen(capability=(9, 0), dtype=torch.bfloat16, padded_rank=16, descriptors=True, rows=24_000, outputs=1280):
        return fused_variant(capability, dtype, padded_rank, descriptors, rows, outputs, 132)

    old = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7)  # does not compile it for Blackwell
    assert chosen() == chosen(padded_rank=32) == "persistent"
    assert chosen(capability=(10, 0)) == ("tiles" if old else "persistent")
    refused = [
        {"capability": None}, {"capability": (8, 0)}, {"capability": (12, 0)}, {"dtype": torch.float32},
        {"padded_rank": 64}, {"descriptors": False}, {"rows": 1500},
    ]  # fmt: skip
    assert [chosen(**facts) for facts in refused] == ["tiles"] * len(refused)
    assert persistent_obstacle((9, 0), HALF, 16, True) is None
    capabilities = "capability 9.x" if old else "capability 9.x or 10.x"
    assert str(persistent_obstacle((8, 6), HALF, 16, True)).endswith(capabilities)


@pytest.mark.parametrize("variant", VARIANTS)
def test_faults_are_caught(variant, monkeypatch):
    """No wrong strip, lost coefficient, bias, earlier sum or z may pass this file's judgement."""
    operands = Operands(66, 72, 72, 8, HALF).forward()
    start = torch.randn(66, 72).to(DEVICE, HALF)

    def refused(got: tuple[Tensor, Tensor | None], start: Tensor | None = None) -> None:
        with pytest.raises(AssertionError):
            judge(operands, got, start)

    def changed(position: int, change: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor | None]:
        wrong = list(operands)
        wrong[position] = change(wrong[position])
        return fused_linear(*wrong, variant=variant)

    y, z = fused_linear(*operands, variant=variant)
    refused((torch.cat([y[:, :-8], y[:, -8:] * 0], 1), z))
    refused((torch.cat([y[:-1], y[-1:] * 0]), z))
    refused((y, torch.cat([z[:-1], z[-1:] * 0])))
    refused(changed(2, torch.zeros_like))
    refused(changed(3, lambda down: down.flip(0)))
    refused(changed(5, lambda coefficients: coefficients * (torch.arange(8, device=DEVICE) > 0)))
    refused(fused_linear(*operands, z * 0, variant=variant))
    refused((y, z), start)
    # A launcher that forgets to write z, and one that overwrites what it should add to.
    run = fused._launch
    monkeypatch.setattr(fused, "_launch", lambda *a, **k: run(*a, **k).fill_(torch.nan))
    refused(fused_linear(*operands, variant=variant))
    monkeypatch.setattr(fused, "_launch", lambda *a, accumulate: run(*a, accumulate=False))
    refused(fused_linear(*operands, out=start.clone(), variant=variant), start)


def test_operators_are_well_formed_and_compile():
    operands = Operands(33, 40, 48, 8, torch.float32).forward()
    tests = ("test_schema", "test_faketensor")
    z, out = operands[0] @ operands[3].mT, torch.zeros(33, 48, device=DEVICE)
    for given, want_z in ((None, True), (None, False), (z, True)):
        torch.library.opcheck(fused_linear_op.op, (*operands, given, want_z, "auto"), test_utils=tests)
        torch.library.opcheck(fused_linear_add_op.op, (*operands, given, out, want_z, "auto"), test_utils=tests)

    def group(x, out):
        y, z = fused_linear(x, *operands[1:])
        fused_linear(x, *operands[1:], z, out)
        return y, z

    y, z = torch.compile(group, fullgraph=True, backend="aot_eager")(operands[0], out)
    judge(operands, (y, z))
    judge(operands, (out, None), start=torch.zeros_like(out))
