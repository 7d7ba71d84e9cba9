"""The stage that chooses a study's best configuration."""

import json
from dataclasses import dataclass
from pathlib import Path

from mappo.config import ExperimentConfig
from mappo.errors import ConfigError
from mappo.reporting.tables import best_lines
from mappo.reporting.terminal import say
from mappo.stages.runtime import readable_errors
from mappo.strict_json import to_dict
from mappo.tuning import worker
from mappo.tuning.database import open_database
from mappo.tuning.search_space import applied
from mappo.tuning.study import Study
from mappo.tuning.trial import TrialRecord


@dataclass(frozen=True)
class ChosenConfiguration:
    """What is trained again after a study: its best configuration and the one it began with, from fresh seeds."""

    best: ExperimentConfig
    default: ExperimentConfig
    seeds: list[int]
    trial: TrialRecord
    place: str

    @property
    def best_runs(self) -> str:
        """What the runs of the best are called, before their seeds; another best has other runs."""
        return f"best-{worker.trial_label(self.trial.number, self.trial.values)}"


def choose(name: str, num_seeds: int, *, output: Path | None = None) -> ChosenConfiguration:
    """The best configuration of a study, and seeds that no trial was trained from; write the former as JSON.

    Raises:
        StageFailed: no trial was completed.
    """
    with readable_errors("choose"), open_database() as database:
        chosen = chosen_configuration(Study.load(database, name), num_seeds)
        for line in best_lines(chosen.trial, chosen.default):
            say("choose", line)
        if output:
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text(json.dumps(to_dict(chosen.best), indent=2) + "\n")
        return chosen


def chosen_configuration(study: Study, num_seeds: int, trial: int | None = None) -> ChosenConfiguration:
    """What is trained again; a trial that was chosen before stays it, whatever has ended since."""
    best = study.best() if trial is None else study.trials()[trial]
    if best is None:
        reasons = {trial.reason for trial in study.trials() if trial.reason}
        raise ConfigError(f"study {study.name}: no trial was completed{': ' * bool(reasons)}{'; '.join(reasons)}")
    config = study.plan.config
    return ChosenConfiguration(
        applied(config, best.values), config, worker.fresh_seeds(study, num_seeds), best, study.place
    )
