"""The dashboard of one training run."""

from typing import Any

from k8s.dashboards.panels import Query, bars, build, graph, number
from k8s.dashboards.queries import RUN, TRAINED_ON, S, last, newest


def training_run() -> Any:
    """Return the dashboard of one run: learning, health, time, checkpoints and hardware."""
    return build(
        "MAPPO training run",
        "mappo-training-run",
        "One training run: learning, health, time, checkpoints and hardware.",
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
            "Share of the planned frames that the run has trained on, in all attempts.",
            "percentunit",
            Query(
                f"max {RUN} ({last('mappo_run_frames')} / {last('mappo_run_planned_frames')})",
                "{{run}}",
            ),
        ),
        number(
            "Time left",
            "Estimated time to the end of training, at the speed of the last iteration.",
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
            "Current return",
            "Mean return of the latest completed episodes, averaged over agents. The scale depends on the task.",
            "short",
            Query(newest(last("mappo_episode_return_mean")), "{{run}}"),
        ),
        number(
            "Best evaluation",
            "Highest mean return of the evaluations during training; it selects the best checkpoint.",
            "short",
            Query(f"max {RUN} (max_over_time(mappo_selection_return_mean{{{S}}}[$__range]))", "{{run}}"),
        ),
        number(
            "Alerts firing",
            "Alerts of the selected runs that are firing. The annotation `runbook` has the steps to take.",
            "short",
            Query(f'count(ALERTS{{alertname=~"Mappo.*", alertstate="firing", {S}}}) or vector(0)'),
            alarm_from=1,
        ),
        number(
            "Attempt",
            "Number of the current attempt: more than 1 after evictions and failures.",
            "short",
            Query(f"max {RUN} ({last('mappo_run_attempt')})", "{{run}}"),
        ),
    ]


def _learning() -> list[Any]:
    return [
        graph(
            "Episode return",
            "Undiscounted return of the episodes that ended in each batch, averaged over agents.",
            "short",
            Query(f"mappo_episode_return_mean{{{S}}}", "{{run}} mean"),
            Query(f"mappo_episode_return_min{{{S}}}", "{{run}} lowest"),
            Query(f"mappo_episode_return_max{{{S}}}", "{{run}} highest"),
            width=12,
        ),
        graph(
            "Return in evaluation",
            "Mean return of the deterministic policy in the evaluations during training. These evaluations select "
            "the best checkpoint.",
            "short",
            Query(f"mappo_selection_return_mean{{{S}}}", "{{run}}"),
            width=6,
        ),
        bars(
            "Held-out evaluation",
            "Mean return over the held-out episodes of the evaluation stage: trained policy and baselines.",
            "short",
            Query(
                f"max by (namespace, study, run, policy) ({last('mappo_evaluation_return_mean')})",
                "{{run}} {{policy}}",
            ),
            width=6,
        ),
        graph(
            "Measurements in evaluation",
            "Mean over each evaluation during training of what info() measures, such as collisions. Compiled "
            "evaluations measure nothing.",
            "short",
            Query(f"mappo_selection_measurement_mean{{{S}}}", "{{run}} {{measurement}}"),
            width=24,
        ),
        bars(
            "Measurements",
            "Mean over the held-out episodes of the evaluation stage of what info() measures; each is the "
            " last, the sum, the mean or the maximum of an episode.",
            "short",
            Query(
                f"max by (namespace, study, run, policy, measurement, reduction) "
                f"({last('mappo_evaluation_measurement_mean')})",
                "{{run}} {{policy}} {{measurement}} {{reduction}}",
            ),
            width=24,
        ),
    ]


def _update() -> list[Any]:
    def panel(
        title: str, description: str, unit: str, metric: str, legend: str = "{{run}}", **options: Any
    ) -> Any:
        return graph(title, description, unit, Query(f"{metric}{{{S}}}", legend), width=6, **options)

    return [
        panel(
            "Losses",
            "Terms of the optimised loss, averaged over an iteration.",
            "short",
            "mappo_loss",
            "{{run}} {{term}}",
        ),
        panel(
            "Divergence (KL)",
            "Approximate KL divergence of the new policy from the collecting policy. Above 0.05, steps are too "
            "large: lower the learning rate or the epochs, or set target_kl.",
            "none",
            "mappo_kl_nats",
        ),
        panel(
            "Clip fraction",
            "Share of probability ratios outside the trust region. Values from 0.1 to 0.3 are normal.",
            "percentunit",
            "mappo_clip_fraction_ratio",
            low=0,
        ),
        panel(
            "Entropy",
            "Entropy of the collecting policy, in nats. It falls while the policy becomes certain. A sudden "
            "fall with a low return means too little exploration.",
            "none",
            "mappo_entropy_nats",
        ),
        panel(
            "Explained variance",
            "Share of the variance of the value targets that the critic explains: 1 is perfect, below 0 is worse "
            "than a constant.",
            "none",
            "mappo_explained_variance",
        ),
        panel(
            "Gradient norms",
            "Norm of the gradient before clipping, averaged over an iteration.",
            "none",
            "mappo_gradient_norm",
            "{{run}} {{network}}",
            low=0,
        ),
        panel("Learning rate", "Learning rate of Adam.", "sci", "mappo_learning_rate", low=0),
        graph(
            "Non-finite numbers",
            "Losses, observations or returns that were NaN or infinite. Such a number ends its stage.",
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
    phases = f"rate(mappo_phase_seconds_total{{{S}}}[$__rate_interval])"  # the counters grow once per iteration
    return [
        graph(
            "Phases",
            "Share of the training time that each phase takes: collecting, learning, evaluating, and handing "
            "checkpoints to the saver. The values change at the end of each iteration.",
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
            "Speed of collecting and learning in the last iteration; overall speed with evaluation and pauses.",
            "short",
            Query(f"mappo_frames_per_second{{{S}}}", "{{run}} last iteration"),
            Query(f"sum {RUN} (rate(mappo_frames_total{{{S}}}[$__rate_interval]))", "{{run}} overall"),
            low=0,
        ),
        graph(
            "Age of the last iteration",
            "Training counts as stalled above the limit, which is ten times the longest iteration.",
            "s",
            Query(f"time() - mappo_last_iteration_timestamp_seconds{{{S}}}", "{{run}}"),
            Query(f"mappo_stall_limit_seconds{{{S}}}", "{{run}} limit"),
            low=0,
        ),
        graph(
            "Optimiser steps and episodes",
            "Optimiser steps per second, and completed episodes per second.",
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
            "Number of CPUs that the training process keeps busy (CPU seconds per second).",
            "short",
            Query(
                f"rate(process_cpu_seconds_total[$__rate_interval]) * on (job, instance) {TRAINED_ON}", "{{run}}"
            ),
            low=0,
        ),
        graph(
            "Main memory",
            "Main memory of the training process: current and peak.",
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
            "Training time that would be lost if the pod ended at this moment.",
            "s",
            Query(f"time() - mappo_last_checkpoint_timestamp_seconds{{{S}}}", "{{run}}"),
            width=6,
            low=0,
        ),
        graph(
            "Checkpoints",
            "Attempts to save a checkpoint per minute, by outcome: saved, failed, or skipped for a newer one.",
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
            "Time to save a checkpoint in the background: median and 95 % quantile, estimated from buckets.",
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
            "Requests to the store per second, by outcome. unavailable and refused are failures; missing and "
            "taken are answers.",
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
            "Size of the last checkpoint with all parts.",
            "bytes",
            Query(f"max {RUN} ({last('mappo_checkpoint_bytes')})", "{{run}}"),
            width=6,
        ),
        number(
            "Failed saves",
            "Failed attempts to save a checkpoint. The saver retries until a newer checkpoint replaces it.",
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
            "Duration of each stage. Short stages push it; training exports it at its end.",
            "s",
            Query(
                f"max by (namespace, study, run, stage) ({last('mappo_stage_duration_seconds')})",
                "{{run}} {{stage}}",
            ),
            width=6,
        ),
        number(
            "Validation",
            "Checks of the environment by outcome.",
            "short",
            Query(
                f"max by (namespace, study, run, outcome) ({last('mappo_validation_checks')})",
                "{{run}} {{outcome}}",
            ),
            width=6,
        ),
    ]


def _gpu() -> list[Any]:
    no_gpu = f"mappo_run_gpus{{{S}}} == 0"  # shows 0 for a run without a GPU

    def device(metric: str) -> str:
        """Return a metric of dcgm-exporter for the selected runs.

        The pod is in the label `pod`, or in `exported_pod` if Prometheus keeps a label of its own.
        """
        with_pod = f'label_replace({metric}{{exported_pod!=""}}, "pod", "$1", "exported_pod", "(.*)")'
        renamed = f'label_replace({with_pod}, "namespace", "$1", "exported_namespace", "(.*)")'
        by_pod = f'avg by (namespace, pod) ({renamed} or {metric}{{exported_pod=""}})'
        return f"{by_pod} * on (namespace, pod) {TRAINED_ON}"

    def panel(title: str, description: str, unit: str, expression: str) -> Any:
        return graph(title, description, unit, Query(expression, "{{run}}"), width=6, low=0)

    return [
        panel(
            "GPU utilisation",
            "Share of time in which the GPU of a run is busy, from dcgm-exporter. 0 without a GPU.",
            "percentunit",
            f"run:mappo_gpu_utilisation:ratio{{{S}}} or {no_gpu}",
        ),
        panel(
            "GPU memory in use",
            "Memory in use on the whole device, from dcgm-exporter. 0 without a GPU.",
            "bytes",
            f"1024 * 1024 * {device('DCGM_FI_DEV_FB_USED')} or {no_gpu}",
        ),
        panel(
            "GPU memory of torch",
            "Peak memory of torch's tensors. 0 without a GPU.",
            "bytes",
            f"mappo_peak_gpu_memory_bytes{{{S}}}",
        ),
        panel(
            "GPU power",
            "Power of the GPU, from dcgm-exporter. 0 without a GPU.",
            "watt",
            f"{device('DCGM_FI_DEV_POWER_USAGE')} or {no_gpu}",
        ),
    ]
