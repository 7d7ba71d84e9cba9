"""The runs of tests: training here or in a process that can be killed, and the comparison of checkpoints."""

import csv
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torchrl.envs import EnvBase

from mappo.config import CollectionConfig, ExperimentConfig
from mappo.environment.plain_simulation import PlainSimulation
from mappo.learning.memory import first_memory
from mappo.runs.checkpoint import Checkpoint
from mappo.runs.run import Run, load_checkpoint
from mappo.strict_json import to_dict
from mappo.training.history import HistoryFile, IterationReport
from mappo.training.training import train
from mappo.training.training_state import StartingPoint

MEASURED = {  # columns of the history that depend on the clock or the machine
    *("elapsed_seconds", "collect_seconds", "learn_seconds", "evaluate_seconds", "save_seconds"),
    *("frames_per_second", "peak_memory_bytes", "peak_gpu_memory_bytes"),
    *("num_saves", "num_failed_saves", "num_skipped_saves"),
}


def batches(
    environment: EnvBase, policy: TensorDictModuleBase, config: CollectionConfig
) -> Iterator[TensorDictBase]:
    """Yield the batches of a whole run. The current policy acts in each batch."""
    state = environment.reset()
    for key, memory in first_memory(policy, len(state)).items():
        state[key] = memory
    for _ in range(config.num_iterations):
        batch, state = PlainSimulation(environment).collect(policy, config.rollout_frames, state)
        yield batch


def train_here(
    config: ExperimentConfig,
    directory: Path,
    on_report: Callable[[IterationReport], object] = lambda _: None,
    start: StartingPoint | None = None,
) -> Checkpoint:
    """Train a run in a directory, in this process."""
    return train(config, Run.at(directory), HistoryFile(directory / "history.csv"), on_report, start)


def start_training(
    config: ExperimentConfig, store: str | Path, run: str, folder: Path, **environment
) -> subprocess.Popen:
    """Start `mappo train` in another process, as a user does."""
    file = folder / "config.json"
    file.write_text(json.dumps(to_dict(config)))
    command = [sys.executable, "-m", "mappo", "train", "--config", str(file), "--run", run, "--store", str(store)]
    return subprocess.Popen(
        command,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), **environment},
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for(condition: Callable[[], bool], process: subprocess.Popen, seconds: float = 120) -> bool:
    """Wait for a condition; return whether it came true before the process ended."""
    deadline = time.monotonic() + seconds
    while process.poll() is None:
        if condition():
            return True
        assert time.monotonic() < deadline, "the condition did not come true"
        time.sleep(0.001)
    return False


def kill(process: subprocess.Popen, with_signal: int = signal.SIGKILL) -> str:
    """End a process, and return what it printed."""
    process.send_signal(with_signal)
    output, _ = process.communicate(timeout=60)
    return output


def finish(process: subprocess.Popen) -> str:
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    return output


def last(location: str | Path) -> Checkpoint:
    return load_checkpoint(location, "last")


def iterations(location: str | Path) -> list[int]:
    """Return the iterations of all checkpoints of a run, the newest first."""
    return [ref.iteration for ref in Run.at(location).refs()]


def assert_same_training(one: Checkpoint, other: Checkpoint) -> None:
    """Require the same parameters, optimiser, simulation, random states, counters and history, bit by bit."""
    assert (one.iteration, one.frames, one.config) == (other.iteration, other.frames, other.config)
    assert (one.selection_return, one.highest_return) == (other.selection_return, other.highest_return)
    for tensors, other_tensors in (
        (one.tensors, other.tensors),
        (one.optimiser, other.optimiser),
        (one.state.tensors, other.state.tensors),
    ):
        assert tensors.keys() == other_tensors.keys()
        for name, tensor in tensors.items():
            assert torch.equal(_bytes_of(tensor), _bytes_of(other_tensors[name])), name
    assert one.state.structure == other.state.structure
    assert repeatable_history(one.history) == repeatable_history(other.history)


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def repeatable_history(text: str) -> list[dict[str, str]]:
    return [
        {name: value for name, value in row.items() if name not in MEASURED}
        for row in csv.DictReader(io.StringIO(text))
    ]
