"""One specialisation of a kernel, as a launcher would ask the compiler for it: what `aot.py` compiles without a GPU."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

TRITON_TYPES = {"bf16": "*bf16", "fp16": "*fp16", "fp32": "*fp32"}


@dataclass(frozen=True)
class Variant:
    """A kernel function with everything the compiler needs; each kernel module lists its own for a target.

    `kernel`, `config`, `direction`, `dtype` ("bf16", "fp32") and padded rank `R` name it in reports. `constants` are
    its compile-time arguments, strides that are 1 and pointers that are None among them. `types` gives Triton's type of
    the other arguments; those it leaves out are "*<dtype>" if their name ends in `_ptr`, else "i32". `divisible` names
    the integer arguments that are multiples of 16; pointers always are.
    """

    kernel: str
    config: str
    direction: str
    dtype: str
    R: int
    function: Any
    constants: Mapping[str, Any]
    num_warps: int
    num_stages: int
    types: Mapping[str, str]
    divisible: tuple[str, ...] = ()

    def signature(self) -> dict[str, str]:
        """Triton's type of every argument, in order."""
        return {name: self._type(name) for name in self.function.arg_names}

    def _type(self, name: str) -> str:
        if name in self.constants:
            return "constexpr"
        default = TRITON_TYPES[self.dtype] if name.endswith("_ptr") else "i32"
        return self.types.get(name, default)
