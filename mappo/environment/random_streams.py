"""Random streams: who draws random numbers, seeded apart and given back afterwards."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from typing import Any

import numpy as np
import torch
from vmas.simulator.environment import Environment as VmasEnvironment


class Stream(IntEnum):
    """Who draws random numbers. Streams never meet, even where two of them have the same seed."""

    TRAINING = 0
    EVALUATION = 1
    VALIDATION = 2
    SELECTION = 3
    GATE = 4
    TUNING = 5


@contextmanager
def private_random_streams(
    seed: int, stream: Stream, device: torch.device, after_frames: int = 0, process: int = 0
) -> Iterator[None]:
    """Seed every source of randomness for the block, and give the caller's back afterwards.

    Covers torch (CPU and the CUDA device), numpy, Python and the state that all VMAS environments of a process
    share. What runs inside neither sees nor disturbs the random numbers of what runs outside.
    """
    outside = random.getstate(), np.random.get_state(), list(VmasEnvironment.vmas_random_state)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            private_seed = stream_seed(seed, stream, 2 * process + 1, after_frames)
            torch.manual_seed(private_seed)
            random.seed(private_seed)
            np.random.seed(private_seed)
            VmasEnvironment.vmas_random_state[:] = [
                torch.random.get_rng_state(),
                np.random.get_state(),
                random.getstate(),
            ]
            yield
        finally:
            random.setstate(outside[0])
            np.random.set_state(outside[1])
            VmasEnvironment.vmas_random_state[:] = outside[2]


def simulator_random_state() -> tuple[bytes, str, str]:
    """What all VMAS environments of the process draw their random numbers from: torch, numpy, Python."""
    of_torch, of_numpy, of_python = VmasEnvironment.vmas_random_state
    return bytes(of_torch.tolist()), repr(of_numpy), repr(of_python)


def random_states(device: torch.device) -> dict[str, Any]:
    """Where every source of randomness stands that `private_random_streams` covers, for `set_random_states`."""
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "numpy": np.random.get_state(),
        "python": random.getstate(),
        "vmas": list(VmasEnvironment.vmas_random_state),
    }


def set_random_states(states: dict[str, Any], device: torch.device) -> None:
    """Let every source of randomness go on from where `random_states` saw it; a GPU's only if there was one."""
    torch.set_rng_state(states["torch"])
    if device.type == "cuda" and states["cuda"] is not None:
        torch.cuda.set_rng_state(states["cuda"], device)
    np.random.set_state(states["numpy"])
    random.setstate(states["python"])
    VmasEnvironment.vmas_random_state[:] = states["vmas"]


@contextmanager
def unchanged_simulator_random_state() -> Iterator[None]:
    """What the block draws from the random state of all VMAS environments is put back afterwards."""
    before = list(VmasEnvironment.vmas_random_state)
    try:
        yield
    finally:
        VmasEnvironment.vmas_random_state[:] = before


def stream_seed(seed: int, stream: Stream, owner: int, after_frames: int) -> int:
    """A 32-bit seed of its own for each combination; even owners are simulators, odd ones all else."""
    words = [seed, int(stream), owner, *([after_frames] if after_frames else [])]
    return int(np.random.SeedSequence(words).generate_state(1)[0])
