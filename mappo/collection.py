"""Batches [envs, time] from an environment and a policy."""

from collections.abc import Iterator

from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torchrl.collectors import Collector
from torchrl.envs import EnvBase

from mappo.config import CollectionConfig


def collect(
    environment: EnvBase, policy: TensorDictModuleBase, config: CollectionConfig
) -> Iterator[TensorDictBase]:
    """Yield `config.num_iterations` batches [num_envs, rollout_frames] of the policy as it is at that moment.

    A batch continues the episodes of the one before. Frames are contiguous in time, so advantages can be
    computed on a batch as it comes.
    """
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
        collector.shutdown(close_env=False)
