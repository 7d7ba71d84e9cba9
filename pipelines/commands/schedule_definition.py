"""The flags that define a schedule, for `schedule create` and for the entries of a file of schedules."""

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from components.placeholders import SCHEDULED_TIME
from mappo.cli.arguments import add_config_arguments
from mappo.errors import ConfigError
from pipelines.commands.arguments import (
    add_pipeline_arguments,
    add_site_arguments,
    add_submission_arguments,
    submission_of,
)
from pipelines.kubeflow.cron import Cron
from pipelines.kubeflow.quiet import quiet_delay
from pipelines.kubeflow.schedules import Schedule, Wait
from pipelines.kubeflow.submission import Submission
from pipelines.specification import defaults_of

_NUM_TIMES = 5


def add_definition_arguments(command: argparse.ArgumentParser) -> None:
    """Add all that a schedule is created from: its name, its times, and what runs."""
    command.add_argument("name", help="name of the schedule, which is unique")
    command.add_argument(
        "--cron",
        required=True,
        metavar="CRON",
        help="5 fields (minute hour day month weekday), 6 (seconds first), or a word such as @daily",
    )
    command.add_argument(
        "--max-concurrency",
        type=int,
        default=1,
        metavar="N",
        help="runs of the schedule at once, 1 to 10 (default: 1)",
    )
    add_submission_arguments(command)
    add_pipeline_arguments(command)
    add_site_arguments(command)
    add_config_arguments(command, required="NAME --cron CRON")


def add_zone_argument(command: argparse.ArgumentParser) -> None:
    """Add `--time-zone`."""
    command.add_argument(
        "--time-zone",
        default="UTC",
        metavar="ZONE",
        help="time zone in which the server reads --cron; all schedules share it: CRON_SCHEDULE_TIMEZONE of the "
        "server's ml-pipeline-scheduledworkflow (default: UTC)",
    )


def definition_of(arguments: argparse.Namespace, owner: str = "") -> tuple[Schedule, Submission]:
    """Return the schedule that the flags define, and what it runs; print a note if all runs have one name.

    Raises:
        ConfigError: a value is not allowed.
        OSError: a file cannot be read.
    """
    if not 1 <= arguments.max_concurrency <= 10:
        raise ConfigError(f"--max-concurrency {arguments.max_concurrency}: must be 1 to 10")
    schedule = Schedule(arguments.name, Cron.parse(arguments.cron), arguments.max_concurrency, owner)
    submission = submission_of(arguments)
    defaults = defaults_of(submission.compiled.specification)
    _warn_of_fixed_name(schedule.name, {**defaults, **submission.parameters})
    return schedule, submission


def _warn_of_fixed_name(schedule: str, parameters: Mapping[str, Any]) -> None:
    """Print a note if all runs have one name or fill one matrix, since only the first of them trains then."""
    name, separator, verb = (
        ("store", "/", "continue this one matrix")
        if "matrix" in parameters
        else ("run", "-", "resume this one training")
    )
    value = str(parameters.get(name) or "")
    if value and SCHEDULED_TIME not in value:
        text = f"{name} = {value}: all runs of this schedule {verb}, which the first run finishes"
        anew = f"{name}={value}{separator}{SCHEDULED_TIME} trains anew each time"
        print(f"note: schedule {schedule}: {text}; {anew}", file=sys.stderr)


def next_times(cron: Cron, zone: str, count: int = _NUM_TIMES) -> list[str]:
    """Return the times of the next runs, in a time zone.

    Raises:
        ConfigError: the time zone is unknown.
    """
    return [time.strftime("%a %Y-%m-%d %H:%M:%S %Z") for time in cron.next(_now(zone), count)]


def waiter(zone: str) -> Wait:
    """Return a function that waits until a schedule can be replaced without losing or doubling a run.

    Raises:
        ConfigError: the time zone is unknown.
    """
    _now(zone)

    def wait(name: str, crons: Sequence[Cron]) -> None:
        delay = quiet_delay(crons, _now(zone))
        if delay is None:
            reason = "runs so often that one run may be lost, or start twice, while it is replaced"
            print(f"note: schedule {name}: {reason}", file=sys.stderr, flush=True)
        elif seconds := delay.total_seconds():
            reason = f"a run is due about now; it is replaced in {seconds:.0f} s, so that this run starts once"
            print(f"note: schedule {name}: {reason}", file=sys.stderr, flush=True)
            time.sleep(seconds)

    return wait


def _now(zone: str) -> datetime:
    return datetime.now(zone_of(zone))


def zone_of(zone: str) -> ZoneInfo:
    """Return the time zone of this name.

    Raises:
        ConfigError: the time zone is unknown.
    """
    try:
        return ZoneInfo(zone)
    except (ZoneInfoNotFoundError, ValueError):
        raise ConfigError(f"--time-zone {zone!r}: unknown; give one such as UTC or Europe/Berlin") from None
