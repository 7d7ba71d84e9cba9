import re
import subprocess
from dataclasses import fields

import pytest

from mappo.environment.validation import Check
from mappo.errors import KeyMissing, KeyTaken, StoreError, StoreUnavailable
from mappo.monitoring import metrics
from mappo.monitoring.monitor import Monitor
from mappo.monitoring.settings import MonitorSettings
from mappo.training.history import COLUMNS
from tests.support.prometheus import ROOT, require

by_name = pytest.mark.parametrize("metric", metrics.METRICS, ids=lambda metric: metric.name)


@pytest.mark.parametrize("stage", metrics.STAGES)
def test_promtool_finds_nothing_to_say_about_our_metrics(stage):
    """Every declared metric is shown once, with made-up values."""
    monitor = Monitor(stage, "r", MonitorSettings(), print)
    for metric in monitor._declared:
        for own in metric.combinations():
            if metric.kind == "gauge" and not metric.is_info:
                monitor._set(metric.name, 1, **own)
    done = subprocess.run(
        [require("promtool"), "check", "metrics"], input=monitor.text(), capture_output=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


@by_name
def test_metric_is_named_as_prometheus_asks(metric):
    assert re.fullmatch(r"mappo_[a-z_]+", metric.name)
    assert metric.name.endswith("_total") == (metric.kind == "counter")
    assert not re.search(r"_(ms|milliseconds|minutes|mb|mib|percent)(_|$)", metric.name)
    assert bool(metric.bounds) == (metric.kind == "histogram")


@by_name
def test_labels_have_few_values_which_are_known(metric):
    assert len(metric.combinations()) <= 25
    assert metric.is_info == (metric.name == "mappo_run_info")


@by_name
def test_metric_is_documented_with_its_values(metric):
    page = (ROOT / "docs" / "metrics.md").read_text()
    (row,) = re.findall(rf"^\| `{metric.name}` \| (.*)$", page, re.MULTILINE)
    assert metric.description in row
    assert all(value in row for values in metric.labels.values() for value in values)


def test_columns_of_the_history_that_metrics_name_are_there_and_none_that_matters_is_left_out():
    used = {metric.column.format(**own) for metric in metrics.METRICS for own in metric.combinations()} - {""}
    assert used <= set(COLUMNS)
    assert set(COLUMNS) - used == {
        *("iteration", "elapsed_seconds"),  # counted by the monitor itself, and by Prometheus
        *("num_saves", "num_failed_saves", "num_skipped_saves"),  # told one by one
    }


def test_label_values_are_those_that_the_code_speaks_of():
    """A value that is not declared would appear in Prometheus only once it has happened."""
    by_name = {metric.name: metric.labels for metric in metrics.METRICS}
    outcomes = {error.outcome for error in (StoreError, StoreUnavailable, KeyMissing, KeyTaken)} | {"ok"}
    assert set(by_name["mappo_store_requests_total"]["outcome"]) == outcomes
    (outcome,) = [field.type for field in fields(Check) if field.name == "outcome"]
    assert set(by_name["mappo_validation_checks"]["outcome"]) == set(outcome.__args__)
