"""What a function does on a GPU, as one CUDA graph: a host starts it by one call, and does not wait."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Function = Callable[..., Sequence[Tensor]]


class Launched:
    """Calls a function of tensors; on a GPU, what it launches is recorded and played from then on.

    The first call with tensors of the same shapes and types is direct, as it compiles and loads what it needs; the
    second records. What else the function reads or writes must be the same tensors in every call. What it asks of
    Python it asks no more once it is recorded. On a CPU, each call is direct.
    """

    def __init__(self, function: Function):
        self._function = function
        self._graphs: dict[tuple[Any, ...], _Graph | None] = {}  # by shapes and types; None: called once

    def __call__(self, *tensors: Tensor) -> Sequence[Tensor]:
        """What the function returns, which no later call changes."""
        if not tensors[0].is_cuda:
            return self._function(*tensors)
        kinds = tuple((each.shape, each.dtype) for each in tensors)
        if kinds not in self._graphs:
            self._graphs[kinds] = None
            return self._function(*tensors)
        graph = self._graphs[kinds]
        if graph is None:
            graph = self._graphs[kinds] = _Graph(self._function, tensors)
        return graph(tensors)


class _Graph:
    def __init__(self, function: Function, inputs: Sequence[Tensor]):
        self._inputs = [each.detach().clone(memory_format=torch.contiguous_format) for each in inputs]
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):  # other threads save checkpoints
            self._outputs = list(function(*self._inputs))

    @torch.no_grad()
    def __call__(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        _copy(self._inputs, inputs)
        self._graph.replay()
        outputs = [torch.empty_like(each) for each in self._outputs]
        _copy(outputs, self._outputs)  # the next call writes over them
        return outputs


def _copy(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """All tensors of a type in one launch."""
    pairs: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
    for target, source in zip(targets, sources, strict=True):
        same = pairs.setdefault(target.dtype, ([], []))
        same[0].append(target)
        same[1].append(source)
    for of_type in pairs.values():
        torch._foreach_copy_(*of_type)
