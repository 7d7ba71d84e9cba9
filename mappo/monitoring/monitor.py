"""What a stage does, told to Prometheus: reports in, metrics out. The only importer of prometheus_client.

A training pod is scraped; when it ends, it waits for one more scrape by each that scrapes it, so that its last
values are not lost. Short
stages push to a Pushgateway, if there is one, and delete there what they pushed. All of that is done beside
training or after it, and none of it can make a stage fail.
"""

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.client import HTTPException
from types import TracebackType

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    delete_from_gateway,
    disable_created_metrics,
    generate_latest,
    push_to_gateway,
)
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

import mappo
from mappo.compute.resources import resolve_device
from mappo.config import ExperimentConfig, config_hash
from mappo.environment.validation import ValidationReport
from mappo.evaluation.evaluation import EvaluationReport
from mappo.monitoring import metrics
from mappo.monitoring.metrics import INFO_LABELS, Metric
from mappo.monitoring.server import MetricsServer, Page, text_page
from mappo.monitoring.settings import MonitorSettings
from mappo.runs.saver import SaveResult
from mappo.training.history import IterationReport, TrainingStarted

_METRICS_PATH = "/metrics"
_PUSH_SECONDS = 5.0  # that a Pushgateway has to answer
_CACHE_SECONDS = 1.0
_START_SECONDS = 600.0  # until training counts as stalled before its first iteration
_STALL_FACTOR = 10
_BY_STAGE = {
    "validate": metrics.VALIDATION,
    "train": metrics.TRAINING,
    "evaluate": metrics.EVALUATION,
    "promote": (),
    "prepare": (),
    "tune": (*metrics.TRAINING, *metrics.STUDY),
}
_TRAINS = ("train", "tune")
_OF_RUN = {metric.name for metric in (*metrics.TRAINING, *metrics.PROBLEMS)}  # of many, where a worker trains
_KEPT = ("mappo_run_state", "mappo_last_iteration_timestamp_seconds")  # of runs before, so that their end is seen


class Monitor:
    """Everything that one stage of one run tells Prometheus. Its methods may be called from any thread.

    As a context manager it serves the metrics of training while the block lasts; at the end, it sees to it that
    the last values arrive. Ctrl-C ends the block at once.
    """

    def __init__(
        self,
        stage: str,
        run: str,
        settings: MonitorSettings,
        announce: Callable[[str], object],
        *,
        registry: CollectorRegistry | None = None,
        min_stall_seconds: float = 60.0,
    ):
        """`announce` shows a line to people. Without a registry, the monitor has one of its own."""
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._stage, self._settings, self._announce = stage, settings, announce
        self._labels = {"study": settings.study, "run": run}
        self._run_labels = self._labels
        self._registry = registry or CollectorRegistry(auto_describe=True)
        self._lock = threading.Lock()  # so that every scrape shows one moment
        self._server: MetricsServer | None = None
        self._rendered: tuple[float, bytes] = (-math.inf, b"")
        self._began = time.monotonic()
        self._state = "starting"
        self._is_training = stage == "train"
        self._ended: deque[tuple[float, dict[str, str]]] = deque()
        self._num_iterations = 0
        self._last_iteration, self._longest_seconds = self._began, 0.0
        self._min_stall_seconds = min_stall_seconds
        self._made: dict[str, Gauge | Counter | Histogram] = {}
        self._gauges: dict[str, Gauge] = {}
        self._counters: dict[str, Counter] = {}
        self._histograms: dict[str, Histogram] = {}
        self._declared = (*_BY_STAGE[stage], *metrics.PROBLEMS, *metrics.OUTCOME)
        for metric in self._declared:
            self._declare(metric)
        if stage in _TRAINS:
            ProcessCollector(registry=self._registry)

    def __enter__(self) -> "Monitor":
        """Begin to serve, if this is training and there is a port for it."""
        with self._changing():
            self._set("mappo_stage_attempts", self._settings.attempts, stage=self._stage)
        if self._stage in _TRAINS and self._settings.port is not None:
            pages = {_METRICS_PATH: self._metrics, "/healthz": self._health, "/readyz": self._readiness}
            try:
                self._server = MetricsServer(self._settings.port, pages)
            except (OSError, RuntimeError) as error:
                reason = getattr(error, "strerror", error)
                self._announce(
                    f"warning: no metrics: port {self._settings.port} cannot be listened on: {reason}; "
                    "training goes on; MAPPO_METRICS_PORT or --metrics-port takes another, 0 any free one"
                )
            else:
                self._announce(f"metrics: http://localhost:{self._server.port}{_METRICS_PATH}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Note how the stage ended, and wait until that is known, unless there is no time for it."""
        interrupted = error is not None and not isinstance(error, Exception)
        state = "preempted" if interrupted else "failed" if error else "finished"
        with self._changing():
            if self._is_training:
                self._set_state(state)
            self._set("mappo_stage_success", error is None, stage=self._stage)
            self._set("mappo_stage_duration_seconds", time.monotonic() - self._began, stage=self._stage)
        try:
            if not isinstance(error, KeyboardInterrupt) and not self._wait_for_scrape() and not interrupted:
                self._push()
        except KeyboardInterrupt:
            self._announce("did not wait for the last metrics to be scraped")
        finally:
            if self._server:
                self._server.close()

    @property
    def port(self) -> int | None:
        """Where the metrics are served; None when they are not."""
        return self._server.port if self._server else None

    def planned(self, config: ExperimentConfig) -> None:
        """What is about to be trained."""
        device = resolve_device(config.device)
        info = (
            config.environment.scenario,
            config_hash(config)[:12],
            mappo.__version__,
            device.type,
            str(config.seed),
        )
        collection, now = config.collection, time.time()
        steps = math.ceil(collection.frames_per_batch / config.learner.minibatch_frames)
        with self._changing():
            self._steps_per_epoch, self._frames_per_iteration = steps, collection.frames_per_batch
            self._set("mappo_run_info", 1, **dict(zip(INFO_LABELS, info, strict=True)))
            self._set("mappo_run_planned_frames", collection.num_iterations * collection.frames_per_batch)
            self._set("mappo_run_gpus", device.type == "cuda")
            self._set("mappo_last_iteration_timestamp_seconds", now)
            self._set("mappo_last_checkpoint_timestamp_seconds", now)
            self._set("mappo_stall_limit_seconds", self._stall_limit())
            self._set_state("starting")

    def begin_run(self, run: str) -> None:
        """What is trained from now on is another run; what was told of the one before is forgotten."""
        with self._changing():
            self._forget_runs()
            self._run_labels = {**self._labels, "run": run}
            for metric in self._declared:
                if metric.name in _OF_RUN:
                    self._begin_at_zero(metric)
            self._is_training = True
            self._num_iterations, self._longest_seconds = 0, 0.0
            self._last_iteration = time.monotonic()

    def end_run(self, state: str) -> None:
        """Training has ended, but not the stage."""
        with self._changing():
            self._set_state(state)
            self._is_training = False
            self._ended.append((time.monotonic(), self._run_labels))

    def studied(self, trials: Mapping[str, int], asked: int, losses: int, best: float | None) -> None:
        """A study's trials by state, how many were asked for, how often one lost its worker, the best value."""
        with self._changing():
            for state in metrics.TRIAL_STATES:
                self._set("mappo_study_trials", trials.get(state, 0), state=state)
            self._set("mappo_study_asked_trials", asked)
            self._set("mappo_study_lost_workers", losses)
            if best is not None:
                self._set("mappo_study_best_value", best)

    def began(self, beginning: TrainingStarted) -> None:
        """Training begins, or goes on from a checkpoint."""
        with self._changing():
            self._set("mappo_run_attempt", beginning.attempt)
            self._set("mappo_run_frames", beginning.progress.frames)

    def iterated(self, report: IterationReport) -> None:
        """One iteration is done."""
        row, now = report.row(), time.monotonic()
        seconds = report.collect_seconds + report.learn_seconds + report.evaluate_seconds
        with self._changing():
            since = now - self._last_iteration if self._num_iterations else 0.0
            self._longest_seconds = max(self._longest_seconds, since, seconds)
            self._num_iterations += 1
            self._last_iteration = now
            self._take(row)
            self._add("mappo_iterations_total", 1)
            self._add("mappo_frames_total", self._frames_per_iteration)
            self._add("mappo_optimiser_steps_total", report.losses.epochs * self._steps_per_epoch)
            self._set("mappo_last_iteration_timestamp_seconds", time.time())
            self._set("mappo_stall_limit_seconds", self._stall_limit())
            self._set_state("running")

    def saved(self, save: SaveResult) -> None:
        """A checkpoint was saved, or not."""
        with self._changing():
            self._add("mappo_checkpoint_saves_total", 1, outcome=save.outcome)
            if save.outcome != "skipped":
                self._observe("mappo_checkpoint_save_seconds", save.seconds)
            if save.outcome == "saved":
                self._set("mappo_checkpoint_bytes", save.size_bytes)
                self._set("mappo_last_checkpoint_timestamp_seconds", time.time())

    def requested(self, operation: str, outcome: str) -> None:
        """The store was asked for something."""
        with self._changing():
            self._add("mappo_store_requests_total", 1, operation=operation, outcome=outcome)

    def met_non_finite(self, source: str) -> None:
        """A number was not finite: in a loss, an observation or a return."""
        with self._changing():
            self._add("mappo_non_finite_total", 1, source=source)

    def validated(self, report: ValidationReport) -> None:
        """The environment was checked."""
        outcomes = [check.outcome for check in report.checks]
        with self._changing():
            for outcome in ("passed", "warning", "failed"):
                self._set("mappo_validation_checks", outcomes.count(outcome), outcome=outcome)

    def evaluated(self, report: EvaluationReport) -> None:
        """A policy was judged."""
        with self._changing():
            for policy, returns in report.policies().items():
                numbers = {
                    "mappo_evaluation_episodes": len(returns.episode_returns),
                    "mappo_evaluation_return_mean": returns.mean.value,
                    "mappo_evaluation_return_mean_low": returns.mean.low,
                    "mappo_evaluation_return_mean_high": returns.mean.high,
                    "mappo_evaluation_return_interquartile_mean": returns.interquartile_mean.value,
                }
                for name, value in numbers.items():
                    if value is not None:
                        self._set(name, value, policy=policy)

    def text(self) -> bytes:
        """All metrics in Prometheus's text format, as of one moment, at most a second old."""
        with self._lock:
            rendered, text = self._rendered
            if time.monotonic() - rendered > _CACHE_SECONDS:
                text = generate_latest(self._registry)
                self._rendered = (time.monotonic(), text)
            return text

    def stalled(self) -> str:
        """Why training counts as stalled; empty when it does not."""
        with self._lock:
            age, limit = time.monotonic() - self._last_iteration, self._stall_limit()
        if self._state not in ("starting", "running") or age <= limit:
            return ""
        return f"stalled: no iteration for {age:.0f} s; counts as stalled after {limit:.0f} s"

    def _forget_runs(self) -> None:
        """All of the last run but that it ended, which is forgotten after two scrapes."""
        for name in _OF_RUN - set(_KEPT):
            self._made[name].clear()
        while self._ended and time.monotonic() - self._ended[0][0] > 2 * self._settings.linger_seconds:
            _, labels = self._ended.popleft()
            for name in _KEPT:
                if labels != self._run_labels:
                    self._made[name].remove_by_labels(labels)

    def _metrics(self) -> Page:
        return Page(200, CONTENT_TYPE_PLAIN_0_0_4, self.text())

    def _health(self) -> Page:
        problem = self.stalled()
        return text_page(503, problem) if problem else text_page(200, self._state)

    def _readiness(self) -> Page:
        if not self._num_iterations:
            return text_page(503, "before the first iteration")
        return text_page(200, f"{self._num_iterations} iterations in this process")

    def _stall_limit(self) -> float:
        if not self._num_iterations:
            return max(_START_SECONDS, self._min_stall_seconds)
        return max(self._min_stall_seconds, _STALL_FACTOR * self._longest_seconds)

    def _set_state(self, state: str) -> None:
        self._state = state
        if self._is_training:
            for each in metrics.STATES:
                self._set("mappo_run_state", each == state, state=each)

    def _wait_for_scrape(self) -> bool:
        """Give the last values time to be scraped; whether they were."""
        if not self._server:
            return False
        ended, linger = time.monotonic(), self._settings.linger_seconds
        if ended - self._began > linger and not self._server.clients(_METRICS_PATH, self._began):
            return False  # nobody looks
        self._announce(f"waiting up to {linger:.0f} s until the last metrics are scraped")
        regular = self._server.clients(_METRICS_PATH, ended - 2 * linger)
        return self._server.wait_for_clients(_METRICS_PATH, ended, regular, linger)

    def _push(self) -> None:
        """Leave the last values at the Pushgateway until they are scraped there, and delete them."""
        gateway = self._settings.pushgateway
        if not gateway:
            return
        key = {"stage": self._stage, **self._labels}
        try:
            try:
                push_to_gateway(gateway, metrics.PUSH_JOB, self._registry, key, timeout=_PUSH_SECONDS)
                self._announce(f"metrics pushed; deleted there in {self._settings.linger_seconds:.0f} s")
                time.sleep(self._settings.linger_seconds)
            finally:  # also when it took the metrics without an answer in time
                delete_from_gateway(gateway, metrics.PUSH_JOB, key, timeout=_PUSH_SECONDS)
        except (OSError, HTTPException, ValueError) as error:
            self._announce(
                f"warning: the Pushgateway {gateway} did not take the metrics, or not delete them: {error}"
            )

    def _declare(self, metric: Metric) -> None:
        """Make a metric; what counts begins at 0 for all its labels, what shows a value when there is one."""
        arguments = (metric.name, metric.description, metric.label_names)
        if metric.kind == "gauge":
            self._gauges[metric.name] = Gauge(*arguments, registry=self._registry)
        elif metric.kind == "counter":
            self._counters[metric.name] = Counter(*arguments, registry=self._registry)
        else:
            self._histograms[metric.name] = Histogram(*arguments, registry=self._registry, buckets=metric.bounds)
        self._made = {**self._gauges, **self._counters, **self._histograms}
        self._begin_at_zero(metric)

    def _begin_at_zero(self, metric: Metric) -> None:
        if metric.kind == "counter":
            for own in metric.combinations():
                self._add(metric.name, 0, **own)
        elif metric.kind == "histogram":
            self._histograms[metric.name].labels(**self._run_labels)

    def _labels_of(self, name: str) -> dict[str, str]:
        return self._run_labels if name in _OF_RUN else self._labels

    def _take(self, row: dict[str, float]) -> None:
        """A row of the history: added to counters, shown by gauges; what is not defined changes neither."""
        for metric in self._declared:
            for own in metric.combinations() if metric.column else ():
                value = row[metric.column.format(**own)]
                if math.isfinite(value):
                    (self._add if metric.kind == "counter" else self._set)(metric.name, value, **own)

    def _set(self, name: str, value: float, **own: str) -> None:
        self._gauges[name].labels(**self._labels_of(name), **own).set(value)

    def _add(self, name: str, amount: float, **own: str) -> None:
        assert math.isfinite(amount), "it would poison the counter for ever"
        self._counters[name].labels(**self._labels_of(name), **own).inc(amount)

    def _observe(self, name: str, value: float) -> None:
        self._histograms[name].labels(**self._labels_of(name)).observe(value)

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Changes that a scrape sees together."""
        with self._lock:
            self._rendered = (-math.inf, b"")
            yield
