"""The schedules (recurring runs) of Kubeflow Pipelines: create, list, pause, resume, trigger and delete them.

The description of a schedule holds two marks, since the server keeps nothing else that a client can choose: the
hash of all that it was created from and, if a file of schedules describes it, the owner of that file.
"""

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import kfp_server_api as api

from mappo.errors import ConfigError
from pipelines.errors import ApiError
from pipelines.kubeflow.api import Api, experiment_filter, pages, unique_name
from pipelines.kubeflow.client import find_named
from pipelines.kubeflow.cron import Cron
from pipelines.kubeflow.submission import Submission, run_fields

Wait = Callable[
    [str, Sequence[Cron]], object
]  # waits until a schedule of this name and these times can be replaced
_OWNER = re.compile(r", owner (?P<owner>[a-z0-9-]+) \[[0-9a-f]+\]$")


@dataclass(frozen=True)
class Schedule:
    """The times at which a submission runs.

    max_concurrency: how many of its runs may run at once, 1 to 10. owner: owner of the file that describes the
    schedule; empty for a schedule that a command made.
    """

    name: str
    cron: Cron
    max_concurrency: int = 1
    owner: str = ""


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


def owner_of(schedule: Any) -> str:
    """Return the owner of the file that describes a schedule; empty for any other schedule."""
    match = _OWNER.search(schedule.description or "")
    return match["owner"] if match else ""


def cron_of(schedule: Any) -> str:
    """Return the cron expression of a schedule on the server; empty for a schedule with a fixed interval."""
    trigger = schedule.trigger
    return str(trigger.cron_schedule.cron) if trigger and trigger.cron_schedule else ""


def is_up_to_date(listed: Any, schedule: Schedule, submission: Submission) -> bool:
    """Return whether a schedule on the server was created from all of this."""
    return bool((listed.description or "").endswith(_marker(schedule, submission)))


def apply_schedule(
    kubeflow: Api, schedule: Schedule, submission: Submission, wait: Wait = lambda _name, _crons: None
) -> tuple[str, Any]:
    """Create or replace the schedule of this name; return `created`, `replaced` or `unchanged`, and the schedule.

    The server cannot change a schedule. So the new schedule is created before the old one is deleted: a process
    that dies in between leaves two, of which the next call deletes one. The other order could leave none. `wait`
    is called before both requests. A paused schedule stays paused. Running runs of the old schedule continue.

    Raises:
        ConfigError: a schedule of this name has another owner.
    """
    marker = _marker(schedule, submission)
    existing = [listed for listed in schedules(kubeflow) if listed.display_name == schedule.name]
    for listed in existing:
        require_owner(listed, schedule.owner)
    same = [listed for listed in existing if is_up_to_date(listed, schedule, submission)]
    if same:
        for other in existing:
            if other is not same[-1]:
                remove_schedule(kubeflow, other)
        return "unchanged", same[-1]
    is_paused = bool(existing) and all(listed.mode == "DISABLE" for listed in existing)
    body = api.V2beta1RecurringRun(
        display_name=schedule.name,
        description=f"{submission.compiled.name} by python -m pipelines schedule{marker}",
        trigger=api.V2beta1Trigger(cron_schedule=api.V2beta1CronSchedule(cron=schedule.cron.expression)),
        max_concurrency=str(schedule.max_concurrency),
        no_catchup=True,
        mode="DISABLE" if is_paused else "ENABLE",
        **run_fields(kubeflow, submission),
    )

    def find() -> Any:
        named = [listed for listed in schedules(kubeflow) if listed.display_name == schedule.name]
        return next((listed for listed in named if is_up_to_date(listed, schedule, submission)), None)

    if existing and not is_paused:
        stored = [cron for listed in existing if (cron := Cron.stored(cron_of(listed)))]
        wait(schedule.name, [schedule.cron, *stored])
    created = kubeflow.create(kubeflow.recurring.recurring_run_service_create_recurring_run, body, find)
    for listed in existing:
        remove_schedule(kubeflow, listed)
    return ("replaced" if existing else "created"), created


def require_owner(listed: Any, owner: str) -> None:
    """Refuse to replace a schedule that a file of another owner describes, or that a file does not describe yet.

    Raises:
        ConfigError: the schedule on the server has another owner.
    """
    actual, name = owner_of(listed), listed.display_name
    if actual == owner:
        return
    if actual:
        raise ConfigError(
            f"schedule {name!r}: the file of schedules of owner {actual} describes it: change it there, or choose "
            "another name"
        )
    raise ConfigError(
        f"schedule {name!r}: exists, and no file of owner {owner} made it: delete it by `schedule delete`, or "
        "choose another name"
    )


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
        remove_schedule(kubeflow, schedule)


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


def remove_schedule(kubeflow: Api, schedule: Any) -> None:
    """Delete one schedule of the server, unless somebody else has deleted it already; its runs continue.

    Kubernetes would end the running workflows of a deleted schedule (kubeflow/pipelines #12573). Servers before
    2.16 do not know the policy that keeps them.
    """
    try:
        kubeflow.call(
            kubeflow.recurring.recurring_run_service_delete_recurring_run,
            recurring_run_id=schedule.recurring_run_id,
            propagation_policy="ORPHAN",
        )
    except ApiError as error:
        if error.status != 404:
            raise


def _marker(schedule: Schedule, submission: Submission) -> str:
    """Return the end of a schedule's description; two schedules have the same marker only if all else is equal."""
    text = f"{schedule.cron.expression} {schedule.max_concurrency} {submission.fingerprint}"
    owner = f", owner {schedule.owner}" if schedule.owner else ""
    return f"{owner} [{hashlib.sha256(text.encode()).hexdigest()[:12]}]"
