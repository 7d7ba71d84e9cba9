"""The runs that a command line names: `first` is the run runs/first. It imports no torch."""

from difflib import get_close_matches
from pathlib import Path

from mappo.config import ExperimentConfig, from_dict
from mappo.errors import CheckpointError, ConfigError, NoCheckpoint
from mappo.runs.checkpoint import Manifest
from mappo.runs.locations import is_directory, require_location
from mappo.runs.run import Run

RUNS = "runs"  # the default store


def find_run(name: str) -> str:
    """Return the location of a run that a user names by its location, or by its name if it is in runs/.

    Raises:
        NoCheckpoint: there is no such directory; the message names one with a similar name.
        NotALocation: the text is not a location.
    """
    if not is_directory(name):
        return require_location(name)
    candidates = [Path(name)] if "/" in name else [Path(name), Path(RUNS, name)]
    found = [path for path in candidates if path.is_dir()]
    for path in found:
        if (path / "checkpoints").is_dir():
            return str(path)
    if found:
        return str(found[0])
    raise NoCheckpoint(f"{name}: there is no such run{_similar(name)}")


def manifest_of(run: str, checkpoint: str) -> Manifest:
    """Return the manifest of a run's checkpoint.

    Raises:
        CheckpointError: there is no such checkpoint, or its manifest is damaged.
        StoreError: the store does not answer.
    """
    opened = Run.at(run)
    return opened.manifest(opened.choose(checkpoint))


def trained_config(manifest: Manifest) -> ExperimentConfig:
    """Return the configuration of a checkpoint.

    Raises:
        CheckpointError: it is not one of this version.
    """
    try:
        return from_dict(manifest.config)
    except ConfigError as error:
        raise CheckpointError(f"the checkpoint's configuration is not one of this version: {error}") from None


def _similar(name: str) -> str:
    """Return the location of a directory with a similar name, as a question; empty if there is none."""
    folders = [Path(name).parent] if "/" in name else [Path(RUNS), Path()]
    for folder in folders:
        names = [path.name for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []
        if close := get_close_matches(Path(name).name, names, n=1):
            return f"; did you mean {folder / close[0]}?"
    return ""
