"""The monitor: it turns the reports of a stage into metrics for Prometheus.

Prometheus scrapes a training pod. When training ends, the pod waits until every Prometheus that has scraped it
does so once more, so that the last values are not lost. Short stages push their metrics to a Pushgateway, if
there is one, and delete them there after Prometheus has had time to scrape them. Monitoring runs beside training
or after it. Failed monitoring never fails a stage.

This file is long because one object owns the registry, the state of a stage and the lock over both.
"""

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.client import HTTPException
from types import TracebackType

from prometheus_client import CollectorRegistry, ProcessCollector, delete_from_gateway, push_to_gateway

import mappo
from mappo.compute.resources import resolve_device
from mappo.config import ExperimentConfig, config_hash
from mappo.environment.validation import ValidationReport
from mappo.evaluation.evaluation import EvaluationReport
from mappo.evaluation.statistics import Estimate
from mappo.monitoring import metrics
from mappo.monitoring.metric_set import CONTENT_TYPE, MetricSet
from mappo.monitoring.metrics import INFO_LABELS, Metric
from mappo.monitoring.server import MetricsServer, Page, text_page
from mappo.monitoring.settings import MonitorSettings
from mappo.runs.saver import SaveResult
from mappo.training.history import IterationReport, TrainingStarted

_METRICS_PATH = "/metrics"
_PUSH_SECONDS = 5.0  # timeout of a request to the Pushgateway
_CACHE_SECONDS = 1.0  # longest age of a page of metrics, so that many scrapes cost little
_START_SECONDS = 600.0  # stall limit before the first iteration
_STALL_FACTOR = 10
_BY_STAGE = {
    "validate": metrics.VALIDATION,
    "train": metrics.TRAINING,
    "evaluate": metrics.EVALUATION,
    "promote": (),
    "prepare": (),
    "tune": (*metrics.TRAINING, *metrics.STUDY),
}
_TRAINING_STAGES = ("train", "tune")
# The metrics of one run. A worker of a study trains many runs; the other metrics describe the worker itself.
_RUN_METRICS = {metric.name for metric in (*metrics.TRAINING, *metrics.PROBLEMS)}
# The metrics that stay after the next run has begun, so that Prometheus still scrapes how the last run ended.
_KEPT_METRICS = ("mappo_run_state", "mappo_last_iteration_timestamp_seconds")


class Monitor:
    """The monitor of one stage of one run. Any thread may call its methods.

    Inside its `with` block, the monitor serves the metrics of training. At the end of the block, the monitor makes
    sure that Prometheus receives the last values. Ctrl-C ends the block at once.
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
        """Declare the metrics of a stage.

        announce: prints one line for the user.
        registry: where the metrics are registered; by default a new registry.
        min_stall_seconds: the lowest stall limit, for runs with short iterations.
        """
        self._stage, self._settings, self._announce = stage, settings, announce
        self._labels = {"study": settings.study, "run": run}
        self._run_labels = self._labels
        self._lock = threading.Lock()  # held by updates and scrapes, so that a scrape never shows half an update
        self._server: MetricsServer | None = None
        self._rendered: tuple[float, bytes] = (-math.inf, b"")
        self._start = time.monotonic()
        self._state = "starting"
        self._is_training = stage == "train"
        self._ended_runs: deque[tuple[float, dict[str, str]]] = deque()
        self._num_iterations = 0
        self._last_iteration, self._longest_seconds = self._start, 0.0
        self._min_stall_seconds = min_stall_seconds
        self._declared = (*_BY_STAGE[stage], *metrics.PROBLEMS, *metrics.OUTCOME)
        self._values = MetricSet(self._declared, registry)
        for metric in self._declared:
            self._begin_at_zero(metric)
        if stage in _TRAINING_STAGES:
            ProcessCollector(registry=self._values.registry)

    def __enter__(self) -> "Monitor":
        """Start to serve the metrics, if the stage trains and the settings have a port."""
        with self._updating():
            self._set("mappo_stage_attempts", self._settings.attempts, stage=self._stage)
        if self._stage in _TRAINING_STAGES and self._settings.port is not None:
            pages = {_METRICS_PATH: self._metrics, "/healthz": self._health, "/readyz": self._readiness}
            try:
                self._server = MetricsServer(self._settings.port, pages)
            except (OSError, RuntimeError) as error:
                reason = getattr(error, "strerror", error)
                self._announce(
                    f"warning: no metrics: cannot listen on port {self._settings.port}: {reason}; "
                    "training continues. Set another port with MAPPO_METRICS_PORT or --metrics-port (0: any)"
                )
            else:
                self._announce(f"metrics: http://localhost:{self._server.port}{_METRICS_PATH}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Set the final values and wait until Prometheus has them.

        After Ctrl-C the monitor does not wait. After SIGTERM it waits for a scrape but does not push.
        """
        interrupted = error is not None and not isinstance(error, Exception)
        state = "preempted" if interrupted else "failed" if error else "finished"
        with self._updating():
            if self._is_training:
                self._set_state(state)
            self._set("mappo_stage_success", error is None, stage=self._stage)
            self._set("mappo_stage_duration_seconds", time.monotonic() - self._start, stage=self._stage)
        try:
            if not isinstance(error, KeyboardInterrupt) and not self._wait_for_scrape() and not interrupted:
                self._push()
        except KeyboardInterrupt:
            self._announce("Ctrl-C: no longer waiting for a scrape of the last metrics")
        finally:
            if self._server:
                self._server.close()

    @property
    def port(self) -> int | None:
        """The port of the metrics; None while the monitor does not serve them."""
        return self._server.port if self._server else None

    def planned(self, config: ExperimentConfig) -> None:
        """Report the configuration of the training that starts next."""
        device = resolve_device(config.device)
        info = (
            config.environment.scenario,
            config_hash(config)[:12],
            mappo.__version__,
            device.type,
            str(config.seed),
        )
        collection, timestamp = config.collection, time.time()
        steps = math.ceil(collection.frames_per_batch / config.learner.minibatch_frames)
        with self._updating():
            self._steps_per_epoch, self._frames_per_iteration = steps, collection.frames_per_batch
            self._set("mappo_run_info", 1, **dict(zip(INFO_LABELS, info, strict=True)))
            self._set("mappo_run_planned_frames", collection.num_iterations * collection.frames_per_batch)
            self._set("mappo_run_gpus", device.type == "cuda")
            self._set("mappo_last_iteration_timestamp_seconds", timestamp)
            self._set("mappo_last_checkpoint_timestamp_seconds", timestamp)
            self._set("mappo_stall_limit_seconds", self._stall_limit())
            self._set_state("starting")

    def begin_run(self, run: str) -> None:
        """Report that another run starts in this process, and drop the metrics of the previous run."""
        with self._updating():
            self._forget_runs()
            self._run_labels = {**self._labels, "run": run}
            for metric in self._declared:
                if metric.name in _RUN_METRICS:
                    self._begin_at_zero(metric)
            self._is_training = True
            self._num_iterations, self._longest_seconds = 0, 0.0
            self._last_iteration = time.monotonic()

    def end_run(self, state: str) -> None:
        """Report that the training of a run ended, while the stage continues."""
        with self._updating():
            self._set_state(state)
            self._is_training = False
            self._ended_runs.append((time.monotonic(), self._run_labels))

    def studied(self, trials: Mapping[str, int], requested: int, losses: int, best: float | None) -> None:
        """Report the state of a study.

        trials: number of trials by state. requested: number of requested trials. losses: how often a trial lost
        its worker. best: highest value of a completed trial, or None.
        """
        with self._updating():
            for state in metrics.TRIAL_STATES:
                self._set("mappo_study_trials", trials.get(state, 0), state=state)
            self._set("mappo_study_asked_trials", requested)
            self._set("mappo_study_lost_workers", losses)
            if best is not None:
                self._set("mappo_study_best_value", best)

    def began(self, start: TrainingStarted) -> None:
        """Report that training starts, or resumes from a checkpoint."""
        with self._updating():
            self._set("mappo_run_attempt", start.attempt)
            self._set("mappo_run_frames", start.progress.frames)

    def iterated(self, report: IterationReport) -> None:
        """Report a completed iteration."""
        row, end = report.row(), time.monotonic()
        seconds = report.collect_seconds + report.learn_seconds + report.evaluate_seconds
        with self._updating():
            # The time between two reports includes saving, which `seconds` leaves out. Before the first iteration
            # it would include the set-up of training, so it does not count there.
            between_reports = end - self._last_iteration if self._num_iterations else 0.0
            self._longest_seconds = max(self._longest_seconds, between_reports, seconds)
            self._num_iterations += 1
            self._last_iteration = end
            self._add_row(row)
            for name, mean in report.measurements.items():
                self._set("mappo_selection_measurement_mean", mean, measurement=name)
            self._add("mappo_iterations_total", 1)
            self._add("mappo_frames_total", self._frames_per_iteration)
            self._add("mappo_optimiser_steps_total", report.losses.epochs * self._steps_per_epoch)
            self._set("mappo_last_iteration_timestamp_seconds", time.time())
            self._set("mappo_stall_limit_seconds", self._stall_limit())
            self._set_state("running")

    def saved(self, save: SaveResult) -> None:
        """Report the result of an attempt to save a checkpoint."""
        with self._updating():
            self._add("mappo_checkpoint_saves_total", 1, outcome=save.outcome)
            if save.outcome != "skipped":
                self._observe("mappo_checkpoint_save_seconds", save.seconds)
            if save.outcome == "saved":
                self._set("mappo_checkpoint_bytes", save.size_bytes)
                self._set("mappo_last_checkpoint_timestamp_seconds", time.time())

    def requested(self, operation: str, outcome: str) -> None:
        """Report a request to the store."""
        with self._updating():
            self._add("mappo_store_requests_total", 1, operation=operation, outcome=outcome)

    def met_non_finite(self, source: str) -> None:
        """Report a number that was not finite. `source` is loss, observation or return."""
        with self._updating():
            self._add("mappo_non_finite_total", 1, source=source)

    def validated(self, report: ValidationReport) -> None:
        """Report the checks of the environment."""
        outcomes = [check.outcome for check in report.checks]
        with self._updating():
            for outcome in ("passed", "warning", "failed"):
                self._set("mappo_validation_checks", outcomes.count(outcome), outcome=outcome)

    def evaluated(self, report: EvaluationReport) -> None:
        """Report the evaluation of a policy."""
        with self._updating():
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
                for name, measurement in returns.measurements.items():
                    if measurement.mean:
                        self._set_measurement(measurement.mean, policy, name, measurement.reduction)

    def _set_measurement(self, mean: Estimate, policy: str, name: str, reduction: str) -> None:
        for suffix, value in (("", mean.value), ("_low", mean.low), ("_high", mean.high)):
            if value is not None:
                metric = f"mappo_evaluation_measurement_mean{suffix}"
                self._set(metric, value, policy=policy, measurement=name, reduction=reduction)

    def text(self) -> bytes:
        """Return all metrics in Prometheus's text format: one consistent snapshot, at most a second old."""
        with self._lock:
            rendered, text = self._rendered
            if time.monotonic() - rendered > _CACHE_SECONDS:
                text = self._values.text()
                self._rendered = (time.monotonic(), text)
            return text

    def stalled(self) -> str:
        """Return the reason why training counts as stalled, or an empty text if training makes progress."""
        with self._lock:
            age, limit = time.monotonic() - self._last_iteration, self._stall_limit()
        if self._state not in ("starting", "running") or age <= limit:
            return ""
        return f"stalled: no iteration for {age:.0f} s; the limit is {limit:.0f} s"

    def _forget_runs(self) -> None:
        """Drop the metrics of earlier runs; the state in which a run ended stays for two scrapes."""
        for name in _RUN_METRICS - set(_KEPT_METRICS):
            self._values.clear(name)
        while self._ended_runs and time.monotonic() - self._ended_runs[0][0] > 2 * self._settings.linger_seconds:
            _, labels = self._ended_runs.popleft()
            for name in _KEPT_METRICS:
                if labels != self._run_labels:
                    self._values.remove(name, labels)

    def _metrics(self) -> Page:
        return Page(200, CONTENT_TYPE, self.text())

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
            for name in metrics.STATES:
                self._set("mappo_run_state", name == state, state=name)

    def _wait_for_scrape(self) -> bool:
        """Wait for a scrape of the last values; return whether every regular client has scraped them."""
        if not self._server:
            return False
        end, linger = time.monotonic(), self._settings.linger_seconds
        if end - self._start > linger and not self._server.clients(_METRICS_PATH, self._start):
            return False  # no Prometheus has scraped during a whole scrape interval, so none will
        self._announce(f"waiting up to {linger:.0f} s for a scrape of the last metrics")
        regular_clients = self._server.clients(_METRICS_PATH, end - 2 * linger)
        return self._server.wait_for_clients(_METRICS_PATH, end, regular_clients, linger)

    def _push(self) -> None:
        """Push the last values to the Pushgateway, give Prometheus time to scrape them there, and delete them."""
        gateway = self._settings.pushgateway
        if not gateway:
            return
        key = {"stage": self._stage, **self._labels}
        try:
            try:
                push_to_gateway(gateway, metrics.PUSH_JOB, self._values.registry, key, timeout=_PUSH_SECONDS)
                self._announce(f"metrics pushed; they are deleted in {self._settings.linger_seconds:.0f} s")
                time.sleep(self._settings.linger_seconds)
            finally:  # a request that timed out may have stored the metrics, too
                delete_from_gateway(gateway, metrics.PUSH_JOB, key, timeout=_PUSH_SECONDS)
        except (OSError, HTTPException, ValueError) as error:
            # The text of an error about a URL can contain the password of a proxy.
            reason = str(error) if isinstance(error, OSError) else type(error).__name__
            self._announce(
                f"warning: the Pushgateway {gateway} did not accept the metrics, or did not delete them: {reason}"
            )

    def _begin_at_zero(self, metric: Metric) -> None:
        self._values.begin_at_zero(metric, **self._run_labels)

    def _labels_of(self, name: str) -> dict[str, str]:
        return self._run_labels if name in _RUN_METRICS else self._labels

    def _add_row(self, row: dict[str, float]) -> None:
        """Add a row of the history to the counters and show it in the gauges; skip values that are not finite."""
        for metric in self._declared:
            for labels in metric.combinations() if metric.column else ():
                value = row[metric.column.format(**labels)]
                if math.isfinite(value):
                    (self._add if metric.kind == "counter" else self._set)(metric.name, value, **labels)

    def _set(self, name: str, value: float, **labels: str) -> None:
        self._values.set(name, value, **self._labels_of(name), **labels)

    def _add(self, name: str, amount: float, **labels: str) -> None:
        self._values.add(name, amount, **self._labels_of(name), **labels)

    def _observe(self, name: str, value: float) -> None:
        self._values.observe(name, value, **self._labels_of(name))

    @contextmanager
    def _updating(self) -> Iterator[None]:
        """Group changes, so that a scrape shows all of them or none."""
        with self._lock:
            self._rendered = (-math.inf, b"")
            yield
