"""The stage that chooses a study's best configuration."""

import json
from dataclasses import dataclass
from pathlib import Path

from mappo.config import ExperimentConfig
from mappo.errors import NoBestTrial
from mappo.reporting.tables import best_lines, why_no_best
from mappo.reporting.terminal import say
from mappo.runs.owned_file import write_whole
from mappo.stages.readable_errors import readable_errors
from mappo.strict_json import to_dict
from mappo.tuning.database import open_database
from mappo.tuning.search_space import applied
from mappo.tuning.study import Study
from mappo.tuning.study_config import study_config_from_json
from mappo.tuning.trial import TrialRecord
from mappo.tuning.worker import fresh_seeds, trial_label


@dataclass(frozen=True)
class ChosenConfiguration:
    """The configurations to retrain after a study: the best and the default, from fresh seeds, into a store."""

    best: ExperimentConfig
    default: ExperimentConfig
    seeds: list[int]
    trial: TrialRecord
    store: str

    @property
    def best_runs(self) -> str:
        """The prefix of the retrained runs' names; the seed follows. It differs per trial."""
        return f"best-{trial_label(self.trial.number, self.trial.values)}"


def choose(name: str, study_config: str, scenario: str = "", *, output: Path | None = None) -> ChosenConfiguration:
    """Choose a study's best configuration, and seeds that no trial was trained from; write the former as JSON.

    `scenario`: as in `work_on_study`.

    Raises:
        StageFailed: no trial is feasible, or the settings are not allowed.
    """
    with readable_errors("choose"), open_database() as database:
        num_seeds = study_config_from_json(study_config).retraining.num_seeds
        study = Study.load(database, name)
        study.require_named(scenario)
        chosen = chosen_configuration(study, num_seeds)
        for line in best_lines(chosen.trial, chosen.default):
            say("choose", line)
        if output:
            write_whole(output, json.dumps(to_dict(chosen.best), indent=2) + "\n")
        return chosen


def chosen_configuration(study: Study, num_seeds: int, trial: int | None = None) -> ChosenConfiguration:
    """Return the configuration to retrain; `trial` keeps an earlier choice, although others may have ended since.

    Raises:
        NoBestTrial: no trial is feasible.
    """
    best = study.best() if trial is None else study.trials()[trial]
    if best is None:
        raise NoBestTrial(f"study {study.name}: {why_no_best(study.trials(), study.plan.tuning.constraints)}")
    config = study.plan.config
    return ChosenConfiguration(
        applied(config, best.values), config, fresh_seeds(study, num_seeds), best, study.store
    )
