"""The artifacts of a run: list their locations and sizes in the store, and copy them.

The workflow of v1beta1 holds the URI of each artifact, whatever the pipeline's root is. A server without v1beta1
does not tell where artifacts lie (kubeflow/pipelines #9858). Their paths then follow KFP's layout:
`<root>/<pipeline>/<run ID>/<stage>/<execution>/<artifact>`. An artifact is one object or a folder of objects.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import accumulate, takewhile
from pathlib import Path
from typing import Any

from mappo.errors import ConfigError, StoreError
from mappo.runs.locations import joined, open_store
from mappo.runs.s3_access import KUBEFLOW_SECRET
from mappo.runs.store import Entry, Store
from pipelines.kubeflow.api import Api
from pipelines.kubeflow.client import pipeline_name
from pipelines.kubeflow.workflow import Workflow, workflow_of

DEFAULT_ROOT = "minio://mlpipeline/v2/artifacts"
LOGS = "executor-logs"  # declared for every stage, but written only where Kubeflow is configured to keep logs
MAX_BYTES = 2 * 1024**3  # maximum size of one object
_LIST_SECONDS = 5.0  # patience with a store that does not answer; short, since a person waits
_READABLE = ("s3://", "minio://")
_LEDGER = re.compile(r"attempts-[0-9a-f]{12}\.json")  # the ledger of a stage's attempts, beside its artifacts
_UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
_PAGE_START = b"<!doctype html>"


@dataclass(frozen=True)
class Artifact:
    """An output of a stage.

    stage: name of the stage, as in `runs show`. entries: the artifact's objects in the store, with keys relative
    to the location; the key is empty if the location itself is the object. None before the store is listed.
    """

    stage: str
    name: str
    location: str
    entries: tuple[Entry, ...] | None = None

    @property
    def size_bytes(self) -> int:
        """The total size of the artifact's objects."""
        return sum(entry.size_bytes for entry in self.entries or ())


def declared_artifacts(kubeflow: Api, run: Any) -> list[Artifact] | None:
    """Return the artifacts that a run's stages write, written or not yet; None if the server does not tell them.

    Raises:
        ApiError: the server did not answer.
    """
    workflow = workflow_of(kubeflow, run.run_id)
    return None if workflow is None else artifacts_of(workflow)


def artifacts_of(workflow: Workflow) -> list[Artifact]:
    """Return the artifacts that the stages of a workflow write, including those that are not written yet."""
    return [
        Artifact(stage, name, output["uri"].partition("?")[0])
        for stage, executor_input in workflow.executor_inputs()
        for name, outputs in sorted(executor_input.get("outputs", {}).get("artifacts", {}).items())
        for output in outputs.get("artifacts", [])[:1]
    ]


def stored_artifacts(kubeflow: Api, run: Any, artifacts: list[Artifact] | None, root: str = "") -> list[Artifact]:
    """List the objects of a run's artifacts in the store; leave out logs that were not written.

    artifacts: the declared artifacts; None to list the folder of the run below `root`, by default the run's root.

    Raises:
        StoreError: the store does not answer or cannot be read from here; the message tells how to reach it.
    """
    folder = _folder_of(artifacts) if artifacts is not None else _run_folder(kubeflow, run, root)
    try:
        return _list_layout(folder) if artifacts is None else _with_entries(artifacts, folder)
    except StoreError as error:
        raise StoreError("\n".join(filter(None, [str(error), _access_hint(kubeflow, folder)]))) from error


def select(artifacts: Iterable[Artifact], names: Iterable[str]) -> list[Artifact]:
    """Return the written artifacts with these names (`best`, `train[1]`, `train/best`); without names, all.

    Raises:
        ConfigError: no artifact has one of the names, or its stage has not written it yet.
    """
    listed, wanted = list(artifacts), set(names)
    written = [artifact for artifact in listed if artifact.entries]
    for name in wanted - _names(written):
        if name in _names(listed):
            raise ConfigError(f"artifact {name!r}: nothing is written yet: wait until its stage writes it")
        available = ", ".join(sorted({f"{artifact.stage}/{artifact.name}" for artifact in written})) or "nothing"
        raise ConfigError(f"artifact {name!r}: no artifact has this name; available: {available}")
    return [artifact for artifact in written if not wanted or wanted & _names([artifact])]


def fetch(artifacts: Iterable[Artifact], directory: Path) -> Iterator[tuple[Artifact, Path]]:
    """Copy artifacts into a directory, one after the other; yield each artifact with its path once it is copied.

    Raises:
        StoreError: the store does not answer, or the key of an object leads out of the directory.
        OSError: the directory cannot be written.
    """
    listed = list(artifacts)
    folder = _folder_of(listed)
    store = open_store(folder)
    outputs = [(artifact.stage, artifact.name) for artifact in listed]
    for artifact in listed:
        is_one_of_several = outputs.count((artifact.stage, artifact.name)) > 1
        execution = artifact.location.split("/")[-2] if is_one_of_several else ""
        target = directory / artifact.stage / execution / artifact.name
        _copy(store, artifact, artifact.location.removeprefix(f"{folder}/"), target, directory)
        yield artifact, _with_page_suffix(target)


def _with_page_suffix(path: Path) -> Path:
    """Rename a page, which a browser would show as its source text without a suffix; return the new path."""
    if path.suffix or not path.is_file():
        return path
    with path.open("rb") as file:
        is_page = file.read(len(_PAGE_START)).lower() == _PAGE_START
    return path.replace(path.with_name(f"{path.name}.html")) if is_page else path


def _with_entries(artifacts: list[Artifact], folder: str) -> list[Artifact]:
    entries: dict[str, list[Entry]] = {artifact.location: [] for artifact in artifacts}
    for entry in _entries(folder) if artifacts else ():
        parents = accumulate(entry.key.split("/"), joined, initial=folder)
        location = next((parent for parent in parents if parent in entries), None)
        if location:
            key = joined(folder, entry.key).removeprefix(location).strip("/")
            entries[location].append(replace(entry, key=key))
    listed = (replace(artifact, entries=tuple(entries[artifact.location])) for artifact in artifacts)
    return [artifact for artifact in listed if artifact.entries or artifact.name != LOGS]


def _run_folder(kubeflow: Api, run: Any, root: str) -> str:
    """Return the folder of a run's artifacts by KFP's layout, for servers that tell no URIs."""
    root = root or (run.runtime_config.pipeline_root if run.runtime_config else "") or DEFAULT_ROOT
    return joined(joined(root.partition("?")[0], pipeline_name(kubeflow, run)), run.run_id)


def _list_layout(folder: str) -> list[Artifact]:
    """Return the artifacts below the folder of a run, recognised by KFP's layout."""
    entries: dict[tuple[str, str, str], list[Entry]] = {}
    for entry in _entries(folder):
        stage, *rest = entry.key.split("/")
        if len(rest) == 1 and _LEDGER.fullmatch(rest[0]):
            continue
        execution = rest.pop(0) if len(rest) > 1 and _UUID.fullmatch(rest[0]) else ""
        name = rest.pop(0) if rest else stage
        entries.setdefault((stage, execution, name), []).append(replace(entry, key="/".join(rest)))
    return [
        Artifact(stage, name, "/".join(filter(None, [folder, stage, execution, name])), tuple(objects))
        for (stage, execution, name), objects in sorted(entries.items())
    ]


def _access_hint(kubeflow: Api, location: str) -> str:
    """Return the commands that reach Kubeflow's own store from outside the cluster; empty for any other store."""
    if not location.startswith("minio://"):
        return ""
    connection = kubeflow.connection
    kubectl = f"kubectl --context {connection.context}" if connection.context else "kubectl"
    namespace = kubeflow.namespace or connection.api_namespace
    secret = f"{kubectl} -n {namespace} get secret {KUBEFLOW_SECRET}"
    return (
        "minio:// is Kubeflow's own store. To reach it from outside the cluster:\n"
        f"    {kubectl} -n {connection.api_namespace} port-forward svc/seaweedfs 9000 &\n"
        "    export AWS_ENDPOINT_URL=http://localhost:9000\n"
        f"    export AWS_ACCESS_KEY_ID=$({secret} -o jsonpath='{{.data.accesskey}}' | base64 -d)\n"
        f"    export AWS_SECRET_ACCESS_KEY=$({secret} -o jsonpath='{{.data.secretkey}}' | base64 -d)\n"
        "(before Kubeflow 2.16: svc/minio-service)"
    )


def _entries(folder: str) -> list[Entry]:
    if "://" in folder and not folder.startswith(_READABLE):
        scheme = folder.partition("://")[0]
        raise StoreError(
            f"{folder}: {scheme}:// cannot be read from here; only s3:// and minio:// can: use the store's tool"
        )
    return open_store(folder, _LIST_SECONDS).entries()


def _folder_of(artifacts: Iterable[Artifact]) -> str:
    """Return the deepest folder that holds all artifacts, so that one listing finds all their objects."""
    parents = [artifact.location.split("/")[:-1] for artifact in artifacts]
    return "/".join(
        names[0] for names in takewhile(lambda names: len(set(names)) == 1, zip(*parents, strict=False))
    )


def _copy(store: Store, artifact: Artifact, base: str, target: Path, directory: Path) -> None:
    for entry in artifact.entries or ():
        path = target / entry.key if entry.key else target
        if not path.is_relative_to(directory) or ".." in path.relative_to(directory).parts:
            raise StoreError(f"{artifact.location}/{entry.key}: this key leads out of the directory {directory}")
        path.parent.mkdir(parents=True, exist_ok=True)
        # A rename completes the copy, so that an interrupted copy leaves no file that looks complete.
        partial = path.with_name(f".{path.name}.partial")
        partial.write_bytes(store.read("/".join(filter(None, [base, entry.key])), MAX_BYTES))
        partial.replace(path)


def _names(artifacts: Iterable[Artifact]) -> set[str]:
    """Return the names that select artifacts; `train` selects `train[0]` and `a/train[1]` too."""
    names: set[str] = set()
    for artifact in artifacts:
        in_loop = artifact.stage.rpartition("/")[2]
        stages = {artifact.stage, in_loop, in_loop.partition("[")[0]}
        names |= {artifact.name, *stages, *(f"{stage}/{artifact.name}" for stage in stages)}
    return names
