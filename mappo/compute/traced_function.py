"""A function of tensors and of a module's parameters, recorded once and played from then on.

Python decides what to call, and calls one operation after the other; with small tensors that takes longer than the
operations. A recorded function is the list of its operations: it gives the same bits. Compiled, operations are
fused, and round differently; mixed, large matrices are multiplied in bfloat16, too, and summed in float32.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.func import functional_call
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing
from torch.overrides import TorchFunctionMode

from mappo.compute.compiler import compile_graph, trace_graph

_ATEN = torch.ops.aten

Way = Literal["plain", "fast", "mixed"]  # operation by operation; compiled; compiled, and multiplied in bfloat16
_LARGE = 64  # sides of matrices; below, converting takes as long as it saves, and first and last layers round most
DIRECT_CALLS = 50  # before it is recorded, which takes some hundred times as long as it then saves in a call


class TracedFunction:
    """Plays what a function of tensors does with a module, whose parameters and buffers may change in between.

    The function is recorded when it has been called with tensors of the same shapes for a while, which until then
    gives the same bits without the time that recording takes; compiled, it is so from the first call. Recording
    draws no random numbers of the caller's; those that the function draws itself, it draws in every call.
    """

    def __init__(
        self,
        function: Callable[..., Sequence[Tensor]],
        module: nn.Module,
        device: torch.device,
        way: Way = "plain",
    ):
        """`function` takes tensors and returns tensors; it may write into none.

        Of values, it may ask only whether they are valid: Python goes the way that it went when it was recorded.
        """
        self._caller, self._device, self._way = _Caller(function, module), device, way
        self._names = [name for name, _ in (*self._caller.named_parameters(), *self._caller.named_buffers())]
        self._tensors = [*self._caller.parameters(), *self._caller.buffers()]
        self._recorded: dict[tuple[torch.Size, ...], Callable[..., Any]] = {}
        self._calls: Counter[tuple[torch.Size, ...]] = Counter()

    def __call__(self, *tensors: Tensor) -> Sequence[Tensor]:
        """What the function returns, without a graph of autograd."""
        shapes, inputs = tuple(each.shape for each in tensors), [*self._tensors, *tensors]
        self._calls[shapes] += 1
        if self._way == "plain" and self._calls[shapes] <= DIRECT_CALLS:
            return [each.detach() for each in self._caller(*tensors)]
        if shapes not in self._recorded:
            with _same_random_states(self._device):
                graph = self._record(inputs)
                self._recorded[shapes] = graph if self._way == "plain" else compile_graph(graph, inputs)
        with torch.no_grad():
            outputs: Sequence[Tensor] = self._recorded[shapes](*inputs)
        return outputs

    def _record(self, inputs: list[Tensor]) -> GraphModule:
        """(parameters, buffers, tensors) -> what the function returns."""
        names = self._names

        def call(*inputs: Tensor) -> list[Tensor]:
            tensors = dict(zip(names, inputs, strict=False))
            outputs: Sequence[Tensor] = functional_call(self._caller, tensors, inputs[len(names) :])
            return [each.detach() for each in outputs]

        with _FirstValues():
            graph = trace_graph(call, inputs, _REPLACED[self._way])
        graph.graph.eliminate_dead_code()
        graph.recompile()
        return graph


def _tanh(values: Tensor) -> Tensor:
    """To 2e-7, in a third of the time that compiled code takes for one that is good to the last bit."""
    return 1 - 2 / (torch.exp(2 * values) + 1)


def _product(one: Tensor, other: Tensor) -> Tensor:
    """Of large matrices, in bfloat16: 8 bits of each number, summed in float32."""
    if one.dtype != torch.float32 or min(*one.shape[-2:], *other.shape[-2:]) < _LARGE:
        return NotImplemented  # type: ignore[no-any-return]
    return torch.matmul(one.bfloat16(), other.bfloat16()).float()


def _product_and_sum(added: Tensor, one: Tensor, other: Tensor) -> Tensor:
    product = _product(one, other)
    return product if product is NotImplemented else product + added


_FAST = {_ATEN.tanh.default: _tanh}
_REPLACED: dict[Way, dict[OpOverload, Callable[..., Tensor]]] = {
    "plain": {},
    "fast": _FAST,
    "mixed": {
        **_FAST,
        **{each.default: _product for each in (_ATEN.mm, _ATEN.bmm)},
        **{each.default: _product_and_sum for each in (_ATEN.addmm, _ATEN.baddbmm)},
    },
}


class _Caller(nn.Module):
    """Has the module's parameters, so that they can be given for one call of the function that uses them."""

    def __init__(self, function: Callable[..., Sequence[Tensor]], module: nn.Module):
        super().__init__()
        self.module = module
        self._function = function

    def forward(self, *tensors: Tensor) -> Sequence[Tensor]:
        return self._function(*tensors)


class _FirstValues(TorchFunctionMode):
    """Python that asks for a truth value while it is recorded is told the present one.

    TorchRL asks only whether parameters of distributions and entropies are valid; if later ones are not, the loss
    is not finite.
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
