"""The exit status of commands that run stages or look something up."""

import sys
from collections.abc import Callable

from mappo.compute.standard_streams import dropped_output
from mappo.errors import StageFailed
from mappo.reporting.terminal import printed_logs


def status(stage: Callable[[], object]) -> int:
    """Run a stage and return its exit status: 0, or that of its error, which it has printed."""
    try:
        stage()
    except StageFailed as failure:
        return failure.exit_status
    return 0


def stage_status(stage: Callable[[], object]) -> int:
    """Run a stage and return its exit status, as `status` does; what it cannot print is dropped."""
    with dropped_output():
        return status(stage)


def look_up(command: str, action: Callable[[], object]) -> int:
    """Run an action whose output is its result and return 0; warnings go to the error stream.

    Raises:
        MappoError: the action failed; the command prints why.
    """
    with printed_logs(command, sys.stderr):
        action()
    return 0
