"""A function of tensors and of a module's parameters that is traced once; later calls run the traced graph.

With small tensors, Python takes longer to choose and call the operations than the operations take themselves.
A traced graph is the bare list of operations, and its results have the same bits. A compiled graph fuses
operations, so it rounds differently. A mixed graph also multiplies large matrices in bfloat16 and accumulates
in float32.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.func import functional_call
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing
from torch.overrides import TorchFunctionMode

from mappo.compute.compiler import Compiled, compile_graph, trace_graph
from mappo.compute.computation import Way

_ATEN = torch.ops.aten

# The least side of matrices that are multiplied in bfloat16. The conversion of smaller ones takes as long as it
# saves, and the narrow first and last layers would lose the most accuracy.
MIN_BFLOAT16_SIDE = 64
# The number of direct calls before tracing. Tracing takes about as long as a hundred calls of the graph save.
DIRECT_CALLS = 50


class TracedFunction:
    """A function of tensors and of a module's parameters and buffers, whose values may change between calls.

    A plain function is traced for each combination of shapes, after `DIRECT_CALLS` direct calls with these
    shapes. Direct calls give the same bits, so a function that is called seldom saves the time of tracing. A
    function that is to be compiled is traced in its first call. Tracing leaves the caller's random state as
    it was. Random numbers that the function draws are drawn anew in every call.
    """

    def __init__(
        self,
        function: Callable[..., Sequence[Tensor]],
        module: nn.Module,
        device: torch.device,
        way: Way = "plain",
    ):
        """Wrap `function`, which takes tensors and returns tensors.

        `function` must not write into its arguments, parameters or buffers. Python may branch on tensors'
        values only to check that they are valid: the graph keeps the branch that was taken during tracing.
        """
        self._caller, self._device, self._way = _Caller(function, module), device, way
        self._names = [name for name, _ in (*self._caller.named_parameters(), *self._caller.named_buffers())]
        self._tensors = [*self._caller.parameters(), *self._caller.buffers()]
        self._graphs: dict[tuple[torch.Size, ...], GraphModule | Compiled] = {}
        self._calls: Counter[tuple[torch.Size, ...]] = Counter()

    def __call__(self, *tensors: Tensor) -> Sequence[Tensor]:
        """Return the function's results, detached from autograd."""
        shapes, inputs = tuple(tensor.shape for tensor in tensors), [*self._tensors, *tensors]
        self._calls[shapes] += 1
        if self._way == "plain" and self._calls[shapes] <= DIRECT_CALLS:
            return [output.detach() for output in self._caller(*tensors)]
        self._ensure_graph(shapes, inputs)
        with torch.no_grad():
            outputs: Sequence[Tensor] = self._graphs[shapes](*inputs)
        return outputs

    def prepare(self, *tensors: Tensor) -> None:
        """Start to compile for tensors of these shapes, unless the function is plain. Values do not matter."""
        if self._way != "plain":
            self._ensure_graph(tuple(tensor.shape for tensor in tensors), [*self._tensors, *tensors])

    def wait(self) -> None:
        """Wait for everything that is being compiled.

        Raises:
            CompilationFailed: the compiler is missing or failed.
        """
        for graph in self._graphs.values():
            if isinstance(graph, Compiled):
                graph.wait()

    def _ensure_graph(self, shapes: tuple[torch.Size, ...], inputs: list[Tensor]) -> None:
        if shapes not in self._graphs:
            with _same_random_states(self._device):
                graph = self._trace(inputs)
                self._graphs[shapes] = graph if self._way == "plain" else compile_graph(graph, inputs)

    def _trace(self, inputs: list[Tensor]) -> GraphModule:
        """Trace the function (parameters, buffers, tensors) -> results."""
        names = self._names

        def call(*inputs: Tensor) -> list[Tensor]:
            tensors = dict(zip(names, inputs, strict=False))
            outputs: Sequence[Tensor] = functional_call(self._caller, tensors, inputs[len(names) :])
            return [output.detach() for output in outputs]

        with _CurrentTruthValues():
            graph = trace_graph(call, inputs, _REPLACEMENTS[self._way])
        graph.graph.eliminate_dead_code()
        graph.recompile()
        return graph


def _tanh(values: Tensor) -> Tensor:
    """Return tanh accurate to 2e-7, three times as fast as the exact one in compiled code."""
    return 1 - 2 / (torch.exp(2 * values) + 1)


def _matmul(left: Tensor, right: Tensor) -> Tensor:
    """Multiply large matrices in bfloat16 and accumulate in float32; leave other products to PyTorch."""
    if left.dtype != torch.float32 or min(*left.shape[-2:], *right.shape[-2:]) < MIN_BFLOAT16_SIDE:
        return NotImplemented  # type: ignore[no-any-return]
    return torch.matmul(left.bfloat16(), right.bfloat16()).float()


def _add_matmul(summand: Tensor, left: Tensor, right: Tensor) -> Tensor:
    product = _matmul(left, right)
    return product if product is NotImplemented else product + summand


_FAST = {_ATEN.tanh.default: _tanh}
_REPLACEMENTS: dict[Way, dict[OpOverload, Callable[..., Tensor]]] = {
    "plain": {},
    "fast": _FAST,
    "mixed": {
        **_FAST,
        **{operation.default: _matmul for operation in (_ATEN.mm, _ATEN.bmm)},
        **{operation.default: _add_matmul for operation in (_ATEN.addmm, _ATEN.baddbmm)},
    },
}


class _Caller(nn.Module):
    """A module that owns the parameters and calls the function, so that `functional_call` can replace them."""

    def __init__(self, function: Callable[..., Sequence[Tensor]], module: nn.Module):
        super().__init__()
        self.module = module
        self._function = function

    def forward(self, *tensors: Tensor) -> Sequence[Tensor]:
        return self._function(*tensors)


class _CurrentTruthValues(TorchFunctionMode):
    """A mode in which `bool(tensor)` returns the current value during tracing instead of an error.

    TorchRL only checks in this way that parameters of distributions and entropies are valid. If later ones are
    invalid, the loss is not finite, and the learner raises an error.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if getattr(func, "__name__", "") == "__bool__":
            with disable_proxy_modes_tracing():
                return func(*args)
        return func(*args, **(kwargs or {}))


@contextmanager
def _same_random_states(device: torch.device) -> Iterator[None]:
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield
