import re
import subprocess
from dataclasses import fields

import pytest

from mappo.environment.validation import Check
from mappo.errors import KeyMissing, KeyTaken, StoreError, StoreUnavailable
from mappo.monitoring import metrics
from mappo.monitoring.monitor import Monitor
from mappo.monitoring.settings import MonitorSettings
from mappo.training.history import BY_GROUP, COLUMNS
from tests.support.prometheus import ROOT, require

by_name = pytest.mark.parametrize("metric", metrics.METRICS, ids=lambda metric: metric.name)


@pytest.mark.parametrize("stage", metrics.STAGES)
def test_promtool_accepts_the_metrics(stage):
    """Check a page that has every declared metric, with invented values."""
    monitor = Monitor(stage, "r", MonitorSettings(), print)
    for metric in monitor._declared:
        for labels in metric.combinations():
            if metric.kind == "gauge":
                monitor._set(metric.name, 1, **labels, **dict.fromkeys(metric.free_labels, "free"))
    result = subprocess.run(
        [require("promtool"), "check", "metrics"], input=monitor.text(), capture_output=True, timeout=60
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, b"", b"")


@by_name
def test_metric_name_follows_the_rules_of_prometheus(metric):
    assert re.fullmatch(r"mappo_[a-z_]+", metric.name)
    assert metric.name.endswith("_total") == (metric.kind == "counter")
    assert not re.search(r"_(ms|milliseconds|minutes|mb|mib|percent)(_|$)", metric.name)
    assert bool(metric.bounds) == (metric.kind == "histogram")


@by_name
def test_labels_have_few_and_known_values(metric):
    is_of_a_run = metric.subject == metrics.RUN_LABELS
    assert len(metric.combinations()) <= (25 if is_of_a_run else 100), (
        "a namespace has one exporter, and many runs"
    )
    is_of_a_scenario = "_measurement_mean" in metric.name or "_group_" in metric.name
    is_free = metric.name in ("mappo_run_info", "mappo_schedule_late_seconds") or is_of_a_scenario
    assert bool(metric.free_labels) == is_free


@by_name
def test_docs_list_the_metric_with_its_label_values(metric):
    page = (ROOT / "docs" / "metrics.md").read_text()
    (row,) = re.findall(rf"^\| `{metric.name}` \| (.*)$", page, re.MULTILINE)
    assert metric.description in row
    assert all(value in row for values in metric.labels.values() for value in values)
    assert all(name in row for name in metric.free_labels)


def test_metrics_use_existing_columns_of_the_history_and_all_important_ones():
    used = {metric.column.format(**labels) for metric in metrics.METRICS for labels in metric.combinations()} - {
        ""
    }
    assert used <= set(COLUMNS)
    assert {metric.group_column for metric in metrics.METRICS} - {""} <= set(BY_GROUP)
    assert set(COLUMNS) - used == {
        *("iteration", "elapsed_seconds"),  # the monitor and Prometheus count these themselves
        *("num_saves", "num_failed_saves", "num_skipped_saves"),  # the saver reports every save by itself
    }


def test_label_values_are_the_outcomes_of_the_code():
    """Check that all values are declared: an alert could miss the first event of an undeclared value."""
    by_name = {metric.name: metric.labels for metric in metrics.METRICS}
    outcomes = {error.outcome for error in (StoreError, StoreUnavailable, KeyMissing, KeyTaken)} | {"ok"}
    assert set(by_name["mappo_store_requests_total"]["outcome"]) == outcomes
    (outcome,) = [field.type for field in fields(Check) if field.name == "outcome"]
    assert set(by_name["mappo_validation_checks"]["outcome"]) == set(outcome.__args__)
