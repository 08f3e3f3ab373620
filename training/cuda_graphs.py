"""Forward and backward of a training step as CUDA graphs, one for each shape of batch.

A step of Whisper is thousands of launches, and often the host takes longer to issue them than the GPU to run them. A
graph holds them all: it is recorded once and issued whole from then on.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class _Recorded:
    """A graph, the memory it reads its batch from, and where it leaves losses and gradients."""

    graph: torch.cuda.CUDAGraph
    inputs: dict[str, Tensor]
    losses: dict[str, Tensor]
    gradients: list[Tensor | None]


class GraphedBackward:
    """`losses(batch)`, scalars by name, and the backward pass of the one named "loss".

    The first batch of a shape is computed as usual, at the second a graph is recorded, which every later one replays.
    Beyond `most` shapes further ones are computed as usual. Nothing that `losses` does on the host is done again in a
    replay: it must not read a tensor's value there, and may draw random numbers on the GPU alone.

    Args:
        losses: called with batches like those given to the object, autocast and all.
        parameters: whose gradients are wanted, in memory that stays where it is.
        most: shapes that graphs are recorded for.
    """

    def __init__(
        self, losses: Callable[[dict[str, Any]], dict[str, Tensor]], parameters: Iterable[nn.Parameter], most: int = 64
    ) -> None:
        self._losses, self._parameters, self._most = losses, list(parameters), most
        self._seen: set[tuple] = set()
        self._recorded: dict[tuple, _Recorded] = {}
        # One pool: a graph may write over what others leave but for their losses and gradients, which stay in use.
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()

    def __call__(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """The losses; each parameter's `.grad` is then this batch's gradient, whatever it was before.

        `batch` holds tensors of the GPU, and values of other kinds that mean another shape where they differ. What is
        returned and the gradients are overwritten by the next call.
        """
        tensors = {name: value for name, value in batch.items() if isinstance(value, Tensor)}
        shapes = ((name, value.shape, value.dtype) for name, value in tensors.items())
        key = (*shapes, *((name, value) for name, value in batch.items() if name not in tensors))
        recorded = self._recorded.get(key)
        if recorded is None:
            for parameter in self._parameters:
                parameter.grad = None
            if key not in self._seen or len(self._recorded) >= self._most:
                self._seen.add(key)
                return self._run(batch)
            recorded = self._recorded[key] = self._record(batch, tensors)
        for name, value in tensors.items():
            recorded.inputs[name].copy_(value)
        recorded.graph.replay()
        for parameter, gradient in zip(self._parameters, recorded.gradients, strict=True):
            parameter.grad = gradient
        return recorded.losses

    def _run(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """On the stream that graphs are recorded on, where autograd then finds every node."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            losses = self._forward_and_backward(batch)
        torch.cuda.current_stream().wait_stream(self._stream)
        return losses

    def _record(self, batch: dict[str, Any], tensors: dict[str, Tensor]) -> _Recorded:
        inputs = {name: value.clone() for name, value in tensors.items()}
        graph = torch.cuda.CUDAGraph()
        # Gives cached memory back first. What other threads ask of CUDA meanwhile, as the one that pins batches for the
        # DataLoader, is no part of the graph and must not end its capture.
        capture: dict[str, Any] = {"pool": self._pool, "stream": self._stream, "capture_error_mode": "thread_local"}
        with torch.cuda.graph(graph, **capture):
            losses = self._forward_and_backward(batch | inputs)
        return _Recorded(graph, inputs, losses, [parameter.grad for parameter in self._parameters])

    def _forward_and_backward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        losses = self._losses(batch)
        losses["loss"].backward()
        return {name: value.detach() for name, value in losses.items()}
