"""Submit, list, cancel and retry runs through the API of Kubeflow Pipelines."""

import re
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

import kfp_server_api as api

from mappo.errors import ConfigError
from pipelines.errors import ApiError
from pipelines.kubeflow.api import Api, pages, predicate, unique_name
from pipelines.kubeflow.submission import Submission, find_experiment, run_fields

ENDED = ("SUCCEEDED", "FAILED", "SKIPPED", "CANCELED")
_UNIQUE_SUFFIX = re.compile(
    r" \d{4}-\d\d-\d\d \d\d:\d\d:\d\d [0-9a-f]{6}"
)  # the suffix that `unique_name` appends


def submit(kubeflow: Api, submission: Submission, name: str = "") -> Any:
    """Start a run and return its `V2beta1Run`.

    Raises:
        ApiError: the server refused the run or did not answer.
    """
    name = unique_name(name or submission.compiled.name)
    run = api.V2beta1Run(display_name=name, **run_fields(kubeflow, submission))

    def find() -> Any:
        named = find_named(kubeflow, name, run.experiment_id)
        return named[0] if named else None

    return kubeflow.create(kubeflow.runs.run_service_create_run, run, find)


def runs(kubeflow: Api, limit: int, experiment: str = "") -> list[Any]:
    """Return up to `limit` runs that are not archived, newest first.

    Raises:
        ConfigError: no experiment has the name `experiment`.
    """
    scope: dict[str, Any] = {"namespace": kubeflow.namespace}
    if experiment:
        listed = find_experiment(kubeflow, experiment)
        if listed is None:
            raise ConfigError(f"experiment {experiment!r}: no experiment has this name")
        scope = {"experiment_id": listed.experiment_id}
    newest = pages(kubeflow, kubeflow.runs.run_service_list_runs, "runs", sort_by="created_at desc", **scope)
    return list(islice((run for run in newest if run.storage_state != "ARCHIVED"), limit))


def find_run(kubeflow: Api, name_or_id: str) -> Any:
    """Return the run with this ID, or the newest run with this name; `latest` means the newest run of all.

    Exact display names go first. The name given to `submit` finds a run too, although `submit` appends the time.

    Raises:
        ConfigError: no run has this ID or name.
    """
    if name_or_id == "latest":
        newest = runs(kubeflow, 1)
        if not newest:
            raise ConfigError("latest: there is no run yet; `submit` starts one")
        return get_run(kubeflow, newest[0].run_id)
    try:
        return get_run(kubeflow, name_or_id)
    except ApiError as error:
        if error.status not in (400, 404):
            raise
    named = find_named(kubeflow, name_or_id) or _find_submitted(kubeflow, name_or_id)
    if not named:
        raise ConfigError(f"run {name_or_id!r}: no run has this ID or name; `runs list` shows the existing runs")
    return get_run(kubeflow, named[0].run_id)


def get_run(kubeflow: Api, run_id: str) -> Any:
    """Return the current state of a run."""
    return kubeflow.call(kubeflow.runs.run_service_get_run, run_id=run_id)


def pipeline_name(kubeflow: Api, run: Any) -> str:
    """Return the name of a run's pipeline, which is part of the path of its artifacts."""
    specification = specification_of(kubeflow, run)
    return str(specification.get("pipeline_spec", specification)["pipelineInfo"]["name"])


def specification_of(kubeflow: Api, run: Any) -> Mapping[str, Any]:
    """Return the specification of a run's pipeline, together with that of Kubernetes if the pipeline has one.

    Raises:
        ConfigError: the server does not return the specification.
    """
    specification = run.pipeline_spec
    reference = run.pipeline_version_reference
    if not isinstance(specification, Mapping) and reference:
        version = kubeflow.call(
            kubeflow.pipelines.pipeline_service_get_pipeline_version,
            reference.pipeline_id,
            reference.pipeline_version_id,
        )
        specification = version.pipeline_spec
    if not isinstance(specification, Mapping):
        raise ConfigError(f"run {run.run_id}: the server does not return the run's pipeline")
    return specification


def find_named(kubeflow: Api, name: str, experiment_id: str = "") -> list[Any]:
    """Return the runs with exactly this name, newest first."""
    return list(_runs_whose_name(kubeflow, "EQUALS", name, experiment_id))


def _find_submitted(kubeflow: Api, name: str) -> list[Any]:
    """Return the runs whose name is this name and the suffix that `submit` appends, newest first."""
    containing = _runs_whose_name(kubeflow, "IS_SUBSTRING", f"{name} ")
    return [run for run in containing if _UNIQUE_SUFFIX.fullmatch(run.display_name.removeprefix(name))]


def _runs_whose_name(kubeflow: Api, operation: str, text: str, experiment_id: str = "") -> Iterator[Any]:
    scope = {"experiment_id": experiment_id} if experiment_id else {"namespace": kubeflow.namespace}
    return pages(
        kubeflow,
        kubeflow.runs.run_service_list_runs,
        "runs",
        sort_by="created_at desc",
        filter=predicate(operation, "display_name", text),
        **scope,
    )


def cancel(kubeflow: Api, run: Any) -> None:
    """Cancel a run.

    Raises:
        ConfigError: the run has ended already.
    """
    if run.state in ENDED:
        raise ConfigError(f"run {run.run_id} has ended already: {run.state}")
    kubeflow.call(kubeflow.runs.run_service_terminate_run, run_id=run.run_id)


def retry(kubeflow: Api, run: Any) -> None:
    """Retry a run: run its failed and unreached stages again; training resumes from its last checkpoint.

    Raises:
        ConfigError: the run has neither failed nor been cancelled.
    """
    if run.state not in ("FAILED", "CANCELED"):
        raise ConfigError(f"run {run.run_id} is {run.state}: only a failed or cancelled run can be retried")
    kubeflow.call(kubeflow.runs.run_service_retry_run, run_id=run.run_id)
