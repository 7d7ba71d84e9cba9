"""The stage that prepares a study."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mappo.errors import ConfigError
from mappo.reporting.terminal import say
from mappo.stages.runtime import StageResult, metadata_of, watched_stage
from mappo.strict_json import checked, parse_json_object
from mappo.tuning.catalogue import editions
from mappo.tuning.database import Database, open_database
from mappo.tuning.database_url import URL_VARIABLE
from mappo.tuning.plan import Plan
from mappo.tuning.search_space import TuningConfig, contains, extended_space
from mappo.tuning.study import TERMINAL, Study
from mappo.tuning.study_config import Budget, study_name


def prepare(
    config: str,
    series: str,
    store: str,
    budget: Budget,
    *,
    edition: str = "",
    session: str = TERMINAL,
    space: str = "{}",
    tuning: Mapping[str, Any] | None = None,
    compiled_by: str = "",
) -> StageResult:
    """Make a study or go on with it. An edition of a series begins with the best values of the edition before.

    `space` is JSON that changes the default space, `tuning` fields of `TuningConfig`; `store` is where the runs of
    trials are kept; `session` is who asks for the budget's trials.

    Raises:
        StageFailed: the study cannot be, or the database does not answer.
    """
    name = study_name(series, edition)
    with (
        watched_stage("prepare", config, compiled_by, label=name) as (experiment, _),
        open_database(is_new=True) as database,
    ):
        ranges = extended_space(parse_json_object(space), experiment)
        plan = Plan(experiment, ranges, checked(TuningConfig, tuning or {}))
        study = Study.prepare(
            *(database, name, plan, budget.num_trials),
            store=str(Path(store).absolute()) if os.environ.get(URL_VARIABLE) and "://" not in store else store,
            series=series,
            session=session,
            timeout_seconds=3600 * budget.hours,
            warm_start=_best_before(database, series, name, plan) if edition else None,
        )
        done = sum(trial.state not in ("waiting", "running") for trial in study.trials())
        say("prepare", f"study {name} in {database.place}: {study.num_trials} trials, {done} done")
        say("prepare", f"tunes {', '.join(plan.space)}; pruner: {plan.tuning.pruner}; runs in {study.place}")
        if plan.tuning.pruner not in ("wilcoxon", "none") and not experiment.selection.interval_iterations:
            say(
                "prepare",
                "warning: selection.interval_iterations = 0: nothing is judged before it ends, nor pruned",
            )
        if budget.hours:
            say("prepare", f"no trial is started after {budget.hours:g} hours")
        return StageResult(metadata_of(experiment))


def _best_before(database: Database, series: str, name: str, plan: Plan) -> dict[str, Any] | None:
    """The best values of the latest study of the series but this one, as far as they are in this one's space."""
    for each in editions(database, series):
        if each == name:
            continue
        try:
            best = Study.load(database, each).best()
        except ConfigError as error:
            say("prepare", f"warning: not begun with what study {each} found: {error}")
            continue
        if best is None:
            continue
        outside = [path for path, range_ in plan.space.items() if not contains(range_, best.values.get(path))]
        if outside:
            say("prepare", f"not begun with the best of study {each}: outside the space: {', '.join(outside)}")
            return None
        say("prepare", f"the second trial is the best of study {each}")
        return {path: best.values[path] for path in plan.space}
    return None
