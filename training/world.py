"""The processes of one run, as torchrun or `accelerate launch` starts them: one a GPU."""

import os

import torch
from accelerate import PartialState

from .errors import UserError


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
