"""A check of everything that a run needs on a cluster, one by one, each with its fix."""

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
_TRIED = {"2.17": "tried on a real cluster with 2.17.0"}  # versions of the server, as docs/operations.md has them
_READ = ("2.16", "2.15")


def findings(connection: Connection, connect: Callable[[], Api], target: Target) -> Iterator[Finding]:
    """Check everything, in the order in which a run would need it. Nothing is left behind."""
    yield from _image(target.site)
    namespace, account, is_reached = yield from _kubeflow(connection, connect, target.account)
    try:
        yield from NamespaceChecks(
            Cluster(connection), connection.api_namespace, namespace, account, target
        ).findings()
    except UnreachableError as error:
        if connection.endpoint or is_reached:  # without an endpoint, the API is asked through the same Kubernetes
            yield _not_looked_at(error)
    for name, location in (("store", target.store), ("pipeline root", target.root)):
        if location:
            yield _storage(name, location)


def _kubeflow(
    connection: Connection, connect: Callable[[], Api], account: str
) -> Generator[Finding, None, tuple[str, str, bool]]:
    """Check the API; return the namespace and account of the pods as far as they are known, and if it answered."""
    namespace, is_reached = connection.namespace or connection.api_namespace, False
    try:
        kubeflow = connect()
        yield from _api(kubeflow)
        is_reached = True
        account = account or ("default-editor" if kubeflow.is_multi_user else "pipeline-runner")
        namespace = ""
        namespace = kubeflow.namespace or connection.api_namespace
        yield _access(kubeflow, namespace)
    except ConfigError as error:
        yield Finding("namespace" if is_reached else "API", "failed", str(error))
    except ApiError as error:
        fix = _CREDENTIALS if error.status in (401, 403) else _way_to_the_api(connection)
        yield Finding("API", "failed", str(error), fix)
    return namespace, account, is_reached


def _not_looked_at(error: UnreachableError) -> Finding:
    return Finding(
        "Kubernetes",
        "warning",
        f"secrets, config maps, rights and nodes were not checked: {error}",
        "give a kubeconfig that works, or --context NAME; kubectl config get-contexts lists the names",
    )


def _image(site: Site) -> Iterator[Finding]:
    if site.image is None:
        yield Finding("image", "failed", "none", "give --image, or `image` in the site's file")
        return
    tag = site.image.partition("@")[0].rpartition(":")[2]
    if mappo.__version__ in tag:
        yield Finding("image", "ok", site.image)
    else:
        yield Finding(
            "image",
            "warning",
            f"{site.image}: its tag does not name version {mappo.__version__} of this package",
            f"build the image from this version, and tag it with {mappo.__version__}; stages say if they differ",
        )
    if tag == "latest":
        yield Finding(
            "image", "warning", "latest means another image each week", "use a tag that stays, or a digest"
        )


def _way_to_the_api(connection: Connection) -> str:
    forward = f"kubectl -n {connection.api_namespace} port-forward svc/ml-pipeline 8888:8888"
    return f"{forward} &\nthen give --endpoint http://localhost:8888; docs/kubeflow.md has the other ways"


def _api(kubeflow: Api) -> Iterator[Finding]:
    began = time.monotonic()
    users = "several users" if kubeflow.is_multi_user else "one user"
    seconds = time.monotonic() - began
    yield Finding(
        "API",
        "ok" if seconds < _SLOW_SECONDS else "warning",
        f"{kubeflow.url} answers in {1000 * seconds:.0f} ms; for {users}",
    )
    yield _versions(kubeflow.server_version(), version("kfp"))


def _versions(server: str, sdk: str) -> Finding:
    """Compare the server's version with those that were tried."""
    series = ".".join(server.split(".")[:2])
    told = f"server {server or 'does not tell its version'}, SDK {sdk}"
    if series in _TRIED:
        return Finding("versions", "ok", f"{told}: {_TRIED[series]}")
    known = "known from its sources alone" if series in _READ else "never tried"
    fix = "install Kubeflow Pipelines 2.17; docs/operations.md says what differs in others"
    return Finding("versions", "warning", f"{told}: {known}", fix)


def _access(kubeflow: Api, namespace: str) -> Finding:
    listed = (kubeflow.runs.run_service_list_runs, kubeflow.recurring.recurring_run_service_list_recurring_runs)
    try:
        for function in listed:
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
_PLACES = "give s3://bucket/prefix or minio://bucket/prefix"


def _storage(name: str, location: str) -> Finding:
    """Check that an object can be written, read and deleted below a location."""
    if ":/" not in location:
        return Finding(name, "failed", f"{location}: a directory of a pod is lost with the pod", _PLACES)
    if name == "pipeline root" and not location.startswith(("s3:", "minio:")):
        text = f"{location}: not read from here; stages keep runs and attempts there only by -p store=s3://..."
        return Finding(name, "warning", text, _PLACES)
    key = f"doctor-{uuid.uuid4().hex}"
    try:
        place = open_store(location, patience_seconds=10)
        place.write(key, b"mappo")
        try:
            came_back = place.read(key, 100)
        finally:
            place.delete(key)
        honours = honours_conditions(place, key)
    except StoreError as error:
        return Finding(
            name,
            "failed",
            str(error),
            "check AWS_ENDPOINT_URL, credentials and the bucket, here and in the secret",
        )
    if came_back != b"mappo":
        return Finding(name, "failed", f"{location}: other bytes came back than were written")
    if not honours:
        return Finding(
            name,
            "warning",
            f"{location}: can be written, but does not refuse to overwrite",
            "two attempts of one run may write at once; see docs/runs.md",
        )
    return Finding(name, "ok", f"{location}: can be written, read and deleted")
