"""One self-contained HTML page of a tuning study: its trials, what mattered, and what came of it."""

import json
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import optuna
import plotly.graph_objects as go
from optuna.exceptions import ExperimentalWarning
from optuna.importance import PedAnovaImportanceEvaluator
from optuna.visualization import (
    plot_optimization_history,
    plot_parallel_coordinate,
    plot_param_importances,
    plot_slice,
)

from mappo.reporting.html import render
from mappo.reporting.plots import COLOURS, Plot, figure_json
from mappo.strict_json import to_dict
from mappo.tuning.search_space import applied, value_of
from mappo.tuning.study import Study
from mappo.tuning.trial import TrialRecord

_STATE_COLOURS = dict(zip(("complete", "pruned", "running", "lost", "failed", "released"), COLOURS, strict=False))
_ENOUGH = 4  # completed trials, below which nothing can be said of importance


def build(study: Study, best: TrialRecord, comparison: Mapping[str, Any], decision: Mapping[str, Any]) -> str:
    """The page.

    `best` is the trial that was trained again; `comparison` and `decision` are a ComparisonReport and a gate's
    Decision as JSON.
    """
    trials = study.trials()
    config = study.plan.config
    chosen = applied(config, best.values)
    complete = sum(trial.state == "complete" for trial in trials)
    shown = [*_optuna_plots(study, complete), _curves(study, trials), _timeline(trials)]
    return render(
        "study.html",
        shown,
        title=f"Study {study.name}: {config.environment.scenario}",
        subtitle="A search for better settings of multi-agent proximal policy optimisation (MAPPO), by Optuna.",
        facts=_facts(study, trials, best),
        verdict=_verdict(comparison),
        comparison=_comparison(comparison),
        decision=_decision(decision),
        changes=[
            (path, json.dumps(value_of(config, path)), json.dumps(value_of(chosen, path)))
            for path in study.plan.space
        ],
        best_json=json.dumps(to_dict(chosen), indent=2),
        plots=shown,
        wide=["parallel", "slice", "timeline", "curves"],
        notes=[] if complete >= _ENOUGH else [f"Importances need at least {_ENOUGH} completed trials."],
        trials=_table(study, trials),
        plan_json=json.dumps(study.plan.to_dict(), indent=2),
    )


def _facts(study: Study, trials: Sequence[TrialRecord], best: TrialRecord) -> list[tuple[str, str]]:
    states = Counter(trial.state for trial in trials)
    default = next((trial for trial in trials if trial.origin == "default"), None)
    hours = sum(trial.seconds for trial in trials) / 3600
    return [
        ("trials", ", ".join(f"{count} {state}" for state, count in states.items())),
        ("best value, on tuning seeds", f"{best.value:.4g} (trial {best.number})"),
        ("of the default", "" if default is None or default.value is None else f"{default.value:.4g}"),
        ("hours of workers", f"{hours:.2f}"),
        ("tuned", ", ".join(path.rpartition(".")[2] for path in study.plan.space)),
    ]


def _verdict(comparison: Mapping[str, Any]) -> dict[str, str]:
    """In one sentence: is the best better than the default, once trained from fresh seeds?"""
    if len(comparison["configurations"]) < 2:
        return {"state": "", "text": "The best trial was the default configuration: there is nothing to change."}
    gain = comparison["configurations"][1]["gain"]
    shown = _interval(gain)
    if gain["low"] is not None and gain["low"] > 0:
        return {"state": "good", "text": f"Better than the default: {shown} more return an episode."}
    if gain["high"] is not None and gain["high"] < 0:
        return {"state": "problem", "text": f"Worse than the default: {shown} more return an episode."}
    text = f"No difference from the default can be told: {shown} more return an episode, an interval around zero."
    return {"state": "look", "text": text}


def _comparison(comparison: Mapping[str, Any]) -> dict[str, Any]:
    rows = [("random policy", "", _interval(comparison["random"]["mean"]), "")]
    if comparison["heuristic"]:
        rows.append(("heuristic policy", "", _interval(comparison["heuristic"]["mean"]), ""))
    for name, each in zip(("default", "best"), comparison["configurations"], strict=False):
        seeds = ", ".join(
            f"{seed}: {value:.3g}"
            for seed, value in zip(each["training_seeds"], each["episode_returns"], strict=True)
        )
        rows.append((name, seeds, _interval(each["mean"]), _interval(each["gain"]) if each["gain"] else ""))
    note = (
        "Both configurations were trained from the same fresh seeds, from which no trial was trained, and judged "
        f"on held-out evaluation seeds. Of the trained: {comparison['intervals']}. Of the baselines: 95 % "
        "bootstrap intervals that resample evaluation episodes."
    )
    heads = ("policy", "training seeds and their mean returns", "mean return", "more than the default")
    return {"heads": heads, "rows": rows, "note": note}


def _decision(decision: Mapping[str, Any]) -> list[str]:
    if decision["action"] == "not asked":
        return ["Nothing was to be promoted: no place for champions was given."]
    gate, is_new = decision["gate"], decision["action"] == "promoted"
    return [
        f"The gate: on {len(decision['seeds'])} seeds drawn afresh, the candidate earned "
        f"{decision['difference']:.4g} more than {decision['opponent']}, with {gate['confidence']:.0%} confidence "
        f"above {decision['lower_bound']:.4g}; more than {gate['margin']:.4g} was asked for. "
        + ("It was promoted." if is_new else "It was not promoted.")
    ]


def _optuna_plots(study: Study, complete: int) -> list[Plot]:
    if not complete:
        return []
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    own = study.optuna_study
    plots = [
        Plot(
            "history",
            "Values over the study",
            "Each completed trial; the line is the best so far.",
            _of_optuna(plot_optimization_history(own, target_name="value")),
        )
    ]
    if complete < _ENOUGH:
        return plots
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        evaluator = PedAnovaImportanceEvaluator()
        importances = plot_param_importances(own, evaluator=evaluator, target_name="value")
        slices = plot_slice(own, target_name="value")
        parallel = plot_parallel_coordinate(own, target_name="value")
    return [
        *plots,
        Plot(
            "importances",
            "Which settings mattered",
            "Share by which each setting tells good trials from all (PED-ANOVA, Watanabe et al. 2023).",
            _of_optuna(importances),
        ),
        Plot("slice", "Values by setting", "Each completed trial; later ones are darker.", _of_optuna(slices)),
        Plot(
            "parallel",
            "All settings at once",
            "Each line is a completed trial; the leftmost axis is its value.",
            _of_optuna(parallel),
        ),
    ]


def _of_optuna(figure: go.Figure) -> str:
    figure.update_layout(title=None)
    return figure_json(figure)


def _curves(study: Study, trials: Sequence[TrialRecord]) -> Plot:
    """What each trial reported; pruned and failed ones end in a cross."""
    by_seed = study.plan.tuning.pruner == "wilcoxon"
    figure = go.Figure()
    for trial in trials:
        if not trial.curve:
            continue
        is_whole = trial.state not in ("pruned", "failed")
        last = len(trial.curve) - 1
        figure.add_scatter(
            x=[step + 1 for step in trial.curve] if by_seed else list(trial.curve),
            y=list(trial.curve.values()),
            mode="lines+markers",
            name=f"trial {trial.number}, {trial.state}",
            line={"width": 2 if trial.origin == "default" else 1, "color": _STATE_COLOURS.get(trial.state)},
            opacity=1.0 if is_whole else 0.7,
            marker={
                "symbol": ["circle" if is_whole or index < last else "x" for index in range(last + 1)],
                "size": [3 if is_whole or index < last else 9 for index in range(last + 1)],
            },
            showlegend=False,
        )
    if by_seed:
        figure.update_layout(
            xaxis_title="training seeds, in their order", yaxis_title="mean return on tuning seeds"
        )
    else:
        figure.update_layout(xaxis_title="frames", yaxis_title="mean return in evaluation during training")
    explanation = (
        "Blue: completed; ending in a cross: pruned (orange) or failed (red); green: not ended. The default is "
        "thicker."
    )
    return Plot("curves", "Learning curves of all trials", explanation, figure_json(figure))


def _timeline(trials: Sequence[TrialRecord]) -> Plot:
    """Which worker had which trial, and when."""
    attempts = [(trial, attempt) for trial in trials for attempt in trial.attempts if attempt.ended]
    begin = min((attempt.began for _, attempt in attempts), default=0.0)
    names = list(dict.fromkeys(attempt.worker for _, attempt in attempts))
    workers = {name: f"worker {index + 1}" for index, name in enumerate(names)}
    figure = go.Figure()
    for outcome in dict.fromkeys(attempt.outcome for _, attempt in attempts):
        mine = [(trial, attempt) for trial, attempt in attempts if attempt.outcome == outcome]
        figure.add_bar(
            y=[workers[attempt.worker] for _, attempt in mine],
            x=[((attempt.ended or 0) - attempt.began) / 60 for _, attempt in mine],
            base=[(attempt.began - begin) / 60 for _, attempt in mine],
            text=[str(trial.number) for trial, _ in mine],
            orientation="h",
            name=outcome,
            marker={"color": _STATE_COLOURS.get(outcome), "line": {"width": 1, "color": "#888"}},
        )
    figure.update_layout(barmode="overlay", xaxis_title="minutes since the first trial began", yaxis_title="")
    explanation = "Bars are trials by number. Lost: the worker fell silent; released: it was asked to end."
    return Plot("timeline", "Workers", explanation, figure_json(figure))


def _table(study: Study, trials: Sequence[TrialRecord]) -> dict[str, Any]:
    paths = list(study.plan.space)
    heads = ["trial", "state", "value", *(path.rpartition(".")[2] for path in paths), "minutes", "attempts", "why"]
    rows = [
        [
            trial.number,
            trial.state,
            "" if trial.value is None else f"{trial.value:.4g}",
            *(_cell(trial.values.get(path)) for path in paths),
            f"{trial.seconds / 60:.1f}",
            len(trial.attempts),
            trial.reason or ("" if trial.origin == "sampled" else trial.origin),
        ]
        for trial in trials
    ]
    return {"heads": heads, "rows": rows}


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)


def _interval(estimate: Mapping[str, Any]) -> str:
    if estimate["low"] is None or estimate["high"] is None:
        return f"{estimate['value']:.3g}"
    return f"{estimate['value']:.3g} [{estimate['low']:.3g}, {estimate['high']:.3g}]"
