"""The dashboard of one training run."""

from typing import Any

from k8s.dashboards.panels import Query, bars, build, graph, number
from k8s.dashboards.queries import RUN, TRAINED_ON, S, last, newest


def training_run() -> Any:
    """Is it learning, is it healthy, where does time go, are checkpoints saved, is the GPU busy."""
    return build(
        "MAPPO training run",
        "mappo-training-run",
        "One run of training: learning, health, time, checkpoints, hardware.",
        {
            "At a glance": _glance(),
            "Is it learning?": _learning(),
            "Is the update healthy?": _update(),
            "Where does time go?": _time(),
            "Checkpoints and store": _checkpoints(),
            "GPU": _gpu(),
        },
    )


def _glance() -> list[Any]:
    return [
        number(
            "Progress",
            "Share of the planned frames that are learned from, in all attempts of the run.",
            "percentunit",
            Query(
                f"max {RUN} ({last('mappo_run_frames')} / {last('mappo_run_planned_frames')})",
                "{{run}}",
            ),
        ),
        number(
            "Time left",
            "At the rate of the last iteration.",
            "s",
            Query(
                newest(
                    f"({last('mappo_run_planned_frames')} - {last('mappo_run_frames')}) "
                    f"/ {last('mappo_frames_per_second')}"
                ),
                "{{run}}",
            ),
        ),
        number(
            "Return now",
            "Mean return of the episodes that ended last, mean over agents. Its scale is the task's.",
            "short",
            Query(newest(last("mappo_episode_return_mean")), "{{run}}"),
        ),
        number(
            "Best evaluation",
            "Highest mean return in the evaluations during training; that checkpoint is the best.",
            "short",
            Query(f"max {RUN} (max_over_time(mappo_selection_return_mean{{{S}}}[$__range]))", "{{run}}"),
        ),
        number(
            "Alerts firing",
            "Alerts of the selected runs that fire now; the annotation runbook of each says what to do.",
            "short",
            Query(f'count(ALERTS{{alertname=~"Mappo.*", alertstate="firing", {S}}}) or vector(0)'),
            alarm_from=1,
        ),
        number(
            "Attempt",
            "How often training was started under the run's name: more than 1 after evictions and failures.",
            "short",
            Query(f"max {RUN} ({last('mappo_run_attempt')})", "{{run}}"),
        ),
    ]


def _learning() -> list[Any]:
    return [
        graph(
            "Episode return",
            "Undiscounted return of the episodes that ended in each batch, mean over agents.",
            "short",
            Query(f"mappo_episode_return_mean{{{S}}}", "{{run}} mean"),
            Query(f"mappo_episode_return_min{{{S}}}", "{{run}} lowest"),
            Query(f"mappo_episode_return_max{{{S}}}", "{{run}} highest"),
            width=12,
        ),
        graph(
            "Return in evaluation",
            "Mean return of the deterministic policy in the evaluations during training, which choose the best "
            "checkpoint.",
            "short",
            Query(f"mappo_selection_return_mean{{{S}}}", "{{run}}"),
            width=6,
        ),
        bars(
            "Held-out evaluation",
            "Mean return over held-out episodes of the evaluation stage: the trained policy beside the baselines.",
            "short",
            Query(
                f"max by (namespace, study, run, policy) ({last('mappo_evaluation_return_mean')})",
                "{{run}} {{policy}}",
            ),
            width=6,
        ),
    ]


def _update() -> list[Any]:
    def shown(
        title: str, description: str, unit: str, metric: str, legend: str = "{{run}}", **options: Any
    ) -> Any:
        return graph(title, description, unit, Query(f"{metric}{{{S}}}", legend), width=6, **options)

    return [
        shown(
            "Losses",
            "Terms of the loss as optimised, mean over an iteration.",
            "short",
            "mappo_loss",
            "{{run}} {{term}}",
        ),
        shown(
            "Divergence (KL)",
            "Approximate divergence of the new from the collecting policy. Above 0.05, steps are too large: lower "
            "the learning rate or the epochs, or set target_kl.",
            "none",
            "mappo_kl_nats",
        ),
        shown(
            "Clip fraction",
            "Share of probability ratios outside the trust region. 0.1 to 0.3 is usual.",
            "percentunit",
            "mappo_clip_fraction_ratio",
            low=0,
        ),
        shown(
            "Entropy",
            "Of the collecting policy, in nats. It falls while the policy becomes certain; a sudden fall with a "
            "low return means too little exploration.",
            "none",
            "mappo_entropy_nats",
        ),
        shown(
            "Explained variance",
            "Share of the value targets' variance that the critic explains: 1 is perfect, below 0 worse than a "
            "constant.",
            "none",
            "mappo_explained_variance",
        ),
        shown(
            "Gradient norms",
            "Before clipping, mean over an iteration.",
            "none",
            "mappo_gradient_norm",
            "{{run}} {{network}}",
            low=0,
        ),
        shown("Learning rate", "Of Adam.", "sci", "mappo_learning_rate", low=0),
        graph(
            "Numbers that are not finite",
            "Losses, observations or returns that were NaN or infinite; each ends its stage.",
            "short",
            Query(
                f"max by (namespace, study, run, source) (mappo_non_finite_total{{{S}}})",
                "{{run}} {{source}}",
            ),
            width=6,
            low=0,
        ),
    ]


def _time() -> list[Any]:
    phases = f"rate(mappo_phase_seconds_total{{{S}}}[$__rate_interval])"  # they grow once an iteration
    return [
        graph(
            "Phases",
            "How collecting, learning, evaluating and handing checkpoints over share the time of training; at the "
            "ends of iterations.",
            "percentunit",
            Query(
                f"sum by (namespace, study, run, phase) ({phases}) "
                f"/ on (namespace, study, run) group_left () sum {RUN} ({phases})",
                "{{run}} {{phase}}",
            ),
            stacked=True,
            low=0,
        ),
        graph(
            "Frames per second",
            "Of the last iteration, collecting and learning; and of everything, evaluation and pauses included.",
            "short",
            Query(f"mappo_frames_per_second{{{S}}}", "{{run}} last iteration"),
            Query(f"sum {RUN} (rate(mappo_frames_total{{{S}}}[$__rate_interval]))", "{{run}} overall"),
            low=0,
        ),
        graph(
            "Age of the last iteration",
            "Training counts as stalled when this passes the limit, which is ten times the longest iteration.",
            "s",
            Query(f"time() - mappo_last_iteration_timestamp_seconds{{{S}}}", "{{run}}"),
            Query(f"mappo_stall_limit_seconds{{{S}}}", "{{run}} limit"),
            low=0,
        ),
        graph(
            "Optimiser steps and episodes",
            "Optimiser steps, and episodes that ended, a second.",
            "cps",
            Query(
                f"sum {RUN} (rate(mappo_optimiser_steps_total{{{S}}}[$__rate_interval]))",
                "{{run}} optimiser steps",
            ),
            Query(f"sum {RUN} (rate(mappo_episodes_total{{{S}}}[$__rate_interval]))", "{{run}} episodes"),
            low=0,
        ),
        graph(
            "CPUs",
            "CPU seconds a second of the training process.",
            "short",
            Query(
                f"rate(process_cpu_seconds_total[$__rate_interval]) * on (job, instance) {TRAINED_ON}", "{{run}}"
            ),
            low=0,
        ),
        graph(
            "Main memory",
            "Of the training process: now, and the most it held at once.",
            "bytes",
            Query(f"process_resident_memory_bytes * on (job, instance) {TRAINED_ON}", "{{run}}"),
            Query(f"mappo_peak_memory_bytes{{{S}}}", "{{run}} peak"),
            low=0,
        ),
    ]


def _checkpoints() -> list[Any]:
    return [
        graph(
            "Age of the last checkpoint",
            "What training would lose if its pod ended now.",
            "s",
            Query(f"time() - mappo_last_checkpoint_timestamp_seconds{{{S}}}", "{{run}}"),
            width=6,
            low=0,
        ),
        graph(
            "Checkpoints",
            "By what became of them, a minute: saved, a try that failed, given up for a newer one.",
            "short",
            Query(
                f"60 * sum by (namespace, study, run, outcome) "
                f"(rate(mappo_checkpoint_saves_total{{{S}}}[$__rate_interval]))",
                "{{run}} {{outcome}}",
            ),
            width=6,
            low=0,
        ),
        graph(
            "Time to save",
            "How long saving takes, beside training: median and 95 % quantile, from buckets.",
            "s",
            *(
                Query(
                    f"histogram_quantile({quantile}, sum by (namespace, study, run, le) "
                    f"(rate(mappo_checkpoint_save_seconds_bucket{{{S}}}[$__rate_interval])))",
                    f"{{{{run}}}} {name}",
                )
                for quantile, name in ((0.5, "median"), (0.95, "95 %"))
            ),
            width=6,
            low=0,
        ),
        graph(
            "Store requests",
            "A second, by outcome. unavailable and refused are failures; missing and taken are answers.",
            "reqps",
            Query(
                f"sum by (namespace, study, run, outcome) "
                f"(rate(mappo_store_requests_total{{{S}}}[$__rate_interval]))",
                "{{run}} {{outcome}}",
            ),
            width=6,
            low=0,
        ),
        number(
            "Checkpoint size",
            "Of the last checkpoint, all parts together.",
            "bytes",
            Query(f"max {RUN} ({last('mappo_checkpoint_bytes')})", "{{run}}"),
            width=6,
        ),
        number(
            "Saves that failed",
            "Tries to save a checkpoint that failed; each was tried again, until there was a newer one.",
            "short",
            Query(
                f'max {RUN} (max_over_time(mappo_checkpoint_saves_total{{outcome="failed", {S}}}[$__range]))',
                "{{run}}",
            ),
            width=6,
            alarm_from=1,
        ),
        number(
            "Stages",
            "How long each stage took, as pushed by short stages and left by training at its end.",
            "s",
            Query(
                f"max by (namespace, study, run, stage) ({last('mappo_stage_duration_seconds')})",
                "{{run}} {{stage}}",
            ),
            width=6,
        ),
        number(
            "Validation",
            "Checks of the environment by how they went.",
            "short",
            Query(
                f"max by (namespace, study, run, outcome) ({last('mappo_validation_checks')})",
                "{{run}} {{outcome}}",
            ),
            width=6,
        ),
    ]


def _gpu() -> list[Any]:
    without = f"mappo_run_gpus{{{S}}} == 0"  # a run without a GPU shows 0

    def device(metric: str) -> str:
        """A metric of dcgm-exporter for the selected runs, whichever label names the pod."""
        kept = f'label_replace({metric}{{exported_pod!=""}}, "pod", "$1", "exported_pod", "(.*)")'
        named = f'label_replace({kept}, "namespace", "$1", "exported_namespace", "(.*)")'
        each = f'avg by (namespace, pod) ({named} or {metric}{{exported_pod=""}})'
        return f"{each} * on (namespace, pod) {TRAINED_ON}"

    def shown(title: str, description: str, unit: str, expression: str) -> Any:
        return graph(title, description, unit, Query(expression, "{{run}}"), width=6, low=0)

    return [
        shown(
            "GPU utilisation",
            "Share of time in which the GPU of a run computes something; from dcgm-exporter. 0 without a GPU.",
            "percentunit",
            f"run:mappo_gpu_utilisation:ratio{{{S}}} or {without}",
        ),
        shown(
            "GPU memory in use",
            "Of the whole device, from dcgm-exporter. 0 without a GPU.",
            "bytes",
            f"1024 * 1024 * {device('DCGM_FI_DEV_FB_USED')} or {without}",
        ),
        shown(
            "GPU memory of torch",
            "The most that torch's tensors held at once. 0 without a GPU.",
            "bytes",
            f"mappo_peak_gpu_memory_bytes{{{S}}}",
        ),
        shown(
            "GPU power",
            "From dcgm-exporter. 0 without a GPU.",
            "watt",
            f"{device('DCGM_FI_DEV_POWER_USAGE')} or {without}",
        ),
    ]
