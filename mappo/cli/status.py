"""The exit status of commands that run stages."""

from collections.abc import Callable

from mappo.errors import StageFailed


def status(stage: Callable[[], object]) -> int:
    """Run a stage and return its exit status: 0 success, 1 failure. A stage that fails has printed the reason."""
    try:
        stage()
    except StageFailed:
        return 1
    return 0


def watched_status(stage: Callable[[], object]) -> int:
    """Run a stage that is monitored and return its exit status; check the monitoring settings first.

    Raises:
        ConfigError: a monitoring setting is not allowed.
    """
    from mappo.monitoring.settings import MonitorSettings

    MonitorSettings.from_environment()
    return status(stage)
