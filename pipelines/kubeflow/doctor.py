"""The checks of `doctor`: everything that a run needs on a cluster, each finding with its fix."""

import time
import uuid
from collections.abc import Callable, Generator, Iterator
from importlib.metadata import version

import mappo
from mappo.errors import ConfigError, StoreError
from mappo.runs.locations import open_store
from mappo.runs.store import honours_conditions
from pipelines.errors import ApiError, UnreachableError
from pipelines.kubeflow.api import Api
from pipelines.kubeflow.cluster import Cluster
from pipelines.kubeflow.connection import Connection
from pipelines.kubeflow.namespace_checks import Finding, NamespaceChecks, Target
from pipelines.site import Site

_SLOW_SECONDS = 2.0
# The versions of the server that docs/operations.md lists: tested on a cluster, and known only from their sources.
_TESTED = {"2.17": "tested on a real cluster with 2.17.0"}
_KNOWN_FROM_SOURCES = ("2.16", "2.15")


def findings(connection: Connection, connect: Callable[[], Api], target: Target) -> Iterator[Finding]:
    """Yield the findings of all checks, in the order in which a run needs what is checked.

    The checks change nothing in the cluster, and delete the objects that they write into the stores.
    """
    yield from _image(target.site)
    namespace, account, is_reached = yield from _kubeflow(connection, connect, target.account)
    try:
        yield from NamespaceChecks(
            Cluster(connection), connection.api_namespace, namespace, account, target
        ).findings()
    except UnreachableError as error:
        # Without an endpoint, Kubeflow's API is reached through the same Kubernetes API: its finding suffices.
        if connection.endpoint or is_reached:
            yield _unchecked(error)
    for name, location in (("store", target.store), ("pipeline root", target.root)):
        if location:
            yield _storage(name, location)


def _kubeflow(
    connection: Connection, connect: Callable[[], Api], account: str
) -> Generator[Finding, None, tuple[str, str, bool]]:
    """Check the API; return the pods' namespace and account, empty if unknown, and whether the API answered."""
    namespace, is_reached = connection.namespace or connection.api_namespace, False
    try:
        kubeflow = connect()
        yield from _api(kubeflow)
        is_reached = True
        account = account or ("default-editor" if kubeflow.is_multi_user else "pipeline-runner")
        namespace = ""  # stays unknown if the next line raises ConfigError
        namespace = kubeflow.namespace or connection.api_namespace
        yield _access(kubeflow, namespace)
    except ConfigError as error:
        yield Finding("namespace" if is_reached else "API", "failed", str(error))
    except ApiError as error:
        fix = _CREDENTIALS if error.status in (401, 403) else _port_forward(connection)
        yield Finding("API", "failed", str(error), fix)
    return namespace, account, is_reached


def _unchecked(error: UnreachableError) -> Finding:
    return Finding(
        "Kubernetes",
        "warning",
        f"secrets, config maps, rights and nodes were not checked: {error}",
        "give a kubeconfig that works, or --context NAME; kubectl config get-contexts lists the names",
    )


def _image(site: Site) -> Iterator[Finding]:
    if site.image is None:
        yield Finding("image", "failed", "no image is given", "give --image, or `image` in the site's file")
        return
    tag = site.image.partition("@")[0].rpartition(":")[2]
    if mappo.__version__ in tag:
        yield Finding("image", "ok", site.image)
    else:
        yield Finding(
            "image",
            "warning",
            f"{site.image}: its tag does not name version {mappo.__version__} of this package",
            f"build the image from this version, and tag it with {mappo.__version__}; stages warn if they differ",
        )
    if tag == "latest":
        yield Finding(
            "image", "warning", "the tag latest names changing images", "use a tag that stays, or a digest"
        )


def _port_forward(connection: Connection) -> str:
    forward = f"kubectl -n {connection.api_namespace} port-forward svc/ml-pipeline 8888:8888"
    return f"{forward} &\nthen give --endpoint http://localhost:8888; docs/kubeflow.md has the other ways"


def _api(kubeflow: Api) -> Iterator[Finding]:
    started = time.monotonic()
    users = "several users" if kubeflow.is_multi_user else "one user"  # the first request to the server
    seconds = time.monotonic() - started
    yield Finding(
        "API",
        "ok" if seconds < _SLOW_SECONDS else "warning",
        f"{kubeflow.url} answers in {1000 * seconds:.0f} ms; for {users}",
    )
    yield _versions(kubeflow.server_version(), version("kfp"))


def _versions(server: str, sdk: str) -> Finding:
    """Compare the server's version with the tested versions."""
    series = ".".join(server.split(".")[:2])
    versions = f"server {server or 'does not tell its version'}, SDK {sdk}"
    if series in _TESTED:
        return Finding("versions", "ok", f"{versions}: {_TESTED[series]}")
    experience = "known only from its sources" if series in _KNOWN_FROM_SOURCES else "never tested"
    fix = "install Kubeflow Pipelines 2.17; docs/operations.md lists what differs in others"
    return Finding("versions", "warning", f"{versions}: {experience}", fix)


def _access(kubeflow: Api, namespace: str) -> Finding:
    calls = (kubeflow.runs.run_service_list_runs, kubeflow.recurring.recurring_run_service_list_recurring_runs)
    try:
        for function in calls:
            kubeflow.call(function, page_size=1, namespace=kubeflow.namespace or "")
    except ApiError as error:
        if error.status != 403:
            raise
        role = f"kubectl -n {namespace} create rolebinding NAME --clusterrole=kubeflow-pipelines-edit --user=YOU"
        fix = f"give a namespace of yours by --namespace, or let its owner give you rights:\n{role}"
        return Finding("namespace", "failed", str(error), fix)
    return Finding("credentials", "ok", f"may list runs and schedules in namespace {namespace}")


_CREDENTIALS = (
    "kubectl -n NAMESPACE create token default-editor --audience pipelines.kubeflow.org > token\n"
    "then give --token-file token; or ask for rights in the namespace"
)
_LOCATIONS = "give s3://bucket/prefix or minio://bucket/prefix"


def _storage(name: str, location: str) -> Finding:
    """Check that an object can be written, read and deleted below a location."""
    if ":/" not in location:
        return Finding(name, "failed", f"{location}: a directory of a pod is lost with the pod", _LOCATIONS)
    if name == "pipeline root" and not location.startswith(("s3:", "minio:")):
        detail = f"{location}: not readable from here; stages keep runs and attempts only with -p store=s3://..."
        return Finding(name, "warning", detail, _LOCATIONS)
    key = f"doctor-{uuid.uuid4().hex}"
    try:
        store = open_store(location, patience_seconds=10)
        store.write(key, b"mappo")
        try:
            content = store.read(key, 100)
        finally:
            store.delete(key)
        honours = honours_conditions(store, key)
    except StoreError as error:
        return Finding(
            name,
            "failed",
            str(error),
            "check AWS_ENDPOINT_URL, credentials and the bucket, here and in the secret",
        )
    if content != b"mappo":
        return Finding(name, "failed", f"{location}: the store returns other bytes than were written")
    if not honours:
        return Finding(
            name,
            "warning",
            f"{location}: can be written, but ignores the condition not to overwrite (If-None-Match)",
            "two attempts of one run may write at once; docs/runs.md explains the consequences",
        )
    return Finding(name, "ok", f"{location}: can be written, read and deleted")
