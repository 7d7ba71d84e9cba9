"""The stages of a run as version v2beta1 of the API lists them, for servers without v1beta1.

The API lists nodes in no order and without their full names, their pods and the reason of a failure. But it lists
children by ID, and an ID is the hash of the full name. So guessed names can be checked:
`WORKFLOW.root.train.executor(0)` is the first attempt of training. Source: Argo's `NodeID` and `GeneratePodName`.
"""

import re
from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any

from pipelines.kubeflow.stages import StageAttempt, StageProgress
from pipelines.kubeflow.workflow import without_hook

_NOT_STAGES = re.compile(
    r".*-driver|executor(\(\d+\))?|root|iteration-.*|for-loop-\d+|for-loop-\d+-.*|exit-handler-\d+(\.onExit)?"
)
_MAX_ATTEMPTS = 101


def guessed_stages(
    run: Any, specification: Mapping[str, Any], initial: str
) -> dict[tuple[str, ...], StageProgress]:
    """Return the stages that have nodes in a run's task details, by their paths.

    initial: state of a stage that Argo has not started: PENDING, or NOT REACHED in a run that has ended.
    """
    details = (run.run_details.task_details if run.run_details else None) or []
    nodes = _Nodes(details, specification)
    return {without_hook(tuple(name.split(".")[1:])): nodes.stage(name, initial) for name in nodes.stages()}


class _Nodes:
    """The nodes of a workflow, found by their guessed full names."""

    def __init__(self, details: list[Any], specification: Mapping[str, Any]):
        self._details, self._specification = details, specification
        self._ids = {child.pod_name for detail in details for child in detail.child_tasks or []}
        self._failed_pods = [
            pod
            for detail in details
            if detail.executor_detail
            for pod in detail.executor_detail.failed_main_jobs or []
        ]
        # The ID of a child is the workflow's name and a hash.
        self._workflow = min((identity.rpartition("-")[0] for identity in self._ids), key=len, default="")
        self._displays = sorted({detail.display_name for detail in details if detail.display_name})

    def stages(self, path: str = "") -> Iterator[str]:
        """Yield the full names of the nodes that are stages, below a path or in the whole workflow."""
        path = path or self._workflow
        for display in self._displays:
            inner = f"{path}.{display}"
            if self._id(inner) not in self._ids or display.endswith("-driver") or display.startswith("executor"):
                continue
            nested = list(self.stages(inner))
            yield from nested
            if not nested and not _NOT_STAGES.fullmatch(display):
                yield inner

    def stage(self, path: str, initial: str) -> StageProgress:
        """Return the progress of a stage; a stage that Argo has not started, or omits, has the state `initial`."""
        detail = self._detail(path)
        retried = [f"{path}.executor({index})" for index in range(_MAX_ATTEMPTS)]
        attempts = [attempt for attempt in retried if self._id(attempt) in self._ids]
        template = "retry-system-container-impl" if attempts else "system-container-impl"
        if not attempts and self._id(f"{path}.executor") in self._ids:
            attempts = [f"{path}.executor"]
        name = path.rpartition(".")[2]
        if not detail or not detail.state:
            return StageProgress(name, initial, None, None, (), 0, "")
        state = str(detail.state)
        pods = [self._pods(path, attempt, template) for attempt in attempts]
        states = ["FAILED"] * (len(pods) - 1) + [state]
        stage_attempts = tuple(StageAttempt(*attempt) for attempt in zip(pods, states, strict=False))
        cause = stage_attempts[-1] if stage_attempts and state == "FAILED" else None
        times = (_real_time(detail.start_time), _real_time(detail.end_time))
        return StageProgress(name, state, *times, stage_attempts, len(stage_attempts), "", cause)

    def _detail(self, path: str) -> Any:
        """Return the task detail of a node, or None if it cannot be told from others.

        Candidates have the node's display name. The detail with the node's pods among its children is the right
        one. A node without pods gets what no other node of this name owns, if these details have one state.
        """
        display = path.rpartition(".")[2]
        candidates = [detail for detail in self._details if detail.display_name == display]
        with_pods = [detail for detail in candidates if self._has_executor(detail, path)]
        others = [stage for stage in self.stages() if stage != path and stage.endswith(f".{display}")]
        unowned = [
            detail for detail in candidates if not any(self._has_executor(detail, other) for other in others)
        ]
        alike = unowned if len({detail.state for detail in unowned}) == 1 else []
        return next(iter(with_pods or alike), None)

    def _has_executor(self, detail: Any, path: str) -> bool:
        return self._id(f"{path}.executor") in {child.pod_name for child in detail.child_tasks or []}

    def _pods(self, stage: str, path: str, template: str) -> tuple[str, ...]:
        """Return the possible pod names of a node, likeliest first; the API names only failed pods.

        A pod with labels or annotations has a template whose name holds the number of annotations and labels.
        """
        digest = _fnv32a(path)
        listed = [pod for pod in self._failed_pods if pod.endswith(f"-{digest}")]
        metadata = self._pod_metadata(stage.rpartition(".")[2])
        counts = f"metadata-{len(metadata.get('annotations', {}))}-{len(metadata.get('labels', {}))}-"
        names = [f"{counts}{template}" if metadata else template, template]
        guessed = [f"{self._workflow}-{name}-{digest}" for name in names]
        return tuple(dict.fromkeys([*listed, *guessed, f"{self._workflow}-{digest}"]))

    def _pod_metadata(self, task: str) -> Mapping[str, Any]:
        """Return the labels and annotations that the pipeline gives to a task's pod."""
        platforms = self._specification.get("platform_spec", {}).get("platforms", {})
        executors = platforms.get("kubernetes", {}).get("deploymentSpec", {}).get("executors", {})
        pipeline = self._specification.get("pipeline_spec", self._specification)
        components = pipeline.get("components", {})
        for component in (pipeline.get("root", {}), *components.values()):
            specification = component.get("dag", {}).get("tasks", {}).get(task)
            if specification:
                label = components.get(specification["componentRef"]["name"], {}).get("executorLabel")
                metadata = executors.get(label, {}).get("podMetadata", {})
                return metadata if isinstance(metadata, Mapping) else {}
        return {}

    def _id(self, path: str) -> str:
        return f"{self._workflow}-{_fnv32a(path)}"


def _real_time(moment: datetime | None) -> datetime | None:
    """Return a time, or None for the year 1 and 1970, by which the server means "never"."""
    return moment if moment and moment.year > 1970 else None


def _fnv32a(text: str) -> int:
    digest = 0x811C9DC5
    for byte in text.encode():
        digest = (digest ^ byte) * 0x01000193 % 2**32
    return digest
