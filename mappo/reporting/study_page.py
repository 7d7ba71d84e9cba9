"""The self-contained HTML page of a study: its trials, the importance of settings, and the final comparison."""

import json
import warnings
from collections import Counter
from collections.abc import Sequence
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

from mappo.evaluation.comparison import ComparisonReport
from mappo.promotion.promotion import Decision, PromotionSkipped
from mappo.reporting.html import render
from mappo.reporting.plots import COLOURS, Plot, figure_json
from mappo.reporting.tables import constraint_lines, measurement_rows, trial_rows
from mappo.strict_json import to_dict
from mappo.tuning.search_space import Choices, applied, value_of
from mappo.tuning.study import Study
from mappo.tuning.trial import TrialRecord

_STATE_COLOURS = dict(zip(("complete", "pruned", "running", "lost", "failed", "released"), COLOURS, strict=False))
_INFEASIBLE = "#9ca3af"  # the colour of curves of trials that break a constraint
_MIN_TRIALS = 4  # completed; fewer tell nothing about importance


def build(
    study: Study, best: TrialRecord, comparison: ComparisonReport, decision: Decision | PromotionSkipped
) -> str:
    """Return the page of a study. `best` is the trial that was trained again.

    `comparison` has the default's configuration first and, unless they are the same, the best's second.
    """
    trials = study.trials()
    config = study.plan.config
    chosen = applied(config, best.values)
    complete = sum(trial.state == "complete" for trial in trials)
    columns, rows = trial_rows(trials)
    plots = [*_optuna_plots(study, complete), _curves(study, trials), _timeline(trials)]
    return render(
        "study.html",
        plots,
        title=f"Study {study.name}: {config.environment.scenario}",
        subtitle=f"A search for better settings of {_algorithms(study)}, by Optuna.",
        facts=_facts(study, trials, best),
        verdict=_verdict(comparison),
        comparison=_comparison(comparison),
        decision=_decision(decision),
        changes=[
            (path, json.dumps(value_of(config, path)), json.dumps(value_of(chosen, path)))
            for path in study.plan.space
        ],
        best_json=json.dumps(to_dict(chosen), indent=2),
        plots=plots,
        wide=["parallel", "slice", "timeline", "curves"],
        notes=[] if complete >= _MIN_TRIALS else [f"Importances need at least {_MIN_TRIALS} completed trials."],
        trials={"heads": columns, "rows": rows},
        plan_json=json.dumps(study.plan.to_dict(), indent=2),
    )


def _algorithms(study: Study) -> str:
    """Return the names of the learning algorithms of the trials, the default's first."""
    config, path = study.plan.config, "networks.critic"
    dimension = study.plan.space.get(path)
    choices = dimension.choices if isinstance(dimension, Choices) else ()
    configs = [config, *(applied(config, {path: choice}) for choice in choices)]
    return " and ".join(dict.fromkeys(config.networks.algorithm for config in configs))


def _facts(study: Study, trials: Sequence[TrialRecord], best: TrialRecord) -> list[tuple[str, str]]:
    states = Counter(trial.state for trial in trials)
    default = next((trial for trial in trials if trial.origin == "default"), None)
    hours = sum(trial.seconds for trial in trials) / 3600
    return [
        ("trials", ", ".join(f"{count} {state}" for state, count in states.items())),
        *(("feasibility", line) for line in constraint_lines(trials, study.plan.tuning.constraints)),
        ("best value, on tuning seeds", f"{best.value:.4g} (trial {best.number})"),
        ("value of the default", "" if default is None or default.value is None else f"{default.value:.4g}"),
        ("hours of workers", f"{hours:.2f}"),
        ("tuned", ", ".join(path.rpartition(".")[2] for path in study.plan.space)),
    ]


def _verdict(comparison: ComparisonReport) -> dict[str, str]:
    """Return one sentence: is the best better than the default, once trained from fresh seeds?"""
    gain = comparison.configurations[-1].gain
    if gain is None:
        return {"state": "", "text": "The best trial was the default configuration: there is nothing to change."}
    if gain.low is not None and gain.low > 0:
        return {"state": "good", "text": f"Better than the default: {gain} more return an episode."}
    if gain.high is not None and gain.high < 0:
        return {"state": "problem", "text": f"Worse than the default: {gain} more return an episode."}
    text = f"The data show no difference from the default: {gain} more return an episode, an interval around zero."
    return {"state": "look", "text": text}


def _comparison(comparison: ComparisonReport) -> dict[str, Any]:
    rows = [("random policy", "", str(comparison.random.mean), "")]
    if comparison.heuristic:
        rows.append(("heuristic policy", "", str(comparison.heuristic.mean), ""))
    for name, configuration in zip(("default", "best"), comparison.configurations, strict=False):
        returns = zip(configuration.training_seeds, configuration.episode_returns, strict=True)
        seeds = ", ".join(f"{seed}: {value:.3g}" for seed, value in returns)
        rows.append((name, seeds, str(configuration.mean), str(configuration.gain or "")))
    note = (
        "Both configurations were trained from the same fresh seeds, from which no trial was trained, and "
        f"evaluated on held-out seeds. Intervals of trained policies: {comparison.intervals}. Intervals of "
        "baselines: 95 %, over evaluation episodes, or over seeds if episodes of a seed depend on each other."
    )
    heads = ("policy", "training seeds and their mean returns", "mean return", "more than the default")
    baselines = {"random policy": comparison.random, "heuristic policy": comparison.heuristic}
    measured = measurement_rows(
        {name: returns.measurements for name, returns in baselines.items() if returns}
        | {
            name: configuration.measurements
            for name, configuration in zip(("default", "best"), comparison.configurations, strict=False)
        }
    )
    return {"heads": heads, "rows": rows, "note": note, "measured": measured}


def _decision(decision: Decision | PromotionSkipped) -> list[str]:
    if isinstance(decision, PromotionSkipped):
        return ["Nothing was promoted: no location for champions was given."]
    gate, is_promoted = decision.gate, decision.action == "promoted"
    return [
        f"The gate: on {len(decision.seeds)} fresh seeds, the candidate earned {decision.difference:.4g} more "
        f"return an episode than {decision.opponent}, with {gate.confidence:.0%} confidence more than "
        f"{decision.lower_bound:.4g}; the gate requires more than {gate.margin:.4g}. "
        + ("The candidate was promoted." if is_promoted else "The candidate was not promoted."),
        *(f"Constraint on {name}: {verdict}." for name, verdict in decision.constraints.items()),
        *(
            f"{name} ({measurement.reduction}): candidate {measurement}"
            for name, measurement in decision.candidate_measurements.items()
        ),
    ]


def _optuna_plots(study: Study, complete: int) -> list[Plot]:
    if not complete:
        return []
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    optuna_study = study.optuna_study
    plots = [
        Plot(
            "history",
            "Values over the study",
            f"Each completed trial; the line is the best so far.{_grey(study)}",
            _without_title(plot_optimization_history(optuna_study, target_name="value")),
        )
    ]
    if complete < _MIN_TRIALS:
        return plots
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        evaluator = PedAnovaImportanceEvaluator()
        importances = plot_param_importances(optuna_study, evaluator=evaluator, target_name="value")
        slices = plot_slice(optuna_study, target_name="value")
        parallel = plot_parallel_coordinate(optuna_study, target_name="value")
    return [
        *plots,
        Plot(
            "importances",
            "Which settings mattered",
            "How much each setting explains the difference between good trials and all (PED-ANOVA, Watanabe et "
            "al. 2023).",
            _without_title(importances),
        ),
        Plot("slice", "Values by setting", "Each completed trial; later ones are darker.", _without_title(slices)),
        Plot(
            "parallel",
            "All settings at once",
            "Each line is a completed trial; the leftmost axis is its value.",
            _without_title(parallel),
        ),
    ]


def _grey(study: Study) -> str:
    """Return a sentence about grey trials, if the study has constraints."""
    return " Grey trials break a constraint; they are never the best." if study.plan.tuning.constraints else ""


def _without_title(figure: go.Figure) -> str:
    figure.update_layout(title=None)
    return figure_json(figure)


def _curves(study: Study, trials: Sequence[TrialRecord]) -> Plot:
    """Plot what each trial reported; pruned and failed trials end in a cross."""
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
            name=f"trial {trial.number}, {'infeasible' if trial.broken else trial.state}",
            line={
                "width": 2 if trial.origin == "default" else 1,
                "color": _INFEASIBLE if trial.broken else _STATE_COLOURS.get(trial.state),
            },
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
        "Blue: completed. Ending in a cross: pruned (orange) or failed (red). Green: running. The default is "
        f"thicker.{_grey(study)}"
    )
    return Plot("curves", "Learning curves of all trials", explanation, figure_json(figure))


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
            marker={"color": _STATE_COLOURS.get(outcome), "line": {"width": 1, "color": "#888"}},
        )
    figure.update_layout(barmode="overlay", xaxis_title="minutes since the first trial began", yaxis_title="")
    explanation = (
        "Bars are trials by number. Lost: the worker sent no heartbeat. Released: the worker was stopped."
    )
    return Plot("timeline", "Workers", explanation, figure_json(figure))
