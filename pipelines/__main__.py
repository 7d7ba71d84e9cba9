"""The terminal of the pipelines: run one here, or compile it for Kubeflow."""

import argparse
import csv
import json
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mappo.arguments import (
    add_config_arguments,
    add_run_argument,
    config_from_arguments,
    dashed,
    run_directory,
)
from mappo.config import ConfigError, to_json

_EXAMPLES = """examples:
  python -m pipelines run                                   the navigation recipe, here, into runs/
  python -m pipelines run balance --seed 3                  another recipe, another seed
  python -m pipelines compile --image ghcr.io/you/mappo:1.0 --output training.yaml

exit status: 0 done, 1 a stage failed, 2 the command or the configuration is wrong, 130 interrupted
"""
_IMAGE = re.compile(r"[^\s@:]+(:\d+)?(/[^\s@:]+)*(:[\w][\w.-]{0,127}|@sha256:[0-9a-f]{64})")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; see the examples for the exit status."""
    arguments = _parser().parse_args(dashed(sys.argv[1:] if argv is None else argv))
    try:
        return int(arguments.run(arguments))
    except (ConfigError, OSError) as error:
        print(f"pipelines {arguments.command}: error: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if error.name != "kfp":
            raise
        print('pipelines: Kubeflow\'s SDK is not installed: pip install ".[kubeflow]"', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pipelines",
        description=__doc__,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    command = commands.add_parser(
        "run", help="run the training pipeline on this machine, without a cluster", allow_abbrev=False
    )
    add_run_argument(command)
    add_config_arguments(command)
    command.set_defaults(run=_run)

    command = commands.add_parser("compile", help="compile the training pipeline for Kubeflow", allow_abbrev=False)
    command.add_argument(
        "--image",
        required=True,
        metavar="IMAGE",
        help="container image of the stages, with a tag or digest; the pipeline's image parameter defaults to it",
    )
    command.add_argument(
        "--output",
        type=Path,
        default=Path("training.yaml"),
        metavar="FILE",
        help="YAML to write (default: training.yaml)",
    )
    add_config_arguments(command, required="--image IMAGE")
    command.set_defaults(run=_compile)
    return parser


def _run(arguments: argparse.Namespace) -> int:
    config = config_from_arguments(arguments)
    run = run_directory(arguments)
    from pipelines.local import PipelineFailed, run_locally
    from pipelines.training import training

    began = time.monotonic()
    try:
        artifacts = run_locally(training, {"config": to_json(config), "image": "none:local"}, run)
    except PipelineFailed as error:
        print(f"pipelines run: {error}", file=sys.stderr)
        return 1
    print(_summary(artifacts, time.monotonic() - began))
    return 0


def _compile(arguments: argparse.Namespace) -> int:
    config = config_from_arguments(arguments)
    if not _IMAGE.fullmatch(arguments.image):
        raise ConfigError(f"--image {arguments.image!r}: must be NAME:TAG or NAME@sha256:DIGEST")
    if arguments.output.suffix not in (".yaml", ".yml"):
        raise ConfigError(f"--output {arguments.output}: must end in .yaml")
    from kfp import compiler

    from pipelines.training import training

    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    compiler.Compiler().compile(
        training,
        str(arguments.output),
        pipeline_parameters={"config": to_json(config), "image": arguments.image},
    )
    print(f"wrote {arguments.output}")
    return 0


def _summary(artifacts: dict[str, Path], seconds: float) -> str:
    report = json.loads(artifacts["evaluation_report"].read_text())
    with artifacts["training_history"].open(newline="") as file:
        last = list(csv.DictReader(file))[-1]
    episodes = len(report["trained"]["episode_returns"])
    frames, training_seconds = int(last["frames"]), float(last["elapsed_seconds"])
    lines = [
        "",
        f"{'policy':<9} {'mean return':<24} {'interquartile mean':<24}",
        *(
            f"{policy:<9} {_interval(report[policy]['mean']):<24} "
            f"{_interval(report[policy]['interquartile_mean']):<24}"
            for policy in ("random", "trained")
        ),
        f"95 % intervals over {episodes} held-out episodes of this one trained policy",
        "",
        f"trained on {frames:,} frames in {training_seconds:.1f} s ({frames / training_seconds:,.0f} frames/s); "
        f"the whole pipeline took {seconds:.1f} s",
        "",
        *(f"{name.replace('_', ' '):<20} {path}" for name, path in artifacts.items() if path.exists()),
    ]
    return "\n".join(lines)


def _interval(estimate: dict[str, Any]) -> str:
    if estimate["low"] is None:
        return f"{estimate['value']:.3f}"
    return f"{estimate['value']:.3f} [{estimate['low']:.3f}, {estimate['high']:.3f}]"


if __name__ == "__main__":
    sys.exit(main())
