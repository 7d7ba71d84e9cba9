"""The exit status of commands that run stages."""

from collections.abc import Callable

from mappo.compute.standard_streams import dropped_output
from mappo.errors import StageFailed


def status(action: Callable[[], object]) -> int:
    """Run an action and return its exit status: 0 success, 1 failure. If it fails, it has printed the reason."""
    try:
        action()
    except StageFailed:
        return 1
    return 0


def stage_status(stage: Callable[[], object]) -> int:
    """Run a stage and return its exit status, as `status` does; what it cannot print is dropped."""
    with dropped_output():
        return status(stage)


def watched_status(stage: Callable[[], object]) -> int:
    """Run a stage that is monitored and return its exit status; check the monitoring settings first.

    Raises:
        ConfigError: a monitoring setting is not allowed.
    """
    from mappo.monitoring.settings import MonitorSettings

    MonitorSettings.from_environment()
    return stage_status(stage)
