"""The commands `artifacts list` and `artifacts fetch`: show or copy the artifacts of a run."""

import argparse
import os
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mappo.errors import ConfigError, StoreError
from pipelines.commands.arguments import add_command, add_connection_arguments, connect
from pipelines.commands.output import add_output_argument, show_one, show_rows
from pipelines.kubeflow import client
from pipelines.kubeflow.artifacts import (
    DEFAULT_ROOT,
    LOGS,
    Artifact,
    declared_artifacts,
    fetch,
    select,
    stored_artifacts,
)

_EPILOG = """examples:
  python -m pipelines artifacts list latest
  python -m pipelines artifacts fetch latest best report        into artifacts/RUN/
  python -m pipelines artifacts fetch latest "train[1]/best" --to here

Endpoint and credentials of S3 come from the environment: AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID and
AWS_SECRET_ACCESS_KEY. If the store cannot be reached, the error explains how to reach Kubeflow's own store, and
list still shows the locations of the artifacts.

exit status: 0 success, 2 no such run or artifact, 3 Kubeflow or the store did not answer
"""
_ROOT_HINT = "; this server does not tell the locations of artifacts: give --pipeline-root"


def add(commands: Any) -> None:
    """Add the commands `artifacts list` and `artifacts fetch`."""
    summary = "list or fetch the artifacts of a run: checkpoints, reports, metrics"
    group = add_command(commands, "artifacts", summary, _EPILOG)
    verbs = group.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, summary, execute in (
        ("list", "show stage, name, size and location of each artifact", _list),
        ("fetch", "copy artifacts into a directory", _fetch),
    ):
        verb = verbs.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
        verb.add_argument("run", help="ID or name of the run, or latest")
        if name == "fetch":
            verb.add_argument(
                "names",
                nargs="*",
                metavar="NAME",
                help="an artifact or a stage: best, train/metrics, train[1]/best, evaluate ... (default: all)",
            )
            verb.add_argument(
                "--to", type=Path, metavar="DIR", help="directory to copy into (default: artifacts/RUN-ID)"
            )
        verb.add_argument(
            "--pipeline-root",
            default=os.environ.get("KF_PIPELINES_ROOT", ""),
            metavar="URI",
            help="pipeline root to search, for servers that do not tell the locations of artifacts "
            f"(default: KF_PIPELINES_ROOT in the environment, the run's own, or {DEFAULT_ROOT})",
        )
        add_connection_arguments(verb)
        add_output_argument(verb)
        verb.set_defaults(execute=execute)


def _list(arguments: argparse.Namespace) -> int:
    kubeflow = connect(arguments)
    run = client.find_run(kubeflow, arguments.run)
    artifacts = declared_artifacts(kubeflow, run)
    try:
        listed = stored_artifacts(kubeflow, run, artifacts, arguments.pipeline_root)
    except StoreError:
        if artifacts:  # the server has told their locations, so list them without sizes
            show_rows(arguments, [_row(artifact) for artifact in artifacts if artifact.name != LOGS], "")
        raise
    show_rows(arguments, [_row(artifact) for artifact in listed], "no artifacts yet")
    return 0


def _fetch(arguments: argparse.Namespace) -> int:
    kubeflow = connect(arguments)
    run = client.find_run(kubeflow, arguments.run)
    artifacts = declared_artifacts(kubeflow, run)
    selected = select(stored_artifacts(kubeflow, run, artifacts, arguments.pipeline_root), arguments.names)
    if not selected:
        raise ConfigError(f"run {run.run_id}: no artifacts yet{'' if artifacts else _ROOT_HINT}")
    directory = arguments.to or Path("artifacts", run.run_id)
    paths = {}
    num_bytes = sum(artifact.size_bytes for artifact in selected)
    with tqdm(total=num_bytes, unit="B", unit_scale=True, disable=None) as bar:
        for artifact, path in fetch(selected, directory):
            paths[str(path.relative_to(directory))] = str(path)
            bar.update(artifact.size_bytes)
    show_one(arguments, paths)
    return 0


def _row(artifact: Artifact) -> dict[str, Any]:
    return {
        "stage": artifact.stage,
        "name": artifact.name,
        "objects": None if artifact.entries is None else len(artifact.entries),
        "bytes": None if artifact.entries is None else artifact.size_bytes,
        "location": artifact.location,
    }
