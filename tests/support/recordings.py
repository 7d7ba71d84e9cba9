"""The recorded answers of a real Kubeflow Pipelines 2.17.0 with Argo 4.0.5 about this project's own runs.

`recording("training-succeeded")` holds Argo's nodes, the answer of v2beta1 and the pods at one moment of a run.
`raw("raw-training")` is the whole, unchanged answer of v1beta1.
"""

import base64
import functools
import gzip
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

DATA = Path(__file__).parents[1] / "data" / "kubeflow"


@functools.cache
def recording(name: str) -> dict[str, Any]:
    return json.loads((DATA / f"{name}.json").read_text())


@functools.cache
def raw(name: str) -> dict[str, Any]:
    return json.loads(gzip.decompress((DATA / f"{name}.v1beta1.json.gz").read_bytes()))


def manifest_of(answer: Mapping[str, Any]) -> dict[str, Any]:
    """Return the Argo workflow in an answer of v1beta1."""
    return json.loads(answer["pipeline_runtime"]["workflow_manifest"])


def nodes_of(manifest: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the nodes of a workflow by ID, decompressed if Argo compressed them."""
    status = manifest["status"]
    if compressed := status.get("compressedNodes"):
        return json.loads(gzip.decompress(base64.b64decode(compressed)))
    return status.get("nodes") or {}


def by_name(nodes: Mapping[str, Mapping[str, Any]], workflow: str) -> dict[str, dict[str, Any]]:
    """Return the nodes by their names without the workflow's name; replace IDs of other nodes by such names."""

    def short(identity: str) -> str:
        return nodes[identity]["name"].removeprefix(workflow)

    return {
        short(identity): {
            **node,
            "children": sorted(short(child) for child in node.get("children") or []),
            "boundary": short(node["boundaryID"]) if node.get("boundaryID") else None,
        }
        for identity, node in nodes.items()
    }


def parameters_of(node: Mapping[str, Any], side: str) -> dict[str, str]:
    """Return the parameters of a node by name. side: `inputs` or `outputs`."""
    return {
        parameter["name"]: parameter.get("value", "") for parameter in node.get(side, {}).get("parameters", [])
    }
