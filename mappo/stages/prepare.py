"""The stage that prepares a study."""

from pathlib import Path
from typing import Any

from mappo.environment.measured_names import require_measured
from mappo.errors import ConfigError
from mappo.reporting.terminal import say
from mappo.stages.runtime import StageResult, metadata_of, watched_stage
from mappo.tuning.catalogue import editions
from mappo.tuning.database import Database, open_database
from mappo.tuning.database_url import configured_url
from mappo.tuning.plan import Plan
from mappo.tuning.search_space import contains, extended_space
from mappo.tuning.study import TERMINAL, Study
from mappo.tuning.study_config import Ending, study_config_from_json, study_name


def prepare(
    config: str,
    series: str,
    store: str,
    study_config: str,
    *,
    edition: str = "",
    session: str = TERMINAL,
    champions: str = "",
    compiled_by: str = "",
) -> StageResult:
    """Create a study, or continue it. An edition of a series starts from the best values of the edition before.

    `study_config` is a `StudyConfig` as JSON. `store` keeps the runs of trials. `session` names who requests the
    trials of the budget. `champions` is the location to promote the best to, if the study is resumed.

    Raises:
        StageFailed: the settings are not allowed, or the database does not answer.
    """
    name = study_name(series, edition)
    with (
        watched_stage("prepare", config, compiled_by, label=name) as (experiment, _),
        open_database(is_new=True) as database,
    ):
        settings = study_config_from_json(study_config)
        for field, names in (
            ("tuning.constraints", settings.tuning.constraints),
            ("gate.constraints", settings.gate.constraints),
        ):
            require_measured(names, experiment.environment, field)
        plan = Plan(experiment, extended_space(settings.space, experiment), settings.tuning)
        study = Study.prepare(
            *(database, name, plan, settings.budget.num_trials),
            store=str(Path(store).absolute()) if configured_url() and "://" not in store else store,
            series=series,
            session=session,
            timeout_seconds=3600 * settings.budget.hours,
            warm_start=_best_of_series(database, series, name, plan) if edition else None,
        )
        study.keep_ending(Ending(settings.retraining, settings.gate, champions))
        done = sum(trial.state not in ("waiting", "running") for trial in study.trials())
        say("prepare", f"study {name} in {database.location}: {study.num_trials} trials, {done} done")
        say("prepare", f"tunes {', '.join(plan.space)}; pruner: {plan.tuning.pruner}; runs in {study.store}")
        if plan.tuning.pruner not in ("wilcoxon", "none") and not experiment.selection.interval_iterations:
            say(
                "prepare",
                "warning: selection.interval_iterations = 0: no trial is evaluated before its end, or pruned",
            )
        say("prepare", f"a trial fails after {plan.tuning.trial_hours:g} hours (tuning.trial_hours)")
        for name, constraint in plan.tuning.constraints.items():
            say("prepare", f"a trial is feasible if {name} is {constraint}")
        if settings.budget.hours:
            say("prepare", f"no trial starts after {settings.budget.hours:g} hours")
        return StageResult(metadata_of(experiment))


def _best_of_series(database: Database, series: str, name: str, plan: Plan) -> dict[str, Any] | None:
    """Return the best values of the latest earlier study of the series; None if they leave this study's space."""
    for edition in editions(database, series):
        if edition == name:
            continue
        try:
            best = Study.load(database, edition).best()
        except ConfigError as error:
            say("prepare", f"warning: no warm start from study {edition}: {error}")
            continue
        if best is None:
            continue
        outside = [path for path, range_ in plan.space.items() if not contains(range_, best.values.get(path))]
        if outside:
            say(
                "prepare",
                f"no warm start from study {edition}: its best is outside the space: {', '.join(outside)}",
            )
            return None
        say("prepare", f"warm start: the second trial is the best of study {edition}")
        return {path: best.values[path] for path in plan.space}
    return None
