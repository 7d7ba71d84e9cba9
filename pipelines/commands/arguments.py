"""Add the flags that several commands share, and read them."""

import argparse
import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import mappo
from mappo.cli.arguments import (
    add_study_arguments,
    changes_from_arguments,
    config_from_arguments,
    gate_from_arguments,
    tuning_from_arguments,
)
from mappo.config import to_json
from mappo.errors import ConfigError
from mappo.strict_json import to_dict
from pipelines.commands.output import show_trying
from pipelines.compiling import Compiled, compile_pipeline, read_compiled, read_seeds
from pipelines.kubeflow.api import Api
from pipelines.kubeflow.connection import Connection
from pipelines.kubeflow.submission import Submission
from pipelines.kubernetes_types import require_image
from pipelines.parameter_guards import check_parameters, parse_parameter
from pipelines.site import Site, read_site
from pipelines.sizes import check_size

_DEFAULT_SEEDS = "0,1,2"
_DEFAULT_STUDY = "tuning"


def add_command(commands: Any, name: str, summary: str, epilog: str) -> argparse.ArgumentParser:
    """A command, or a group of them, with examples below its help."""
    made: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    return made


def add_seeds_argument(command: argparse.ArgumentParser) -> None:
    """Add `--seeds`."""
    command.add_argument(
        "--seeds",
        metavar="N,N,...",
        help="train and evaluate each of these seeds and compare them, instead of one run with --seed",
    )


def add_pipeline_arguments(command: argparse.ArgumentParser) -> None:
    """Add `--seeds` and `--study`, which choose the pipeline, and the flags that belong to them."""
    add_seeds_argument(command)
    add_study_arguments(command, is_required=False)
    command.add_argument(
        "--edition",
        default="",
        metavar="TEXT",
        help="with --study NAME: a new study each time, NAME-TEXT, that begins with the best of the last one; "
        "[[ScheduledTime]] stands for the time of the run",
    )


def add_site_arguments(command: argparse.ArgumentParser) -> None:
    """Add `--site` and `--image`: where stages run."""
    group = command.add_argument_group("where stages run")
    group.add_argument(
        "--site",
        type=Path,
        metavar="FILE",
        default=os.environ.get("MAPPO_SITE") or None,
        help="the site's YAML: image, resources, nodes, secrets, retries (default: MAPPO_SITE in the environment)",
    )
    group.add_argument(
        "--image",
        metavar="IMAGE",
        help="container image of the stages, with a tag or digest, in place of the site's",
    )
    group.add_argument(
        "--parallel-seeds",
        type=int,
        default=0,
        metavar="N",
        help="with several seeds: train at most N at once (default: all)",
    )


def add_connection_arguments(command: argparse.ArgumentParser) -> None:
    """Add where Kubeflow is, and with which credentials to ask."""
    group = command.add_argument_group(
        "Kubeflow",
        "Without an endpoint: the cluster that this pod is in, or that of the kubeconfig. A token may also be in "
        "KF_PIPELINES_TOKEN, and the cookie of a session in the browser in KF_PIPELINES_COOKIE.",
    )
    for flag, variable, metavar, text in (
        ("--endpoint", "KF_PIPELINES_ENDPOINT", "URL", "of Kubeflow Pipelines' API"),
        ("--namespace", "KF_PIPELINES_NAMESPACE", "NAME", "yours, in a Kubeflow of several users"),
        ("--token-file", "KF_PIPELINES_TOKEN_FILE", "FILE", "holds a bearer token; read again when it changes"),
        ("--ca-file", "KF_PIPELINES_CA_FILE", "FILE", "certificates to trust, as PEM"),
        ("--context", "KF_PIPELINES_CONTEXT", "NAME", "of the kubeconfig; without it, the current one"),
    ):
        group.add_argument(
            flag, metavar=metavar, default=os.environ.get(variable, ""), help=f"{text} (or {variable})"
        )
    group.add_argument(
        "--api-namespace",
        metavar="NAME",
        default="kubeflow",
        help="where Kubeflow Pipelines is installed (default: kubeflow)",
    )


def add_submission_arguments(command: argparse.ArgumentParser) -> None:
    """Add what runs, besides the configuration."""
    group = command.add_argument_group("what runs")
    group.add_argument(
        "--file", type=Path, metavar="YAML", help="a compiled pipeline, instead of compiling one now"
    )
    group.add_argument(
        "--parameter",
        "-p",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a parameter of the pipeline, such as train_gpu_count=1 or store=s3://bucket/runs; may be repeated",
    )
    group.add_argument(
        "--experiment", default="Default", metavar="NAME", help="made if need be (default: Default)"
    )
    group.add_argument(
        "--pipeline-root",
        default="",
        metavar="URI",
        help="where artifacts go (default: as the server is configured)",
    )
    group.add_argument(
        "--service-account", default="", metavar="NAME", help="of the pods (default: as the server is configured)"
    )
    group.add_argument(
        "--upload",
        nargs="?",
        const="",
        metavar="VERSION",
        help="upload the pipeline as a version and refer to it; without a name, one that follows from its content",
    )


def site_of(arguments: argparse.Namespace) -> Site:
    """The site's file, with the image that was given.

    Raises:
        ConfigError: the file or the image is not allowed.
        OSError: the file cannot be read.
    """
    site = read_site(Path(arguments.site)) if arguments.site else Site()
    return replace(site, image=require_image(arguments.image)) if arguments.image else site


def compiled_of(arguments: argparse.Namespace, name: str = "") -> Compiled:
    """The pipeline that the arguments ask for: a file, or compiled now.

    Raises:
        ConfigError: they contradict each other, or it has a known defect.
    """
    if getattr(arguments, "file", None):
        return read_compiled(arguments.file)
    if arguments.parallel_seeds < 0:
        raise ConfigError(f"--parallel-seeds {arguments.parallel_seeds}: must be 0 or more")
    name = name or pipeline_of(arguments)
    return compile_pipeline(name, site_of(arguments), parameters_of(arguments, name), arguments.parallel_seeds)


def pipeline_of(arguments: argparse.Namespace) -> str:
    """Return the name of the pipeline that was asked for.

    Raises:
        ConfigError: flags that exclude or need each other.
    """
    chosen = [name for name in ("seed", "seeds", "study") if getattr(arguments, name) is not None]
    if len(chosen) > 1:
        raise ConfigError(f"{' and '.join(f'--{name}' for name in chosen)} exclude each other")
    if arguments.edition and arguments.study is None:
        raise ConfigError(f"--edition {arguments.edition}: it is one of a study; give --study NAME too")
    return {"seeds": "seeds", "study": "tuning"}.get("".join(chosen), "training")


def parameters_of(arguments: argparse.Namespace, name: str) -> dict[str, Any]:
    """The parameters of a pipeline that the flags stand for.

    Raises:
        ConfigError: a value that is not allowed.
    """
    config = config_from_arguments(arguments)
    parameters: dict[str, Any] = {"config": to_json(config)}
    if name == "seeds":
        parameters["seeds"] = read_seeds(_DEFAULT_SEEDS if arguments.seeds is None else arguments.seeds, config)
    if name == "tuning":
        space, tuning = tuning_from_arguments(arguments, config)
        parameters |= {
            "study": arguments.study or _DEFAULT_STUDY,
            "edition": arguments.edition,
            "num_trials": arguments.trials,
            "hours": arguments.hours,
            "workers": [str(index + 1) for index in range(arguments.workers)],
            "retrain_seeds": arguments.retrain_seeds,
            "space": json.dumps(space),
            "tuning": json.dumps(to_dict(tuning)),
            "champions": arguments.champions,
            "gate": json.dumps(to_dict(gate_from_arguments(arguments))),
        }
    return parameters


def submission_of(arguments: argparse.Namespace) -> Submission:
    """Return what is to run, with parameters that the server and the stages take.

    Raises:
        ConfigError: they are not.
    """
    compiled = compiled_of(arguments)
    parameters = dict(parse_parameter(compiled.specification, each) for each in arguments.parameter)
    if arguments.file:
        parameters |= _given_beside_a_file(arguments)
    check_parameters(compiled.documents, parameters)
    check_size(compiled.body, parameters)
    version = arguments.upload
    if version == "":
        version = f"{mappo.__version__}-{hashlib.sha256(compiled.text.encode()).hexdigest()[:12]}"
    return Submission(
        compiled, parameters, arguments.experiment, arguments.pipeline_root, arguments.service_account, version
    )


def _given_beside_a_file(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the flags that are parameters of a pipeline that was compiled before."""
    given: dict[str, Any] = {}
    if arguments.site or arguments.parallel_seeds:
        raise ConfigError("--site and --parallel-seeds are for compiling: leave out --file, or them")
    if arguments.recipe or any(changes_from_arguments(arguments)):
        given["config"] = to_json(config_from_arguments(arguments))
    if arguments.image:
        given["image"] = arguments.image
    if arguments.seeds is not None:
        given["seeds"] = read_seeds(arguments.seeds, config_from_arguments(arguments))
    if arguments.study is not None:
        given |= parameters_of(arguments, "tuning")
    elif arguments.edition:
        given["edition"] = arguments.edition
    return given


def connection_of(arguments: argparse.Namespace) -> Connection:
    """Return what the flags and the environment say about Kubeflow."""
    return Connection(
        endpoint=arguments.endpoint,
        namespace=arguments.namespace,
        token=os.environ.get("KF_PIPELINES_TOKEN", ""),
        token_file=arguments.token_file,
        cookie=os.environ.get("KF_PIPELINES_COOKIE", ""),
        ca_file=arguments.ca_file,
        context=arguments.context,
        api_namespace=arguments.api_namespace,
    )


def connect(arguments: argparse.Namespace, patience_seconds: float = 60.0) -> Api:
    """The API.

    Raises:
        ConfigError: flags and environment say too little, or what cannot be.
    """
    return Api(connection_of(arguments), patience_seconds=patience_seconds, announce=show_trying)
