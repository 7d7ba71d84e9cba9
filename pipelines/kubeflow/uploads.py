"""Upload a compiled pipeline as a version, once."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import kfp_server_api as api

from mappo.errors import ConfigError
from pipelines.compiling import Compiled
from pipelines.kubeflow.api import Api, pages, predicate


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
        listed = pages(
            kubeflow,
            kubeflow.pipelines.pipeline_service_list_pipelines,
            "pipelines",
            filter=predicate("EQUALS", "display_name", compiled.name),
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
    listed = pages(
        kubeflow,
        lambda **options: kubeflow.pipelines.pipeline_service_list_pipeline_versions(pipeline_id, **options),
        "pipeline_versions",
        filter=predicate("EQUALS", "display_name", version),
    )
    return next(listed, None)
