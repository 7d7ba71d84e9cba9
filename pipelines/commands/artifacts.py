"""`artifacts`: list what a run left in the store, and fetch it."""

import argparse
import os
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mappo.config import ConfigError
from pipelines.commands.arguments import add_command, add_connection_arguments, connect
from pipelines.commands.output import add_output_argument, show_one, show_rows
from pipelines.kubeflow import client
from pipelines.kubeflow.artifacts import DEFAULT_ROOT, Artifact, artifacts_at, chosen, fetch, place_of

_EPILOG = """examples:
  python -m pipelines artifacts list latest
  python -m pipelines artifacts fetch latest best report        into artifacts/RUN/
  python -m pipelines artifacts fetch RUN --to here --pipeline-root s3://bucket/artifacts

Endpoint and credentials of S3 come from the environment: AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID and
AWS_SECRET_ACCESS_KEY.
"""


def add(commands: Any) -> None:
    """Add the commands."""
    summary = "list or fetch what a run left: checkpoints, reports, metrics"
    group = add_command(commands, "artifacts", summary, _EPILOG)
    verbs = group.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, summary, execute in (
        ("list", "what there is", _list),
        ("fetch", "copy artifacts into a directory", _fetch),
    ):
        verb = verbs.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
        verb.add_argument("run", help="its ID, its name, or latest")
        if name == "fetch":
            verb.add_argument(
                "names", nargs="*", metavar="NAME", help="best, train/metrics, evaluate ... (default: everything)"
            )
            verb.add_argument("--to", type=Path, metavar="DIR", help="where to (default: artifacts/RUN-ID)")
        verb.add_argument(
            "--pipeline-root",
            default=os.environ.get("KF_PIPELINES_ROOT", ""),
            metavar="URI",
            help=f"where artifacts lie, if the run does not say (default: KF_PIPELINES_ROOT, or {DEFAULT_ROOT})",
        )
        add_connection_arguments(verb)
        add_output_argument(verb)
        verb.set_defaults(execute=execute)


def _list(arguments: argparse.Namespace) -> int:
    _, artifacts = _found(arguments)
    show_rows(arguments, [_row(each) for each in artifacts], "nothing yet")
    return 0


def _fetch(arguments: argparse.Namespace) -> int:
    place, artifacts = _found(arguments)
    wanted = chosen(artifacts, arguments.names)
    if not wanted:
        raise ConfigError(f"{place}: nothing there yet; --pipeline-root says where else to look")
    directory = arguments.to or Path("artifacts", place.rpartition("/")[2])
    fetched = {}
    with tqdm(total=sum(each.size_bytes for each in wanted), unit="B", unit_scale=True, disable=None) as bar:
        for artifact, path in fetch(place, wanted, directory):
            fetched[str(path.relative_to(directory))] = str(path)
            bar.update(artifact.size_bytes)
    show_one(arguments, fetched)
    return 0


def _found(arguments: argparse.Namespace) -> tuple[str, list[Artifact]]:
    """Where a run's artifacts lie, and which they are."""
    kubeflow = connect(arguments)
    run = client.run_of(kubeflow, arguments.run)
    place = place_of(run, client.pipeline_name(kubeflow, run), arguments.pipeline_root)
    return place, artifacts_at(place)


def _row(artifact: Artifact) -> dict[str, Any]:
    return {
        "stage": artifact.stage,
        "name": artifact.name,
        "objects": len(artifact.entries),
        "bytes": artifact.size_bytes,
        "location": artifact.location,
    }
