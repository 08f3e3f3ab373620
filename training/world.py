"""The processes of one run, as torchrun or `accelerate launch` starts them: one a GPU."""

import os

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env

from .errors import UserError

_SHARDING = {"FSDP": "FSDP", "DEEPSPEED": "DeepSpeed", "MEGATRON_LM": "Megatron-LM"}


def world() -> PartialState:
    """The processes that run together; on the first call each waits for all of them and takes its own GPU."""
    return PartialState(cpu=not torch.cuda.is_available())


def processes() -> int:
    """How many run together, without waiting for them."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def speaks() -> bool:
    """Whether this one tells what all of them do."""
    return os.environ.get("RANK", "0") == "0"


def check_alone(command: str) -> None:
    """Nothing, where this process runs by itself.

    Raises:
        UserError: others run with it, and `command` is not for several.
    """
    if processes() > 1:
        raise UserError(
            f"s2lora {command} is for one process, and {processes()} were started together; call it without torchrun"
            + " (called several times, the calls share the runs)" * (command == "compare")
        )


def is_of_another(error: RuntimeError) -> bool:
    """Whether this process ended because another of the run is gone: what gloo and NCCL say of a connection's end."""
    return processes() > 1 and any(gone in str(error) for gone in ("remote worker", "remote process"))


def check_not_sharded() -> None:
    """Nothing, where each process has the whole model, as under torchrun.

    Raises:
        UserError: `accelerate launch` has asked for another way, in which one of them cannot save the adapter.
    """
    for flag, name in _SHARDING.items():
        if parse_flag_from_env(f"ACCELERATE_USE_{flag}"):
            raise UserError(
                f"accelerate is configured for {name}, and s2lora train has the whole model in each process; start it "
                "with torchrun, or accelerate launch --multi_gpu"
            )
