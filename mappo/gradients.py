"""The loss of a minibatch and its gradients, as one recorded function.

TorchRL's loss runs once for each size of a minibatch, under autograd, and what it does to tensors is recorded: the
loss, its terms and the gradients of all parameters as one graph. Played again, it gives the same bits without the
Python around them, which takes as long as the smaller operations; compiled, it also fuses these.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from torch import Tensor, nn
from torch.func import functional_call
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, make_fx
from torch.overrides import TorchFunctionMode
from torchrl.objectives import LossModule

from mappo.compiling import compile_graph

Terms = dict[str, Tensor]  # scalars by TorchRL's names, such as loss_objective and kl_approx


class Gradients:
    """Differentiates a loss of TorchRL's with respect to the parameters of its networks."""

    def __init__(
        self,
        networks: nn.Module,
        loss: LossModule,
        in_keys: Sequence[NestedKey],
        out_keys: Sequence[str],
        is_compiled: bool,
    ):
        """`in_keys` and `out_keys`: of the loss, as far as needed; differentiated is the sum of all its losses."""
        self._networks, self._in_keys, self._out_keys = _WithLoss(networks, loss), in_keys, out_keys
        self._parameters = dict(self._networks.named_parameters())
        self._buffers = dict(self._networks.named_buffers())
        self._is_compiled = is_compiled
        self._recorded: dict[int, Callable[..., Any]] = {}  # by frames of a minibatch

    def __call__(self, minibatch: TensorDictBase) -> Terms:
        """Terms of the loss on a minibatch [frames]; the gradients are left in the parameters' `grad`."""
        inputs = [*self._parameters.values(), *self._buffers.values(), *(minibatch[key] for key in self._in_keys)]
        if len(minibatch) not in self._recorded:
            graph = self._record(minibatch, inputs)
            self._recorded[len(minibatch)] = compile_graph(graph, inputs) if self._is_compiled else graph
        with torch.no_grad():
            outputs = self._recorded[len(minibatch)](*inputs)
        gradients = outputs[len(self._out_keys) :]
        for parameter, gradient in zip(self._parameters.values(), gradients, strict=True):
            parameter.grad = gradient
        return dict(zip(self._out_keys, outputs, strict=False))

    def _record(self, minibatch: TensorDictBase, inputs: list[Tensor]) -> GraphModule:
        """(parameters, buffers, the minibatch's tensors) -> (terms, gradients)."""
        num_parameters, num_buffers = len(self._parameters), len(self._buffers)

        def differentiate(*inputs: Tensor) -> list[Tensor]:
            parameters = inputs[:num_parameters]
            buffers = inputs[num_parameters : num_parameters + num_buffers]
            frames = dict(zip(self._in_keys, inputs[num_parameters + num_buffers :], strict=True))
            tensors = dict(zip([*self._parameters, *self._buffers], [*parameters, *buffers], strict=True))
            output = functional_call(self._networks, tensors, TensorDict(frames, minibatch.batch_size))
            total = sum(value for key, value in output.items() if key.startswith("loss_"))
            return [*(output[key].detach() for key in self._out_keys), *torch.autograd.grad(total, parameters)]

        with _FirstValues():
            graph = make_fx(differentiate)(*inputs)
        graph.graph.eliminate_dead_code()
        graph.recompile()
        return graph


class _WithLoss(nn.Module):
    """Networks whose parameters can be given for one call of a loss that has them, too."""

    def __init__(self, networks: nn.Module, loss: LossModule):
        super().__init__()
        self.networks = networks
        self._loss = (loss,)  # in a tuple it is no submodule, whose parameters would count twice

    def forward(self, minibatch: TensorDictBase) -> TensorDictBase:
        output: TensorDictBase = self._loss[0](minibatch)
        return output


class _FirstValues(TorchFunctionMode):
    """Python that asks for a value while it is recorded is told that of the first minibatch.

    TorchRL asks only whether parameters of distributions and entropies are valid; if a later one is not, the loss
    is not finite.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if getattr(func, "__name__", "") == "__bool__":
            with disable_proxy_modes_tracing():
                return func(*args)
        return func(*args, **(kwargs or {}))
