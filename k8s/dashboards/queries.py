"""The Grafana dashboards, as code: one run of training in depth, and all runs side by side."""

from k8s.dashboards.panels import selector

_VARIABLES = ("namespace", "study", "run")
S = selector(_VARIABLES)
# Gives a process's metrics the labels of its run. What was pushed has a stage, and is of no process.
TRAINED_ON = f'group_left (run, study) mappo_run_info{{stage="", {S}}}'
RUN = "by (namespace, study, run)"


def last(metric: str) -> str:
    """The last value of each series in the time range."""
    return f"last_over_time({metric}{{{S}}}[$__range])"


def newest(expression: str) -> str:
    """Its value for each run in its newest process: that which was the last to do an iteration or to begin."""
    iterated = last("mappo_last_iteration_timestamp_seconds")
    newest = f"{iterated} == on (namespace, study, run) group_left () max {RUN} ({iterated})"
    return f"max {RUN} ({expression} and on (namespace, study, run, instance, pod) ({newest}))"
