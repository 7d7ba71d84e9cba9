"""The exit status of commands that run stages, and the messages when they end."""

import argparse
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

from mappo.compute.standard_streams import dropped_output
from mappo.errors import StageFailed
from mappo.reporting.webhook import required_webhook

if TYPE_CHECKING:  # importing it takes seconds, since it imports torch
    from mappo.stages.runtime import StageResult


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


def watched_status(
    arguments: argparse.Namespace,
    subject: str,
    stage: Callable[[], "StageResult"],
    links: Mapping[str, str] = MappingProxyType({}),
) -> int:
    """Run a stage that is monitored and return its exit status; check the monitoring settings first.

    With `--notify`, a message tells how it ended. `subject` is what ended, such as `run first`; `links` are the
    addresses and locations in the message.

    Raises:
        ConfigError: a monitoring setting is not allowed.
    """
    from mappo.monitoring.settings import MonitorSettings
    from mappo.stages.notify import notifying

    MonitorSettings.from_environment()
    webhook = required_webhook() if arguments.notify else None
    return stage_status(notifying(webhook, subject, links, stage))
