"""The Kubernetes cluster behind Kubeflow, as far as this user may read it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import kubernetes
import urllib3

from mappo.errors import ConfigError
from pipelines.errors import ForbiddenError, MissingError, UnreachableError
from pipelines.kubeflow.connection import Connection, in_pod, load_kubeconfig, proxy_of

_TIMEOUT_SECONDS = 15


@dataclass(frozen=True)
class Call:
    """A request to the Kubernetes API. name: name of the object; empty for any object of the resource."""

    verb: str
    resource: str
    name: str = ""
    group: str = ""

    def __str__(self) -> str:
        """Return the call in kubectl's notation: get secrets/mappo-s3."""
        return f"{self.verb} {self.resource}" + (f"/{self.name}" if self.name else "")


class Cluster:
    """A client of the Kubernetes API that sends each request once, without retries.

    All methods raise UnreachableError if the API does not answer, and ForbiddenError if this user lacks the right.
    """

    def __init__(self, connection: Connection):
        configuration = kubernetes.client.Configuration()
        try:
            if in_pod():
                kubernetes.config.load_incluster_config(client_configuration=configuration)
            else:
                load_kubeconfig(configuration, connection)
        except (ConfigError, kubernetes.config.ConfigException, OSError) as error:
            raise UnreachableError(str(error)) from None
        configuration.proxy, configuration.proxy_headers = proxy_of(configuration.host)
        configuration.retries = False
        client = kubernetes.client.ApiClient(configuration)
        self._core = kubernetes.client.CoreV1Api(client)
        self._authorization = kubernetes.client.AuthorizationV1Api(client)

    def read(self, kind: str, name: str, namespace: str = "") -> Mapping[str, str]:
        """Return the data of a secret (base64) or config map; an empty mapping for other kinds.

        Raises:
            MissingError: the object does not exist.
        """
        if not namespace:
            item = _request(getattr(self._core, f"read_{kind}"), name)
        else:
            item = _request(getattr(self._core, f"read_namespaced_{kind}"), name, namespace)
        return getattr(item, "data", None) or {}

    def nodes(self, selector: Mapping[str, str]) -> list[Any]:
        """Return the nodes that have these labels."""
        labels = ",".join(f"{key}={value}" for key, value in selector.items())
        return list(_request(self._core.list_node, label_selector=labels).items)

    def allows(self, account: str, namespace: str, call: Call) -> bool:
        """Return whether a service account may make a call in its namespace."""
        review = {
            "apiVersion": "authorization.k8s.io/v1",
            "kind": "LocalSubjectAccessReview",
            "metadata": {"namespace": namespace},
            "spec": {
                "user": f"system:serviceaccount:{namespace}:{account}",
                "groups": [
                    "system:serviceaccounts",
                    f"system:serviceaccounts:{namespace}",
                    "system:authenticated",
                ],
                "resourceAttributes": {
                    "namespace": namespace,
                    "group": call.group,
                    "resource": call.resource,
                    "verb": call.verb,
                    "name": call.name,
                },
            },
        }
        create = self._authorization.create_namespaced_local_subject_access_review
        return bool(_request(create, namespace, review).status.allowed)


def _request(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    try:
        return function(*arguments, **options, _request_timeout=_TIMEOUT_SECONDS)
    except kubernetes.client.ApiException as error:
        answer = f"{error.status} {error.reason}"
        if error.status == 404:
            raise MissingError(answer) from None
        if error.status == 403:
            raise ForbiddenError(answer) from None
        raise UnreachableError(f"Kubernetes answers {answer}") from None
    except urllib3.exceptions.HTTPError as error:
        raise UnreachableError(f"Kubernetes does not answer: {error}") from None
