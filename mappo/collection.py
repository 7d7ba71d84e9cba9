"""Batches [envs, time] from an environment and a policy."""

from collections.abc import Iterator

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torchrl.collectors import Collector
from torchrl.envs import EnvBase

from mappo.config import CollectionConfig, ConfigError, ExperimentConfig
from mappo.environment import OBSERVATION, Stream, make_environment
from mappo.resources import free_memory_bytes, gibibytes


class NonFiniteObservation(ArithmeticError):
    """An observation is NaN or infinite; the policy did not act on it."""


def require_memory_for_batch(config: ExperimentConfig, device: torch.device) -> int:
    """Bytes of a batch and of the learner's copy of it, which training needs at the least.

    Raises:
        ConfigError: fewer bytes are free.
    """
    frame = make_environment(config.environment, 1, 0, Stream.TRAINING, device).fake_tensordict()
    needed: int = 2 * frame.bytes() * config.collection.frames_per_batch
    free = free_memory_bytes(device)
    if needed > free:
        raise ConfigError(
            f"collection.num_envs = {config.collection.num_envs} x rollout_frames = "
            f"{config.collection.rollout_frames}: a batch and the learner's copy need at least "
            f"{gibibytes(needed)}, but {gibibytes(free)} are free on {device}; collect fewer frames at once"
        )
    return needed


def collect(
    environment: EnvBase, policy: TensorDictModuleBase, config: CollectionConfig, iterations_done: int = 0
) -> Iterator[TensorDictBase]:
    """Yield the batches [num_envs, rollout_frames] that are left, each of the policy as it is at that moment.

    A batch continues the episodes of the one before. Frames are contiguous in time, so advantages can be
    computed on a batch as it comes.

    Raises:
        NonFiniteObservation: naming the environment and the agent.
    """
    guard = policy.register_forward_pre_hook(lambda _, inputs: require_finite_observations(inputs[0]))
    collector = Collector(
        environment,
        policy,
        frames_per_batch=config.frames_per_batch,
        total_frames=(config.num_iterations - iterations_done) * config.frames_per_batch,
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


def require_finite_observations(state: TensorDictBase) -> None:
    """Look at the observations [envs, agents, features] before a policy acts on them.

    Raises:
        NonFiniteObservation: naming the environment and the agent.
    """
    observation = state[OBSERVATION]
    if not observation.isfinite().all():
        env, agent, feature = (~observation.isfinite()).nonzero()[0].tolist()
        raise NonFiniteObservation(
            f"feature {feature} of the observation of agent {agent} is {observation[env, agent, feature].item()} "
            f"in environment {env}: the scenario must keep its observations finite"
        )
