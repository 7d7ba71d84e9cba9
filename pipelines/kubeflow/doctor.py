"""What is missing on a cluster: everything that a run needs, tried one by one, each with its fix."""

import re
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import mappo
from mappo.config import ConfigError
from mappo.storage import StoreError, honours_conditions, open_store
from pipelines.kubeflow.connection import Api, ApiError, Connection, in_pod
from pipelines.placement import DATABASE_KEY, MONITORING_CONFIG_MAP, S3_KEYS
from pipelines.site import Site, Stage

_SLOW_SECONDS = 2.0
_KUBERNETES_SECONDS = 15


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at; state is ok, warning or failed."""

    check: str
    state: str
    detail: str
    fix: str = ""


def findings(
    connection: Connection, connect: Callable[[], Api], site: Site, store: str, root: str
) -> Iterator[Finding]:
    """Everything, in the order in which a run would need it. Nothing is left behind."""
    yield from _image(site)
    try:
        kubeflow = connect()
        yield from _api(kubeflow)
    except (ApiError, ConfigError) as error:
        yield Finding(
            "API",
            "failed",
            str(error),
            "docs/kubeflow.md says how to reach it; kubectl port-forward is the quickest",
        )
        kubeflow = None
    namespace, account = "", ""
    if kubeflow:
        try:
            namespace = kubeflow.namespace or connection.api_namespace
            account = "default-editor" if kubeflow.is_multi_user else "pipeline-runner"
            yield from _access(kubeflow, namespace)
        except (ApiError, ConfigError) as error:
            yield Finding("namespace", "failed", str(error), "give yours by --namespace")
    yield from _cluster(connection, site, namespace or connection.namespace, account)
    for name, location in (("store", store), ("pipeline root", root)):
        yield _storage(name, location)


def _image(site: Site) -> Iterator[Finding]:
    if site.image is None:
        yield Finding("image", "failed", "none", "give --image, or `image` in the site's file")
        return
    tag = site.image.rpartition(":")[2]
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


def _api(kubeflow: Api) -> Iterator[Finding]:
    began = time.monotonic()
    users = "several users" if kubeflow.is_multi_user else "one user"
    seconds = time.monotonic() - began
    yield Finding(
        "API",
        "ok" if seconds < _SLOW_SECONDS else "warning",
        f"{kubeflow.url} answers in {1000 * seconds:.0f} ms; for {users}",
    )
    server, sdk = kubeflow.server_version(), version("kfp")
    if not server:
        yield Finding(
            "versions", "warning", f"the server does not tell its own; SDK {sdk}", "compare them by hand"
        )
    elif server.split(".")[:2] == sdk.split(".")[:2]:
        yield Finding("versions", "ok", f"server {server}, SDK {sdk}")
    else:
        yield Finding(
            "versions",
            "warning",
            f"server {server}, SDK {sdk}",
            f"the pipelines were tried with {sdk}; older servers may not know all of their fields",
        )


def _access(kubeflow: Api, namespace: str) -> Iterator[Finding]:
    kubeflow.call(kubeflow.runs.run_service_list_runs, page_size=1, namespace=kubeflow.namespace or "")
    kubeflow.call(
        kubeflow.recurring.recurring_run_service_list_recurring_runs,
        page_size=1,
        namespace=kubeflow.namespace or "",
    )
    yield Finding("credentials", "ok", f"may list runs and schedules in namespace {namespace}")


def _cluster(connection: Connection, site: Site, namespace: str, account: str) -> Iterator[Finding]:
    """What Kubernetes itself knows, if it may be asked."""
    import kubernetes

    try:
        core = _core(connection)
    except (kubernetes.config.ConfigException, OSError) as error:
        yield Finding(
            "Kubernetes",
            "warning",
            f"not looked at: {error}",
            "with a kubeconfig, secrets, config maps and nodes are checked too",
        )
        return
    if not namespace:
        yield Finding("Kubernetes", "warning", "not looked at: no namespace", "give --namespace")
        return
    for kind, name, needed, fix in _objects(site, namespace, account):
        yield _object(core, kind, name, namespace, needed, fix)
    for stage in ("train", "evaluate"):
        placed: Stage = getattr(site.stages, stage)
        if placed.gpu_count or placed.node_selector:
            yield _nodes(core, stage, placed)


def _core(connection: Connection) -> Any:
    import kubernetes

    configuration = kubernetes.client.Configuration()
    if in_pod():
        kubernetes.config.load_incluster_config(client_configuration=configuration)
    else:
        kubernetes.config.load_kube_config(
            context=connection.context or None, client_configuration=configuration, persist_config=False
        )
    configuration.retries = False
    return kubernetes.client.CoreV1Api(kubernetes.client.ApiClient(configuration))


def _objects(site: Site, namespace: str, account: str) -> Iterator[tuple[str, str, bool, str]]:
    """Kind, name, whether a run fails without it, and how to make it."""
    yield (
        "namespace",
        namespace,
        True,
        f"ask for a profile, or give another by --namespace; {namespace} is not there",
    )
    if account:
        yield (
            "service_account",
            account,
            False,
            "Kubeflow makes it; `submit --service-account` names another",
        )
    keys = " ".join(f"--from-literal={key}=..." for key in S3_KEYS[:2])
    yield (
        "secret",
        site.s3_secret,
        False,
        f"kubectl -n {namespace} create secret generic {site.s3_secret} {keys}; not needed where "
        "pods may use S3 anyway",
    )
    yield (
        "secret",
        site.database_secret,
        False,
        f"kubectl -n {namespace} create secret generic {site.database_secret} --from-literal={DATABASE_KEY}=..., "
        "the URL of the database of studies; not needed without tuning",
    )
    yield (
        "secret",
        site.image_pull_secret,
        False,
        f"kubectl -n {namespace} create secret docker-registry {site.image_pull_secret} ...; not needed for a "
        "public image",
    )
    yield (
        "config_map",
        MONITORING_CONFIG_MAP,
        False,
        "kubectl apply -k k8s/overlays/example; without it short stages are not seen by Prometheus",
    )


def _object(core: Any, kind: str, name: str, namespace: str, needed: bool, fix: str) -> Finding:
    import kubernetes
    import urllib3

    check = f"{kind.replace('_', ' ')} {name}"
    read = core.read_namespace if kind == "namespace" else getattr(core, f"read_namespaced_{kind}")
    where = (name,) if kind == "namespace" else (name, namespace)
    try:
        found = read(*where, _request_timeout=_KUBERNETES_SECONDS)
    except kubernetes.client.ApiException as error:
        if error.status == 404:
            return Finding(check, "failed" if needed else "warning", "not there", fix)
        return Finding(check, "warning", f"may not be looked at: {error.status} {error.reason}", fix)
    except urllib3.exceptions.HTTPError as error:
        return Finding(check, "warning", f"Kubernetes does not answer: {error}", "check the kubeconfig")
    wanted = re.findall(r"--from-literal=(\w+)=", fix)
    if absent := [key for key in wanted if key not in (found.data or {})]:
        return Finding(check, "warning", f"is there, without {' and '.join(absent)}", fix)
    return Finding(check, "ok", f"in namespace {namespace}" if kind != "namespace" else "is there")


def _nodes(core: Any, stage: str, placed: Stage) -> Finding:
    """Whether a node could take the stage, as far as labels, taints and GPUs say."""
    import kubernetes
    import urllib3

    check = f"nodes for {stage}"
    selector = ",".join(f"{key}={value}" for key, value in placed.node_selector.items())
    try:
        nodes = core.list_node(label_selector=selector, _request_timeout=_KUBERNETES_SECONDS).items
    except kubernetes.client.ApiException as error:
        return Finding(
            check, "warning", f"may not be looked at: {error.status} {error.reason}", "ask an administrator"
        )
    except urllib3.exceptions.HTTPError as error:
        return Finding(check, "warning", f"Kubernetes does not answer: {error}", "check the kubeconfig")
    wanted = f"{placed.gpu_count} x {placed.gpu_type}"
    fit = [node for node in nodes if _gpus(node, placed.gpu_type) >= placed.gpu_count]
    taken = [node for node in fit if not _kept_away(node, placed)]
    if taken:
        return Finding(check, "ok", f"{len(taken)} with {wanted} and labels {selector or 'as they are'}")
    if fit:
        taints = ", ".join(sorted({taint for node in fit for taint in _kept_away(node, placed)}))
        return Finding(
            check,
            "failed",
            f"{len(fit)} fit, but are tainted: {taints}",
            f"add to stages.{stage}.tolerations of the site",
        )
    return Finding(
        check,
        "warning",
        f"none with {wanted} and labels {selector or 'as they are'}; a node may yet be added when a pod waits",
        f"correct stages.{stage}.gpu_type, gpu_count or node_selector of the site; gpu_count 0 runs on the CPU",
    )


def _gpus(node: Any, gpu_type: str) -> int:
    return int((node.status.allocatable or {}).get(gpu_type, 0))


def _kept_away(node: Any, placed: Stage) -> list[str]:
    """Taints of a node that the stage does not tolerate."""

    def is_tolerated(taint: Any) -> bool:
        return any(
            each.get("key", taint.key) == taint.key
            and each.get("effect", taint.effect) == taint.effect
            and (each.get("operator", "Equal") == "Exists" or each.get("value", "") == (taint.value or ""))
            for each in placed.tolerations
        )

    taints = [taint for taint in node.spec.taints or [] if taint.effect != "PreferNoSchedule"]
    return [f"{taint.key}={taint.value or ''}:{taint.effect}" for taint in taints if not is_tolerated(taint)]


def _storage(name: str, location: str) -> Finding:
    """Whether something can be written, read and deleted below a location."""
    if not location:
        flag = "--store" if name == "store" else "--pipeline-root"
        return Finding(name, "warning", "not looked at", f"give {flag} s3://bucket/prefix to try it from here")
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
