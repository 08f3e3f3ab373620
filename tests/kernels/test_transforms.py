"""The operation where PyTorch changes how it is run: torch.compile, selective checkpoints, autocast, shapes alone."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from fused_s2lora import s2_linear, s2_linear_group, s2_linear_reference
from fused_s2lora.kernels.s2_linear import BACKENDS
from fused_s2lora.kernels.strategies import STRATEGIES
from tests.kernels.operations import ON_GPU, each_operation
from tests.oracle import DEVICE, TRAINED, check, make_problem, run


@pytest.mark.parametrize("backend", ["auto", "reference", "merged", "split", *(["fused"] if ON_GPU else [])])
def test_autocast_computes_like_linear(backend):
    problem = make_problem(33, 40, 48, 8, torch.float32)
    x, weight, bias, *factors = (problem.operands[name] for name in problem.operands)
    trained = [x.clone().requires_grad_(), *(factor.clone().requires_grad_() for factor in factors)]
    with torch.autocast(DEVICE, torch.bfloat16):
        y = s2_linear(trained[0], weight, bias, *trained[1:], backend=backend)
        frozen = F.linear(x, weight, bias)
    assert y.dtype == frozen.dtype == torch.bfloat16
    gradients = torch.autograd.grad(y, trained, problem.dy.bfloat16())
    assert all(gradient.dtype == torch.float32 for gradient in gradients)
    oracle = run(problem, s2_linear_reference, torch.float64)
    for name, got in zip(("y", *TRAINED), (y, *gradients), strict=True):
        error = (got.double() - oracle[name]).abs().max() / oracle[name].abs().max()
        assert error < 0.03, name


@each_operation
def test_compiles_without_graph_breaks(operation, kernels):
    problem = make_problem(33, 40, 48, 8, torch.float32)
    compiled = torch.compile(lambda **operands: operation(**operands), fullgraph=True, backend="aot_eager")
    check(problem, compiled)


@pytest.mark.parametrize("mutation", [False, True])
@pytest.mark.parametrize("backend", STRATEGIES)
def test_selective_checkpoints_may_keep_products(backend, mutation, kernels):
    def keep(context, operator, *arguments, **options):
        products = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return CheckpointPolicy.MUST_SAVE if operator in products else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = functools.partial(create_selective_checkpoint_contexts, keep, allow_cache_entry_mutation=mutation)
    operands = make_problem(200, 40, 48, 8, torch.float32).operands
    exact = {name: value.detach().double() for name, value in operands.items()}
    for given in (operands, exact):
        for name in TRAINED:
            given[name].requires_grad_()

    def activated() -> torch.Tensor:
        return F.gelu(s2_linear(**operands, backend=backend))  # whose backward pass reads the output

    checkpoint(activated, use_reentrant=False, context_fn=contexts).square().sum().backward()
    F.gelu(s2_linear_reference(**exact)).square().sum().backward()
    for name in TRAINED:
        torch.testing.assert_close(operands[name].grad.double(), exact[name].grad, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("backend", STRATEGIES)
def test_half_precision_compiles_without_graph_breaks(backend):
    torch.compiler.reset()
    if backend == "fused" and not ON_GPU:
        pytest.skip("Triton's interpreter multiplies bfloat16 wrongly")
    operands = {name: value.bfloat16() for name, value in make_problem(200, 40, 48, 8, torch.float32).operands.items()}
    operands["x"].requires_grad_()
    compiled = torch.compile(
        lambda **operands: s2_linear(**operands, backend=backend), fullgraph=True, backend="aot_eager"
    )
    y = compiled(**operands)
    y.sum().backward()
    expected = {name: value.detach().double() for name, value in operands.items()}
    expected["x"].requires_grad_()
    wanted = s2_linear_reference(**expected)
    wanted.sum().backward()
    for got, exact in ((y, wanted), (operands["x"].grad, expected["x"].grad)):
        assert (got.double() - exact).norm() <= 0.02 * exact.norm()


@each_operation
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("count", [1, 2])
def test_compiles_without_gradients(operation, mode, count):
    torch.compiler.reset()
    problem = make_problem(33, 40, 48, 8, torch.float32).operands
    x, weight, down, up, e = (problem[name] for name in ("x", "weight", "down", "up", "coefficients"))

    def group(x: torch.Tensor) -> list[torch.Tensor]:
        return list(s2_linear_group(x, [weight] * count, None, down, up, [e] * count, **operation.keywords))

    with mode():
        got = torch.compile(group, fullgraph=True, backend="aot_eager")(x)
        for y in got:
            torch.testing.assert_close(y, s2_linear_reference(x, weight, None, down, up, e), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ["auto", "merged"])
def test_one_compiled_function_for_maps_of_several_sizes(backend):
    torch.compiler.reset()
    compiled = torch.compile(
        lambda **operands: s2_linear(**operands, backend=backend), fullgraph=True, backend="aot_eager", dynamic=True
    )
    for inputs, outputs in ((40, 48), (56, 64), (72, 80)):
        check(make_problem(33, inputs, outputs, 8, torch.float32), compiled)


@pytest.mark.parametrize("backend", BACKENDS)
def test_float64_under_autocast_stays_float64_as_linear_does(backend):
    if backend == "fused":
        pytest.skip("Triton's kernels have no float64")
    problem = make_problem(200, 40, 48, 8, torch.float32)
    operands = {name: value.double() for name, value in problem.operands.items()}
    with torch.autocast(DEVICE, torch.bfloat16):
        y = s2_linear(**operands, backend=backend)
        assert torch.nn.functional.linear(operands["x"], operands["weight"]).dtype == y.dtype == torch.float64
    torch.testing.assert_close(y, s2_linear_reference(**operands))


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "fused"])
def test_shapes_without_data(backend):
    problem = make_problem((2, 100), 40, 48, 8, torch.float32)
    operands = {name: value.to("meta") for name, value in problem.operands.items()}
    y = s2_linear(**operands, backend=backend)
    assert (y.shape, y.device.type) == ((2, 100, 48), "meta")
