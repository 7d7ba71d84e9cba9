"""The panels of our dashboards. Every panel has a title, a description, a unit and queries with a legend."""

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
    """A PromQL expression and the legend of its series."""

    expression: str
    legend: str = ""


Panel = Any  # a builder of the SDK; the builders of different panels share no type


def graph(
    title: str,
    description: str,
    unit: str,
    *queries: Query,
    width: int = 8,
    stacked: bool = False,
    low: float | None = None,
) -> Panel:
    """Return a panel with curves over time. `low` is the lower end of the axis, or None for automatic."""
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
    """Return a panel with the latest value of each series, in red from `alarm_from` upwards."""
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
    """Return a panel with the latest value of each series as a bar."""
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
    """Return a table with one row for each combination of labels. A column is a name, a unit and an expression."""
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
    """Return the variables of a dashboard: the data source, and one for each label in `names`.

    The choices of a label are its values in `metric` among the series that the preceding variables select.
    """
    built_variables: list[Any] = [
        dashboard.DatasourceVariable("datasource").label("Data source").type("prometheus")
    ]
    for position, name in enumerate(names):
        built_variables.append(
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
    return built_variables


def selector(names: Sequence[str]) -> str:
    """Return label matchers that select the values of the variables in `names`."""
    return ", ".join(f'{name}=~"${name}"' for name in names)


def build(
    title: str,
    uid: str,
    description: str,
    sections: dict[str, list[Panel]],
    names: Sequence[str] = ("namespace", "study", "run"),
    metric: str = "mappo_run_info",
) -> Any:
    """Return a dashboard with a row of panels for each section, and a variable for each label in `names`."""
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
    """Set the properties that every panel has. The grid is 24 units wide."""
    return panel.title(title).description(description).unit(unit).datasource(_SOURCE).span(width).height(height)


def _target(query: Query, order: int, instant: bool = False) -> Any:
    target = prometheus.Dataquery().datasource(_SOURCE).expr(query.expression).ref_id(_ref_id(order))
    target = target.legend_format(query.legend) if query.legend else target
    return target.instant() if instant else target.range()


def _ref_id(order: int) -> str:
    return chr(ord("A") + order)
