"""Batches [envs, time] from an environment and a policy."""

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torchrl.envs import EnvBase
from torchrl.envs.utils import ExplorationType, set_exploration_type

from mappo.config import ConfigError, ExperimentConfig
from mappo.environment import OBSERVATION, Frames, Stream, make_environment, require_finite_observations
from mappo.fast_simulation import FastEnvironment
from mappo.resources import free_memory_bytes, gibibytes


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
    environment: EnvBase | FastEnvironment,
    policy: TensorDictModuleBase,
    rollout_frames: int,
    carried: TensorDictBase,
) -> tuple[TensorDictBase, TensorDictBase]:
    """Play one batch [envs, rollout_frames] on from where `carried` [envs] stands, and return what the next needs.

    What is carried from batch to batch, and starts as `environment.reset()`, are the observations that wait to be
    acted on, step counts and sums of rewards: a batch continues the episodes of the one before. Frames are
    contiguous in time, so that advantages can be computed on a batch as it comes.

    Raises:
        NonFiniteObservation: naming the environment and the agent.
    """
    if isinstance(environment, FastEnvironment):
        return environment.collect(policy, rollout_frames, carried)
    frames = Frames(rollout_frames)
    names = list(carried.keys(True, True))
    with torch.no_grad(), set_exploration_type(ExplorationType.RANDOM):
        for _ in range(rollout_frames):
            require_finite_observations(carried[OBSERVATION])
            frame, carried = environment.step_and_maybe_reset(policy(carried))
            frames.append(frame)
    return frames.batch(), carried.select(*names)
