"""The tuning pipeline: prepare -> workers -> choose -> train best and default again -> promote -> report."""

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
    """The pipeline as a site or this machine (None) runs it; it trains `parallelism` seeds at once (0: all)."""
    retrain_default = make_each_seed(site, parallelism, "retrain-default")
    retrain_best = make_each_seed(site, parallelism, "retrain-best")

    @dsl.pipeline(name="mappo-workers")
    @with_placement(site, "tune")
    def all_workers(placement: Placement, study: str, workers: List[str]):  # noqa: UP006
        """Work on a study, each worker in a pod of its own until no trial is left."""
        with dsl.ParallelFor(workers) as worker:
            worked = tune(study=study, worker=worker, **placement.gpus("tune"), compiled_by=mappo.__version__)
            placement.place(worked, "tune")

    @dsl.pipeline(
        name="mappo-tuning",
        description="Tune a configuration by a study of trials, train its best again, promote and report it.",
    )
    @with_placement(site, "prepare", "tune", "choose", "train", "evaluate", "promote", "report")
    def tuning_pipeline(
        placement: Placement,
        config: str,
        study: str,
        edition: str = "",
        num_trials: int = 20,
        hours: float = 0.0,
        session: str = "",
        workers: List[str] = ["1", "2"],  # noqa: B006, UP006
        retrain_seeds: int = 3,
        space: str = "{}",
        tuning: str = "{}",
        store: str = "",
        champions: str = "",
        gate: str = "{}",
    ) -> Artifacts:
        """Tune one configuration.

        Args:
            placement: Where its stages run.
            config: The configuration to begin with, as JSON, as `mappo show-config` prints it.
            study: The study's name; one that was begun is gone on with. Or that of a series of studies.
            edition: Of the series, such as [[ScheduledTime]]: each a new study, begun with the best of the last.
            num_trials: How many trials this run adds to the study.
            hours: No trial is started later than this; 0 for no limit.
            session: Who asks for the trials, if that is not this run; one that asks again adds none.
            workers: Names of the workers, each a pod, such as ["1", "2"].
            retrain_seeds: From how many fresh seeds the best and the default are trained again, at least 2.
            space: What is tuned besides or in place of the default, as JSON.
            tuning: How trials are judged and pruned, as JSON.
            store: Where runs are kept, as s3://bucket/prefix; empty to keep them with the pipeline's artifacts.
            champions: Where the task's champion is kept, as s3://bucket/prefix; empty to promote nothing.
            gate: What a new champion must show, as JSON.
        """
        version = mappo.__version__
        prepared = prepare(
            config=config,
            study=study,
            edition=edition,
            scheduled_at=placement.scheduled_at,
            session=session,
            run_id=dsl.PIPELINE_JOB_ID_PLACEHOLDER,
            num_trials=num_trials,
            hours=hours,
            space=space,
            tuning=tuning,
            store=store,
            compiled_by=version,
        )
        name = prepared.outputs["Output"]
        worked = all_workers(study=name, workers=workers, **placement.parameters("tune"))
        chosen = choose(study=name, num_seeds=retrain_seeds).after(worked)
        seeds, place, trial = (chosen.outputs[each] for each in ("seeds", "place", "trial"))
        of_each = placement.parameters("train", "evaluate")
        default = retrain_default(config=config, seeds=seeds, store=place, run="default", **of_each)
        best = retrain_best(
            config=chosen.outputs["config"], seeds=seeds, store=place, run=chosen.outputs["runs"], **of_each
        )
        promoted = promote(
            study=name,
            trial=trial,
            num_seeds=retrain_seeds,
            champions=champions,
            gate=gate,
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
        placement.place(prepared, "prepare")
        placement.place(chosen, "choose")
        placement.place(promoted, "promote")
        placement.place(reported, "report")
        return Artifacts(
            best_configuration=chosen.outputs["best"],
            decision=promoted.outputs["decision"],
            comparison_report=reported.outputs["comparison"],
            comparison_metrics=reported.outputs["metrics"],
            study_page=reported.outputs["page"],
        )

    return tuning_pipeline
