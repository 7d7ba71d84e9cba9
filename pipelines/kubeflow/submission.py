"""The submission of a pipeline: its parameters, experiment and account, in the form that the API expects."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import kfp_server_api as api

from pipelines.compiling import Compiled
from pipelines.kubeflow.api import Api, experiment_filter, pages, predicate
from pipelines.kubeflow.uploads import upload


@dataclass(frozen=True)
class Submission:
    """A pipeline with its parameters, to run once or on a schedule.

    experiment: name of the experiment that groups the runs. pipeline_root: store of the artifacts; empty for the
    server's default. service_account: account of the pods; empty for the server's default, which is
    `default-editor` in a Kubeflow of several users. version: name of the pipeline version to upload and refer to;
    None to send the pipeline itself with the run.
    """

    compiled: Compiled
    parameters: Mapping[str, Any] = field(default_factory=dict)
    experiment: str = "Default"
    pipeline_root: str = ""
    service_account: str = ""
    version: str | None = None

    @property
    def fingerprint(self) -> str:
        """The hash of all fields: equal submissions have equal fingerprints."""
        values: list[Any] = [self.compiled.text, dict(self.parameters), self.experiment, self.pipeline_root]
        values += [self.service_account, self.version]
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


def run_fields(kubeflow: Api, submission: Submission) -> dict[str, Any]:
    """Return the fields that a run and a schedule share; create the experiment, upload the version if needed."""
    fields: dict[str, Any] = {
        "experiment_id": _experiment_id(kubeflow, submission.experiment),
        "runtime_config": api.V2beta1RuntimeConfig(
            parameters=dict(submission.parameters), pipeline_root=submission.pipeline_root or None
        ),
        "service_account": submission.service_account or None,
    }
    if submission.version is None:
        return {**fields, "pipeline_spec": submission.compiled.body}
    pipeline_id, version_id = upload(kubeflow, submission.compiled, submission.version)
    reference = api.V2beta1PipelineVersionReference(pipeline_id=pipeline_id, pipeline_version_id=version_id)
    return {**fields, "pipeline_version_reference": reference}


def _experiment_id(kubeflow: Api, name: str) -> str:
    experiment = find_experiment(kubeflow, name)
    if experiment is None:
        body = api.V2beta1Experiment(display_name=name, namespace=kubeflow.namespace)
        experiment = kubeflow.create(
            kubeflow.experiments.experiment_service_create_experiment,
            body,
            lambda: find_experiment(kubeflow, name),
        )
    return str(experiment.experiment_id)


def find_experiment(kubeflow: Api, name: str) -> Any:
    """Return the experiment of this name, or None."""
    experiments = pages(
        kubeflow,
        kubeflow.experiments.experiment_service_list_experiments,
        "experiments",
        filter=predicate("EQUALS", "display_name", name),
        **experiment_filter(kubeflow),
    )
    return next(experiments, None)
