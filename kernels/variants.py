"""One specialisation of a kernel, as a launcher would ask the compiler for it: what `aot.py` compiles without a GPU."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

TRITON_TYPES = {"bf16": "*bf16", "fp16": "*fp16", "fp32": "*fp32", "tf32": "*fp32"}
# What operands of products are stored in, by the name of a build: float32 is multiplied as such or as TF32.
PRODUCT_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "tf32": torch.float32}


def precision_of(dtype: str) -> str:
    """The `input_precision` of products in builds of that name."""
    return "tf32" if dtype == "tf32" else "ieee"


@dataclass(frozen=True)
class Variant:
    """A kernel function with everything the compiler needs; each kernel module lists its own for a target.

    `kernel`, `config`, `direction`, `dtype` ("bf16", "fp16", "fp32", "tf32") and padded rank `R` name it in reports.
    `constants` are its compile-time arguments, strides that are 1 and pointers that are None among them. `types` gives
    Triton's type of the other arguments; those it leaves out are "*<dtype>" if their name ends in `_ptr`, else "i32".
    `divisible` names the integer arguments that are multiples of 16; pointers always are. `rare`: not what a training
    step with bfloat16, float32 or TF32 products launches; the tests that are not slow leave it out.
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
    rare: bool = False

    def signature(self) -> dict[str, str]:
        """Triton's type of every argument, in order."""
        return {name: self._type(name) for name in self.function.arg_names}

    def _type(self, name: str) -> str:
        if name in self.constants:
            return "constexpr"
        default = TRITON_TYPES[self.dtype] if name.endswith("_ptr") else "i32"
        return self.types.get(name, default)
