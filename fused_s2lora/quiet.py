"""Imported first: PEFT imports bitsandbytes, which on some CPUs warns of a kernel for inference that is not used here.

Maps in 4 bits keep their layout (see `quantized.py`), which that kernel cannot read.
"""

import logging

logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(
    lambda record: "gemm_4bit_forward from kernels-community" not in str(record.msg)
)
