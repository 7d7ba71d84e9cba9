"""The plots of a run as Plotly's JSON: learning curves and returns of the evaluation."""

import json
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go

from mappo.environment.reductions import MAX_MEASUREMENTS
from mappo.evaluation.evaluation import EpisodeReturns
from mappo.evaluation.group_returns import GroupReturns
from mappo.training.history import MEASURED, by_group

Rows = Sequence[Mapping[str, float]]
COLOURS = ("#3b82f6", "#f97316", "#10b981", "#a855f7", "#ef4444", "#14b8a6", "#eab308", "#ec4899")
_PHASES = {"collect_seconds": "collecting", "learn_seconds": "learning", "evaluate_seconds": "evaluating"}
_MAX_POINTS = 1_500  # points per curve; a screen shows no more


@dataclass(frozen=True)
class Plot:
    """A figure with its title and explanation.

    identifier: part of the ID of the page's element for the figure. figure: Plotly's JSON.
    """

    identifier: str
    title: str
    explanation: str
    figure: str


def training_plots(histories: Mapping[str, Rows]) -> list[Plot]:
    """Return the learning curves of one run, or of several runs in the same plots."""
    single = (
        ("kl", "Change of the policy", "approximate KL divergence (nats)", "Change of the policy in an update."),
        (
            "clip_fraction",
            "Clipped share",
            "probability ratios that were clipped (0 to 1)",
            "High values mean too large steps.",
        ),
        ("entropy", "Entropy", "entropy of an agent's action (nats)", "Falls as the policy becomes more certain."),
        (
            "explained_variance",
            "Critic",
            "explained variance (1 is perfect)",
            "Accuracy of the predicted returns.",
        ),
        ("loss_critic", "Critic loss", "loss", "In units of squared values; only the trend matters."),
        ("loss_policy", "Policy loss", "loss", "Clipped surrogate; values near zero are normal."),
        ("gradient_norm_policy", "Policy gradient", "norm before clipping", "Spikes show unstable updates."),
        ("frames_per_second", "Speed", "frames per second", "With evaluations and saving."),
    )
    plots = [_returns(histories)]
    plots += [
        Plot(name, title, explanation, _json(_curves(histories, name), "frames", axis))
        for name, title, axis, explanation in single
    ]
    return [*plots, *_measurements(histories), _phases(histories)]


def evaluation_plot(policies: Mapping[str, EpisodeReturns]) -> Plot:
    """Return the plot of the episode returns of each policy, with their mean and its interval."""
    traces: list[Any] = []
    boxes = _boxes(policies)
    for index, (name, returns) in enumerate(boxes.items()):
        colour, mean = COLOURS[index % len(COLOURS)], returns.mean
        traces.append(
            go.Box(
                y=returns.episode_returns,
                name=name,
                boxpoints="all",
                jitter=0.6,
                pointpos=0,
                marker={"size": 3, "opacity": 0.45, "color": colour},
                line={"width": 1, "color": colour},
                fillcolor="rgba(0,0,0,0)",
                showlegend=False,
            )
        )
        interval = (
            {}
            if mean.low is None or mean.high is None
            else {
                "error_y": {
                    "type": "data",
                    "symmetric": False,
                    "array": [mean.high - mean.value],
                    "arrayminus": [mean.value - mean.low],
                    "thickness": 3,
                    "width": 12,
                }
            }
        )
        traces.append(
            go.Scatter(
                x=[name],
                y=[mean.value],
                mode="markers",
                marker={"symbol": "diamond", "size": 11, "color": colour},
                name=f"{name}: mean",
                showlegend=False,
                **interval,
            )
        )
    explanation = "A dot is an episode. The diamond is the mean with its 95 % interval."
    return Plot(
        "evaluation", "Returns in evaluation", explanation, _json(traces, "policy", "return of an episode")
    )


def _boxes(policies: Mapping[str, EpisodeReturns]) -> Mapping[str, EpisodeReturns | GroupReturns]:
    """Return the returns of each policy by its name or, if there are several groups, of each group and policy."""
    groups = dict.fromkeys(group for returns in policies.values() for group in returns.groups)
    if not groups:
        return policies
    return {f"{group}: {name}": policies[name].groups[group] for group in groups for name in policies}


def _returns(histories: Mapping[str, Rows]) -> Plot:
    traces: list[Any] = []
    if any(by_group(rows[-1], "episode_return_mean") for rows in histories.values() if rows):
        traces = _curves(histories, "episode_return_mean")
        explanation = "Mean return of the episodes that ended in an iteration, over the agents of each group."
        axis = "return of an episode, mean over a group's agents"
        return Plot("returns", "Return by group", explanation, _json(traces, "frames", axis))
    for index, (name, rows) in enumerate(histories.items()):
        colour = COLOURS[index % len(COLOURS)]
        thinned = _thinned(rows)
        frames = [row["frames"] for row in thinned]
        if len(histories) == 1:
            for edge, fill in (("episode_return_max", None), ("episode_return_min", "tonexty")):
                traces.append(
                    go.Scatter(
                        x=frames,
                        y=_cells(thinned, edge),
                        mode="lines",
                        line={"width": 0},
                        fill=fill,
                        fillcolor="rgba(59,130,246,0.15)",
                        name="lowest to highest" if fill else "highest",
                        showlegend=bool(fill),
                        hoverinfo="skip",
                    )
                )
        traces.append(
            go.Scatter(
                x=frames,
                y=_cells(thinned, "episode_return_mean"),
                mode="lines",
                line={"color": colour, "width": 2},
                name="in training" if len(histories) == 1 else name,
            )
        )
        evaluated = [row for row in rows if _is_known(row.get("evaluation_return_mean"))]
        if evaluated:
            traces.append(
                go.Scatter(
                    x=[row["frames"] for row in evaluated],
                    y=_cells(evaluated, "evaluation_return_mean"),
                    mode="markers",
                    marker={
                        "color": colour,
                        "size": 9,
                        "symbol": "diamond",
                        "line": {"width": 1, "color": "#888"},
                    },
                    name="evaluated" if len(histories) == 1 else f"{name}, evaluated",
                )
            )
    explanation = (
        "Mean return of the episodes that ended in an iteration. Diamonds are evaluations during training."
    )
    return Plot(
        "returns", "Return", explanation, _json(traces, "frames", "return of an episode, mean over agents")
    )


def _measurements(histories: Mapping[str, Rows]) -> list[Plot]:
    """Return a plot for each measurement that evaluations during training have."""
    columns = dict.fromkeys(column for rows in histories.values() for column in (rows[0] if rows else ()))
    plots: list[Plot] = []
    for column in [column for column in columns if column.startswith(MEASURED)][:MAX_MEASUREMENTS]:
        evaluated = {name: [row for row in rows if _is_known(row.get(column))] for name, rows in histories.items()}
        if any(evaluated.values()):
            name = column.removeprefix(MEASURED)
            traces = _curves(evaluated, column, mode="lines+markers")
            explanation = "Mean over the episodes of each evaluation during training, of what info() measures."
            plots.append(Plot(f"measured-{len(plots)}", name, explanation, _json(traces, "frames", name)))
    return plots


def _phases(histories: Mapping[str, Rows]) -> Plot:
    traces = [
        go.Bar(
            x=list(histories),
            y=[sum(row[column] for row in rows if _is_known(row.get(column))) for rows in histories.values()],
            name=phase,
            marker={"color": COLOURS[index]},
        )
        for index, (column, phase) in enumerate(_PHASES.items())
    ]
    layout = {"barmode": "stack"}
    explanation = "Time that the whole run spent in each phase of training."
    return Plot("phases", "Time by phase", explanation, _json(traces, "", "seconds", **layout))


def _curves(histories: Mapping[str, Rows], column: str, mode: str = "lines") -> list[Any]:
    """Return a line for each run, or for each group of its agents if there are several."""
    lines: list[tuple[str, Rows, str]] = []
    for name, rows in histories.items():
        groups = by_group(rows[-1], column) if rows else {}
        lines += [
            (group if len(histories) == 1 else f"{name}, {group}", rows, f"{column}/{group}") for group in groups
        ] or [(name, rows, column)]
    return [
        go.Scatter(
            x=[row["frames"] for row in thinned],
            y=_cells(thinned, cell),
            mode=mode,
            line={"color": COLOURS[index % len(COLOURS)], "width": 2},
            name=name,
            showlegend=len(lines) > 1,
        )
        for index, (name, thinned, cell) in enumerate((name, _thinned(rows), cell) for name, rows, cell in lines)
    ]


def _thinned(rows: Rows) -> Rows:
    """Return evenly spaced rows of a long history, and the last row."""
    step = max(1, len(rows) // _MAX_POINTS)
    return [row for index, row in enumerate(rows) if index % step == 0 or index == len(rows) - 1]


def _cells(rows: Rows, column: str) -> list[float | None]:
    """Return the values of a column; None, a gap in the curve, stands for a value that is not finite."""
    return [row[column] if _is_known(row.get(column)) else None for row in rows]


def _is_known(value: float | None) -> bool:
    return value is not None and abs(value) < float("inf")


def _json(traces: Sequence[Any], x_title: str, y_title: str, **layout: Any) -> str:
    figure = go.Figure(traces)
    lines = "<br>".join(textwrap.wrap(y_title, 30))  # the plot would cut off a longer line
    figure.update_layout(xaxis_title=x_title, yaxis_title=lines, **layout)
    return figure_json(figure)


def figure_json(figure: go.Figure) -> str:
    """Return a figure as JSON without a theme; the page sets the colours itself."""
    figure.update_layout(template="none")
    values = json.loads(figure.to_json())
    return json.dumps({"data": values["data"], "layout": values["layout"]}, separators=(",", ":"))
