"""The dashboard of all runs of a cluster."""

from typing import Any

from k8s.dashboards.panels import Query, bars, build, graph, number, rows
from k8s.dashboards.queries import RUN, S, last, newest


def fleet() -> Any:
    """Return the dashboard of all runs: activity, throughput, failures and cost."""
    return build(
        "MAPPO fleet",
        "mappo-fleet",
        "All training runs: activity, throughput, failures and cost.",
        {"Now": _now(), "Throughput": _throughput(), "Failures": _failures(), "Cost": _cost()},
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
