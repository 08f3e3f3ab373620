"""The adapted weights of a group: rounded once where the weight is wider, without bias where it is not."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from fused_s2lora.kernels import device
from fused_s2lora.kernels.merge import merge, merge_weights, merge_weights_reference
from tests.oracle import DEVICE, FLOOR, check_close

# The interpreter's NumPy warns of the infinities and NaN that some tests are about.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")
ON_GPU = DEVICE == "cuda"
HALF = [torch.float16, torch.bfloat16]
SHAPES = {
    "one of each": (1, 1, 1, 1),
    "63": (63, 63, 3, 2),
    "no block divides": (70, 130, 17, 3),
    "tall": (130, 40, 8, 1),
    "wide": (30, 200, 8, 3),
    "rank 256": (30, 63, 256, 2),
}
Merge = Callable[..., Tensor]


@dataclass
class Group:
    """Operands of one merge."""

    weights: list[Tensor]
    down: Tensor
    up: Tensor
    coefficients: Tensor

    def merged(self, dtype: torch.dtype, operation: Merge = merge_weights, seed: int = 0) -> Tensor:
        return operation(self.weights, self.down, self.up, self.coefficients, dtype, torch.tensor([seed]))


def make_group(outputs: int, inputs: int, rank: int, members: int, dtype: torch.dtype, scale: float = 0.5) -> Group:
    """Random operands on `DEVICE`, each in a larger buffer of NaN."""
    generator = torch.Generator().manual_seed(0)

    def padded(*shape: int, scale: float, dtype: torch.dtype = torch.float32) -> Tensor:
        buffer = torch.full((shape[0] + 3, shape[1] + 7), torch.nan, dtype=dtype)
        buffer[: shape[0], : shape[1]] = torch.randn(*shape, generator=generator) * scale
        return buffer.to(DEVICE)[: shape[0], : shape[1]]

    return Group(
        [padded(outputs, inputs, scale=inputs**-0.5, dtype=dtype) for _ in range(members)],
        padded(rank, inputs, scale=inputs**-0.5),
        padded(outputs, rank, scale=1.0),
        padded(members, rank, scale=scale),
    )


def step_above(value: Tensor) -> Tensor:
    """Distance to the next larger magnitude of its dtype, in float64."""
    return (torch.nextafter(value.abs(), torch.full_like(value, torch.inf)).double() - value.abs().double()).abs()


def check_rounded_once(group: Group, dtype: torch.dtype, operation: Merge = merge_weights) -> None:
    """Against float64 and against PyTorch's cast of the float32 sum: equal but for the noise of that sum's order."""
    got = group.merged(dtype, operation)
    oracle = group.merged(torch.float64, merge_weights_reference)
    cast = group.merged(torch.float32, merge_weights_reference).to(dtype)
    cuts = dtype == torch.bfloat16 and not ON_GPU  # what Triton's interpreter does where a GPU rounds to nearest
    check_close("merged", got, oracle, cast, FLOOR[dtype if cuts else torch.float32])
    assert got.is_contiguous()
    if dtype in HALF:
        noise = FLOOR[torch.float32] * oracle.abs().max()
        assert ((got.double() - cast.double()).abs() <= step_above(cast) + noise).all()
        if not cuts:
            assert (got == cast).double().mean() >= 0.99 or (got != cast).sum() <= 1


def check_unbiased(group: Group, dtype: torch.dtype, operation: Merge = merge_weights, draws: int = 48) -> None:
    """Every draw takes a neighbour of the sum, an entry's mean is the sum, and so is that of all entries together."""
    exact = group.merged(torch.float64, merge_weights_reference)
    nearest = exact.to(dtype)
    lower = torch.where(nearest.double().abs() > exact.abs(), toward_zero(nearest), nearest).double()
    gap = step_above(lower.to(dtype))
    fraction = (exact.abs() - lower.abs()) / gap
    results = torch.stack([group.merged(dtype, operation, seed) for seed in range(draws)]).double()
    ups = (results.abs() - lower.abs()) / gap
    certain = (
        fraction - fraction.round()
    ).abs() < 1e-3  # the float32 sum may lie on the other side of the grid's point
    assert ((ups == 0) | (ups == 1) | certain).all(), "neither neighbour"
    error = (ups.mean(0) - fraction)[~certain]
    variance = (fraction * (1 - fraction))[~certain] / draws
    assert (error.abs() <= 6 * variance.sqrt() + 2 / draws).all(), "an entry's mean is off"
    assert error.sum().abs() <= 4 * variance.sum().sqrt(), "the mean of all entries is off"
    assert (error.square().sum() / variance.sum() - 1).abs() < 0.2, "the spread is not that of independent draws"
    # Sums along a row or a column spread as those of independent draws do; one draw for all of it spreads them by more.
    error, variance = (
        value.where(~certain, 0.0) for value in (ups.mean(0) - fraction, fraction * (1 - fraction) / draws)
    )
    for axis in (0, 1):
        spread = error.sum(axis).square().sum() / variance.sum()
        assert spread < 2.5, "a row's or a column's draws are not independent"


def toward_zero(value: Tensor) -> Tensor:
    return torch.nextafter(value, torch.zeros_like(value))


def small_updates(dtype: torch.dtype, magnitude: float = 1.0) -> Group:
    """Updates of at most 0.45 steps, away from zero: rounding to nearest loses them all. W has both signs."""
    generator = torch.Generator().manual_seed(1)
    scale = magnitude * 2.0 ** torch.randint(-6, 2, (32, 1), generator=generator)  # a step is equal along a row
    ulps = torch.randint(0, 100, (32, 60), generator=generator)
    weight = (scale * (1 + ulps * torch.finfo(dtype).eps)).to(dtype)
    sign = torch.where(torch.rand(1, 60, generator=generator) < 0.5, -1.0, 1.0)
    return Group(
        [(weight * sign.to(dtype)).to(DEVICE)],
        (torch.rand(1, 60, generator=generator) * sign).to(DEVICE),
        (0.45 * step_above(weight).amax(1, keepdim=True)).float().to(DEVICE),
        torch.ones(1, 1, device=DEVICE),
    )


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_wider_weights_are_rounded_once(shape, dtype):
    check_rounded_once(make_group(*shape, torch.float32), dtype)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("shape", [SHAPES["one of each"], SHAPES["no block divides"]], ids=str)
def test_half_precision_weights_are_rounded_to_a_neighbour(shape, dtype):
    group = make_group(*shape, dtype)
    got = group.merged(dtype)
    exact = group.merged(torch.float64, merge_weights_reference)
    noise = FLOOR[torch.float32] * exact.abs().max()
    assert ((got.double() - exact).abs() <= step_above(exact.to(dtype)) + noise).all()
    check_rounded_once(group, torch.float32)


@pytest.mark.parametrize("factor_dtype", HALF, ids=str)
def test_factors_in_the_dtype_of_the_model(factor_dtype):
    group = make_group(40, 70, 8, 2, torch.float32)
    for name in ("down", "up", "coefficients"):
        setattr(group, name, getattr(group, name).to(factor_dtype))
    check_rounded_once(group, torch.float32)


def test_strides_of_every_kind():
    group = make_group(70, 130, 17, 2, torch.float32)
    group.weights = [weight.T.contiguous().T for weight in group.weights]
    group.down, group.up = group.down.T.contiguous().T, group.up.T.contiguous().T
    group.coefficients = group.coefficients.T.contiguous().T
    check_rounded_once(group, torch.float16)


def test_pruned_ranks_change_nothing():
    group = make_group(40, 70, 8, 2, torch.float32)
    group.coefficients = group.coefficients.clone()
    group.coefficients[0, ::2] = 0
    group.coefficients[1, 1:] = 0
    check_rounded_once(group, torch.float16)


@pytest.mark.parametrize("operation", [merge_weights, merge_weights_reference], ids=["kernel", "reference"])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_without_an_update_every_half_precision_number_stays(dtype, operation):
    numbers = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype).view(256, 256)
    if dtype == torch.bfloat16 and not ON_GPU and operation is merge_weights:
        subnormal = numbers.abs().double() < torch.finfo(dtype).tiny
        numbers = numbers.where(~subnormal | (numbers == 0), 1.0)  # Triton's interpreter misreads subnormal bfloat16
    group = make_group(256, 256, 3, 1, dtype, scale=0.0)
    group.weights = [numbers.to(DEVICE)]
    got = group.merged(dtype, operation, seed=3)
    number = ~group.weights[0].isnan()
    assert torch.equal(got.view(torch.int16)[number], group.weights[0].view(torch.int16)[number])
    assert got[~number].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_without_an_update_wider_weights_are_only_cast(dtype):
    group = make_group(40, 70, 3, 3, torch.float32, scale=0.0)
    group.weights[1][3, :5] = -0.0
    expected = torch.cat(group.weights).to(dtype)
    got = group.merged(dtype)
    if dtype == torch.bfloat16 and not ON_GPU:  # Triton's interpreter cuts a bfloat16 off where a GPU rounds
        assert ((got.double() - expected.double()).abs() <= step_above(expected)).all()
    else:
        assert torch.equal(got, expected)
    assert torch.signbit(got[43, :5]).all()


@pytest.mark.parametrize("operation", [merge_weights, merge_weights_reference], ids=["kernel", "reference"])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_small_updates_survive_in_the_mean(dtype, operation):
    check_unbiased(small_updates(dtype), dtype, operation)


@pytest.mark.parametrize("operation", [merge_weights, merge_weights_reference], ids=["kernel", "reference"])
def test_subnormal_sums_have_no_bias(operation):
    """float16 around its smallest normal number, 2**-14, and down to sums of less than one step."""
    check_unbiased(small_updates(torch.float16, 2.0**-14), torch.float16, operation)
    check_unbiased(small_updates(torch.float16, 2.0**-19), torch.float16, operation)
    group = small_updates(torch.float16)
    group.weights = [torch.zeros_like(group.weights[0])]
    group.up = torch.full_like(group.up, 2.0**-24)
    check_unbiased(group, torch.float16, operation)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_biased_rounding_is_caught(dtype):
    """What the helper is for: rounding to nearest, cutting off, always up, one coin for all, too little chance."""
    group = small_updates(dtype)

    def exact_sum(arguments: Sequence) -> Tensor:
        return merge_weights_reference(*arguments[:4], torch.float64, arguments[-1])

    def nearest(*arguments) -> Tensor:
        return exact_sum(arguments).to(dtype)

    def rounded(exact: Tensor, chance: Tensor) -> Tensor:
        near = exact.to(dtype)
        lower = torch.where(near.double().abs() > exact.abs(), toward_zero(near), near)
        fraction = (exact.abs() - lower.double().abs()) / step_above(lower)
        upper = torch.nextafter(lower, lower.sign() * torch.inf)
        return torch.where(chance < fraction, upper, lower)

    def fault(draw: Callable[[Tensor, torch.Generator], Tensor]) -> Merge:
        def operation(*arguments) -> Tensor:
            exact = exact_sum(arguments)
            generator = torch.Generator(DEVICE).manual_seed(int(arguments[-1]))
            return rounded(exact, draw(exact, generator))

        return operation

    def uniform(shape, generator) -> Tensor:
        return torch.rand(shape, dtype=torch.float64, device=DEVICE, generator=generator)

    check_unbiased(group, dtype, fault(lambda exact, generator: uniform(exact.shape, generator)))
    faults = {
        "nearest": nearest,
        "cut off": fault(lambda exact, generator: torch.ones_like(exact)),
        "up": fault(lambda exact, generator: torch.zeros_like(exact)),
        "one coin": fault(lambda exact, generator: uniform((1, 1), generator).expand_as(exact)),
        "coin of the column": fault(lambda exact, generator: uniform((1, exact.shape[1]), generator).expand_as(exact)),
        "coin of the row": fault(lambda exact, generator: uniform((exact.shape[0], 1), generator).expand_as(exact)),
        "too little": fault(lambda exact, generator: uniform(exact.shape, generator) * 0.9 + 0.1),
    }
    for name, operation in faults.items():
        try:
            check_unbiased(group, dtype, operation)
        except AssertionError:
            continue
        pytest.fail(f"{name}: passes")


@pytest.mark.parametrize("operation", [merge_weights, merge_weights_reference], ids=["kernel", "reference"])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_seeds(dtype, operation):
    """Equal seeds give equal bits; another seed, member, row or column draws on its own."""
    ones = make_group(60, 130, 1, 3, dtype)
    ones.weights = [torch.ones_like(weight) for weight in ones.weights]
    ones.down, ones.up = torch.ones_like(ones.down), torch.ones_like(ones.up)
    ones.coefficients = torch.full_like(ones.coefficients, torch.finfo(dtype).eps / 2)
    first = ones.merged(dtype, operation, seed=7)
    assert torch.equal(first, ones.merged(dtype, operation, seed=7))
    draws = {seed: ones.merged(dtype, operation, seed) for seed in (8, -7, 7 + 2**32)}
    if operation is merge_weights_reference:
        del draws[7 + 2**32]  # PyTorch's generator on a CPU takes the low 32 bits
    draws[7] = first
    signs = {seed: (drawn > 1).double().view(3, 60, 130) * 2 - 1 for seed, drawn in draws.items()}
    bound = 5 * (28 * 130) ** -0.5

    def independent(left: Tensor, right: Tensor) -> bool:
        return abs((left * right).mean().item()) < bound

    own = signs.pop(7)
    assert all(abs(member.mean().item()) < bound for member in own)
    assert all(independent(own, other) for other in signs.values())
    assert all(independent(own[left], own[right]) for left, right in ((0, 1), (0, 2), (1, 2)))
    assert all(independent(own[0, :, :-shift], own[0, :, shift:]) for shift in (1, 2, 3, 4, 64))
    assert all(independent(own[0, :-shift], own[0, shift:]) for shift in (1, 32))


@pytest.mark.parametrize("operation", [merge_weights, merge_weights_reference], ids=["kernel", "reference"])
def test_beyond_the_largest_number(operation):
    """Up to it sums are rounded by chance, beyond it to nearest: infinite from half a step on, never before."""
    largest = 65504.0
    weight = torch.tensor([largest, largest, largest, largest - 32, torch.inf, torch.nan] * 50)
    update = torch.tensor([0.0, 10.0, 20.0, 16.0, 10.0, 10.0] * 50)
    group = Group(
        [torch.stack([weight, -weight]).to(DEVICE, torch.float16)],
        update[None].to(DEVICE),
        torch.tensor([[1.0], [-1.0]], device=DEVICE),
        torch.ones(1, 1, device=DEVICE),
    )
    up, down = group.merged(torch.float16, operation).cpu().view(2, 50, 6)
    for got in (up, -down):
        assert (got[:, :2] == largest).all()
        assert (got[:, 2] == torch.inf).all()
        assert set(got[:, 3].tolist()) == {largest - 32, largest}
        assert (got[:, 4] == torch.inf).all()
        assert got[:, 5].isnan().all()


def test_faults_are_caught():
    """No wrong strip, lost coefficient, wrong member or second rounding passes the helper's bound."""
    group = make_group(70, 130, 17, 3, torch.float32)

    def zeroed_strip(*arguments) -> Tensor:
        merged = merge_weights_reference(*arguments)
        merged[:, -2:] = 0
        return merged

    def lost_coefficient(weights, down, up, coefficients, *others) -> Tensor:
        return merge_weights_reference(weights, down[1:], up[:, 1:], coefficients[:, 1:], *others)

    def members_swapped(weights, down, up, coefficients, *others) -> Tensor:
        return merge_weights_reference(weights, down, up, coefficients.flip(0), *others)

    def rounded_twice(weights, *others) -> Tensor:
        dtype = others[3]
        return merge_weights_reference([weight.to(dtype).float() for weight in weights], *others)

    for fault in (zeroed_strip, lost_coefficient, members_swapped, rounded_twice):
        with pytest.raises(AssertionError):
            check_rounded_once(group, torch.float16, fault)
    check_rounded_once(group, torch.float16, merge_weights_reference)


def test_the_kernel_writes_every_entry(monkeypatch):
    monkeypatch.setattr(Tensor, "new_empty", lambda self, *shape, **kwargs: self.new_full(shape, torch.nan, **kwargs))
    check_rounded_once(make_group(70, 130, 17, 3, torch.float32), torch.float16)


def test_without_a_kernel_pytorch_answers(monkeypatch):
    monkeypatch.setattr(device, "INTERPRETING", False)
    group = make_group(40, 70, 8, 2, torch.float64)
    up, down, coefficients = (factor.double() for factor in (group.up, group.down, group.coefficients))
    oracle = torch.cat([group.weights[i] + up @ torch.diag(coefficients[i]) @ down for i in range(2)])
    assert (group.merged(torch.float64) - oracle).abs().max() < 1e-14
    assert torch.equal(group.merged(torch.float16), oracle.half())
    if not ON_GPU:
        for dtype in HALF:
            half = make_group(40, 70, 8, 2, dtype)
            assert torch.equal(half.merged(dtype, seed=4), half.merged(dtype, merge_weights_reference, seed=4))


def test_compiles_without_graph_breaks():
    group = make_group(40, 70, 8, 2, torch.float32)
    compiled = torch.compile(merge_weights, fullgraph=True, backend="aot_eager")
    check_rounded_once(group, torch.float16, compiled)


def test_the_operator_is_well_formed():
    group = make_group(40, 70, 8, 2, torch.float16)
    arguments = (group.weights, group.down, group.up, group.coefficients, torch.float16, torch.tensor([5]))
    torch.library.opcheck(merge.op, arguments, test_utils=("test_schema", "test_faketensor"))


def test_bad_groups_are_named():
    group = make_group(40, 70, 8, 2, torch.float32)
    first, second = group.weights
    for weights, message in (
        ([], "weights holds 0"),
        ([first] * 4, "weights holds 4"),
        ([first, second[:-1]], r"weights\[1\] is \(39, 70\)"),
        ([first, second.half()], r"torch\.float16"),
    ):
        with pytest.raises(ValueError, match=message):
            Group(weights, group.down, group.up, group.coefficients).merged(torch.float16)
