"""Frames of all environments, gathered into a batch."""

from collections.abc import Iterator, Mapping

from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from mappo.compute.cuda_graphs import copy_each
from mappo.environment.keys import DONE, FRAME, OBSERVATION, Key
from mappo.errors import NonFiniteObservation


def nested(tensors: Mapping[Key, Tensor], batch_size: list[int]) -> TensorDictBase:
    """Tensors by key, together."""
    together = TensorDict({}, batch_size=batch_size, device=tensors[OBSERVATION].device)
    for key, value in tensors.items():
        together[key] = value
    return together


class Frames:
    """A batch [envs, time], filled frame by frame [envs]: no frame is kept beside it."""

    def __init__(self, rollout_frames: int):
        self._rollout_frames = rollout_frames
        self._batch: dict[Key, Tensor] = {}
        self._places: Iterator[tuple[Tensor, ...]] = iter(())

    def append(self, frame: Mapping[Key, Tensor] | TensorDictBase) -> None:
        """Copy what is learned from; what policies leave beside their actions is not."""
        values = [frame[key] for key in FRAME]
        if not self._batch:
            for key, value in zip(FRAME, values, strict=True):
                self._batch[key] = value.new_empty(len(value), self._rollout_frames, *value.shape[1:])
            self._places = zip(*(value.unbind(1) for value in self._batch.values()), strict=True)
        copy_each(next(self._places), values)

    def batch(self) -> TensorDictBase:
        """All frames, once all are there."""
        return nested(self._batch, [*self._batch[DONE].shape[:2]])


def require_finite_observations(observation: Tensor) -> None:
    """Look at observations [envs, agents, features] before a policy acts on them.

    Raises:
        NonFiniteObservation: naming the environment and the agent.
    """
    if not observation.isfinite().all():
        env, agent, feature = (~observation.isfinite()).nonzero()[0].tolist()
        raise NonFiniteObservation(
            f"feature {feature} of the observation of agent {agent} is {observation[env, agent, feature].item()} "
            f"in environment {env}: the scenario must keep its observations finite"
        )
