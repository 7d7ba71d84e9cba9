"""The wrapper of VMAS by TorchRL, mended where scenarios of users need it, and the place of a user's mistake."""

import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.data import Bounded, Categorical, Composite, MultiCategorical, Unbounded
from torchrl.envs.libs.vmas import VmasEnv

from mappo.environment.groups import Group, padded
from mappo.environment.reductions import is_measurement_name

_OWN_CODE = Path(__file__).parent.parent  # this package, without its scenarios


class GroupEnvironment(VmasEnv):  # type: ignore[misc]
    """A VMAS environment with one tensor for all agents, which may have action ranges and shapes of their own.

    Shorter observations and actions are padded with zeros; padding in actions is ignored. `groups` tells which
    agents are alike; `make_environment` sets it.

    `info()` of a scenario is left out of frames, because nothing learns from it. `infos` keeps its results in the
    last frame, one for each agent, for an evaluation that measures them.
    """

    groups: tuple[Group, ...] = ()
    infos: tuple[Any, ...] = ()
    _width = 0  # the most features of an agent's observation; 0 before they are known

    def _reset(self, tensordict: TensorDictBase | None = None, **kwargs: Any) -> Any:
        self.infos = ()
        return super()._reset(tensordict, **kwargs)

    def _step(self, tensordict: TensorDictBase) -> Any:
        self.infos = ()
        return super()._step(tensordict)

    def _make_unbatched_group_specs(self, group: str) -> tuple[Any, Any, Any, None]:
        observation, action, reward, _ = super()._make_unbatched_group_specs(group)
        agents = range(len(self.group_map[group]))
        observed, acted = (
            [spec[i][key] for i in agents] for spec, key in ((observation, "observation"), (action, "action"))
        )
        if all(isinstance(spec, Unbounded) and spec.ndim == 1 for spec in observed):
            self._width = max(spec.shape[0] for spec in observed)
        return _with_equal_shapes(observation, observed), _with_one_tensor(action, acted), reward, None

    def read_obs(self, observations: Any) -> Any:
        """Return an agent's observation [envs, features], padded to the most features of an agent."""
        read = super().read_obs(observations)
        missing = self._width - read.shape[-1] if isinstance(read, Tensor) else 0
        return torch.nn.functional.pad(read, (0, missing)) if missing > 0 else read

    def read_action(self, action: Tensor, group: str = "agents") -> list[Tensor]:  # noqa: ARG002  there is one group
        """Return an action [envs, agents, components] or [envs, agents] as VMAS expects it, without padding."""
        return [
            item.unsqueeze(-1) if item.ndim == 1 else item if item.shape[1] == size else item[:, :size]
            for item, size in zip(action.unbind(1), self.action_sizes, strict=True)
        ]

    def observations_by_agent(self, observation: Tensor) -> list[Tensor]:
        """Return observations [envs, agents, features] as the scenario returned them, without padding."""
        sizes = [space.shape[0] for space in self.observation_space]
        return [item[:, :size] for item, size in zip(observation.unbind(1), sizes, strict=True)]

    @property
    def action_sizes(self) -> list[int]:
        """The number of components of each agent's action; 1 if an action is a single choice."""
        return [space.shape[0] if space.shape else 1 for space in self.action_space]

    def read_info(self, infos: dict[str, Tensor]) -> None:
        """Keep what a scenario's `info()` returned, and return nothing."""
        self.infos = (*self.infos, infos)

    def measured(self) -> dict[str, Tensor]:
        """Return the numbers [envs] that `info()` returned in the last frame by name, averaged over agents.

        An agent counts where it measured a finite number; the mean is NaN where no agent counts. Values that are
        not one real number for each environment, such as positions, are left out.
        """
        by_name: dict[str, list[Tensor]] = {}
        (num_envs,) = self.batch_size  # TorchRL looks `num_envs` up in 0.2 ms
        for info in self.infos:
            for name, value in info.items() if isinstance(info, Mapping) else ():
                if is_measurement_name(name) and _is_number(value, num_envs):
                    by_name.setdefault(name, []).append(value.reshape(num_envs).to(self.device, torch.float64))
        return {name: _mean_of_finite(torch.stack(values)) for name, values in by_name.items()}


def _is_number(value: object, num_envs: int) -> bool:
    return isinstance(value, Tensor) and value.shape in ((num_envs,), (num_envs, 1)) and not value.is_complex()


def _mean_of_finite(values: Tensor) -> Tensor:
    """Return the mean over agents of values [agents, envs]."""
    return torch.where(values.isfinite(), values, torch.nan).nanmean(0)


def stacked(
    observations: list[Tensor], rewards: list[Tensor], terminated: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return observation [envs, agents, features], reward [envs, agents, 1] and terminated [envs, 1] of VMAS."""
    num_envs = len(terminated)
    reward = torch.stack([reward.reshape(num_envs, 1) for reward in rewards], dim=1)
    return torch.stack(padded(observations), dim=1), reward, terminated.reshape(num_envs, 1)


def _with_equal_shapes(spec: Any, observations: list[Any]) -> Any:
    """Return a spec of observations [agents, features] whose numbers of features differ, or the spec itself."""
    if len({item.shape for item in observations}) == 1 or not all(item.ndim == 1 for item in observations):
        return spec
    agents, first = len(observations), observations[0]
    shape = agents, max(item.shape[0] for item in observations)
    observation = Unbounded(shape, dtype=first.dtype, device=first.device)
    return Composite({"observation": observation}, shape=(agents,), device=first.device)


def _with_one_tensor(spec: Any, actions: list[Any]) -> Any:
    """Return a spec of actions whose ranges, sizes or choices differ by agent as one tensor, or the spec itself.

    Padding has the range 0 to 0, or one choice.
    """
    agents, first = len(actions), actions[0]
    action: Bounded | MultiCategorical
    if all(isinstance(item, Bounded) for item in actions):
        low, high = (
            torch.stack(padded([getattr(item.space, side) for item in actions])) for side in ("low", "high")
        )
        action = Bounded(low=low, high=high, shape=low.shape, dtype=first.dtype, device=first.device)
    elif all(isinstance(item, Categorical) for item in actions) and len({*map(_choices, actions)}) > 1:
        width = max(len(_choices(item)) for item in actions)
        rows = [[*_choices(item), *[1] * (width - len(_choices(item)))] for item in actions]
        choices = torch.tensor(rows if first.ndim else [row[0] for row in rows])
        action = MultiCategorical(choices, shape=choices.shape, dtype=first.dtype, device=first.device)
    else:
        return spec
    return Composite({"action": action}, shape=(agents,), device=first.device)


def _choices(spec: Any) -> tuple[int, ...]:
    """Return the number of choices of each component of a discrete action."""
    return tuple(spec.nvec.tolist()) if isinstance(spec, MultiCategorical) else (int(spec.space.n),)


def place_of_mistake(error: BaseException) -> str:
    """Return the innermost line of a user's code in a traceback, ` (in FUNCTION, FILE line N)`, or an empty text.

    A user's code is all code but Python's library, installed packages and this package.
    """
    return place_in(traceback.extract_tb(error.__traceback__))


def place_in(stack: traceback.StackSummary) -> str:
    """Return the innermost line of a user's code in a stack, as `place_of_mistake` does."""
    places = [frame for frame in stack if _is_of_user(Path(frame.filename))]
    return f" (in {places[-1].name}, {Path(places[-1].filename).name} line {places[-1].lineno})" if places else ""


def _is_of_user(file: Path) -> bool:
    if {"site-packages", "dist-packages"} & {*file.parts}:
        return "scenarios" in file.parts  # a scenario of VMAS
    if file.is_relative_to(_OWN_CODE):
        return file.is_relative_to(_OWN_CODE / "environment" / "scenarios")
    return not file.is_relative_to(Path(sys.base_prefix) / "lib") and file.suffix == ".py"
