"""The size of a run's workflow: Argo keeps all of it in one object of Kubernetes, which holds 1 MiB.

Beyond 1 MiB the nodes are compressed; a workflow that is larger even so fails in the middle of its run. The
estimate builds what a driver writes of each stage, with identifiers as random as Kubeflow's, and compresses it.
Its factors are fitted to workflows that a real Kubeflow 2.17.0 recorded.
"""

import base64
import gzip
import hashlib
import json
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

from mappo.errors import ConfigError
from pipelines.plan import PlannedStage, planned_stages

MAX_BYTES = 1024**2
_COPIES = 6  # of a stage's pod: as the driver's output twice, and as the input of a task and its pod, each retried
_LAUNCHER = "/kfp-launcher/launch --pipeline_name --run_id --execution_id --pod_name --pod_uid --publish_logs" * 7
_NODE_BYTES = 550
_LEVEL = 4  # of gzip: Go packs less tightly than zlib
_NODES_FACTOR, _COMPRESSED_FACTOR = 1.2, 1.9  # real nodes have times, hashes and names of logs in between
_SPECIFICATION_FACTOR = 2.3  # Kubeflow makes so much of a pipeline's bytes in a workflow
_MOST_ITEMS = 1000  # of a loop: nobody need estimate more
_ARTIFACT_BYTES = 420  # of an input artifact: its URI and its labels
_RETRAINED = "retrain_seeds"  # the parameter that says how many items a loop over a study's choice has


def workflow_bytes(document: Mapping[str, Any], parameters: Mapping[str, Any]) -> int:
    """Return about how many bytes the workflow of a run has at its end, with its nodes compressed if they must be.

    document: a pipeline as the API takes it (`Compiled.body`). parameters: those of the run.
    """
    pipeline = document.get("pipeline_spec", document)
    declared = pipeline["root"].get("inputDefinitions", {}).get("parameters", {})
    values = {name: each.get("defaultValue") for name, each in declared.items()} | dict(parameters)
    stages = planned_stages(document, parameters, unknown_items=int(values.get(_RETRAINED) or 1))
    nodes = sorted(_nodes(document, stages, values), key=lambda text: hashlib.sha256(text.encode()).digest())
    text = "".join(nodes)
    specification = int(_SPECIFICATION_FACTOR * len(_json(dict(document))))
    plain = specification + int(_NODES_FACTOR * len(text))
    if plain <= MAX_BYTES:
        return plain
    return specification + int(_COMPRESSED_FACTOR * len(base64.b64encode(gzip.compress(text.encode(), _LEVEL))))


def check_size(document: Mapping[str, Any], parameters: Mapping[str, Any]) -> None:
    """Refuse a run whose workflow would not fit into one object of Kubernetes.

    Raises:
        ConfigError: it would not; the message has its size and the limit.
    """
    lists = [len(value) for value in parameters.values() if isinstance(value, list)]
    items = max([*lists, int(parameters.get(_RETRAINED) or 0)])
    if items > _MOST_ITEMS:
        raise ConfigError(f"{items:,} seeds or workers in one run: at most some 60 fit; make several runs")
    size = workflow_bytes(document, parameters)
    if size > MAX_BYTES:
        raise ConfigError(
            f"this run's workflow would grow to about {size:,} bytes, compressed; one object of Kubernetes holds "
            f"{MAX_BYTES:,}: give fewer seeds or workers, or several runs"
        )


def _nodes(document: Mapping[str, Any], stages: list[PlannedStage], values: Mapping[str, Any]) -> Iterator[str]:
    """Yield the nodes of all stages, and of what they are nested in, as text."""
    pipeline = document.get("pipeline_spec", document)
    around = {stage.path[:depth] for stage in stages for depth in range(1, len(stage.path))}
    for path in around:
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
    """Return a node with these parameters; names and hashes are as long as Argo's."""
    name = ".".join(f"{step}(0)" for step in path)
    hashes = " ".join(
        str(int(hashlib.sha256(f"{name}{index}".encode()).hexdigest()[:8], 16)) for index in range(4)
    )
    head = f"{name} {name} {hashes} ".ljust(_NODE_BYTES, "x")
    return _json({"name": head, "parameters": list(texts)})


def _patch(document: Mapping[str, Any], stage: PlannedStage, values: Mapping[str, Any], count: int) -> str:
    """Return what a driver writes of a stage's pod."""
    execution = str(uuid.uuid4())
    sources = stage.task.get("inputs", {}).get("parameters", {})
    given = {name: stage.inputs.get(name, values.get(name, source)) for name, source in sources.items()}
    outputs = [*stage.component.get("outputDefinitions", {}).get("artifacts", {}), "executor-logs"]
    place = f"minio://mlpipeline/v2/artifacts/pipeline/{uuid.UUID(int=0)}/{stage.path[-1]}/{execution}"
    artifacts = {
        name: {"name": name, "type": "schemaTitle schemaVersion", "uri": f"{place}/{name}"} for name in outputs
    }
    read = stage.component.get("inputDefinitions", {}).get("artifacts", {}).values()
    num_read = sum(count // 2 if each.get("isArtifactList") else 1 for each in read)
    inputs = {"parameterValues": given, "artifacts": [f"{uuid.uuid4()}".ljust(_ARTIFACT_BYTES, "x")] * num_read}
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
