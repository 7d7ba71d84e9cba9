"""The loss of a minibatch and the clipped gradients of all parameters, as one recorded function."""

from collections.abc import Mapping, Sequence

import torch
from tensordict import NestedKey, TensorDict
from torch import Tensor, nn
from torchrl.objectives import LossModule

from mappo.recording import Recorded, Way


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
        """`in_keys` and `outputs`, by names: of the loss, as far as needed. Differentiated is the sum of all
        its losses.

        The gradient of each network is scaled to `max_norm` at most.
        """
        self._parameters = list(networks.parameters())
        self._names = [*outputs, *(f"gradient_norm_{name}" for name in networks)]

        def differentiate(*tensors: Tensor) -> list[Tensor]:
            frames = dict(zip(in_keys, tensors, strict=True))
            output = loss(TensorDict(frames, batch_size=[len(tensors[0])]))
            total = sum(value for key, value in output.items() if key.startswith("loss_"))
            groups = {name: list(network.parameters()) for name, network in networks.items()}
            left = iter(torch.autograd.grad(total, [each for group in groups.values() for each in group]))
            clipped = [_clipped([next(left) for _ in group], max_norm) for group in groups.values()]
            norms, gradients = zip(*clipped, strict=True)
            return [
                *(output[key] for key in outputs.values()),
                *norms,
                *(each for group in gradients for each in group),
            ]

        self._differentiate = Recorded(differentiate, networks, self._parameters[0].device, way)

    def __call__(self, *minibatch: Tensor) -> dict[str, Tensor]:
        """Outputs of the loss on a minibatch, which is by `in_keys`, each [frames, ...]; scalars.

        With them, as `gradient_norm_<network>`, norms before gradients were clipped. Gradients are left in the
        parameters' `grad`.
        """
        outputs = self._differentiate(*minibatch)
        for parameter, gradient in zip(self._parameters, outputs[len(self._names) :], strict=True):
            parameter.grad = gradient
        return dict(zip(self._names, outputs, strict=False))


def _clipped(gradients: list[Tensor], max_norm: float) -> tuple[Tensor, list[Tensor]]:
    """Their common norm, and all scaled so that it is `max_norm` at most, as `clip_grad_norm_` scales in place."""
    norm = nn.utils.get_total_norm(gradients, foreach=False)
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    return norm, [gradient * scale for gradient in gradients]
