"""What the stages tell Prometheus: every metric, declared. `monitor.py` fills them, docs/metrics.md lists them.

Each has the labels `study` and `run` besides its own, whose values are few and known; `mappo_run_info` alone has
free ones. What is cumulative counts what this process did, and begins at 0 with each attempt.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Literal

PORT = 9464  # where a training pod listens; also in its annotation, and in the manifests of k8s/
SCRAPE_SECONDS = 15  # between two scrapes, in the manifests of k8s/
PUSH_JOB = "mappo"  # of what is pushed to a Pushgateway

RUN_LABELS = ("study", "run")
INFO_LABELS = ("scenario", "config_hash", "mappo_version", "device", "seed")
POLICIES = ("random", "heuristic", "trained")
STATES = ("starting", "running", "finished", "failed", "preempted")
STAGES = ("train", "evaluate", "validate", "promote", "prepare", "tune")
TRIAL_STATES = ("waiting", "running", "complete", "pruned", "failed")


@dataclass(frozen=True)
class Metric:
    """One metric, by the name that a query uses.

    `labels` are those besides study and run, with all their values. `column` is that of the training history it
    comes from, where it comes from one: a gauge shows its latest defined value, a counter adds it up; `{label}` in
    it stands for a label's value. `bounds` are the upper bounds of a histogram's buckets.
    """

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    description: str
    labels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    column: str = ""
    bounds: tuple[float, ...] = ()
    is_info: bool = False

    @property
    def label_names(self) -> tuple[str, ...]:
        """All, in the order of values for them."""
        return (*RUN_LABELS, *(INFO_LABELS if self.is_info else self.labels))

    def combinations(self) -> list[dict[str, str]]:
        """Its own labels in every combination of their values."""
        return [dict(zip(self.labels, values, strict=True)) for values in product(*self.labels.values())]


TRAINING = (
    Metric("mappo_run_info", "gauge", "1, with labels that say what is trained, on what", is_info=True),
    Metric("mappo_run_state", "gauge", "1 for the state that training is in, 0 for the others", {"state": STATES}),
    Metric("mappo_run_attempt", "gauge", "How often training was started under the run's name"),
    Metric("mappo_run_frames", "gauge", "Frames since the run began, in all attempts", column="frames"),
    Metric("mappo_run_planned_frames", "gauge", "Frames when the run will be finished"),
    Metric("mappo_run_gpus", "gauge", "GPUs that this process trains on"),
    Metric("mappo_frames_total", "counter", "Frames learned from"),
    Metric("mappo_iterations_total", "counter", "Iterations"),
    Metric("mappo_epochs_total", "counter", "Passes over a batch", column="epochs"),
    Metric("mappo_optimiser_steps_total", "counter", "Optimiser steps, one a minibatch"),
    Metric("mappo_episodes_total", "counter", "Episodes that ended", column="num_episodes"),
    Metric(
        "mappo_phase_seconds_total",
        "counter",
        "Time of the training thread by phase, in seconds; save is what handing checkpoints over takes",
        {"phase": ("collect", "learn", "evaluate", "save")},
        "{phase}_seconds",
    ),
    Metric(
        "mappo_frames_per_second",
        "gauge",
        "Frames a second, collecting and learning, in the last iteration",
        column="frames_per_second",
    ),
    Metric(
        "mappo_episode_return_mean",
        "gauge",
        "Mean return of the episodes that ended in the last batch in which some did, mean over agents",
        column="episode_return_mean",
    ),
    Metric("mappo_episode_return_min", "gauge", "The lowest of them", column="episode_return_min"),
    Metric("mappo_episode_return_max", "gauge", "The highest of them", column="episode_return_max"),
    Metric(
        "mappo_selection_return_mean",
        "gauge",
        "Mean return in the latest evaluation during training, by which the best checkpoint is chosen",
        column="evaluation_return_mean",
    ),
    Metric(
        "mappo_loss",
        "gauge",
        "Terms of the loss as optimised, mean over the last iteration's optimiser steps",
        {"term": ("policy", "critic", "entropy")},
        "loss_{term}",
    ),
    Metric("mappo_kl_nats", "gauge", "Approximate divergence from the collecting policy, in nats", column="kl"),
    Metric(
        "mappo_clip_fraction_ratio",
        "gauge",
        "Share of probability ratios outside 1 +- clip_epsilon, 0 to 1",
        column="clip_fraction",
    ),
    Metric("mappo_entropy_nats", "gauge", "Entropy of the collecting policy, in nats", column="entropy"),
    Metric(
        "mappo_explained_variance",
        "gauge",
        "Share of the value targets' variance that the values explain: 1 is perfect, 0 no better than a constant",
        column="explained_variance",
    ),
    Metric(
        "mappo_gradient_norm",
        "gauge",
        "Norm of the gradient before clipping, by network",
        {"network": ("policy", "critic")},
        "gradient_norm_{network}",
    ),
    Metric("mappo_learning_rate", "gauge", "Learning rate of Adam", column="learning_rate"),
    Metric(
        "mappo_last_iteration_timestamp_seconds",
        "gauge",
        "When the last iteration ended; before the first, when training began; in seconds since 1970",
    ),
    Metric(
        "mappo_stall_limit_seconds",
        "gauge",
        "Age of the last iteration from which training counts as stalled: ten times the longest so far",
    ),
    Metric(
        "mappo_last_checkpoint_timestamp_seconds",
        "gauge",
        "When the last checkpoint was saved; before the first, when training began; in seconds since 1970",
    ),
    Metric("mappo_checkpoint_bytes", "gauge", "Size of the last checkpoint"),
    Metric(
        "mappo_checkpoint_saves_total",
        "counter",
        "Checkpoints by what became of them: saved; a try failed; given up for a newer one",
        {"outcome": ("saved", "failed", "skipped")},
    ),
    Metric(
        "mappo_checkpoint_save_seconds",
        "histogram",
        "How long saving a checkpoint took, tries that failed included, beside training",
        bounds=(0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100),
    ),
    Metric(
        "mappo_store_requests_total",
        "counter",
        "Requests to the store, each try counted; missing and taken are answers, unavailable and refused failures",
        {
            "operation": ("read", "write", "create", "list", "delete"),
            "outcome": ("ok", "missing", "taken", "unavailable", "refused"),
        },
    ),
    Metric(
        "mappo_peak_memory_bytes",
        "gauge",
        "The most main memory that the process held at once",
        column="peak_memory_bytes",
    ),
    Metric(
        "mappo_peak_gpu_memory_bytes",
        "gauge",
        "The most that torch's tensors held at once on the GPU; 0 without one",
        column="peak_gpu_memory_bytes",
    ),
)

PROBLEMS = (
    Metric(
        "mappo_non_finite_total",
        "counter",
        "How often a number was not finite, which ends the stage, by where",
        {"source": ("loss", "observation", "return")},
    ),
)

OUTCOME = (
    Metric("mappo_stage_success", "gauge", "Whether the stage ended well: 1 or 0", {"stage": STAGES}),
    Metric("mappo_stage_duration_seconds", "gauge", "How long the stage took", {"stage": STAGES}),
    Metric("mappo_stage_attempts", "gauge", "Attempts of the stage so far, with this one", {"stage": STAGES}),
)

VALIDATION = (
    Metric(
        "mappo_validation_checks",
        "gauge",
        "Checks of the environment by how they went",
        {"outcome": ("passed", "warning", "failed")},
    ),
)

EVALUATION = (
    Metric("mappo_evaluation_episodes", "gauge", "Held-out episodes played", {"policy": POLICIES}),
    Metric("mappo_evaluation_return_mean", "gauge", "Mean return over them", {"policy": POLICIES}),
    Metric(
        "mappo_evaluation_return_mean_low",
        "gauge",
        "Lower end of the mean's 95 % bootstrap interval",
        {"policy": POLICIES},
    ),
    Metric(
        "mappo_evaluation_return_mean_high",
        "gauge",
        "Upper end of the mean's 95 % bootstrap interval",
        {"policy": POLICIES},
    ),
    Metric(
        "mappo_evaluation_return_interquartile_mean",
        "gauge",
        "Interquartile mean of the return over them",
        {"policy": POLICIES},
    ),
)

STUDY = (
    Metric(
        "mappo_study_trials",
        "gauge",
        "Trials of the study by state, as this worker saw it last",
        {"state": TRIAL_STATES},
    ),
    Metric("mappo_study_asked_trials", "gauge", "Trials that were asked for"),
    Metric("mappo_study_lost_workers", "gauge", "How often a worker fell silent over a trial"),
    Metric("mappo_study_best_value", "gauge", "Highest value of a completed trial: mean return on tuning seeds"),
)

METRICS = (*TRAINING, *PROBLEMS, *VALIDATION, *EVALUATION, *STUDY, *OUTCOME)
