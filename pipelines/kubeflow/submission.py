"""A submission: a pipeline with its parameters, as the API takes it."""

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


def run_fields(kubeflow: Api, submission: Submission) -> dict[str, Any]:
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


def _experiment_id(kubeflow: Api, name: str) -> str:
    found = find_experiment(kubeflow, name)
    if found is None:
        body = api.V2beta1Experiment(display_name=name, namespace=kubeflow.namespace)
        found = kubeflow.create(
            kubeflow.experiments.experiment_service_create_experiment,
            body,
            lambda: find_experiment(kubeflow, name),
        )
    return str(found.experiment_id)


def find_experiment(kubeflow: Api, name: str) -> Any:
    listed = pages(
        kubeflow,
        kubeflow.experiments.experiment_service_list_experiments,
        "experiments",
        filter=predicate("EQUALS", "display_name", name),
        **experiment_filter(kubeflow),
    )
    return next(listed, None)
