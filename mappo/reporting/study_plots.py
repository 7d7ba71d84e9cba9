"""The plots of a study: values of its trials, the importance of settings, learning curves, and workers."""

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import optuna
import plotly.graph_objects as go
from optuna.exceptions import ExperimentalWarning
from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

from mappo.reporting.plots import COLOURS, Plot, figure_json
from mappo.tuning.search_space import Choices, Dimension
from mappo.tuning.study import Study
from mappo.tuning.trial import TrialRecord

STATE_COLOURS = dict(zip(("complete", "pruned", "running", "lost", "failed", "released"), COLOURS, strict=False))
BEST_COLOUR = "#f59e0b"
_INFEASIBLE = "#9ca3af"  # the colour of trials that break a constraint
MIN_TRIALS = 4  # completed; fewer tell nothing about importance
_MAX_LINES = 300  # of trials in one plot
_FADED = 0.45  # opacity of curves that are not those of the default or the best


def study_plots(study: Study, best: TrialRecord) -> list[Plot]:
    """Return the plots of a study. `best` is the trial that was trained again."""
    trials = study.trials()
    complete = [trial for trial in trials if trial.value is not None]
    plots = [_values(study, complete, best)] if complete else []
    if len(complete) >= MIN_TRIALS:
        plots += [_importances(study), *_slices(study, complete, best), _parallel(study, complete)]
    return [*plots, _curves(study, trials, best), _timeline(trials)]


def short_name(path: str) -> str:
    """Return the last part of a field's name."""
    return path.rpartition(".")[2]


def _values(study: Study, trials: Sequence[TrialRecord], best: TrialRecord) -> Plot:
    feasible = [trial for trial in trials if trial.is_feasible]
    highest = list(accumulate((trial.value or -math.inf for trial in feasible), max))
    figure = go.Figure()
    figure.add_scatter(
        x=[trial.number for trial in feasible],
        y=highest,
        mode="lines",
        line={"shape": "hv", "color": "#9ca3af", "width": 1},
        hoverinfo="skip",
    )
    _add_points(figure, trials, [trial.number for trial in trials], best)
    figure.update_traces(showlegend=False)
    figure.update_layout(xaxis_title="trial", yaxis_title="value")
    explanation = f"Each completed trial; the line is the highest so far. The ring is the best.{_grey(study)}"
    return Plot("history", "Values over the study", explanation, figure_json(figure))


def _add_points(figure: go.Figure, trials: Sequence[TrialRecord], x: Sequence[Any], best: TrialRecord) -> None:
    """Add one point for each trial, in the colour of its value or grey, and a ring around the best."""
    points = list(zip(x, trials, strict=True))
    for is_feasible in (False, True):
        share = [(position, trial) for position, trial in points if trial.is_feasible == is_feasible]
        values = [trial.value for _, trial in share]
        figure.add_scatter(
            x=[position for position, _ in share],
            y=values,
            text=[f"trial {trial.number}: {trial.value:.4g}" for _, trial in share],
            hoverinfo="text",
            mode="markers",
            marker={
                "size": 8,
                "color": values if is_feasible else _INFEASIBLE,
                "line": {"width": 1, "color": "#888"},
            },
            meta="scale" if is_feasible else None,
        )
    rings = [(position, trial) for position, trial in points if trial.number == best.number]
    figure.add_scatter(
        x=[position for position, _ in rings],
        y=[trial.value for _, trial in rings],
        hoverinfo="skip",
        mode="markers",
        marker={"size": 15, "symbol": "circle-open", "color": BEST_COLOUR, "line": {"width": 2}},
    )


def _importances(study: Study) -> Plot:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        shares = get_param_importances(study.optuna_study, evaluator=PedAnovaImportanceEvaluator())
    items = sorted(shares.items(), key=lambda item: item[1])
    figure = go.Figure(
        go.Bar(
            x=[share for _, share in items],
            y=[short_name(path) for path, _ in items],
            text=[f"{share:.2f}" for _, share in items],
            textposition="auto",
            orientation="h",
            marker={"color": COLOURS[0]},
        )
    )
    figure.update_layout(xaxis_title="importance", yaxis_title="", margin={"l": 100}, height=90 + 36 * len(items))
    explanation = (
        "How much each setting explains the difference between good trials and all (PED-ANOVA, Watanabe et al. "
        "2023)."
    )
    return Plot("importances", "Which settings mattered", explanation, figure_json(figure))


def _slices(study: Study, trials: Sequence[TrialRecord], best: TrialRecord) -> list[Plot]:
    """Return a plot of the values of trials over each setting."""
    plots = []
    for index, (path, dimension) in enumerate(study.plan.space.items()):
        figure = go.Figure()
        _add_points(figure, trials, [_position(dimension, trial.values[path]) for trial in trials], best)
        figure.update_traces(showlegend=False)
        axis: dict[str, Any] = {"title": path}
        if _is_logarithmic(dimension):
            ticks = _ticks([trial.values[path] for trial in trials])
            axis |= {"type": "log", "tickvals": ticks, "ticktext": [f"{tick:g}" for tick in ticks]}
        elif isinstance(dimension, Choices):
            axis["range"] = [-0.5, len(dimension.choices) - 0.5]
        figure.update_layout(xaxis=axis, yaxis_title="value")
        explanation = f"Each completed trial; the ring is the best.{_grey(study)}"
        plots.append(Plot(f"slice-{index}", f"Value by {short_name(path)}", explanation, figure_json(figure)))
    return plots


def _ticks(values: Sequence[float]) -> list[float]:
    """Return the ticks of a logarithmic axis: 1, 2, 5, 10, 20 and so on, or powers of ten over a wide range."""
    low, high = min(values), max(values)
    steps = (1, 2, 5) if high <= 100 * low else (1,)
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = (step * 10.0**exponent for exponent in exponents for step in steps)
    return [tick for tick in ticks if 0.8 * low <= tick <= 1.25 * high]


def _parallel(study: Study, trials: Sequence[TrialRecord]) -> Plot:
    """Plot each trial as a line over all settings and its value, each from its lowest to its highest."""
    ordered = sorted(trials, key=lambda trial: trial.value or 0.0)[-_MAX_LINES:]  # the highest are drawn on top
    axes = {short_name(path): _axis(dimension, path, ordered) for path, dimension in study.plan.space.items()}
    axes["value"] = _Axis([trial.value for trial in ordered], [trial.value or 0.0 for trial in ordered])
    figure = go.Figure()
    for index, trial in enumerate(ordered):
        texts = [f"{name} {_text(axis.labels[index])}" for name, axis in axes.items()]
        figure.add_scatter(
            x=list(axes),
            y=[axis.share(index) for axis in axes.values()],
            mode="lines",
            line={"width": 1.5},
            meta={"share": axes["value"].share(index)},
            text=f"trial {trial.number}: {', '.join(texts)}",
            hoverinfo="text",
            showlegend=False,
        )
    for name, axis in axes.items():
        for end, anchor in ((0.0, "top"), (1.0, "bottom")):
            label = {"text": _text(axis.label_at(end)), "yanchor": anchor, "yshift": 6 * (2 * end - 1)}
            figure.add_annotation(x=name, y=end, showarrow=False, **label)
    figure.update_layout(height=300, yaxis={"visible": False, "range": [-0.12, 1.12]}, xaxis={"showgrid": True})
    explanation = "Each line is a completed trial. Those with the highest values, on the right, stand out most."
    return Plot("parallel", "All settings at once", explanation, figure_json(figure))


@dataclass(frozen=True)
class _Axis:
    """An axis of all trials: what they have there, in words, and their positions."""

    labels: Sequence[Any]
    positions: Sequence[float]

    def share(self, index: int) -> float:
        """Return the position of a trial, from 0 for the lowest to 1 for the highest."""
        low, high = min(self.positions), max(self.positions)
        return (self.positions[index] - low) / (high - low) if high > low else 0.5

    def label_at(self, end: float) -> Any:
        """Return the label of the lowest or the highest position."""
        position = max(self.positions) if end else min(self.positions)
        return self.labels[list(self.positions).index(position)]


def _axis(dimension: Dimension, path: str, trials: Sequence[TrialRecord]) -> _Axis:
    """Return the axis of a setting: choices by their number, logarithmic settings by their logarithm."""
    values = [trial.values[path] for trial in trials]
    if isinstance(dimension, Choices):
        choices = [_position(dimension, choice) for choice in dimension.choices]
        return _Axis(values, [float(choices.index(_position(dimension, value))) for value in values])
    return _Axis(values, [math.log10(value) if _is_logarithmic(dimension) else float(value) for value in values])


def _text(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)


def _position(dimension: Dimension, value: Any) -> Any:
    """Return a setting's value as an axis takes it: a number, or the text of a choice."""
    return (value if isinstance(value, str) else json.dumps(value)) if isinstance(dimension, Choices) else value


def _is_logarithmic(dimension: Dimension) -> bool:
    return bool(getattr(dimension, "log", False))


def _curves(study: Study, trials: Sequence[TrialRecord], best: TrialRecord) -> Plot:
    """Plot what each trial reported; pruned and failed trials end in a cross."""
    by_seed = study.plan.tuning.pruner == "wilcoxon"
    figure = go.Figure()
    for trial in sorted(trials, key=lambda trial: (trial.number == best.number, trial.origin == "default")):
        if trial.curve:
            steps = [step + 1 for step in trial.curve] if by_seed else list(trial.curve)
            figure.add_scatter(x=steps, y=list(trial.curve.values()), **_style(trial, best))
    x_title = "training seeds, in their order" if by_seed else "frames"
    figure.update_layout(xaxis_title=x_title, yaxis_title="mean return", height=300)
    explanation = (
        ("Mean return on tuning seeds. " if by_seed else "Mean return in evaluations during training. ")
        + "Ending in a cross: pruned (orange) or failed (red). Green: running. A click on a name hides the curve."
        + _grey(study)
    )
    return Plot("curves", "Learning curves of all trials", explanation, figure_json(figure))


def _style(trial: TrialRecord, best: TrialRecord) -> Mapping[str, Any]:
    """Return how the curve of a trial looks: the best and the default stand out and have names."""
    roles = ["best"] * (trial.number == best.number) + ["default"] * (trial.origin == "default")
    ends_early, last = trial.state in ("pruned", "failed"), len(trial.curve) - 1
    is_cross = [ends_early and index == last for index in range(last + 1)]
    return {
        "mode": "lines+markers",
        "name": ", ".join([*roles, f"trial {trial.number}"]),
        "showlegend": bool(roles),
        "line": {
            "width": 3 if roles else 1,
            "color": BEST_COLOUR if "best" in roles else _colour(trial),
            "dash": "dot" if "default" in roles else "solid",
        },
        "opacity": 1.0 if roles else _FADED,
        "marker": {
            "symbol": ["x" if cross else "circle" for cross in is_cross],
            "size": [9 if cross else 3 for cross in is_cross],
        },
    }


def _colour(trial: TrialRecord) -> str | None:
    return _INFEASIBLE if trial.broken else STATE_COLOURS.get(trial.state)


def _grey(study: Study) -> str:
    """Return a sentence about grey trials, if the study has constraints."""
    return " Grey trials break a constraint; they are never the best." if study.plan.tuning.constraints else ""


def _timeline(trials: Sequence[TrialRecord]) -> Plot:
    """Plot which worker held which trial, and when."""
    turns = [(trial, turn) for trial in trials for turn in trial.attempts if turn.ended]
    begin = min((turn.began for _, turn in turns), default=0.0)
    names = list(dict.fromkeys(turn.worker for _, turn in turns))
    workers = {name: f"worker {index + 1}" for index, name in enumerate(names)}
    figure = go.Figure()
    for outcome in dict.fromkeys(turn.outcome for _, turn in turns):
        bars = [(trial, turn) for trial, turn in turns if turn.outcome == outcome]
        figure.add_bar(
            y=[workers[turn.worker] for _, turn in bars],
            x=[((turn.ended or 0) - turn.began) / 60 for _, turn in bars],
            base=[(turn.began - begin) / 60 for _, turn in bars],
            text=[str(trial.number) for trial, _ in bars],
            orientation="h",
            name=outcome,
            marker={"color": STATE_COLOURS.get(outcome), "line": {"width": 1, "color": "#888"}},
        )
    figure.update_layout(
        barmode="overlay",
        xaxis_title="minutes since the first trial began",
        yaxis_title="",
        height=90 + 34 * max(1, len(workers)),
        margin={"l": 80},
    )
    explanation = (
        "Bars are trials by number. Lost: the worker sent no heartbeat. Released: the worker was stopped."
    )
    return Plot("timeline", "Workers", explanation, figure_json(figure))
