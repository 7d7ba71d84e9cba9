"""The terminal of the pipelines: run one here, or compile it for Kubeflow."""

import argparse
import csv
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mappo.arguments import (
    add_config_arguments,
    add_monitor_arguments,
    add_run_arguments,
    apply_monitor_arguments,
    config_from_arguments,
    dashed,
    run_directory,
)
from mappo.config import ConfigError, override, parse_json, to_json

_EXAMPLES = """examples:
  python -m pipelines run                                   the navigation recipe, here, into runs/
  python -m pipelines run balance --seed 3                  another recipe, another seed
  python -m pipelines run --run first --store s3://bucket/runs
                                                            under a name: the same command goes on after a kill
  python -m pipelines run balance --seeds 0,1,2             three seeds, and how they compare
  python -m pipelines observe                               the same with a Prometheus to look at it
  python -m pipelines compile --image ghcr.io/you/mappo:1.0 --output training.yaml

exit status: 0 done, 1 a stage failed, 2 the command or the configuration is wrong, 130 interrupted
"""
_RETRIES = 3  # of the training stage on a cluster
_IMAGE = re.compile(r"[^\s@:]+(:\d+)?(/[^\s@:]+)*(:[\w][\w.-]{0,127}|@sha256:[0-9a-f]{64})")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; see the examples for the exit status."""
    arguments = _parser().parse_args(dashed(sys.argv[1:] if argv is None else argv))
    apply_monitor_arguments(arguments)
    try:
        return int(arguments.execute(arguments))
    except (ConfigError, OSError) as error:
        print(f"pipelines {arguments.command}: error: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if error.name != "kfp":
            raise
        print('pipelines: Kubeflow\'s SDK is not installed: pip install ".[kubeflow]"', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        again = f"; to go on, give the same command with --run {arguments.run}" if "run" in arguments else ""
        print(f"\ninterrupted{again}", file=sys.stderr)
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

    for name, execute, summary in (
        ("run", _run, "run the training pipeline on this machine, without a cluster"),
        ("observe", _observe, "run it watched by a Prometheus and a Pushgateway, which go on until Ctrl-C"),
    ):
        command = commands.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        add_run_arguments(command)
        _add_seeds_argument(command)
        if name == "run":
            add_monitor_arguments(command)
        add_config_arguments(command)
        command.set_defaults(execute=execute)

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
    _add_seeds_argument(command)
    command.add_argument(
        "--parallel-seeds",
        type=int,
        default=0,
        metavar="N",
        help="with --seeds: train at most N at once on the cluster (default: all)",
    )
    add_config_arguments(command, required="--image IMAGE")
    command.set_defaults(execute=_compile)
    return parser


def _add_seeds_argument(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--seeds",
        metavar="N,N,...",
        help="train and evaluate each of these seeds and compare them, instead of one run with --seed",
    )


def _run(arguments: argparse.Namespace) -> int:
    pipeline, parameters = _pipeline(arguments, parallelism=1, num_retries=0)
    directory = run_directory(arguments)
    store = arguments.store if "://" in arguments.store else str(Path(arguments.store).absolute())
    parameters |= {"image": "none:local", "store": store, "run": arguments.run}
    from pipelines.local import PipelineFailed, run_locally

    began = time.monotonic()
    try:
        artifacts = run_locally(pipeline, parameters, directory)
    except PipelineFailed as error:
        print(f"pipelines run: {error}", file=sys.stderr)
        return 1
    seconds = time.monotonic() - began
    print(_seeds_summary(artifacts, seconds) if arguments.seeds else _summary(artifacts, seconds))
    return 0


def _observe(arguments: argparse.Namespace) -> int:
    from pipelines.observe import observers

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # and end the servers
    with observers(run_directory(arguments) / "observers") as watching:
        os.environ.update(watching.environment)
        print("\n".join([*watching.lines(), ""]), flush=True)
        status = _run(arguments)
        print("\n".join(["", *watching.lines(), "", "until Ctrl-C"]), flush=True)
        try:
            signal.pause()
        except KeyboardInterrupt:
            print()
        return status


def _pipeline(
    arguments: argparse.Namespace, parallelism: int, num_retries: int
) -> tuple[Callable[..., Any], dict[str, Any]]:
    """The pipeline that the arguments ask for, and its parameters but for the image."""
    config = config_from_arguments(arguments)
    if arguments.seeds is None:
        from pipelines.training import make_training_pipeline

        return make_training_pipeline(num_retries), {"config": to_json(config)}
    if arguments.seed is not None:
        raise ConfigError("--seed and --seeds exclude each other")
    seeds = [seed.strip() for seed in arguments.seeds.split(",")]
    for seed in seeds:
        try:
            override(config, {"seed": parse_json(seed)})
        except ValueError as error:
            raise ConfigError(f"--seeds {arguments.seeds}: {seed!r}: {error}") from None
    if len(set(seeds)) < len(seeds):
        raise ConfigError(f"--seeds {arguments.seeds}: every seed may appear once")
    from pipelines.seeds import make_seeds_pipeline

    return make_seeds_pipeline(parallelism, num_retries), {"config": to_json(config), "seeds": seeds}


def _compile(arguments: argparse.Namespace) -> int:
    pipeline, parameters = _pipeline(arguments, arguments.parallel_seeds, num_retries=_RETRIES)
    if not _IMAGE.fullmatch(arguments.image):
        raise ConfigError(f"--image {arguments.image!r}: must be NAME:TAG or NAME@sha256:DIGEST")
    if arguments.output.suffix not in (".yaml", ".yml"):
        raise ConfigError(f"--output {arguments.output}: must end in .yaml")
    if arguments.parallel_seeds < 0:
        raise ConfigError(f"--parallel-seeds {arguments.parallel_seeds}: must be 0 or more")
    from kfp import compiler

    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    compiler.Compiler().compile(
        pipeline,
        str(arguments.output),
        pipeline_parameters={**parameters, "image": arguments.image},
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
        f"{'policy':<9} {'mean return':<24} {'interquartile mean':<24}".rstrip(),
        *(
            f"{policy:<9} {_interval(report[policy]['mean']):<24} "
            f"{_interval(report[policy]['interquartile_mean'])}"
            for policy in ("random", "heuristic", "trained")
            if report[policy]
        ),
        f"95 % intervals over {episodes} held-out episodes of this one trained policy, after "
        f"{report['training_frames']:,} frames",
        "",
        f"trained on {frames:,} frames in {training_seconds:.1f} s ({frames / training_seconds:,.0f} frames/s); "
        f"the whole pipeline took {seconds:.1f} s",
        "",
        *_paths(artifacts),
    ]
    return "\n".join(lines)


def _seeds_summary(artifacts: dict[str, Path], seconds: float) -> str:
    """The comparison stage has printed its table; here is where everything lies."""
    return "\n".join(["", f"the whole pipeline took {seconds:.1f} s", "", *_paths(artifacts)])


def _paths(artifacts: dict[str, Path]) -> list[str]:
    return [f"{name.replace('_', ' '):<20} {path}" for name, path in artifacts.items() if path.exists()]


def _interval(estimate: dict[str, Any]) -> str:
    if estimate["low"] is None:
        return f"{estimate['value']:.3f}"
    return f"{estimate['value']:.3f} [{estimate['low']:.3f}, {estimate['high']:.3f}]"


if __name__ == "__main__":
    sys.exit(main())
