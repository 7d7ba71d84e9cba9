"""The names of runs and studies, and the place where a run is kept."""

import os

from mappo.config import ConfigError, require_run_name
from mappo.storage import joined


def run_location(store: str, run: str, otherwise: str, seed: str = "") -> str:
    """Return where a run is kept: in the store under its name (with the seed, if there is one); or `otherwise`.

    In a pipeline on Kubeflow, a run that nobody named has the ID of the pipeline's run as its name.

    Raises:
        ConfigError: a store without a name, a name without a store, or a name that is not allowed.
    """
    if not store:
        if run:
            raise ConfigError(f"run = {run!r}: a name needs a store to be found in again; give one, or no name")
        return otherwise
    run = run or os.environ.get("MAPPO_PIPELINE_RUN", "")
    if not run:
        raise ConfigError(
            f"run '': a name has to be given with store = {store!r}, so that the run is found there again"
        )
    return joined(store, require_run_name(f"{run}-{seed}" if seed else run))


def study_name(series: str, edition: str) -> str:
    """Return the name of a study: that of its series, or of one edition of it, as a schedule makes them.

    Raises:
        ConfigError: the name is not allowed.
    """
    name = f"{series}-{edition}" if edition else series
    return require_run_name(name, "study")
