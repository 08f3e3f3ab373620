"""What sharing makes possible: gradients of shared factors, and of an input read by many maps, added up in place.

    dA = Σ_i (xᵀ (g_i ⊙ e_i))ᵀ        dB = Σ_i P_i diag(e_i)        dx = Σ_i dy_i W_i'

Left to itself, autograd makes a gradient for every use and adds them one by one. Here each use adds to a buffer and
hands autograd nothing; one node before all uses, which autograd reaches after the last of them, hands over the sum.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from . import device
from .adapter_gradients import input_gradient_factor
from .project import project


def wide(dtype: torch.dtype) -> torch.dtype:
    """What sums over `dtype` are kept in: float32, or float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def write_count(tensor: Tensor) -> int:
    """How often the tensor was written to, as far as PyTorch counts: not for tensors made in inference mode."""
    return 0 if tensor.is_inference() else tensor._version


class Sources:
    """What something was made from: tensors that may since have been replaced, moved or written to."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._found = [_identity(tensor) for tensor in tensors]
        # Held, so that no other tensor comes to lie where one of them was.
        self._storages = [tensor.untyped_storage() for tensor in tensors]

    def are(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these are the very tensors, as they were then; never of tensors whose writes nobody counts."""
        counted = not any(tensor.is_inference() for tensor in tensors)
        return counted and self._found == [_identity(tensor) for tensor in tensors]


def lasts(made: Tensor) -> bool:
    """Whether what was made may be kept for later: a FakeTensor is of use within its mode alone."""
    return type(made) is Tensor


def is_of_use(kept: Tensor) -> bool:
    """Whether what was kept may be read now: not a FakeTensor once the mode that made it is over."""
    return not isinstance(kept, FakeTensor) or kept.fake_mode in _get_current_dispatch_mode_stack()


def _identity(tensor: Tensor) -> tuple[Any, ...]:
    storage = tensor.untyped_storage()._cdata
    return tensor.device, tensor.dtype, storage, tensor.storage_offset(), write_count(tensor)


def same_tensor(one: Tensor, other: Tensor) -> bool:
    """Whether both are one view of one memory."""
    alike = one.shape == other.shape and one.stride() == other.stride()
    return (
        alike
        and one.storage_offset() == other.storage_offset()
        and one.untyped_storage()._cdata == other.untyped_storage()._cdata
    )


class _PassSums:
    """Sums by name, of each backward pass for itself: one may begin within another, or raise and be begun again."""

    def __init__(self) -> None:
        self._sums: dict[int, dict[str, Tensor]] = {}  # by pass

    def so_far(self) -> dict[str, Tensor]:
        """The sums of the pass under way; those that nobody asks for, as of other gradients alone, go with its end."""
        current = torch._C._current_graph_task_id()
        if current not in self._sums:
            self._sums[current] = {}

            def let_go() -> None:
                self._sums.pop(current, None)

            torch.autograd.Variable._execution_engine.queue_callback(let_go)
        return self._sums[current]


class FactorGradients:
    """The gradients of one pair, up B [N, r] and down A [r, K], in one backward pass: float32, zero until used."""

    def __init__(self, up: Tensor, down: Tensor) -> None:
        self._like = {"up": up, "down": down}
        self._sums = _PassSums()

    def buffer(self, name: str) -> Tensor:
        """The sum of `name` ("up" or "down") so far, to add to in place."""
        sums = self._sums.so_far()
        if name not in sums:
            sums[name] = torch.zeros_like(self._like[name], dtype=wide(self._like[name].dtype))
        return sums[name]

    def take(self, name: str, further: Tensor | None) -> Tensor | None:
        """The sum in the factor's dtype, with what autograd added up itself; the next pass begins at zero."""
        total = self._sums.so_far().pop(name, None)
        if total is None:
            return further
        total = total.to(self._like[name].dtype)
        return total if further is None else total + further


class _GatherFunction(torch.autograd.Function):
    """The pair as it is; backward hands over what its uses left in the buffers."""

    @staticmethod
    def forward(ctx: Any, up: Tensor, down: Tensor, gradients: FactorGradients) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.gradients = gradients
        return up.view_as(up), down.view_as(down)

    @staticmethod
    def backward(ctx: Any, d_up: Tensor | None, d_down: Tensor | None) -> tuple[Tensor | None, Tensor | None, None]:
        return ctx.gradients.take("up", d_up), ctx.gradients.take("down", d_down), None


class SharedPair:
    """A trainable pair for the uses of one forward pass: the same values, one buffer for all gradients.

    `up` [N, r] and `down` [r, K] are to be given to the uses, with a `GradientSink` of `gradients`.
    """

    def __init__(self, up: Tensor, down: Tensor) -> None:
        self.gradients = FactorGradients(up, down)
        gathered_up, gathered_down = _GatherFunction.apply(up, down, self.gradients)
        # Both outputs of a Function ask for gradients if one input does: a frozen factor stays what it is.
        self.up = gathered_up if up.requires_grad else up
        self.down = gathered_down if down.requires_grad else down


class GradientSink:
    """Where one use leaves its factors' gradients: the buffers of a pair, seen as up [N, r] and down [r, K]."""

    def __init__(self, gradients: FactorGradients, transposed: bool) -> None:
        self._gradients, self._transposed = gradients, transposed

    @property
    def up(self) -> Tensor:
        """[N, r], float32."""
        return self._gradients.buffer("down").mT if self._transposed else self._gradients.buffer("up")

    @property
    def down(self) -> Tensor:
        """[r, K], float32."""
        return self._gradients.buffer("up").mT if self._transposed else self._gradients.buffer("down")


class SharedInput:
    """An input x [M, K] that many maps with one `down` A [r, K] read, such as the encoder's output in cross-attention.

    z = x Aᵀ is computed once, dx and Σ g ⊙ e are added up in place, and dA costs one pass over x for all maps.
    Made by `share_input`, found again with `SharedInput.of(x, down)`.
    """

    _ATTRIBUTE = "_s2lora_shared_input"

    def __init__(self, rows: Tensor, down: Tensor, wants_dx: bool) -> None:
        self.rows, self.down, self.wants_dx = rows, down, wants_dx
        self._z: Tensor | None = None
        self._sums = _PassSums()

    @classmethod
    def of(cls, x: Tensor, down: Tensor) -> "SharedInput | None":
        """The shared input whose tensor x is and whose A is `down`, if any.

        A map with another A, of another adapter or with ranks left out, reads x as any tensor.
        """
        found: SharedInput | None = getattr(x, cls._ATTRIBUTE, None)
        return found if found is not None and same_tensor(found.down, down) else None

    @property
    def z(self) -> Tensor:
        """[M, r], computed when first asked for."""
        if self._z is None:
            with torch.no_grad():
                self._z = project(self.rows, self.down)
        return self._z

    @property
    def g(self) -> Tensor:
        """Σ g ⊙ e so far, [M, r] in float32, to add to in place."""
        sums = self._sums.so_far()
        if "g" not in sums:
            sums["g"] = self.rows.new_zeros(self.rows.shape[0], self.down.shape[0], dtype=wide(self.rows.dtype))
        return sums["g"]

    def add_dx(self, gradient: Callable[[Tensor | None], Tensor]) -> None:
        """Adds one use's dx [M, K] to the sum: `gradient(sum)` adds to the sum in place, `gradient(None)` makes dx.

        dx in half precision is summed in float32, as autograd would under autocast.
        """
        sums, dtype = self._sums.so_far(), self.rows.dtype
        so_far = sums.get("dx")
        if dtype == wide(dtype):
            sums["dx"] = gradient(so_far)
        elif so_far is None:
            sums["dx"] = gradient(None).to(wide(dtype))
        else:
            so_far.add_(gradient(None))

    def take(self) -> tuple[Tensor | None, Tensor | None]:
        """The sums of dx, in x's dtype, and of g, which begin anew."""
        sums = self._sums.so_far()
        dx = sums.pop("dx", None)
        return None if dx is None else dx.to(self.rows.dtype), sums.pop("g", None)


_Z = "_s2lora_z"
_GELU_INPUT = "_s2lora_gelu_input"


def _remember(x: Tensor, name: str, value: Any) -> None:
    setattr(x, name, (write_count(x), value))


def _remembered(x: Tensor, name: str) -> Any:
    """What was remembered of x under that name; None where nothing was, or x was written to since."""
    count, value = getattr(x, name, (None, None))
    return value if count is not None and count == write_count(x) else None


def remember_z(x: Tensor, z: Tensor, down: Tensor) -> None:
    """Lets the maps that read x [..., K] find z = x Aᵀ, computed with `down` A, in `known_z`."""
    _remember(x, _Z, (z, down.detach()))


def remember_gelu(x: Tensor, u: Tensor) -> None:
    """Lets a map that reads x = GELU(u) find u, of x's shape and dtype, in `gelu_input`."""
    _remember(x, _GELU_INPUT, u.detach())


def gelu_input(x: Tensor) -> Tensor | None:
    """u where x = GELU(u) and the GELU keeps u for its own backward: keeping that is for free."""
    return _remembered(x, _GELU_INPUT)


def known_z(x: Tensor, down: Tensor) -> Tensor | None:
    """z [M, r] of x [..., K] with this very `down`, if something computed it and x is what it was then."""
    found = _remembered(x, _Z)
    if found is None:
        return None
    z, its_down = found
    return z if same_tensor(its_down, down) else None


class _ShareInputFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, down: Tensor, shared: SharedInput, sink: GradientSink | None) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x)  # which `shared` holds: saved so that autograd notices where it is written to
        ctx.shared, ctx.sink = shared, sink
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, further: Tensor | None) -> tuple[Tensor | None, Tensor | None, None, None]:
        shared: SharedInput = ctx.shared
        (x,) = ctx.saved_tensors
        dx, g = shared.take()
        if dx is not None:
            dx = dx.view(x.shape)
        if further is not None:
            dx = further if dx is None else dx + further
        d_down = None
        if g is not None and ctx.needs_input_grad[1]:
            buffer = torch.zeros_like(shared.down, dtype=wide(shared.down.dtype)) if ctx.sink is None else ctx.sink.down
            with device.without_autocast(g):
                input_gradient_factor(shared.rows, g, buffer)
            d_down = buffer.to(shared.down.dtype) if ctx.sink is None else None
        return dx, d_down, None, None


def share_input(x: Tensor, down: Tensor, sink: GradientSink | None = None) -> Tensor:
    """x [..., K], the same values, marked as the input of many maps with the one `down` A [r, K].

    x must have the dtype of the products. `sink` takes the gradient of `down`, as in `s2_linear_group`.
    """
    shared = SharedInput(x.detach().reshape(-1, x.shape[-1]), down.detach(), x.requires_grad)
    y = _ShareInputFunction.apply(x, down, shared, sink)
    setattr(y, SharedInput._ATTRIBUTE, shared)
    return y
