"""The checks that a cluster makes of manifests: schemas, Pod Security, network policies and roles.

The package kubernetes-validate has the published schemas of Kubernetes' own kinds. No package has the schemas of
the kinds that operators add. The schemas here cover the fields that we use, after the references of
prometheus-operator, Kueue, and Kubeflow's profiles and pipelines. They allow no other fields, so a misspelt field
is an error.
"""

import ipaddress
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jsonschema
import kubernetes_validate

from pipelines.kubeflow.cluster import Call

OLDEST, NEWEST = "1.31", "1.37"  # versions of Kubernetes in docs/operations.md
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
    ("pipelines.kubeflow.org/v2beta1", "Pipeline"): _closed(displayName=_TEXT, description=_TEXT),
    ("pipelines.kubeflow.org/v2beta1", "PipelineVersion"): _closed(
        ["pipelineSpec"],
        pipelineName=_TEXT,
        displayName=_TEXT,
        description=_TEXT,
        pipelineSpec={"type": "object"},
        platformSpec={"type": "object"},
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
    """Check a manifest as the API server of a version would.

    Raises:
        ValidationError: the manifest does not match its schema (the class of jsonschema or kubernetes_validate).
        SchemaNotFoundError: the kind has no schema.
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
    """Return the reasons why Pod Security admission would reject a pod under `restricted`, on Linux.

    Source: kubernetes.io/docs/concepts/security/pod-security-standards, with the controls of `baseline`.
    """
    violations = [name for name in ("hostNetwork", "hostPID", "hostIPC") if pod.get(name)]
    for volume in pod.get("volumes", []):
        violations += [f"volume {kind}" for kind in volume.keys() - {"name"} - _VOLUMES]
    pod_context = pod.get("securityContext") or {}
    violations += _of_the_pod(pod_context)
    for kind in ("initContainers", "containers", "ephemeralContainers"):
        for container in pod.get(kind, []):
            violations += [f"{container['name']}: {reason}" for reason in _of_a_container(container, pod_context)]
    return violations


def _of_the_pod(context: Mapping[str, Any]) -> Iterator[str]:
    if context.get("runAsUser") == 0:
        yield "runAsUser 0"
    if context.get("runAsNonRoot") is False:
        yield "runAsNonRoot false"
    if context.get("sysctls"):
        yield "sysctls"


def _of_a_container(container: Mapping[str, Any], pod_context: Mapping[str, Any]) -> Iterator[str]:
    context = container.get("securityContext") or {}
    capabilities = context.get("capabilities") or {}
    if context.get("privileged"):
        yield "privileged"
    if context.get("allowPrivilegeEscalation") is not False:
        yield "allowPrivilegeEscalation"
    if "ALL" not in capabilities.get("drop", []) or set(capabilities.get("add", [])) - {"NET_BIND_SERVICE"}:
        yield "capabilities"
    if context.get("runAsNonRoot", pod_context.get("runAsNonRoot")) is not True:
        yield "runAsNonRoot"
    if context.get("runAsUser", pod_context.get("runAsUser")) == 0:
        yield "runAsUser 0"
    seccomp = (context.get("seccompProfile") or pod_context.get("seccompProfile") or {}).get("type")
    if seccomp not in ("RuntimeDefault", "Localhost"):
        yield "seccompProfile"
    if context.get("procMount", "Default") != "Default":
        yield "procMount"
    if any(port.get("hostPort") for port in container.get("ports", [])):
        yield "hostPort"


@dataclass(frozen=True)
class Peer:
    """An end of a connection: a pod with its namespace and labels, or an address outside the cluster."""

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
    policies: Sequence[Mapping[str, Any]], direction: str, pod: Peer, other: Peer, port: int, protocol: str
) -> bool:
    specs = [
        policy["spec"]
        for policy in policies
        if policy["metadata"]["namespace"] == pod.namespace
        and direction in policy["spec"]["policyTypes"]
        and _selects(policy["spec"]["podSelector"], pod.labels)
    ]
    rules_key, peers_key = direction.lower(), {"Egress": "to", "Ingress": "from"}[direction]
    return not specs or any(
        any(item["port"] == port and item.get("protocol", "TCP") == protocol for item in rule["ports"])
        and any(_is_peer(peer, other, pod.namespace) for peer in rule[peers_key])
        for spec in specs
        for rule in spec.get(rules_key, [])
    )


def _is_peer(peer: Mapping[str, Any], other: Peer, namespace: str) -> bool:
    if "ipBlock" in peer:
        address = ipaddress.ip_address(other.address) if other.address else None
        block = peer["ipBlock"]
        return (
            address is not None
            and address in ipaddress.ip_network(block["cidr"])
            and not any(address in ipaddress.ip_network(excluded) for excluded in block.get("except", []))
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
    """Yield every call that a role allows."""
    for rule in role["rules"]:
        for group in rule["apiGroups"]:
            for resource in rule["resources"]:
                for verb in rule["verbs"]:
                    for name in rule.get("resourceNames", [""]):
                        yield Call(verb, resource, name, group)
