"""The tuning pipeline: prepare -> workers -> choose -> retrain best and default -> promote -> report."""

from collections.abc import Callable
from typing import Any, List, NamedTuple  # noqa: UP035  (Kubeflow's compiler knows this spelling)

from kfp import dsl

import mappo
from components.choose import choose
from components.prepare import prepare
from components.promote import promote
from components.report import report
from components.tune import tune
from pipelines.placement import Placement, with_placement
from pipelines.seeds import make_each_seed
from pipelines.site import Site


class Artifacts(NamedTuple):
    """The artifacts of a finished run."""

    best_configuration: dsl.Artifact
    decision: dsl.Artifact
    comparison_report: dsl.Artifact
    comparison_metrics: dsl.Metrics
    study_page: dsl.HTML


def make_tuning_pipeline(site: Site | None, parallelism: int) -> Callable[..., Any]:
    """Return the pipeline for a site, or for this machine (None).

    It trains `parallelism` seeds at once; 0 trains all at once.
    """
    retrain_default = make_each_seed(site, parallelism, "retrain-default")
    retrain_best = make_each_seed(site, parallelism, "retrain-best")

    @dsl.pipeline(name="mappo-workers")
    @with_placement(site, "tune")
    def all_workers(placement: Placement, study: str, config: str, workers: List[str]):  # noqa: UP006
        """Work on a study until no trial is left, each worker in its own pod."""
        with dsl.ParallelFor(workers) as worker:
            worked = tune(
                study=study,
                worker=worker,
                config=config,
                **placement.gpus("tune"),
                compiled_by=mappo.__version__,
            )
            placement.apply(worked, "tune")

    @dsl.pipeline(
        name="mappo-tuning",
        description="Tune a configuration by a study of trials, retrain its best, promote and report it.",
    )
    @with_placement(site, "prepare", "tune", "choose", "train", "evaluate", "promote", "report", ends_as="tuning")
    def tuning_pipeline(
        placement: Placement,
        config: str,
        study: str,
        edition: str = "",
        study_config: str = "{}",
        session: str = "",
        workers: List[str] = ["1", "2"],  # noqa: B006, UP006
        store: str = "",
        champions: str = "",
    ) -> Artifacts:
        """Tune one configuration.

        Args:
            placement: The placement of its stages on the cluster.
            config: The default configuration as JSON, as `mappo show-config` prints it.
            study: The name of the study, which continues if it exists, or of a series of studies.
            edition: The edition of the series, such as [[ScheduledTime]]: each is a new study with a warm start.
            study_config: The study's settings as JSON: space, tuning, budget, retraining, gate; {} for defaults.
            session: The name of who requests the trials, if not this run; a second request of one name adds none.
            workers: The names of the workers, one pod each, such as ["1", "2"].
            store: The store of runs, as s3://bucket/prefix; empty to keep runs with the pipeline's artifacts.
            champions: The location of champions, as s3://bucket/prefix; empty to promote nothing.
        """
        version = mappo.__version__
        prepared = prepare(
            config=config,
            study=study,
            edition=edition,
            scheduled_at=placement.scheduled_at,
            session=session,
            run_id=dsl.PIPELINE_JOB_ID_PLACEHOLDER,
            study_config=study_config,
            store=store,
            compiled_by=version,
        )
        name = prepared.outputs["Output"]
        worked = all_workers(study=name, config=config, workers=workers, **placement.parameters("tune"))
        chosen = choose(study=name, config=config, study_config=study_config).after(worked)
        seeds, runs_store, trial = (chosen.outputs[output] for output in ("seeds", "store", "trial"))
        placed = placement.parameters("train", "evaluate")
        default = retrain_default(config=config, seeds=seeds, store=runs_store, run="default", **placed)
        best = retrain_best(
            config=chosen.outputs["config"], seeds=seeds, store=runs_store, run=chosen.outputs["runs"], **placed
        )
        promoted = promote(
            study=name,
            trial=trial,
            config=config,
            study_config=study_config,
            champions=champions,
            **placement.gpus("promote"),
            compiled_by=version,
        ).after(best)
        reported = report(
            study=name,
            trial=trial,
            default_evaluations=default.output,
            best_evaluations=best.output,
            decision=promoted.outputs["decision"],
        )
        for nested in (worked, default, best):
            nested.set_caching_options(False)
        placement.apply(prepared, "prepare")
        placement.apply(chosen, "choose")
        placement.apply(promoted, "promote")
        placement.apply(reported, "report")
        return Artifacts(
            best_configuration=chosen.outputs["best"],
            decision=promoted.outputs["decision"],
            comparison_report=reported.outputs["comparison"],
            comparison_metrics=reported.outputs["metrics"],
            study_page=reported.outputs["page"],
        )

    return tuning_pipeline
