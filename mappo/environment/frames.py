"""The batch that collects the frames of all environments."""

from collections.abc import Iterator, Mapping, Sequence

from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from mappo.compute.cuda_graphs import copy_tensors
from mappo.environment.keys import DONE, FRAME, OBSERVATION, Key
from mappo.errors import NonFiniteObservation


def nested(tensors: Mapping[Key, Tensor], batch_size: list[int]) -> TensorDictBase:
    """Return a tensordict of the tensors, nested by their keys."""
    tensordict = TensorDict({}, batch_size=batch_size, device=tensors[OBSERVATION].device)
    for key, value in tensors.items():
        tensordict[key] = value
    return tensordict


class Frames:
    """A batch [envs, time] that is filled frame by frame [envs]; no second copy of a frame is kept."""

    def __init__(self, rollout_frames: int, keys: Sequence[Key] = FRAME):
        self._rollout_frames, self._keys = rollout_frames, keys
        self._batch: dict[Key, Tensor] = {}
        self._rows: Iterator[tuple[Tensor, ...]] = iter(())  # views of the batch, one tuple for each frame

    def append(self, frame: Mapping[Key, Tensor] | TensorDictBase) -> None:
        """Copy the tensors of the batch's keys into the batch; other outputs of the policy are dropped."""
        values = [frame[key] for key in self._keys]
        if not self._batch:
            for key, value in zip(self._keys, values, strict=True):
                self._batch[key] = value.new_empty(len(value), self._rollout_frames, *value.shape[1:])
            self._rows = zip(*(value.unbind(1) for value in self._batch.values()), strict=True)
        copy_tensors(next(self._rows), values)

    def batch(self) -> TensorDictBase:
        """Return the batch, once all `rollout_frames` frames are appended."""
        return nested(self._batch, [*self._batch[DONE].shape[:2]])


def require_finite_observations(observation: Tensor) -> None:
    """Check observations [envs, agents, features] before a policy acts on them.

    Raises:
        NonFiniteObservation: an observation is not finite; the message names the environment and the agent.
    """
    if not observation.isfinite().all():
        env, agent, feature = (~observation.isfinite()).nonzero()[0].tolist()
        raise NonFiniteObservation(
            f"feature {feature} of the observation of agent {agent} is {observation[env, agent, feature].item()} "
            f"in environment {env}: the scenario must keep its observations finite"
        )
