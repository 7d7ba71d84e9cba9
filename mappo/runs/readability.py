"""The check that what a training run saves can be read again, before the run saves anything."""

import json

from mappo.environment.simulation_state import SimulationState
from mappo.errors import CheckpointError, ConfigError, one_line
from mappo.runs.checkpoint import (
    MAX_MANIFEST_BYTES,
    MAX_PART_BYTES,
    Checkpoint,
    manifest_bytes,
    pack,
    parse_manifest,
    unpack,
)


def require_readable(checkpoint: Checkpoint) -> None:
    """Check that what is saved of a training run can be read: write a checkpoint into memory, and read it.

    Raises:
        ConfigError: a part is too large, or cannot be read; the message names what makes it large.
    """
    try:
        manifest, contents = pack(checkpoint)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"this task cannot be saved: {one_line(error)}") from error
    size = len(manifest_bytes(manifest))
    if size > MAX_MANIFEST_BYTES:
        raise ConfigError(
            f"the configuration takes {size} bytes in a checkpoint, and at most {MAX_MANIFEST_BYTES} are read: "
            "let the scenario read large data, such as a map, from a file instead of environment.scenario_kwargs"
        )
    for name, part in manifest.parts.items():
        if part.size_bytes > MAX_PART_BYTES[name]:
            raise ConfigError(
                f"the {name} of this task takes {part.size_bytes} bytes in a checkpoint, and at most "
                f"{MAX_PART_BYTES[name]} are read; the largest part is {_largest_object(checkpoint.state)}: keep "
                "large data in a tensor or a numpy array instead of Python numbers"
            )
    try:
        parsed = parse_manifest(manifest_bytes(manifest), "it")
        unpack(parsed, lambda name, size_bytes, sha256: contents[name], "it")  # noqa: ARG005
    except CheckpointError as error:
        raise ConfigError(f"this task can be saved, and not be resumed: {error}") from error


def _largest_object(state: SimulationState) -> str:
    """Return the path of the attribute or container whose own content takes the most bytes."""
    objects = {**state.structure.get("objects", {})}
    for process in state.structure.get("processes", []):
        objects.update(process.get("objects", {}))
    if not objects:
        return "none of the simulation"
    rows: dict[str, int] = {}
    for path, content in objects.items():
        owner = path.partition("[")[0]
        rows[owner] = rows.get(owner, 0) + len(json.dumps(content))
    return max(rows, key=lambda path: rows[path])
