"""The adapter's gradients, each output of each group, against float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fused_s2lora.kernels import adapter_gradients as module
from fused_s2lora.kernels import configs, device, row_sums
from fused_s2lora.kernels import project as project_module
from fused_s2lora.kernels.adapter_gradients import adapter_gradients, input_gradient_factor
from fused_s2lora.kernels.configs import PASS, PassConfig
from fused_s2lora.kernels.project import project
from tests.oracle import DEVICE, FLOOR, check_close

ON_GPU = DEVICE == "cuda"
DTYPES = [
    torch.float32,
    torch.float16,
    pytest.param(
        torch.bfloat16,
        marks=pytest.mark.skipif(not ON_GPU, reason="Triton's interpreter multiplies bfloat16 wrongly; needs a GPU"),
    ),
]
# rows, inputs, outputs, rank, group
SHAPES = {
    "one of each": (1, 1, 1, 1, 1),
    "one row, group of three": (1, 64, 48, 8, 3),
    "63, group of two": (63, 63, 63, 3, 2),
    "no block divides": (130, 70, 200, 20, 1),
    "no block divides, rank 8": (130, 70, 200, 8, 3),
    "rank 20, group of three": (130, 70, 100, 20, 3),
    "rank 128, group of two": (66, 40, 24, 128, 2),
    "rank 200": (17, 40, 24, 200, 1),
    "tall": (1500, 48, 40, 8, 1),
    "tall, group of three": (1500, 40, 24, 1, 3),
}


@pytest.fixture(autouse=True)
def kernels_run(monkeypatch):
    """In Triton's interpreter where there is no GPU."""
    monkeypatch.setattr(device, "runs_triton", lambda x: device.triton_is_usable(x)[0])


def normal(*shape: int, seed: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * scale).to(DEVICE, dtype)


def padded(values: Tensor, before: int = 0) -> Tensor:
    """The same values inside rows that go on as NaN."""
    buffer = torch.full((len(values), before + values.shape[1] + 7), torch.nan, dtype=values.dtype, device=DEVICE)
    buffer[:, before : before + values.shape[1]] = values
    return buffer[:, before : before + values.shape[1]]


def operands(rows, inputs, outputs, rank, group, dtype) -> dict[str, Tensor | list[Tensor]]:
    """x, z and each dy lie in rows of NaN; g, d_up and d_down hold something already."""
    return {
        "x": padded(normal(rows, inputs, seed=0, dtype=dtype)),
        "z": padded(normal(rows, rank, seed=1, dtype=dtype)),
        "dys": [padded(normal(rows, outputs, seed=10 + i, dtype=dtype), before=8 * i) for i in range(group)],
        "down": normal(rank, inputs, seed=2, scale=inputs**-0.5),
        "up": normal(outputs, rank, seed=3, scale=rank**-0.5),
        "coefficients": normal(group, rank, seed=4),
        "g": normal(rows, rank, seed=5),
        "d_up": normal(outputs, rank, seed=6),
        "d_down": normal(rank, inputs, seed=7),
    }


def double(given):
    return {name: [v.double() for v in value] if name == "dys" else value.double() for name, value in given.items()}


def reference(x, z, dys, down, up, coefficients, g, d_up, d_down) -> dict[str, Tensor]:
    """Every output by the equation; products in x's dtype, what is accumulated in g's."""
    dtype, wide = x.dtype, g.dtype
    gs = [(dy @ up.to(dtype)).to(wide) for dy in dys]
    products = [(dy.mT @ z).to(wide) for dy in dys]
    total = g + sum(e * g_i for e, g_i in zip(coefficients, gs, strict=True))
    return {
        "project": x @ down.to(dtype).mT,
        "g": total,
        "d_up": d_up + sum(p * e for p, e in zip(products, coefficients, strict=True)),
        "d_coefficients": torch.stack([(z.to(wide) * g_i).sum(0) for g_i in gs]),
        "d_down": d_down + (total.to(dtype).mT @ x).to(wide),
        "d_down of GELU": d_down + (total.to(dtype).mT @ F.gelu(x)).to(wide),
        "d_down of a given g": d_down + (g.to(dtype).mT @ x).to(wide),
    }


def computed(x, z, dys, down, up, coefficients, g, d_up, d_down) -> dict[str, Tensor]:
    """The same by the operators, in copies of the buffers with their strides."""
    outputs = {"project": project(x, down), "g": same(g), "d_up": same(d_up), "d_down": same(d_down)}
    changed = (outputs["g"], outputs["d_up"], x, outputs["d_down"])
    outputs["d_coefficients"] = adapter_gradients(dys, z, up, coefficients, *changed)
    outputs["d_down of GELU"] = same(d_down)
    adapter_gradients(dys, None, up, coefficients, same(g), None, x, outputs["d_down of GELU"], of_gelu=True)
    outputs["d_down of a given g"] = same(d_down)
    input_gradient_factor(x, g, outputs["d_down of a given g"])
    return outputs


def same(buffer: Tensor) -> Tensor:
    return torch.empty_strided(buffer.shape, buffer.stride(), device=DEVICE, dtype=buffer.dtype).copy_(buffer)


def check(given, results=None) -> None:
    """Holds every output to twice the error of PyTorch's own composition in the same precision, and a floor."""
    results = computed(**given) if results is None else results
    oracle, eager = reference(**double(given)), reference(**given)
    for name, got in results.items():
        check_close(name, got, oracle[name], eager[name], FLOOR[given["x"].dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_every_output(shape, dtype):
    check(operands(*shape, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group", [1, 2, 3])
def test_blocks_of_many_rows(group, dtype, monkeypatch):
    """The tiles that thousands of rows get, on fewer."""
    for each in (module, project_module):
        monkeypatch.setattr(each, "pass_config_name", lambda rows, group, *_: many_rows(group))
    check(operands(300, 72, 136, 8, group, dtype))


def many_rows(group: int) -> str:
    return "many rows" if group == 1 else "many rows, group"


@pytest.mark.parametrize(("rank", "group"), [(8, 3), (20, 2), (128, 1)])
def test_blocks_beyond_one_axis_of_the_grid(monkeypatch, rank, group):
    """As of more than a million rows; here an axis ends at three programs, and the last of the grid have no rows."""
    monkeypatch.setattr(configs, "GRID_AXIS", 3)
    check(operands(130, 40, 24, rank, group, torch.float16))


def test_splits_beyond_one_step_of_the_reduction(monkeypatch):
    monkeypatch.setitem(PASS, "single precision, group", PassConfig(16, 16, num_warps=4, num_stages=1))
    monkeypatch.setattr(row_sums, "REDUCE_SPLITS", 16)
    check(operands(600, 40, 24, 8, 2, torch.float32))


@pytest.mark.parametrize("rank", [8, 20, 72])
def test_transposed_factors(rank):
    """What a tied pair of factors looks like: up and d_up are views of [r, N], down and d_down of [K, r]."""
    given = operands(33, 40, 24, rank, 2, torch.float32)
    for name in ("up", "d_up", "down", "d_down"):
        given[name] = given[name].mT.contiguous().mT
    check(given)


def test_columns_that_are_not_adjacent():
    given = operands(65, 72, 40, 8, 3, torch.float32)
    given["x"] = given["x"].mT.contiguous().mT
    given["z"] = given["z"].mT.contiguous().mT
    given["dys"][0] = torch.ones(40, device=DEVICE).expand(65, 40)
    given["dys"][1] = torch.ones(1, 1, device=DEVICE).expand(65, 40)  # the gradient of a sum
    given["dys"][2] = given["dys"][2].mT.contiguous().mT
    given["coefficients"] = padded(normal(1, 1, seed=4)).expand(3, 8)
    check(given)


@pytest.mark.parametrize("rank", [8, 20, 40])
@pytest.mark.parametrize(
    "wanted",
    ["g", "d_up", "coefficients", "g d_up", "g coefficients", "d_up coefficients", "g d_down", "g coefficients d_down"],
)
def test_only_what_is_asked_for(wanted, rank):
    given = operands(65, 40, 24, rank, 2, torch.float32)
    g = given["g"].clone() if "g" in wanted.split() else None
    d_up = given["d_up"].clone() if "d_up" in wanted else None
    d_down = given["d_down"].clone() if "d_down" in wanted else None
    z = None if wanted in ("g", "g d_down") else given["z"]
    arguments = (given["dys"], z, given["up"], given["coefficients"], g, d_up, given["x"], d_down)
    d_coefficients = adapter_gradients(*arguments, needs_coefficients="coefficients" in wanted)
    changed = {"g": g, "d_up": d_up, "d_down": d_down}
    results = {name: value for name, value in changed.items() if value is not None}
    if "coefficients" in wanted:
        results["d_coefficients"] = d_coefficients
    else:
        assert d_coefficients.shape == (0, rank)
    check(given, results)


@pytest.mark.parametrize("rank", [8, 40])
def test_g_can_be_overwritten(rank):
    given = operands(65, 40, 48, rank, 3, torch.float32)
    g = torch.full_like(given["g"], torch.nan)
    adapter_gradients(given["dys"], None, given["up"], given["coefficients"], g, None, None, None, add_to_g=False)
    check({**given, "g": torch.zeros_like(g)}, {"g": g})


def test_no_rows():
    given = operands(0, 40, 48, 8, 2, torch.float32)
    results = computed(**given)
    assert torch.equal(results["d_coefficients"], torch.zeros(2, 8, device=DEVICE))
    unchanged = {"g": "g", "d_up": "d_up", **{name: "d_down" for name in results if name.startswith("d_down")}}
    assert len(unchanged) == 5
    assert all(torch.equal(results[name], given[buffer]) for name, buffer in unchanged.items())
    assert results["project"].shape == (0, 8)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_plain_branch(dtype, monkeypatch):
    """Without a GPU and without the interpreter PyTorch computes the same."""
    monkeypatch.setattr(device, "runs_triton", lambda x: False)
    given = operands(130, 70, 48, 8, 3, dtype)
    if dtype == torch.float64:
        given |= {name: given[name].double() for name in ("coefficients", "g", "d_up", "d_down")}
    check(given)


@pytest.mark.parametrize(("rows", "rank"), [(600, 8), (100, 40)])
def test_equal_inputs_give_equal_bits(rows, rank):
    given = operands(rows, 40, 24, rank, 3, torch.float32)
    first, second = computed(**given), computed(**given)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_kernels_write_every_entry(monkeypatch):
    """Outputs and workspaces start as NaN; what a kernel leaves out would stay so."""

    def poisoned(self, *shape, **kwargs):
        return self.new_full(shape, torch.nan, **kwargs)

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    for rank in (8, 17, 40):
        check(operands(70, 40, 24, rank, 3, torch.float32))


def test_faults_are_caught(monkeypatch):
    """A skipped block of rows, a dropped coefficient, swapped weights, g read too early, a lost buffer: none passes."""
    given = operands(130, 40, 48, 8, 3, torch.float32)
    check(given)

    def skipped_block(z, dys, **others):
        keep = torch.arange(len(z), device=DEVICE)[:, None] < 96
        results = reference(z=z, dys=[dy * keep for dy in dys], **others)
        return {name: results[name] for name in ("d_up", "d_coefficients")}

    def last_rows_skipped(dys, **others):
        keep = torch.arange(130, device=DEVICE)[:, None] < 129
        return {"d_up": reference(dys=[dy * keep for dy in dys], **others)["d_up"]}

    def dropped_coefficient(coefficients, **others):
        kept = (torch.arange(8, device=DEVICE) > 0) | (torch.arange(3, device=DEVICE) > 0)[:, None]
        results = reference(coefficients=coefficients * kept, **others)
        return {name: results[name] for name in ("g", "d_up")}

    def swapped_weights(dys, **others):
        results = reference(dys=[dys[1], dys[0], dys[2]], **others)
        return {name: results[name] for name in ("g", "d_up", "d_coefficients")}

    def before_the_sum(**all_of_it):
        return {"d_down": reference(**all_of_it)["d_down of a given g"]}

    def lost_buffers(g, d_up, d_down, **others):
        return reference(g=g * 0, d_up=d_up * 0, d_down=d_down * 0, **others)

    faults = (skipped_block, last_rows_skipped, dropped_coefficient, swapped_weights, before_the_sum, lost_buffers)
    for fault in faults:
        for name, value in fault(**given).items():
            if fault is lost_buffers and name in ("project", "d_coefficients"):
                continue
            with pytest.raises(AssertionError, match="off by"):
                check(given, {name: value})

    def fewer_splits(factors, *others):
        return real([(product[:-1].contiguous(), d_factor) for product, d_factor in factors], *others)

    real = module.reduce_splits
    monkeypatch.setattr(module, "reduce_splits", fewer_splits)
    with pytest.raises(AssertionError, match="off by"):
        check(given)


def test_buffers_are_changed_in_place_under_compile():
    given = operands(33, 40, 48, 8, 2, torch.float32)

    def step(g, d_up, d_down):
        read = (given["dys"], given["z"], given["up"], given["coefficients"])
        input_gradient_factor(given["x"], given["g"], given_g)
        return adapter_gradients(*read, g, d_up, given["x"], d_down)

    given_g = given["d_down"].clone()
    buffers = {name: given[name].clone() for name in ("g", "d_up", "d_down")}
    d_coefficients = torch.compile(step, fullgraph=True, backend="aot_eager")(**buffers)
    check(given, {"d_coefficients": d_coefficients, "d_down of a given g": given_g, **buffers})


def test_custom_operators_are_well_formed():
    given = operands(33, 40, 48, 8, 2, torch.float32)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(project.op, (given["x"], given["down"]), test_utils=tests)
    torch.library.opcheck(input_gradient_factor.op, (given["x"], given["g"], given["d_down"]), test_utils=tests)
    factors = (given["up"], given["coefficients"])
    for z, g, d_up in ((given["z"], given["g"], given["d_up"]), (None, given["g"], None), (given["z"], None, None)):
        torch.library.opcheck(adapter_gradients.op, (given["dys"], z, *factors, g, d_up, None, None), test_utils=tests)
    everything = (given["dys"], given["z"], *factors, given["g"], given["d_up"], given["x"], given["d_down"])
    torch.library.opcheck(adapter_gradients.op, everything, test_utils=tests)
