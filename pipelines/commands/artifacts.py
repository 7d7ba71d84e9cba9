"""The commands `artifacts list` and `artifacts fetch`: show and copy what a run left in the store."""

import argparse
import os
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mappo.errors import ConfigError, StoreError
from pipelines.commands.arguments import add_command, add_connection_arguments, connect
from pipelines.commands.output import add_output_argument, show_one, show_rows
from pipelines.kubeflow import client
from pipelines.kubeflow.artifacts import DEFAULT_ROOT, LOGS, Artifact, announced, chosen, fetch, found

_EPILOG = """examples:
  python -m pipelines artifacts list latest
  python -m pipelines artifacts fetch latest best report        into artifacts/RUN/
  python -m pipelines artifacts fetch latest "train[1]/best" --to here

Endpoint and credentials of S3 come from the environment: AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID and
AWS_SECRET_ACCESS_KEY. When the store cannot be reached, the error says how to reach Kubeflow's own store, and
list still shows where the artifacts lie.

exit status: 0 done, 2 there is no such run or artifact, 3 Kubeflow or the store did not answer
"""
_ELSEWHERE = "; this server does not tell where its artifacts lie: give --pipeline-root"


def add(commands: Any) -> None:
    """Add the commands."""
    summary = "list or fetch what a run left: checkpoints, reports, metrics"
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
                help="best, train/metrics, train[1]/best, evaluate ... (default: all)",
            )
            verb.add_argument(
                "--to", type=Path, metavar="DIR", help="directory to copy into (default: artifacts/RUN-ID)"
            )
        verb.add_argument(
            "--pipeline-root",
            default=os.environ.get("KF_PIPELINES_ROOT", ""),
            metavar="URI",
            help="the pipeline's root, for servers that do not tell the locations of artifacts "
            f"(default: the run's, KF_PIPELINES_ROOT, or {DEFAULT_ROOT})",
        )
        add_connection_arguments(verb)
        add_output_argument(verb)
        verb.set_defaults(execute=execute)


def _list(arguments: argparse.Namespace) -> int:
    kubeflow = connect(arguments)
    run = client.run_of(kubeflow, arguments.run)
    artifacts = announced(kubeflow, run)
    try:
        listed = found(kubeflow, run, artifacts, arguments.pipeline_root)
    except StoreError:
        if artifacts:  # where they are is known all the same
            show_rows(arguments, [_row(artifact) for artifact in artifacts if artifact.name != LOGS], "")
        raise
    show_rows(arguments, [_row(artifact) for artifact in listed], "nothing yet")
    return 0


def _fetch(arguments: argparse.Namespace) -> int:
    kubeflow = connect(arguments)
    run = client.run_of(kubeflow, arguments.run)
    artifacts = announced(kubeflow, run)
    wanted = chosen(found(kubeflow, run, artifacts, arguments.pipeline_root), arguments.names)
    if not wanted:
        raise ConfigError(f"run {run.run_id}: nothing there yet{'' if artifacts else _ELSEWHERE}")
    directory = arguments.to or Path("artifacts", run.run_id)
    fetched = {}
    with tqdm(total=sum(each.size_bytes for each in wanted), unit="B", unit_scale=True, disable=None) as bar:
        for artifact, path in fetch(wanted, directory):
            fetched[str(path.relative_to(directory))] = str(path)
            bar.update(artifact.size_bytes)
    show_one(arguments, fetched)
    return 0


def _row(artifact: Artifact) -> dict[str, Any]:
    return {
        "stage": artifact.stage,
        "name": artifact.name,
        "objects": None if artifact.entries is None else len(artifact.entries),
        "bytes": None if artifact.entries is None else artifact.size_bytes,
        "location": artifact.location,
    }
