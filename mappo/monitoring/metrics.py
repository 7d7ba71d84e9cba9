"""The declarations of all metrics that the stages, and the exporter of pipeline runs, export.

`monitor.py` sets the values of the stages' metrics, `pipelines/run_metrics.py` those of the exporter;
docs/metrics.md lists the metrics.

Every metric of a stage has the labels `study` and `run`, and labels of its own with few, known values. Only
`mappo_run_info`, measurements, groups of agents and schedules have labels with free values; the names of the
last three are bounded in number and length. Counters count the work of this process, so they begin at 0 with each
attempt.

This file is long because it is the catalogue of all metrics.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Literal

from mappo.config import MAX_GROUPS
from mappo.environment.reductions import MAX_MEASUREMENTS, REDUCTIONS

PORT = 9464  # port of the metrics of a training pod; the pod's annotation and the manifests of k8s/ have it, too
EXPORTER_PORT = 9465  # port of the exporter of pipeline runs
SCRAPE_SECONDS = 15  # scrape interval in the manifests of k8s/
PUSH_JOB = "mappo"  # label `job` of pushed metrics

RUN_LABELS = ("study", "run")
INFO_LABELS = ("scenario", "config_hash", "mappo_version", "device", "seed")
POLICIES = ("random", "heuristic", "trained")
STATES = ("starting", "running", "finished", "failed", "preempted")
STAGES = ("train", "evaluate", "validate", "promote", "prepare", "tune")
TRIAL_STATES = ("waiting", "running", "complete", "pruned", "failed")
PIPELINE_STAGES = (
    *("validate", "train", "evaluate", "compare"),
    *("prepare", "tune", "choose", "promote", "report"),
    *("cell", "summarise", "notify"),
    "other",  # a stage that this version does not know
)
PIPELINE_STATES = ("pending", "running", "paused", "cancelling", "succeeded", "failed", "cancelled", "skipped")
FAILURES = ("error", "out_of_memory", "pod_lost", "deadline", "driver", "cancelled", "other")
MAX_SCHEDULES = 100  # schedules that the exporter shows, the latest ones first
RUNS_WINDOW_HOURS = 24  # the exporter shows runs that have not ended, and those created in these hours


@dataclass(frozen=True)
class Metric:
    """The declaration of one metric. `name` is the name that queries use.

    labels: the labels besides the subject's, with all their values.
    column: the column of the training history with the metric's values, or empty. A gauge shows the latest finite
    value of the column, a counter adds the values up. `{label}` in a column's name stands for the label's value.
    group_column: the column of the history with the gauge's values by group, as `kl` of `kl/adversary`, or empty.
    bounds: the upper bounds of a histogram's buckets.
    free_labels: further labels, whose values are not known in advance.
    subject: the labels that name what the metric describes.
    """

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    description: str
    labels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    column: str = ""
    group_column: str = ""
    bounds: tuple[float, ...] = ()
    free_labels: tuple[str, ...] = ()
    subject: tuple[str, ...] = RUN_LABELS

    @property
    def label_names(self) -> tuple[str, ...]:
        """The names of all labels, in the order in which the Prometheus client takes their values."""
        return (*self.subject, *self.labels, *self.free_labels)

    def combinations(self) -> list[dict[str, str]]:
        """Return every combination of values of the labels besides the subject's and free ones."""
        return [dict(zip(self.labels, values, strict=True)) for values in product(*self.labels.values())]


TRAINING = (
    Metric(
        "mappo_run_info",
        "gauge",
        "Always 1; the labels describe the run (scenario, configuration, version, device, seed)",
        free_labels=INFO_LABELS,
    ),
    Metric(
        "mappo_run_state",
        "gauge",
        "1 for the current state of training, 0 for the other states",
        {"state": STATES},
    ),
    Metric(
        "mappo_run_attempt",
        "gauge",
        "Number of the current attempt: how many processes have trained the run so far",
    ),
    Metric("mappo_run_frames", "gauge", "Frames of the run so far, in all attempts", column="frames"),
    Metric("mappo_run_planned_frames", "gauge", "Frames after which the run is finished"),
    Metric("mappo_run_gpus", "gauge", "GPUs on which this process trains"),
    Metric("mappo_frames_total", "counter", "Frames from which training has learned"),
    Metric("mappo_iterations_total", "counter", "Completed iterations"),
    Metric("mappo_epochs_total", "counter", "Passes over a batch (epochs)", column="epochs"),
    Metric("mappo_optimiser_steps_total", "counter", "Optimiser steps, one for each minibatch"),
    Metric("mappo_episodes_total", "counter", "Episodes that ended", column="num_episodes"),
    Metric(
        "mappo_phase_seconds_total",
        "counter",
        "Time of the training thread by phase, in seconds; save is the time to hand checkpoints to the saver",
        {"phase": ("collect", "learn", "evaluate", "save")},
        "{phase}_seconds",
    ),
    Metric(
        "mappo_frames_per_second",
        "gauge",
        "Frames per second of the last iteration, its evaluation and the save before it included",
        column="frames_per_second",
    ),
    Metric(
        "mappo_episode_return_mean",
        "gauge",
        "Mean return, averaged over agents, of the episodes that ended in the latest batch with a complete one",
        column="episode_return_mean",
    ),
    Metric(
        "mappo_episode_return_min",
        "gauge",
        "Lowest return among the episodes of mappo_episode_return_mean",
        column="episode_return_min",
    ),
    Metric(
        "mappo_episode_return_max",
        "gauge",
        "Highest return among the episodes of mappo_episode_return_mean",
        column="episode_return_max",
    ),
    *(
        Metric(name, "gauge", f"{meaning}, of each group of agents", group_column=column, free_labels=("group",))
        for name, column, meaning in (
            ("mappo_group_return_mean", "episode_return_mean", "Mean return of the episodes that ended"),
            ("mappo_group_kl_nats", "kl", "Approximate KL divergence from the collecting policy, in nats"),
            ("mappo_group_entropy_nats", "entropy", "Entropy of the collecting policy, in nats"),
            (
                "mappo_group_explained_variance",
                "explained_variance",
                "Share of the value targets' variance that the critic explains",
            ),
        )
    ),
    Metric(
        "mappo_selection_return_mean",
        "gauge",
        "Mean return of the latest evaluation during training; it selects the best checkpoint",
        column="evaluation_return_mean",
    ),
    Metric(
        "mappo_selection_measurement_mean",
        "gauge",
        f"Mean over the latest evaluation during training of what info() measures (at most {MAX_MEASUREMENTS} "
        "names)",
        free_labels=("measurement",),
    ),
    Metric(
        "mappo_loss",
        "gauge",
        "Terms of the optimised loss, averaged over the optimiser steps of the last iteration",
        {"term": ("policy", "critic", "entropy")},
        "loss_{term}",
    ),
    Metric("mappo_kl_nats", "gauge", "Approximate KL divergence from the collecting policy, in nats", column="kl"),
    Metric(
        "mappo_clip_fraction_ratio",
        "gauge",
        "Share of probability ratios outside 1 +- clip_epsilon, from 0 to 1",
        column="clip_fraction",
    ),
    Metric("mappo_entropy_nats", "gauge", "Entropy of the collecting policy, in nats", column="entropy"),
    Metric(
        "mappo_explained_variance",
        "gauge",
        "Share of the value targets' variance that the critic explains; 1 is perfect, 0 is as good as a constant",
        column="explained_variance",
    ),
    Metric(
        "mappo_gradient_norm",
        "gauge",
        "Norm of the gradient before clipping, by network (policy, critic)",
        {"network": ("policy", "critic")},
        "gradient_norm_{network}",
    ),
    Metric("mappo_learning_rate", "gauge", "Learning rate of Adam", column="learning_rate"),
    Metric(
        "mappo_last_iteration_timestamp_seconds",
        "gauge",
        "Unix time in seconds at the end of the last iteration; before the first iteration, the start of training",
    ),
    Metric(
        "mappo_stall_limit_seconds",
        "gauge",
        "Age of the last iteration above which training counts as stalled, in seconds; ten times the longest one",
    ),
    Metric(
        "mappo_last_checkpoint_timestamp_seconds",
        "gauge",
        "Unix time in seconds of the last saved checkpoint; before the first checkpoint, the start of training",
    ),
    Metric("mappo_checkpoint_bytes", "gauge", "Size of the last checkpoint, in bytes"),
    Metric(
        "mappo_checkpoint_saves_total",
        "counter",
        "Attempts to save a checkpoint, by outcome: saved, failed, or skipped for a newer checkpoint",
        {"outcome": ("saved", "failed", "skipped")},
    ),
    Metric(
        "mappo_checkpoint_save_seconds",
        "histogram",
        "Time to save a checkpoint in the background, in seconds; failed attempts count, too",
        bounds=(0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100),
    ),
    Metric(
        "mappo_store_requests_total",
        "counter",
        "Requests to the store, retries included; missing and taken are answers, unavailable and refused failures",
        {
            "operation": ("read", "write", "create", "list", "delete"),
            "outcome": ("ok", "missing", "taken", "unavailable", "refused"),
        },
    ),
    Metric(
        "mappo_peak_memory_bytes",
        "gauge",
        "Peak main memory of the process, in bytes",
        column="peak_memory_bytes",
    ),
    Metric(
        "mappo_peak_gpu_memory_bytes",
        "gauge",
        "Peak GPU memory of torch's tensors, in bytes; 0 without a GPU",
        column="peak_gpu_memory_bytes",
    ),
)

PROBLEMS = (
    Metric(
        "mappo_non_finite_total",
        "counter",
        "Numbers that were not finite, by source; such a number ends the stage",
        {"source": ("loss", "observation", "return")},
    ),
)

OUTCOME = (
    Metric("mappo_stage_success", "gauge", "1 if the stage succeeded, 0 if the stage failed", {"stage": STAGES}),
    Metric("mappo_stage_duration_seconds", "gauge", "Duration of the stage, in seconds", {"stage": STAGES}),
    Metric(
        "mappo_stage_attempts", "gauge", "Attempts of the stage so far, this attempt included", {"stage": STAGES}
    ),
)

VALIDATION = (
    Metric(
        "mappo_validation_checks",
        "gauge",
        "Checks of the environment by outcome",
        {"outcome": ("passed", "warning", "failed")},
    ),
)

EVALUATION = (
    Metric("mappo_evaluation_episodes", "gauge", "Held-out episodes of the evaluation", {"policy": POLICIES}),
    Metric("mappo_evaluation_return_mean", "gauge", "Mean return of the held-out episodes", {"policy": POLICIES}),
    Metric(
        "mappo_evaluation_return_mean_low",
        "gauge",
        "Lower end of the mean's 95 % confidence interval",
        {"policy": POLICIES},
    ),
    Metric(
        "mappo_evaluation_return_mean_high",
        "gauge",
        "Upper end of the mean's 95 % confidence interval",
        {"policy": POLICIES},
    ),
    Metric(
        "mappo_evaluation_return_interquartile_mean",
        "gauge",
        "Interquartile mean of the returns of the held-out episodes",
        {"policy": POLICIES},
    ),
    *(
        Metric(
            f"mappo_evaluation_group_return_mean{suffix}",
            "gauge",
            meaning,
            {"policy": POLICIES},
            free_labels=("group",),
        )
        for suffix, meaning in (
            ("", f"Mean return of the held-out episodes, of each of several groups (at most {MAX_GROUPS})"),
            ("_low", "Lower end of the 95 % confidence interval of mappo_evaluation_group_return_mean"),
            ("_high", "Upper end of the 95 % confidence interval of mappo_evaluation_group_return_mean"),
        )
    ),
    *(
        Metric(
            f"mappo_evaluation_measurement_mean{suffix}",
            "gauge",
            f"{meaning}, by the reduction over an episode",
            {"policy": POLICIES, "reduction": REDUCTIONS},
            free_labels=("measurement",),
        )
        for suffix, meaning in (
            ("", f"Mean over held-out episodes of what info() measures (at most {MAX_MEASUREMENTS} names)"),
            ("_low", "Lower end of the 95 % confidence interval of mappo_evaluation_measurement_mean"),
            ("_high", "Upper end of the 95 % confidence interval of mappo_evaluation_measurement_mean"),
        )
    ),
)

STUDY = (
    Metric(
        "mappo_study_trials",
        "gauge",
        "Trials of the study by state, at this worker's last look at the database",
        {"state": TRIAL_STATES},
    ),
    Metric("mappo_study_asked_trials", "gauge", "Trials requested for the study, by all sessions together"),
    Metric(
        "mappo_study_lost_workers",
        "gauge",
        "Number of times that a trial lost its worker because the heartbeats stopped",
    ),
    Metric("mappo_study_best_value", "gauge", "Highest value of a completed trial (mean return on tuning seeds)"),
)

PIPELINES = (
    Metric(
        "mappo_kubeflow_up",
        "gauge",
        "1 if the exporter's last poll of Kubeflow succeeded, 0 if it failed or there was none yet",
        subject=(),
    ),
    Metric(
        "mappo_kubeflow_last_poll_timestamp_seconds",
        "gauge",
        "Unix time in seconds of the last poll that succeeded; 0 before the first one",
        subject=(),
    ),
    Metric("mappo_kubeflow_poll_seconds", "gauge", "Duration of the last poll, in seconds", subject=()),
    Metric(
        "mappo_kubeflow_unreadable_runs",
        "gauge",
        "Pipeline runs whose stages the last poll could not read",
        subject=(),
    ),
    Metric(
        "mappo_pipeline_runs",
        "gauge",
        f"Pipeline runs by state: unfinished ones, and those created in the last {RUNS_WINDOW_HOURS} hours",
        {"state": PIPELINE_STATES},
        subject=(),
    ),
    Metric(
        "mappo_pipeline_runs_ended_total",
        "counter",
        "Pipeline runs that ended while the exporter ran, by state",
        {"state": ("succeeded", "failed", "cancelled", "skipped")},
        subject=(),
    ),
    Metric(
        "mappo_pipeline_waiting_seconds",
        "gauge",
        "Longest time for which a stage has now waited for its first pod to start, in seconds; 0 if none waits",
        {"stage": PIPELINE_STAGES},
        subject=(),
    ),
    Metric(
        "mappo_pipeline_queue_seconds",
        "histogram",
        "Time from the creation of a stage's first pod until a poll saw it run or ended, in seconds",
        {"stage": PIPELINE_STAGES},
        bounds=(10, 30, 60, 120, 300, 900, 1800, 3600, 14400, 43200),
        subject=(),
    ),
    Metric(
        "mappo_pipeline_stage_seconds",
        "histogram",
        "Time from the creation of a stage's first pod to the stage's success, in seconds",
        {"stage": PIPELINE_STAGES},
        bounds=(30, 60, 120, 300, 900, 1800, 3600, 14400, 43200, 172800),
        subject=(),
    ),
    Metric(
        "mappo_pipeline_stage_failures_total",
        "counter",
        "Stages that failed while the exporter ran, after all their attempts, by reason",
        {"stage": PIPELINE_STAGES, "reason": FAILURES},
        subject=(),
    ),
    Metric("mappo_schedules", "gauge", "Schedules by state", {"state": ("enabled", "paused")}, subject=()),
    Metric(
        "mappo_schedule_late_seconds",
        "gauge",
        f"Time since the schedule's first run that is due and has not started, in seconds; 0 if none is due "
        f"(at most {MAX_SCHEDULES} schedules)",
        free_labels=("schedule",),
        subject=(),
    ),
)

METRICS = (*TRAINING, *PROBLEMS, *VALIDATION, *EVALUATION, *STUDY, *OUTCOME, *PIPELINES)
