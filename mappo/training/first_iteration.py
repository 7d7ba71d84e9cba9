"""The rehearsal of a training run: one small iteration, which shows what would fail before hours are spent."""

from mappo.compute.resources import resolve_device
from mappo.config import ExperimentConfig, override
from mappo.environment.random_streams import Stream, private_random_streams
from mappo.learning.learner import Learner
from mappo.learning.networks import make_networks
from mappo.training.local_collector import LocalCollector

_ENVS, _FRAMES = 2, 8


def rehearse_first_iteration(config: ExperimentConfig) -> str:
    """Make the networks, collect a small batch with the plain simulation, learn from it, and capture the state.

    Whatever training raises, this function raises.
    """
    small = override(
        config,
        {
            "collection": {
                "num_envs": _ENVS,
                "rollout_frames": _FRAMES,
                "total_frames": _ENVS * _FRAMES,
                "processes": 1,
            },
            "learner": {"epochs": 1, "minibatch_frames": _ENVS * _FRAMES},
        },
    )
    device = resolve_device(config.device)
    with private_random_streams(config.seed, Stream.VALIDATION, device):
        collector = LocalCollector(small, device)
        networks = make_networks(small.networks, collector.environment)
        learner = Learner(small.learner, networks, 1)
        collector.begin(networks.policy)
        losses = learner.update(collector.collect(networks.policy))
        collector.capture()
    return (
        f"a batch of {_ENVS * _FRAMES} frames is collected and learnt from: policy loss {losses.loss_policy:.3g}, "
        f"critic loss {losses.loss_critic:.3g}"
    )
