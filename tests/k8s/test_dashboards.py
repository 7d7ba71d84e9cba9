import json
import re
from pathlib import Path

import pytest
import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard

from k8s import generate
from tests.k8s.test_alerts import GROUPS, promtool, require_known_metrics
from tests.support.prometheus import DASHBOARDS, expressions, filled_in, panels

by_name = pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda path: path.stem)


def test_dashboards_are_for_a_run_for_the_fleet_and_for_studies():
    assert [path.stem for path in DASHBOARDS] == ["fleet", "training-run", "tuning-study"]


def test_generated_files_are_up_to_date(capsys):
    assert generate.main(["--check"]) == 0, capsys.readouterr().out


@by_name
def test_every_panel_has_a_title_a_description_a_unit_and_queries(dashboard):
    for panel in panels(dashboard):
        assert panel["title"]
        assert len(panel["description"]) > 4, panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert panel["targets"], panel["title"]


@by_name
def test_panels_and_queries_have_unique_ids(dashboard):
    """Check the IDs that Grafana needs: one per panel, and a refId per query; the SDK sets neither."""
    all_panels = json.loads(dashboard.read_text())["panels"]
    identifiers = [panel["id"] for panel in all_panels]
    assert len(set(identifiers)) == len(identifiers)
    for panel in panels(dashboard):
        references = [target["refId"] for target in panel["targets"]]
        assert sorted(set(references)) == references == list("ABCDEF")[: len(references)]


@by_name
def test_panels_do_not_overlap_on_the_grid(dashboard):
    occupied: set[tuple[int, int]] = set()
    for panel in json.loads(dashboard.read_text())["panels"]:
        position = panel["gridPos"]
        assert position["x"] + position["w"] <= 24
        cells = {
            (position["x"] + x, position["y"] + y) for x in range(position["w"]) for y in range(position["h"])
        }
        assert not cells & occupied, panel["title"]
        occupied |= cells


@by_name
def test_graphs_have_a_legend_and_numbers_show_the_last_value(dashboard):
    for panel in panels(dashboard):
        if panel["type"] == "timeseries":
            assert panel["options"]["legend"]["showLegend"], panel["title"]
        if panel["type"] in ("stat", "bargauge"):
            assert panel["options"]["reduceOptions"]["calcs"] == ["lastNotNull"], panel["title"]


@by_name
def test_no_key_is_misspelt(dashboard):
    """The SDK drops unknown keys when it reads a dashboard, so the copy would differ."""
    written = json.loads(dashboard.read_text())
    copy = json.loads(json.dumps(Dashboard.from_json(written), cls=JSONEncoder))
    assert copy == written


@by_name
def test_variables_offer_only_values_within_the_preceding_choices(dashboard):
    variables = json.loads(dashboard.read_text())["templating"]["list"]
    names = ["datasource", "namespace", "study", "run"][: 3 if dashboard.stem == "tuning-study" else 4]
    assert [variable["name"] for variable in variables] == names
    narrowed = ", ".join(f'{name}=~"${name}"' for name in names[1:-1])
    assert f"{{{narrowed}}}" in variables[-1]["query"]


@by_name
def test_queries_use_existing_metrics_and_rates_of_counters_only(dashboard):
    recorded = {rule["record"] for rule in GROUPS["mappo.recording"]}
    for _, expression, _ in expressions(dashboard):
        require_known_metrics(filled_in(expression, dashboard, 3600), recorded)


@by_name
def test_queries_select_the_chosen_runs(dashboard):
    for title, expression, _ in expressions(dashboard):
        if re.search(
            "mappo_(pipeline|kubeflow|schedule)", expression
        ):  # the exporter's, of all runs of a namespace
            assert 'namespace=~"$namespace"' in expression, title
            continue
        assert ('study=~"$study"' if dashboard.stem == "tuning-study" else 'run=~"$run"') in expression, title


def test_a_rate_of_a_gauge_and_an_unknown_metric_are_found():
    with pytest.raises(AssertionError):
        require_known_metrics("rate(mappo_learning_rate[1m])", set())
    with pytest.raises(AssertionError):
        require_known_metrics("sum(1 + max_over_time(mappo_learning_rat[1m]))", set())


def test_current_values_of_a_run_come_from_its_newest_process(tmp_path):
    """Check that values are not the maximum over all processes of a run, and that pushed values count, too."""
    attempts = {
        ("r", 'instance="a", pod="A"', "{}x4 stale"): (1, 100, 900, 1, 50, 40, 60),
        ("r", 'instance="b", pod="B"', "_x8 {}x40"): (2, 600, 1000, 4, 10, 20, 300),
        ("pushed", 'instance="c", pod="C"', "{}x4 stale"): (1, 100, 900, 8, 50, 40, 60),
        ("pushed", 'job="mappo", stage="train", pod="gateway"', "_x6 {}x1 stale"): (1, 400, 900, 5, 30, 20, 90),
    }
    names = ("run_attempt", "run_frames", "run_planned_frames", "frames_per_second", "episode_return_mean")
    names = (*names, "selection_return_mean", "last_iteration_timestamp_seconds")
    series = {
        f'mappo_{name}{{namespace="n", study="s", run="{run}", {labels}}}': values.format(value)
        for (run, labels, values), numbers in attempts.items()
        for name, value in zip(names, numbers, strict=True)
    }
    pushed = 'job="mappo", stage="evaluate", pod="gateway", policy="trained"'
    series[f'mappo_evaluation_return_mean{{namespace="n", study="s", run="r", {pushed}}}'] = "7x2 stale"
    expected = {
        "Progress": [(0.6, 0.444)],
        "Time left": [(100, 100)],
        "Current return": [(10, 30)],
        "Best evaluation": [(40, 40)],
        "Attempt": [(2, 1)],
        "Runs": [(600, 400), (1000, 900), (10, 30), (20, 20), (4, 5), (2, 1)],
    }
    expectations = [
        (
            expression,
            {f'{{namespace="n", study="s", run="{run}"}}': value[run == "pushed"] for run in ("r", "pushed")},
        )
        for title, values in expected.items()
        for expression, value in zip(_queries(title), values, strict=True)
    ]
    (held_out,) = _queries("Held-out evaluation")
    expectations.append((held_out, {'{namespace="n", study="s", run="r", policy="trained"}': 7}))
    _require_values(tmp_path, series, expectations)


def test_trainings_that_pushed_their_end_do_not_hide_the_hardware_of_others(tmp_path):
    pushed = 'job="mappo", namespace="n", study="s", stage="train", pod="gateway"'
    series = {f'mappo_run_info{{{pushed}, run="r-{seed}"}}': "1x40" for seed in range(2)}
    process_labels = 'job="training", instance="c", namespace="n", pod="C"'
    series |= {
        f'mappo_run_info{{{process_labels}, study="s", run="r-2"}}': "1x40",
        f"process_cpu_seconds_total{{{process_labels}}}": "0+15x40",
        'DCGM_FI_DEV_POWER_USAGE{namespace="n", pod="C", gpu="0"}': "5x40",
    }
    (cpus,), (power,) = _queries("CPUs"), _queries("GPU power")
    expectations = [
        (cpus, {f'{{{process_labels}, study="s", run="r-2"}}': 1}),
        (power, {'{namespace="n", pod="C", study="s", run="r-2"}': 5}),
    ]
    _require_values(tmp_path, series, expectations)


def test_phases_are_shares_of_time_however_long_iterations_take(tmp_path):
    """The counters of phases grow only at the ends of iterations."""
    series = {
        f'mappo_phase_seconds_total{{namespace="n", study="s", run="r", phase="{phase}"}}': f"0x39 {seconds}x19"
        for phase, seconds in (("collect", 450), ("learn", 150))
    }
    (phases,) = _queries("Phases")
    shares = {
        f'{{namespace="n", study="s", run="r", phase="{phase}"}}': share
        for phase, share in (("collect", 0.75), ("learn", 0.25))
    }
    _require_values(tmp_path, series, [(phases, shares)])


def _queries(title: str) -> list[str]:
    """Return the queries of the panel with this title, for all runs.

    If several panels have the title, the panel with the most queries counts.
    """
    candidates = [
        [filled_in(target["expr"], dashboard, 3600, {"__rate_interval": "1m"}) for target in panel["targets"]]
        for dashboard in DASHBOARDS
        for panel in panels(dashboard)
        if panel["title"] == title
    ]
    return max(candidates, key=len)


def _require_values(
    directory: Path, series: dict[str, str], expectations: list[tuple[str, dict[str, float]]]
) -> None:
    """Check the value of each expression, to three digits, after ten minutes of `series`, scraped every 15 s."""
    test = {
        "interval": "15s",
        "input_series": [{"series": name, "values": values} for name, values in series.items()],
        "promql_expr_test": [
            {
                "expr": f"round(({expression}), 0.001)",
                "eval_time": "10m15s",
                "exp_samples": [{"labels": labels, "value": value} for labels, value in samples.items()],
            }
            for expression, samples in expectations
        ],
    }
    path = directory / "queries.yaml"
    path.write_text(yaml.safe_dump({"tests": [test]}))
    promtool("test", "rules", str(path))
