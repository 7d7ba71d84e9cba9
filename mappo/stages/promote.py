"""The stage that promotes a run, or a study's best configuration."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from mappo.config import to_json
from mappo.environment.measured_names import require_measured
from mappo.promotion import promotion
from mappo.promotion.champions import Champions, task_name
from mappo.promotion.gate import Gate
from mappo.promotion.promotion import Decision, PromotionSkipped
from mappo.reporting.tables import counted, decision_lines
from mappo.reporting.terminal import say
from mappo.runs.locations import joined
from mappo.runs.run import POLICY_PARTS, load_checkpoint
from mappo.stages.choose import chosen_configuration
from mappo.stages.readable_errors import readable_errors
from mappo.stages.runtime import StageResult, metadata_of, run_label, watched_stage, write_json
from mappo.strict_json import checked, to_dict
from mappo.tuning.database import open_database
from mappo.tuning.study import Study
from mappo.tuning.study_config import study_config_from_json


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
    """Make a run's checkpoint the champion of its task if it is better; write the gate's `Decision` as JSON.

    `champions` is the directory, or the prefix in a store, that keeps champions. `gate` has fields of `Gate`.

    Raises:
        StageFailed: a checkpoint cannot be read or does not fit the task, or the store failed.
    """
    label = run_label(name, seed, str(run))
    with watched_stage("promote", config, compiled_by, seed, label, gpu_count=gpu_count) as (experiment, _):
        criteria = checked(Gate, gate or {})
        require_measured(criteria.constraints, experiment.environment, "gate.constraints")
        keeper = Champions(champions, task_name(experiment.environment))
        num_seeds, episodes = criteria.num_seeds, criteria.episodes_per_seed
        say("promote", f"{keeper.task}: {counted(num_seeds, 'fresh seed')} x {episodes} episodes of each policy")
        candidate = load_checkpoint(run, checkpoint, POLICY_PARTS)
        result = promotion.promote(experiment, candidate, keeper, criteria, partial(say, "promote"))
        write_json(decision, result)
        for line in decision_lines(result):
            say("promote", line)
        if result.champion:
            say("promote", f"to view the champion: mappo champion show {champions} --task {keeper.task}")
        return StageResult(metadata_of(experiment), decision_metrics(result))


def decision_metrics(decision: Decision) -> dict[str, float]:
    """Return the numbers of a promotion that a pipeline shows."""
    return {
        "is_promoted": float(decision.action == "promoted"),
        "candidate_return_mean": decision.candidate_mean.value,
        "opponent_return_mean": decision.opponent_mean.value,
        "difference": decision.difference,
        "difference_lower_bound": decision.lower_bound,
        **({"keeps_constraints": float(decision.keeps_constraints)} if decision.constraints else {}),
    }


def promote_best(
    name: str,
    trial: int,
    study_config: str,
    champions: str,
    decision: Path,
    *,
    scenario: str = "",
    compiled_by: str = "",
    gpu_count: str = "0",
) -> StageResult:
    """Promote the chosen trial's configuration, trained from the first fresh seed, if the gate lets it pass.

    The gate also requires the constraints of the study's trials, unless it has its own on a measurement. The order
    of fresh seeds was fixed before any was trained. An empty `champions` promotes nothing. `decision` is
    a file for the `Decision` or the `PromotionSkipped` as JSON. `scenario`: as in `work_on_study`.

    Raises:
        StageFailed: as `promote`.
    """
    with readable_errors("promote"), open_database() as database:
        settings = study_config_from_json(study_config)
        study = Study.load(database, name)
        study.require_named(scenario)
        chosen = chosen_configuration(study, settings.retraining.num_seeds, trial)
        gate = replace(settings.gate, constraints={**study.plan.tuning.constraints, **settings.gate.constraints})
    if not champions:
        say("promote", "nothing is promoted: no location for champions was given")
        write_json(decision, PromotionSkipped(name))
        return StageResult(metadata_of(chosen.best))
    seed = str(chosen.seeds[0])
    return promote(
        *(to_json(chosen.best), joined(chosen.store, f"{chosen.best_runs}-{seed}"), champions, decision),
        gate=to_dict(gate),
        name=name,
        seed=seed,
        compiled_by=compiled_by,
        gpu_count=gpu_count,
    )
