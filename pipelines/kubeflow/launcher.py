"""The access that Kubeflow's and Argo's own containers in a run need: driver, launcher and Argo's wait container.

Sources: Kubeflow Pipelines 2.17 (backend/src/v2/config) and the audit log of a run on 2.17.0.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import yaml

from mappo.errors import ConfigError
from mappo.runs.s3_access import KUBEFLOW_SECRET
from pipelines.kubeflow.artifacts import DEFAULT_ROOT
from pipelines.kubeflow.cluster import Call
from pipelines.placement import LAUNCHER_CONFIG_MAP


@dataclass(frozen=True)
class Keys:
    """The keys of a store: the name of their secret, and their names in the secret."""

    secret: str
    names: tuple[str, ...]


STORE_KEYS = Keys(KUBEFLOW_SECRET, ("accesskey", "secretkey"))  # the keys of Kubeflow's own store


def root_of(launcher: Mapping[str, str]) -> str:
    """Return the pipeline root of a namespace.

    launcher: the data of the namespace's config map kfp-launcher; empty if there is none.
    """
    return launcher.get("defaultPipelineRoot") or DEFAULT_ROOT


def keys_of(root: str, launcher: Mapping[str, str]) -> Keys | None:
    """Return the keys that the launcher reads for a pipeline root; None if it takes them from its environment.

    Raises:
        ConfigError: the launcher cannot read the providers in the config map.
    """
    address = urlsplit(root)
    provider = _provider(launcher.get("providers", ""), address.scheme)
    if address.query or (not provider and address.scheme != "minio"):
        return None
    if not provider:
        return STORE_KEYS
    try:
        settings = _override(provider, address.netloc, address.path.lstrip("/")) or provider["default"]
        credentials = settings["credentials"]
        if credentials.get("fromEnv"):
            return None
        secret = credentials["secretRef"]
        return Keys(str(secret["secretName"]), tuple(str(secret[key]) for key in secret if key != "secretName"))
    except (TypeError, KeyError, AttributeError):
        raise ConfigError(
            f"providers: {address.scheme}: lacks credentials, with fromEnv: true or a secretRef"
        ) from None


def calls(keys: Keys | None) -> list[Call]:
    """Return the requests of a run's containers to the Kubernetes API. keys: the launcher's keys, if any."""
    requests = [
        Call("create", "workflowtaskresults", group="argoproj.io"),
        Call("patch", "workflowtaskresults", group="argoproj.io"),
        Call("get", "configmaps", LAUNCHER_CONFIG_MAP),
    ]
    return [*requests, *([Call("get", "secrets", keys.secret)] if keys else [])]


def _provider(text: str, scheme: str) -> Mapping[str, Any]:
    try:
        provider = (yaml.safe_load(text) or {}).get(scheme) or {}
    except (yaml.YAMLError, AttributeError) as error:
        raise ConfigError(f"providers: not YAML with a key for each kind of store: {error}") from None
    if not isinstance(provider, dict):
        raise ConfigError(f"providers: {scheme}: must hold `default`, with endpoint and credentials")
    return provider


def _override(provider: Mapping[str, Any], bucket: str, prefix: str) -> Any:
    """Return the first override that matches a bucket and a key prefix, or None."""
    overrides = provider.get("overrides") or provider.get("Overrides") or []
    return next((override for override in overrides if _is_for(override, bucket, prefix)), None)


def _is_for(override: Mapping[str, Any], bucket: str, prefix: str) -> bool:
    return override.get("bucketName") == bucket and prefix.startswith(str(override.get("keyPrefix", "")))
