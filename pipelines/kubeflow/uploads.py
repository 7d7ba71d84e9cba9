"""Upload a compiled pipeline as a version, unless the server has this version already."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import kfp_server_api as api

from mappo.errors import ConfigError
from pipelines.compiling import Compiled
from pipelines.kubeflow.api import Api, pages, predicate


def upload(kubeflow: Api, compiled: Compiled, version: str) -> tuple[str, str]:
    """Upload a version of a pipeline unless it exists; return the IDs of the pipeline and of the version.

    Raises:
        ConfigError: a version of this name exists with another content.
    """
    pipeline = _pipeline(kubeflow, compiled)
    existing = _version_named(kubeflow, pipeline.pipeline_id, version)
    if existing is None:
        with TemporaryDirectory() as directory:
            path = Path(directory, f"{compiled.name}.yaml")
            path.write_text(compiled.text)

            def make(name: str, **options: Any) -> Any:
                return kubeflow.uploads.upload_pipeline_version(
                    str(path), name=name, pipelineid=pipeline.pipeline_id, **options
                )

            def find() -> Any:
                return _version_named(kubeflow, pipeline.pipeline_id, version)

            existing = kubeflow.create(make, version, find)
    elif not _is_same(existing.pipeline_spec, compiled):
        raise ConfigError(
            f"version {version!r} of {compiled.name} exists with another content: give --version another name"
        )
    return pipeline.pipeline_id, existing.pipeline_version_id


def _is_same(specification: Any, compiled: Compiled) -> bool:
    """Return whether a version holds this pipeline, including its part for Kubernetes; 2 equals 2.0."""
    stored = specification if isinstance(specification, dict) else {}
    return bool((stored if "pipeline_spec" in stored else {"pipeline_spec": stored}) == compiled.body)


def _pipeline(kubeflow: Api, compiled: Compiled) -> Any:
    """Return the pipeline of this name; create it if it does not exist."""

    def find() -> Any:
        scope = {"namespace": kubeflow.namespace} if kubeflow.namespace else {}
        pipelines = pages(
            kubeflow,
            kubeflow.pipelines.pipeline_service_list_pipelines,
            "pipelines",
            filter=predicate("EQUALS", "display_name", compiled.name),
            **scope,
        )
        return next(pipelines, None)

    if (existing := find()) is not None:
        return existing
    body = api.V2beta1Pipeline(
        display_name=compiled.name,
        name=compiled.name,
        description=compiled.specification["pipelineInfo"].get("description", ""),
        namespace=kubeflow.namespace,
    )
    return kubeflow.create(kubeflow.pipelines.pipeline_service_create_pipeline, body, find)


def _version_named(kubeflow: Api, pipeline_id: str, version: str) -> Any:
    versions = pages(
        kubeflow,
        lambda **options: kubeflow.pipelines.pipeline_service_list_pipeline_versions(pipeline_id, **options),
        "pipeline_versions",
        filter=predicate("EQUALS", "display_name", version),
    )
    return next(versions, None)
