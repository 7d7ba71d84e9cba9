"""What a run left in the store of artifacts. The API does not say where (kubeflow/pipelines #9858), the layout
does.

Below the pipeline's root: `<pipeline>/<run ID>/<stage>/<execution>/<artifact>`, where an artifact is one object or
a folder of them. A stage that ran for several seeds has an execution for each. Without a root, runs are kept below
the launcher's own, which `--pipeline-root` of these commands must then name if it is not Kubeflow's default.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mappo.config import ConfigError
from mappo.storage import Entry, Store, StoreError, joined, open_store

DEFAULT_ROOT = "minio://mlpipeline/v2/artifacts"
MAX_BYTES = 2 * 1024**3  # of one object
_UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")


@dataclass(frozen=True)
class Artifact:
    """One output of a stage. execution: which of the stage's; keys: relative to the run's place."""

    stage: str
    execution: str
    name: str
    entries: tuple[Entry, ...]
    location: str

    @property
    def size_bytes(self) -> int:
        """Of everything."""
        return sum(entry.size_bytes for entry in self.entries)


def place_of(run: Any, pipeline: str, root: str = "") -> str:
    """Where a run's artifacts are."""
    given = root or (run.runtime_config.pipeline_root if run.runtime_config else "") or DEFAULT_ROOT
    return joined(joined(given.partition("?")[0], pipeline), run.run_id)


def artifacts_at(place: str) -> list[Artifact]:
    """Everything below a run's place.

    Raises:
        StoreError: the store does not answer, or the place is none.
    """
    found: dict[tuple[str, str, str], list[Entry]] = {}
    for entry in open_store(place).entries():
        stage, *rest = entry.key.split("/")
        execution = rest.pop(0) if len(rest) > 1 and _UUID.fullmatch(rest[0]) else ""
        name = rest[0] if rest else stage
        found.setdefault((stage, execution, name), []).append(entry)
    return [
        Artifact(*key, tuple(entries), joined(place, "/".join(part for part in key if part)))
        for key, entries in sorted(found.items())
    ]


def chosen(artifacts: Iterable[Artifact], names: Iterable[str]) -> list[Artifact]:
    """Those of these names: `best`, `report`, or `train/best` where several stages have one.

    Raises:
        ConfigError: there is none of a name.
    """
    listed, wanted = list(artifacts), list(names)
    if not wanted:
        return listed
    for name in wanted:
        if not any(_is(name, each) for each in listed):
            there = ", ".join(sorted({f"{each.stage}/{each.name}" for each in listed})) or "nothing"
            raise ConfigError(f"artifact {name!r}: there is none; there is {there}")
    return [each for each in listed if any(_is(name, each) for name in wanted)]


def fetch(place: str, artifacts: Iterable[Artifact], directory: Path) -> Iterator[tuple[Artifact, Path]]:
    """Copy artifacts into a directory, one after the other; each as it is there.

    Raises:
        StoreError: the store does not answer.
        OSError: the directory cannot be written.
    """
    store = open_store(place)
    listed = list(artifacts)
    several = {(each.stage, each.name) for each in listed if sum(_same(each, other) for other in listed) > 1}
    for artifact in listed:
        below = artifact.execution if (artifact.stage, artifact.name) in several else ""
        target = directory / artifact.stage / below / artifact.name
        _copy(store, artifact, target)
        yield artifact, target


def _copy(store: Store, artifact: Artifact, target: Path) -> None:
    base = "/".join(part for part in (artifact.stage, artifact.execution, artifact.name) if part)
    for entry in artifact.entries:
        inner = entry.key.removeprefix(base).strip("/")
        path = target / inner if inner else target
        if ".." in Path(inner).parts:
            raise StoreError(f"{entry.key}: leads out of the directory")
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.partial")
        partial.write_bytes(store.read(entry.key, MAX_BYTES))
        partial.replace(path)


def _is(name: str, artifact: Artifact) -> bool:
    return name in (artifact.name, artifact.stage, f"{artifact.stage}/{artifact.name}")


def _same(one: Artifact, other: Artifact) -> bool:
    return (one.stage, one.name) == (other.stage, other.name)
