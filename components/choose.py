"""The stage that chooses a study's best configuration, as a Kubeflow component."""

from typing import List, NamedTuple  # noqa: UP035  (Kubeflow's compiler knows this spelling)

from kfp import dsl

from components import component


@component
def choose(
    study: str,
    config: str,
    best: dsl.Output[dsl.Artifact],
    study_config: str = "{}",
) -> NamedTuple("Chosen", [("config", str), ("seeds", List[str]), ("store", str), ("trial", int), ("runs", str)]):  # type: ignore[valid-type]  # noqa: UP006
    """Choose a study's best configuration, and the fresh seeds and the store of its retraining.

    Args:
        study: The name of a study.
        config: The configuration that the user submitted, which names the only scenario that may run here.
        best: The best trial's configuration as JSON.
        study_config: The study's settings as JSON, of which this stage reads the retraining.

    Returns:
        The best configuration as JSON, seeds that no trial was trained from, the store of the study's runs, the
        best trial's number, and the prefix of the names of its runs.
    """
    from pathlib import Path

    from mappo.config import from_json, to_json
    from mappo.stages.choose import choose

    scenario = from_json(config).environment.scenario
    chosen = choose(study, study_config, scenario, output=Path(best.path))
    best.metadata.update({"study": study, "trial": str(chosen.trial.number)})
    seeds = [str(seed) for seed in chosen.seeds]
    return (to_json(chosen.best), seeds, chosen.store, chosen.trial.number, chosen.best_runs)
