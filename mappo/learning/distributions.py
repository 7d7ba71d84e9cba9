"""The distributions of actions that torch and TorchRL lack."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Categorical, Independent, Normal
from torchrl.modules import TanhNormal

_IMPOSSIBLE = -1e8  # a logit whose probability is 0
_DENSITY_ONE = 1 / math.sqrt(2 * math.pi)  # the deviation of a normal distribution whose density at its mean is 1


class MultiCategorical(Independent):  # type: ignore[type-arg]
    """The distribution of an action with several independent discrete components.

    Log-probabilities and entropies are sums over the components. Logits are [..., sum of choices], samples
    [..., components].
    """

    def __init__(self, logits: Tensor, choices: tuple[int, ...]):
        parts = torch.split(logits, list(choices), dim=-1)
        padded = [nn.functional.pad(part, (0, max(choices) - part.shape[-1]), value=_IMPOSSIBLE) for part in parts]
        super().__init__(Categorical(logits=torch.stack(padded, dim=-2)), 1)

    @property
    def deterministic_sample(self) -> Tensor:
        """The most likely choice of each component."""
        return self.mode


class PartlyConstant(TanhNormal):  # type: ignore[misc]
    """The distribution of a continuous action of which some components are constants, the middle of their bounds.

    Constants contribute nothing to log-probabilities, entropies and gradients. `is_constant` marks them; it and
    the bounds are [agents, components].
    """

    def __init__(self, loc: Tensor, scale: Tensor, low: Tensor, high: Tensor, is_constant: Tensor):
        super().__init__(
            torch.where(is_constant, 0.0, loc),
            torch.where(is_constant, _DENSITY_ONE, scale),  # the log-probability of the constant is 0
            low=torch.where(is_constant, low - 1, low),  # TanhNormal needs bounds that differ; the slope is 1
            high=torch.where(is_constant, high + 1, high),
        )
        self.base_dist.base_dist = _PartlyFixedNormal(self.loc, self.scale, is_constant)


class _PartlyFixedNormal(Normal):
    """A normal distribution whose components marked by `is_fixed` never leave their mean."""

    def __init__(self, loc: Tensor, scale: Tensor, is_fixed: Tensor):
        super().__init__(loc, scale)
        self._is_fixed = is_fixed

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        drawn: Tensor = super().sample(sample_shape)  # type: ignore[no-untyped-call]
        return torch.where(self._is_fixed, self.loc, drawn)

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        return torch.where(self._is_fixed, self.loc, super().rsample(sample_shape))
