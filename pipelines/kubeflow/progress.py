"""The stages of a run: their states, attempts, reasons and logs.

The workflow of v1beta1 says everything (`workflow.py`). A server without it lists nodes by hashes of their names,
so that names can be tried (`guessed_nodes.py`); it tells no reasons, which logs must then give.
"""

import re
import time
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any

from pipelines.errors import ApiError
from pipelines.kubeflow.api import Api
from pipelines.kubeflow.client import ENDED
from pipelines.kubeflow.guessed_nodes import guessed_stages
from pipelines.kubeflow.reasons import in_words, is_exit
from pipelines.kubeflow.stages import StageAttempt, StageProgress
from pipelines.kubeflow.workflow import Node, Workflow, container_of, driver_of, stage_name, workflow_of
from pipelines.plan import Path, planned_stages, repeated_names

_STATES = {
    "Succeeded": "SUCCEEDED",
    "Failed": "FAILED",
    "Error": "FAILED",
    "Skipped": "SKIPPED",
    "Pending": "PENDING",
}
_REASON = re.compile(r"\[[a-z-]+\] (failed: .*|preempted: .*)")
_BEGIN = re.compile(r"^\[[a-z-]+\] attempt \d+; \d+ left$", re.MULTILINE)
_COUNT = re.compile(
    r"^\[[a-z-]+\] (?:attempt (?P<number>\d+); |not tried again: (?P<count>\d+) of )", re.MULTILINE
)
_FRESH_SECONDS = 30.0  # a log of a running pod, or one that was refused, is asked for again after this time
_KUEUE = "kueue.x-k8s.io/queue-name"
_UNREADABLE = "its log cannot be read"


def stages_of(kubeflow: Api, run: Any, specification: Mapping[str, Any]) -> list[StageProgress]:
    """Return the stages of a run of this pipeline, also those to come, in the order in which they run.

    Raises:
        ApiError: the server did not answer.
    """
    to_come = "NOT REACHED" if run.state in ENDED else "PENDING"
    workflow = workflow_of(kubeflow, run.run_id)
    if workflow is None:
        found, repeated = guessed_stages(run, specification, to_come), frozenset[str]()
    else:
        found = {path: _stage(workflow, path, to_come, was_cancelled(run)) for path in workflow.stages()}
        repeated = workflow.repeated
    config = run.runtime_config
    plan = planned_stages(specification, (config.parameters if config else None) or {})
    repeated |= repeated_names(specification)
    ordered = [stage for planned in plan for stage in _of_plan(planned.path, found, to_come)]
    ordered += [(path, stage) for path, stage in found.items() if path not in dict(ordered)]
    named = [replace(stage, name=stage_name(path, repeated)) for path, stage in ordered]
    return _with_cause(named, workflow, run) if workflow else named


def was_cancelled(run: Any) -> bool:
    """Return whether somebody asked the run to end; the server calls such a run FAILED in the end."""
    return run.state in ("CANCELED", "CANCELING") or any(
        each.state in ("CANCELED", "CANCELING") for each in run.state_history or []
    )


class Logs:
    """The logs of a run's stages; that of a pod that has ended is asked for once, others now and then."""

    def __init__(self, kubeflow: Api, run_id: str):
        self._kubeflow, self._run_id = kubeflow, run_id
        self._read: dict[tuple[tuple[str, ...], bool], tuple[float, str | ApiError]] = {}

    def of_attempts(self, stage: StageProgress) -> list[str]:
        """Return what each attempt of a stage printed, oldest first; a pod may hold several.

        A log that cannot be read is a line that says so.

        Raises:
            ApiError: the stage has no pod, or no log can be read.
        """
        pods = stage.attempts or ((stage.cause,) if stage.cause else ())
        if not pods:
            raise ApiError(f"stage {stage.name}: no pod has been started for it")
        texts = [self._text(pod) for pod in pods]
        if isinstance(texts[-1], ApiError) and all(isinstance(text, ApiError) for text in texts):
            raise texts[-1]
        shown = [text if isinstance(text, str) else f"[{stage.task}] {_UNREADABLE}: {text}\n" for text in texts]
        return [part for text in shown for part in _cut(text)]

    def told_by(self, stage: StageProgress) -> StageProgress:
        """Return the stage with what only logs know: attempts within one pod, and why an attempt failed."""
        count, reason = stage.num_attempts, stage.reason
        for attempt in reversed(stage.attempts):
            if told := list(_COUNT.finditer(self._printed(attempt))):
                count = int(told[-1]["count"] or int(told[-1]["number"]) + 1)
                break
        if stage.cause and (is_exit(stage.cause.reason) or not stage.cause.reason):
            words = _last_words(self._printed(stage.cause))
            words = words or "; ".join(part for part in (stage.cause.reason, _UNREADABLE) if part)
            reason = reason.replace(stage.cause.reason, words) if stage.cause.reason else words
        return replace(stage, num_attempts=count, reason=reason)

    def _printed(self, attempt: StageAttempt) -> str:
        """Return what a pod printed; empty if that cannot be read, or it has not begun."""
        text = "" if attempt.state == "PENDING" else self._text(attempt)
        return text if isinstance(text, str) else ""

    def _text(self, attempt: StageAttempt) -> str | ApiError:
        key, now = (attempt.pods, attempt.has_ended), time.monotonic()
        when, text = self._read.get(key, (0.0, ApiError("no pod has been started")))
        is_final = attempt.has_ended and isinstance(text, str)
        if key in self._read and (is_final or now - when < _FRESH_SECONDS):
            return text
        for pod in attempt.pods:
            try:
                text = self._kubeflow.text(f"/apis/v1alpha1/runs/{self._run_id}/nodes/{pod}/log")
            except ApiError as refused:
                text = refused
                continue
            break
        self._read[key] = now, text
        return text


def _cut(text: str) -> list[str]:
    """Return the parts of a pod's log that belong to one attempt each; what precedes the first is part of it."""
    starts = [match.start() for match in _BEGIN.finditer(text)]
    bounds = [0, *starts[1:], len(text)]
    return [text[begin:end] for begin, end in pairwise(bounds)]


def _last_words(text: str) -> str:
    """Return why a stage failed, by its own words if it printed any, else by its last line."""
    lines = [line for line in text.splitlines() if line.strip()]
    told = [match[1].removeprefix("failed: ") for line in lines if (match := _REASON.search(line))]
    return told[-1] if told else lines[-1].strip() if lines else ""


def _stage(workflow: Workflow, path: Path, to_come: str, is_cancelled: bool) -> StageProgress:
    """Return what the workflow says of one stage, which has a node or a driver."""
    node, pods = workflow.at(path), workflow.pods(path)
    memory = _memory_limit(pods[-1]) if pods else ""
    attempts = tuple(_attempt(pod, path[-1], memory, is_cancelled) for pod in pods)
    stage = StageProgress(path[-1], to_come, None, None, (), 0, "")
    if node is None or node.phase in ("Omitted", "") or (not pods and node.phase != "Succeeded"):
        return _not_begun(stage, workflow, path, is_cancelled)
    state = _STATES.get(node.phase, "RUNNING")
    if state == "RUNNING" and attempts and attempts[-1].state == "PENDING":
        state = "PENDING"
    began = pods[0].began if pods else node.began
    stage = replace(
        stage, state=state, began=began, ended=node.ended, attempts=attempts, num_attempts=len(attempts)
    )
    return _with_reason(stage, workflow, path)


def _not_begun(stage: StageProgress, workflow: Workflow, path: Path, is_cancelled: bool) -> StageProgress:
    """Return a stage without pods: what its driver waits for, or why the driver failed."""
    driver = workflow.newest_pod(driver_of(path))
    if driver is None:
        return stage
    cause = _attempt(driver, path[-1], "", is_cancelled)
    if cause.state == "FAILED":
        times = replace(stage, state="FAILED", began=driver.began, ended=driver.ended, cause=cause)
        return replace(times, reason=f"driver: {cause.reason}" if cause.reason else "")
    return replace(stage, reason=cause.reason if stage.state == "PENDING" else "")


def _with_reason(stage: StageProgress, workflow: Workflow, path: Path) -> StageProgress:
    """Return a stage with the reason why it waits, failed, or is tried again."""
    if stage.state == "SUCCEEDED" or not stage.attempts:
        return stage
    newest = stage.attempts[-1]
    if stage.state == "FAILED" or (stage.state == "PENDING" and newest.reason):
        return replace(stage, reason=newest.reason, cause=newest)
    failed = [attempt for attempt in stage.attempts if attempt.state == "FAILED"]
    if not failed:
        return stage
    retry = workflow.at((*path, "executor"))
    backoff = in_words(retry.message, path[-1]) if retry else ""
    why = f"tried again: {failed[-1].reason or 'it failed'}"
    return replace(stage, reason="; ".join(part for part in (why, backoff) if part), cause=failed[-1])


def _with_cause(stages: list[StageProgress], workflow: Workflow, run: Any) -> list[StageProgress]:
    """Return the stages of a run with what keeps the next of them from beginning.

    That is the driver of a pipeline around it, or the failure of the workflow as a whole. In a run that has ended,
    no stage runs or waits.
    """
    message = in_words(workflow.message, "", is_cancelled=was_cancelled(run))
    if run.state in ENDED:
        stages = [
            replace(stage, state="FAILED", reason=stage.reason or message or "the run ended first")
            if stage.state in ("RUNNING", "PENDING") and stage.began
            else stage
            for stage in stages
        ]
    told = any(stage.reason for stage in stages if stage.state != "SUCCEEDED")
    waiting = next((stage for stage in stages if stage.state in ("PENDING", "NOT REACHED")), None)
    driver = workflow.stuck_driver()
    if told or waiting is None or not (driver or message):
        return stages
    cause = _attempt(driver, "root", "", was_cancelled(run)) if driver else None
    reason = (f"driver: {cause.reason}" if cause.state == "FAILED" else cause.reason) if cause else message
    stuck = replace(waiting, reason=reason, cause=cause if cause and cause.state == "FAILED" else None)
    return [stuck if stage is waiting else stage for stage in stages]


def _attempt(pod: Node, task: str, memory: str, is_cancelled: bool) -> StageAttempt:
    is_gated = pod.phase == "Pending" and _KUEUE in pod.inputs.values()
    reason = in_words(pod.message, task, memory, is_cancelled=is_cancelled, is_gated=is_gated)
    return StageAttempt(pod.pods, _STATES.get(pod.phase, "RUNNING"), reason)


def _memory_limit(pod: Node) -> str:
    """Return the limit of memory in the patch that a driver made for the pod."""
    resources = container_of(pod.inputs.get("pod-spec-patch", "")).get("resources") or {}
    return str((resources.get("limits") or {}).get("memory", ""))


def _of_plan(path: Path, found: Mapping[Path, StageProgress], to_come: str) -> list[tuple[Path, StageProgress]]:
    """Return the stages found that a planned one stands for; a loop of unknown items, for all its iterations."""
    if path in found:
        return [(path, found[path])]
    alike = [each for each in found if _without_iterations(each) == path]
    return [(each, found[each]) for each in sorted(alike, key=_indices)] or [
        (path, StageProgress(path[-1], to_come, None, None, (), 0, ""))
    ]


def _without_iterations(path: Path) -> Path:
    return tuple(step for step in path if not step.startswith("iteration-"))


def _indices(path: Path) -> tuple[int, ...]:
    return tuple(int(step.partition("(")[2].partition(":")[0]) for step in path if "iterations(" in step)
