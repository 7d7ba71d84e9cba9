import json

import pytest
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard

from k8s import generate
from tests.prometheus import DASHBOARDS, expressions, filled_in, panels
from tests.test_alerts import GROUPS, require_known_metrics

by_name = pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda path: path.stem)


def test_there_is_a_dashboard_of_a_run_and_one_of_the_fleet():
    assert [path.stem for path in DASHBOARDS] == ["fleet", "training-run"]


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
    assert [variable["name"] for variable in variables] == ["datasource", "namespace", "study", "run"]
    assert 'namespace=~"$namespace", study=~"$study"' in variables[-1]["query"]


@by_name
def test_queries_use_metrics_that_there_are_and_rates_of_counters_only(dashboard):
    recorded = {rule["record"] for rule in GROUPS["mappo.recording"]}
    for _, expression, _ in expressions(dashboard):
        require_known_metrics(filled_in(expression, dashboard, 3600), recorded)


@by_name
def test_queries_are_of_the_selected_runs(dashboard):
    for title, expression, _ in expressions(dashboard):
        assert 'run=~"$run"' in expression, title


def test_a_rate_of_a_gauge_is_noticed():
    with pytest.raises(AssertionError):
        require_known_metrics("rate(mappo_learning_rate[1m])", set())
    with pytest.raises(AssertionError):
        require_known_metrics("sum(1 + max_over_time(mappo_learning_rat[1m]))", set())
