"""The checks of a command before it imports torch, which takes seconds: a wrong command fails in a moment."""

import os
import socket
import sys
from contextlib import suppress
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from mappo.cli.run_names import trained_config
from mappo.config import ExperimentConfig
from mappo.errors import CheckpointError, ConfigError, StoreError
from mappo.monitoring.settings import MonitorSettings
from mappo.runs.attempt_notes import AttemptNote
from mappo.runs.checkpoint import Manifest
from mappo.runs.locations import is_directory
from mappo.runs.run import Run
from mappo.training.continuation import require_same_config

_CLOCK_SECONDS = 2.0  # between the clock of the kernel, by which processes start, and that of notes


def require_possible_here(config: ExperimentConfig) -> None:
    """Check the settings of monitoring, the device and the scenario's module, as far as no import is needed.

    Raises:
        ConfigError: one of them cannot be used on this machine.
    """
    MonitorSettings.from_environment()
    if config.device == "cuda" and (build := version("torch")).endswith("+cpu"):
        raise ConfigError(
            f"device = 'cuda': no CUDA device is available: torch {build} is built without CUDA; use cpu or auto"
        )
    module, colon, _ = config.environment.scenario.partition(":")
    package = module.partition(".")[0]
    if colon and not (package.isidentifier() and find_spec(package)):
        raise ConfigError(
            f"environment.scenario = {config.environment.scenario!r}: there is no module {package!r}, neither in "
            "the current directory nor among the installed ones"
        )


def require_resumable(location: str, config: ExperimentConfig) -> None:
    """Check that an existing run has this configuration; print if another process here still trains the run.

    Only directories are read: training asks a bucket itself, and may have to wait for it.

    Raises:
        ConfigError: the run started with another configuration.
    """
    if not is_directory(location) or not Path(location).is_dir():
        return
    run = Run.at(location)
    with suppress(StoreError):  # training reports what is wrong with the directory
        manifest = _newest_manifest(run)
        if manifest:
            with suppress(CheckpointError):  # training reports it
                require_same_config(location, trained_config(manifest), config)
        if not manifest or manifest.iteration < config.collection.num_iterations:
            _print_if_taken_over(location, run)


def _newest_manifest(run: Run) -> Manifest | None:
    for ref in run.refs():
        with suppress(CheckpointError):
            return run.manifest(ref)
    return None


def _print_if_taken_over(location: str, run: Run) -> None:
    number, note = next(run.attempts.from_number(1), (0, None))
    if note and _is_running_here(note):
        print(
            f"note: process {note.process} of this machine trains {location} (attempt {number}); this process "
            "takes the run over, and that one stops",
            file=sys.stderr,
        )


def _is_running_here(note: AttemptNote) -> bool:
    """Return whether the process of a note is known to run; a later process of the same number is another one."""
    if note.host != socket.gethostname() or note.process == os.getpid():
        return False
    try:
        state = Path(f"/proc/{note.process}/stat").read_text().rpartition(")")[2].split()
        boot = next(line for line in Path("/proc/stat").read_text().splitlines() if line.startswith("btime "))
    except OSError:  # it has ended, or this is not Linux
        return False
    began = int(boot.split()[1]) + int(state[19]) / os.sysconf("SC_CLK_TCK")
    return state[0] != "Z" and began <= note.started + _CLOCK_SECONDS
