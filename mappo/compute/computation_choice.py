"""The choice of what is compiled in a run: `auto` in `collection.simulation` and in `learner.update`.

Compiled code rounds differently from plain code. So the choice is a pure function of the configuration and of the
kind of machine, it is made once, at the start of a run, and every checkpoint of the run keeps it.
"""

import math
import shutil
import sysconfig
from dataclasses import dataclass, replace
from functools import cache
from os import environ
from pathlib import Path
from typing import Literal

import torch

from mappo.compute.compiler import COMPILER_BYTES
from mappo.compute.computation import PLAIN, Computation
from mappo.compute.resources import free_memory_bytes, gibibytes
from mappo.compute.traced_function import MIN_BFLOAT16_SIDE
from mappo.config import ExperimentConfig
from mappo.errors import ConfigError

# Where compilation with an empty cache pays on a CPU: docs/speed.md, "What you get by default".
LEAST_FRAMES = 4_000  # of each environment in the whole run, if there are few environments
_ENVS_THAT_DOUBLE_A_FRAME = 500  # so many environments more save as much time again in each frame
LEAST_OPTIMISER_STEPS = 5_000  # of the whole run
_COMPILERS = "g++", "c++", "clang++"
_AMPERE = 8, 0  # the first NVIDIA generation that multiplies bfloat16 faster than float32


@dataclass(frozen=True)
class Machine:
    """The kind of a machine, as far as it decides what is compiled.

    missing: what compilation needs and the machine lacks, such as a C++ compiler; empty if nothing is missing.
    multiplies_bfloat16: whether it multiplies matrices of bfloat16 faster than those of float32.
    has_memory: whether enough memory is free for the compiler.
    """

    device: Literal["cpu", "cuda"]
    missing: str
    multiplies_bfloat16: bool
    has_memory: bool = True

    @classmethod
    def current(cls, device: torch.device) -> "Machine":
        """Return the kind of this machine, on which `device` computes."""
        kind: Literal["cpu", "cuda"] = "cuda" if device.type == "cuda" else "cpu"
        has_memory = free_memory_bytes(torch.device("cpu")) >= COMPILER_BYTES
        return cls(kind, missing_for_compilation(), _multiplies_bfloat16(device), has_memory)


def choose_computation(
    config: ExperimentConfig, machine: Machine, is_shared: bool = False
) -> tuple[Computation, str]:
    """Return what a new run compiles, and the reason, as a line for the log. The line is empty without `auto`.

    is_shared: whether many runs use what is compiled, as those of a study or a matrix do.
    """
    chosen, reason = _best(config, machine, is_shared)
    simulation, update = config.collection.simulation, config.learner.update
    if "plain" in (simulation, config.selection.simulation):
        chosen = replace(chosen, selection="plain")
    if simulation != "auto":
        chosen = replace(chosen, simulation=simulation)
    if update != "auto":
        chosen = replace(chosen, update=update)
    return chosen, f"{chosen} (auto: {reason})" if "auto" in (simulation, update) else ""


def kept_computation(config: ExperimentConfig, kept: Computation, machine: Machine) -> Computation:
    """Return what a resumed run compiles: what it has compiled so far.

    Raises:
        ConfigError: the configuration names another value, or this machine cannot compile.
    """
    for field, wanted, value in (
        ("collection.simulation", config.collection.simulation, kept.simulation),
        ("learner.update", config.learner.update, kept.update),
    ):
        if wanted not in ("auto", value):
            raise ConfigError(f"{field} = {wanted}: the run began with {value}; use auto or {value}")
    if config.selection.simulation == "plain":  # an extended run may change this
        kept = replace(kept, selection="plain")
    if machine.missing and kept != PLAIN:
        raise ConfigError(
            f"the run began with {kept}, which is compiled, and this machine cannot compile: it lacks "
            f"{machine.missing}; install it (sudo apt install g++ python3-dev) or resume on the first machine"
        )
    return kept


def missing_for_compilation() -> str:
    """Return what compilation needs and this machine lacks, such as a C++ compiler; or an empty text."""
    named = environ.get("CXX")
    if not any(shutil.which(name) for name in ([named] if named else _COMPILERS)):
        return f"the C++ compiler {named}" if named else "a C++ compiler"
    headers = Path(sysconfig.get_paths()["include"]) / "Python.h"
    return "" if headers.exists() else "Python's headers"


def _best(config: ExperimentConfig, machine: Machine, is_shared: bool) -> tuple[Computation, str]:
    if machine.missing:
        return PLAIN, f"this machine lacks {machine.missing}: sudo apt install g++ python3-dev"
    if not machine.has_memory:
        return PLAIN, f"less than {gibibytes(COMPILER_BYTES)} are free for the compiler"
    can_be_mixed = machine.multiplies_bfloat16 and min(config.networks.hidden_sizes) >= MIN_BFLOAT16_SIDE
    compiled = Computation("fast", "mixed" if can_be_mixed else "fast", "fast")
    if machine.device == "cuda":
        return compiled, "on a GPU"
    if is_shared:
        return compiled, "the runs of a study or a matrix share what is compiled"
    frames, steps = config.collection.num_iterations * config.collection.rollout_frames, _optimiser_steps(config)
    num_envs, least_frames = config.collection.num_envs, least_frames_of_each(config.collection.num_envs)
    selection_least = least_frames_of_each(config.selection.episodes_per_seed)
    chosen = Computation(
        compiled.simulation if frames >= least_frames else "plain",
        compiled.update if steps >= LEAST_OPTIMISER_STEPS else "plain",
        compiled.selection if _selection_frames(config) >= selection_least else "plain",
    )
    pays = "compilation pays from"
    return chosen, (
        f"{frames:,} frames of each of {num_envs:,} environments, {pays} {least_frames:,}; "
        f"{steps:,} optimiser steps, {pays} {LEAST_OPTIMISER_STEPS:,}"
    )


def least_frames_of_each(num_envs: int) -> int:
    """Return from how many frames of each environment on the compilation of the simulation pays."""
    return math.ceil(LEAST_FRAMES / (1 + num_envs / _ENVS_THAT_DOUBLE_A_FRAME))


def _selection_frames(config: ExperimentConfig) -> int:
    """Return the most frames of each environment in all evaluations during training."""
    interval = config.selection.interval_iterations
    evaluations = -(-config.collection.num_iterations // interval) if interval else 0
    return evaluations * len(config.selection.seeds) * config.environment.max_episode_frames


def _optimiser_steps(config: ExperimentConfig) -> int:
    minibatches = -(-config.collection.frames_per_batch // config.learner.minibatch_frames)
    return config.collection.num_iterations * config.learner.epochs * minibatches


@cache
def _multiplies_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= _AMPERE
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
