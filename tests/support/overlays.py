"""The manifests that kustomize renders from k8s/, and the objects that the commands in its comments create."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from tests.support.services import missing

ROOT = Path(__file__).parents[2]
OVERLAYS = ["base", *sorted(path.parent.name for path in ROOT.glob("k8s/overlays/*/kustomization.yaml"))]
IN_NAMESPACES = [name for name in OVERLAYS if name != "example-monitoring"]
Manifest = dict[str, Any]


# The secret of Kubeflow's own store, as `kubectl get -o yaml` prints it.
_STORE_SECRET = """apiVersion: v1
data:
  accesskey: YQ==
  secretkey: Yg==
kind: Secret
metadata:
  annotations:
    kubectl.kubernetes.io/last-applied-configuration: |
      {"apiVersion":"v1","kind":"Secret","metadata":{"name":"mlpipeline-minio-artifact","namespace":"kubeflow"}}
  creationTimestamp: "2026-11-28T20:00:00Z"
  name: mlpipeline-minio-artifact
  namespace: kubeflow
  resourceVersion: "1234"
  uid: 0b1f6f0e-9d2b-4b0e-8a4c-1f3e5d7c9b2a
type: Opaque
"""
# A shell for the commands of a comment. Its kubectl needs no cluster: it prints objects instead of creating them.
_SHELL = """set -euo pipefail
kubectl() {
  case " $* " in
    *" get secret mlpipeline-minio-artifact -o yaml "*) printf '%s' "$STORE_SECRET" ;;
    *" create "*) echo ---; command kubectl "$@" --dry-run=client --output=yaml ;;
    " apply -k "*) echo ---; command kubectl kustomize "$3" ;;
    " apply -f - ") echo ---; cat ;;
    *) echo "no such command here: kubectl $*" >&2; return 1 ;;
  esac
}
python() { printf '%s\n' "$@" >"$SUBMITTED"; }
"""


def directory_of(overlay: str) -> Path:
    return ROOT / "k8s" / ("base" if overlay == "base" else f"overlays/{overlay}")


@cache
def rendered(overlay: str) -> list[Manifest]:
    """Return the manifests that kustomize renders from an overlay."""
    _require_kubectl()
    result = subprocess.run(
        ["kubectl", "kustomize", directory_of(overlay)], capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    return list(yaml.safe_load_all(result.stdout))


def _require_kubectl() -> None:
    if not shutil.which("kubectl"):
        missing("kubectl", "https://kubernetes.io/docs/tasks/tools (1.21 or newer, for kustomize components)")


def commands_of(overlay: str) -> str:
    """Return the commands in the comment on top of an overlay: the lines that three or more blanks indent."""
    comment = (directory_of(overlay) / "kustomization.yaml").read_text().partition("\napiVersion")[0]
    return "\n".join(line[4:] for line in comment.splitlines() if line.startswith("#   "))


@dataclass(frozen=True)
class Applied:
    """The objects that an overlay's commands create, in order, and the arguments of the `python` command."""

    objects: list[Manifest]
    submit: list[str]

    def secrets(self, namespace: str) -> dict[str, set[str]]:
        """Return the keys of each secret of a namespace, by the secret's name."""
        secrets = [created for created in self.objects if created["kind"] == "Secret"]
        return {
            secret["metadata"]["name"]: set(secret["data"])
            for secret in secrets
            if secret["metadata"]["namespace"] == namespace
        }


@cache
def applied(overlay: str) -> Applied:
    """Run the commands on top of an overlay, without a cluster."""
    _require_kubectl()
    with tempfile.TemporaryDirectory() as directory:
        submitted = Path(directory, "submitted")
        result = subprocess.run(
            ["bash", "-c", _SHELL + commands_of(overlay)],
            capture_output=True,
            text=True,
            timeout=120,
            cwd=ROOT,
            env={**os.environ, "STORE_SECRET": _STORE_SECRET, "SUBMITTED": str(submitted)},
        )
        assert result.returncode == 0, result.stderr
        arguments = submitted.read_text().splitlines() if submitted.exists() else []
    return Applied([created for created in yaml.safe_load_all(result.stdout) if created], arguments)


def of_kind(overlay: str, *kinds: str) -> list[Manifest]:
    return [manifest for manifest in rendered(overlay) if manifest["kind"] in kinds]


def namespace_of(overlay: str) -> str:
    return runner(overlay, "ServiceAccount")["metadata"]["namespace"]


def runner(overlay: str, kind: str) -> Manifest:
    """Return the account of an overlay's runs, or the role or the binding of this account."""
    (manifest,) = [item for item in of_kind(overlay, kind) if item["metadata"]["name"] == "mappo-runner"]
    return manifest


def pod_templates(overlay: str) -> Iterator[tuple[str, Manifest]]:
    """Yield the name and the pod template of every object that creates pods."""
    for workload in of_kind(overlay, "Deployment", "StatefulSet", "DaemonSet", "Job"):
        yield workload["metadata"]["name"], workload["spec"]["template"]
    for job in of_kind(overlay, "CronJob"):
        yield job["metadata"]["name"], job["spec"]["jobTemplate"]["spec"]["template"]


def containers_of(template: Manifest) -> list[Manifest]:
    return [*template["spec"].get("initContainers", []), *template["spec"]["containers"]]
