"""LayerNorm and GELU that make z as well, with spare columns and without, against float64."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fused_s2lora.kernels import activation, device, layer_norm, producers
from fused_s2lora.kernels.configs import rank_block
from tests.oracle import DEVICE, FLOOR, check_close

ON_GPU = DEVICE == "cuda"
SHAPES = {
    "one of each": (1, 1, 1),
    "63": (63, 63, 1),
    "no block divides": (21, 200, 20),
    "one row": (1, 384, 8),
    "rank 64": (9, 130, 64),
    "rank 256": (5, 70, 256),
    "no rows": (0, 16, 4),
}
BFLOAT16 = pytest.param(
    torch.bfloat16,
    marks=pytest.mark.skipif(not ON_GPU, reason="Triton's interpreter multiplies bfloat16 wrongly; needs a GPU"),
)
# x and what h is stored in: the residual stream stays in float32 under autocast.
DTYPES = [
    (torch.float32, torch.float32),
    (torch.float32, torch.float16),
    (torch.float16, torch.float16),
    pytest.param((torch.bfloat16, torch.bfloat16), marks=BFLOAT16.marks),
    pytest.param((torch.float32, torch.bfloat16), marks=BFLOAT16.marks),
]
OPERATIONS = ("layer norm", "gelu")
EPS = 1e-5


@pytest.fixture(autouse=True)
def kernels_run(monkeypatch):
    """In Triton's interpreter where there is no GPU."""
    monkeypatch.setattr(device, "runs_triton", lambda x: device.triton_is_usable(x)[0])


def normal(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return (torch.randn(*shape, generator=generator) * scale).to(DEVICE, dtype)


def padded(values: Tensor) -> Tensor:
    """The same values inside a larger matrix of NaN, so that reading past an edge shows."""
    buffer = torch.full((values.shape[0], values.shape[1] + 7), torch.nan, dtype=values.dtype, device=DEVICE)
    buffer[:, : values.shape[1]] = values
    return buffer[:, : values.shape[1]]


def make_operands(rows: int, width: int, rank: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Of `layer_norm_*`; those of `gelu_*` are x and down."""
    return {
        "x": padded(normal(rows, width, dtype=dtype) + 0.5),
        "weight": normal(width, dtype=dtype) + 1,
        "bias": normal(width, dtype=dtype, seed=1),
        "down": normal(rank, width, scale=width**-0.5),
    }


def operands_in(operands: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: value.detach().to(dtype) for name, value in operands.items()}


def plain(operation: str, x: Tensor, weight: Tensor, bias: Tensor, out_dtype: torch.dtype) -> Tensor:
    """h in PyTorch."""
    return (F.layer_norm(x, weight.shape, weight, bias, EPS) if operation == "layer norm" else F.gelu(x)).to(out_dtype)


def project(operation: str, operands: dict[str, Tensor], out_dtype: torch.dtype, spare: int) -> tuple[Tensor, Tensor]:
    x, weight, bias, down = operands.values()
    if operation == "layer norm":
        return producers.layer_norm_project(x, weight, bias, EPS, down, out_dtype, spare)
    return producers.gelu_project(x, down, out_dtype, spare)


def expected(
    operation: str, operands: dict[str, Tensor], dtype: torch.dtype | None, out_dtype: torch.dtype, dh: Tensor
) -> dict[str, Tensor]:
    """h, z and dx in PyTorch, operands first cast to `dtype`, the product in `out_dtype`."""
    values = operands if dtype is None else operands_in(operands, dtype)
    x = values["x"].detach().requires_grad_()
    h = plain(operation, x, values["weight"], values["bias"], out_dtype)
    (dx,) = torch.autograd.grad(h, x, dh.to(out_dtype))
    h = h.detach()
    return {"h": h, "z": F.linear(h, values["down"].to(out_dtype)), "dx": dx}


def check_producer(
    operation: str,
    operands: dict[str, Tensor],
    out_dtype: torch.dtype,
    *,
    spare: bool = True,
    make: Callable[..., tuple[Tensor, Tensor]] = project,
) -> None:
    """Fails unless h, z, dx are within twice eager's own error of float64 and the spare columns behind z are zero."""
    rows, width = operands["x"].shape
    rank = len(operands["down"])
    columns = rank_block(rank)
    dh = padded(normal(rows, width, dtype=out_dtype, seed=2))
    x = operands["x"].detach().requires_grad_()
    h, z = make(operation, {**operands, "x": x}, out_dtype, columns if spare else 0)
    assert not z.requires_grad
    (dx,) = torch.autograd.grad(h, x, dh)
    h = h.detach()
    if spare:
        whole = h.as_strided((rows, width + columns), (width + columns, 1))
        assert z.data_ptr() == whole[:, width:].data_ptr()
        assert torch.equal(whole, torch.cat([h, z, z.new_zeros(rows, columns - rank)], dim=1))
    oracle = expected(operation, operands, torch.float64, torch.float64, dh)
    eager = expected(operation, operands, None, out_dtype, dh)
    floor = FLOOR[out_dtype]
    check_close("h", h, oracle["h"], eager["h"], floor)
    check_close("z", z, oracle["z"], eager["z"], floor)
    floor = FLOOR[operands["x"].dtype] if rows else floor
    if operation == "layer norm" and width == 1:  # dx is zero: what is left is the rounding of two equal terms
        term = dh.double() * operands["weight"].double() * EPS**-0.5
        assert (dx.double().abs() <= 2 * floor * term.abs()).all()
    else:
        check_close("dx", dx, oracle["dx"], eager["dx"], floor)


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_by_product_with_and_without_spare_columns(operation, shape, dtypes):
    operands = make_operands(*shape, dtypes[0])
    check_producer(operation, operands, dtypes[1], spare=True)
    check_producer(operation, operands, dtypes[1], spare=False)


@pytest.mark.parametrize("spare", [False, True], ids=["alone", "in spare columns"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_widths_of_whisper(operation, spare):
    # 5120 is wider than a LayerNorm's kernel takes, and PyTorch's own serves.
    for width in (384, 1280, 5120):
        check_producer(operation, make_operands(3, width, 8, torch.float32), torch.float16, spare=spare)


@pytest.mark.parametrize("spare", [False, True], ids=["alone", "in spare columns"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_tiles_of_many_rows(operation, spare):
    rows = 4100 if operation == "gelu" else 100
    check_producer(operation, make_operands(rows, 16, 2, torch.float16), torch.float16, spare=spare)


@pytest.mark.parametrize("spare", [False, True], ids=["alone", "in spare columns"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_strides_of_every_kind(operation, spare):
    operands = make_operands(20, 48, 8, torch.float32)
    operands["x"] = operands["x"].T.contiguous().T
    operands["down"] = operands["down"].T.contiguous().T
    operands["weight"] = normal(48, 2)[:, 0]
    check_producer(operation, operands, torch.float32, spare=spare)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_expanded_output_gradient(operation):
    operands = make_operands(20, 48, 8, torch.float32)
    x = operands["x"].detach().requires_grad_()
    h, _ = project(operation, {**operands, "x": x}, torch.float32, 16)
    (got,) = torch.autograd.grad(h.sum(), x)
    ones = torch.ones(20, 48, device=DEVICE)
    oracle = expected(operation, operands, torch.float64, torch.float64, ones)["dx"]
    eager = expected(operation, operands, None, torch.float32, ones)["dx"]
    check_close("dx", got, oracle, eager, FLOOR[torch.float32])


def test_rows_far_from_zero_keep_their_variance():
    """A variance as the mean of squares less the square of the mean would be lost here."""
    operands = make_operands(8, 256, 8, torch.float32)
    operands["x"] = operands["x"] + 1000
    check_producer("layer norm", operands, torch.float32)


@pytest.mark.parametrize("spare", [False, True], ids=["alone", "in spare columns"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_kernels_write_every_entry(operation, spare, monkeypatch):
    """Outputs start as NaN; what a kernel leaves out would stay so."""

    def poisoned(self, *shape, **kwargs):
        return self.new_full(shape[0] if isinstance(shape[0], tuple) else shape, torch.nan, **kwargs)

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    for rank in (8, 40):
        check_producer(operation, make_operands(13, 150, rank, torch.float32), torch.float32, spare=spare)


@pytest.mark.parametrize("spare", [False, True], ids=["alone", "in spare columns"])
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_pytorch_where_no_kernel_runs(operation, spare, dtype, monkeypatch):
    monkeypatch.setattr(device, "runs_triton", lambda x: False)
    operands = make_operands(33, 48, 8, dtype)
    # PyTorch's bfloat16 product on CPU lets NaN beyond the end of a row into the result.
    operands["x"] = operands["x"].clone()
    check_producer(operation, operands, dtype, spare=spare)


def test_faults_are_caught():
    operands = make_operands(5, 200, 20, torch.float32)

    def zeroed_strip(operation, values, out_dtype, spare):
        h, z = project(operation, values, out_dtype, spare)
        return torch.cat([h[:, :190], h[:, 190:] * 0], dim=1), z

    def lost_rank(operation, values, out_dtype, spare):
        down = values["down"] * (torch.arange(20, device=DEVICE) < 19)[:, None]
        return project(operation, {**values, "down": down}, out_dtype, spare)

    def z_of_the_input(operation, values, out_dtype, spare):
        h, _ = project(operation, values, out_dtype, spare)
        return h, F.linear(values["x"].detach(), values["down"])

    def one_row_without_gradient(operation, values, out_dtype, spare):
        x = torch.cat([values["x"][:-1], values["x"][-1:].detach()])
        return project(operation, {**values, "x": x}, out_dtype, spare)

    def tanh_gelu(operation, values, out_dtype, spare):
        return F.gelu(values["x"], approximate="tanh"), project(operation, values, out_dtype, spare)[1]

    faults = [zeroed_strip, lost_rank, z_of_the_input, one_row_without_gradient]
    for operation, more in (("layer norm", []), ("gelu", [tanh_gelu])):
        check_producer(operation, operands, torch.float32, spare=False)
        for fault in faults + more:
            with pytest.raises(AssertionError):
                check_producer(operation, operands, torch.float32, spare=False, make=fault)

    def dirty_spare_columns(operation, values, out_dtype, spare):
        h, z = project(operation, values, out_dtype, spare)
        h.data.as_strided((5, 232), (232, 1))[:, -1] = 1e-3
        return h, z

    for operation in OPERATIONS:
        with pytest.raises(AssertionError):
            check_producer(operation, operands, torch.float32, make=dirty_spare_columns)


def test_deterministic():
    operands = make_operands(20, 200, 8, torch.float32)
    for operation in OPERATIONS:
        first, second = (project(operation, operands, torch.float16, 0) for _ in "ab")
        assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))


@pytest.mark.parametrize("operation", OPERATIONS)
def test_compiles_without_graph_breaks(operation):
    operands = make_operands(33, 48, 8, torch.float32)

    def compiled(make):
        return torch.compile(make, fullgraph=True, backend="aot_eager")

    check_producer(operation, operands, torch.float32, spare=False, make=compiled(project))

    def spare_columns(values):
        return project(operation, values, torch.float32, 16)

    found = torch.compile(spare_columns, fullgraph=True, backend="aot_eager")(operands)
    assert all(torch.equal(*pair) for pair in zip(found, spare_columns(operands), strict=True))


def test_custom_operators_are_well_formed():
    x, weight, bias, down = make_operands(33, 40, 8, torch.float32).values()
    tests = ("test_schema", "test_faketensor")
    for spare in (0, 16):
        arguments = (x, weight, bias, EPS, down, torch.float16, spare)
        torch.library.opcheck(layer_norm.layer_norm_project.op, arguments, test_utils=tests)
        torch.library.opcheck(activation.activation_project.op, (x, down, True, torch.float16, spare), test_utils=tests)
    mean = normal(33)
    torch.library.opcheck(layer_norm.layer_norm_input_gradient.op, (x, x, weight, mean, mean), test_utils=tests)
    torch.library.opcheck(activation.gelu_input_gradient.op, (x, x), test_utils=tests)
    torch.library.opcheck(activation.add_low_rank_.op, (normal(33, 56), down), test_utils=tests)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"down": torch.zeros(8, 41)}, r"x has shape \(3, 40\) and down \(8, 41\)"),
        ({"x": torch.zeros(1, 3, 40)}, r"not \[M, K\]"),
        ({"weight": torch.zeros(39)}, r"weight has shape \(39,\), not \(40,\)"),
        ({"bias": torch.zeros(40, requires_grad=True)}, r"bias requires a gradient.*layer_norm"),
        ({"spare": 8}, "spare is 8, not 0 or 16"),
    ],
)
def test_bad_arguments_are_named(changes, message):
    x, weight, bias, down = make_operands(3, 40, 8, torch.float32).values()
    arguments = {"x": x, "weight": weight, "bias": bias, "eps": EPS, "down": down, "out_dtype": torch.float32}
    with pytest.raises(ValueError, match=message):
        producers.layer_norm_project(**(arguments | changes))
