"""The plain simulation, which calls VMAS once for every frame."""

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torchrl.envs import EnvBase
from torchrl.envs.utils import ExplorationType, set_exploration_type

from mappo.environment.frames import Frames, require_finite_observations
from mappo.environment.keys import DONE, FRAME, MEMORIES, OBSERVATION, next_key


class PlainSimulation:
    """The simulation by the environment's own `step`; `FastEnvironment` uses a compiled function instead."""

    way = "plain"

    def __init__(self, environment: EnvBase):
        self._environment = environment

    def reset(self) -> TensorDictBase:
        """Reset all environments and return their observations [envs], step counts and sums of rewards."""
        return self._environment.reset()

    def collect(
        self, policy: TensorDictModuleBase, rollout_frames: int, carried: TensorDictBase
    ) -> tuple[TensorDictBase, TensorDictBase]:
        """Collect a batch [envs, rollout_frames] from `carried` [envs]; return it and the next `carried`.

        `carried` holds the observations that await an action, step counts and sums of rewards. The first one
        is the result of `reset()`, with the first memory of a policy that has one. A batch continues the episodes
        of the previous batch. Frames are contiguous in time, so that advantages can be computed on the batch
        without reordering.

        Raises:
            NonFiniteObservation: an observation is not finite; the message names the environment and the agent.
        """
        names = list(carried.keys(True, True))
        memories = [key for key in MEMORIES if key in names]
        frames = Frames(rollout_frames, (*FRAME, *memories))
        with torch.no_grad(), set_exploration_type(ExplorationType.RANDOM):
            for _ in range(rollout_frames):
                require_finite_observations(carried[OBSERVATION])
                frame, carried = self._environment.step_and_maybe_reset(policy(carried))
                frames.append(frame)
                done = frame[next_key(DONE)]
                for key in memories:
                    carried[key] = frame[next_key(key)].masked_fill(done.unsqueeze(-1), 0)
        return frames.batch(), carried.select(*names)
