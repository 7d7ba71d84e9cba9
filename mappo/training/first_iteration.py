"""The rehearsal of a training run: one small iteration, which shows what would fail before hours are spent."""

from dataclasses import replace
from pathlib import Path

import torch
from tensordict.nn import TensorDictModuleBase

from mappo.compute.computation import PLAIN
from mappo.compute.resources import resolve_device
from mappo.config import ExperimentConfig, override
from mappo.environment.random_streams import Stream, private_random_streams
from mappo.environment.simulation_state import SimulationState
from mappo.learning.learner import Learner
from mappo.learning.networks import make_networks
from mappo.runs.readability import require_readable
from mappo.training.history import HistoryFile, Progress
from mappo.training.local_collector import LocalCollector
from mappo.training.process_collector import share_of_process
from mappo.training.training_state import TrainingState, snapshot

_ENVS, _FRAMES = 2, 8


def rehearse_first_iteration(config: ExperimentConfig) -> str:
    """Make the networks, collect a small batch with the plain simulation, and learn from it.

    Then capture the state of as many environments as training has, and check that a checkpoint of it can be read.
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
            "learner": {"epochs": 1, "minibatch_frames": _ENVS * _FRAMES, "chunk_frames": _FRAMES // 2},
        },
    )
    device = resolve_device(config.device)
    with private_random_streams(config.seed, Stream.VALIDATION, device):
        collector = LocalCollector(small, device)
        networks = make_networks(small.networks, collector.environment)
        learner = Learner(small.learner, networks, 1)
        collector.begin(networks.player)
        losses = learner.update(collector.collect(networks.player))
        training = TrainingState(collector, learner, Progress(), "", device, PLAIN)
        checkpoint = snapshot(config, training, HistoryFile(Path("history.csv")))  # which nobody begins to write
        require_readable(replace(checkpoint, state=_whole_state(config, device, networks.player)))
    return (
        f"a batch of {_ENVS * _FRAMES} frames is collected and learnt from: policy loss {losses.loss_policy:.3g}, "
        f"critic loss {losses.loss_critic:.3g}"
    )


def _whole_state(config: ExperimentConfig, device: torch.device, policy: TensorDictModuleBase) -> SimulationState:
    """Return the state at the start of training, with the structures of all processes that share environments."""
    processes = config.collection.processes
    collector = LocalCollector(share_of_process(config), device)
    collector.begin(policy)
    state = collector.capture()
    return SimulationState({"processes": [state.structure] * processes}, state.tensors) if processes > 1 else state
