"""A check of everything that a run needs on a cluster, one by one, each with its fix."""

import shlex
import time
import uuid
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import mappo
from mappo.errors import ConfigError, StoreError
from mappo.runs.locations import open_store
from mappo.runs.store import honours_conditions
from pipelines.kubeflow import controller
from pipelines.kubeflow.cluster import Call, Cluster, ForbiddenError, MissingError, UnreachableError
from pipelines.kubeflow.connection import Api, ApiError, Connection
from pipelines.kubeflow.launcher import STORE_KEYS, Keys, calls, keys_of, root_of
from pipelines.placement import DATABASE_KEY, GPU_STAGES, LAUNCHER_CONFIG_MAP, MONITORING_CONFIG_MAP, S3_KEYS
from pipelines.site import Site, StagePod

_SLOW_SECONDS = 2.0
_TRIED = {"2.17": "tried on a real cluster with 2.17.0"}  # versions of the server, as docs/operations.md has them
_READ = ("2.16", "2.15")
_SUPERVISED = "a stage restarts its process in the pod when it fails, and counts attempts of both kinds together"


@dataclass(frozen=True)
class Finding:
    """The result of one check; state is ok, warning or failed."""

    check: str
    state: str
    detail: str
    fix: str = ""


@dataclass(frozen=True)
class Target:
    """The run to check for: its site, the account of its pods (empty: unknown), its store and pipeline root."""

    site: Site
    account: str = ""
    store: str = ""
    root: str = ""


def findings(connection: Connection, connect: Callable[[], Api], target: Target) -> Iterator[Finding]:
    """Check everything, in the order in which a run would need it. Nothing is left behind."""
    yield from _image(target.site)
    namespace, account, is_reached = yield from _kubeflow(connection, connect, target.account)
    try:
        yield from _Namespace(Cluster(connection), connection.api_namespace, namespace, account, target).findings()
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


class _Namespace:
    """Checks of the namespace in which the pods of a run are made, and of the cluster around it."""

    def __init__(self, cluster: Cluster, api_namespace: str, name: str, account: str, target: Target):
        self._cluster, self._api_namespace, self._name = cluster, api_namespace, name
        self._account, self._target = account, target
        self._kubectl = f"kubectl -n {name}"

    def findings(self) -> Iterator[Finding]:
        """Check all of it, but nothing inside a namespace that is not known or does not exist."""
        if self._name:
            fix = "ask for a profile of this name, or give another namespace by --namespace"
            namespace = self._object("namespace", self._name, "no run can start", fix)
            yield namespace
            if namespace.state != "failed":
                keys = yield from self._needed()
                yield from self._optional(keys)
        yield self._retries()
        for stage in GPU_STAGES:
            placed: StagePod = getattr(self._target.site.stages, stage)
            if placed.gpu_count or placed.node_selector:
                yield self._nodes(stage, placed)

    def _needed(self) -> Generator[Finding, None, Keys | None]:
        """Check what every run needs, in secrets, account and rights; return the keys of the launcher."""
        lack = "Argo mounts it into every pod, and a pod waits for it for ever"
        yield self._object("secret", STORE_KEYS.secret, lack, self._copy(), keys=STORE_KEYS.names)
        keys, finding = self._launcher()
        yield finding
        if keys and keys != STORE_KEYS:
            lack = "the launcher reads the keys of the pipeline root from it"
            yield self._object(
                "secret", keys.secret, lack, self._create(keys.secret, *keys.names), keys=keys.names
            )
        if self._account:
            yield from self._rights(keys)
        return keys

    def _optional(self, keys: Keys | None) -> Iterator[Finding]:
        """Check what some runs need; not again the secret with the launcher's keys."""
        site = self._target.site
        if not keys or site.s3_secret != keys.secret:
            yield self._s3_secret(site.s3_secret)
        yield self._object(
            "secret",
            site.database_secret,
            "only tuning needs it, for the URL of the database of studies",
            self._create(site.database_secret, DATABASE_KEY),
            state="warning",
            keys=(DATABASE_KEY,),
        )
        fix = f"{self._kubectl} create secret docker-registry {site.image_pull_secret} --docker-server=..."
        yield self._object(
            "secret", site.image_pull_secret, "only a private registry needs it", fix, state="warning"
        )
        lack = "Prometheus does not see short stages"
        create = f"{self._kubectl} create configmap {MONITORING_CONFIG_MAP}"
        fix = f"{create} --from-literal=pushgateway=http://HOST:9091; k8s/components/pushgateway makes both"
        yield self._object("config_map", MONITORING_CONFIG_MAP, lack, fix, state="warning")

    def _s3_secret(self, name: str) -> Finding:
        uses_s3 = any(location.startswith("s3:") for location in (self._target.store, self._target.root))
        state, lack = "ok", "stages use Kubeflow's own store"
        if uses_s3:
            state, lack = "warning", "stages reach s3:// by the rights of their account alone"
        keys = S3_KEYS[:2]
        return self._object("secret", name, lack, self._create(name, *keys), state=state, keys=keys)

    def _object(
        self, kind: str, name: str, lack: str, fix: str, *, state: str = "failed", keys: Sequence[str] = ()
    ) -> Finding:
        """Check that an object exists and has these keys. lack: the consequence if not; state: how bad that is."""
        check = f"{kind.replace('_', ' ')} {name}"
        try:
            data = self._cluster.read(kind, name, "" if kind == "namespace" else self._name)
        except MissingError:
            return Finding(check, state, f"does not exist; {lack}", fix)
        except ForbiddenError as error:
            return Finding(check, "warning", f"cannot be read: {error}", f"if it does not exist: {fix}")
        if absent := [key for key in keys if key not in data]:
            worse = "warning" if state == "ok" else state
            return Finding(check, worse, f"exists without {' and '.join(absent)}; {lack}", fix)
        return Finding(check, "ok", "exists")

    def _create(self, secret: str, *keys: str) -> str:
        literals = " ".join(f"--from-literal={key}=..." for key in keys)
        return f"{self._kubectl} create secret generic {secret} {literals}"

    def _copy(self) -> str:
        """Return the command that copies the secret of Kubeflow's own store from where Kubeflow is installed."""
        if self._name == self._api_namespace:
            create = self._create(STORE_KEYS.secret, *STORE_KEYS.names)
            return f"apply the manifests of Kubeflow again, which make it; or {create}"
        return (
            f"kubectl -n {self._api_namespace} get secret {STORE_KEYS.secret} -o yaml | "
            f"sed 's/namespace: {self._api_namespace}/namespace: {self._name}/' | kubectl apply -f -"
        )

    def _launcher(self) -> tuple[Keys | None, Finding]:
        """Return the keys that the launcher will read, as far as they are known, and where artifacts go."""
        check = f"config map {LAUNCHER_CONFIG_MAP}"
        try:
            data = self._cluster.read("config_map", LAUNCHER_CONFIG_MAP, self._name)
        except MissingError:
            data = {}
        except ForbiddenError as error:
            fix = f"let somebody who may look compare: {self._kubectl} get configmap {LAUNCHER_CONFIG_MAP} -o yaml"
            return None, Finding(check, "warning", f"cannot be read: {error}", fix)
        root = self._target.root or root_of(data)
        try:
            keys = keys_of(root, data)
        except ConfigError as error:
            return None, Finding(
                check, "failed", str(error), f"{self._kubectl} edit configmap {LAUNCHER_CONFIG_MAP}"
            )
        how = f"the keys of secret {keys.secret}" if keys else "the rights and the environment of their pods"
        return keys, Finding(check, "ok", f"{'' if data else 'none; '}artifacts go to {root} with {how}")

    def _rights(self, keys: Keys | None) -> Iterator[Finding]:
        """Check that the account of the pods exists and may do all that they ask of Kubernetes."""
        create = f"{self._kubectl} create serviceaccount {self._account}"
        fix = f"{create}; overlays of k8s/ make mappo-runner with its rights, and --service-account names another"
        account = self._object(
            "service_account", self._account, "Kubernetes refuses pods without their account", fix
        )
        yield account
        if account.state != "failed":
            yield self._allowed(calls(keys))

    def _allowed(self, asked: Sequence[Call]) -> Finding:
        check = f"rights of {self._account}"
        try:
            refused = [call for call in asked if not self._cluster.allows(self._account, self._name, call)]
        except (ForbiddenError, MissingError) as error:
            user = f"system:serviceaccount:{self._name}:{self._account}"
            fixes = [f"{self._kubectl} auth can-i {_in_kubectl(call)} --as={user}" for call in asked]
            detail = f"cannot be read: {error}"
            return Finding(check, "warning", detail, "\n".join(["let an administrator ask:", *fixes]))
        if refused:
            grants = [line for call in refused for line in self._grant(call)]
            return Finding(check, "failed", f"may not {', '.join(map(str, refused))}", "\n".join(grants))
        return Finding(check, "ok", f"may {', '.join(map(str, asked))}")

    def _grant(self, call: Call) -> Iterator[str]:
        """Give the commands that allow a call to the account."""
        name = f"{self._account}-{call.verb}-{call.name or call.resource}"
        account = f"{self._name}:{self._account}"
        resource = f"{call.resource}.{call.group}" if call.group else call.resource
        only = f" --resource-name={call.name}" if call.name else ""
        yield f"{self._kubectl} create role {name} --verb={call.verb} --resource={resource}{only}"
        yield f"{self._kubectl} create rolebinding {name} --role={name} --serviceaccount={account}"

    def _retries(self) -> Finding:
        """Check which losses Argo tries again."""
        check, where = "retries", f"config map {controller.CONFIG_MAP} in namespace {self._api_namespace}"
        command = f"kubectl -n {self._api_namespace} {{}} configmap {controller.CONFIG_MAP}"
        try:
            data = self._cluster.read("config_map", controller.CONFIG_MAP, self._api_namespace)
            policy, limit = controller.retry_policy(data)
        except MissingError:
            fix = f"kubectl get configmap -A --field-selector metadata.name={controller.CONFIG_MAP}"
            return Finding(check, "warning", f"{where} does not exist; Argo may have a namespace of its own", fix)
        except ForbiddenError as error:
            fix = f"let somebody with the right to read it run: {command.format('get')} -o yaml"
            return Finding(check, "warning", f"{where} cannot be read: {error}", fix)
        except ConfigError as error:
            return Finding(check, "failed", f"{where}: {error}", command.format("edit"))
        if policy == "Always" and limit != "0":
            detail = (
                f"Argo recreates failed pods at every level ({where}: Always, limit {limit}): a stage that failed "
                "for good is started and refused many times before its run ends"
            )
            return Finding(check, "warning", detail, f"{command.format('edit')}; limit 0, or policy OnError")
        if policy in controller.RETRIES_LOST_PODS:
            also = ", and pods that failed" if policy == "Always" else ""
            return Finding(check, "ok", f"Argo recreates lost pods{also} ({policy}); {_SUPERVISED}")
        cause = f"its retryPolicy is {policy}" if policy else "it has no templateDefaults.retryStrategy"
        detail = f"Argo does not recreate lost pods: {where}: {cause}; {_SUPERVISED}"
        patch = shlex.quote(controller.with_lost_pods_retried(data))
        return Finding(check, "warning", detail, f"{command.format('patch')} --patch {patch}")

    def _nodes(self, stage: str, placed: StagePod) -> Finding:
        """Check that a node could take the stage, as far as labels, taints and GPUs say."""
        check = f"nodes for {stage}"
        try:
            nodes = self._cluster.nodes(placed.node_selector)
        except ForbiddenError as error:
            return Finding(check, "warning", f"no right to read nodes: {error}", "ask an administrator")
        labels = ",".join(f"{key}={value}" for key, value in placed.node_selector.items()) or "as they are"
        wanted = f"{placed.gpu_count} x {placed.gpu_type} and labels {labels}"
        fit = [node for node in nodes if _gpus(node, placed.gpu_type) >= placed.gpu_count]
        taken = [node for node in fit if not _kept_away(node, placed)]
        if taken:
            return Finding(check, "ok", f"{len(taken)} with {wanted}")
        if fit:
            taints = ", ".join(sorted({taint for node in fit for taint in _kept_away(node, placed)}))
            fix = f"add to stages.{stage}.tolerations of the site"
            return Finding(check, "failed", f"{len(fit)} fit, but are tainted: {taints}", fix)
        return Finding(
            check,
            "warning",
            f"none with {wanted}; a node may yet be added when a pod waits",
            f"correct stages.{stage}.gpu_type, gpu_count or node_selector of the site; 0 GPUs run on the CPU",
        )


def _in_kubectl(call: Call) -> str:
    """Return a call in the notation of kubectl auth can-i, which needs the group."""
    resource = f"{call.resource}.{call.group}" if call.group else call.resource
    return f"{call.verb} {resource}" + (f"/{call.name}" if call.name else "")


def _gpus(node: Any, gpu_type: str) -> int:
    return int((node.status.allocatable or {}).get(gpu_type, 0))


def _kept_away(node: Any, placed: StagePod) -> list[str]:
    """Return the taints of a node that the stage does not tolerate."""

    def is_tolerated(taint: Any) -> bool:
        return any(
            each.get("key") in (None, "", taint.key)
            and each.get("effect") in (None, "", taint.effect)
            and (each.get("operator", "Equal") == "Exists" or each.get("value", "") == (taint.value or ""))
            for each in placed.tolerations
        )

    taints = [taint for taint in node.spec.taints or [] if taint.effect != "PreferNoSchedule"]
    return [f"{taint.key}={taint.value or ''}:{taint.effect}" for taint in taints if not is_tolerated(taint)]


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
