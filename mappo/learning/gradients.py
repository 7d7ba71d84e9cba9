"""The loss of a minibatch and the clipped gradients of all parameters, as one recorded function."""

from collections.abc import Mapping, Sequence

import torch
from tensordict import NestedKey, TensorDict
from torch import Tensor, nn
from torchrl.objectives import LossModule

from mappo.compute.traced_function import TracedFunction, Way


class Gradients:
    """Differentiates a loss of TorchRL's with respect to the parameters of the networks it has."""

    def __init__(
        self,
        networks: nn.ModuleDict,
        loss: LossModule,
        in_keys: Sequence[NestedKey],
        outputs: Mapping[str, str],
        max_norm: float,
        way: Way,
    ):
        """`in_keys`: of the loss, as far as needed. `outputs`: names for its outputs that are wanted, where it has
        them. Differentiated is the sum of all its losses.

        The gradient of each network is scaled to `max_norm` at most. `names` are those of what a call returns.
        """
        wanted = {name: key for name, key in outputs.items() if key in loss.out_keys}
        self.names = [*wanted, *(f"gradient_norm_{name}" for name in networks)]
        self._parameters = list(networks.parameters())

        def differentiate(*tensors: Tensor) -> list[Tensor]:
            frames = dict(zip(in_keys, tensors, strict=True))
            output = loss(TensorDict(frames, batch_size=[len(tensors[0])]))
            total = sum(value for key, value in output.items() if key.startswith("loss_"))
            groups = {name: list(network.parameters()) for name, network in networks.items()}
            left = iter(torch.autograd.grad(total, [each for group in groups.values() for each in group]))
            clipped = [_clipped([next(left) for _ in group], max_norm) for group in groups.values()]
            norms, gradients = zip(*clipped, strict=True)
            values = torch.stack([*(output[key] for key in wanted.values()), *norms])
            return [values, *(each for group in gradients for each in group)]

        self._differentiate = TracedFunction(differentiate, networks, self._parameters[0].device, way)

    def __call__(self, *minibatch: Tensor) -> Tensor:
        """Outputs of the loss on a minibatch, by `in_keys` each [frames, ...], and norms before clipping: [names].

        Gradients are left in the parameters' `grad`.
        """
        values, *gradients = self._differentiate(*minibatch)
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            parameter.grad = gradient
        return values


def _clipped(gradients: list[Tensor], max_norm: float) -> tuple[Tensor, list[Tensor]]:
    """Their common norm, and all scaled so that it is `max_norm` at most, as `clip_grad_norm_` scales in place."""
    norm = nn.utils.get_total_norm(gradients, foreach=False)
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    return norm, [gradient * scale for gradient in gradients]
