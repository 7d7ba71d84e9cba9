"""The API server of a cluster. It stores the objects of manifests and reviews access by their roles."""

import json
from collections.abc import Iterable
from typing import Any

import kubernetes_validate

from pipelines.kubeflow.cluster import Call
from tests.support.kubeflow_server import Answer, KubernetesServer
from tests.support.kubernetes_rules import permits
from tests.support.overlays import Manifest

_VERSION = "1.34"  # version of the cluster on which Kubeflow was tested
_PLURALS = {"Secret": "secrets", "ConfigMap": "configmaps", "ServiceAccount": "serviceaccounts"}


class ClusterServer(KubernetesServer):
    """A KubernetesServer that answers a LocalSubjectAccessReview as RBAC does."""

    def __init__(self, tokens: set[str] | None = None, namespaces: set[str] | None = None):
        super().__init__(tokens, namespaces)
        self._roles: dict[tuple[str, str], Manifest] = {}
        self._bindings: list[Manifest] = []

    def apply(self, manifests: Iterable[Manifest]) -> None:
        """Create the objects of manifests, as far as their kinds are needed."""
        for manifest in manifests:
            kind, metadata = manifest["kind"], manifest["metadata"]
            if kind == "Namespace":
                self.add(f"/api/v1/namespaces/{metadata['name']}")
            elif kind == "Role":
                self._roles[metadata["namespace"], metadata["name"]] = manifest
            elif kind == "RoleBinding":
                self._bindings.append(manifest)
            elif kind in _PLURALS:
                path = f"/api/v1/namespaces/{metadata['namespace']}/{_PLURALS[kind]}/{metadata['name']}"
                self.add(path, data=manifest.get("data"))

    def answer(self, method: str, path: str, query: dict[str, str], body: bytes, headers: Any) -> Answer:
        if method == "POST" and path.endswith("/localsubjectaccessreviews"):
            if "localsubjectaccessreviews" in self.forbidden:
                message = "localsubjectaccessreviews.authorization.k8s.io is forbidden"
                return self._status(403, "Forbidden", message)
            return self._review(json.loads(body))
        return super().answer(method, path, query, body, headers)

    def _review(self, review: dict[str, Any]) -> Answer:
        kubernetes_validate.validate(review, _VERSION, strict=True)
        namespace, attributes = review["metadata"]["namespace"], review["spec"]["resourceAttributes"]
        assert attributes["namespace"] == namespace
        call = Call(attributes["verb"], attributes["resource"], attributes["name"], attributes["group"])
        roles = [
            self._roles[namespace, binding["roleRef"]["name"]]
            for binding in self._bindings
            if binding["metadata"]["namespace"] == namespace and _is_bound(binding, review["spec"]["user"])
        ]
        answer = {**review, "status": {"allowed": any(permits(role, call) for role in roles)}}
        kubernetes_validate.validate(answer, _VERSION, strict=True)
        return 201, "application/json", json.dumps(answer).encode(), {}


def _is_bound(binding: Manifest, user: str) -> bool:
    return user in [
        f"system:serviceaccount:{subject.get('namespace', '')}:{subject['name']}"
        for subject in binding["subjects"]
        if subject["kind"] == "ServiceAccount"
    ]
