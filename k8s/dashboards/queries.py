"""The PromQL expressions that several dashboards use."""

from k8s.dashboards.panels import selector

_VARIABLES = ("namespace", "study", "run")
S = selector(_VARIABLES)
NAMESPACE = selector(_VARIABLES[:1])  # for metrics of no run
# Adds the labels of a run to the metrics of its process. `stage=""` excludes pushed series, which have no process.
TRAINED_ON = f'group_left (run, study) mappo_run_info{{stage="", {S}}}'
RUN = "by (namespace, study, run)"


def last(metric: str) -> str:
    """Return an expression for the last value of each series in the time range."""
    return f"last_over_time({metric}{{{S}}}[$__range])"


def newest(expression: str) -> str:
    """Return an expression for the value of `expression` in the newest process of each run.

    The newest process is the process that completed an iteration last, or else started last.
    """
    iterated = last("mappo_last_iteration_timestamp_seconds")
    newest = f"{iterated} == on (namespace, study, run) group_left () max {RUN} ({iterated})"
    return f"max {RUN} ({expression} and on (namespace, study, run, instance, pod) ({newest}))"
