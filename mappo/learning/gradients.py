"""The loss of a minibatch and the clipped gradients of all parameters, as one traced function."""

from collections.abc import Mapping, Sequence
from itertools import chain

import torch
from tensordict import NestedKey, TensorDict
from torch import Tensor, nn
from torchrl.objectives import LossModule

from mappo.compute.computation import Way
from mappo.compute.traced_function import TracedFunction


class Gradients:
    """A function that computes the gradients of a TorchRL loss with respect to the networks' parameters."""

    def __init__(
        self,
        networks: nn.ModuleDict,
        loss: LossModule,
        in_keys: Sequence[NestedKey],
        outputs: Mapping[str, str],
        max_norm: float,
        way: Way,
    ):
        """Prepare the function, which differentiates the sum of all terms of `loss`.

        in_keys: the keys of the loss's inputs, in the order of a call's arguments.
        outputs: the key of each loss output to return, by name; outputs that the loss lacks are left out.
        max_norm: the bound to which the gradient of each network is scaled.

        The attribute `names` holds the names of the values that a call returns.
        """
        returned = {name: key for name, key in outputs.items() if key in loss.out_keys}
        self.names = [*returned, *(f"gradient_norm_{name}" for name in networks)]
        self._parameters = list(networks.parameters())

        def differentiate(*tensors: Tensor) -> list[Tensor]:
            frames = dict(zip(in_keys, tensors, strict=True))
            output = loss(TensorDict(frames, batch_size=[len(tensors[0])]))
            total = sum(value for key, value in output.items() if key.startswith("loss_"))
            groups = [list(network.parameters()) for network in networks.values()]
            gradients = iter(torch.autograd.grad(total, list(chain(*groups))))
            clipped = [_clipped([next(gradients) for _ in group], max_norm) for group in groups]
            norms, clipped_gradients = zip(*clipped, strict=True)
            values = torch.stack([*(output[key] for key in returned.values()), *norms])
            return [values, *chain(*clipped_gradients)]

        # The coefficients of the loss are buffers of it, so other values of them need no other graph.
        inputs = nn.ModuleDict({"networks": networks, "loss": loss})
        self._differentiate = TracedFunction(differentiate, inputs, self._parameters[0].device, way)

    def prepare(self, *minibatch: Tensor) -> None:
        """Start to compile for minibatches of these shapes, whose values do not matter."""
        self._differentiate.prepare(*minibatch)

    def wait(self) -> None:
        """Wait for everything that is being compiled; raise `CompilationFailed` if that fails."""
        self._differentiate.wait()

    def __call__(self, *minibatch: Tensor) -> Tensor:
        """Set the parameters' `grad` and return the loss outputs and the norms before clipping, [names].

        `minibatch` holds the tensors of `in_keys`, [frames, ...].
        """
        values, *gradients = self._differentiate(*minibatch)
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            parameter.grad = gradient
        return values


def _clipped(gradients: list[Tensor], max_norm: float) -> tuple[Tensor, list[Tensor]]:
    """Return the total norm of gradients, and copies scaled to a total norm of at most `max_norm`.

    `clip_grad_norm_` does the same in place, but a traced function must not write into its inputs.
    """
    norm = nn.utils.get_total_norm(gradients, foreach=False)
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    return norm, [gradient * scale for gradient in gradients]
