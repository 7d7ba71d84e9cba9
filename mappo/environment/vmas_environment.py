"""The wrapper of VMAS by TorchRL, mended where scenarios of users need it, and the place of a user's mistake."""

import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.data import Bounded, Composite
from torchrl.envs.libs.vmas import VmasEnv

from mappo.environment.reductions import is_measurement_name

_OWN_CODE = Path(__file__).parent.parent  # this package, without its scenarios


class GroupEnvironment(VmasEnv):  # type: ignore[misc]
    """A VMAS environment whose agents form one group, which may have action ranges of their own.

    `info()` of a scenario is left out of frames, because nothing learns from it. `infos` keeps its results in the
    last frame, one for each agent, for an evaluation that measures them.
    """

    infos: tuple[Any, ...] = ()

    def _reset(self, tensordict: TensorDictBase | None = None, **kwargs: Any) -> Any:
        self.infos = ()
        return super()._reset(tensordict, **kwargs)

    def _step(self, tensordict: TensorDictBase) -> Any:
        self.infos = ()
        return super()._step(tensordict)

    def _make_unbatched_group_specs(self, group: str) -> tuple[Any, Any, Any, None]:
        observation, action, reward, _ = super()._make_unbatched_group_specs(group)
        return observation, _with_one_tensor_of_bounds(action, len(self.group_map[group])), reward, None

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


def by_agent(action: Tensor) -> list[Tensor]:
    """Return an action [envs, agents, features] or [envs, agents] as VMAS expects it."""
    return [item if item.ndim > 1 else item.unsqueeze(-1) for item in action.unbind(1)]


def _with_one_tensor_of_bounds(spec: Any, num_agents: int) -> Any:
    """Return a spec of continuous actions whose bounds [agents, features] differ by agent, or the spec itself."""
    actions = [spec[index]["action"] for index in range(num_agents)]
    if len({action.shape for action in actions}) > 1 or not all(isinstance(action, Bounded) for action in actions):
        return spec
    bounds = Bounded(
        low=torch.stack([action.space.low for action in actions]),
        high=torch.stack([action.space.high for action in actions]),
        shape=(num_agents, *actions[0].shape),
        dtype=actions[0].dtype,
        device=actions[0].device,
    )
    return Composite({"action": bounds}, shape=(num_agents,), device=actions[0].device)


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
