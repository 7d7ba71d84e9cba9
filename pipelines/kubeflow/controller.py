"""The defaults of Argo's workflow controller, which decide whether Argo recreates lost pods.

Kubeflow 2.17 gives every template a retry with policy OnError. Earlier versions keep Argo's own policy, OnFailure.
"""

from collections.abc import Mapping
from typing import Any

import yaml

from mappo.errors import ConfigError

CONFIG_MAP = "workflow-controller-configmap"  # in the namespace of Kubeflow's API
RETRIES_LOST_PODS = ("OnError", "Always")
_KEY = "workflowDefaults"


def retry_policy(data: Mapping[str, str]) -> tuple[str, str]:
    """Return the retry policy and limit that the config map gives to all templates; both empty without a retry.

    Raises:
        ConfigError: the controller cannot read the defaults in the config map.
    """
    strategy = _templates(_defaults(data)).get("retryStrategy")
    if not strategy:
        return "", ""
    if not isinstance(strategy, dict):
        raise ConfigError(f"{_KEY}: spec.templateDefaults.retryStrategy must hold limit and retryPolicy")
    return str(strategy.get("retryPolicy") or "OnFailure"), str(strategy.get("limit", ""))


def with_lost_pods_retried(data: Mapping[str, str]) -> str:
    """Return a patch of the config map with which Argo recreates lost pods; the patch keeps all other settings.

    The patch writes the defaults as a block of several lines, since the controller reads the config map line by
    line.

    Raises:
        ConfigError: the controller cannot read the defaults in the config map.
    """
    defaults = _defaults(data)
    existing = _templates(defaults).get("retryStrategy") or {}
    strategy = {"limit": 2, **existing, "retryPolicy": "Always" if existing else "OnError"}
    templates = {**_templates(defaults), "retryStrategy": strategy}
    spec = {**(defaults.get("spec") or {}), "templateDefaults": templates}
    lines = yaml.safe_dump({**defaults, "spec": spec}, sort_keys=False).splitlines()
    return "\n".join(["data:", f"  {_KEY}: |", *(f"    {line}" for line in lines)])


def _defaults(data: Mapping[str, str]) -> dict[str, Any]:
    text = data.get(_KEY, "").strip()
    if text and "\n" not in text:
        raise ConfigError(f"{_KEY} is one line, so Argo cannot read the config map: write {_KEY} as a YAML block")
    try:
        defaults = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"{_KEY} is not YAML: {error}") from None
    if not isinstance(defaults, dict):
        raise ConfigError(f"{_KEY} must hold keys and values, such as spec")
    return defaults


def _templates(defaults: Mapping[str, Any]) -> Mapping[str, Any]:
    spec = defaults.get("spec") or {}
    templates = spec.get("templateDefaults") or {} if isinstance(spec, dict) else None
    if not isinstance(templates, dict):
        raise ConfigError(f"{_KEY}: spec and spec.templateDefaults must hold keys and values")
    return templates
