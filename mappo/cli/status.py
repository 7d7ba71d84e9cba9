"""The exit status of commands that run stages or look something up, and the messages when stages end."""

import argparse
import sys
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

from mappo.compute.standard_streams import dropped_output
from mappo.errors import StageFailed
from mappo.reporting.terminal import printed_logs
from mappo.reporting.webhook import required_webhook

if TYPE_CHECKING:  # importing it takes seconds, since it imports torch
    from mappo.stages.runtime import StageResult


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


def notified_status(
    arguments: argparse.Namespace,
    subject: str,
    stage: Callable[[], "StageResult"],
    links: Mapping[str, str] = MappingProxyType({}),
) -> int:
    """Run a stage and return its exit status, as `stage_status` does.

    With `--notify`, a message tells how the stage ended. `subject` is what ended, such as `run first`;
    `links` are the addresses and locations in the message.

    Raises:
        ConfigError: `--notify` is given without a usable address.
    """
    webhook = required_webhook() if arguments.notify else None
    from mappo.stages.notify import notifying

    return stage_status(notifying(webhook, subject, links, stage))


def look_up(command: str, action: Callable[[], object]) -> int:
    """Run an action whose output is its result and return 0; warnings go to the error stream.

    Raises:
        MappoError: the action failed; the command prints why.
    """
    with printed_logs(command, sys.stderr):
        action()
    return 0
