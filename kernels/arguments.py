"""What `s2_linear` and `s2_linear_group` accept, in one place."""

from collections.abc import Sequence

from torch import Tensor

MAX_RANK = 256
MAX_GROUP = 3


def check_arguments(
    x: Tensor, weights: Sequence[Tensor], bias: Tensor | None, down: Tensor, up: Tensor, coefficients: Sequence[Tensor]
) -> None:
    """Raises ValueError, naming the argument and both shapes, unless everything fits together.

    x [..., K], 1 to 3 weights [N, K], bias [G · N] or None, down [r, K], up [N, r], as many coefficients [r].
    """
    if not 1 <= len(weights) <= MAX_GROUP or len(coefficients) != len(weights):
        raise ValueError(
            f"{len(weights)} weights and {len(coefficients)} coefficients; a group has 1 to {MAX_GROUP} of each"
        )
    weight = weights[0]
    if weight.dim() != 2:
        raise ValueError(f"weight has shape {tuple(weight.shape)}, not [N, K]")
    outputs, inputs = weight.shape
    if x.dim() < 1 or x.shape[-1] != inputs:
        raise ValueError(f"x has shape {tuple(x.shape)}, not [..., {inputs}] as weight {tuple(weight.shape)} needs")
    rank = coefficients[0].numel()
    if not 1 <= rank <= MAX_RANK:
        raise ValueError(f"coefficients has {rank} entries; a rank is between 1 and {MAX_RANK}")
    expected = [
        *(("weight", other, (outputs, inputs)) for other in weights[1:]),
        ("bias", bias, (len(weights) * outputs,)),
        ("down", down, (rank, inputs)),
        ("up", up, (outputs, rank)),
        *(("coefficients", values, (rank,)) for values in coefficients),
    ]
    for name, tensor, shape in expected:
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape:
            found, needed = tuple(tensor.shape), f"weight {(outputs, inputs)} and rank {rank} need"
            raise ValueError(f"{name} has shape {found}, not {shape} as {needed}")
        if tensor.device != weight.device:
            raise ValueError(f"{name} is on {tensor.device} and weight on {weight.device}: move them to one device")
    for name, tensor in (("x", x), ("weight", weight)):
        if not tensor.is_floating_point():
            raise ValueError(f"{name} is {tensor.dtype}: s2_linear takes floating-point tensors, cast it to one")
    if x.device != weight.device:
        raise ValueError(f"x is on {x.device} and weight on {weight.device}: move them to one device")
    if any(other.dtype != weight.dtype for other in weights):
        raise ValueError(f"the weights of a group are of {len({w.dtype for w in weights})} dtypes: cast them to one")
    for name, tensor in (*(("weight", weight) for weight in weights), ("bias", bias)):
        if tensor is not None and tensor.requires_grad:
            raise ValueError(
                f"{name} requires a gradient but s2_linear keeps it frozen: call {name}.requires_grad_(False)"
            )
