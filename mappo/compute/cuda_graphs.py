"""What a function does on a GPU, as one CUDA graph: a host starts it by one call, and does not wait."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Function = Callable[..., Sequence[Tensor]]
_WITH_GRAPHS = "cuda"  # type of device


class CudaGraphed:
    """Calls a function of tensors; on a GPU, what it launches is recorded and played from then on.

    The first call with tensors of the same shapes and types is direct, as it compiles and loads what it needs; the
    second records. What else the function reads or writes must be the same tensors in every call. What it asks of
    Python it asks no more once it is recorded. On a CPU, each call is direct.
    """

    def __init__(self, function: Function, is_chained: bool = False):
        """Chained, it returns first of all what its next call is given, which on a GPU stays where it is."""
        self._function, self._is_chained = function, is_chained
        self._graphs: dict[tuple[Any, ...], _Graph | None] = {}  # by shapes and types; None: called once

    def __call__(self, *tensors: Tensor) -> Sequence[Tensor]:
        """What the function returns, until the next call, which may write over it."""
        if tensors[0].device.type != _WITH_GRAPHS:
            return self._function(*tensors)
        kinds = tuple((each.shape, each.dtype) for each in tensors)
        if kinds not in self._graphs:
            self._graphs[kinds] = None
            return self._function(*tensors)
        graph = self._graphs[kinds]
        if graph is None:
            graph = self._graphs[kinds] = _Graph(self._function, self._is_chained, tensors)
        return graph(tensors)


class _Graph:
    def __init__(self, function: Function, is_chained: bool, inputs: Sequence[Tensor]):
        self._inputs = [each.detach().clone(memory_format=torch.contiguous_format) for each in inputs]
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):  # other threads save checkpoints
            results = function(*self._inputs)
            chained = self._inputs if is_chained else []
            owns = [*chained, *[None] * (len(results) - len(chained))]
            outputs = [
                each if each is own else torch.empty_like(each) for own, each in zip(owns, results, strict=True)
            ]
            copy_each(outputs, results)  # first of all, as results may be inputs, which are written next
            copy_each(chained, outputs[: len(chained)])
        self._outputs = [*chained, *outputs[len(chained) :]]

    @torch.no_grad()
    def __call__(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        copy_each(self._inputs, inputs)
        self._graph.replay()
        return self._outputs


def copy_each(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """But for those that are the same: all of a type in one launch."""
    pairs: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
    for target, source in zip(targets, sources, strict=True):
        if target is not source:
            of_type = pairs.setdefault(target.dtype, ([], []))
            of_type[0].append(target)
            of_type[1].append(source)
    for of_type in pairs.values():
        torch._foreach_copy_(*of_type)
