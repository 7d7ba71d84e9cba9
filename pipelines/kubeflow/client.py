"""Submit, list, cancel, retry and schedule runs over the API of Kubeflow Pipelines."""

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
_UNIQUE_SUFFIX = re.compile(r" \d{4}-\d\d-\d\d \d\d:\d\d:\d\d [0-9a-f]{6}")  # of `unique_name`


def submit(kubeflow: Api, submission: Submission, name: str = "") -> Any:
    """Start a run; the `V2beta1Run`.

    Raises:
        ApiError: the server refused, or did not answer.
    """
    name = unique_name(name or submission.compiled.name)
    run = api.V2beta1Run(display_name=name, **run_fields(kubeflow, submission))

    def find() -> Any:
        found = find_named(kubeflow, name, run.experiment_id)
        return found[0] if found else None

    return kubeflow.create(kubeflow.runs.run_service_create_run, run, find)


def runs(kubeflow: Api, limit: int, experiment: str = "") -> list[Any]:
    """The newest runs that are not archived, newest first."""
    where: dict[str, Any] = {"namespace": kubeflow.namespace}
    if experiment:
        found = find_experiment(kubeflow, experiment)
        if found is None:
            raise ConfigError(f"experiment {experiment!r}: there is none of that name")
        where = {"experiment_id": found.experiment_id}
    newest = pages(kubeflow, kubeflow.runs.run_service_list_runs, "runs", sort_by="created_at desc", **where)
    return list(islice((run for run in newest if run.storage_state != "ARCHIVED"), limit))


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
    return pages(
        kubeflow,
        kubeflow.runs.run_service_list_runs,
        "runs",
        sort_by="created_at desc",
        filter=predicate(operation, "display_name", text),
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
