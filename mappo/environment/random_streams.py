"""The random streams: separately seeded random numbers for each purpose, without effect on the caller's."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from typing import Any

import numpy as np
import torch
from vmas.simulator.environment import Environment as VmasEnvironment

from mappo.environment.state_walk import require_possible_numpy_state


class Stream(IntEnum):
    """The purpose of random numbers. Two streams differ even if they have the same seed."""

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
    """Seed every source of randomness for the block, and restore the caller's random states afterwards.

    The sources are torch (CPU and the CUDA device), numpy, Python and the state that all VMAS environments of a
    process share. Code in the block neither reads nor changes the random states of code outside.
    """
    callers = random.getstate(), np.random.get_state(), list(VmasEnvironment.vmas_random_state)
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
            random.setstate(callers[0])
            np.random.set_state(callers[1])
            VmasEnvironment.vmas_random_state[:] = callers[2]


def simulator_random_state() -> tuple[bytes, str, str]:
    """Return the torch, numpy and Python states from which all VMAS environments draw, in comparable form."""
    torch_state, numpy_state, python_state = VmasEnvironment.vmas_random_state
    return bytes(torch_state.tolist()), repr(numpy_state), repr(python_state)


def random_states(device: torch.device) -> dict[str, Any]:
    """Return the state of every source that `private_random_streams` covers, for `set_random_states`."""
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "numpy": np.random.get_state(),
        "python": random.getstate(),
        "vmas": list(VmasEnvironment.vmas_random_state),
    }


def set_random_states(states: dict[str, Any], device: torch.device) -> None:
    """Restore the states that `random_states` returned; the GPU's only if they were read on a GPU."""
    torch.set_rng_state(states["torch"])
    if device.type == "cuda" and states["cuda"] is not None:
        torch.cuda.set_rng_state(states["cuda"], device)
    np.random.set_state(states["numpy"])
    random.setstate(states["python"])
    VmasEnvironment.vmas_random_state[:] = states["vmas"]


def require_possible_random_states(states: dict[str, Any]) -> None:
    """Check states that a checkpoint holds, before `set_random_states` sets them; VMAS sets its own ones later.

    Raises:
        ValueError: a state is not possible. Another exception is raised where `states` has another form.
    """
    of_simulator = dict(zip(("torch", "numpy", "python"), states["vmas"], strict=True))
    for group in (states, of_simulator):
        torch.Generator().set_state(group["torch"])
        require_possible_numpy_state(group["numpy"])
        np.random.RandomState().set_state(group["numpy"])
        random.Random().setstate(group["python"])  # noqa: S311  (it draws nothing)


@contextmanager
def same_random_states(device: torch.device) -> Iterator[None]:
    """Restore every random state after the block."""
    states = random_states(device)
    try:
        yield
    finally:
        set_random_states(states, device)


@contextmanager
def unchanged_simulator_random_state() -> Iterator[None]:
    """Restore the random state of all VMAS environments after the block, so that its draws have no effect."""
    saved = list(VmasEnvironment.vmas_random_state)
    try:
        yield
    finally:
        VmasEnvironment.vmas_random_state[:] = saved


def stream_seed(seed: int, stream: Stream, owner: int, after_frames: int) -> int:
    """Return a 32-bit seed for this combination; even owners are simulators, odd ones all other sources."""
    words = [seed, int(stream), owner, *([after_frames] if after_frames else [])]
    return int(np.random.SeedSequence(words).generate_state(1)[0])
