"""The stage that prepares a study, as a Kubeflow component."""

from kfp import dsl

from components import component


@component
def prepare(
    config: str,
    study: str,
    runs: dsl.Output[dsl.Artifact],
    edition: str = "",
    scheduled_at: str = "",
    session: str = "",
    run_id: str = "",
    num_trials: int = 20,
    hours: float = 0.0,
    space: str = "{}",
    tuning: str = "{}",
    store: str = "",
    compiled_by: str = "",
) -> str:
    """Make a tuning study or go on with it.

    Args:
        config: The configuration to begin with, as JSON, as `mappo show-config` prints it.
        study: The study's name, or that of a series of studies.
        runs: Where the runs of trials are kept, if no store is given.
        edition: Of the series, such as the time of a schedule; it begins with the best of the edition before.
        scheduled_at: The time for [[ScheduledTime]] in edition and store: the schedule's, or the run's creation.
        session: Who asks for trials, if that is not the pipeline's run; one that asks again adds none.
        run_id: Of the pipeline's run.
        num_trials: How many trials are asked for.
        hours: No trial is started later than this; 0 for no limit.
        space: What is tuned besides or in place of the default, as JSON.
        tuning: How trials are judged and pruned, as JSON.
        store: Where runs of trials are kept, as s3://bucket/prefix; empty to keep them at the URI of runs.
        compiled_by: The version of mappo that compiled the pipeline; the stage says if it is not the image's.

    Returns:
        The name of the study.
    """
    from components.placeholders import fill
    from mappo.stages.prepare import prepare
    from mappo.strict_json import parse_json_object
    from mappo.tuning.study_config import Budget, study_name

    edition, store = fill(edition, scheduled_at), fill(store, scheduled_at)
    outcome = prepare(
        *(config, study, store or runs.uri, Budget(num_trials, hours)),
        edition=edition,
        session=session or run_id,
        space=space,
        tuning=parse_json_object(tuning),
        compiled_by=compiled_by,
    )
    runs.metadata.update(outcome.metadata)
    return study_name(study, edition)
