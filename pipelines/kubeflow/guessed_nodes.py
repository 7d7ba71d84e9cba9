"""Stages from version v2beta1 of the API alone, for servers without v1beta1.

The API lists nodes without their names in the workflow, without pods, in no order, and without the reason of a
failure. But children are listed by ID, and an ID is the hash of the full name, so that names can be tried:
`WORKFLOW.root.train.executor(0)` is the first attempt of training. Source: Argo's `NodeID` and `GeneratePodName`.
"""

import re
from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any

from pipelines.kubeflow.stages import StageAttempt, StageProgress

_NOT_STAGES = re.compile(r".*-driver|executor(\(\d+\))?|root|iteration-.*|for-loop-\d+|for-loop-\d+-.*")
_MOST_ATTEMPTS = 101


def guessed_stages(
    run: Any, specification: Mapping[str, Any], to_come: str
) -> dict[tuple[str, ...], StageProgress]:
    """Return the stages that a run's task details have nodes of, by their paths."""
    details = (run.run_details.task_details if run.run_details else None) or []
    nodes = _Nodes(details, specification)
    return {tuple(name.split(".")[1:]): nodes.stage(name, to_come) for name in nodes.stages()}


class _Nodes:
    """The nodes of a workflow by their full names."""

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

    def stage(self, path: str, to_come: str) -> StageProgress:
        """Return what is known of a stage; one that Argo leaves out has no state, and is `to_come`."""
        detail = self._detail(path)
        retried = [f"{path}.executor({index})" for index in range(_MOST_ATTEMPTS)]
        attempts = [each for each in retried if self._id(each) in self._ids]
        template = "retry-system-container-impl" if attempts else "system-container-impl"
        if not attempts and self._id(f"{path}.executor") in self._ids:
            attempts = [f"{path}.executor"]
        name = path.rpartition(".")[2]
        if not detail or not detail.state:
            return StageProgress(name, to_come, None, None, (), 0, "")
        state = str(detail.state)
        pods = [self._pods(path, each, template) for each in attempts]
        states = ["FAILED"] * (len(pods) - 1) + [state]
        tried = tuple(StageAttempt(names, its) for names, its in zip(pods, states, strict=False))
        cause = tried[-1] if tried and state == "FAILED" else None
        times = (_known(detail.start_time), _known(detail.end_time))
        return StageProgress(name, state, *times, tried, len(tried), "", cause)

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


def _known(moment: datetime | None) -> datetime | None:
    """The server says 1970 or the year 1 for never."""
    return moment if moment and moment.year > 1970 else None


def _fnv32a(text: str) -> int:
    digest = 0x811C9DC5
    for byte in text.encode():
        digest = (digest ^ byte) * 0x01000193 % 2**32
    return digest
