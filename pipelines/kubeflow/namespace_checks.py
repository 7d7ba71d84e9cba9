"""The checks of a namespace and its cluster: secrets, rights, retries, nodes."""

import shlex
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from mappo.errors import ConfigError
from pipelines.errors import ForbiddenError, MissingError
from pipelines.kubeflow import controller
from pipelines.kubeflow.cluster import Call, Cluster
from pipelines.kubeflow.launcher import STORE_KEYS, Keys, calls, keys_of, root_of
from pipelines.placement import DATABASE_KEY, GPU_STAGES, LAUNCHER_CONFIG_MAP, MONITORING_CONFIG_MAP, S3_KEYS
from pipelines.site import Site, StagePod

_SUPERVISED = "a stage restarts its process in the pod when the process fails, and counts attempts of both kinds"


@dataclass(frozen=True)
class Finding:
    """The result of one check. state: ok, warning or failed. fix: the remedy, often a command."""

    check: str
    state: str
    detail: str
    fix: str = ""


@dataclass(frozen=True)
class Target:
    """The run that the cluster is checked for: its site, account (empty if unknown), store and pipeline root."""

    site: Site
    account: str = ""
    store: str = ""
    root: str = ""


class NamespaceChecks:
    """The checks of the namespace in which Kubeflow creates the pods of a run, and of the cluster around it."""

    def __init__(self, cluster: Cluster, api_namespace: str, name: str, account: str, target: Target):
        self._cluster, self._api_namespace, self._name = cluster, api_namespace, name
        self._account, self._target = account, target
        self._kubectl = f"kubectl -n {name}"

    def findings(self) -> Iterator[Finding]:
        """Run all checks; skip those inside the namespace if the namespace is unknown or does not exist."""
        if self._name:
            fix = "ask for a profile of this name, or give another namespace by --namespace"
            namespace = self._object("namespace", self._name, "no run can start", fix)
            yield namespace
            if namespace.state != "failed":
                keys = yield from self._required()
                yield from self._optional(keys)
        yield self._retries()
        for stage in GPU_STAGES:
            pod: StagePod = getattr(self._target.site.stages, stage)
            if pod.gpu_count or pod.node_selector:
                yield self._nodes(stage, pod)

    def _required(self) -> Generator[Finding, None, Keys | None]:
        """Check the secrets, the account and the rights that every run needs; return the keys of the launcher."""
        consequence = "Argo mounts it into every pod, and a pod waits for it for ever"
        yield self._object("secret", STORE_KEYS.secret, consequence, self._copy(), keys=STORE_KEYS.names)
        keys, finding = self._launcher()
        yield finding
        if keys and keys != STORE_KEYS:
            consequence = "the launcher reads the keys of the pipeline root from it"
            yield self._object(
                "secret", keys.secret, consequence, self._create(keys.secret, *keys.names), keys=keys.names
            )
        if self._account:
            yield from self._rights(keys)
        return keys

    def _optional(self, keys: Keys | None) -> Iterator[Finding]:
        """Check the objects that only some runs need; skip a secret that is checked for the launcher already."""
        site = self._target.site
        if not keys or site.s3_secret != keys.secret:
            yield self._s3_secret(site.s3_secret)
        yield self._object(
            "secret",
            site.database_secret,
            "only tuning needs it: it holds the URL of the studies' database",
            self._create(site.database_secret, DATABASE_KEY),
            state="warning",
            keys=(DATABASE_KEY,),
        )
        if site.notify_secret:
            consequence = "no message is sent: it holds the URL of the webhook"
            fix = self._create(site.notify_secret, "url")
            yield self._object("secret", site.notify_secret, consequence, fix, state="warning", keys=("url",))
        fix = f"{self._kubectl} create secret docker-registry {site.image_pull_secret} --docker-server=..."
        yield self._object(
            "secret", site.image_pull_secret, "only a private registry needs it", fix, state="warning"
        )
        consequence = "Prometheus misses the metrics of short stages"
        create = f"{self._kubectl} create configmap {MONITORING_CONFIG_MAP}"
        fix = f"{create} --from-literal=pushgateway=http://HOST:9091; k8s/components/pushgateway creates both"
        yield self._object("config_map", MONITORING_CONFIG_MAP, consequence, fix, state="warning")

    def _s3_secret(self, name: str) -> Finding:
        uses_s3 = any(location.startswith("s3:") for location in (self._target.store, self._target.root))
        state, consequence = "ok", "stages use Kubeflow's own store"
        if uses_s3:
            state, consequence = "warning", "stages reach s3:// only if their account has rights to the bucket"
        keys = S3_KEYS[:2]
        return self._object("secret", name, consequence, self._create(name, *keys), state=state, keys=keys)

    def _object(
        self, kind: str, name: str, consequence: str, fix: str, *, state: str = "failed", keys: Sequence[str] = ()
    ) -> Finding:
        """Check that an object exists and has these keys.

        consequence: the effect of a missing object or key. fix: the remedy. state: the finding's state then.
        """
        check = f"{kind.replace('_', ' ')} {name}"
        try:
            data = self._cluster.read(kind, name, "" if kind == "namespace" else self._name)
        except MissingError:
            return Finding(check, state, f"does not exist; {consequence}", fix)
        except ForbiddenError as error:
            return Finding(check, "warning", f"cannot be read: {error}", f"if it does not exist: {fix}")
        if absent := [key for key in keys if key not in data]:
            # An optional secret may be missing, but one without its keys is a mistake.
            state = "warning" if state == "ok" else state
            return Finding(check, state, f"exists without {' and '.join(absent)}; {consequence}", fix)
        return Finding(check, "ok", "exists")

    def _create(self, secret: str, *keys: str) -> str:
        literals = " ".join(f"--from-literal={key}=..." for key in keys)
        return f"{self._kubectl} create secret generic {secret} {literals}"

    def _copy(self) -> str:
        """Return the command that copies the secret of Kubeflow's own store from Kubeflow's namespace."""
        if self._name == self._api_namespace:
            create = self._create(STORE_KEYS.secret, *STORE_KEYS.names)
            return f"apply the manifests of Kubeflow again, which create it; or {create}"
        return (
            f"kubectl -n {self._api_namespace} get secret {STORE_KEYS.secret} -o yaml | "
            f"sed 's/namespace: {self._api_namespace}/namespace: {self._name}/' | kubectl apply -f -"
        )

    def _launcher(self) -> tuple[Keys | None, Finding]:
        """Check the launcher's config map; return the keys that the launcher reads, None if none or unknown."""
        check = f"config map {LAUNCHER_CONFIG_MAP}"
        try:
            data = self._cluster.read("config_map", LAUNCHER_CONFIG_MAP, self._name)
        except MissingError:
            data = {}
        except ForbiddenError as error:
            command = f"{self._kubectl} get configmap {LAUNCHER_CONFIG_MAP} -o yaml"
            fix = f"let somebody with the right to read it run: {command}"
            return None, Finding(check, "warning", f"cannot be read: {error}", fix)
        root = self._target.root or root_of(data)
        try:
            keys = keys_of(root, data)
        except ConfigError as error:
            return None, Finding(
                check, "failed", str(error), f"{self._kubectl} edit configmap {LAUNCHER_CONFIG_MAP}"
            )
        source = f"the keys of secret {keys.secret}" if keys else "the rights and the environment of their pods"
        return keys, Finding(check, "ok", f"{'' if data else 'none; '}artifacts go to {root} with {source}")

    def _rights(self, keys: Keys | None) -> Iterator[Finding]:
        """Check that the pods' account exists and has the right to all requests of the pods to Kubernetes."""
        create = f"{self._kubectl} create serviceaccount {self._account}"
        fix = (
            f"{create}; overlays of k8s/ create mappo-runner with its rights, and --service-account names another"
        )
        account = self._object(
            "service_account", self._account, "Kubernetes refuses pods without their account", fix
        )
        yield account
        if account.state != "failed":
            yield self._allowed(calls(keys))

    def _allowed(self, needed: Sequence[Call]) -> Finding:
        check = f"rights of {self._account}"
        try:
            refused = [call for call in needed if not self._cluster.allows(self._account, self._name, call)]
        except (ForbiddenError, MissingError) as error:
            user = f"system:serviceaccount:{self._name}:{self._account}"
            commands = [f"{self._kubectl} auth can-i {_in_kubectl(call)} --as={user}" for call in needed]
            detail = f"cannot be read: {error}"
            return Finding(check, "warning", detail, "\n".join(["let an administrator run:", *commands]))
        if refused:
            grants = [line for call in refused for line in self._grant(call)]
            return Finding(check, "failed", f"may not {', '.join(map(str, refused))}", "\n".join(grants))
        return Finding(check, "ok", f"may {', '.join(map(str, needed))}")

    def _grant(self, call: Call) -> Iterator[str]:
        """Yield the commands that give the account the right to a call."""
        name = f"{self._account}-{call.verb}-{call.name or call.resource}"
        account = f"{self._name}:{self._account}"
        resource = f"{call.resource}.{call.group}" if call.group else call.resource
        only = f" --resource-name={call.name}" if call.name else ""
        yield f"{self._kubectl} create role {name} --verb={call.verb} --resource={resource}{only}"
        yield f"{self._kubectl} create rolebinding {name} --role={name} --serviceaccount={account}"

    def _retries(self) -> Finding:
        """Check which pods Argo recreates: lost ones, failed ones, or none."""
        check, source = "retries", f"config map {controller.CONFIG_MAP} in namespace {self._api_namespace}"
        command = f"kubectl -n {self._api_namespace} {{}} configmap {controller.CONFIG_MAP}"
        try:
            data = self._cluster.read("config_map", controller.CONFIG_MAP, self._api_namespace)
            policy, limit = controller.retry_policy(data)
        except MissingError:
            fix = f"kubectl get configmap -A --field-selector metadata.name={controller.CONFIG_MAP}"
            return Finding(check, "warning", f"{source} does not exist; Argo may have its own namespace", fix)
        except ForbiddenError as error:
            fix = f"let somebody with the right to read it run: {command.format('get')} -o yaml"
            return Finding(check, "warning", f"{source} cannot be read: {error}", fix)
        except ConfigError as error:
            return Finding(check, "failed", f"{source}: {error}", command.format("edit"))
        if policy == "Always" and limit != "0":
            detail = (
                f"Argo recreates failed pods at every level ({source}: Always, limit {limit}): a stage with a "
                "permanent failure is started and refused many times before its run ends"
            )
            return Finding(check, "warning", detail, f"{command.format('edit')}: set limit 0, or policy OnError")
        if policy in controller.RETRIES_LOST_PODS:
            also = ", and pods that failed" if policy == "Always" else ""
            return Finding(check, "ok", f"Argo recreates lost pods{also} ({policy}); {_SUPERVISED}")
        cause = f"its retryPolicy is {policy}" if policy else "it has no templateDefaults.retryStrategy"
        detail = f"Argo does not recreate lost pods: {source}: {cause}; {_SUPERVISED}"
        patch = shlex.quote(controller.with_lost_pods_retried(data))
        return Finding(check, "warning", detail, f"{command.format('patch')} --patch {patch}")

    def _nodes(self, stage: str, pod: StagePod) -> Finding:
        """Check that the labels, taints and GPUs of some node fit the pod of a stage."""
        check = f"nodes for {stage}"
        try:
            nodes = self._cluster.nodes(pod.node_selector)
        except ForbiddenError as error:
            return Finding(check, "warning", f"no right to read nodes: {error}", "ask an administrator")
        labels = ",".join(f"{key}={value}" for key, value in pod.node_selector.items()) or "of any kind"
        wanted = f"{pod.gpu_count} x {pod.gpu_type} and labels {labels}"
        fitting = [node for node in nodes if _gpus(node, pod.gpu_type) >= pod.gpu_count]
        usable = [node for node in fitting if not _untolerated_taints(node, pod)]
        if usable:
            return Finding(check, "ok", f"{len(usable)} with {wanted}")
        if fitting:
            taints = ", ".join(sorted({taint for node in fitting for taint in _untolerated_taints(node, pod)}))
            fix = f"add them to stages.{stage}.tolerations of the site"
            return Finding(check, "failed", f"{len(fitting)} fit, but have taints not tolerated: {taints}", fix)
        return Finding(
            check,
            "warning",
            f"none with {wanted}; an autoscaler may still add one when a pod waits",
            f"correct stages.{stage}.gpu_type, gpu_count or node_selector of the site; 0 GPUs run on the CPU",
        )


def _in_kubectl(call: Call) -> str:
    """Return a call in the notation of kubectl auth can-i, which needs the group."""
    resource = f"{call.resource}.{call.group}" if call.group else call.resource
    return f"{call.verb} {resource}" + (f"/{call.name}" if call.name else "")


def _gpus(node: Any, gpu_type: str) -> int:
    return int((node.status.allocatable or {}).get(gpu_type, 0))


def _untolerated_taints(node: Any, pod: StagePod) -> list[str]:
    """Return the taints of a node that the pod of a stage does not tolerate."""

    def is_tolerated(taint: Any) -> bool:
        return any(
            toleration.get("key") in (None, "", taint.key)
            and toleration.get("effect") in (None, "", taint.effect)
            and (
                toleration.get("operator", "Equal") == "Exists"
                or toleration.get("value", "") == (taint.value or "")
            )
            for toleration in pod.tolerations
        )

    taints = [taint for taint in node.spec.taints or [] if taint.effect != "PreferNoSchedule"]
    return [f"{taint.key}={taint.value or ''}:{taint.effect}" for taint in taints if not is_tolerated(taint)]
