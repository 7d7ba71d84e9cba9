"""The connection to the API of Kubeflow Pipelines: endpoint, credentials, proxy and certificates.

`pipelines.kubeflow.api` sends requests through the generated client `kfp_server_api`. `kfp.Client` is not used: it
prints, keeps a file in the home directory that redirects later calls, does not detect a login page, and retries
nothing.
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
_PIPELINES_TOKEN = Path("/var/run/secrets/kubeflow/pipelines/token")  # the token that a pod has for Kubeflow's API
_HEADER = re.compile(r"[ -~]*")  # the characters that an HTTP header may hold


@dataclass(frozen=True)
class Connection:
    """The endpoint of the API and the credentials.

    Empty fields come from the pod's service account, or else from the kubeconfig.

    endpoint: URL of ml-pipeline or of the gateway before it (`https://kubeflow.example.org/pipeline`). namespace:
    the user's namespace, in a Kubeflow of several users. token_file: file with the token, which is read before
    every request, so that a renewed token is used at once. context: name of the kubeconfig's context.
    api_namespace: the namespace in which Kubeflow Pipelines is installed.
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
        """Strip white space from the credentials, which often come from files that end with a line break.

        Raises:
            ConfigError: the token or the cookie holds a character that an HTTP header must not hold.
        """
        object.__setattr__(self, "token", _credential("KF_PIPELINES_TOKEN", self.token))
        object.__setattr__(self, "cookie", _credential("KF_PIPELINES_COOKIE", self.cookie))


def _credential(source: str, text: str) -> str:
    """Return a token or cookie without white space at its ends. Error messages never contain the credential."""
    stripped = text.strip()
    if not _HEADER.fullmatch(stripped):
        raise ConfigError(
            f"{source}: holds a line break or another character that no HTTP header may hold; give only the token "
            "or cookie, on one line"
        )
    return stripped


def in_pod() -> bool:
    """Return whether this process runs in a pod, which has the token file of its service account."""
    return (_SERVICE_ACCOUNT / "token").exists()


def client_configuration(connection: Connection) -> tuple[kfp_server_api.Configuration, str]:
    """Return the configuration of the generated client, and the namespace of the pod or the kubeconfig's context.

    Raises:
        ConfigError: the endpoint is no URL, no endpoint can be derived, or a file cannot be read.
    """
    configuration, namespace = kfp_server_api.Configuration(), ""
    if connection.endpoint:
        configuration.host = _checked_endpoint(connection.endpoint)
    elif in_pod():
        configuration.host = f"http://ml-pipeline.{connection.api_namespace}.svc.cluster.local:8888"
        namespace = (_SERVICE_ACCOUNT / "namespace").read_text().strip()
    else:
        namespace = _from_kubeconfig(configuration, connection)
    configuration.proxy, configuration.proxy_headers = proxy_of(configuration.host)
    if connection.ca_file:
        if not Path(connection.ca_file).is_file():
            raise ConfigError(f"--ca-file {connection.ca_file}: this file does not exist")
        configuration.ssl_ca_cert = connection.ca_file
    _authorise(configuration, connection)
    return configuration, namespace


def proxy_of(url: str) -> tuple[str | None, Any]:
    """Return the proxy that the environment names for an address, or None, and the headers with its password."""
    address, proxies = urlsplit(url), urllib.request.getproxies()
    proxy = proxies.get(address.scheme) or proxies.get("all")
    if not proxy or urllib.request.proxy_bypass(address.netloc.rpartition("@")[2]):
        return None, None
    try:
        parts = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
        is_usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        user = f"{unquote(parts.username or '')}:{unquote(parts.password or '')}"
        headers = urllib3.make_headers(proxy_basic_auth=user) if parts.username else None
    except ValueError:  # its text can hold the password
        is_usable = False
    if not is_usable:
        raise ConfigError(
            "HTTPS_PROXY, HTTP_PROXY or ALL_PROXY: must be the URL of an HTTP proxy, in whose password characters "
            "such as @ and / are escaped; list exceptions in NO_PROXY"
        )
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}", headers


def _checked_endpoint(endpoint: str) -> str:
    endpoint = endpoint.strip()
    if "@" in endpoint:
        raise ConfigError("endpoint: must hold no password; give a token by KF_PIPELINES_TOKEN or --token-file")
    try:
        parts = urlsplit(endpoint)
        is_url = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # brackets do not match, or the port is not a number from 0 to 65535
        is_url = False
    if not is_url or re.search(r"[^!-~]", endpoint):
        raise ConfigError("endpoint: must be a URL, such as https://kubeflow.example.org/pipeline")
    return endpoint.rstrip("/").removesuffix("/apis/v2beta1").removesuffix("/#")


def load_kubeconfig(configuration: Any, connection: Connection) -> dict[str, Any]:
    """Configure a generated client by the kubeconfig; return the context that applies, with its namespace.

    Raises:
        ConfigError: the kubeconfig is missing or malformed; the message never shows its text, which holds tokens.
    """
    import kubernetes  # imported here, since the import is slow and seldom needed

    try:
        contexts, current = kubernetes.config.list_kube_config_contexts()
        kubernetes.config.load_kube_config(
            context=connection.context or None, client_configuration=configuration, persist_config=False
        )
        selected = [context for context in contexts if context["name"] == connection.context] or [current]
        details = dict(selected[0]["context"])
    except (kubernetes.config.ConfigException, OSError) as error:
        raise ConfigError(str(error)) from None
    except Exception as error:
        raise ConfigError(f"the kubeconfig is malformed: {type(error).__name__}") from None
    if "@" in configuration.host:
        raise ConfigError("the kubeconfig: the address of the server must hold no user and no password")
    load_again = configuration.refresh_api_key_hook

    def refresh(configuration: Any) -> None:
        """Load the token again and check it; restore this hook, which loading overwrites."""
        if load_again:
            load_again(configuration)
        configuration.refresh_api_key_hook = refresh
        if token := configuration.api_key.get("authorization"):
            configuration.api_key["authorization"] = _credential("the token of the kubeconfig", token)

    refresh(configuration)
    return details


def _from_kubeconfig(configuration: kfp_server_api.Configuration, connection: Connection) -> str:
    """Configure access to Kubeflow's API through the Kubernetes API; return the context's namespace."""
    try:
        context = load_kubeconfig(configuration, connection)
    except ConfigError as error:
        raise ConfigError(
            "no endpoint of Kubeflow: give --endpoint or KF_PIPELINES_ENDPOINT, or a kubeconfig that works "
            f"({error})"
        ) from None
    path = f"api/v1/namespaces/{connection.api_namespace}/services/ml-pipeline:http/proxy"
    host = f"{configuration.host.rstrip('/')}/{path}"
    refresh = configuration.refresh_api_key_hook

    def keep(configuration: kfp_server_api.Configuration) -> None:
        """Refresh the token, and restore the host and this hook, which that overwrites."""
        refresh(configuration)
        configuration.host, configuration.refresh_api_key_hook = host, keep

    keep(configuration)
    return str(context.get("namespace", ""))


def _authorise(configuration: kfp_server_api.Configuration, connection: Connection) -> None:
    """Send the token of this connection, if there is one, with every request; read a token file before each."""
    token_file = connection.token_file or os.environ.get("KF_PIPELINES_SA_TOKEN_PATH", "")
    if not token_file and _PIPELINES_TOKEN.exists() and in_pod():
        token_file = str(_PIPELINES_TOKEN)
    if not connection.token and not token_file:
        return

    def refresh(configuration: kfp_server_api.Configuration) -> None:
        try:
            token = connection.token or _credential(f"token file {token_file}", Path(token_file).read_text())
        except OSError as error:
            raise ConfigError(f"token file {token_file}: {error.strerror}") from None
        except UnicodeDecodeError:
            raise ConfigError(f"token file {token_file}: the file is not UTF-8 text") from None
        configuration.api_key["authorization"] = token

    configuration.api_key_prefix["authorization"] = "Bearer"
    configuration.refresh_api_key_hook = refresh
    refresh(configuration)
