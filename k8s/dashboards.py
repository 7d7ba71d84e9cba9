"""The Grafana dashboards, as code: one run of training in depth, and all runs side by side."""

from typing import Any

from k8s.panels import Query, bars, build, graph, number, rows, selector

_VARIABLES = ("namespace", "study", "run")
_S = selector(_VARIABLES)
# Gives a process's metrics the labels of its run. What was pushed has a stage, and is of no process.
_TRAINED_ON = f'group_left (run, study) mappo_run_info{{stage="", {_S}}}'
_RUN = "by (namespace, study, run)"


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


def fleet() -> Any:
    """All runs: what goes on, how fast, what failed, what it costs."""
    return build(
        "MAPPO fleet",
        "mappo-fleet",
        "All runs of training: what goes on, throughput, failures, cost.",
        {"Now": _now(), "Throughput": _throughput(), "Failures": _failures(), "Cost": _cost()},
    )


def tuning_study() -> Any:
    """How far a study is, what it has found, who works on it, what fails."""
    return build(
        "MAPPO tuning study",
        "mappo-tuning-study",
        "Tuning studies: trials by state, the best value, workers, failures, and what is trained now.",
        {"At a glance": _study(), "Trials": _trials(), "What is trained now": _trained_now()},
        names=("namespace", "study"),
        metric="mappo_study_asked_trials",
    )


def _last(metric: str) -> str:
    """The last value of each series in the time range."""
    return f"last_over_time({metric}{{{_S}}}[$__range])"


def _newest(expression: str) -> str:
    """Its value for each run in its newest process: that which was the last to do an iteration or to begin."""
    iterated = _last("mappo_last_iteration_timestamp_seconds")
    newest = f"{iterated} == on (namespace, study, run) group_left () max {_RUN} ({iterated})"
    return f"max {_RUN} ({expression} and on (namespace, study, run, instance, pod) ({newest}))"


def _glance() -> list[Any]:
    return [
        number(
            "Progress",
            "Share of the planned frames that are learned from, in all attempts of the run.",
            "percentunit",
            Query(
                f"max {_RUN} ({_last('mappo_run_frames')} / {_last('mappo_run_planned_frames')})",
                "{{run}}",
            ),
        ),
        number(
            "Time left",
            "At the rate of the last iteration.",
            "s",
            Query(
                _newest(
                    f"({_last('mappo_run_planned_frames')} - {_last('mappo_run_frames')}) "
                    f"/ {_last('mappo_frames_per_second')}"
                ),
                "{{run}}",
            ),
        ),
        number(
            "Return now",
            "Mean return of the episodes that ended last, mean over agents. Its scale is the task's.",
            "short",
            Query(_newest(_last("mappo_episode_return_mean")), "{{run}}"),
        ),
        number(
            "Best evaluation",
            "Highest mean return in the evaluations during training; that checkpoint is the best.",
            "short",
            Query(f"max {_RUN} (max_over_time(mappo_selection_return_mean{{{_S}}}[$__range]))", "{{run}}"),
        ),
        number(
            "Alerts firing",
            "Alerts of the selected runs that fire now; the annotation runbook of each says what to do.",
            "short",
            Query(f'count(ALERTS{{alertname=~"Mappo.*", alertstate="firing", {_S}}}) or vector(0)'),
            alarm_from=1,
        ),
        number(
            "Attempt",
            "How often training was started under the run's name: more than 1 after evictions and failures.",
            "short",
            Query(f"max {_RUN} ({_last('mappo_run_attempt')})", "{{run}}"),
        ),
    ]


def _learning() -> list[Any]:
    return [
        graph(
            "Episode return",
            "Undiscounted return of the episodes that ended in each batch, mean over agents.",
            "short",
            Query(f"mappo_episode_return_mean{{{_S}}}", "{{run}} mean"),
            Query(f"mappo_episode_return_min{{{_S}}}", "{{run}} lowest"),
            Query(f"mappo_episode_return_max{{{_S}}}", "{{run}} highest"),
            width=12,
        ),
        graph(
            "Return in evaluation",
            "Mean return of the deterministic policy in the evaluations during training, which choose the best "
            "checkpoint.",
            "short",
            Query(f"mappo_selection_return_mean{{{_S}}}", "{{run}}"),
            width=6,
        ),
        bars(
            "Held-out evaluation",
            "Mean return over held-out episodes of the evaluation stage: the trained policy beside the baselines.",
            "short",
            Query(
                f"max by (namespace, study, run, policy) ({_last('mappo_evaluation_return_mean')})",
                "{{run}} {{policy}}",
            ),
            width=6,
        ),
    ]


def _update() -> list[Any]:
    def shown(
        title: str, description: str, unit: str, metric: str, legend: str = "{{run}}", **options: Any
    ) -> Any:
        return graph(title, description, unit, Query(f"{metric}{{{_S}}}", legend), width=6, **options)

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
                f"max by (namespace, study, run, source) (mappo_non_finite_total{{{_S}}})",
                "{{run}} {{source}}",
            ),
            width=6,
            low=0,
        ),
    ]


def _time() -> list[Any]:
    phases = f"rate(mappo_phase_seconds_total{{{_S}}}[$__rate_interval])"  # they grow once an iteration
    return [
        graph(
            "Phases",
            "How collecting, learning, evaluating and handing checkpoints over share the time of training; at the "
            "ends of iterations.",
            "percentunit",
            Query(
                f"sum by (namespace, study, run, phase) ({phases}) "
                f"/ on (namespace, study, run) group_left () sum {_RUN} ({phases})",
                "{{run}} {{phase}}",
            ),
            stacked=True,
            low=0,
        ),
        graph(
            "Frames per second",
            "Of the last iteration, collecting and learning; and of everything, evaluation and pauses included.",
            "short",
            Query(f"mappo_frames_per_second{{{_S}}}", "{{run}} last iteration"),
            Query(f"sum {_RUN} (rate(mappo_frames_total{{{_S}}}[$__rate_interval]))", "{{run}} overall"),
            low=0,
        ),
        graph(
            "Age of the last iteration",
            "Training counts as stalled when this passes the limit, which is ten times the longest iteration.",
            "s",
            Query(f"time() - mappo_last_iteration_timestamp_seconds{{{_S}}}", "{{run}}"),
            Query(f"mappo_stall_limit_seconds{{{_S}}}", "{{run}} limit"),
            low=0,
        ),
        graph(
            "Optimiser steps and episodes",
            "Optimiser steps, and episodes that ended, a second.",
            "cps",
            Query(
                f"sum {_RUN} (rate(mappo_optimiser_steps_total{{{_S}}}[$__rate_interval]))",
                "{{run}} optimiser steps",
            ),
            Query(f"sum {_RUN} (rate(mappo_episodes_total{{{_S}}}[$__rate_interval]))", "{{run}} episodes"),
            low=0,
        ),
        graph(
            "CPUs",
            "CPU seconds a second of the training process.",
            "short",
            Query(
                f"rate(process_cpu_seconds_total[$__rate_interval]) * on (job, instance) {_TRAINED_ON}", "{{run}}"
            ),
            low=0,
        ),
        graph(
            "Main memory",
            "Of the training process: now, and the most it held at once.",
            "bytes",
            Query(f"process_resident_memory_bytes * on (job, instance) {_TRAINED_ON}", "{{run}}"),
            Query(f"mappo_peak_memory_bytes{{{_S}}}", "{{run}} peak"),
            low=0,
        ),
    ]


def _checkpoints() -> list[Any]:
    return [
        graph(
            "Age of the last checkpoint",
            "What training would lose if its pod ended now.",
            "s",
            Query(f"time() - mappo_last_checkpoint_timestamp_seconds{{{_S}}}", "{{run}}"),
            width=6,
            low=0,
        ),
        graph(
            "Checkpoints",
            "By what became of them, a minute: saved, a try that failed, given up for a newer one.",
            "short",
            Query(
                f"60 * sum by (namespace, study, run, outcome) "
                f"(rate(mappo_checkpoint_saves_total{{{_S}}}[$__rate_interval]))",
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
                    f"(rate(mappo_checkpoint_save_seconds_bucket{{{_S}}}[$__rate_interval])))",
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
                f"(rate(mappo_store_requests_total{{{_S}}}[$__rate_interval]))",
                "{{run}} {{outcome}}",
            ),
            width=6,
            low=0,
        ),
        number(
            "Checkpoint size",
            "Of the last checkpoint, all parts together.",
            "bytes",
            Query(f"max {_RUN} ({_last('mappo_checkpoint_bytes')})", "{{run}}"),
            width=6,
        ),
        number(
            "Saves that failed",
            "Tries to save a checkpoint that failed; each was tried again, until there was a newer one.",
            "short",
            Query(
                f'max {_RUN} (max_over_time(mappo_checkpoint_saves_total{{outcome="failed", {_S}}}[$__range]))',
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
                f"max by (namespace, study, run, stage) ({_last('mappo_stage_duration_seconds')})",
                "{{run}} {{stage}}",
            ),
            width=6,
        ),
        number(
            "Validation",
            "Checks of the environment by how they went.",
            "short",
            Query(
                f"max by (namespace, study, run, outcome) ({_last('mappo_validation_checks')})",
                "{{run}} {{outcome}}",
            ),
            width=6,
        ),
    ]


def _gpu() -> list[Any]:
    without = f"mappo_run_gpus{{{_S}}} == 0"  # a run without a GPU shows 0

    def device(metric: str) -> str:
        """A metric of dcgm-exporter for the selected runs, whichever label names the pod."""
        kept = f'label_replace({metric}{{exported_pod!=""}}, "pod", "$1", "exported_pod", "(.*)")'
        named = f'label_replace({kept}, "namespace", "$1", "exported_namespace", "(.*)")'
        each = f'avg by (namespace, pod) ({named} or {metric}{{exported_pod=""}})'
        return f"{each} * on (namespace, pod) {_TRAINED_ON}"

    def shown(title: str, description: str, unit: str, expression: str) -> Any:
        return graph(title, description, unit, Query(expression, "{{run}}"), width=6, low=0)

    return [
        shown(
            "GPU utilisation",
            "Share of time in which the GPU of a run computes something; from dcgm-exporter. 0 without a GPU.",
            "percentunit",
            f"run:mappo_gpu_utilisation:ratio{{{_S}}} or {without}",
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
            f"mappo_peak_gpu_memory_bytes{{{_S}}}",
        ),
        shown(
            "GPU power",
            "From dcgm-exporter. 0 without a GPU.",
            "watt",
            f"{device('DCGM_FI_DEV_POWER_USAGE')} or {without}",
        ),
    ]


def _now() -> list[Any]:
    return [
        number(
            "Training now",
            "Runs whose process answers and has not ended.",
            "short",
            Query(f"sum(run:mappo_run_active:max{{{_S}}}) or vector(0)"),
            width=6,
        ),
        number(
            "GPUs in use",
            "By runs that train now.",
            "short",
            Query(f"sum(mappo_run_gpus{{{_S}}}) or vector(0)"),
            width=6,
        ),
        number(
            "Alerts firing",
            "Alerts of the selected runs that fire now.",
            "short",
            Query(f'count(ALERTS{{alertname=~"Mappo.*", alertstate="firing", {_S}}}) or vector(0)'),
            width=6,
            alarm_from=1,
        ),
        number(
            "Runs",
            "That trained within the time range of the dashboard.",
            "short",
            Query(f"count(count {_RUN} ({_last('mappo_run_info')}))"),
            width=6,
        ),
        rows(
            "Runs",
            "Every run of the time range, with the latest numbers of its newest process.",
            [
                ("Frames", "short", f"max {_RUN} ({_last('mappo_run_frames')})"),
                ("Planned frames", "short", _newest(_last("mappo_run_planned_frames"))),
                ("Return", "short", _newest(_last("mappo_episode_return_mean"))),
                ("Return in evaluation", "short", _newest(_last("mappo_selection_return_mean"))),
                ("Frames per second", "short", _newest(_last("mappo_frames_per_second"))),
                ("Attempt", "short", f"max {_RUN} ({_last('mappo_run_attempt')})"),
            ],
        ),
    ]


def _throughput() -> list[Any]:
    return [
        graph(
            "Frames per second",
            "Of each run, mean over five minutes.",
            "short",
            Query(f"run:mappo_frames:rate5m{{{_S}}}", "{{run}}"),
            low=0,
        ),
        graph(
            "Frames per second by study",
            "All runs of a study together.",
            "short",
            Query(f"sum by (namespace, study) (run:mappo_frames:rate5m{{{_S}}})", "{{namespace}} {{study}}"),
            stacked=True,
            low=0,
        ),
        bars(
            "Best returns",
            "The ten runs with the highest mean return in an evaluation during training.",
            "short",
            Query(
                f"topk(10, max {_RUN} (max_over_time(mappo_selection_return_mean{{{_S}}}[$__range])))", "{{run}}"
            ),
        ),
    ]


def _failures() -> list[Any]:
    return [
        graph(
            "Runs by state",
            "How many processes are in each state.",
            "short",
            Query(f"sum by (state) (mappo_run_state{{{_S}}})", "{{state}}"),
            width=6,
            stacked=True,
            low=0,
        ),
        number(
            "Stages that failed",
            "Within the time range.",
            "short",
            Query(
                f"count(min by (namespace, study, run, stage) "
                f"(min_over_time(mappo_stage_success{{{_S}}}[$__range])) == 0) or vector(0)"
            ),
            width=6,
            alarm_from=1,
        ),
        bars(
            "Restarts",
            "Attempts beyond the first of each run.",
            "short",
            Query(f"max {_RUN} ({_last('mappo_run_attempt')}) - 1", "{{run}}"),
            width=6,
        ),
        graph(
            "Store requests that fail",
            "A second, by run.",
            "reqps",
            Query(
                f'sum {_RUN} (rate(mappo_store_requests_total{{outcome=~"unavailable|refused", {_S}}}'
                "[$__rate_interval]))",
                "{{run}}",
            ),
            width=6,
            low=0,
        ),
    ]


def _cost() -> list[Any]:
    hours = "[$__range:15s]) * 15 / 3600"  # a sample every 15 s, which a shorter process may slip through
    return [
        number(
            "GPU-hours",
            "Over the time range: GPUs that processes trained on, times how long they did.",
            "short",
            Query(f"sum(sum_over_time(mappo_run_gpus{{{_S}}}{hours}) or vector(0)"),
            width=6,
        ),
        number(
            "Training hours",
            "Over the time range: of all processes together, with or without a GPU.",
            "short",
            Query(f"sum(count_over_time(mappo_run_gpus{{{_S}}}{hours}) or vector(0)"),
            width=6,
        ),
        bars(
            "GPU-hours by study",
            "Over the time range.",
            "short",
            Query(
                f"sum by (namespace, study) (sum_over_time(mappo_run_gpus{{{_S}}}{hours}) "
                f"or 0 * sum by (namespace, study) ({_last('mappo_run_gpus')})",
                "{{namespace}} {{study}}",
            ),
            width=6,
        ),
        graph(
            "GPU utilisation",
            "Mean over the runs that have a GPU; from dcgm-exporter. 0 where no run has one.",
            "percentunit",
            Query(f"avg(run:mappo_gpu_utilisation:ratio{{{_S}}}) or avg(mappo_run_gpus{{{_S}}} == 0)", "mean"),
            width=6,
            low=0,
        ),
    ]


_T = selector(("namespace", "study"))
_STUDY = "by (namespace, study)"  # each worker shows the whole study, as it saw it last


def _of_study(metric: str, more: str = "") -> str:
    return f"max {_STUDY} (last_over_time({metric}{{{more}{_T}}}[$__range]))"


def _study() -> list[Any]:
    done = 'state=~"complete|pruned|failed", '
    ended = f"sum {_STUDY} (max by (namespace, study, state) ({{}}(mappo_study_trials{{{{{done}{_T}}}}}[{{}}])))"
    return [
        number(
            "Progress",
            "Share of the trials that were asked for which have ended.",
            "percentunit",
            Query(
                f"{ended.format('last_over_time', '$__range')} / {_of_study('mappo_study_asked_trials')}",
                "{{study}}",
            ),
        ),
        number(
            "Best value",
            "Highest mean return of a completed trial on tuning seeds; the highest of many promises too much.",
            "short",
            Query(_of_study("mappo_study_best_value"), "{{study}}"),
        ),
        number(
            "Workers",
            "Processes that work on the study now.",
            "short",
            Query(f"count {_STUDY} (mappo_study_asked_trials{{{_T}}})", "{{study}}"),
        ),
        number(
            "Trials in the last hour",
            "That ended, in whichever way.",
            "short",
            Query(
                f"{ended.format('max_over_time', '1h')} - "
                + ended.format("min_over_time", "1h").replace("(max by", "(min by"),
                "{{study}}",
            ),
        ),
        number(
            "Failed trials",
            "`mappo study show` lists the reasons.",
            "short",
            Query(_of_study("mappo_study_trials", 'state="failed", '), "{{study}}"),
            alarm_from=3,
        ),
        number(
            "Workers lost",
            "How often a trial was taken from a worker that had fallen silent.",
            "short",
            Query(_of_study("mappo_study_lost_workers"), "{{study}}"),
            alarm_from=3,
        ),
    ]


def _trials() -> list[Any]:
    return [
        graph(
            "Trials by state",
            "Of the whole study.",
            "short",
            Query(
                f"max by (namespace, study, state) (mappo_study_trials{{{_T}}})",
                "{{study}} {{state}}",
            ),
            width=12,
            stacked=True,
            low=0,
        ),
        graph(
            "Best value over time",
            "Highest mean return on tuning seeds so far.",
            "short",
            Query(f"max {_STUDY} (mappo_study_best_value{{{_T}}})", "{{study}}"),
            width=12,
        ),
    ]


def _trained_now() -> list[Any]:
    return [
        graph(
            "Return in evaluation",
            "Of the trials that are trained now, during training; what pruning looks at.",
            "short",
            Query(f"mappo_selection_return_mean{{{_T}}}", "{{run}}"),
            width=12,
        ),
        graph(
            "Frames per second",
            "Of each worker, collecting and learning.",
            "short",
            Query(f"mappo_frames_per_second{{{_T}}}", "{{run}}"),
            width=6,
            low=0,
        ),
        graph(
            "Alerts firing",
            "Of the study and its runs.",
            "short",
            Query(
                f'count by (alertname) (ALERTS{{alertname=~"Mappo.*", alertstate="firing", {_T}}}) or vector(0)',
                "{{alertname}}",
            ),
            width=6,
            low=0,
        ),
    ]
