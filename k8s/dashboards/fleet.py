"""The dashboard of all runs of a cluster."""

from typing import Any

from k8s.dashboards.panels import Query, bars, build, graph, number, rows
from k8s.dashboards.queries import NAMESPACE, RUN, S, last, newest


def fleet() -> Any:
    """Return the dashboard of all runs: activity, throughput, failures and cost."""
    return build(
        "MAPPO fleet",
        "mappo-fleet",
        "All training runs: activity, throughput, failures and cost.",
        {
            "Now": _now(),
            "Throughput": _throughput(),
            "Failures": _failures(),
            "Pipeline runs and schedules": _pipelines(),
            "Cost": _cost(),
        },
    )


def _now() -> list[Any]:
    return [
        number(
            "Active runs",
            "Runs whose training process answers and has not ended.",
            "short",
            Query(f"sum(run:mappo_run_active:max{{{S}}}) or vector(0)"),
            width=6,
        ),
        number(
            "GPUs in use",
            "GPUs on which active runs train.",
            "short",
            Query(f"sum(mappo_run_gpus{{{S}}}) or vector(0)"),
            width=6,
        ),
        number(
            "Alerts firing",
            "Alerts of the selected runs that are firing.",
            "short",
            Query(f'count(ALERTS{{alertname=~"Mappo.*", alertstate="firing", {S}}}) or vector(0)'),
            width=6,
            alarm_from=1,
        ),
        number(
            "Runs",
            "Runs that trained within the time range of the dashboard.",
            "short",
            Query(f"count(count {RUN} ({last('mappo_run_info')}))"),
            width=6,
        ),
        rows(
            "Runs",
            "Every run of the time range, with the latest values of its newest process.",
            [
                ("Frames", "short", f"max {RUN} ({last('mappo_run_frames')})"),
                ("Planned frames", "short", newest(last("mappo_run_planned_frames"))),
                ("Return", "short", newest(last("mappo_episode_return_mean"))),
                ("Return in evaluation", "short", newest(last("mappo_selection_return_mean"))),
                ("Frames per second", "short", newest(last("mappo_frames_per_second"))),
                ("Attempt", "short", f"max {RUN} ({last('mappo_run_attempt')})"),
            ],
        ),
    ]


def _throughput() -> list[Any]:
    return [
        graph(
            "Frames per second",
            "Frames per second of each run, averaged over five minutes.",
            "short",
            Query(f"run:mappo_frames:rate5m{{{S}}}", "{{run}}"),
            low=0,
        ),
        graph(
            "Frames per second by study",
            "Frames per second of all runs of a study together.",
            "short",
            Query(f"sum by (namespace, study) (run:mappo_frames:rate5m{{{S}}})", "{{namespace}} {{study}}"),
            stacked=True,
            low=0,
        ),
        bars(
            "Best returns",
            "The ten runs with the highest mean return in an evaluation during training.",
            "short",
            Query(f"topk(10, max {RUN} (max_over_time(mappo_selection_return_mean{{{S}}}[$__range])))", "{{run}}"),
        ),
    ]


def _failures() -> list[Any]:
    return [
        graph(
            "Runs by state",
            "Number of training processes in each state.",
            "short",
            Query(f"sum by (state) (mappo_run_state{{{S}}})", "{{state}}"),
            width=6,
            stacked=True,
            low=0,
        ),
        number(
            "Failed stages",
            "Stages that failed within the time range.",
            "short",
            Query(
                f"count(min by (namespace, study, run, stage) "
                f"(min_over_time(mappo_stage_success{{{S}}}[$__range])) == 0) or vector(0)"
            ),
            width=6,
            alarm_from=1,
        ),
        bars(
            "Restarts",
            "Attempts of each run after the first attempt.",
            "short",
            Query(f"max {RUN} ({last('mappo_run_attempt')}) - 1", "{{run}}"),
            width=6,
        ),
        graph(
            "Failed store requests",
            "Failed requests to the store per second, by run.",
            "reqps",
            Query(
                f'sum {RUN} (rate(mappo_store_requests_total{{outcome=~"unavailable|refused", {S}}}'
                "[$__rate_interval]))",
                "{{run}}",
            ),
            width=6,
            low=0,
        ),
    ]


def _pipelines() -> list[Any]:
    by_stage, by_reason = "by (namespace, stage)", "by (stage, reason)"
    return [
        number(
            "Kubeflow answers",
            "1 if the last poll of Kubeflow succeeded, else 0. At 0, the other panels of this row have gaps.",
            "short",
            Query(f"min(mappo_kubeflow_up{{{NAMESPACE}}})"),
        ),
        number(
            "Late schedules",
            "Schedules of which a run is due for more than five minutes and has not started.",
            "short",
            Query(f"count(mappo_schedule_late_seconds{{{NAMESPACE}}} > 300) or vector(0)"),
            alarm_from=1,
        ),
        graph(
            "Pipeline runs by state",
            "Runs that have not ended, and runs created in the last 24 hours.",
            "short",
            Query(f"sum by (state) (mappo_pipeline_runs{{{NAMESPACE}}})", "{{state}}"),
            stacked=True,
            low=0,
        ),
        bars(
            "Failed stages by reason",
            "Stages of pipeline runs that failed within the time range, after all their attempts.",
            "short",
            Query(
                f"sum {by_reason} (increase(mappo_pipeline_stage_failures_total{{{NAMESPACE}}}[$__range])) > 0 "
                f"or sum(increase(mappo_pipeline_stage_failures_total{{{NAMESPACE}}}[$__range]))",
                "{{stage}} {{reason}}",
            ),
        ),
        graph(
            "Waiting now",
            "The longest time for which a stage has now waited for its pod to start.",
            "s",
            Query(f"max {by_stage} (mappo_pipeline_waiting_seconds{{{NAMESPACE}}})", "{{stage}}"),
            low=0,
        ),
        bars(
            "Queue time",
            "Mean time within the time range from the creation of a stage's pod until a poll saw the stage run.",
            "s",
            Query(_mean("mappo_pipeline_queue_seconds"), "{{stage}}"),
        ),
        bars(
            "Stage time",
            "Mean time of the stages that succeeded within the time range, with the time in the queue.",
            "s",
            Query(_mean("mappo_pipeline_stage_seconds"), "{{stage}}"),
        ),
        graph(
            "Lateness of schedules",
            "Time since the first run of a schedule that is due and has not started.",
            "s",
            Query(f"max by (namespace, schedule) (mappo_schedule_late_seconds{{{NAMESPACE}}})", "{{schedule}}"),
            width=24,
            low=0,
        ),
    ]


def _mean(histogram: str) -> str:
    """Return an expression for the mean of a histogram's values within the time range, by stage."""
    sums = [f"sum by (stage) (increase({histogram}_{part}{{{NAMESPACE}}}[$__range]))" for part in ("sum", "count")]
    return f"{sums[0]} / ({sums[1]} > 0)"


def _cost() -> list[Any]:
    hours = "[$__range:15s]) * 15 / 3600"  # one sample every 15 s; a shorter process may be missed
    return [
        number(
            "GPU-hours",
            "Hours of training on GPUs within the time range, summed over GPUs.",
            "short",
            Query(f"sum(sum_over_time(mappo_run_gpus{{{S}}}{hours}) or vector(0)"),
            width=6,
        ),
        number(
            "Training hours",
            "Hours of training within the time range, summed over processes with and without a GPU.",
            "short",
            Query(f"sum(count_over_time(mappo_run_gpus{{{S}}}{hours}) or vector(0)"),
            width=6,
        ),
        bars(
            "GPU-hours by study",
            "Hours of training on GPUs within the time range, by study.",
            "short",
            Query(
                f"sum by (namespace, study) (sum_over_time(mappo_run_gpus{{{S}}}{hours}) "
                f"or 0 * sum by (namespace, study) ({last('mappo_run_gpus')})",
                "{{namespace}} {{study}}",
            ),
            width=6,
        ),
        graph(
            "GPU utilisation",
            "Mean over the runs that have a GPU, from dcgm-exporter. 0 if no run has a GPU.",
            "percentunit",
            Query(f"avg(run:mappo_gpu_utilisation:ratio{{{S}}}) or avg(mappo_run_gpus{{{S}}} == 0)", "mean"),
            width=6,
            low=0,
        ),
    ]
