"""Add the flags that several commands share, and read them."""

import argparse
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from mappo.cli.arguments import (
    add_study_arguments,
    changes_from_arguments,
    config_from_arguments,
    study_config_from_arguments,
)
from mappo.config import to_json
from mappo.errors import ConfigError
from mappo.matrix.matrix import matrix_from_json, matrix_json
from mappo.tuning.study_config import study_config_to_json
from pipelines.commands.output import show_retry
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
    """Add a command, or a group of commands, with `epilog` (examples) at the end of its help."""
    command: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    return command


def add_seeds_argument(command: argparse.ArgumentParser) -> None:
    """Add `--seeds`."""
    command.add_argument(
        "--seeds",
        metavar="N,N,...",
        help="train and evaluate one run for each of these seeds, and compare them (default: one run with --seed)",
    )


def add_pipeline_arguments(command: argparse.ArgumentParser) -> None:
    """Add `--seeds`, `--matrix` and `--study`, which select the pipeline, and the flags of a study."""
    add_seeds_argument(command)
    command.add_argument(
        "--matrix",
        type=Path,
        metavar="FILE",
        help="train and evaluate all cells of this YAML file, tasks x algorithms x seeds, and summarise them, see "
        "docs/matrix.md; cells that are done in the store are left as they are",
    )
    group = add_study_arguments(command, is_required=False)
    group.add_argument(
        "--edition",
        default="",
        metavar="TEXT",
        help="with --study NAME: create the study NAME-TEXT, which starts from the best configuration of the "
        "latest study in this series; [[ScheduledTime]] in TEXT becomes the time of the run",
    )


def add_site_arguments(command: argparse.ArgumentParser) -> None:
    """Add `--site`, `--image` and `--parallel-seeds`: the settings of the stages' pods."""
    group = command.add_argument_group("where stages run")
    group.add_argument(
        "--site",
        type=Path,
        metavar="FILE",
        default=os.environ.get("MAPPO_SITE") or None,
        help="YAML file of the site: image, resources, nodes, secrets, retries (default: MAPPO_SITE in the "
        "environment)",
    )
    group.add_argument(
        "--image",
        metavar="IMAGE",
        help="container image of the stages, with a tag or digest (default: the image in the site's file)",
    )
    group.add_argument(
        "--parallel-seeds",
        type=int,
        default=0,
        metavar="N",
        help="maximum number of seeds, or of cells of a matrix, that train at once (default: all)",
    )


def add_connection_arguments(command: argparse.ArgumentParser) -> None:
    """Add the address of Kubeflow and the credentials for it."""
    group = command.add_argument_group(
        "Kubeflow",
        "Without an endpoint, the command uses the cluster of its own pod, or else that of the kubeconfig. "
        "Credentials may also be in the environment: a bearer token in KF_PIPELINES_TOKEN, or the cookie of a "
        "browser session in KF_PIPELINES_COOKIE.",
    )
    for flag, variable, metavar, text in (
        ("--endpoint", "KF_PIPELINES_ENDPOINT", "URL", "URL of the Kubeflow Pipelines API"),
        ("--namespace", "KF_PIPELINES_NAMESPACE", "NAME", "your namespace, in a multi-user Kubeflow"),
        (
            "--token-file",
            "KF_PIPELINES_TOKEN_FILE",
            "FILE",
            "file with a bearer token; read again when it changes",
        ),
        ("--ca-file", "KF_PIPELINES_CA_FILE", "FILE", "PEM file with the certificates to trust"),
        ("--context", "KF_PIPELINES_CONTEXT", "NAME", "context of the kubeconfig; empty for the current one"),
    ):
        group.add_argument(
            flag,
            metavar=metavar,
            default=os.environ.get(variable, ""),
            help=f"{text} (default: {variable} in the environment)",
        )
    group.add_argument(
        "--api-namespace",
        metavar="NAME",
        default="kubeflow",
        help="namespace in which Kubeflow Pipelines is installed (default: kubeflow)",
    )


def add_submission_arguments(command: argparse.ArgumentParser) -> None:
    """Add the pipeline to run, its parameters, and the settings of the run."""
    group = command.add_argument_group("what runs")
    group.add_argument("--file", type=Path, metavar="YAML", help="a compiled pipeline (default: compile one now)")
    group.add_argument(
        "--parameter",
        "-p",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="set a parameter, such as train_gpu_count=1 or store=s3://bucket/runs; may be repeated",
    )
    group.add_argument(
        "--experiment",
        default="Default",
        metavar="NAME",
        help="experiment of the run, created if it does not exist (default: Default)",
    )
    group.add_argument(
        "--pipeline-root",
        default="",
        metavar="URI",
        help="store of the run's artifacts (default: set by the server)",
    )
    group.add_argument(
        "--service-account",
        default="",
        metavar="NAME",
        help="service account of the pods (default: set by the server)",
    )
    group.add_argument(
        "--upload",
        nargs="?",
        const="",
        metavar="VERSION",
        help="upload the pipeline as a version of this name, and run that version; without a name, it is mappo's "
        "version and a hash of the pipeline (default: send the pipeline with the run)",
    )


def site_of(arguments: argparse.Namespace) -> Site:
    """Read the site's file, or take the default site; `--image` replaces its image.

    Raises:
        ConfigError: the site's file cannot be read, or it or the image is not allowed.
    """
    site = _read_site(arguments.site) if arguments.site else Site()
    return replace(site, image=require_image(arguments.image)) if arguments.image else site


def _read_site(path: str) -> Site:
    try:
        return read_site(Path(path))
    except OSError as error:
        raise ConfigError(
            f"--site {path}: {error.strerror}; k8s/site.yaml is a site's file to copy and edit"
        ) from None


def compiled_of(arguments: argparse.Namespace, name: str = "") -> Compiled:
    """Return the compiled pipeline: that of `--file`, or else the one called `name`, compiled now.

    Without a name, `--seeds`, `--matrix` and `--study` select the pipeline.

    Raises:
        ConfigError: flags exclude each other, a value is not allowed, or the pipeline has a known defect.
        OSError: a file cannot be read.
    """
    if getattr(arguments, "file", None):
        return read_compiled(arguments.file)
    if arguments.parallel_seeds < 0:
        raise ConfigError(f"--parallel-seeds {arguments.parallel_seeds}: must be 0 or more")
    name = name or pipeline_of(arguments)
    return compile_pipeline(name, site_of(arguments), parameters_of(arguments, name), arguments.parallel_seeds)


def pipeline_of(arguments: argparse.Namespace) -> str:
    """Return the name of the pipeline that `--seeds`, `--matrix` or `--study` selects: training without them.

    Raises:
        ConfigError: flags exclude each other, or one needs another.
    """
    selectors = [name for name in ("seed", "seeds", "matrix", "study") if getattr(arguments, name) is not None]
    if len(selectors) > 1:
        raise ConfigError(f"{' and '.join(f'--{name}' for name in selectors)} exclude each other")
    if arguments.edition and arguments.study is None:
        raise ConfigError(f"--edition {arguments.edition}: an edition belongs to a study; give --study NAME too")
    if arguments.matrix and (arguments.recipe or any(changes_from_arguments(arguments))):
        raise ConfigError(
            f"--matrix {arguments.matrix}: the file has all settings of its cells; leave out the recipe and the "
            "flags of a configuration"
        )
    return {"seeds": "seeds", "study": "tuning", "matrix": "matrix"}.get("".join(selectors), "training")


def parameters_of(arguments: argparse.Namespace, name: str) -> dict[str, Any]:
    """Return the parameters of the pipeline called `name` that the flags set.

    Raises:
        ConfigError: a value is not allowed.
    """
    if name == "matrix":
        return _matrix_parameters(arguments.matrix) if arguments.matrix else {}
    config = config_from_arguments(arguments)
    parameters: dict[str, Any] = {"config": to_json(config)}
    if name == "seeds":
        parameters["seeds"] = read_seeds(_DEFAULT_SEEDS if arguments.seeds is None else arguments.seeds, config)
    if name == "tuning":
        parameters |= {
            "study": arguments.study or _DEFAULT_STUDY,
            "edition": arguments.edition,
            "study_config": study_config_to_json(study_config_from_arguments(arguments, config)),
            "workers": [str(index + 1) for index in range(arguments.workers)],
            "champions": arguments.champions,
        }
    return parameters


def _matrix_parameters(file: Path) -> dict[str, Any]:
    """Return the parameters of the pipeline of a matrix, read from its file."""
    text = matrix_json(file)
    return {"matrix": text, "cells": [cell.name for cell in matrix_from_json(text).cells]}


def submission_of(arguments: argparse.Namespace) -> Submission:
    """Return the pipeline to submit, with checked parameters and the settings of the run.

    Raises:
        ConfigError: flags exclude each other, the server or a stage would refuse a parameter, or the workflow
            would be too large.
    """
    compiled = compiled_of(arguments)
    parameters = dict(parse_parameter(compiled.specification, text) for text in arguments.parameter)
    if arguments.file:
        parameters |= _parameters_beside_file(arguments)
    check_parameters(compiled.documents, parameters)
    check_size(compiled.body, parameters)
    version = arguments.upload
    if version == "":
        version = compiled.version
    return Submission(
        compiled, parameters, arguments.experiment, arguments.pipeline_root, arguments.service_account, version
    )


def _parameters_beside_file(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the parameters that flags set for the compiled pipeline of `--file`."""
    parameters: dict[str, Any] = {}
    if arguments.site or arguments.parallel_seeds:
        raise ConfigError("--site and --parallel-seeds are for compiling: leave out --file, or them")
    if arguments.recipe or any(changes_from_arguments(arguments)):
        parameters["config"] = to_json(config_from_arguments(arguments))
    if arguments.image:
        parameters["image"] = arguments.image
    if arguments.seeds is not None:
        parameters["seeds"] = read_seeds(arguments.seeds, config_from_arguments(arguments))
    if arguments.matrix:
        parameters |= _matrix_parameters(arguments.matrix)
    if arguments.study is not None:
        parameters |= parameters_of(arguments, "tuning")
    elif arguments.edition:
        parameters["edition"] = arguments.edition
    return parameters


def connection_of(arguments: argparse.Namespace) -> Connection:
    """Return the connection to Kubeflow that flags and environment variables describe."""
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
    """Connect to Kubeflow's API; transient errors are retried until `patience_seconds` have passed.

    Raises:
        ConfigError: the settings of the connection are incomplete or wrong.
    """
    return Api(connection_of(arguments), patience_seconds=patience_seconds, on_retry=show_retry)
