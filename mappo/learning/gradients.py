"""The losses of a minibatch and the clipped gradients of all parameters, as one traced function."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from torch import Tensor, nn
from torchrl.objectives import LossModule

from mappo.compute.computation import Way
from mappo.compute.traced_function import TracedFunction
from mappo.environment.groups import Group


@dataclass(frozen=True)
class GroupLoss:
    """The loss of one group of agents.

    networks: the networks that only this loss reaches. loss: TorchRL's loss, which averages over frames and the
    agents of the group. share: cuts the group's share out of an input of the loss, whose key it is given.
    """

    group: Group
    networks: nn.ModuleDict
    loss: LossModule
    share: Callable[[NestedKey, Tensor], Tensor]

    def __call__(self, frames: Mapping[NestedKey, Tensor]) -> TensorDictBase:
        """Return all outputs of the loss for inputs [frames, agents, ...] of all agents."""
        inputs = {key: self.share(key, tensor) for key, tensor in frames.items()}
        output: TensorDictBase = self.loss(TensorDict(inputs, batch_size=[len(next(iter(frames.values())))]))
        return output


class Gradients:
    """A function that computes the gradients of the groups' losses with respect to the networks' parameters.

    The gradient of each group is that of its loss alone, and is clipped alone. So no group counts for less
    because it has fewer agents, or because the rewards of others are larger.
    """

    def __init__(
        self,
        losses: Sequence[GroupLoss],
        in_keys: Sequence[NestedKey],
        outputs: Mapping[str, str],
        max_norm: float,
        way: Way,
    ):
        """Prepare the function, which differentiates the sum of all terms of all losses.

        in_keys: the keys of the losses' inputs, in the order of a call's arguments.
        outputs: the key of each loss output to return, by name; outputs that the losses lack are left out.
        max_norm: the bound to which the gradient of each network is scaled.

        The attribute `names` holds the names of the values that a call returns. If there are several groups, the
        values of each group follow, with names such as `kl/adversary`.
        """
        returned = {name: key for name, key in outputs.items() if key in losses[0].loss.out_keys}
        measures = [*returned, *(f"gradient_norm_{name}" for name in losses[0].networks)]
        by_group = [f"{name}/{loss.group.name}" for loss in losses for name in measures] if len(losses) > 1 else []
        self.names = [*measures, *by_group]
        networks = [network for loss in losses for network in loss.networks.values()]
        parameters = [list(network.parameters()) for network in networks]
        self._parameters = list(chain(*parameters))

        def differentiate(*tensors: Tensor) -> list[Tensor]:
            frames = dict(zip(in_keys, tensors, strict=True))
            results = [loss(frames) for loss in losses]
            total = sum(value for result in results for key, value in result.items() if key.startswith("loss_"))
            gradients = iter(torch.autograd.grad(total, self._parameters))
            clipped = [_clipped([next(gradients) for _ in network], max_norm) for network in parameters]
            norms, clipped_gradients = zip(*clipped, strict=True)
            left = iter(norms)
            values = [
                [*(result[key] for key in returned.values()), *(next(left) for _ in loss.networks)]
                for loss, result in zip(losses, results, strict=True)
            ]
            if len(losses) > 1:
                sizes = [len(loss.group.agents) for loss in losses]
                together = [
                    _together(name, list(column), sizes)
                    for name, column in zip(measures, zip(*values, strict=True), strict=True)
                ]
                values = [together, *values]
            return [torch.stack(list(chain(*values))), *chain(*clipped_gradients)]

        # The coefficients of the loss are buffers of it, so other values of them need no other graph.
        inputs = nn.ModuleDict(
            {"networks": nn.ModuleList(networks), "loss": nn.ModuleList(loss.loss for loss in losses)}
        )
        self._differentiate = TracedFunction(differentiate, inputs, self._parameters[0].device, way)

    def prepare(self, *minibatch: Tensor) -> None:
        """Start to compile for minibatches of these shapes, whose values do not matter."""
        self._differentiate.prepare(*minibatch)

    def wait(self) -> None:
        """Wait for everything that is being compiled; raise `CompilationFailed` if that fails."""
        self._differentiate.wait()

    def __call__(self, *minibatch: Tensor) -> Tensor:
        """Set the parameters' `grad` and return the loss outputs and the norms before clipping, [names].

        `minibatch` holds the tensors of `in_keys`, [frames, ...], of all agents.
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


def _together(name: str, values: list[Tensor], sizes: list[int]) -> Tensor:
    """Return the measure of all groups together from one value of each group, which has this number of agents."""
    stacked = torch.stack(values)
    if name.startswith("loss_"):
        return stacked.sum()
    if name.startswith("gradient_norm_"):
        return stacked.square().sum().sqrt()
    return sum(
        (value * size for value, size in zip(values, sizes, strict=True)), start=stacked.new_zeros(())
    ) / sum(sizes)
