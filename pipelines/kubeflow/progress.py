"""How far a run is: its stages, read from what the API tells of Argo's nodes.

The API lists nodes without their names in the workflow, without pods, in no order, and without the reason of a
failure. But children are listed by ID, and an ID is the hash of the full name, so that names can be tried:
`WORKFLOW.root.train.executor(0)` is the first attempt of training. Source: Argo's `NodeID` and `GeneratePodName`.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from pipelines.kubeflow.connection import Api, ApiError

_NOT_STAGES = re.compile(r".*-driver|executor(\(\d+\))?|root|iteration-.*|for-loop-\d+|for-loop-\d+-.*")
_ITERATION = re.compile(r"\.iteration-iterations\((\d+):")
_SAID = re.compile(r"\[[a-z-]+\] (failed: .*|preempted: .*)")
_MOST_ATTEMPTS = 101


@dataclass(frozen=True)
class Stage:
    """One stage of a run. attempts: pods so far; pods: names that the newest may have, once there is one."""

    name: str
    state: str
    began: datetime | None
    ended: datetime | None
    attempts: int
    pods: tuple[str, ...]

    @property
    def task(self) -> str:
        """Its name without the number of the loop's item."""
        return self.name.partition("[")[0]

    def seconds(self, now: datetime) -> float | None:
        """How long it has run."""
        return ((self.ended or now) - self.began).total_seconds() if self.began else None


def stages_of(run: Any, specification: Mapping[str, Any]) -> list[Stage]:
    """The stages of a run of this pipeline, also those to come, in the order in which they run."""
    details = (run.run_details.task_details if run.run_details else None) or []
    nodes = _Nodes(details, specification)
    to_come = "PENDING" if run.state in (None, "PENDING", "RUNNING") else "NOT REACHED"
    found = {(stage := nodes.stage(path, to_come)).name: stage for path in nodes.stages()}
    config = run.runtime_config
    planned = _planned(specification, (config.parameters if config else None) or {})
    stages = [found.pop(name, Stage(name, to_come, None, None, 0, ())) for name in planned]
    return stages + sorted(found.values(), key=lambda stage: (stage.began is None, stage.began, stage.name))


def log_of(kubeflow: Api, run_id: str, stage: Stage) -> str:
    """What a stage's newest pod has printed.

    Raises:
        ApiError: there is no pod, or its log is gone.
    """
    error = ApiError(f"stage {stage.name}: no pod has been started for it")
    for pod in stage.pods:
        try:
            return kubeflow.text(f"/apis/v1alpha1/runs/{run_id}/nodes/{pod}/log")
        except ApiError as refused:
            error = refused
    raise error


def failure_of(kubeflow: Api, run_id: str, stage: Stage) -> str:
    """Why a stage failed, in its own words, as far as they are known."""
    try:
        lines = [line for line in log_of(kubeflow, run_id, stage).splitlines() if line.strip()]
    except ApiError:
        return "its log cannot be read"
    said = [match[1].removeprefix("failed: ") for line in lines if (match := _SAID.search(line))]
    return "; ".join(said) or (lines[-1].strip() if lines else "it ended without a word")


class _Nodes:
    """The nodes of a workflow, by their full names."""

    def __init__(self, details: list[Any], specification: Mapping[str, Any]):
        self._details, self._specification = details, specification
        self._ids = {child.pod_name for detail in details for child in detail.child_tasks or []}
        self._failed_pods = [
            pod
            for detail in details
            if detail.executor_detail
            for pod in detail.executor_detail.failed_main_jobs or []
        ]
        self._workflow = min((each.rpartition("-")[0] for each in self._ids), key=len, default="")
        self._displays = sorted({detail.display_name for detail in details if detail.display_name})

    def stages(self, path: str = "") -> Iterator[str]:
        """Full names of the nodes that are stages."""
        path = path or self._workflow
        for display in self._displays:
            inner = f"{path}.{display}"
            if self._id(inner) not in self._ids or display.endswith("-driver") or display.startswith("executor"):
                continue
            below = list(self.stages(inner))
            yield from below
            if not below and not _NOT_STAGES.fullmatch(display):
                yield inner

    def stage(self, path: str, to_come: str) -> Stage:
        """What is known of a stage; one that Argo leaves out has no state, and is `to_come`."""
        detail = self._detail(path)
        retried = [f"{path}.executor({index})" for index in range(_MOST_ATTEMPTS)]
        attempts = [each for each in retried if self._id(each) in self._ids]
        pods: tuple[str, ...] = ()
        if attempts:
            pods = self._pods(path, attempts[-1], "retry-system-container-impl")
        elif self._id(f"{path}.executor") in self._ids:
            pods = self._pods(path, f"{path}.executor", "system-container-impl")
        iteration = _ITERATION.search(path)
        name = path.rpartition(".")[2] + (f"[{iteration[1]}]" if iteration else "")
        if not detail or not detail.state:
            return Stage(name, to_come, None, None, 0, ())
        state = str(detail.state)
        return Stage(
            name, state, _known(detail.start_time), _known(detail.end_time), len(attempts) or int(bool(pods)), pods
        )

    def _detail(self, path: str) -> Any:
        """The entry of a node: that of its display name, and of several, the one with its pods below it.

        One without pods is what the others leave over; None if they leave several that differ.
        """
        display = path.rpartition(".")[2]
        named = [detail for detail in self._details if detail.display_name == display]
        own = [detail for detail in named if self._has_executor(detail, path)]
        others = [each for each in self.stages() if each != path and each.endswith(f".{display}")]
        left = [detail for detail in named if not any(self._has_executor(detail, each) for each in others)]
        alike = left if len({detail.state for detail in left}) == 1 else []
        return next(iter(own or alike), None)

    def _has_executor(self, detail: Any, path: str) -> bool:
        return self._id(f"{path}.executor") in {child.pod_name for child in detail.child_tasks or []}

    def _pods(self, stage: str, path: str, template: str) -> tuple[str, ...]:
        """Names that a node's pod may have; that of a failed one may be told.

        Pods with labels or annotations are made from a template that counts them.
        """
        digest = _fnv32a(path)
        told = [pod for pod in self._failed_pods if pod.endswith(f"-{digest}")]
        metadata = self._pod_metadata(stage.rpartition(".")[2])
        counts = f"metadata-{len(metadata.get('annotations', {}))}-{len(metadata.get('labels', {}))}-"
        names = [f"{counts}{template}" if metadata else template, template]
        guessed = [f"{self._workflow}-{name}-{digest}" for name in names]
        return tuple(dict.fromkeys([*told, *guessed, f"{self._workflow}-{digest}"]))

    def _pod_metadata(self, task: str) -> Mapping[str, Any]:
        """The labels and annotations that a task's pod was given."""
        platforms = self._specification.get("platform_spec", {}).get("platforms", {})
        executors = platforms.get("kubernetes", {}).get("deploymentSpec", {}).get("executors", {})
        pipeline = self._specification.get("pipeline_spec", self._specification)
        components = pipeline.get("components", {})
        for component in (pipeline.get("root", {}), *components.values()):
            found = component.get("dag", {}).get("tasks", {}).get(task)
            if found:
                label = components.get(found["componentRef"]["name"], {}).get("executorLabel")
                metadata = executors.get(label, {}).get("podMetadata", {})
                return metadata if isinstance(metadata, Mapping) else {}
        return {}

    def _id(self, path: str) -> str:
        return f"{self._workflow}-{_fnv32a(path)}"


def _planned(specification: Mapping[str, Any], parameters: Mapping[str, Any]) -> list[str]:
    """The stages of a pipeline with a run's parameters, in an order in which they can run."""
    pipeline = specification.get("pipeline_spec", specification)
    root = pipeline.get("root", {})
    defined = root.get("inputDefinitions", {}).get("parameters", {})
    defaults = {name: value["defaultValue"] for name, value in defined.items() if "defaultValue" in value}
    return list(_tasks(root, pipeline.get("components", {}), {**defaults, **parameters}))


def _tasks(
    component: Mapping[str, Any], components: Mapping[str, Any], parameters: Mapping[str, Any]
) -> Iterator[str]:
    tasks = dict(component.get("dag", {}).get("tasks", {}))
    while tasks:
        ready = [name for name, task in tasks.items() if not set(task.get("dependentTasks", [])) & set(tasks)]
        for name in ready or list(tasks):
            task = tasks.pop(name)
            inner = components.get(task["componentRef"]["name"], {})
            values = _values(task, parameters)
            below = list(_tasks(inner, components, values)) if "dag" in inner else [name]
            for place in _places(task, values):
                yield from (stage + place for stage in below)


def _values(task: Mapping[str, Any], parameters: Mapping[str, Any]) -> dict[str, Any]:
    """What is known of a task's inputs: those from the parameters of what it is in."""
    given = task.get("inputs", {}).get("parameters", {})
    sources = {name: value.get("componentInputParameter") for name, value in given.items()}
    return {name: parameters[source] for name, source in sources.items() if source in parameters}


def _places(task: Mapping[str, Any], values: Mapping[str, Any]) -> list[str]:
    """What is after the names of a loop's stages: `[0]`, `[1]`; nothing if it is none, or of unknown items."""
    if "parameterIterator" not in task:
        return [""]
    items = task["parameterIterator"]["items"]
    each = json.loads(items["raw"]) if "raw" in items else values.get(items["inputParameter"], [])
    return [f"[{index}]" for index in range(len(each))] or [""]


def _known(moment: datetime | None) -> datetime | None:
    """The server says 1970 or the year 1 for never."""
    return moment if moment and moment.year > 1970 else None


def _fnv32a(text: str) -> int:
    digest = 0x811C9DC5
    for byte in text.encode():
        digest = (digest ^ byte) * 0x01000193 % 2**32
    return digest
