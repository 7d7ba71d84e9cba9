"""The Argo workflow of a run, read from version v1beta1 of the API, which returns the workflow in one answer.

Version v2beta1 lists nodes without names, pods and messages, and stops updating them when a workflow grows beyond
1 MiB. Argo may wrap every template in a retry (Kubeflow 2.17 configures this). A step is then named
`WORKFLOW(0).root(0).train(0).executor(1)`. The path of a node is its name without these attempt numbers and
without the workflow: `root`, `train`, `executor`.
"""

import base64
import gzip
import json
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from io import BytesIO
from typing import Any

from pipelines.errors import ApiError
from pipelines.kubeflow.api import Api
from pipelines.plan import Path

_ATTEMPT = re.compile(r"(?P<step>.*?)(\((?P<attempt>\d+)\))?")
_EXIT_HANDLER = re.compile(r"exit-handler-\d+")
_ON_EXIT = "onExit"  # the step around a task that runs when the task before it has ended
_ITERATION = re.compile(r"iteration-iterations\((\d+):.*\)")
_STAGE = "system-container-executor"  # the template names of stages end with this
_DRIVER, _DAG_DRIVER = "system-container-driver", "system-dag-driver"
_NO_V1 = (403, 404, 405, 501)
_UNREADABLE = (AttributeError, EOFError, KeyError, OSError, RecursionError, TypeError, ValueError, zlib.error)
_MAX_NODES_BYTES = 256 * 1024**2  # maximum size of the decompressed nodes


@dataclass(frozen=True)
class Node:
    """A node of a workflow.

    path: the steps that lead to the node, beginning with `root`. attempts: the attempt number of each part of the
    node's name, beginning with the workflow; -1 for a part without a number. kind: Pod, DAG, Retry, TaskGroup or
    Skipped. pods: names under which the API may know the node's pod, likeliest first. inputs, outputs: parameters
    by name.
    """

    path: Path
    attempts: tuple[int, ...]
    kind: str
    template: str
    phase: str
    message: str
    started_at: datetime | None
    ended_at: datetime | None
    pods: tuple[str, ...]
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]


class Workflow:
    """The nodes of one workflow by their paths. The path of a task that runs a container identifies a stage."""

    def __init__(self, manifest: Mapping[str, Any]):
        metadata, status = manifest.get("metadata", {}), manifest.get("status", {})
        self.name = str(metadata.get("name", ""))
        self.message = str(status.get("message") or "")  # why the whole workflow failed; mostly empty
        has_pod_names = metadata.get("annotations", {}).get("workflows.argoproj.io/pod-name-format", "v2") == "v2"
        self._by_path: dict[Path, list[Node]] = {}
        for value in _nodes(status).values():
            node = _node(self.name, value, has_pod_names)
            self._by_path.setdefault(node.path, []).append(node)
        for nodes in self._by_path.values():
            nodes.sort(key=lambda node: node.attempts)
        self.repeated = _repeated(manifest.get("spec", {}).get("templates") or [])

    def stages(self) -> list[Path]:
        """Return the stages that have a node or a driver, in the order in which they started."""
        starts = {
            path: nodes[0].started_at
            for path, nodes in self._by_path.items()
            if nodes[0].template.endswith(_STAGE)
        }
        for path, nodes in self._by_path.items():
            if nodes[0].template == _DRIVER:
                starts.setdefault((*path[:-1], path[-1].removesuffix("-driver")), nodes[0].started_at)
        return sorted(starts, key=lambda path: (str(starts[path]), path))

    def newest_node(self, path: Path) -> Node | None:
        """Return the newest node of a path, or None; the retry around attempts goes before the attempts."""
        nodes = self._by_path.get(path, [])
        newest = [node for node in nodes if node.attempts[:-1] == nodes[-1].attempts[:-1]]
        return newest[0] if newest else None  # a retry has attempt number -1, so it is sorted before its attempts

    def pods(self, stage: Path) -> list[Node]:
        """Return the pods of a stage, one pod for each attempt, oldest first."""
        return self._pods((*stage, "executor"))

    def newest_pod(self, path: Path) -> Node | None:
        """Return the newest pod of a path, or None."""
        return next(reversed(self._pods(path)), None)

    def stuck_driver(self) -> Node | None:
        """Return the pod of the first driver of a nested pipeline that waits or failed, or None."""
        for path, nodes in self._by_path.items():
            pod = self.newest_pod(path) if nodes[0].template == _DAG_DRIVER else None
            if pod and pod.message and pod.phase in ("Pending", "Failed", "Error"):
                return pod
        return None

    def _pods(self, path: Path) -> list[Node]:
        return [node for node in self._by_path.get(path, []) if node.kind == "Pod"]

    def executor_input(self, stage: Path) -> Mapping[str, Any]:
        """Return the executor input that a stage's newest driver wrote: inputs, and the URI of each output."""
        nodes = [node for node in reversed(self._by_path.get(driver_of(stage), [])) if node.outputs]
        return _executor_input(nodes[0].outputs.get("pod-spec-patch", "")) if nodes else {}

    def executor_inputs(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Yield the name of every stage that has a driver, and its executor input."""
        for stage in self.stages():
            executor_input = self.executor_input(stage)
            if executor_input:
                yield stage_name(stage, self.repeated), executor_input


def workflow_of(kubeflow: Api, run_id: str) -> Workflow | None:
    """Return the current workflow of a run; None if the server has no v1beta1.

    Raises:
        ApiError: the server did not answer, or its answer holds no readable workflow.
    """
    try:
        text = kubeflow.text(f"/apis/v1beta1/runs/{run_id}")
    except ApiError as error:
        if error.status in _NO_V1:
            return None
        raise
    try:
        manifest = json.loads(text).get("pipeline_runtime", {}).get("workflow_manifest") or "{}"
        return Workflow(json.loads(manifest))
    except _UNREADABLE as error:
        raise ApiError(f"run {run_id}: the server's workflow cannot be read: {error}") from None


def driver_of(stage: Path) -> Path:
    """Return the path of the driver that runs before a stage."""
    return (*stage[:-1], f"{stage[-1]}-driver")


def stage_name(path: Path, repeated: frozenset[str]) -> str:
    """Return a stage's name: `train`, in a loop `train[0]`, `retrain-best/train[0]` if pipelines share a name."""
    iterations = [match[1] for step in path if (match := _ITERATION.fullmatch(step))]
    pipelines = [step for step in path[1:-1] if not _EXIT_HANDLER.fullmatch(step)]
    nested = f"{pipelines[0]}/" if path[-1] in repeated and pipelines else ""
    return nested + path[-1] + "".join(f"[{index}]" for index in iterations)


def _repeated(templates: Sequence[Mapping[str, Any]]) -> frozenset[str]:
    """Return the names of stages that several nested pipelines share."""
    tasks = [task for template in templates for task in (template.get("dag") or {}).get("tasks") or []]
    names = [task["name"] for task in tasks if str(task.get("template", "")).endswith(_STAGE)]
    return frozenset(name for name in names if names.count(name) > 1)


def _nodes(status: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the nodes of a workflow, decompressed if Argo compressed them."""
    compressed = status.get("compressedNodes")
    if not compressed:
        return status.get("nodes") or {}
    with gzip.open(BytesIO(base64.b64decode(compressed))) as file:
        text = file.read(_MAX_NODES_BYTES + 1)
    if len(text) > _MAX_NODES_BYTES:
        raise ValueError(f"its nodes take more than {_MAX_NODES_BYTES} bytes when decompressed")
    nodes = json.loads(text)
    if not isinstance(nodes, dict):
        raise ValueError("its nodes are not a JSON object")
    return nodes


def _node(workflow: str, value: Mapping[str, Any], has_pod_names: bool) -> Node:
    identity, template = str(value["id"]), str(value.get("templateName", ""))
    workflow_step, *steps = str(value["name"]).removeprefix(workflow).split(".")
    parts = [_ATTEMPT.fullmatch(step) for step in (workflow_step, *steps)]
    matched = [part for part in parts if part]
    pod_name = f"{workflow}-{template}"[:241] + f"-{identity.rpartition('-')[2]}"
    return Node(
        path=without_hook(tuple(part["step"] for part in matched[1:])),
        attempts=tuple(int(part["attempt"] or -1) for part in matched),
        kind=str(value.get("type", "")),
        template=template,
        phase=str(value.get("phase", "")),
        message=str(value.get("message") or ""),
        started_at=_moment(value.get("startedAt")),
        ended_at=_moment(value.get("finishedAt")),
        pods=(pod_name, identity) if has_pod_names else (identity, pod_name),
        inputs=_parameters(value.get("inputs")),
        outputs=_parameters(value.get("outputs")),
    )


def without_hook(path: Path) -> Path:
    """Return the path of a task that runs at the exit of another as that of a task beside the other.

    Argo names it root, exit-handler-1, onExit, notify; in the pipeline, it is root, notify.
    """
    if _ON_EXIT not in path:
        return path
    index = path.index(_ON_EXIT)
    return (*path[: index - 1], *path[index + 1 :]) if path[index + 1 :] else path


def _parameters(values: Mapping[str, Any] | None) -> dict[str, str]:
    return {
        parameter["name"]: str(parameter.get("value", "")) for parameter in (values or {}).get("parameters", [])
    }


def _executor_input(patch: str) -> Mapping[str, Any]:
    """Return the executor input in a driver's patch of the pod, where it is an argument of the launcher."""
    command = container_of(patch).get("command", [])
    if "--executor_input" not in command:
        return {}
    return _object(command[command.index("--executor_input") + 1])


def container_of(patch: str) -> Mapping[str, Any]:
    """Return the container in a driver's patch of the pod; an empty mapping if there is none."""
    containers = _object(patch).get("containers") or [{}]
    return containers[0] if isinstance(containers[0], dict) else {}


def _object(text: str) -> Mapping[str, Any]:
    """Read a JSON object; return an empty mapping if the text is not a JSON object."""
    try:
        value = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _moment(text: str | None) -> datetime | None:
    return datetime.fromisoformat(text) if text else None
