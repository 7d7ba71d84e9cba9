"""The changes of a configuration with which a run may continue. It imports no torch."""

from mappo.config import ExperimentConfig, differences
from mappo.errors import ConfigError

# Fields of the configuration that may change.
_FREE_IN_RESUMPTION = ("evaluation.",)
_FREE_IN_EXTENSION = ("collection.total_frames", "device", "evaluation.", "selection.", "threads")
_COMPARED_BY_COMPUTATION = ("collection.simulation", "learner.update")


def require_same_config(location: str, previous: ExperimentConfig, config: ExperimentConfig) -> None:
    """Check that a configuration resumes the run at `location`, which started with the `previous` one.

    Raises:
        ConfigError: a field differs that may not; the message names it with both values.
    """
    if changed := _described_changes(previous, config, _FREE_IN_RESUMPTION):
        raise ConfigError(
            f"run {location} started with another configuration: {changed}; use that configuration, or name "
            "another run"
        )


def require_extension(previous: ExperimentConfig, iteration: int, frames: int, config: ExperimentConfig) -> None:
    """Check that a configuration extends a run that has trained for these iterations and frames.

    Raises:
        ConfigError: a field differs that may not, the run to extend is not finished, or it has as many frames.
    """
    if changed := _described_changes(previous, config, _FREE_IN_EXTENSION):
        raise ConfigError(
            f"an extended run keeps its configuration, except for {', '.join(_FREE_IN_EXTENSION)}; changed: "
            f"{changed}; for a new run from these networks, use a warm start"
        )
    planned = previous.collection.num_iterations
    if iteration < planned:
        raise ConfigError(
            f"the run to extend is not finished: the run has {iteration} of {planned} iterations; "
            "resume the run first, with the command that started it"
        )
    if config.collection.num_iterations <= iteration:
        raise ConfigError(
            f"collection.total_frames = {config.collection.total_frames}: the run to extend has {frames} frames "
            "already; set a larger number"
        )


def _described_changes(previous: ExperimentConfig, config: ExperimentConfig, free: tuple[str, ...]) -> str:
    """Return the fields that differ and are not `free`, with both values; without those that a run settles."""
    changes, free = differences(previous, config).items(), (*free, *_COMPARED_BY_COMPUTATION)
    return ", ".join(f"{field} = {change}" for field, change in changes if not field.startswith(free))
