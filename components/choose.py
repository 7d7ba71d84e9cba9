"""The stage that chooses a study's best configuration, as a Kubeflow component."""

from typing import List, NamedTuple  # noqa: UP035  (Kubeflow's compiler knows this spelling)

from kfp import dsl

from components import component


@component
def choose(
    study: str,
    best: dsl.Output[dsl.Artifact],
    num_seeds: int = 3,
) -> NamedTuple("Chosen", [("config", str), ("seeds", List[str]), ("place", str), ("trial", int), ("runs", str)]):  # type: ignore[valid-type]  # noqa: UP006
    """Say which configuration of a study is trained again, from which fresh seeds, and where that is kept.

    Args:
        study: The name of a study.
        best: The best trial's configuration as JSON.
        num_seeds: How many seeds, at least 2.

    Returns:
        The best configuration as JSON, seeds that no trial was trained from, the place of the study's runs, the
        best trial's number, and what runs of it are called.
    """
    from pathlib import Path

    from mappo.config import to_json
    from mappo.stages.choose import choose

    chosen = choose(study, num_seeds, output=Path(best.path))
    best.metadata.update({"study": study, "trial": str(chosen.trial.number)})
    seeds = [str(seed) for seed in chosen.seeds]
    return (to_json(chosen.best), seeds, chosen.place, chosen.trial.number, chosen.best_runs)
