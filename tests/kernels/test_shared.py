"""Sums of gradients in shared buffers: whatever passes went before, a backward pass hands over its own."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fused_s2lora import s2_linear_reference
from fused_s2lora.kernels import ops
from fused_s2lora.kernels.s2_linear import s2_linear_group
from fused_s2lora.kernels.shared import (
    GradientSink,
    SharedPair,
    gelu_input,
    known_z,
    remember_gelu,
    remember_z,
    same_tensor,
    share_input,
)
from fused_s2lora.kernels.strategies import STRATEGIES
from tests.oracle import DEVICE

NAMES = ("x", "down", "up", "e")


class Problem:
    """Two maps of one x with one pair; gradients of `sum(y²)` by the reference in float64."""

    def __init__(self, dtype: torch.dtype = torch.float64, device: str = "cpu") -> None:
        generator = torch.Generator().manual_seed(0)
        shapes = {"x": (20, 12), "down": (4, 12), "up": (16, 4), "e": (4,)}
        self.trained = {
            name: torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()
            for name, shape in shapes.items()
        }
        self.weights = torch.randn(2, 16, 12, generator=generator, dtype=torch.float64)
        x, down, up, e = self.trained.values()
        loss = sum(s2_linear_reference(x, weight, None, down, up, e).square().sum() for weight in self.weights)
        self.exact = dict(zip(NAMES, torch.autograd.grad(loss, list(self.trained.values())), strict=True))
        self.weights = self.weights.to(device, dtype)
        self.trained = {
            name: tensor.detach().to(device, dtype).requires_grad_() for name, tensor in self.trained.items()
        }

    def loss(self, shared_input: bool) -> tuple[Tensor, Tensor]:
        """The loss with a sink for the pair, and the first output."""
        x, down, up, e = self.trained.values()
        pair = SharedPair(up, down)
        sink = GradientSink(pair.gradients, transposed=False)
        if shared_input:
            x = share_input(x, pair.down, sink)
        ys = [
            s2_linear_group(x, [weight], None, pair.down, pair.up, [e], sink=sink, backend="merged")[0]
            for weight in self.weights
        ]
        return ys[0].square().sum() + ys[1].square().sum(), ys[0]

    def loss_of(self, x: Tensor, backend: str = "merged") -> Tensor:
        """The loss with x shared by the caller, and without a sink."""
        _, down, up, e = self.trained.values()
        maps = [s2_linear_group(x, [weight], None, down, up, [e], backend=backend)[0] for weight in self.weights]
        return maps[0].square().sum() + maps[1].square().sum()

    def check(self, **tolerances: float) -> None:
        """Compares `.grad` of everything trained."""
        for name, tensor in self.trained.items():
            exact = self.exact[name].to(tensor)
            torch.testing.assert_close(tensor.grad, exact, **tolerances, msg=lambda m, name=name: f"{name}: {m}")


def ask_for_others(problem: Problem, loss: Tensor, y: Tensor) -> None:
    torch.autograd.grad(loss, problem.trained["e"], retain_graph=True)


def raise_midway(problem: Problem, loss: Tensor, y: Tensor) -> None:
    def fail(gradient: Tensor) -> None:
        raise KeyboardInterrupt

    handle = y.register_hook(fail)  # the other map's part of the pass may have run by then
    with pytest.raises(KeyboardInterrupt):
        loss.backward(retain_graph=True)
    handle.remove()


@pytest.mark.parametrize("before", [ask_for_others, raise_midway])
@pytest.mark.parametrize("shared_input", [False, True], ids=["its own input", "a shared input"])
def test_a_pass_that_did_not_end_leaves_nothing(shared_input: bool, before: Callable):
    problem = Problem()
    loss, y = problem.loss(shared_input)
    before(problem, loss, y)
    for tensor in problem.trained.values():
        tensor.grad = None
    loss.backward()
    problem.check()


@pytest.mark.parametrize("backend", ["merged", "split"])
def test_a_shared_input_that_is_written_to_is_noticed(backend):
    """As PyTorch does of any input that a gradient needs."""
    problem = Problem()
    x, down, up, e = problem.trained.values()
    hidden = x * 1.0
    (y,) = s2_linear_group(share_input(hidden, down), [problem.weights[0]], None, down, up, [e], backend=backend)
    hidden.detach().mul_(0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize(
    "trained",
    [(), ("x",), ("down",), ("up",), ("x", "down"), ("x", "up"), ("down", "up"), ("x", "down", "up")],
    ids="+".join,
)
@pytest.mark.parametrize("backend", STRATEGIES)
def test_a_shared_input_with_a_part_frozen(backend: str, trained: tuple[str, ...]):
    problem = Problem(torch.float32, DEVICE)
    for name in ("x", "down", "up"):
        problem.trained[name].requires_grad_(name in trained)
    problem.loss_of(share_input(problem.trained["x"], problem.trained["down"]), backend).backward()
    problem.trained = {name: problem.trained[name] for name in (*trained, "e")}
    problem.check(rtol=1e-4, atol=1e-3)


def test_more_than_maps_may_read_a_shared_input():
    problem = Problem()
    x, down, _, _ = problem.trained.values()
    shared = share_input(x, down)
    (problem.loss_of(shared) + shared.square().sum()).backward()
    problem.exact["x"] += 2 * x.detach()
    problem.check()


def test_what_is_known_of_a_tensor_is_forgotten_when_it_is_written_to():
    x, z, down, u = torch.ones(3, 4), torch.ones(3, 2), torch.ones(2, 4), torch.ones(3, 4)
    remember_z(x, z, down)
    remember_gelu(x, u)
    assert known_z(x, down) is z
    assert same_tensor(gelu_input(x), u)
    x.mul_(2)
    assert known_z(x, down) is gelu_input(x) is None


def test_z_is_known_of_its_own_factor_alone():
    """Two that lie in one memory are alike but for where they begin."""
    x, z, downs = torch.ones(3, 4), torch.ones(3, 2), torch.ones(2, 2, 4)
    remember_z(x, z, downs[0])
    assert known_z(x, downs[0]) is z
    assert known_z(x, downs[1]) is None


def test_dx_of_many_readers_is_summed_as_exactly_as_by_autograd():
    """Cross-attention of 32 decoder layers under autocast: 64 maps of one x."""
    generator = torch.Generator().manual_seed(0)
    x, down, up = (torch.randn(*shape, generator=generator) for shape in ((60, 32), (4, 32), (32, 4)))
    weights, dys = (torch.randn(32, 2, *shape, generator=generator) for shape in ((32, 32), (60, 32)))
    e = torch.rand(2, 4, generator=generator)

    def gradient(dtype: torch.dtype, shared: bool) -> Tensor:
        leaf, pair = x.to(dtype).requires_grad_(), (down.to(dtype), up.to(dtype))
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
            y = share_input(leaf.bfloat16(), pair[0]) if shared else leaf
            outputs = []
            for two in weights.to(dtype):
                if shared:
                    outputs += s2_linear_group(y, list(two), None, *pair, list(e.to(dtype)), backend="merged")
                else:
                    outputs += [
                        s2_linear_reference(y, w, None, *pair, c) for w, c in zip(two, e.to(dtype), strict=True)
                    ]
        given = [dy.bfloat16().to(y.dtype) for dy, y in zip(dys.flatten(0, 1), outputs, strict=True)]
        return torch.autograd.grad(outputs, leaf, given)[0].double()

    exact = gradient(torch.float64, shared=False)
    by_autograd = (gradient(torch.float32, shared=False) - exact).norm()
    assert (gradient(torch.float32, shared=True) - exact).norm() < 1.5 * by_autograd


@pytest.mark.parametrize("frozen", ["down", "up"])
def test_one_factor_frozen_under_checkpointing(frozen: str):
    """The pair in use must ask for the gradients the pair itself asks for: its recomputation has the pair itself."""
    problem = Problem()
    problem.trained[frozen].requires_grad_(False)
    x, down, up, e = problem.trained.values()
    pair = SharedPair(up, down)
    in_use: dict = {"down": pair.down, "up": pair.up, "sink": GradientSink(pair.gradients, transposed=False)}
    assert (pair.down.requires_grad, pair.up.requires_grad) == (down.requires_grad, up.requires_grad)

    def both(x: Tensor) -> Tensor:
        factors = [in_use.get("down", down), in_use.get("up", up)]
        ys = [
            s2_linear_group(x, [w], None, *factors, [e], sink=in_use.get("sink"), backend="merged")[0]
            for w in problem.weights
        ]
        in_use.clear()  # as at the end of a model's forward pass
        return ys[0].square().sum() + ys[1].square().sum()

    checkpoint(both, x, use_reentrant=False).backward()
    del problem.trained[frozen]
    problem.check()


def test_kernels_run_on_the_gpu_of_their_operands(monkeypatch):
    """Triton launches on the current GPU, which need not be theirs."""
    current, seen = [0], []

    class Elsewhere(torch.Tensor):
        is_cuda = True

        def get_device(self) -> int:
            return 1

    class On:
        def __init__(self, tensor: Tensor) -> None:
            self.index = tensor.get_device()

        def __enter__(self) -> None:
            self.before, current[0] = current[0], self.index

        def __exit__(self, *_: object) -> None:
            current[0] = self.before

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "device_of", On)
    launch = ops._on_its_device(lambda first, scale: seen.append((current[0], scale)))
    there = torch.zeros(2).as_subclass(Elsewhere)
    launch(torch.zeros(2), scale=1)
    launch(there, scale=2)
    launch([there, there], 3)
    assert seen == [(0, 1), (1, 2), (1, 3)]
    assert current == [0]
