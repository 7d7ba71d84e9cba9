"""The command `schedule`: runs that start again and again."""

import argparse
import json
import sys
from collections.abc import Mapping
from datetime import datetime
from typing import Any
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from components.placeholders import SCHEDULED_TIME
from mappo.cli.arguments import add_config_arguments
from mappo.errors import ConfigError
from pipelines.commands.arguments import (
    add_command,
    add_connection_arguments,
    add_pipeline_arguments,
    add_site_arguments,
    add_submission_arguments,
    connect,
    submission_of,
)
from pipelines.commands.output import add_output_argument, moment, show_one, show_rows
from pipelines.commands.runs import described
from pipelines.kubeflow import schedules
from pipelines.kubeflow.cron import Cron

_NUM_TIMES = 5
_EPILOG = """examples:
  python -m pipelines schedule create nightly --cron "30 2 * * *" --site site.yaml \\
      -p store=s3://bucket/runs -p 'run=nightly-[[ScheduledTime]]'
  python -m pipelines schedule create nightly --cron "30 2 * * *" --dry-run --image ghcr.io/you/mappo:1.0
  python -m pipelines schedule list
  python -m pipelines schedule pause nightly

Creating again under the same name replaces it if anything is different. The parameters run, store and edition
may hold [[ScheduledTime]]: the stages put in the time at which the run was scheduled, such as 20261128204800, or
at which it was created. Runs that were missed are not made up for.
"""


def add(commands: Any) -> None:
    """Add the commands."""
    summary = "runs that start again and again"
    group = add_command(commands, "schedule", summary, _EPILOG)
    verbs = group.add_subparsers(dest="verb", required=True, metavar="VERB")
    _add_create(verbs)
    for name, summary, execute in (
        ("list", "all schedules", _list),
        ("show", "one schedule, and when it fires next", _show),
        ("pause", "fire no more, until it is resumed", _pause),
        ("resume", "fire again", _resume),
        ("delete", "delete a schedule; its runs stay", _delete),
        ("trigger", "start a run now, as the schedule would", _trigger),
    ):
        verb = verbs.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
        if name != "list":
            verb.add_argument("name", help="of the schedule, or its ID")
        _add_zone_argument(verb)
        add_connection_arguments(verb)
        add_output_argument(verb)
        verb.set_defaults(execute=execute)


def _add_create(verbs: Any) -> None:
    summary = "create a schedule, or make the one of this name be as given"
    verb = verbs.add_parser("create", help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
    verb.add_argument("name", help="of the schedule; there is one of a name")
    verb.add_argument(
        "--cron",
        required=True,
        metavar="CRON",
        help="5 fields (minute hour day month weekday), 6 (seconds first), or @daily and the like",
    )
    verb.add_argument(
        "--max-concurrency", type=int, default=1, metavar="N", help="of its runs at once, 1 to 10 (default: 1)"
    )
    verb.add_argument("--dry-run", action="store_true", help="check everything and show when it would fire")
    _add_zone_argument(verb)
    add_submission_arguments(verb)
    add_pipeline_arguments(verb)
    add_site_arguments(verb)
    add_connection_arguments(verb)
    add_output_argument(verb)
    add_config_arguments(verb, required="NAME --cron CRON")
    verb.set_defaults(execute=_create)


def _add_zone_argument(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--time-zone",
        default="UTC",
        metavar="ZONE",
        help="in which the server reads cron, one for all schedules: CRON_SCHEDULE_TIMEZONE of its "
        "ml-pipeline-scheduledworkflow (default: UTC)",
    )


def _create(arguments: argparse.Namespace) -> int:
    if not 1 <= arguments.max_concurrency <= 10:
        raise ConfigError(f"--max-concurrency {arguments.max_concurrency}: must be 1 to 10")
    schedule = schedules.Schedule(arguments.name, Cron.parse(arguments.cron), arguments.max_concurrency)
    submission = submission_of(arguments)
    _note_fixed_name(submission.parameters)
    times = _times(schedule.cron, arguments.time_zone)
    if arguments.dry_run:
        show_one(
            arguments, {"schedule": f"{schedule.name}, not created", "cron": schedule.cron.expression, **times}
        )
        return 0
    outcome, made = schedules.apply_schedule(connect(arguments), schedule, submission)
    show_one(arguments, {"schedule": f"{schedule.name}, {outcome}", **_described(made), **times})
    return 0


def _note_fixed_name(parameters: Mapping[str, Any]) -> None:
    """Note that a schedule under one run name trains once: the second run finds the first one finished."""
    name = str(parameters.get("run") or "")
    if name and SCHEDULED_TIME not in name:
        text = f"run = {name}: every run of this schedule resumes the same one, which is finished after the first"
        print(f"note: {text}; run={name}-{SCHEDULED_TIME} trains anew each time", file=sys.stderr)


def _list(arguments: argparse.Namespace) -> int:
    rows = [_described(each) for each in schedules.schedules(connect(arguments))]
    show_rows(arguments, rows, "no schedules yet; `python -m pipelines schedule create` makes one")
    return 0


def _show(arguments: argparse.Namespace) -> int:
    found = []
    for each in schedules.schedules_named(connect(arguments), arguments.name):
        config = each.runtime_config
        values = {
            **_described(each),
            "experiment": each.experiment_id,
            "catch up": "no" if each.no_catchup else "yes",
            "updated": moment(each.updated_at),
            "parameters": json.dumps(config.parameters if config else {}),
        }
        text = each.trigger.cron_schedule.cron if each.trigger and each.trigger.cron_schedule else ""
        cron = Cron.stored(text)
        found.append({**values, **(_times(cron, arguments.time_zone) if cron else {})})
    if arguments.output == "json":
        print(json.dumps(found, indent=1))
        return 0
    for each in found:
        show_one(arguments, each)
    return 0


def _pause(arguments: argparse.Namespace) -> int:
    kubeflow = connect(arguments)
    schedules.pause_schedule(kubeflow, arguments.name)
    return _shown(arguments, kubeflow)


def _resume(arguments: argparse.Namespace) -> int:
    kubeflow = connect(arguments)
    schedules.resume_schedule(kubeflow, arguments.name)
    return _shown(arguments, kubeflow)


def _delete(arguments: argparse.Namespace) -> int:
    schedules.delete_schedule(connect(arguments), arguments.name)
    show_one(arguments, {"deleted": arguments.name})
    return 0


def _trigger(arguments: argparse.Namespace) -> int:
    kubeflow = connect(arguments)
    show_one(arguments, described(kubeflow, schedules.trigger_schedule(kubeflow, arguments.name)))
    return 0


def _shown(arguments: argparse.Namespace, kubeflow: Any) -> int:
    show_rows(arguments, [_described(each) for each in schedules.schedules_named(kubeflow, arguments.name)], "")
    return 0


def _described(each: Any) -> dict[str, Any]:
    trigger = each.trigger
    when = trigger.cron_schedule.cron if trigger and trigger.cron_schedule else ""
    if trigger and trigger.periodic_schedule:
        when = f"every {trigger.periodic_schedule.interval_second} s"
    return {
        "name": each.display_name,
        "id": each.recurring_run_id,
        "status": each.status or each.mode,
        "cron": when,
        "max concurrency": each.max_concurrency,
        "created": moment(each.created_at),
    }


def _times(cron: Cron, zone: str) -> dict[str, str]:
    """Return when a schedule fires next, and in which time zone."""
    try:
        now = datetime.now(ZoneInfo(zone))
    except (ZoneInfoNotFoundError, ValueError):
        raise ConfigError(f"--time-zone {zone!r}: unknown; give one such as UTC or Europe/Berlin") from None
    times = [when.strftime("%a %Y-%m-%d %H:%M:%S %Z") for when in cron.next(now, _NUM_TIMES)]
    return {"time zone": f"{zone}, if the server's is that", "fires next": ", ".join(times)}
