"""The loss of a minibatch and the gradients of all parameters, as one recorded function."""

from collections.abc import Sequence

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from torch import Tensor, nn
from torchrl.objectives import LossModule

from mappo.recording import Recorded, Way


class Gradients:
    """Differentiates a loss of TorchRL's with respect to the parameters of the networks it has."""

    def __init__(
        self,
        networks: nn.Module,
        loss: LossModule,
        in_keys: Sequence[NestedKey],
        out_keys: Sequence[str],
        way: Way,
    ):
        """`in_keys` and `out_keys`: of the loss, as far as needed; differentiated is the sum of all its losses."""
        self._parameters = list(networks.parameters())
        self._in_keys, self._out_keys = in_keys, out_keys

        def differentiate(*tensors: Tensor) -> list[Tensor]:
            frames = dict(zip(in_keys, tensors, strict=True))
            output = loss(TensorDict(frames, batch_size=[len(tensors[0])]))
            total = sum(value for key, value in output.items() if key.startswith("loss_"))
            return [*(output[key] for key in out_keys), *torch.autograd.grad(total, list(networks.parameters()))]

        self._differentiate = Recorded(differentiate, networks, self._parameters[0].device, way)

    def __call__(self, minibatch: TensorDictBase) -> dict[str, Tensor]:
        """The loss's outputs on a minibatch [frames], scalars; gradients are left in the parameters' `grad`."""
        outputs = self._differentiate(*(minibatch[key] for key in self._in_keys))
        for parameter, gradient in zip(self._parameters, outputs[len(self._out_keys) :], strict=True):
            parameter.grad = gradient
        return dict(zip(self._out_keys, outputs, strict=False))
