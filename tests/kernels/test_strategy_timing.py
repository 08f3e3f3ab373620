"""Strategies timed one beside the other: here with a clock that is not real, on a GPU with its own."""

import itertools
import json

import pytest
import torch

from fused_s2lora import s2_linear_group
from fused_s2lora.kernels import strategy_timing
from fused_s2lora.kernels.choice import Chooser
from fused_s2lora.kernels.strategy_record import (
    FROZEN,
    Shape,
    StrategyFile,
    record_from,
)
from fused_s2lora.kernels.strategy_timing import candidates_of, make_operands, time_candidates
from tests.kernels.choices import CANDIDATES, CPU, FEW_ROWS, GPU, SHAPE


@pytest.fixture
def few_rounds(monkeypatch):
    monkeypatch.setattr(strategy_timing, "ROUNDS", 3)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


SMALL = Shape(16, 24, 40, 4, 2, torch.float32, torch.float32, True)


class FakeClock:
    """Gives each strategy the milliseconds that its calls add to `now`."""

    def __init__(self):
        self.now = 0.0

    def __call__(self, call) -> float:
        before = self.now
        call()
        return self.now - before

    def candidates(self, **ms):
        """Strategies whose calls cost the milliseconds given, one after the other and again from the first."""
        real = candidates_of(s2_linear_group, ["reference"])["reference"]

        def build(operands, costs):
            forward, costs = real(operands), itertools.cycle(costs)

            def slowed():
                self.now += next(costs)
                return forward()

            return slowed

        return {name: (lambda operands, costs=costs: build(operands, costs)) for name, costs in ms.items()}


def test_times_are_medians_of_each_candidate(few_rounds):
    clock = FakeClock()
    ms, errors = time_candidates(SMALL, CPU, clock.candidates(merged=[2.0, 50.0, 4.0], reference=[3.0]), clock)
    assert (ms, errors) == ({"reference": 3.0, "merged": 4.0, FROZEN: 0.0}, {})


def test_a_candidate_that_raises_or_computes_something_else_has_no_time(few_rounds):
    clock = FakeClock()
    real = candidates_of(s2_linear_group, ["reference"])["reference"]

    def raises_when_built(operands):
        raise NotImplementedError

    def raises_later(operands):
        calls = []

        def forward():
            calls.append(1)
            if len(calls) > 4:
                raise RuntimeError("first line\nsecond line")
            return real(operands)()

        return forward

    def out_of_memory(operands):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried ...")

    def wrong_output(operands):
        return lambda: [y * 1.02 for y in real(operands)()]

    def wrong_gradient(operands):
        return lambda: [y + (y - y.detach()) for y in real(operands)()]

    def not_a_number(operands):
        return lambda: [y * torch.nan for y in real(operands)()]

    planted = [raises_when_built, raises_later, out_of_memory, wrong_output, wrong_gradient, not_a_number]
    candidates = {function.__name__: function for function in planted}
    ms, errors = time_candidates(SMALL, CPU, {**candidates, **clock.candidates(reference=[1.0])}, clock)
    assert ms.keys() == {"reference", FROZEN}
    assert errors.keys() == candidates.keys()
    assert errors["raises_when_built"] == "NotImplementedError: "
    assert errors["raises_later"] == "RuntimeError: first line"
    assert errors["out_of_memory"] == "out of memory"
    assert all(
        "differs from reference by" in errors[name] for name in ("wrong_output", "wrong_gradient", "not_a_number")
    )


@pytest.mark.parametrize("needs_gradient", [True, False])
@pytest.mark.parametrize(
    ("dtype", "weight_dtype"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
        (torch.float64, torch.float64),
    ],
    ids=str,
)
def test_todays_strategies_are_timed_in_every_precision(dtype, weight_dtype, needs_gradient, few_rounds):
    shape = Shape(64, 48, 64, 8, 3, dtype, weight_dtype, needs_gradient)
    clock = FakeClock()
    ms, errors = time_candidates(shape, CPU, candidates_of(s2_linear_group, ["reference", "merged"]), clock)
    assert errors == {}
    assert ms.keys() == {"reference", "merged", FROZEN}


def test_operands_are_those_of_the_shape():
    operands = make_operands(Shape(32, 24, 40, 4, 3, torch.bfloat16, torch.float16, True), CPU)
    assert (operands.x.shape, operands.x.dtype) == ((32, 24), torch.bfloat16)
    assert [weight.shape for weight in operands.weights] == [(40, 24)] * 3
    assert {weight.dtype for weight in (*operands.weights, *operands.biases)} == {torch.float16}
    assert (operands.down.shape, operands.up.shape, operands.down.dtype) == ((4, 24), (40, 4), torch.float32)
    assert len(operands.dys) == len(operands.coefficients) == 3
    assert not make_operands(Shape(32, 24, 40, 4, 3, torch.float32, torch.float32, False), CPU).x.requires_grad


def test_the_callers_state_does_not_reach_the_timing_nor_the_other_way_round(few_rounds):
    """Checkpointing counts the tensors that are saved in its forward, so none of the timing's may be among them."""
    saved, seen = [], {}

    def candidate(operands):
        def forward():
            seen["grad"], seen["autocast"] = torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")
            return real(operands)()

        return forward

    real = candidates_of(s2_linear_group, ["reference"])["reference"]
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    hooks = torch.autograd.graph.saved_tensors_hooks(saved.append, lambda value: value)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), hooks:
        _, errors = time_candidates(SMALL, CPU, {"reference": candidate}, FakeClock())
    assert (errors, saved, seen) == ({}, [], {"grad": True, "autocast": False})
    assert torch.equal(torch.rand(3), expected)
    # What rounds at random draws a seed.
    half = Shape(64, 48, 64, 8, 1, torch.bfloat16, torch.bfloat16, True)
    torch.manual_seed(3)
    time_candidates(half, CPU, candidates_of(s2_linear_group, ["reference", "merged"]), FakeClock())
    assert torch.equal(torch.rand(3), expected)


def test_a_candidate_that_asks_for_a_choice_does_not_wait_for_itself(make, few_rounds):
    def candidate(operands):
        assert chooser.pick("auto", FEW_ROWS, GPU, CANDIDATES) == "merged"
        return real(operands)

    real = candidates_of(s2_linear_group, ["reference"])["reference"]
    chooser = make(lambda shape, device, candidates: time_candidates(SMALL, CPU, candidates, FakeClock()))
    record = chooser.tune(SHAPE, GPU, {"reference": candidate})
    assert record is not None
    assert record.errors == {}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="strategies are timed on a CUDA GPU only")
def test_on_a_gpu_the_choice_is_the_fastest_timed(path):
    chooser = Chooser(StrategyFile(path))
    candidates = candidates_of(s2_linear_group, ["reference", "merged"])
    name = chooser.pick("auto", SHAPE, GPU, candidates)
    (records,) = json.loads(path.read_text()).values()
    record = record_from(records[SHAPE.key])
    assert record is not None
    assert record.errors == {}
    assert record.ms[name] <= record.ms["reference"]
