"""The plots of a run as Plotly's JSON: learning curves and returns of the evaluation."""

import json
import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go

from mappo.environment.reductions import MAX_MEASUREMENTS
from mappo.evaluation.evaluation import EpisodeReturns
from mappo.training.history import MEASURED

Rows = Sequence[Mapping[str, float]]
COLOURS = ("#3b82f6", "#f97316", "#10b981", "#a855f7", "#ef4444", "#14b8a6", "#eab308", "#ec4899")
_PHASES = {"collect_seconds": "collecting", "learn_seconds": "learning", "evaluate_seconds": "evaluating"}
_MAX_POINTS = 1_500  # points per curve; a screen shows no more
_BAND_EXPLANATION = " The band has the middle 80 % of the means of iterations nearby."


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
    """Return the learning curves of one run, or of several runs in the same plots; the returns are first."""
    single = (
        ("entropy", "Entropy", "nats of an agent's action", "Falls as the policy becomes more certain."),
        ("explained_variance", "Critic", "explained variance", "Accuracy of the predicted returns; 1 is perfect."),
        ("kl", "Change of the policy", "KL, nats", "Approximate divergence in an update."),
        ("clip_fraction", "Clipped share", "share of ratios", "High values mean too large steps."),
        ("loss_policy", "Policy loss", "loss", "Clipped surrogate; values near zero are normal."),
        ("loss_critic", "Critic loss", "loss", "In units of squared values; only the trend matters."),
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
    """Return the plot of the episode returns of each policy, with their mean and its interval.

    The axis shows the middle 98 % of the returns of every policy, so that few outliers do not flatten the rest.
    """
    colours = dict(zip(("trained", "random", "heuristic"), (COLOURS[0], "#9ca3af", COLOURS[1]), strict=True))
    traces: list[Any] = []
    for name, returns in policies.items():
        traces += [_episodes(name, returns, colours[name]), _mean(name, returns)]
    low, high = _visible_range([returns.episode_returns for returns in policies.values()])
    hidden = sum(not low <= value <= high for returns in policies.values() for value in returns.episode_returns)
    beyond = f" {hidden} episodes lie beyond the axis." if hidden else ""
    explanation = f"A dot is an episode. The diamond is the mean with its 95 % interval.{beyond}"
    axes = {"xaxis": {"range": [low, high]}, "height": 90 + 70 * len(policies), "margin": {"l": 80}}
    figure = _json(traces, "return of an episode", "", **axes)
    return Plot("evaluation", "Returns in evaluation", explanation, figure)


def _episodes(name: str, returns: EpisodeReturns, colour: str) -> Any:
    return go.Box(
        x=returns.episode_returns,
        y=[name] * len(returns.episode_returns),
        name=name,
        orientation="h",
        boxpoints="all",
        jitter=0.8,
        pointpos=0,
        marker={"size": 3, "opacity": 0.5, "color": colour},
        line={"width": 1, "color": colour},
        fillcolor="rgba(0,0,0,0)",
        showlegend=False,
    )


def _mean(name: str, returns: EpisodeReturns) -> Any:
    mean = returns.mean
    if mean.low is None or mean.high is None:
        interval = None
    else:
        sides = {"array": [mean.high - mean.value], "arrayminus": [mean.value - mean.low]}
        interval = {"type": "data", "symmetric": False, "thickness": 3, "width": 10, **sides}
    return go.Scatter(
        x=[mean.value],
        y=[name],
        mode="markers",
        marker={"symbol": "diamond", "size": 12},
        error_x=interval,
        meta="ink",
        name=f"{name}: mean",
        showlegend=False,
    )


def _visible_range(samples: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Return a range that has the middle 98 % of every sample, with a margin."""
    ends = [np.quantile(sample, [0.01, 0.99]) for sample in samples]
    low, high = float(min(low for low, _ in ends)), float(max(high for _, high in ends))
    margin = 0.05 * (high - low) or 0.5
    return low - margin, high + margin


def _returns(histories: Mapping[str, Rows]) -> Plot:
    is_single = len(histories) == 1
    traces: list[Any] = []
    for index, (name, rows) in enumerate(histories.items()):
        colour = COLOURS[index % len(COLOURS)]
        if is_single:
            traces += _band(_thinned(rows), colour)
        traces.append(
            go.Scatter(
                x=[row["frames"] for row in _thinned(rows)],
                y=_cells(_thinned(rows), "episode_return_mean"),
                mode="lines",
                line={"color": colour, "width": 2},
                name="in training" if is_single else name,
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
                    name="evaluated" if is_single else f"{name}, evaluated",
                    showlegend=is_single,
                )
            )
    explanation = (
        "Mean return of the episodes that ended in an iteration. Diamonds are evaluations during training."
        + (_BAND_EXPLANATION if is_single else "")
    )
    return Plot("returns", "Return", explanation, _json(traces, "frames", "mean return"))


def _band(rows: Rows, colour: str) -> list[Any]:
    """Return the band around the curve of returns: the middle 80 % of the means of iterations nearby.

    The lowest and the highest episode of an iteration are outliers, which would flatten the curve.
    """
    means = np.asarray([row.get("episode_return_mean", math.nan) for row in rows], dtype=np.float64)
    half = max(2, len(rows) // 20)
    nearby = [means[max(0, index - half) : index + half + 1] for index in range(len(means))]
    ends = [np.nanquantile(values, [0.1, 0.9]) if np.isfinite(values).any() else (None, None) for values in nearby]
    edge = {
        "x": [row["frames"] for row in rows],
        "mode": "lines",
        "line": {"width": 0, "color": colour},
        "hoverinfo": "skip",
        "showlegend": False,
    }
    return [
        go.Scatter(y=[high for _, high in ends], **edge),
        go.Scatter(y=[low for low, _ in ends], fill="tonexty", fillcolor="rgba(59,130,246,0.18)", **edge),
    ]


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
            y=list(histories),
            x=[sum(row[column] for row in rows if _is_known(row.get(column))) for rows in histories.values()],
            name=phase,
            orientation="h",
            marker={"color": COLOURS[index]},
        )
        for index, (column, phase) in enumerate(_PHASES.items())
    ]
    layout = {"barmode": "stack"}
    explanation = "Time that the whole run spent in each phase of training."
    return Plot("phases", "Time by phase", explanation, _json(traces, "seconds", "", **layout))


def _curves(histories: Mapping[str, Rows], column: str, mode: str = "lines") -> list[Any]:
    return [
        go.Scatter(
            x=[row["frames"] for row in thinned],
            y=_cells(thinned, column),
            mode=mode,
            line={"color": COLOURS[index % len(COLOURS)], "width": 2},
            name=name,
            showlegend=False,  # the plot of returns has the names
        )
        for index, (name, thinned) in enumerate((name, _thinned(rows)) for name, rows in histories.items())
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
