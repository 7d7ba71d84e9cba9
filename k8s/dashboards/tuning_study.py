"""The dashboard of one tuning study."""

from typing import Any

from k8s.dashboards.panels import Query, build, graph, number, selector


def tuning_study() -> Any:
    """Return the dashboard of a study: progress, best value, workers and failures."""
    return build(
        "MAPPO tuning study",
        "mappo-tuning-study",
        "Tuning studies: trials by state, best value, workers, failures, and the trials in training.",
        {"At a glance": _study(), "Trials": _trials(), "Trials in training": _in_training()},
        names=("namespace", "study"),
        metric="mappo_study_asked_trials",
    )


_T = selector(("namespace", "study"))
_STUDY = "by (namespace, study)"  # every worker exports the whole study, as it last saw it


def _of_study(metric: str, matcher: str = "") -> str:
    return f"max {_STUDY} (last_over_time({metric}{{{matcher}{_T}}}[$__range]))"


def _study() -> list[Any]:
    states = 'state=~"complete|pruned|failed", '
    ended = f"sum {_STUDY} (max by (namespace, study, state) ({{}}(mappo_study_trials{{{{{states}{_T}}}}}[{{}}])))"
    return [
        number(
            "Progress",
            "Share of the requested trials that have ended.",
            "percentunit",
            Query(
                f"{ended.format('last_over_time', '$__range')} / {_of_study('mappo_study_asked_trials')}",
                "{{study}}",
            ),
        ),
        number(
            "Best value",
            "Highest mean return of a completed trial on tuning seeds. The highest of many is too optimistic.",
            "short",
            Query(_of_study("mappo_study_best_value"), "{{study}}"),
        ),
        number(
            "Workers",
            "Worker processes that are active.",
            "short",
            Query(f"count {_STUDY} (mappo_study_asked_trials{{{_T}}})", "{{study}}"),
        ),
        number(
            "Trials in the last hour",
            "Trials that ended in the last hour: complete, pruned or failed.",
            "short",
            Query(
                f"{ended.format('max_over_time', '1h')} - "
                + ended.format("min_over_time", "1h").replace("(max by", "(min by"),
                "{{study}}",
            ),
        ),
        number(
            "Failed trials",
            "Trials that failed. `mappo study show` lists the reasons.",
            "short",
            Query(_of_study("mappo_study_trials", 'state="failed", '), "{{study}}"),
            alarm_from=3,
        ),
        number(
            "Lost workers",
            "Number of times that a trial lost its worker because the heartbeats stopped.",
            "short",
            Query(_of_study("mappo_study_lost_workers"), "{{study}}"),
            alarm_from=3,
        ),
    ]


def _trials() -> list[Any]:
    return [
        graph(
            "Trials by state",
            "Trials of the whole study in each state.",
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


def _in_training() -> list[Any]:
    return [
        graph(
            "Return in evaluation",
            "Mean return in the evaluations during training, by trial. Pruning compares these values.",
            "short",
            Query(f"mappo_selection_return_mean{{{_T}}}", "{{run}}"),
            width=12,
        ),
        graph(
            "Frames per second",
            "Frames per second of each worker, with evaluations and saving.",
            "short",
            Query(f"mappo_frames_per_second{{{_T}}}", "{{run}}"),
            width=6,
            low=0,
        ),
        graph(
            "Alerts firing",
            "Alerts of the study and its runs that are firing.",
            "short",
            Query(
                f'count by (alertname) (ALERTS{{alertname=~"Mappo.*", alertstate="firing", {_T}}}) or vector(0)',
                "{{alertname}}",
            ),
            width=6,
            low=0,
        ),
    ]
