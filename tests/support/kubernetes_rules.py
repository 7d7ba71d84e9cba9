"""The checks of a cluster on manifests: schemas, Pod Security, network policies, roles; each by its own rules.

Kubernetes' own kinds are checked by its published schemas (kubernetes-validate). For the kinds that operators add
there is no such package: their schemas here are those of the fields that we use, after the references of
prometheus-operator, Kueue and Kubeflow's profiles, and closed, so that a field that is misspelt is an error.
"""

import ipaddress
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jsonschema
import kubernetes_validate

from pipelines.kubeflow.cluster import Call

OLDEST, NEWEST = "1.31", "1.37"  # of Kubernetes, as docs/operations.md says
_TEXT = {"type": "string", "minLength": 1}
_LABELS = {"type": "object", "additionalProperties": {"type": "string"}}
_DURATION = {"type": "string", "pattern": "^([0-9]+(ms|[smhdwy]))+$"}


def _closed(required: Sequence[str] = (), **properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
        "minProperties": 1,
    }


def _list_of(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": 1}


_SELECTOR = _closed(["matchLabels"], matchLabels=_LABELS)
_RELABELING = _closed(
    sourceLabels=_list_of({"type": "string", "pattern": "^[a-zA-Z_][a-zA-Z0-9_]*$"}),
    separator=_TEXT,
    regex=_TEXT,
    targetLabel=_TEXT,
    replacement={"type": "string"},
    action={"enum": ["keep", "drop", "replace", "labeldrop", "labelkeep"]},
)
_RULE = _closed(
    ["expr"],
    record={"type": "string", "pattern": "^[a-zA-Z_:][a-zA-Z0-9_:]*$"},
    alert=_TEXT,
    expr=_TEXT,
    labels=_LABELS,
    annotations=_LABELS,
    **{"for": _DURATION, "keep_firing_for": _DURATION},
)
_CUSTOM = {
    ("monitoring.coreos.com/v1", "PodMonitor"): _closed(
        ["selector", "podMetricsEndpoints"],
        selector=_SELECTOR,
        podMetricsEndpoints=_list_of(
            _closed(
                path=_TEXT,
                port=_TEXT,
                interval=_DURATION,
                scrapeTimeout=_DURATION,
                relabelings=_list_of(_RELABELING),
            )
        ),
    ),
    ("monitoring.coreos.com/v1", "ServiceMonitor"): _closed(
        ["selector", "endpoints"],
        selector=_SELECTOR,
        endpoints=_list_of(_closed(path=_TEXT, port=_TEXT, interval=_DURATION, honorLabels={"type": "boolean"})),
    ),
    ("monitoring.coreos.com/v1", "PrometheusRule"): _closed(
        ["groups"], groups=_list_of(_closed(["name"], name=_TEXT, interval=_DURATION, rules=_list_of(_RULE)))
    ),
    ("kueue.x-k8s.io/v1beta2", "LocalQueue"): _closed(
        ["clusterQueue"],
        clusterQueue={"type": "string", "maxLength": 253, "pattern": "^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$"},
        stopPolicy={"enum": ["None", "Hold", "HoldAndDrain"]},
    ),
    ("kubeflow.org/v1", "Profile"): _closed(
        ["owner"], owner=_closed(["kind", "name"], kind={"enum": ["User", "Group", "ServiceAccount"]}, name=_TEXT)
    ),
}


def check_schema(manifest: Mapping[str, Any], version: str) -> None:
    """Refuse what the API server of that version would.

    Raises:
        ValidationError: of jsonschema or kubernetes_validate.
        SchemaNotFoundError: a kind that neither knows.
    """
    custom = _CUSTOM.get((manifest["apiVersion"], manifest["kind"]))
    if custom is None:
        kubernetes_validate.validate(dict(manifest), version, strict=True)
        return
    metadata = _closed(["name"], name=_TEXT, namespace=_TEXT, labels=_LABELS, annotations=_LABELS)
    whole = _closed(
        ["apiVersion", "kind", "metadata", "spec"], apiVersion=_TEXT, kind=_TEXT, metadata=metadata, spec=custom
    )
    jsonschema.validate(dict(manifest), whole)


_VOLUMES = {
    "configMap",
    "csi",
    "downwardAPI",
    "emptyDir",
    "ephemeral",
    "persistentVolumeClaim",
    "projected",
    "secret",
}


def restricted_violations(pod: Mapping[str, Any]) -> list[str]:
    """Yield the reasons for which Pod Security admission would refuse a pod under `restricted`, on Linux.

    After kubernetes.io/docs/concepts/security/pod-security-standards, with the controls of `baseline`.
    """
    found = [name for name in ("hostNetwork", "hostPID", "hostIPC") if pod.get(name)]
    for volume in pod.get("volumes", []):
        found += [f"volume {kind}" for kind in volume.keys() - {"name"} - _VOLUMES]
    of_pod = pod.get("securityContext") or {}
    found += _of_the_pod(of_pod)
    for kind in ("initContainers", "containers", "ephemeralContainers"):
        for container in pod.get(kind, []):
            found += [f"{container['name']}: {each}" for each in _of_a_container(container, of_pod)]
    return found


def _of_the_pod(context: Mapping[str, Any]) -> Iterator[str]:
    if context.get("runAsUser") == 0:
        yield "runAsUser 0"
    if context.get("runAsNonRoot") is False:
        yield "runAsNonRoot false"
    if context.get("sysctls"):
        yield "sysctls"


def _of_a_container(container: Mapping[str, Any], of_pod: Mapping[str, Any]) -> Iterator[str]:
    own = container.get("securityContext") or {}
    capabilities = own.get("capabilities") or {}
    if own.get("privileged"):
        yield "privileged"
    if own.get("allowPrivilegeEscalation") is not False:
        yield "allowPrivilegeEscalation"
    if "ALL" not in capabilities.get("drop", []) or set(capabilities.get("add", [])) - {"NET_BIND_SERVICE"}:
        yield "capabilities"
    if own.get("runAsNonRoot", of_pod.get("runAsNonRoot")) is not True:
        yield "runAsNonRoot"
    if own.get("runAsUser", of_pod.get("runAsUser")) == 0:
        yield "runAsUser 0"
    seccomp = (own.get("seccompProfile") or of_pod.get("seccompProfile") or {}).get("type")
    if seccomp not in ("RuntimeDefault", "Localhost"):
        yield "seccompProfile"
    if own.get("procMount", "Default") != "Default":
        yield "procMount"
    if any(port.get("hostPort") for port in container.get("ports", [])):
        yield "hostPort"


@dataclass(frozen=True)
class Peer:
    """An end of a connection: a pod by its namespace and labels, or an address outside of the cluster."""

    namespace: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    address: str = ""


def is_allowed(
    policies: Sequence[Mapping[str, Any]], source: Peer, target: Peer, port: int, protocol: str
) -> bool:
    """Return whether the network policies of a namespace let one pod connect to another, or to an address."""
    return _may(policies, "Egress", source, target, port, protocol) and _may(
        policies, "Ingress", target, source, port, protocol
    )


def _may(
    policies: Sequence[Mapping[str, Any]], direction: str, own: Peer, other: Peer, port: int, protocol: str
) -> bool:
    mine = [
        policy["spec"]
        for policy in policies
        if policy["metadata"]["namespace"] == own.namespace
        and direction in policy["spec"]["policyTypes"]
        and _selects(policy["spec"]["podSelector"], own.labels)
    ]
    sides, ports = direction.lower(), {"Egress": "to", "Ingress": "from"}[direction]
    return not mine or any(
        any(each["port"] == port and each.get("protocol", "TCP") == protocol for each in rule["ports"])
        and any(_is_peer(peer, other, own.namespace) for peer in rule[ports])
        for spec in mine
        for rule in spec.get(sides, [])
    )


def _is_peer(peer: Mapping[str, Any], other: Peer, namespace: str) -> bool:
    if "ipBlock" in peer:
        address = ipaddress.ip_address(other.address) if other.address else None
        block = peer["ipBlock"]
        return (
            address is not None
            and address in ipaddress.ip_network(block["cidr"])
            and not any(address in ipaddress.ip_network(each) for each in block.get("except", []))
        )
    if other.address:
        return False
    if "namespaceSelector" in peer:
        if not _selects(peer["namespaceSelector"], {"kubernetes.io/metadata.name": other.namespace}):
            return False
    elif other.namespace != namespace:
        return False
    return _selects(peer.get("podSelector", {}), other.labels)


def _selects(selector: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    assert selector.keys() <= {"matchLabels"}, selector
    return all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items())


def permits(role: Mapping[str, Any], call: Call) -> bool:
    """Return whether a role allows a call."""
    return any(
        call.group in rule["apiGroups"]
        and call.resource in rule["resources"]
        and call.verb in rule["verbs"]
        and (not rule.get("resourceNames") or call.name in rule["resourceNames"])
        for rule in role["rules"]
    )


def granted(role: Mapping[str, Any]) -> Iterator[Call]:
    """Yield each call that a role allows."""
    for rule in role["rules"]:
        for group in rule["apiGroups"]:
            for resource in rule["resources"]:
                for verb in rule["verbs"]:
                    for name in rule.get("resourceNames", [""]):
                        yield Call(verb, resource, name, group)
