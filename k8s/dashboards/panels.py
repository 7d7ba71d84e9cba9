"""Panels as our dashboards use them: every one has a title, a description, a unit and queries with a legend."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from grafana_foundation_sdk.builders import bargauge, common, dashboard, prometheus, stat, table, timeseries
from grafana_foundation_sdk.models import common as common_models
from grafana_foundation_sdk.models import dashboard as models
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

_SOURCE = common_models.DataSourceRef(type_val="prometheus", uid="${datasource}")


@dataclass(frozen=True)
class Query:
    """A PromQL expression, and how its series are called."""

    expression: str
    legend: str = ""


Panel = Any  # a builder of the SDK, whose kinds share no type that says so


def graph(
    title: str,
    description: str,
    unit: str,
    *queries: Query,
    width: int = 8,
    stacked: bool = False,
    low: float | None = None,
) -> Panel:
    """Values over time."""
    panel = (
        _described(timeseries.Panel(), title, description, unit, width, 8)
        .line_width(1)
        .fill_opacity(60 if stacked else 5)
        .show_points(common_models.VisibilityMode.AUTO)
        .legend(
            common.VizLegendOptions()
            .show_legend(True)
            .display_mode(common_models.LegendDisplayMode.LIST)
            .placement(common_models.LegendPlacement.BOTTOM)
        )
        .tooltip(common.VizTooltipOptions().mode(common_models.TooltipDisplayMode.MULTI))
        .targets([_target(query, order) for order, query in enumerate(queries)])
    )
    if stacked:
        panel = panel.stacking(common.StackingConfig().mode(common_models.StackingMode.NORMAL))
    return panel if low is None else panel.min(low)


def number(
    title: str, description: str, unit: str, *queries: Query, width: int = 4, alarm_from: float | None = None
) -> Panel:
    """The latest value of each series, in large; red from a bound on, if there is one."""
    steps = [models.Threshold(color="green" if alarm_from is not None else "blue")]
    if alarm_from is not None:
        steps.append(models.Threshold(color="red", value=alarm_from))
    return (
        _described(stat.Panel(), title, description, unit, width, 5)
        .graph_mode(common_models.BigValueGraphMode.NONE)
        .color_mode(common_models.BigValueColorMode.VALUE)
        .text_mode(common_models.BigValueTextMode.AUTO)
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]).values(False))
        .thresholds(dashboard.ThresholdsConfig().mode(models.ThresholdsMode.ABSOLUTE).steps(steps))
        .targets([_target(query, order, instant=True) for order, query in enumerate(queries)])
    )


def bars(title: str, description: str, unit: str, *queries: Query, width: int = 8) -> Panel:
    """The latest value of each series as a bar."""
    return (
        _described(bargauge.Panel(), title, description, unit, width, 8)
        .orientation(common_models.VizOrientation.HORIZONTAL)
        .display_mode(common_models.BarGaugeDisplayMode.BASIC)
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]).values(False))
        .thresholds(
            dashboard.ThresholdsConfig()
            .mode(models.ThresholdsMode.ABSOLUTE)
            .steps([models.Threshold(color="blue")])
        )
        .targets([_target(query, order, instant=True) for order, query in enumerate(queries)])
    )


def rows(title: str, description: str, columns: Sequence[tuple[str, str, str]], width: int = 24) -> Panel:
    """A table with a row for each combination of labels, and for each column a name, a unit and an expression."""
    targets = [
        _target(Query(expression), order, instant=True).format(PromQueryFormat.TABLE)
        for order, (_, _, expression) in enumerate(columns)
    ]
    values = [f"Value #{_ref_id(order)}" for order in range(len(columns))]
    panel = (
        _described(table.Panel(), title, description, "short", width, 10)
        .targets(targets)
        .with_transformation(models.DataTransformerConfig(id_val="merge", options={}))
        .with_transformation(
            models.DataTransformerConfig(
                id_val="organize",
                options={
                    "excludeByName": {"Time": True},
                    "renameByName": dict(zip(values, [name for name, _, _ in columns], strict=True)),
                },
            )
        )
    )
    for name, unit, _ in columns:
        panel = panel.override_by_name(name, [models.DynamicConfigValue(id_val="unit", value=unit)])
    return panel


def variables(names: Sequence[str], metric: str) -> list[Any]:
    """The data source, and then what narrows a dashboard down, each within those before it: labels of a metric."""
    built: list[Any] = [dashboard.DatasourceVariable("datasource").label("Data source").type("prometheus")]
    for position, name in enumerate(names):
        built.append(
            dashboard.QueryVariable(name)
            .label(name.capitalize())
            .datasource(_SOURCE)
            .query(f"label_values({metric}{{{selector(names[:position])}}}, {name})")
            .refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)
            .sort(models.VariableSort.ALPHABETICAL_ASC)
            .multi(True)
            .include_all(True)
            .all_value(".*")
            .current(models.VariableOption(text=["All"], value=["$__all"], selected=True))
        )
    return built


def selector(names: Sequence[str]) -> str:
    """Label matchers for the variables of these names."""
    return ", ".join(f'{name}=~"${name}"' for name in names)


def build(
    title: str,
    uid: str,
    description: str,
    sections: dict[str, list[Panel]],
    names: Sequence[str] = ("namespace", "study", "run"),
    metric: str = "mappo_run_info",
) -> Any:
    """A dashboard with a row of panels for each section, and variables for labels of a metric."""
    board = (
        dashboard.Dashboard(title)
        .uid(uid)
        .description(description)
        .tags(["mappo"])
        .timezone("browser")
        .refresh("15s")
        .time("now-1h", "now")
        .tooltip(models.DashboardCursorSync.CROSSHAIR)
        .variables(variables(names, metric))
        .link(
            dashboard.DashboardLink("MAPPO")
            .type(models.DashboardLinkType.DASHBOARDS)
            .tags(["mappo"])
            .include_vars(True)
            .keep_time(True)
        )
    )
    identifier = 0
    for section, panels in sections.items():
        identifier += 1
        board = board.with_row(dashboard.Row(section).id(identifier))
        for panel in panels:
            identifier += 1
            board = board.with_panel(panel.id(identifier))
    return board.build()


def _described(panel: Panel, title: str, description: str, unit: str, width: int, height: int) -> Panel:
    """What every panel has. The grid is 24 wide."""
    return panel.title(title).description(description).unit(unit).datasource(_SOURCE).span(width).height(height)


def _target(query: Query, order: int, instant: bool = False) -> Any:
    target = prometheus.Dataquery().datasource(_SOURCE).expr(query.expression).ref_id(_ref_id(order))
    target = target.legend_format(query.legend) if query.legend else target
    return target.instant() if instant else target.range()


def _ref_id(order: int) -> str:
    return chr(ord("A") + order)
