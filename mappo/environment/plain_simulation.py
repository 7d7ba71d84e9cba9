"""The plain simulation: VMAS, step by step."""

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torchrl.envs import EnvBase
from torchrl.envs.utils import ExplorationType, set_exploration_type

from mappo.environment.frames import Frames, require_finite_observations
from mappo.environment.keys import OBSERVATION


class PlainSimulation:
    """Simulates an environment by its own `step`, as `FastEnvironment` does by a compiled function."""

    way = "plain"

    def __init__(self, environment: EnvBase):
        self._environment = environment

    def reset(self) -> TensorDictBase:
        """Reset all environments. Return what they show [envs], with step counts and sums of rewards."""
        return self._environment.reset()

    def collect(
        self, policy: TensorDictModuleBase, rollout_frames: int, carried: TensorDictBase
    ) -> tuple[TensorDictBase, TensorDictBase]:
        """Play one batch [envs, rollout_frames] from `carried` [envs]; return it with `carried` for the next.

        `carried` holds the observations that wait for an action, step counts and sums of rewards. It starts as
        `reset()`, and a batch continues the episodes of the batch before. Frames are contiguous in time, so that
        advantages can be computed on a batch as it comes.

        Raises:
            NonFiniteObservation: an observation is not finite; the message names the environment and the agent.
        """
        frames = Frames(rollout_frames)
        names = list(carried.keys(True, True))
        with torch.no_grad(), set_exploration_type(ExplorationType.RANDOM):
            for _ in range(rollout_frames):
                require_finite_observations(carried[OBSERVATION])
                frame, carried = self._environment.step_and_maybe_reset(policy(carried))
                frames.append(frame)
        return frames.batch(), carried.select(*names)
