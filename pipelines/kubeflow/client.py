"""Submit, list, cancel, retry and schedule runs over the API of Kubeflow Pipelines."""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import kfp_server_api as api

from mappo.errors import ConfigError
from pipelines.compiling import Compiled
from pipelines.kubeflow.connection import Api, ApiError, unique_name
from pipelines.kubeflow.cron import Cron

ENDED = ("SUCCEEDED", "FAILED", "SKIPPED", "CANCELED")
_PAGE = 100
_UNIQUE_SUFFIX = re.compile(r" \d{4}-\d\d-\d\d \d\d:\d\d:\d\d [0-9a-f]{6}")  # of `unique_name`


@dataclass(frozen=True)
class Submission:
    """A pipeline with its parameters, to run once or on a schedule. experiment: the folder of its runs.

    pipeline_root: where artifacts go; empty for the server's choice. service_account: of the pods; empty for the
    server's choice, which is `default-editor` in a namespace of its own. version: the pipeline's version that is
    uploaded and referred to; None to send the pipeline itself.
    """

    compiled: Compiled
    parameters: Mapping[str, Any] = field(default_factory=dict)
    experiment: str = "Default"
    pipeline_root: str = ""
    service_account: str = ""
    version: str | None = None

    @property
    def fingerprint(self) -> str:
        """Equal for equal submissions."""
        values: list[Any] = [self.compiled.text, dict(self.parameters), self.experiment, self.pipeline_root]
        values += [self.service_account, self.version]
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Schedule:
    """The times at which a submission runs; at most `max_concurrency` of its runs at once, 1 to 10."""

    name: str
    cron: Cron
    max_concurrency: int = 1


def submit(kubeflow: Api, submission: Submission, name: str = "") -> Any:
    """Start a run; the `V2beta1Run`.

    Raises:
        ApiError: the server refused, or did not answer.
    """
    name = unique_name(name or submission.compiled.name)
    run = api.V2beta1Run(display_name=name, **_what(kubeflow, submission))

    def find() -> Any:
        found = find_named(kubeflow, name, run.experiment_id)
        return found[0] if found else None

    return kubeflow.create(kubeflow.runs.run_service_create_run, run, find)


def runs(kubeflow: Api, limit: int, experiment: str = "") -> list[Any]:
    """The newest runs that are not archived, newest first."""
    where: dict[str, Any] = {"namespace": kubeflow.namespace}
    if experiment:
        found = _find_experiment(kubeflow, experiment)
        if found is None:
            raise ConfigError(f"experiment {experiment!r}: there is none of that name")
        where = {"experiment_id": found.experiment_id}
    pages = _pages(kubeflow, kubeflow.runs.run_service_list_runs, "runs", sort_by="created_at desc", **where)
    return list(islice((run for run in pages if run.storage_state != "ARCHIVED"), limit))


def run_of(kubeflow: Api, name_or_id: str) -> Any:
    """Return the run with this ID, or the newest with this name; `latest` is the newest of all.

    A name is also that by which runs were submitted, to which `submit` adds the time; exact names go first.

    Raises:
        ConfigError: there is none.
    """
    if name_or_id == "latest":
        newest = runs(kubeflow, 1)
        if not newest:
            raise ConfigError("there is no run")
        return get_run(kubeflow, newest[0].run_id)
    try:
        return get_run(kubeflow, name_or_id)
    except ApiError as error:
        if error.status not in (400, 404):
            raise
    named = find_named(kubeflow, name_or_id) or _find_submitted(kubeflow, name_or_id)
    if not named:
        raise ConfigError(
            f"run {name_or_id!r}: there is none of this ID or name; `runs list` shows those there are"
        )
    return get_run(kubeflow, named[0].run_id)


def get_run(kubeflow: Api, run_id: str) -> Any:
    """The run as it is now."""
    return kubeflow.call(kubeflow.runs.run_service_get_run, run_id=run_id)


def pipeline_name(kubeflow: Api, run: Any) -> str:
    """The name of a run's pipeline, by which artifacts are kept."""
    specification = specification_of(kubeflow, run)
    return str(specification.get("pipeline_spec", specification)["pipelineInfo"]["name"])


def specification_of(kubeflow: Api, run: Any) -> Mapping[str, Any]:
    """Return what a run is made from: the pipeline's specification, beside that of Kubernetes if there is one.

    Raises:
        ConfigError: the server does not tell.
    """
    specification = run.pipeline_spec
    reference = run.pipeline_version_reference
    if not isinstance(specification, Mapping) and reference:
        found = kubeflow.call(
            kubeflow.pipelines.pipeline_service_get_pipeline_version,
            reference.pipeline_id,
            reference.pipeline_version_id,
        )
        specification = found.pipeline_spec
    if not isinstance(specification, Mapping):
        raise ConfigError(f"run {run.run_id}: the server does not say which pipeline it is of")
    return specification


def find_named(kubeflow: Api, name: str, experiment_id: str = "") -> list[Any]:
    """Runs with a name, newest first."""
    return list(_runs_whose_name(kubeflow, "EQUALS", name, experiment_id))


def _find_submitted(kubeflow: Api, name: str) -> list[Any]:
    """Return the runs that were submitted under a name, newest first."""
    containing = _runs_whose_name(kubeflow, "IS_SUBSTRING", f"{name} ")
    return [run for run in containing if _UNIQUE_SUFFIX.fullmatch(run.display_name.removeprefix(name))]


def _runs_whose_name(kubeflow: Api, operation: str, text: str, experiment_id: str = "") -> Iterator[Any]:
    where = {"experiment_id": experiment_id} if experiment_id else {"namespace": kubeflow.namespace}
    return _pages(
        kubeflow,
        kubeflow.runs.run_service_list_runs,
        "runs",
        sort_by="created_at desc",
        filter=_predicate(operation, "display_name", text),
        **where,
    )


def cancel(kubeflow: Api, run: Any) -> None:
    """Ask a run to end.

    Raises:
        ConfigError: it has ended.
    """
    if run.state in ENDED:
        raise ConfigError(f"run {run.run_id} has ended already: {run.state}")
    kubeflow.call(kubeflow.runs.run_service_terminate_run, run_id=run.run_id)


def retry(kubeflow: Api, run: Any) -> None:
    """Run the stages of a run that failed, or were not reached, again; training resumes from its last checkpoint.

    Raises:
        ConfigError: it has not failed.
    """
    if run.state not in ("FAILED", "CANCELED"):
        raise ConfigError(f"run {run.run_id} is {run.state}: only what failed or was cancelled can be tried again")
    kubeflow.call(kubeflow.runs.run_service_retry_run, run_id=run.run_id)


def schedules(kubeflow: Api) -> list[Any]:
    """Return all schedules of the namespace, by name."""
    listed = _pages(
        kubeflow, kubeflow.recurring.recurring_run_service_list_recurring_runs, "recurring_runs", **_in(kubeflow)
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
        **_what(kubeflow, submission),
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


def _what(kubeflow: Api, submission: Submission) -> dict[str, Any]:
    """The fields that a run and a schedule share."""
    what: dict[str, Any] = {
        "experiment_id": _experiment_id(kubeflow, submission.experiment),
        "runtime_config": api.V2beta1RuntimeConfig(
            parameters=dict(submission.parameters), pipeline_root=submission.pipeline_root or None
        ),
        "service_account": submission.service_account or None,
    }
    if submission.version is None:
        return {**what, "pipeline_spec": submission.compiled.body}
    pipeline_id, version_id = upload(kubeflow, submission.compiled, submission.version)
    reference = api.V2beta1PipelineVersionReference(pipeline_id=pipeline_id, pipeline_version_id=version_id)
    return {**what, "pipeline_version_reference": reference}


def upload(kubeflow: Api, compiled: Compiled, version: str) -> tuple[str, str]:
    """Make a pipeline's version, unless it is there; IDs of both.

    Raises:
        ConfigError: a version of that name is there, with another content.
    """
    pipeline = _pipeline(kubeflow, compiled)
    found = _version_named(kubeflow, pipeline.pipeline_id, version)
    if found is None:
        with TemporaryDirectory() as directory:
            path = Path(directory, f"{compiled.name}.yaml")
            path.write_text(compiled.text)

            def make(name: str, **options: Any) -> Any:
                return kubeflow.uploads.upload_pipeline_version(
                    str(path), name=name, pipelineid=pipeline.pipeline_id, **options
                )

            def find() -> Any:
                return _version_named(kubeflow, pipeline.pipeline_id, version)

            found = kubeflow.create(make, version, find)
    elif not _is_same(found.pipeline_spec, compiled):
        raise ConfigError(
            f"version {version!r} of {compiled.name} is there with another content: give --version another name"
        )
    return pipeline.pipeline_id, found.pipeline_version_id


def _is_same(specification: Any, compiled: Compiled) -> bool:
    """Return whether a version holds this pipeline, with all that concerns Kubernetes; 2 equals 2.0."""
    there = specification if isinstance(specification, dict) else {}
    return bool((there if "pipeline_spec" in there else {"pipeline_spec": there}) == compiled.body)


def _pipeline(kubeflow: Api, compiled: Compiled) -> Any:
    def find() -> Any:
        where = {"namespace": kubeflow.namespace} if kubeflow.namespace else {}
        listed = _pages(
            kubeflow,
            kubeflow.pipelines.pipeline_service_list_pipelines,
            "pipelines",
            filter=_predicate("EQUALS", "display_name", compiled.name),
            **where,
        )
        return next(listed, None)

    if (found := find()) is not None:
        return found
    body = api.V2beta1Pipeline(
        display_name=compiled.name,
        name=compiled.name,
        description=compiled.specification["pipelineInfo"].get("description", ""),
        namespace=kubeflow.namespace,
    )
    return kubeflow.create(kubeflow.pipelines.pipeline_service_create_pipeline, body, find)


def _version_named(kubeflow: Api, pipeline_id: str, version: str) -> Any:
    listed = _pages(
        kubeflow,
        lambda **options: kubeflow.pipelines.pipeline_service_list_pipeline_versions(pipeline_id, **options),
        "pipeline_versions",
        filter=_predicate("EQUALS", "display_name", version),
    )
    return next(listed, None)


def _experiment_id(kubeflow: Api, name: str) -> str:
    found = _find_experiment(kubeflow, name)
    if found is None:
        body = api.V2beta1Experiment(display_name=name, namespace=kubeflow.namespace)
        found = kubeflow.create(
            kubeflow.experiments.experiment_service_create_experiment,
            body,
            lambda: _find_experiment(kubeflow, name),
        )
    return str(found.experiment_id)


def _find_experiment(kubeflow: Api, name: str) -> Any:
    listed = _pages(
        kubeflow,
        kubeflow.experiments.experiment_service_list_experiments,
        "experiments",
        filter=_predicate("EQUALS", "display_name", name),
        **_in(kubeflow),
    )
    return next(listed, None)


def _in(kubeflow: Api) -> dict[str, Any]:
    return {"namespace": kubeflow.namespace} if kubeflow.namespace else {}


def _predicate(operation: str, key: str, value: str) -> str:
    return json.dumps({"predicates": [{"operation": operation, "key": key, "string_value": value}]})


def _pages(kubeflow: Api, function: Callable[..., Any], name: str, **options: Any) -> Iterator[Any]:
    """Yield everything that a list has, page after page."""
    given = {key: value for key, value in options.items() if value is not None}
    token = ""
    while True:
        page = kubeflow.call(function, page_size=_PAGE, page_token=token, **given)
        yield from getattr(page, name) or []
        token = page.next_page_token
        if not token:
            return
