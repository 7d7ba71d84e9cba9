"""Batches [envs, time] from an environment and a policy."""

from collections.abc import Iterator
from typing import Any

from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torchrl.collectors import Collector
from torchrl.envs import EnvBase

from mappo.config import CollectionConfig
from mappo.environment import OBSERVATION


class NonFiniteObservation(ArithmeticError):
    """An observation is NaN or infinite; the policy did not act on it."""


def collect(
    environment: EnvBase, policy: TensorDictModuleBase, config: CollectionConfig
) -> Iterator[TensorDictBase]:
    """Yield `config.num_iterations` batches [num_envs, rollout_frames] of the policy as it is at that moment.

    A batch continues the episodes of the one before. Frames are contiguous in time, so advantages can be
    computed on a batch as it comes.

    Raises:
        NonFiniteObservation: naming the environment and the agent.
    """
    guard = policy.register_forward_pre_hook(_require_finite_observations)
    collector = Collector(
        environment,
        policy,
        frames_per_batch=config.frames_per_batch,
        total_frames=config.num_iterations * config.frames_per_batch,
        device=environment.device,
        track_traj_ids=False,
        no_cuda_sync=True,
        trust_policy=True,
        auto_register_policy_transforms=False,
    )
    try:
        yield from collector
    finally:
        guard.remove()
        collector.shutdown(close_env=False)


def _require_finite_observations(_: Any, inputs: tuple[TensorDictBase, ...]) -> None:
    observation = inputs[0][OBSERVATION]  # [envs, agents, features]
    if not observation.isfinite().all():
        env, agent, feature = (~observation.isfinite()).nonzero()[0].tolist()
        raise NonFiniteObservation(
            f"feature {feature} of the observation of agent {agent} is {observation[env, agent, feature].item()} "
            f"in environment {env}: the scenario must keep its observations finite"
        )
