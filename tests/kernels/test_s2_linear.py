"""The operation in every strategy, precision and shape, against float64."""

import functools
import weakref

import pytest
import torch
import torch.nn.functional as F

from fused_s2lora import s2_linear, s2_linear_group, s2_linear_reference
from fused_s2lora.kernels import device, strategies
from fused_s2lora.kernels.s2_linear import BACKENDS
from fused_s2lora.kernels.shared import GradientSink, SharedPair
from fused_s2lora.kernels.strategies import STRATEGIES
from fused_s2lora.kernels.strategy_record import Shape
from tests.kernels.operations import ON_GPU, OPERATIONS, each_operation, use_kernels
from tests.oracle import DEVICE, FLOOR, check, check_close, make_problem, run

SHAPES = {
    "one of each": (1, 1, 1, 1),
    "one row": (1, 64, 48, 8),
    "63": (63, 63, 63, 3),
    "no block divides": (130, 70, 200, 17),
    "tall": (1500, 48, 40, 8),
    "wide": (40, 48, 300, 16),
    "rank 64": (70, 80, 96, 64),
    "rank 256": (66, 70, 40, 256),
    "two splits of rows": (1100, 24, 24, 5),
    "no rows": (0, 16, 16, 4),
}


TRITON_DTYPES = [
    torch.float32,
    torch.float16,
    pytest.param(
        torch.bfloat16,
        marks=pytest.mark.skipif(not ON_GPU, reason="Triton's interpreter multiplies bfloat16 wrongly; needs a GPU"),
    ),
]


@pytest.mark.parametrize("dtype", TRITON_DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@each_operation
def test_output_and_gradients_of_kernels(shape, dtype, operation, monkeypatch):
    use_kernels(monkeypatch)
    check(make_problem(*shape, dtype), operation)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("name", ["merged", "split"])
def test_output_and_gradients_in_pytorch(shape, dtype, name):
    factors = torch.float64 if dtype == torch.float64 else torch.float32
    # PyTorch's own bfloat16 product on CPU lets NaN beyond the end of a row into the result: 0 · NaN in its padding.
    padding = 0.0 if dtype == torch.bfloat16 and not ON_GPU else torch.nan
    check(make_problem(*shape, dtype, factor_dtype=factors, padding=padding), OPERATIONS[name])


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "fused"])
@pytest.mark.parametrize("narrow", [("coefficients",), ("down",), ("up",), ("down", "up"), ("up", "coefficients")])
def test_factors_of_unlike_dtypes(backend, narrow):
    """Whichever strategy serves: which one that is depends on the number of rows."""
    problem = make_problem(40, 48, 33, 8, torch.bfloat16, padding=0.0)
    for name in narrow:
        problem.operands[name] = problem.operands[name].detach().bfloat16().requires_grad_()
    check(problem, functools.partial(s2_linear, backend=backend))


@pytest.mark.skipif(ON_GPU, reason="oneDNN multiplies on a CPU")
@pytest.mark.parametrize("there", [True, False])
def test_bias_of_half_precision_on_a_cpu(there, monkeypatch):
    """Added by oneDNN while it multiplies, where it does, and by PyTorch elsewhere."""
    asked = []
    real = torch.ops.mkldnn._linear_pointwise
    if there and not device._onednn_has_bfloat16():
        pytest.skip("oneDNN has no bfloat16 products for this CPU")
    monkeypatch.setattr(device, "_onednn_has_bfloat16", lambda: there)
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", lambda *given: asked.append(given) or real(*given))
    check(make_problem(200, 40, 48, 8, torch.bfloat16, factor_dtype=torch.float32), OPERATIONS["merged"])
    assert len(asked) == there
    check(make_problem(200, 40, 48, 8, torch.bfloat16, factor_dtype=torch.float32, bias=False), OPERATIONS["merged"])
    check(make_problem(200, 40, 48, 8, torch.float32), OPERATIONS["merged"])
    assert len(asked) == there


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "fused"])
def test_a_bias_whose_entries_are_not_adjacent(backend, dtype):
    """oneDNN takes them for adjacent."""
    problem = make_problem(200, 40, 48, 8, dtype, padding=0.0)
    bias = problem.operands["bias"]
    problem.operands["bias"] = torch.stack([bias, torch.zeros_like(bias)], dim=1)[:, 0]
    check(problem, functools.partial(s2_linear, backend=backend))


@each_operation
@pytest.mark.parametrize(
    "trained",
    [(), ("x",), ("down",), ("up",), ("coefficients",), ("x", "coefficients"), ("down", "up"), ("up", "coefficients")],
    ids="+".join,
)
def test_only_what_is_asked_for(operation, trained, kernels):
    problem = make_problem(65, 40, 48, 8, torch.float32, trained=trained)
    check(problem, operation)
    assert set(run(problem, operation)) == {"y", *trained}


@each_operation
def test_no_bias_and_leading_dimensions(operation, kernels):
    check(make_problem((2, 3, 33), 40, 48, 8, torch.float32, bias=False), operation)
    check(make_problem((2, 0), 40, 48, 8, torch.float32), operation)
    vector = make_problem((), 40, 48, 8, torch.float32)
    check(vector, operation)


@each_operation
def test_strides_of_every_kind(operation, kernels):
    problem = make_problem((20, 30), 40, 48, 8, torch.float32)
    problem.operands["x"] = problem.operands["x"].transpose(0, 1)
    problem.operands["weight"] = problem.operands["weight"].T.contiguous().T
    problem.operands["down"] = problem.operands["down"].T.contiguous().T
    problem.operands["up"] = problem.operands["up"].T.contiguous().T
    problem.dy = problem.dy.transpose(0, 1)
    check(problem, operation)
    problem.dy = torch.ones(48, device=DEVICE).expand(30, 20, 48)  # what the gradient of a sum looks like
    check(problem, operation)


@pytest.mark.parametrize("count", [1, 2, 3])
@each_operation
def test_a_group_is_its_maps_one_by_one(operation, count, kernels):
    """Outputs and gradients of a group, with z given and not, against float64, with a sink and without."""
    problems = [make_problem(70, 40, 48, 8, torch.float32, bias=index != 1, seed=index) for index in range(count)]
    x, down, up = (problems[0].operands[name].clone().requires_grad_() for name in ("x", "down", "up"))
    weights = [problem.operands["weight"] for problem in problems]
    biases = [problem.operands["bias"] for problem in problems]
    coefficients = [problem.operands["coefficients"].clone().requires_grad_() for problem in problems]
    stacked = torch.cat([torch.zeros(48, device=DEVICE) if bias is None else bias for bias in biases])
    trained = (x, down, up, *coefficients)

    def whole(operation, dtype: torch.dtype):
        wide = [value.detach().to(dtype).requires_grad_() for value in trained]
        ys = [
            operation(wide[0], w.to(dtype), None if b is None else b.to(dtype), *wide[1:3], e)
            for w, b, e in zip(weights, biases, wide[3:], strict=True)
        ]
        return torch.autograd.grad(ys, wide, [problem.dy.to(dtype) for problem in problems]), ys

    oracle, oracle_ys = whole(s2_linear_reference, torch.float64)
    eager, eager_ys = whole(s2_linear_reference, torch.float32)
    pair = SharedPair(up, down)
    uses = {
        "alone": (down, up, {}),
        "z given": (down, up, {"z": (x @ down.mT).detach()}),
        "into a sink": (pair.down, pair.up, {"sink": GradientSink(pair.gradients, transposed=False)}),
    }
    for how, (a, b, options) in uses.items():
        ys = s2_linear_group(x, weights, stacked, a, b, coefficients, backend=operation.keywords["backend"], **options)
        got = torch.autograd.grad(ys, trained, [problem.dy for problem in problems])
        for name, *values in zip(("x", "down", "up", "e0", "e1", "e2"), got, oracle, eager, strict=False):
            check_close(f"{how}: {name}", *values, FLOOR[torch.float32])
        for y, *values in zip(ys, oracle_ys, eager_ys, strict=True):
            check_close(f"{how}: y", y.detach(), *(value.detach() for value in values), FLOOR[torch.float32])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name not in ("auto", "merged")])
def test_small_updates_of_half_precision_weights_survive(dtype, backend):
    """An update below the weight's last bit must reach the output: only `merged` rounds W together with it."""
    if backend == "fused" and dtype == torch.bfloat16 and not ON_GPU:
        pytest.skip("Triton's interpreter multiplies bfloat16 wrongly; needs a GPU")
    outputs = inputs = 64
    weight = torch.ones(outputs, inputs, dtype=dtype, device=DEVICE)
    down, up = torch.ones(1, inputs, device=DEVICE), torch.ones(outputs, 1, device=DEVICE)
    tiny = torch.full((1,), 1e-5, device=DEVICE)
    x = torch.zeros(1, inputs, dtype=dtype, device=DEVICE)
    x[0, :2] = torch.tensor([100.0, -99.0])
    bias = torch.full((outputs,), -1.0, dtype=dtype, device=DEVICE)
    got = s2_linear(x, weight, bias, down, up, tiny * 100, backend=backend)
    assert (got.float() > 5e-4).all()


@each_operation
def test_a_gelu_s_input_stands_in_for_its_output(operation, kernels):
    """With u of x = GELU(u) known, x is not held for the backward pass, and dA is as exact as with it."""
    problem = make_problem(130, 70, 48, 8, torch.float32)
    named = {name: problem.operands[name] for name in ("x", "weight", "bias", "down", "up", "coefficients")}

    def gradients(dtype: torch.dtype, call):
        u, weight, bias, *factors = (value.detach().to(dtype) for value in named.values())
        trained = [value.requires_grad_() for value in (u, *factors)]
        y, held = call(u, weight, bias, *factors)
        return torch.autograd.grad(y, trained, problem.dy.to(dtype)), held

    def reference(u, *operands):
        return s2_linear_reference(F.gelu(u), *operands), None

    def kept(u, weight, bias, down, up, e):
        x = F.gelu(u)
        backend = operation.keywords["backend"]
        (y,) = s2_linear_group(x, [weight], bias, down, up, [e], made_from=u, backend=backend)
        return y, weakref.ref(x)

    (oracle, _), (eager, _) = gradients(torch.float64, reference), gradients(torch.float32, reference)
    got, x = gradients(torch.float32, kept)
    assert x() is None
    for name, *values in zip(("x", "down", "up", "coefficients"), got, oracle, eager, strict=True):
        check_close(name, *values, FLOOR[torch.float32])
    with pytest.raises(ValueError, match="made_from"):
        gradients(torch.float32, lambda u, w, b, *f: (s2_linear_group(u, [w], b, *f[:2], f[2:], made_from=u[1:]), None))


def test_z_of_another_shape_is_refused():
    x, weight, bias, down, up, e = make_problem((2, 5), 40, 48, 8, torch.float32).operands.values()
    for z in (x[:1] @ down.mT, (x @ down.mT)[..., 1:], (x @ down.mT).mT.contiguous()):
        with pytest.raises(ValueError, match=r"z has shape .* not \(2, 5, 8\) as x \(2, 5, 40\) needs"):
            s2_linear_group(x, [weight], bias, down, up, [e], z=z)


def test_faults_are_caught():
    """The helper's bound lets no wrong strip, swapped factor, lost coefficient, bias or split of rows pass."""
    problem = make_problem(130, 70, 200, 17, torch.float32)
    square = make_problem(64, 48, 48, 8, torch.float32)

    def zeroed_strip(**operands):
        y = s2_linear_reference(**operands)
        return torch.cat([y[:, :-8], y[:, -8:] * 0], dim=1)

    def lost_coefficient(coefficients, **operands):
        kept = torch.arange(len(coefficients), device=DEVICE) > 0
        return s2_linear_reference(coefficients=coefficients * kept, **operands)

    def no_bias(bias, **operands):
        return s2_linear_reference(bias=bias * 0, **operands)

    def swapped_factors(down, up, **operands):
        return s2_linear_reference(down=up.mT, up=down.mT, **operands)

    def one_row_without_gradient(x, **operands):
        return s2_linear_reference(x=torch.cat([x[:-1], x[-1:].detach()]), **operands)

    faults = (zeroed_strip, lost_coefficient, no_bias, one_row_without_gradient)
    for fault in faults:
        with pytest.raises(AssertionError):
            check(problem, fault)
    with pytest.raises(AssertionError):
        check(square, swapped_factors)
    check(problem, s2_linear_reference)


def test_kernels_write_every_entry(monkeypatch):
    """Outputs start as NaN; what a kernel leaves out would stay so."""
    use_kernels(monkeypatch)

    def poisoned(self, *shape, **kwargs):
        return self.new_full(shape, torch.nan, **kwargs)

    real_empty = torch.empty
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    monkeypatch.setattr(torch, "empty", lambda *shape, **kwargs: real_empty(*shape, **kwargs).fill_(torch.nan))
    for operation in OPERATIONS.values():
        check(make_problem(130, 70, 200, 17, torch.float32), operation)


def test_merged_weights_are_kept_for_backward_on_a_cpu_only(kernels):
    operands = make_problem(24, 40, 48, 8, torch.float32).operands
    weight, saved = operands["weight"], []
    operands["x"].requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        OPERATIONS["merged"](**operands)
    kept = [tensor for tensor in saved if tensor.shape == weight.shape]
    others = [tensor for tensor in kept if tensor.data_ptr() != weight.data_ptr()]
    assert len(kept) - len(others) == 1
    assert len(others) == (0 if kernels else 1)


def test_rounding_is_drawn_anew_at_every_step(monkeypatch):
    """Backward forms the weights of its own forward pass again; inference rounds always alike."""
    use_kernels(monkeypatch)
    seeds, real = [], strategies.merge_weights
    monkeypatch.setattr(strategies, "merge_weights", lambda *given: seeds.append(given[-1].item()) or real(*given))
    problem, merged = make_problem(33, 40, 48, 8, torch.float16), OPERATIONS["merged"]
    for _ in range(2):
        run(problem, merged)
    forward, backward, next_forward, next_backward = seeds
    assert forward == backward != next_forward == next_backward
    with torch.no_grad():
        assert torch.equal(merged(**problem.operands), merged(**problem.operands))


@each_operation
def test_gradients_of_kernels_are_deterministic(operation, monkeypatch):
    use_kernels(monkeypatch)
    problem = make_problem(700, 40, 48, 8, torch.float32)
    first, second = run(problem, operation), run(problem, operation)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_reference_and_merged_pass_gradcheck():
    problem = make_problem(5, 6, 7, 3, torch.float64, factor_dtype=torch.float64)
    x, weight, bias, *factors = (value.detach() for value in problem.operands.values())
    trained = [x.clone().requires_grad_(), *(factor.clone().requires_grad_() for factor in factors)]
    assert torch.autograd.gradcheck(lambda x, *f: s2_linear_reference(x, weight, bias, *f), trained)
    if not ON_GPU:
        assert torch.autograd.gradcheck(lambda x, *f: s2_linear(x, weight, bias, *f), trained)
    assert torch.autograd.gradgradcheck(lambda x, *f: s2_linear_reference(x, weight, bias, *f), trained)


@each_operation
def test_second_derivative_is_refused(operation):
    problem = make_problem(5, 6, 7, 3, torch.float32)
    problem.operands["x"].requires_grad_()
    y = operation(**problem.operands)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(y.sum(), problem.operands["x"], create_graph=True)


@pytest.mark.parametrize("backend", STRATEGIES)
def test_weights_of_a_group_laid_out_unlike_each_other(backend, kernels):
    problem = make_problem(33, 40, 48, 8, torch.float32).operands
    x, weight, down, up, e = (problem[name] for name in ("x", "weight", "down", "up", "coefficients"))
    weights = [weight, (2 * weight).mT.contiguous().mT, 3 * weight]
    for y, one in zip(s2_linear_group(x, weights, None, down, up, [e] * 3, backend=backend), weights, strict=True):
        torch.testing.assert_close(y, s2_linear_reference(x, one, None, down, up, e), rtol=1e-4, atol=1e-4)


def test_the_choice_is_made_for_the_shape_of_the_call(monkeypatch):
    """K is not N, the products are not in the weights' dtype, and one coefficient alone is trained."""
    asked = []

    def pick(backend, shape, *others):
        asked.append(shape)
        return "reference"

    monkeypatch.setattr("fused_s2lora.kernels.s2_linear.pick", pick)
    x, weight, _, down, up, e = make_problem((2, 35), 40, 48, 8, torch.float32).operands.values()
    coefficients = [e, e, e.clone().requires_grad_()]
    for needs_gradient in (True, False):
        with torch.autocast(DEVICE, torch.bfloat16), torch.set_grad_enabled(needs_gradient):
            s2_linear_group(x, [weight] * 3, None, down, up, coefficients)
    assert asked == [Shape(128, 40, 48, 8, 3, torch.bfloat16, torch.float32, needs) for needs in (True, False)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"down": torch.zeros(8, 41)}, r"down has shape \(8, 41\), not \(8, 40\)"),
        ({"up": torch.zeros(47, 8)}, r"up has shape \(47, 8\), not \(48, 8\)"),
        ({"bias": torch.zeros(47)}, r"bias has shape"),
        ({"x": torch.zeros(3, 39)}, r"x has shape \(3, 39\)"),
        ({"x": torch.zeros(3, 40, dtype=torch.float64)}, "cast one of them"),
        ({"x": torch.zeros(3, 40, dtype=torch.int64)}, r"x is torch\.int64: s2_linear takes floating-point"),
        ({"weight": torch.zeros(48, 40, dtype=torch.int8)}, r"weight is torch\.int8: s2_linear takes floating-point"),
        ({"coefficients": torch.zeros(300)}, "between 1 and 256"),
        ({"coefficients": torch.zeros(0)}, "between 1 and 256"),
        ({"weight": torch.zeros(48, 40, requires_grad=True)}, r"weight requires a gradient.*requires_grad_\(False\)"),
        ({"bias": torch.zeros(48, requires_grad=True)}, "bias requires a gradient"),
        ({"weight": torch.zeros(48)}, r"weight has shape \(48,\)"),
        ({"backend": "cuda"}, "backend is 'cuda'"),
    ],
)
def test_bad_arguments_are_named(changes, message):
    arguments = {**make_problem(3, 40, 48, 8, torch.float32).operands}
    arguments |= {
        name: value.to(DEVICE) if isinstance(value, torch.Tensor) else value for name, value in changes.items()
    }
    with pytest.raises(ValueError, match=message):
        s2_linear(**arguments)


def test_fused_by_name_never_falls_back(monkeypatch):
    fused = OPERATIONS["fused"]
    problem = make_problem(3, 40, 48, 8, torch.float64, factor_dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"no kernel for torch\.float64"):
        fused(**problem.operands)
    if not ON_GPU:
        half = make_problem(3, 40, 48, 8, torch.bfloat16)
        with pytest.raises(RuntimeError, match="interpreter multiplies bfloat16 wrongly"):
            fused(**half.operands)
        monkeypatch.setattr(device, "INTERPRETING", False)
        with pytest.raises(RuntimeError, match="use backend='auto'"):
            fused(**make_problem(3, 40, 48, 8, torch.float32).operands)
        monkeypatch.setenv("S2LORA_BACKEND", "fused")
        with pytest.raises(RuntimeError, match=r"variable S2LORA_BACKEND=fused cannot .* off; unset it"):
            s2_linear(**make_problem(3, 40, 48, 8, torch.float32).operands)
