"""The manifests of k8s/ as kustomize makes them."""

import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from tests.services import missing

ROOT = Path(__file__).parent.parent
OVERLAYS = sorted(path.parent.name for path in ROOT.glob("k8s/overlays/*/kustomization.yaml"))
IN_NAMESPACES = [name for name in OVERLAYS if name != "example-monitoring"]
Manifest = dict[str, Any]


@cache
def rendered(overlay: str) -> list[Manifest]:
    """What kustomize makes of it."""
    if not shutil.which("kubectl"):
        missing("kubectl", "https://kubernetes.io/docs/tasks/tools (1.21 or newer, for kustomize components)")
    done = subprocess.run(
        ["kubectl", "kustomize", ROOT / "k8s" / "overlays" / overlay], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def of_kind(overlay: str, *kinds: str) -> list[Manifest]:
    return [each for each in rendered(overlay) if each["kind"] in kinds]


def namespace_of(overlay: str) -> str:
    (account,) = of_kind(overlay, "ServiceAccount")
    return account["metadata"]["namespace"]


def pod_templates(overlay: str) -> Iterator[tuple[str, Manifest]]:
    """The name and template of everything that makes pods."""
    for each in of_kind(overlay, "Deployment", "StatefulSet", "DaemonSet", "Job"):
        yield each["metadata"]["name"], each["spec"]["template"]
    for each in of_kind(overlay, "CronJob"):
        yield each["metadata"]["name"], each["spec"]["jobTemplate"]["spec"]["template"]


def containers_of(template: Manifest) -> list[Manifest]:
    return [*template["spec"].get("initContainers", []), *template["spec"]["containers"]]
