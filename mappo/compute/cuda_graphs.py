"""A function's work on a GPU as one CUDA graph, which the host launches by one call without waiting."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Function = Callable[..., Sequence[Tensor]]
_GRAPH_DEVICE = "cuda"  # type of the devices that have CUDA graphs


class CudaGraphed:
    """A function of tensors that, on a GPU, is captured as a CUDA graph and replayed from then on.

    The first call for each combination of shapes and types runs the function directly, because kernels are
    compiled and loaded then. The second call captures the graph; later calls replay it. Python code in the
    function does not run again once the graph is captured. Other tensors that the function reads or writes
    must be the same objects in every call. On a CPU, every call runs the function directly.
    """

    def __init__(self, function: Function, is_chained: bool = False):
        """Wrap `function`.

        is_chained: the function's first results are the arguments of its next call. On a GPU, they then stay in
            the graph's input memory, and no call copies them.
        """
        self._function, self._is_chained = function, is_chained
        self._graphs: dict[tuple[Any, ...], _Graph | None] = {}  # by shapes and types; None: called only once

    def __call__(self, *tensors: Tensor) -> Sequence[Tensor]:
        """Return the function's results; the next call may overwrite them."""
        if tensors[0].device.type != _GRAPH_DEVICE:
            return self._function(*tensors)
        signature = tuple((tensor.shape, tensor.dtype) for tensor in tensors)
        if signature not in self._graphs:
            self._graphs[signature] = None
            return self._function(*tensors)
        graph = self._graphs[signature]
        if graph is None:
            graph = self._graphs[signature] = _Graph(self._function, self._is_chained, tensors)
        return graph(tensors)


class _Graph:
    def __init__(self, function: Function, is_chained: bool, inputs: Sequence[Tensor]):
        self._inputs = [tensor.detach().clone(memory_format=torch.contiguous_format) for tensor in inputs]
        self._graph = torch.cuda.CUDAGraph()
        # "thread_local" lets other threads use the GPU during capture: they save checkpoints.
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            results = function(*self._inputs)
            chained = self._inputs if is_chained else []
            next_inputs = [*chained, *[None] * (len(results) - len(chained))]
            outputs = [
                result if result is next_input else torch.empty_like(result)
                for next_input, result in zip(next_inputs, results, strict=True)
            ]
            # Two steps, because a result may be an input of another position, which the second step overwrites.
            copy_tensors(outputs, results)
            copy_tensors(chained, outputs[: len(chained)])
        self._outputs = [*chained, *outputs[len(chained) :]]

    @torch.no_grad()
    def __call__(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        copy_tensors(self._inputs, inputs)
        self._graph.replay()
        return self._outputs


def copy_tensors(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy each source into its target, one fused launch per dtype; identical tensors are skipped."""
    pairs: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
    for target, source in zip(targets, sources, strict=True):
        if target is not source:
            targets_of_type, sources_of_type = pairs.setdefault(target.dtype, ([], []))
            targets_of_type.append(target)
            sources_of_type.append(source)
    for targets_of_type, sources_of_type in pairs.values():
        torch._foreach_copy_(targets_of_type, sources_of_type)
