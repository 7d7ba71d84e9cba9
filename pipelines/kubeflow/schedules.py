"""Schedules (recurring runs) over the API of Kubeflow Pipelines."""

import hashlib
from dataclasses import dataclass
from typing import Any

import kfp_server_api as api

from mappo.errors import ConfigError
from pipelines.errors import ApiError
from pipelines.kubeflow.api import Api, experiment_filter, pages, unique_name
from pipelines.kubeflow.client import find_named
from pipelines.kubeflow.cron import Cron
from pipelines.kubeflow.submission import Submission, run_fields


@dataclass(frozen=True)
class Schedule:
    """The times at which a submission runs; at most `max_concurrency` of its runs at once, 1 to 10."""

    name: str
    cron: Cron
    max_concurrency: int = 1


def schedules(kubeflow: Api) -> list[Any]:
    """Return all schedules of the namespace, by name."""
    listed = pages(
        kubeflow,
        kubeflow.recurring.recurring_run_service_list_recurring_runs,
        "recurring_runs",
        **experiment_filter(kubeflow),
    )
    return sorted(listed, key=lambda each: (each.display_name, each.created_at))


def schedules_named(kubeflow: Api, name: str) -> list[Any]:
    """The schedules of a name, oldest first; the server allows several.

    Raises:
        ConfigError: there is none.
    """
    found = [each for each in schedules(kubeflow) if name in (each.display_name, each.recurring_run_id)]
    if not found:
        raise ConfigError(f"schedule {name!r}: there is none of that name; `schedule list` shows those there are")
    return found


def apply_schedule(kubeflow: Api, schedule: Schedule, submission: Submission) -> tuple[str, Any]:
    """Make the schedule of this name be so; `created`, `replaced` or `unchanged`, and it.

    A schedule cannot be changed: the new one is made before the old one goes, so that there is always one. One
    that is paused stays paused.
    """
    marker = _marker(schedule, submission)
    before = [each for each in schedules(kubeflow) if each.display_name == schedule.name]
    same = [each for each in before if (each.description or "").endswith(marker)]
    if same:
        for other in before:
            if other is not same[-1]:
                _delete_schedule(kubeflow, other)
        return "unchanged", same[-1]
    is_paused = bool(before) and all(each.mode == "DISABLE" for each in before)
    body = api.V2beta1RecurringRun(
        display_name=schedule.name,
        description=f"{submission.compiled.name} by python -m pipelines schedule {marker}",
        trigger=api.V2beta1Trigger(cron_schedule=api.V2beta1CronSchedule(cron=schedule.cron.expression)),
        max_concurrency=str(schedule.max_concurrency),
        no_catchup=True,
        mode="DISABLE" if is_paused else "ENABLE",
        **run_fields(kubeflow, submission),
    )

    def find() -> Any:
        made = [each for each in schedules(kubeflow) if (each.description or "").endswith(marker)]
        return made[0] if made else None

    made = kubeflow.create(kubeflow.recurring.recurring_run_service_create_recurring_run, body, find)
    for each in before:
        _delete_schedule(kubeflow, each)
    return ("replaced" if before else "created"), made


def pause_schedule(kubeflow: Api, name: str) -> None:
    """Fire no more, until it is resumed."""
    for each in schedules_named(kubeflow, name):
        kubeflow.call(
            kubeflow.recurring.recurring_run_service_disable_recurring_run, recurring_run_id=each.recurring_run_id
        )


def resume_schedule(kubeflow: Api, name: str) -> None:
    """Fire again; what was missed is not made up for."""
    for each in schedules_named(kubeflow, name):
        kubeflow.call(
            kubeflow.recurring.recurring_run_service_enable_recurring_run, recurring_run_id=each.recurring_run_id
        )


def delete_schedule(kubeflow: Api, name: str) -> None:
    """Delete all schedules of a name; their runs stay."""
    for each in schedules_named(kubeflow, name):
        _delete_schedule(kubeflow, each)


def trigger_schedule(kubeflow: Api, name: str) -> Any:
    """Start a run now, as the schedule would; the `V2beta1Run`.

    Its stages put the time of its creation where [[ScheduledTime]] stands.
    """
    each = schedules_named(kubeflow, name)[-1]
    run_name = unique_name(each.display_name)
    run = api.V2beta1Run(
        display_name=run_name,
        experiment_id=each.experiment_id,
        pipeline_spec=each.pipeline_spec,
        pipeline_version_reference=each.pipeline_version_reference,
        runtime_config=each.runtime_config,
        service_account=each.service_account,
    )

    def find() -> Any:
        found = find_named(kubeflow, run_name, each.experiment_id)
        return found[0] if found else None

    return kubeflow.create(kubeflow.runs.run_service_create_run, run, find)


def _marker(schedule: Schedule, submission: Submission) -> str:
    """Return the end of a schedule's description, which differs when anything about the schedule differs."""
    text = f"{schedule.cron.expression} {schedule.max_concurrency} {submission.fingerprint}"
    return f"[{hashlib.sha256(text.encode()).hexdigest()[:12]}]"


def _delete_schedule(kubeflow: Api, each: Any) -> None:
    try:
        kubeflow.call(
            kubeflow.recurring.recurring_run_service_delete_recurring_run, recurring_run_id=each.recurring_run_id
        )
    except ApiError as error:
        if error.status != 404:  # somebody else was faster
            raise
