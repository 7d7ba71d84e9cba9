"""Estimate the size of a run's workflow, and refuse a run whose workflow is too large for Kubernetes.

Argo keeps the whole workflow in one object of Kubernetes, which holds 1 MiB. Argo compresses the nodes of a
larger workflow. A workflow that is too large even then fails in the middle of its run. The estimate builds the
text that a driver writes for each stage, with identifiers as random as Kubeflow's, and compresses it. Its factors
are fitted to workflows recorded from a real Kubeflow 2.17.0.
"""

import base64
import gzip
import hashlib
import json
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

from mappo.errors import ConfigError
from mappo.tuning.study_config import study_config_from_json
from pipelines.plan import PlannedStage, planned_stages
from pipelines.specification import parameters_of

MAX_BYTES = 1024**2
_COPIES = 6  # of a stage's pod: the driver's output twice, the inputs of a task and of its pod, each with a retry
_LAUNCHER = "/kfp-launcher/launch --pipeline_name --run_id --execution_id --pod_name --pod_uid --publish_logs" * 7
_NODE_BYTES = 550
_GZIP_LEVEL = 4  # lower than the default, since Go compresses less tightly than zlib
_NODES_FACTOR, _COMPRESSED_FACTOR = 1.2, 1.9  # for the times, hashes and log names in real nodes
_SPECIFICATION_FACTOR = 2.3  # bytes in the workflow for each byte of the compiled pipeline and of its parameters
_TEMPLATES_BYTES = 8_000  # of Argo's templates of drivers and containers, which every workflow has
_MOST_ITEMS = 1000  # in a loop; more are refused without an estimate, since they cannot fit
_ARTIFACT_BYTES = 420  # the URI and the labels of an input artifact


def workflow_bytes(document: Mapping[str, Any], parameters: Mapping[str, Any]) -> int:
    """Estimate the bytes of a run's workflow at its end, with its nodes compressed if it is larger than 1 MiB.

    `document` is a pipeline as the API takes it (`Compiled.body`); `parameters` are those of the run.
    """
    pipeline = document.get("pipeline_spec", document)
    declared = parameters_of(pipeline).items()
    values = {name: definition.get("defaultValue") for name, definition in declared} | dict(parameters)
    stages = planned_stages(document, parameters, unknown_items=_num_retraining_seeds(values) or 1)
    nodes = sorted(_nodes(document, stages, values), key=lambda text: hashlib.sha256(text.encode()).digest())
    text = "".join(nodes)
    given = len(_json(dict(document))) + len(_json(dict(parameters)))
    specification = _TEMPLATES_BYTES + int(_SPECIFICATION_FACTOR * given)
    plain = specification + int(_NODES_FACTOR * len(text))
    if plain <= MAX_BYTES:
        return plain
    compressed = base64.b64encode(gzip.compress(text.encode(), _GZIP_LEVEL))
    return specification + int(_COMPRESSED_FACTOR * len(compressed))


def _num_retraining_seeds(parameters: Mapping[str, Any]) -> int:
    """Return the number of items in the loops over retraining seeds; 0 in a pipeline without a study."""
    text = parameters.get("study_config")
    return study_config_from_json(text).retraining.num_seeds if text else 0


def check_size(document: Mapping[str, Any], parameters: Mapping[str, Any]) -> None:
    """Refuse a run whose workflow would not fit into one object of Kubernetes.

    Raises:
        ConfigError: the workflow would not fit; the message has its estimated size and the limit.
    """
    lists = [len(value) for value in parameters.values() if isinstance(value, list)]
    items = max([*lists, _num_retraining_seeds(parameters)])
    if items > _MOST_ITEMS:
        raise ConfigError(
            f"{items:,} seeds, cells or workers in one run: more than fit; split them into several runs"
        )
    size = workflow_bytes(document, parameters)
    if size > MAX_BYTES:
        raise ConfigError(
            f"this run's workflow would grow to about {size:,} bytes, compressed; one object of Kubernetes holds "
            f"{MAX_BYTES:,}: give fewer seeds, cells or workers, or several runs"
        )


def _nodes(document: Mapping[str, Any], stages: list[PlannedStage], values: Mapping[str, Any]) -> Iterator[str]:
    """Yield the nodes of all stages, and of the loops and pipelines around them, as text."""
    pipeline = document.get("pipeline_spec", document)
    parents = {stage.path[:depth] for stage in stages for depth in range(1, len(stage.path))}
    for path in parents:
        name = path[-1]
        component = pipeline["components"].get(f"comp-{name}", pipeline["root"] if name == "root" else {})
        for _ in range(2):
            yield _node(path, _json(component))
            yield _node(path, "")
    for stage in stages:
        patch, driver = _patch(document, stage, values, len(stages)), _driver_inputs(document, stage)
        for copy in range(_COPIES):
            yield _node((*stage.path, str(copy)), patch, driver if copy < 2 else "")


def _node(path: tuple[str, ...], *texts: str) -> str:
    """Return a node with these texts as its parameters; its name and hashes are as long as Argo's."""
    name = ".".join(f"{step}(0)" for step in path)
    hashes = " ".join(
        str(int(hashlib.sha256(f"{name}{index}".encode()).hexdigest()[:8], 16)) for index in range(4)
    )
    head = f"{name} {name} {hashes} ".ljust(_NODE_BYTES, "x")
    return _json({"name": head, "parameters": list(texts)})


def _patch(document: Mapping[str, Any], stage: PlannedStage, values: Mapping[str, Any], num_stages: int) -> str:
    """Return the pod patch that a driver writes for a stage."""
    execution = str(uuid.uuid4())
    sources = stage.task.get("inputs", {}).get("parameters", {})
    parameter_values = {name: stage.inputs.get(name, values.get(name, source)) for name, source in sources.items()}
    outputs = [*stage.component.get("outputDefinitions", {}).get("artifacts", {}), "executor-logs"]
    folder = f"minio://mlpipeline/v2/artifacts/pipeline/{uuid.UUID(int=0)}/{stage.path[-1]}/{execution}"
    artifacts = {
        name: {"name": name, "type": "schemaTitle schemaVersion", "uri": f"{folder}/{name}"} for name in outputs
    }
    artifact_inputs = stage.component.get("inputDefinitions", {}).get("artifacts", {}).values()
    # A list of artifacts holds the report of each seed, that is, of about every second stage: train, evaluate.
    num_artifacts = sum(num_stages // 2 if artifact.get("isArtifactList") else 1 for artifact in artifact_inputs)
    inputs = {
        "parameterValues": parameter_values,
        "artifacts": [f"{uuid.uuid4()}".ljust(_ARTIFACT_BYTES, "x")] * num_artifacts,
    }
    command = [_json({"inputs": inputs, "outputs": artifacts}), _json(stage.component), _LAUNCHER]
    return _json(
        {"command": command, "container": _container(document, stage), "env": _kubernetes(document, stage)}
    )


def _driver_inputs(document: Mapping[str, Any], stage: PlannedStage) -> str:
    return _json([stage.component, stage.task, _container(document, stage), _kubernetes(document, stage)])


def _container(document: Mapping[str, Any], stage: PlannedStage) -> Any:
    pipeline = document.get("pipeline_spec", document)
    return pipeline["deploymentSpec"]["executors"].get(stage.component.get("executorLabel"), {}).get("container")


def _kubernetes(document: Mapping[str, Any], stage: PlannedStage) -> Any:
    platform = document.get("platform_spec", {}).get("platforms", {}).get("kubernetes", {})
    return platform.get("deploymentSpec", {}).get("executors", {}).get(stage.component.get("executorLabel"))


def _json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))
