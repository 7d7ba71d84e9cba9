"""The stage that promotes a run, or a study's best configuration."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mappo.config import to_json
from mappo.promotion import promotion
from mappo.promotion.champions import Champions, task_name
from mappo.promotion.gate import Gate
from mappo.promotion.promotion import Decision
from mappo.reporting.tables import decision_lines
from mappo.reporting.terminal import say
from mappo.runs.locations import joined
from mappo.runs.run import load_checkpoint
from mappo.stages.choose import chosen_configuration
from mappo.stages.runtime import StageResult, metadata_of, readable_errors, run_label, watched_stage, write_json
from mappo.strict_json import checked, to_dict
from mappo.tuning.database import open_database
from mappo.tuning.study import Study
from mappo.tuning.study_config import Retraining


def promote(
    config: str,
    run: str | Path,
    champions: str,
    decision: Path | None = None,
    *,
    gate: Mapping[str, Any] | None = None,
    checkpoint: str = "best",
    name: str = "",
    seed: str = "",
    compiled_by: str = "",
    gpu_count: str = "0",
) -> StageResult:
    """Put a run's checkpoint in the champion's place if it is better; write the gate's `Decision` as JSON.

    `champions` is where champions are kept: a directory, or a place in a store. `gate` has fields of `Gate`.

    Raises:
        StageFailed: a checkpoint cannot be read or does not fit the task, or the store failed.
    """
    label = run_label(name, seed, str(run))
    with watched_stage("promote", config, compiled_by, seed, label, gpu_count=gpu_count) as (experiment, _):
        asked = checked(Gate, gate or {})
        place = Champions(champions, task_name(experiment.environment))
        say("promote", f"{place.task}: {asked.num_seeds} fresh seeds x {asked.episodes_per_seed} episodes of each")
        result = promotion.promote(
            experiment, load_checkpoint(run, checkpoint), place, asked, partial(say, "promote")
        )
        write_json(decision, result)
        for line in decision_lines(result):
            say("promote", line)
        return StageResult(metadata_of(experiment), _decision_metrics(result))


def _decision_metrics(decision: Decision) -> dict[str, float]:
    return {
        "is_promoted": float(decision.action == "promoted"),
        "candidate_return_mean": decision.candidate_mean.value,
        "opponent_return_mean": decision.opponent_mean.value,
        "difference": decision.difference,
        "difference_lower_bound": decision.lower_bound,
    }


def read_gate(values: Mapping[str, Any]) -> Gate:
    """What a candidate must show, from JSON.

    Raises:
        ConfigError: a value that is not allowed.
    """
    return checked(Gate, values)


def promote_best(
    name: str, trial: int, finish: Retraining, decision: Path, *, compiled_by: str = "", gpu_count: str = "0"
) -> StageResult:
    """Put the chosen trial's configuration, trained from the first fresh seed, in the champion's place if better.

    Which seed that is was fixed before any was trained. Without a place for champions nothing is done.

    Raises:
        StageFailed: as `stages.promote`.
    """
    with readable_errors("promote"), open_database() as database:
        chosen = chosen_configuration(Study.load(database, name), finish.num_seeds, trial)
    if not finish.champions:
        say("promote", "nothing is promoted: no place for champions was given")
        write_json(decision, PromotionSkipped(name))
        return StageResult(metadata_of(chosen.best))
    seed = str(chosen.seeds[0])
    return promote(
        *(to_json(chosen.best), joined(chosen.place, f"{chosen.best_runs}-{seed}"), finish.champions, decision),
        gate=to_dict(finish.gate),
        name=name,
        seed=seed,
        compiled_by=compiled_by,
        gpu_count=gpu_count,
    )


@dataclass(frozen=True)
class PromotionSkipped:
    """In the place of a gate's decision, where nothing was to be promoted."""

    study: str
    action: str = "not asked"
