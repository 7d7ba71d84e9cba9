"""The metrics of pipeline runs and schedules, which polls of Kubeflow's API fill.

A poll reads everything before it changes a metric. Counters and histograms count what happens while this process
runs: what ended earlier is not counted, so a restart counts nothing twice. Gauges show the last poll, and are
absent after a failed one.
"""

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

from mappo.errors import ConfigError
from mappo.monitoring import metrics
from mappo.monitoring.metric_set import MetricSet
from pipelines.errors import ApiError
from pipelines.kubeflow.api import Api, pages
from pipelines.kubeflow.client import ENDED, get_run, pipeline_name
from pipelines.kubeflow.cron import Cron
from pipelines.kubeflow.progress import stages_of, was_cancelled
from pipelines.kubeflow.reasons import category_of
from pipelines.kubeflow.schedules import cron_of, schedules
from pipelines.kubeflow.stages import StageProgress
from pipelines.kubernetes_types import shortened

_OURS = "mappo-"  # the names of this package's pipelines begin with this
_WINDOW = timedelta(hours=metrics.RUNS_WINDOW_HOURS)
_FIRST_WINDOW = timedelta(days=7)  # the first poll looks for older runs that have not ended
_STATES = {"CANCELED": "cancelled", "CANCELING": "cancelling"}
_GAUGES = (
    "mappo_pipeline_runs",
    "mappo_pipeline_waiting_seconds",
    "mappo_schedules",
    "mappo_schedule_late_seconds",
)


@dataclass(frozen=True)
class _Poll:
    """The answers of one poll.

    stages: by the ID of a run; those of the runs that have not ended, or ended while this process ran. problems:
    why the stages of some runs could not be read.
    """

    now: datetime
    runs: list[Any]
    stages: Mapping[str, list[StageProgress]]
    schedules: list[Any]
    problems: list[str]


class RunMetrics:
    """The metrics of the pipeline runs and schedules of one namespace. Any thread may call `text`."""

    def __init__(self, zone: ZoneInfo, clock: Callable[[], datetime] = lambda: datetime.now(UTC)):
        """Declare the metrics. `zone` is the time zone in which the server reads the times of schedules."""
        self._zone, self._clock = zone, clock
        self._start = clock().replace(microsecond=0)  # the server counts in seconds
        self._lock = threading.Lock()  # held by updates and renderings, so that a page never shows half a poll
        self._values = MetricSet(metrics.PIPELINES)
        for metric in metrics.PIPELINES:
            self._values.begin_at_zero(metric)
        self._unfinished: set[str] | None = None  # IDs of runs; None before the first poll
        self._counted: set[tuple[str, ...]] = set()
        self._waiting: set[tuple[str, str]] = set()
        self._queued: set[tuple[str, str]] = set()
        self._paused_until: dict[str, datetime] = {}
        self._are_ours: dict[str, bool] = {}  # by the ID of a pipeline version

    def poll(self, kubeflow: Api, deadline_seconds: float) -> list[str]:
        """Read runs, stages and schedules, and update the metrics; return why the stages of some runs are missing.

        Raises:
            ApiError: the server refused a request or did not answer, or the deadline passed.
            ConfigError: the connection lacks a namespace, or a file with credentials cannot be read.
        """
        begin = time.monotonic()
        try:
            poll = self._read(kubeflow, _Deadline(begin + deadline_seconds))
        except Exception:
            with self._lock:
                self._clear(time.monotonic() - begin)
            raise
        with self._lock:
            self._clear(time.monotonic() - begin)
            self._update(poll)
        return poll.problems

    def text(self) -> bytes:
        """Return all metrics in Prometheus's text format."""
        with self._lock:
            return self._values.text()

    def _clear(self, seconds: float) -> None:
        for name in _GAUGES:
            self._values.clear(name)
        self._values.set("mappo_kubeflow_up", 0)
        self._values.set("mappo_kubeflow_poll_seconds", seconds)

    # --- reading ---

    def _read(self, kubeflow: Api, deadline: "_Deadline") -> _Poll:
        now = self._clock()
        runs = [run for run in self._runs(kubeflow, now, deadline) if self._is_ours(kubeflow, run)]
        stages, problems = {}, []
        for run in runs:
            if run.state not in ENDED or self._is_news(run):
                deadline.check()
                try:
                    stages[run.run_id] = stages_of(kubeflow, run, {})
                except ApiError as error:  # one run that cannot be read hides no other
                    problems.append(f"run {run.run_id}: {error}")
        listed = [schedule for schedule in schedules(kubeflow) if self._is_ours(kubeflow, schedule)]
        return _Poll(now, runs, stages, listed, problems)

    def _runs(self, kubeflow: Api, now: datetime, deadline: "_Deadline") -> Iterator[Any]:
        """Yield the runs of the window, then older ones that had not ended at the last poll."""
        begin = now - (_FIRST_WINDOW if self._unfinished is None else _WINDOW)
        older = set(self._unfinished or ())
        newest = pages(
            kubeflow,
            kubeflow.runs.run_service_list_runs,
            "runs",
            sort_by="created_at desc",
            namespace=kubeflow.namespace,
        )
        for run in newest:
            deadline.check()
            if run.created_at < begin:
                break
            older.discard(run.run_id)
            if run.created_at >= now - _WINDOW or run.state not in ENDED:
                yield run
        for run_id in older:
            deadline.check()
            try:
                yield get_run(kubeflow, run_id)
            except ApiError as error:
                if error.status not in (400, 404):  # 404: somebody has deleted the run
                    raise

    def _is_ours(self, kubeflow: Api, item: Any) -> bool:
        """Return whether a run or a schedule is one of this package's pipelines."""
        reference = item.pipeline_version_reference
        key = str(reference.pipeline_version_id) if reference else ""
        if isinstance(item.pipeline_spec, Mapping) or not key:
            return _name_of(item).startswith(_OURS)
        if key not in self._are_ours:
            try:
                self._are_ours[key] = pipeline_name(kubeflow, item).startswith(_OURS)
            except ConfigError:  # the server has no pipeline of this version
                self._are_ours[key] = False
            except ApiError as error:
                if error.status != 404:  # 404: somebody has deleted the version
                    raise
                self._are_ours[key] = False
        return self._are_ours[key]

    def _is_news(self, run: Any) -> bool:
        """Return whether a run ended while this process ran, and has not been counted yet."""
        return bool(run.finished_at >= self._start) and _key(run) not in self._counted

    # --- counting ---

    def _update(self, poll: _Poll) -> None:
        values, counts = self._values, Counter(_state(run) for run in poll.runs)
        values.set("mappo_kubeflow_up", 1)
        values.set("mappo_kubeflow_last_poll_timestamp_seconds", poll.now.timestamp())
        values.set("mappo_kubeflow_unreadable_runs", len(poll.problems))
        for state in metrics.PIPELINE_STATES:
            values.set("mappo_pipeline_runs", counts[state], state=state)
        for label in metrics.PIPELINE_STAGES:
            values.set("mappo_pipeline_waiting_seconds", 0, stage=label)
        for label, seconds in sorted(self._waits(poll), key=lambda wait: wait[1]):  # the longest one stays
            values.set("mappo_pipeline_waiting_seconds", seconds, stage=label)
        for run in poll.runs:
            if run.run_id in poll.stages:
                self._count(run, poll.stages[run.run_id], poll.now)
        self._forget_missing({run.run_id for run in poll.runs})
        self._unfinished = {run.run_id for run in poll.runs if run.state not in ENDED}
        self._update_schedules(poll)

    def _waits(self, poll: _Poll) -> Iterator[tuple[str, float]]:
        """Yield the label of each stage that waits for its first pod, and for how long; remember these stages."""
        for run in poll.runs:
            for stage in poll.stages.get(run.run_id, ()) if run.state not in ENDED else ():
                if stage.state == "PENDING" and stage.started_at and len(stage.attempts) == 1:
                    self._waiting.add((run.run_id, stage.name))
                    yield _label(stage), (poll.now - stage.started_at).total_seconds()

    def _count(self, run: Any, stages: list[StageProgress], now: datetime) -> None:
        """Count the stages of a run that have been queued or have ended, and the run if it has ended."""
        for stage in stages:
            self._count_queue(run, stage, now)
            ended_at = stage.ended_at or run.finished_at
            key = (run.run_id, stage.name, stage.state, str(ended_at))
            if stage.state not in ("SUCCEEDED", "FAILED") or ended_at < self._start or key in self._counted:
                continue
            self._counted.add(key)
            if stage.state == "FAILED":
                reason = "cancelled" if was_cancelled(run) else category_of(stage.reason)
                self._values.add("mappo_pipeline_stage_failures_total", 1, stage=_label(stage), reason=reason)
            elif (seconds := stage.seconds(now)) is not None:
                self._values.observe("mappo_pipeline_stage_seconds", seconds, stage=_label(stage))
        if run.state in ENDED and self._is_news(run):
            self._counted.add(_key(run))
            self._values.add("mappo_pipeline_runs_ended_total", 1, state=_state(run))

    def _count_queue(self, run: Any, stage: StageProgress, now: datetime) -> None:
        """Count how long a stage has waited, once a poll sees it without waiting.

        Argo does not tell when a later pod of a stage was created. So only a stage with one pod counts.
        """
        key = (run.run_id, stage.name)
        if stage.started_at is None or stage.state == "PENDING" or key in self._queued:
            return
        if len(stage.attempts) == 1 and (key in self._waiting or stage.started_at >= self._start):
            seconds = (min(now, stage.ended_at or now) - stage.started_at).total_seconds()
            self._values.observe("mappo_pipeline_queue_seconds", seconds, stage=_label(stage))
        self._queued.add(key)

    def _forget_missing(self, known: set[str]) -> None:
        self._counted = {key for key in self._counted if key[0] in known}
        self._waiting = {key for key in self._waiting if key[0] in known}
        self._queued = {key for key in self._queued if key[0] in known}

    def _update_schedules(self, poll: _Poll) -> None:
        paused = {schedule.recurring_run_id for schedule in poll.schedules if schedule.status != "ENABLED"}
        self._values.set("mappo_schedules", len(paused), state="paused")
        self._values.set("mappo_schedules", len(poll.schedules) - len(paused), state="enabled")
        known = {schedule.recurring_run_id for schedule in poll.schedules}
        ends = {**self._paused_until, **dict.fromkeys(paused, poll.now)}
        self._paused_until = {key: end for key, end in ends.items() if key in known}
        late: dict[str, float] = {}
        for schedule in poll.schedules:
            if schedule.recurring_run_id not in paused:
                name = shortened(schedule.display_name)
                late[name] = max(late.get(name, 0.0), self._late_seconds(schedule, poll))
        for name in sorted(late, key=lambda name: -late[name])[: metrics.MAX_SCHEDULES]:
            self._values.set("mappo_schedule_late_seconds", late[name], schedule=name)

    def _late_seconds(self, schedule: Any, poll: _Poll) -> float:
        """Return how long a schedule's first run is due that has not started; 0 if none is due.

        Times before the window, before the schedule existed, or while it was paused do not count.
        """
        since = [poll.now - _WINDOW, schedule.created_at]
        since += [run.scheduled_at for run in poll.runs if run.recurring_run_id == schedule.recurring_run_id]
        since.append(self._paused_until.get(schedule.recurring_run_id, schedule.created_at))
        cron = Cron.stored(cron_of(schedule))
        due = cron.next(max(since).astimezone(self._zone), 1) if cron else []
        return max(0.0, (poll.now - due[0]).total_seconds()) if due else 0.0


@dataclass(frozen=True)
class _Deadline:
    """The time of `time.monotonic` at which a poll must have ended."""

    at: float

    def check(self) -> None:
        if time.monotonic() > self.at:
            raise ApiError(
                "the poll did not end before its deadline: Kubeflow is slow, or there are too many runs"
            )


def _state(run: Any) -> str:
    """Return the state of a run, one of `PIPELINE_STATES`; the server may report a cancelled run as FAILED."""
    if run.state == "FAILED" and was_cancelled(run):
        return "cancelled"
    return _STATES.get(run.state, str(run.state or "PENDING").lower())


def _label(stage: StageProgress) -> str:
    return stage.task if stage.task in metrics.PIPELINE_STAGES else "other"


def _key(run: Any) -> tuple[str, ...]:
    return (run.run_id, "", run.state, str(run.finished_at))


def _name_of(item: Any) -> str:
    """Return the name of the pipeline that a run or a schedule holds; empty if it holds none."""
    specification = item.pipeline_spec if isinstance(item.pipeline_spec, Mapping) else {}
    pipeline = specification.get("pipeline_spec", specification)
    return str(pipeline.get("pipelineInfo", {}).get("name", ""))
