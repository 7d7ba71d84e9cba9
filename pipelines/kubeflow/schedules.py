"""The schedules (recurring runs) of Kubeflow Pipelines: create, list, pause, resume, trigger and delete them."""

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
    """The times at which a submission runs. max_concurrency: how many of its runs may run at once, 1 to 10."""

    name: str
    cron: Cron
    max_concurrency: int = 1


def schedules(kubeflow: Api) -> list[Any]:
    """Return all schedules of the namespace, sorted by name."""
    listed = pages(
        kubeflow,
        kubeflow.recurring.recurring_run_service_list_recurring_runs,
        "recurring_runs",
        **experiment_filter(kubeflow),
    )
    return sorted(listed, key=lambda schedule: (schedule.display_name, schedule.created_at))


def schedules_named(kubeflow: Api, name: str) -> list[Any]:
    """Return the schedules with this name or ID, oldest first; the server allows several of one name.

    Raises:
        ConfigError: no schedule has this name or ID.
    """
    named = [
        schedule for schedule in schedules(kubeflow) if name in (schedule.display_name, schedule.recurring_run_id)
    ]
    if not named:
        raise ConfigError(f"schedule {name!r}: no schedule has this name; `schedule list` shows the existing ones")
    return named


def apply_schedule(kubeflow: Api, schedule: Schedule, submission: Submission) -> tuple[str, Any]:
    """Create or replace the schedule of this name; return `created`, `replaced` or `unchanged`, and the schedule.

    The server cannot change a schedule. So the new schedule is created before the old one is deleted, and there is
    always one. A paused schedule stays paused.
    """
    marker = _marker(schedule, submission)
    existing = [listed for listed in schedules(kubeflow) if listed.display_name == schedule.name]
    same = [listed for listed in existing if (listed.description or "").endswith(marker)]
    if same:
        for other in existing:
            if other is not same[-1]:
                _delete_schedule(kubeflow, other)
        return "unchanged", same[-1]
    is_paused = bool(existing) and all(listed.mode == "DISABLE" for listed in existing)
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
        created = [listed for listed in schedules(kubeflow) if (listed.description or "").endswith(marker)]
        return created[0] if created else None

    created = kubeflow.create(kubeflow.recurring.recurring_run_service_create_recurring_run, body, find)
    for listed in existing:
        _delete_schedule(kubeflow, listed)
    return ("replaced" if existing else "created"), created


def pause_schedule(kubeflow: Api, name: str) -> None:
    """Pause all schedules of a name: they start no runs until they are resumed."""
    for schedule in schedules_named(kubeflow, name):
        kubeflow.call(
            kubeflow.recurring.recurring_run_service_disable_recurring_run,
            recurring_run_id=schedule.recurring_run_id,
        )


def resume_schedule(kubeflow: Api, name: str) -> None:
    """Resume all schedules of a name; they do not make up for missed runs."""
    for schedule in schedules_named(kubeflow, name):
        kubeflow.call(
            kubeflow.recurring.recurring_run_service_enable_recurring_run,
            recurring_run_id=schedule.recurring_run_id,
        )


def delete_schedule(kubeflow: Api, name: str) -> None:
    """Delete all schedules of a name; their runs stay."""
    for schedule in schedules_named(kubeflow, name):
        _delete_schedule(kubeflow, schedule)


def trigger_schedule(kubeflow: Api, name: str) -> Any:
    """Start a run of a schedule now and return its `V2beta1Run`.

    The stages of the run replace [[ScheduledTime]] by the time of the run's creation.
    """
    schedule = schedules_named(kubeflow, name)[-1]
    run_name = unique_name(schedule.display_name)
    run = api.V2beta1Run(
        display_name=run_name,
        experiment_id=schedule.experiment_id,
        pipeline_spec=schedule.pipeline_spec,
        pipeline_version_reference=schedule.pipeline_version_reference,
        runtime_config=schedule.runtime_config,
        service_account=schedule.service_account,
    )

    def find() -> Any:
        named = find_named(kubeflow, run_name, schedule.experiment_id)
        return named[0] if named else None

    return kubeflow.create(kubeflow.runs.run_service_create_run, run, find)


def _marker(schedule: Schedule, submission: Submission) -> str:
    """Return the end of a schedule's description; two schedules have the same marker only if all else is equal."""
    text = f"{schedule.cron.expression} {schedule.max_concurrency} {submission.fingerprint}"
    return f"[{hashlib.sha256(text.encode()).hexdigest()[:12]}]"


def _delete_schedule(kubeflow: Api, schedule: Any) -> None:
    try:
        kubeflow.call(
            kubeflow.recurring.recurring_run_service_delete_recurring_run,
            recurring_run_id=schedule.recurring_run_id,
        )
    except ApiError as error:
        if error.status != 404:  # somebody else has deleted the schedule already
            raise
