"""The self-contained HTML page of a study: its trials, the importance of settings, and the final comparison."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mappo.evaluation.comparison import ComparisonReport
from mappo.promotion.promotion import Decision, PromotionSkipped
from mappo.reporting.html import render
from mappo.reporting.study_plots import MIN_TRIALS, study_plots
from mappo.reporting.study_result import verdict
from mappo.reporting.tables import STUDY_NAMES, checkpoint_notes, constraint_lines, measurement_rows, trial_rows
from mappo.strict_json import to_dict
from mappo.tuning.search_space import Choices, applied, value_of
from mappo.tuning.study import Study
from mappo.tuning.trial import TrialRecord
from mappo.tuning.worker import trial_run

_WIDE = ("parallel", "timeline", "curves")  # plots as wide as the page


def build(
    study: Study,
    best: TrialRecord,
    comparison: ComparisonReport,
    decision: Decision | PromotionSkipped,
    directory: Path | None = None,
) -> str:
    """Return the page of a study. `best` is the trial that was trained again.

    `comparison` has the default's configuration first and, unless they are the same, the best's second. The page
    will lie in `directory`; if the runs of the study lie there, too, it has links to them.
    """
    trials = study.trials()
    config = study.plan.config
    chosen = applied(config, best.values)
    complete = sum(trial.state == "complete" for trial in trials)
    columns, rows = trial_rows(trials)
    plots = study_plots(study, best)
    return render(
        "study.html",
        plots,
        title=f"Study {study.name}: {config.environment.scenario}",
        subtitle=f"A search for better settings of {_algorithms(study)}, by Optuna.",
        facts=_facts(study, trials, best),
        verdict=dict(zip(("state", "text"), verdict(comparison), strict=True)),
        comparison=_comparison(comparison),
        decision=_decision(decision),
        changes=[
            (path, _setting(value_of(config, path)), _setting(value_of(chosen, path))) for path in study.plan.space
        ],
        is_changed=chosen != config,
        best_json=json.dumps(to_dict(chosen), indent=2),
        plots=[plot for plot in plots if plot.identifier not in _WIDE and not plot.identifier.startswith("slice")],
        slices=[plot for plot in plots if plot.identifier.startswith("slice")],
        wide_plots=[plot for plot in plots if plot.identifier in _WIDE],
        notes=[] if complete >= MIN_TRIALS else [f"Importances need at least {MIN_TRIALS} completed trials."],
        heads=columns,
        trials=[
            {"cells": row, "runs": _runs(study, trial, directory)} for row, trial in zip(rows, trials, strict=True)
        ],
        retrained=_retrained(directory),
        store=study.store,
        plan_json=json.dumps(study.plan.to_dict(), indent=2),
    )


def _runs(study: Study, trial: TrialRecord, directory: Path | None) -> list[dict[str, str]]:
    """Return the runs of a trial, one for each training seed, with links to those that lie in `directory`."""
    names = [trial_run(trial.number, trial.values, seed) for seed in study.plan.tuning.training_seeds]
    return [{"name": name, "link": _link(directory, name)} for name in names]


def _retrained(directory: Path | None) -> list[dict[str, str]]:
    """Return the runs of the best and the default that were trained again and have pages of their own."""
    pages = sorted(directory.glob("*/report.html")) if directory else []
    names = [page.parent.name for page in pages if page.parent.name.startswith(STUDY_NAMES)]
    return [{"name": name, "link": f"{name}/report.html"} for name in names]


def _link(directory: Path | None, run: str) -> str:
    """Return the link to the page of a run, or else to its files; empty if it does not lie in `directory`."""
    if directory is None or not (directory / run).is_dir():
        return ""
    return f"{run}/report.html" if (directory / run / "report.html").is_file() else f"{run}/"


def _setting(value: Any) -> str:
    """Return a value for people, who need no 17 digits."""
    return f"{value:.4g}" if isinstance(value, float) else json.dumps(value)


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


def _comparison(comparison: ComparisonReport) -> dict[str, Any]:
    rows = [("random policy", "", str(comparison.random.mean), "")]
    if comparison.heuristic:
        rows.append(("heuristic policy", "", str(comparison.heuristic.mean), ""))
    for name, configuration in zip(STUDY_NAMES, comparison.configurations, strict=False):
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
            for name, configuration in zip(STUDY_NAMES, comparison.configurations, strict=False)
        }
    )
    checkpoints = [f"{line[0].upper()}{line[1:]}." for line in checkpoint_notes(comparison, STUDY_NAMES)]
    return {"heads": heads, "rows": rows, "note": note, "measured": measured, "checkpoints": checkpoints}


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
