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
    study_config: str = "{}",
    store: str = "",
    compiled_by: str = "",
) -> str:
    """Create a study, or continue it.

    Args:
        config: The default configuration as JSON, as `mappo show-config` prints it.
        study: The name of the study, or of a series of studies.
        runs: The artifact at whose URI the runs of trials are kept, if no store is given.
        edition: The edition of the series, such as a schedule's time; it starts from the best of the one before.
        scheduled_at: The time that replaces [[ScheduledTime]] in edition and store.
        session: The name of who requests the trials, if not the pipeline's run; a second request adds none.
        run_id: The ID of the pipeline's run.
        study_config: The study's settings as JSON: space, tuning, budget, retraining, gate; {} for defaults.
        store: The store of the trials' runs, as s3://bucket/prefix; empty to keep them at the URI of runs.
        compiled_by: The version of mappo that compiled the pipeline; the stage warns if the image has another.

    Returns:
        The name of the study.
    """
    from components.placeholders import fill
    from mappo.stages.prepare import prepare
    from mappo.tuning.study_config import study_name

    edition, store = fill(edition, scheduled_at), fill(store, scheduled_at)
    outcome = prepare(
        *(config, study, store or runs.uri, study_config),
        edition=edition,
        session=session or run_id,
        compiled_by=compiled_by,
    )
    runs.metadata.update(outcome.metadata)
    return study_name(study, edition)
