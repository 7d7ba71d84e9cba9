"""The stages of a run: their states, attempts, reasons and logs.

The workflow of v1beta1 holds all of these (`workflow.py`). A server without v1beta1 lists nodes only by hashes of
their names, which `guessed_nodes.py` matches with guessed names. Such a server gives no reasons; the logs do.
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
from pipelines.kubeflow.reasons import explain, is_exit
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
_ATTEMPT_START = re.compile(r"^\[[a-z-]+\] attempt \d+; \d+ left$", re.MULTILINE)
_COUNT = re.compile(
    r"^\[[a-z-]+\] (?:attempt (?P<number>\d+); |not tried again: (?P<count>\d+) of )", re.MULTILINE
)
_FRESH_SECONDS = 30.0  # after this time, the log of a running pod, or a refused log, is requested again
_KUEUE = "kueue.x-k8s.io/queue-name"
_UNREADABLE = "the log cannot be read"


def stages_of(kubeflow: Api, run: Any, specification: Mapping[str, Any]) -> list[StageProgress]:
    """Return the stages of a run, including those that have not started, in the order in which they run.

    specification: the specification of the run's pipeline.

    Raises:
        ApiError: the server did not answer.
    """
    initial = "NOT REACHED" if run.state in ENDED else "PENDING"
    workflow = workflow_of(kubeflow, run.run_id)
    if workflow is None:
        started, repeated = guessed_stages(run, specification, initial), frozenset[str]()
    else:
        started = {path: _stage(workflow, path, initial, was_cancelled(run)) for path in workflow.stages()}
        repeated = workflow.repeated
    config = run.runtime_config
    plan = planned_stages(specification, (config.parameters if config else None) or {})
    repeated |= repeated_names(specification)
    ordered = [stage for planned in plan for stage in _planned(planned.path, started, initial)]
    ordered += [(path, stage) for path, stage in started.items() if path not in dict(ordered)]
    named = [replace(stage, name=stage_name(path, repeated)) for path, stage in ordered]
    return _with_cause(named, workflow, run) if workflow else named


def was_cancelled(run: Any) -> bool:
    """Return whether somebody cancelled the run; the server reports a cancelled run as FAILED in the end."""
    return run.state in ("CANCELED", "CANCELING") or any(
        status.state in ("CANCELED", "CANCELING") for status in run.state_history or []
    )


class Logs:
    """The logs of a run's stages.

    The log of a pod that has ended is read once. Other logs are read again when they are older than
    `_FRESH_SECONDS`.
    """

    def __init__(self, kubeflow: Api, run_id: str):
        self._kubeflow, self._run_id = kubeflow, run_id
        self._read: dict[tuple[tuple[str, ...], bool], tuple[float, str | ApiError]] = {}

    def of_attempts(self, stage: StageProgress) -> list[str]:
        """Return the log of each attempt of a stage, oldest first; a pod may hold several attempts.

        A line with the error takes the place of a log that cannot be read.

        Raises:
            ApiError: the stage has no pod, or none of its logs can be read.
        """
        pods = stage.attempts or ((stage.cause,) if stage.cause else ())
        if not pods:
            raise ApiError(f"stage {stage.name}: the stage has no pod yet, and so no log")
        texts = [self._text(pod) for pod in pods]
        if isinstance(texts[-1], ApiError) and all(isinstance(text, ApiError) for text in texts):
            raise texts[-1]
        readable = [text if isinstance(text, str) else f"[{stage.task}] {_UNREADABLE}: {text}\n" for text in texts]
        return [part for text in readable for part in _split_attempts(text)]

    def add_details(self, stage: StageProgress) -> StageProgress:
        """Return the stage with details that only logs hold: attempts within one pod, and causes of failures."""
        count, reason = stage.num_attempts, stage.reason
        for attempt in reversed(stage.attempts):
            if counts := list(_COUNT.finditer(self._text_or_empty(attempt))):
                count = int(counts[-1]["count"] or int(counts[-1]["number"]) + 1)
                break
        if stage.cause and (is_exit(stage.cause.reason) or not stage.cause.reason):
            cause = _reason_in_log(self._text_or_empty(stage.cause))
            cause = cause or "; ".join(part for part in (stage.cause.reason, _UNREADABLE) if part)
            reason = reason.replace(stage.cause.reason, cause) if stage.cause.reason else cause
        return replace(stage, num_attempts=count, reason=reason)

    def _text_or_empty(self, attempt: StageAttempt) -> str:
        """Return the log of a pod; empty if the log cannot be read or the pod has not started."""
        text = "" if attempt.state == "PENDING" else self._text(attempt)
        return text if isinstance(text, str) else ""

    def _text(self, attempt: StageAttempt) -> str | ApiError:
        key, now = (attempt.pods, attempt.has_ended), time.monotonic()
        read_at, text = self._read.get(key, (0.0, ApiError("no pod has been started")))
        is_final = attempt.has_ended and isinstance(text, str)
        if key in self._read and (is_final or now - read_at < _FRESH_SECONDS):
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


def _split_attempts(text: str) -> list[str]:
    """Split a pod's log into one part for each attempt; lines before the first attempt belong to its part."""
    starts = [match.start() for match in _ATTEMPT_START.finditer(text)]
    bounds = [0, *starts[1:], len(text)]
    return [text[begin:end] for begin, end in pairwise(bounds)]


def _reason_in_log(text: str) -> str:
    """Return why a stage failed: the last reason that the stage logged, or else the last line of the log."""
    lines = [line for line in text.splitlines() if line.strip()]
    reasons = [match[1].removeprefix("failed: ") for line in lines if (match := _REASON.search(line))]
    return reasons[-1] if reasons else lines[-1].strip() if lines else ""


def _stage(workflow: Workflow, path: Path, initial: str, is_cancelled: bool) -> StageProgress:
    """Return the progress of one stage that has a node or a driver in the workflow."""
    node, pods = workflow.newest_node(path), workflow.pods(path)
    memory = _memory_limit(pods[-1]) if pods else ""
    attempts = tuple(_attempt(pod, path[-1], memory, is_cancelled) for pod in pods)
    stage = StageProgress(path[-1], initial, None, None, (), 0, "")
    if node is None or node.phase in ("Omitted", "") or (not pods and node.phase != "Succeeded"):
        return _not_started(stage, workflow, path, is_cancelled)
    state = _STATES.get(node.phase, "RUNNING")
    if state == "RUNNING" and attempts and attempts[-1].state == "PENDING":
        state = "PENDING"
    started_at = pods[0].started_at if pods else node.started_at
    stage = replace(
        stage,
        state=state,
        started_at=started_at,
        ended_at=node.ended_at,
        attempts=attempts,
        num_attempts=len(attempts),
    )
    return _with_reason(stage, workflow, path)


def _not_started(stage: StageProgress, workflow: Workflow, path: Path, is_cancelled: bool) -> StageProgress:
    """Return a stage without pods; its reason tells why its driver waits or failed."""
    driver = workflow.newest_pod(driver_of(path))
    if driver is None:
        return stage
    cause = _attempt(driver, path[-1], "", is_cancelled)
    if cause.state == "FAILED":
        failed = replace(
            stage, state="FAILED", started_at=driver.started_at, ended_at=driver.ended_at, cause=cause
        )
        return replace(failed, reason=f"driver: {cause.reason}" if cause.reason else "")
    return replace(stage, reason=cause.reason if stage.state == "PENDING" else "")


def _with_reason(stage: StageProgress, workflow: Workflow, path: Path) -> StageProgress:
    """Return a stage with the reason why it waits, failed or is retried."""
    if stage.state == "SUCCEEDED" or not stage.attempts:
        return stage
    newest = stage.attempts[-1]
    if stage.state == "FAILED" or (stage.state == "PENDING" and newest.reason):
        return replace(stage, reason=newest.reason, cause=newest)
    failed = [attempt for attempt in stage.attempts if attempt.state == "FAILED"]
    if not failed:
        return stage
    retry = workflow.newest_node((*path, "executor"))
    backoff = explain(retry.message, path[-1]) if retry else ""
    failure = f"retried: {failed[-1].reason or 'the attempt failed'}"
    return replace(stage, reason="; ".join(part for part in (failure, backoff) if part), cause=failed[-1])


def _with_cause(stages: list[StageProgress], workflow: Workflow, run: Any) -> list[StageProgress]:
    """Return the stages of a run; the first unstarted stage gets the reason why it cannot start.

    The reason is the message of a nested pipeline's driver, or of the failed workflow as a whole. In a run that
    has ended, a stage that was running or waiting counts as failed.
    """
    message = explain(workflow.message, "", is_cancelled=was_cancelled(run))
    if run.state in ENDED:
        stages = [
            replace(stage, state="FAILED", reason=stage.reason or message or "the run ended first")
            if stage.state in ("RUNNING", "PENDING") and stage.started_at
            else stage
            for stage in stages
        ]
    has_reason = any(stage.reason for stage in stages if stage.state != "SUCCEEDED")
    waiting = next((stage for stage in stages if stage.state in ("PENDING", "NOT REACHED")), None)
    driver = workflow.stuck_driver()
    if has_reason or waiting is None or not (driver or message):
        return stages
    cause = _attempt(driver, "root", "", was_cancelled(run)) if driver else None
    reason = (f"driver: {cause.reason}" if cause.state == "FAILED" else cause.reason) if cause else message
    stuck = replace(waiting, reason=reason, cause=cause if cause and cause.state == "FAILED" else None)
    return [stuck if stage is waiting else stage for stage in stages]


def _attempt(pod: Node, task: str, memory: str, is_cancelled: bool) -> StageAttempt:
    is_gated = pod.phase == "Pending" and _KUEUE in pod.inputs.values()
    reason = explain(pod.message, task, memory, is_cancelled=is_cancelled, is_gated=is_gated)
    return StageAttempt(pod.pods, _STATES.get(pod.phase, "RUNNING"), reason)


def _memory_limit(pod: Node) -> str:
    """Return the memory limit in the patch that a driver wrote for the pod; empty if there is none."""
    resources = container_of(pod.inputs.get("pod-spec-patch", "")).get("resources") or {}
    return str((resources.get("limits") or {}).get("memory", ""))


def _planned(path: Path, started: Mapping[Path, StageProgress], initial: str) -> list[tuple[Path, StageProgress]]:
    """Return the started stages of a planned stage, or one unstarted stage.

    A planned stage in a loop whose items were unknown at planning stands for all iterations of the loop.
    """
    if path in started:
        return [(path, started[path])]
    iterations = [other for other in started if _without_iterations(other) == path]
    return [(iteration, started[iteration]) for iteration in sorted(iterations, key=_indices)] or [
        (path, StageProgress(path[-1], initial, None, None, (), 0, ""))
    ]


def _without_iterations(path: Path) -> Path:
    return tuple(step for step in path if not step.startswith("iteration-"))


def _indices(path: Path) -> tuple[int, ...]:
    return tuple(int(step.partition("(")[2].partition(":")[0]) for step in path if "iterations(" in step)
