import json
from pathlib import Path

import pytest
import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard

from k8s import generate
from tests.k8s.test_alerts import GROUPS, promtool, require_known_metrics
from tests.support.prometheus import DASHBOARDS, expressions, filled_in, panels

by_name = pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda path: path.stem)


def test_there_is_a_dashboard_of_a_run_one_of_the_fleet_and_one_of_studies():
    assert [path.stem for path in DASHBOARDS] == ["fleet", "training-run", "tuning-study"]


def test_generated_files_are_those_that_their_sources_make(capsys):
    assert generate.main(["--check"]) == 0, capsys.readouterr().out


@by_name
def test_every_panel_says_what_it_shows_in_which_unit(dashboard):
    for panel in panels(dashboard):
        assert panel["title"]
        assert len(panel["description"]) > 4, panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert panel["targets"], panel["title"]


@by_name
def test_panels_and_queries_can_be_told_apart(dashboard):
    """Grafana needs an ID for each panel, and a refId for each of its queries, which the SDK sets not."""
    everything = json.loads(dashboard.read_text())["panels"]
    identifiers = [panel["id"] for panel in everything]
    assert len(set(identifiers)) == len(identifiers)
    for panel in panels(dashboard):
        references = [target["refId"] for target in panel["targets"]]
        assert sorted(set(references)) == references == list("ABCDEF")[: len(references)]


@by_name
def test_panels_lie_side_by_side_on_the_grid(dashboard):
    taken: set[tuple[int, int]] = set()
    for panel in json.loads(dashboard.read_text())["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        own = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not own & taken, panel["title"]
        taken |= own


@by_name
def test_graphs_have_a_legend_and_numbers_show_the_last_value(dashboard):
    for panel in panels(dashboard):
        if panel["type"] == "timeseries":
            assert panel["options"]["legend"]["showLegend"], panel["title"]
        if panel["type"] in ("stat", "bargauge"):
            assert panel["options"]["reduceOptions"]["calcs"] == ["lastNotNull"], panel["title"]


@by_name
def test_no_key_is_misspelt(dashboard):
    """What the SDK does not know, it would drop on the way in."""
    written = json.loads(dashboard.read_text())
    again = json.loads(json.dumps(Dashboard.from_json(written), cls=JSONEncoder))
    assert again == written


@by_name
def test_variables_narrow_each_other_down(dashboard):
    variables = json.loads(dashboard.read_text())["templating"]["list"]
    names = ["datasource", "namespace", "study", "run"][: 3 if dashboard.stem == "tuning-study" else 4]
    assert [variable["name"] for variable in variables] == names
    narrowed = ", ".join(f'{name}=~"${name}"' for name in names[1:-1])
    assert f"{{{narrowed}}}" in variables[-1]["query"]


@by_name
def test_queries_use_metrics_that_there_are_and_rates_of_counters_only(dashboard):
    recorded = {rule["record"] for rule in GROUPS["mappo.recording"]}
    for _, expression, _ in expressions(dashboard):
        require_known_metrics(filled_in(expression, dashboard, 3600), recorded)


@by_name
def test_queries_are_of_the_selected_runs(dashboard):
    for title, expression, _ in expressions(dashboard):
        assert ('study=~"$study"' if dashboard.stem == "tuning-study" else 'run=~"$run"') in expression, title


def test_a_rate_of_a_gauge_is_noticed():
    with pytest.raises(AssertionError):
        require_known_metrics("rate(mappo_learning_rate[1m])", set())
    with pytest.raises(AssertionError):
        require_known_metrics("sum(1 + max_over_time(mappo_learning_rat[1m]))", set())


def test_what_a_run_does_now_is_what_its_newest_process_does(tmp_path):
    """Not the maximum over all that ever trained it; what another stage tells is shown, too."""
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
    asked = [
        (
            expression,
            {f'{{namespace="n", study="s", run="{run}"}}': value[run == "pushed"] for run in ("r", "pushed")},
        )
        for title, values in expected.items()
        for expression, value in zip(_queries(title), values, strict=True)
    ]
    (held_out,) = _queries("Held-out evaluation")
    asked.append((held_out, {'{namespace="n", study="s", run="r", policy="trained"}': 7}))
    _require_values(tmp_path, series, asked)


def test_trainings_whose_ends_were_pushed_at_once_do_not_hide_the_hardware_of_others(tmp_path):
    pushed = 'job="mappo", namespace="n", study="s", stage="train", pod="gateway"'
    series = {f'mappo_run_info{{{pushed}, run="r-{seed}"}}': "1x40" for seed in range(2)}
    own = 'job="training", instance="c", namespace="n", pod="C"'
    series |= {
        f'mappo_run_info{{{own}, study="s", run="r-2"}}': "1x40",
        f"process_cpu_seconds_total{{{own}}}": "0+15x40",
        'DCGM_FI_DEV_POWER_USAGE{namespace="n", pod="C", gpu="0"}': "5x40",
    }
    (cpus,), (power,) = _queries("CPUs"), _queries("GPU power")
    asked = [
        (cpus, {f'{{{own}, study="s", run="r-2"}}': 1}),
        (power, {'{namespace="n", pod="C", study="s", run="r-2"}': 5}),
    ]
    _require_values(tmp_path, series, asked)


def test_phases_are_shares_of_time_however_long_iterations_take(tmp_path):
    """Their counters grow at the ends of iterations only."""
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
    """Return the expressions of the panel with this title, for all runs; of the longest, if there are several."""
    found = [
        [filled_in(target["expr"], dashboard, 3600, {"__rate_interval": "1m"}) for target in panel["targets"]]
        for dashboard in DASHBOARDS
        for panel in panels(dashboard)
        if panel["title"] == title
    ]
    return max(found, key=len)


def _require_values(directory: Path, series: dict[str, str], asked: list[tuple[str, dict[str, float]]]) -> None:
    """Return each expression's value, to three digits, after ten minutes of these series, scraped every 15 s."""
    test = {
        "interval": "15s",
        "input_series": [{"series": name, "values": values} for name, values in series.items()],
        "promql_expr_test": [
            {
                "expr": f"round(({expression}), 0.001)",
                "eval_time": "10m15s",
                "exp_samples": [{"labels": labels, "value": value} for labels, value in samples.items()],
            }
            for expression, samples in asked
        ],
    }
    path = directory / "queries.yaml"
    path.write_text(yaml.safe_dump({"tests": [test]}))
    promtool("test", "rules", str(path))
