"""The dashboard of one tuning study."""

from typing import Any

from k8s.dashboards.panels import Query, build, graph, number, selector


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
