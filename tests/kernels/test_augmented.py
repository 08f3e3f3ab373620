"""The adapted map as one product with spare columns, alone and behind its producers, against float64."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fused_s2lora import s2_linear, s2_linear_reference
from fused_s2lora.kernels import device, strategies
from fused_s2lora.kernels.augmented import (
    AugmentedWeight,
    augmented_forward,
    augmented_input_gradient,
    spare_buffer,
    with_spare_columns,
    write_spare_columns_,
)
from fused_s2lora.kernels.configs import rank_block
from fused_s2lora.kernels.producers import gelu_project, layer_norm_project, split_spare
from tests.oracle import DEVICE, FLOOR, check_close

ON_GPU = DEVICE == "cuda"
SHAPES = {
    "one of each": (1, 1, 1, 1),
    "63": (63, 63, 63, 3),
    "no block divides": (70, 200, 41, 20),
    "one row": (1, 64, 48, 8),
    "rank 256": (9, 70, 40, 256),
    "no rows": (0, 16, 16, 4),
}
DTYPES = [
    torch.float32,
    torch.float16,
    pytest.param(
        torch.bfloat16,
        marks=pytest.mark.skipif(not ON_GPU, reason="Triton's interpreter multiplies bfloat16 wrongly; needs a GPU"),
    ),
]
EPS = 1e-5


@pytest.fixture(autouse=True)
def kernels_run(monkeypatch):
    """In Triton's interpreter where there is no GPU."""
    monkeypatch.setattr(device, "runs_triton", lambda x: device.triton_is_usable(x)[0])


def make_operands(
    rows: int, inputs: int, outputs: int, rank: int, dtype: torch.dtype, group: int = 1
) -> dict[str, Tensor]:
    """x, the stacked weights and biases of a group, A, B, coefficients [G, r] and the stacked output gradient."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(DEVICE, dtype)

    return {
        "x": normal(rows, inputs, dtype=dtype),
        "weight": normal(group * outputs, inputs, dtype=dtype, scale=inputs**-0.5),
        "bias": normal(group * outputs, dtype=dtype),
        "down": normal(rank, inputs, scale=inputs**-0.5),
        "up": normal(outputs, rank),
        "coefficients": normal(group, rank, scale=0.5),
        "dy": normal(rows, group * outputs, dtype=dtype),
    }


def augment(operands: dict[str, Tensor]) -> AugmentedWeight:
    group = len(operands["coefficients"])
    augmented = AugmentedWeight(operands["weight"].chunk(group), operands["up"].shape[1])
    augmented.update(operands["up"], operands["coefficients"])
    return augmented


def expected(operands: dict[str, Tensor], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """y and dx by the equation, in `dtype` or with every product in x's precision."""
    dtype = operands["x"].dtype if dtype is None else dtype
    x, weight, bias, down, up, coefficients, dy = (value.detach().to(dtype) for value in operands.values())
    group = len(coefficients)
    z = F.linear(x, down)
    low_rank = torch.cat([F.linear(z * e, up) for e in coefficients], dim=1)
    ge = sum((one @ up) * e for one, e in zip(dy.chunk(group, dim=1), coefficients, strict=True))
    return {
        "y": F.linear(x, weight, bias) + low_rank,
        "dx": dy @ weight + ge @ down,
    }


def run(operands: dict[str, Tensor]) -> dict[str, Tensor]:
    augmented = augment(operands)
    y = augmented_forward(with_spare_columns(operands["x"], operands["down"]), augmented, operands["bias"])
    dys = operands["dy"].chunk(augmented.group, dim=1)
    return {"y": y, "dx": augmented_input_gradient(dys, augmented, operands["down"])}


def check(operands: dict[str, Tensor], operation: Callable[..., dict[str, Tensor]] = run) -> None:
    got, oracle, eager = operation(operands), expected(operands, torch.float64), expected(operands)
    for name in oracle:
        check_close(name, got[name], oracle[name], eager[name], FLOOR[operands["x"].dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_output_and_input_gradient(shape, dtype):
    check(make_operands(*shape, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group", [2, 3])
def test_groups(group, dtype):
    check(make_operands(33, 48, 41, 8, dtype, group))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_pytorch_where_no_kernel_runs(dtype, monkeypatch):
    monkeypatch.setattr(device, "runs_triton", lambda x: False)
    check(make_operands(33, 48, 41, 8, dtype, 3))


def test_strides_of_every_kind():
    operands = make_operands(20, 48, 41, 8, torch.float32, 2)
    for name in ("x", "down", "up", "coefficients", "dy"):
        operands[name] = operands[name].T.contiguous().T
    check(operands)
    operands["dy"] = torch.ones(1, device=DEVICE).expand(20, 82)  # what the gradient of a sum looks like
    check(operands)


@pytest.mark.parametrize("rank", [1, 8, 20])
def test_uninitialised_memory_never_leaks(rank, monkeypatch):
    """Whatever is allocated starts as NaN, the spare columns of both factors among it."""
    real_empty = torch.empty

    def poisoned(self, *shape, **kwargs):
        return self.new_full(shape[0] if isinstance(shape[0], tuple) else shape, torch.nan, **kwargs)

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    monkeypatch.setattr(torch, "empty", lambda *shape, **kwargs: real_empty(*shape, **kwargs).fill_(torch.nan))
    operands = make_operands(13, 48, 41, rank, torch.float32, 2)
    check(operands)
    x = operands["x"]
    weight, bias = torch.ones(48, device=DEVICE), torch.zeros(48, device=DEVICE)
    spare = rank_block(rank)
    for buffer in (
        with_spare_columns(x, operands["down"]),
        spare_buffer(*layer_norm_project(x, weight, bias, EPS, operands["down"], torch.float32, spare)),
        spare_buffer(*gelu_project(x, operands["down"], torch.float32, spare)),
    ):
        assert torch.equal(buffer[:, 48 + rank :], torch.zeros(13, rank_block(rank) - rank, device=DEVICE))
        assert augmented_forward(buffer, augment(operands), None).isfinite().all()


def test_update_overwrites_its_columns_and_nothing_else():
    operands = make_operands(5, 48, 41, 20, torch.float16, 3)
    augmented = augment(operands)
    augmented.buffer[:, 48:] = torch.nan
    augmented.update(operands["up"], operands["coefficients"])
    assert torch.equal(augmented.buffer[:, :48], operands["weight"])
    scaled = torch.cat([operands["up"] * e for e in operands["coefficients"]]).half()
    assert torch.equal(augmented.buffer[:, 48:], F.pad(scaled, (0, 12)))


def test_before_the_first_update_it_is_the_frozen_map():
    operands = make_operands(5, 48, 41, 8, torch.float32)
    augmented = AugmentedWeight([operands["weight"]], 8)
    buffer = with_spare_columns(operands["x"], operands["down"])
    torch.testing.assert_close(augmented_forward(buffer, augmented, None), operands["x"] @ operands["weight"].T)


def test_a_copy_knows_its_weights():
    weights = [torch.randn(4, 6, device=DEVICE) for _ in range(2)]
    augmented = AugmentedWeight(weights, 8, torch.float16)
    assert augmented.buffer.dtype == torch.float16
    assert augmented.is_copy_of(weights)
    assert not augmented.is_copy_of([weights[0], weights[1].clone()])
    weights[1].add_(1)
    assert not augmented.is_copy_of(weights)


def test_no_other_weight_is_taken_for_the_copied_one():
    """A weight given new values twice may lie where the copied one lay, and is counted as written to no more often."""
    operands = make_operands(5, 48, 41, 8, torch.float32)
    x, down, up, e = (operands[name] for name in ("x", "down", "up", "coefficients"))
    weight = torch.nn.Parameter(operands["weight"], requires_grad=False)
    for _ in range(20):
        s2_linear(x, weight, None, down, up, e[0], backend="augmented")
        for _ in range(2):
            weight.data = torch.randn_like(weight)
        y = s2_linear(x, weight, None, down, up, e[0], backend="augmented")
        torch.testing.assert_close(y, s2_linear_reference(x, weight, None, down, up, e[0]), rtol=1e-4, atol=1e-4)


def test_one_weight_serves_every_rank_and_precision():
    """As of two adapters by turns, and of evaluation under autocast between steps without."""
    operands = {rank: make_operands(5, 48, 41, rank, torch.float32) for rank in (4, 20)}
    weight = operands[4]["weight"]
    for rank, half in ((4, False), (20, False), (4, False), (4, True), (4, False)):
        x, down, up, (e,) = (operands[rank][name] for name in ("x", "down", "up", "coefficients"))
        with torch.autocast(DEVICE, torch.float16, enabled=half):
            y = s2_linear(x, weight, None, down, up, e, backend="augmented")
        close = 2e-2 if half else 1e-4
        exact = s2_linear_reference(x, weight, None, down, up, e)
        torch.testing.assert_close(y, exact.to(torch.float16 if half else torch.float32), rtol=close, atol=close)


def test_a_copy_made_for_inference_serves_training():
    operands = make_operands(5, 48, 41, 8, torch.float32)
    x, weight, down, up, e = (operands[name] for name in ("x", "weight", "down", "up", "coefficients"))
    e = e[0].clone().requires_grad_()
    with torch.inference_mode():
        s2_linear(x, weight, None, down, up, e, backend="augmented")
    s2_linear(x, weight, None, down, up, e, backend="augmented").sum().backward()
    assert e.grad.abs().sum() > 0


def test_a_copy_without_data_serves_its_own_mode_alone():
    """FakeTensorMode, in which steps are counted, makes one of the very weights that are trained on after it."""
    operands = make_operands(5, 16, 8, 4, torch.float32)
    arguments = operands["x"], operands["weight"], None, operands["down"], operands["up"], operands["coefficients"][0]
    with FakeTensorMode(allow_non_fake_inputs=True):
        s2_linear(*arguments, backend="augmented")
        copy = strategies._augmented_weights[operands["weight"]]
        s2_linear(*arguments, backend="augmented")
        assert strategies._augmented_weights[operands["weight"]] is copy, "made once in its mode"
    y = s2_linear(*arguments, backend="augmented")
    assert type(y) is Tensor
    torch.testing.assert_close(y, s2_linear_reference(*arguments))


def test_spare_buffer_is_found_only_where_it_is():
    operands = make_operands(6, 48, 41, 8, torch.float32)
    ones, zeros = torch.ones(48, device=DEVICE), torch.zeros(48, device=DEVICE)
    h, z = layer_norm_project(operands["x"], ones, zeros, EPS, operands["down"], torch.float32, 16)
    buffer = spare_buffer(h, z)
    assert buffer is not None
    assert torch.equal(buffer, torch.cat([h, z, torch.zeros(6, 8, device=DEVICE)], dim=1))
    leading = h.view(2, 3, 48).reshape(-1, 48)
    assert torch.equal(spare_buffer(leading, z), buffer)
    assert spare_buffer(h.clone(), z) is None
    assert spare_buffer(h.contiguous(), z) is None
    assert spare_buffer(h, z.clone()) is None
    assert spare_buffer(h[1:], z[:-1]) is None
    assert spare_buffer(h[1:], z) is None
    plain_h, plain_z = layer_norm_project(operands["x"], ones, zeros, EPS, operands["down"], torch.float32)
    assert spare_buffer(plain_h, plain_z) is None


def test_small_updates_of_half_precision_weights_survive():
    """An update below the weight's last bit must reach the output: W is never rounded together with it."""
    weight = torch.ones(64, 64, dtype=torch.float16, device=DEVICE)
    augmented = AugmentedWeight([weight], 1)
    augmented.update(torch.ones(64, 1, device=DEVICE), torch.full((1,), 1e-3, device=DEVICE))
    x = torch.zeros(1, 64, dtype=torch.float16, device=DEVICE)
    x[0, :2] = torch.tensor([100.0, -100.0])
    x[0, 2] = 1
    down = F.pad(torch.tensor([[0.0, 0.0, 1.0]], device=DEVICE), (0, 61))
    y = augmented_forward(with_spare_columns(x, down), augmented, torch.full_like(weight[0], -1))
    assert (y.float() > 5e-4).all()


def test_faults_are_caught():
    operands = make_operands(33, 48, 41, 8, torch.float32, 2)

    def without_update(values):
        return run({**values, "coefficients": values["coefficients"] * 0})

    def swapped_members(values):
        return run({**values, "coefficients": values["coefficients"].flip(0)})

    def no_low_rank_in_dx(values):
        return {**run(values), "dx": values["dy"] @ values["weight"]}

    def dirty_weight_column(values):
        augmented = augment(values)
        augmented.buffer[:, 48 + 8] = 1
        buffer = with_spare_columns(values["x"], values["down"])
        buffer[:, 48 + 8] = 1
        return {**run(values), "y": augmented_forward(buffer, augmented, values["bias"])}

    def one_block_of_rows_missing(values):
        results = run(values)
        return {**results, "dx": torch.cat([results["dx"][:32], results["dx"][32:] * 0])}

    for fault in (
        without_update, swapped_members, no_low_rank_in_dx, dirty_weight_column, one_block_of_rows_missing,
    ):  # fmt: skip
        with pytest.raises(AssertionError):
            check(operands, fault)
    check(operands)


def test_custom_operators_are_well_formed():
    operands = make_operands(5, 48, 41, 8, torch.float32, 2)
    spare = augment(operands).buffer[:, 48:]
    arguments = (spare, operands["up"], operands["coefficients"])
    torch.library.opcheck(write_spare_columns_.op, arguments, test_utils=("test_schema", "test_faketensor"))


def test_compiles_without_graph_breaks():
    operands = make_operands(33, 48, 41, 8, torch.float32)
    augmented = augment(operands)

    def forward_and_gradient(x, down, dy):
        buffer = with_spare_columns(x, down)
        dx = augmented_input_gradient([dy], augmented, down)
        return augmented_forward(buffer, augmented, operands["bias"]), dx, split_spare(buffer, down)[1]

    arguments = (operands["x"], operands["down"], operands["dy"])
    compiled = torch.compile(forward_and_gradient, fullgraph=True, backend="aot_eager")(*arguments)
    for got, wanted in zip(compiled, forward_and_gradient(*arguments), strict=True):
        torch.testing.assert_close(got, wanted)
