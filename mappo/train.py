"""The training loop: collect, learn, report, save."""

import time
from collections.abc import Callable
from pathlib import Path

from mappo import checkpoint as checkpoints
from mappo.checkpoint import Checkpoint
from mappo.collection import collect
from mappo.config import ExperimentConfig
from mappo.environment import Stream, make_environment, private_random_streams, resolve_device
from mappo.history import IterationReport, Progress, finished_episodes
from mappo.learner import Learner
from mappo.networks import make_networks


def train(config: ExperimentConfig, directory: Path, on_report: Callable[[IterationReport], object]) -> Checkpoint:
    """Train from scratch, save the last checkpoint into `directory` and return it.

    On CPU the same configuration gives the same parameters bit by bit, given `config.threads` torch threads.

    Raises:
        ConfigError: the configuration names a scenario or a device that is not there.
        NonFiniteLoss: training diverged.
    """
    device = resolve_device(config.device)
    with private_random_streams(config.seed, Stream.TRAINING, device):
        environment = make_environment(
            config.environment, config.collection.num_envs, config.seed, Stream.TRAINING, device
        )
        networks = make_networks(config.networks, environment)
        learner = Learner(config.learner, networks, config.collection.num_iterations)
        progress = Progress()
        start = began = time.perf_counter()
        for batch in collect(environment, networks.policy, config.collection):
            collected = time.perf_counter()
            losses = learner.update(batch)
            learned = time.perf_counter()
            progress = progress.after(batch)
            on_report(
                IterationReport(
                    progress,
                    elapsed_seconds=learned - start,
                    collect_seconds=collected - began,
                    learn_seconds=learned - collected,
                    frames_per_second=batch.numel() / (learned - began),
                    episodes=finished_episodes(batch),
                    losses=losses,
                )
            )
            began = time.perf_counter()
    tensors = {name: tensor.detach().cpu() for name, tensor in networks.modules().state_dict().items()}
    final = Checkpoint(config, progress.iteration, progress.frames, tensors)
    checkpoints.save(final, directory)
    return final
