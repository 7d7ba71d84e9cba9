"""The API of Kubeflow Pipelines: where it is, who asks, what is tried again, and what its errors mean.

The generated client `kfp_server_api` does the talking. `kfp.Client` is not used: it prints, keeps a file in the
home directory that redirects later calls, does not notice a login page, and tries nothing again.
"""

import os
import re
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import kfp_server_api
import urllib3

from mappo.errors import ConfigError

_SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
_PIPELINES_TOKEN = Path("/var/run/secrets/kubeflow/pipelines/token")  # a pod's own, for Kubeflow's API
_HEADER = re.compile(r"[ -~]*")  # what may stand in a header of HTTP


@dataclass(frozen=True)
class Connection:
    """The way to the API, and the credentials. Empty fields: in a pod from its files, else by kubeconfig.

    endpoint: URL of ml-pipeline or of the gateway before it (`https://kubeflow.example.org/pipeline`). namespace:
    the user's own, in a Kubeflow of several users. token_file is read before every request, so that what renews
    the token is seen. context: of the kubeconfig. api_namespace: where Kubeflow Pipelines itself is installed.
    """

    endpoint: str = ""
    namespace: str = ""
    token: str = field(default="", repr=False)
    token_file: str = ""
    cookie: str = field(default="", repr=False)
    ca_file: str = ""
    context: str = ""
    api_namespace: str = "kubeflow"

    def __post_init__(self) -> None:
        """Take space off the ends of the credentials, which often come from files with a line break at the end.

        Raises:
            ConfigError: one of them holds what no header of HTTP may.
        """
        object.__setattr__(self, "token", _credential("KF_PIPELINES_TOKEN", self.token))
        object.__setattr__(self, "cookie", _credential("KF_PIPELINES_COOKIE", self.cookie))

    def found(self) -> str:
        """Describe where the endpoint comes from."""
        if self.endpoint:
            return self.endpoint
        where = "the pod's service account" if in_pod() else f"kubeconfig, context {self.context or 'current'}"
        return f"ml-pipeline in namespace {self.api_namespace}, by {where}"


def _credential(where: str, text: str) -> str:
    """Return a token or cookie without space at its ends; a message about it never shows it."""
    stripped = text.strip()
    if not _HEADER.fullmatch(stripped):
        raise ConfigError(
            f"{where}: holds a line break or another character that no header of HTTP may hold; give the token or "
            "cookie alone, on one line"
        )
    return stripped


def in_pod() -> bool:
    """Return whether this process runs in a pod of a cluster."""
    return (_SERVICE_ACCOUNT / "token").exists()


def client_configuration(connection: Connection) -> tuple[kfp_server_api.Configuration, str]:
    """Return the generated client's configuration, and the namespace that belongs to the credentials."""
    configuration, namespace = kfp_server_api.Configuration(), ""
    if connection.endpoint:
        configuration.host = _checked_endpoint(connection.endpoint)
    elif in_pod():
        configuration.host = f"http://ml-pipeline.{connection.api_namespace}.svc.cluster.local:8888"
        namespace = (_SERVICE_ACCOUNT / "namespace").read_text().strip()
    else:
        namespace = _from_kubeconfig(configuration, connection)
    configuration.proxy, configuration.proxy_headers = _proxy(configuration.host)
    if connection.ca_file:
        if not Path(connection.ca_file).is_file():
            raise ConfigError(f"--ca-file {connection.ca_file}: there is no such file")
        configuration.ssl_ca_cert = connection.ca_file
    _authorise(configuration, connection)
    return configuration, namespace


def _proxy(url: str) -> tuple[str | None, Any]:
    """The proxy that the environment names for an address, if it does, and the headers that it wants."""
    address, proxies = urlsplit(url), urllib.request.getproxies()
    proxy = proxies.get(address.scheme) or proxies.get("all")
    if not proxy or urllib.request.proxy_bypass(address.netloc.rpartition("@")[2]):
        return None, None
    parts = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(
            "HTTPS_PROXY, HTTP_PROXY or ALL_PROXY: must be the URL of an HTTP proxy; NO_PROXY names exceptions"
        )
    user = f"{unquote(parts.username or '')}:{unquote(parts.password or '')}"
    headers = urllib3.make_headers(proxy_basic_auth=user) if parts.username else None
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}", headers


def _checked_endpoint(endpoint: str) -> str:
    endpoint = endpoint.strip()
    if "@" in endpoint:
        raise ConfigError("the endpoint must hold no password; give a token by KF_PIPELINES_TOKEN or --token-file")
    try:
        parts = urlsplit(endpoint)
        is_url = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # brackets that do not match, a port that is none
        is_url = False
    if not is_url or re.search(r"[^!-~]", endpoint):
        raise ConfigError(f"endpoint {endpoint!r}: must be a URL, such as https://kubeflow.example.org/pipeline")
    return endpoint.rstrip("/").removesuffix("/apis/v2beta1").removesuffix("/#")


def _from_kubeconfig(configuration: kfp_server_api.Configuration, connection: Connection) -> str:
    """Reach the API through the cluster's own; returns the context's namespace."""
    import kubernetes  # takes its time, and is seldom needed

    try:
        contexts, current = kubernetes.config.list_kube_config_contexts()
        kubernetes.config.load_kube_config(
            context=connection.context or None, client_configuration=configuration, persist_config=False
        )
    except (kubernetes.config.ConfigException, OSError) as error:
        raise ConfigError(
            f"where is Kubeflow? give --endpoint or KF_PIPELINES_ENDPOINT, or a kubeconfig that works ({error})"
        ) from None
    path = f"api/v1/namespaces/{connection.api_namespace}/services/ml-pipeline:http/proxy"
    host = f"{configuration.host.rstrip('/')}/{path}"
    refresh = configuration.refresh_api_key_hook

    def keep(configuration: kfp_server_api.Configuration) -> None:
        """The kubeconfig's own hook sets the host, and itself, again each time."""
        if refresh:
            refresh(configuration)
        configuration.host, configuration.refresh_api_key_hook = host, keep

    keep(configuration)
    chosen = [context for context in contexts if context["name"] == connection.context] or [current]
    return str(chosen[0]["context"].get("namespace", ""))


def _authorise(configuration: kfp_server_api.Configuration, connection: Connection) -> None:
    """Give the token of this connection with every request, if it has one; a file is read each time."""
    in_file = connection.token_file or os.environ.get("KF_PIPELINES_SA_TOKEN_PATH", "")
    if not in_file and _PIPELINES_TOKEN.exists() and in_pod():
        in_file = str(_PIPELINES_TOKEN)
    if not connection.token and not in_file:
        return

    def refresh(configuration: kfp_server_api.Configuration) -> None:
        try:
            token = connection.token or _credential(f"token file {in_file}", Path(in_file).read_text())
        except OSError as error:
            raise ConfigError(f"token file {in_file}: {error.strerror}") from None
        except UnicodeDecodeError:
            raise ConfigError(f"token file {in_file}: not text") from None
        configuration.api_key["authorization"] = token

    configuration.api_key_prefix["authorization"] = "Bearer"
    configuration.refresh_api_key_hook = refresh
    refresh(configuration)
