"""The stages of a run: their states, attempts, reasons and logs.

The workflow of v1beta1 says everything (`workflow.py`). A server without it lists nodes by hashes of their names,
so that names can be tried (`guessed_nodes.py`); it tells no reasons, which logs must then give.
"""

import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

from pipelines.kubeflow.client import ENDED
from pipelines.kubeflow.connection import Api, ApiError
from pipelines.kubeflow.guessed_nodes import guessed_stages
from pipelines.kubeflow.reasons import in_words, is_exit
from pipelines.kubeflow.stages import Attempt, Stage
from pipelines.kubeflow.workflow import Node, Workflow, driver_of, stage_name, workflow_of
from pipelines.plan import Path, planned_stages, repeated_names

_STATES = {
    "Succeeded": "SUCCEEDED",
    "Failed": "FAILED",
    "Error": "FAILED",
    "Skipped": "SKIPPED",
    "Pending": "PENDING",
}
_SAID = re.compile(r"\[[a-z-]+\] (failed: .*|preempted: .*)")
_ATTEMPT = re.compile(r"^\[[a-z-]+\] attempt (\d+) of \d+", re.MULTILINE)
_FRESH_SECONDS = 30.0  # a log of a running pod is asked for again after this time
_KUEUE = "kueue.x-k8s.io/queue-name"


def stages_of(kubeflow: Api, run: Any, specification: Mapping[str, Any]) -> list[Stage]:
    """Return the stages of a run of this pipeline, also those to come, in the order in which they run.

    Raises:
        ApiError: the server did not answer.
    """
    to_come = "NOT REACHED" if run.state in ENDED else "PENDING"
    workflow = workflow_of(kubeflow, run.run_id)
    if workflow is None:
        found = guessed_stages(run, specification, to_come)
        repeated: frozenset[str] = frozenset()
    else:
        found = {path: _stage(workflow, path, to_come, was_cancelled(run)) for path in workflow.stages()}
        repeated = workflow.repeated
    config = run.runtime_config
    plan = planned_stages(specification, (config.parameters if config else None) or {})
    repeated |= repeated_names(specification)
    ordered = [stage for planned in plan for stage in _of_plan(planned.path, found, to_come)]
    ordered += [(path, stage) for path, stage in found.items() if path not in dict(ordered)]
    return [replace(stage, name=stage_name(path, repeated)) for path, stage in ordered]


def was_cancelled(run: Any) -> bool:
    """Return whether somebody asked the run to end; the server calls such a run FAILED in the end."""
    return run.state in ("CANCELED", "CANCELING") or any(
        each.state in ("CANCELED", "CANCELING") for each in run.state_history or []
    )


class Logs:
    """The logs of a run's stages; that of a pod that has ended is asked for once, others now and then."""

    def __init__(self, kubeflow: Api, run_id: str):
        self._kubeflow, self._run_id = kubeflow, run_id
        self._read: dict[tuple[tuple[str, ...], bool], tuple[float, str]] = {}

    def of_attempts(self, stage: Stage) -> list[str]:
        """Return what each attempt of a stage printed, oldest first; a pod may hold several.

        Raises:
            ApiError: the stage has no pod, or a log is gone.
        """
        pods = [each for each in stage.attempts if each.pods]
        if not pods:
            raise ApiError(f"stage {stage.name}: no pod has been started for it")
        return [text for pod in pods for text in _cut(self._text(pod))]

    def told_by(self, stage: Stage) -> Stage:
        """Return the stage with what only its newest log knows: attempts within one pod, and why it failed."""
        newest = self._printed(stage.attempts[-1]) if stage.attempts else ""
        count = max([stage.num_attempts, *(int(match[1]) for match in _ATTEMPT.finditer(newest))])
        reason = stage.reason
        if stage.state == "FAILED" and (not reason or is_exit(reason)):
            reason = _last_words(newest) or "its log cannot be read"
        for attempt in stage.attempts:
            if is_exit(attempt.reason) and attempt.reason in reason:
                reason = reason.replace(attempt.reason, _last_words(self._printed(attempt)) or attempt.reason)
        return replace(stage, num_attempts=count, reason=reason)

    def _printed(self, attempt: Attempt) -> str:
        """Return what a pod printed; empty if that cannot be read."""
        try:
            return self._text(attempt)
        except ApiError:
            return ""

    def _text(self, attempt: Attempt) -> str:
        key, now = (attempt.pods, attempt.has_ended), time.monotonic()
        when, text = self._read.get(key, (0.0, ""))
        if key in self._read and (attempt.has_ended or now - when < _FRESH_SECONDS):
            return text
        error = ApiError("no pod has been started")
        for pod in attempt.pods:
            try:
                text = self._kubeflow.text(f"/apis/v1alpha1/runs/{self._run_id}/nodes/{pod}/log")
            except ApiError as refused:
                error = refused
                continue
            self._read[key] = now, text
            return text
        raise error


def _cut(text: str) -> list[str]:
    """Return the parts of a pod's log that belong to one attempt each; what precedes the first is part of it."""
    starts = [match.start() for match in _ATTEMPT.finditer(text)]
    bounds = [0, *starts[1:], len(text)]
    return [text[begin:end] for begin, end in pairwise(bounds)]


def _last_words(text: str) -> str:
    """Return why a stage failed, by its own words if it printed any, else by its last line."""
    lines = [line for line in text.splitlines() if line.strip()]
    said = [match[1].removeprefix("failed: ") for line in lines if (match := _SAID.search(line))]
    return said[-1] if said else lines[-1].strip() if lines else ""


def _stage(workflow: Workflow, path: Path, to_come: str, is_cancelled: bool) -> Stage:
    """Return what the workflow says of one stage."""
    node, driver, pods = workflow.at(path), workflow.at(driver_of(path)), workflow.pods(path)
    assert node
    memory = _memory_limit(pods[-1]) if pods else ""

    def words(other: Node) -> str:
        is_gated = other.phase == "Pending" and _KUEUE in other.inputs.values()
        return in_words(other.message, path[-1], memory, is_cancelled=is_cancelled, is_gated=is_gated)

    attempts = tuple(Attempt(pod.pods, _STATES.get(pod.phase, "RUNNING"), words(pod)) for pod in pods)
    stage = Stage(path[-1], to_come, None, None, attempts, len(attempts), "")
    if node.phase in ("Omitted", "") or (not pods and node.phase != "Succeeded"):
        if driver and driver.phase in ("Failed", "Error"):
            cause = words(driver) or "see its log in Kubeflow's page of the run"
            failed = replace(stage, state="FAILED", reason=f"driver: {cause}")
            return replace(failed, began=driver.began, ended=driver.ended)
        if node.phase in ("Omitted", ""):
            return stage
    state = _STATES.get(node.phase, "RUNNING")
    if state == "RUNNING":
        state = attempts[-1].state if attempts and attempts[-1].state == "PENDING" else state
    began = pods[0].began if pods else node.began
    return replace(
        stage, state=state, began=began, ended=node.ended, reason=_reason(state, workflow, path, attempts)
    )


def _reason(state: str, workflow: Workflow, path: Path, attempts: Sequence[Attempt]) -> str:
    """Return why a stage is in its state, or is tried again."""
    if state == "SUCCEEDED" or not attempts:
        return ""
    if state in ("FAILED", "PENDING") and attempts[-1].reason:
        return attempts[-1].reason
    failed = [attempt for attempt in attempts if attempt.state == "FAILED"]
    if not failed or state == "FAILED":
        return ""
    retry = workflow.at((*path, "executor"))
    backoff = in_words(retry.message, path[-1]) if retry else ""
    before = f"attempt {attempts.index(failed[-1])}: {failed[-1].reason or 'failed'}"
    return "; ".join(part for part in (before, backoff) if part)


def _memory_limit(pod: Node) -> str:
    """Return the limit of memory in the patch that a driver made for the pod."""
    patch = json.loads(pod.inputs.get("pod-spec-patch") or "{}")
    containers = patch.get("containers") or [{}]
    return str(containers[0].get("resources", {}).get("limits", {}).get("memory", ""))


def _of_plan(path: Path, found: Mapping[Path, Stage], to_come: str) -> list[tuple[Path, Stage]]:
    """Return the stages found that a planned one stands for; a loop of unknown items, for all its iterations."""
    if path in found:
        return [(path, found[path])]
    alike = [each for each in found if _without_iterations(each) == path]
    return [(each, found[each]) for each in sorted(alike, key=_indices)] or [
        (path, Stage(path[-1], to_come, None, None, (), 0, ""))
    ]


def _without_iterations(path: Path) -> Path:
    return tuple(step for step in path if not step.startswith("iteration-"))


def _indices(path: Path) -> tuple[int, ...]:
    return tuple(int(step.partition("(")[2].partition(":")[0]) for step in path if "iterations(" in step)
