"""The command `schedule`: create, show, change and delete recurring runs."""

import argparse
import json
from typing import Any

from pipelines.commands import schedule_apply
from pipelines.commands.arguments import add_command, add_connection_arguments, connect
from pipelines.commands.output import add_output_argument, moment, show_one, show_rows
from pipelines.commands.runs import run_summary
from pipelines.commands.schedule_definition import (
    add_definition_arguments,
    add_zone_argument,
    definition_of,
    next_times,
    waiter,
)
from pipelines.kubeflow import schedules
from pipelines.kubeflow.cron import Cron

_EPILOG = """examples:
  python -m pipelines schedule create nightly --cron "30 2 * * *" --site site.yaml \\
      -p store=s3://bucket/runs -p 'run=nightly-[[ScheduledTime]]'
  python -m pipelines schedule create nightly --cron "30 2 * * *" --dry-run --image ghcr.io/you/mappo:1.0
  python -m pipelines schedule list
  python -m pipelines schedule pause nightly
  python -m pipelines schedule apply schedules.yaml --dry-run

Creating a schedule again under the same name replaces it if anything differs. The parameters run, store and
edition may hold [[ScheduledTime]]. The stages replace it by the time for which the run was scheduled, such as
20261128204800, or at which it was created. Missed runs are not made up for.
"""


def add(commands: Any) -> None:
    """Add the commands of `schedule`."""
    summary = "create, show, change or delete recurring runs"
    group = add_command(commands, "schedule", summary, _EPILOG)
    verbs = group.add_subparsers(dest="verb", required=True, metavar="VERB")
    _add_create(verbs)
    schedule_apply.add(verbs)
    for name, summary, execute in (
        ("list", "list all schedules", _list),
        ("show", "show a schedule and the times of its next runs", _show),
        ("pause", "start no runs until the schedule is resumed", _pause),
        ("resume", "start runs again after a pause", _resume),
        ("delete", "delete a schedule; its runs stay", _delete),
        ("trigger", "start a run now, as the schedule would", _trigger),
    ):
        verb = verbs.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
        if name != "list":
            verb.add_argument("name", help="name or ID of the schedule")
        add_zone_argument(verb)
        add_connection_arguments(verb)
        add_output_argument(verb)
        verb.set_defaults(execute=execute)


def _add_create(verbs: Any) -> None:
    summary = "create a schedule, or replace the schedule of this name"
    verb = verbs.add_parser("create", help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
    verb.add_argument(
        "--dry-run",
        action="store_true",
        help="check everything and show the times of the next runs; create nothing",
    )
    add_zone_argument(verb)
    add_definition_arguments(verb)
    add_connection_arguments(verb)
    add_output_argument(verb)
    verb.set_defaults(execute=_create)


def _create(arguments: argparse.Namespace) -> int:
    schedule, submission = definition_of(arguments)
    times = _times(schedule.cron, arguments.time_zone)
    if arguments.dry_run:
        show_one(
            arguments, {"schedule": f"{schedule.name}, not created", "cron": schedule.cron.expression, **times}
        )
        return 0
    wait = waiter(arguments.time_zone)
    outcome, stored = schedules.apply_schedule(connect(arguments), schedule, submission, wait)
    show_one(arguments, {"schedule": f"{schedule.name}, {outcome}", **_summary(stored), **times})
    return 0


def _list(arguments: argparse.Namespace) -> int:
    rows = [_summary(schedule) for schedule in schedules.schedules(connect(arguments))]
    show_rows(arguments, rows, "no schedules yet; `python -m pipelines schedule create` makes one")
    return 0


def _show(arguments: argparse.Namespace) -> int:
    summaries = []
    for schedule in schedules.schedules_named(connect(arguments), arguments.name):
        config = schedule.runtime_config
        summary = {
            **_summary(schedule),
            "experiment": schedule.experiment_id,
            "catch up": "no" if schedule.no_catchup else "yes",
            "updated": moment(schedule.updated_at),
            "parameters": json.dumps(config.parameters if config else {}),
        }
        cron = Cron.stored(schedules.cron_of(schedule))
        summaries.append({**summary, **(_times(cron, arguments.time_zone) if cron else {})})
    if arguments.output == "json":
        print(json.dumps(summaries, indent=1))
        return 0
    for summary in summaries:
        show_one(arguments, summary)
    return 0


def _pause(arguments: argparse.Namespace) -> int:
    kubeflow = connect(arguments)
    schedules.pause_schedule(kubeflow, arguments.name)
    return _show_named(arguments, kubeflow)


def _resume(arguments: argparse.Namespace) -> int:
    kubeflow = connect(arguments)
    schedules.resume_schedule(kubeflow, arguments.name)
    return _show_named(arguments, kubeflow)


def _delete(arguments: argparse.Namespace) -> int:
    schedules.delete_schedule(connect(arguments), arguments.name)
    show_one(arguments, {"deleted": arguments.name})
    return 0


def _trigger(arguments: argparse.Namespace) -> int:
    kubeflow = connect(arguments)
    show_one(arguments, run_summary(kubeflow, schedules.trigger_schedule(kubeflow, arguments.name)))
    return 0


def _show_named(arguments: argparse.Namespace, kubeflow: Any) -> int:
    rows = [_summary(schedule) for schedule in schedules.schedules_named(kubeflow, arguments.name)]
    show_rows(arguments, rows, "")
    return 0


def _summary(schedule: Any) -> dict[str, Any]:
    trigger, cron = schedule.trigger, schedules.cron_of(schedule)
    if trigger and trigger.periodic_schedule:
        cron = f"every {trigger.periodic_schedule.interval_second} s"
    return {
        "name": schedule.display_name,
        "id": schedule.recurring_run_id,
        "status": schedule.status or schedule.mode,
        "cron": cron,
        "max concurrency": schedule.max_concurrency,
        "created": moment(schedule.created_at),
        "owner": schedules.owner_of(schedule),
    }


def _times(cron: Cron, zone: str) -> dict[str, str]:
    """Return the times of the next runs, and their time zone, as fields to print."""
    return {"time zone": f"{zone}, if the server's is that", "fires next": ", ".join(next_times(cron, zone))}
