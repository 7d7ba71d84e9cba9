"""The terminal: each stage alone, in this process."""

import argparse
import inspect
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import mappo
from mappo.arguments import (
    add_config_arguments,
    add_run_argument,
    changes_from_arguments,
    config_from_arguments,
    dashed,
    run_directory,
)
from mappo.config import ConfigError, ExperimentConfig, override, to_dict, to_json
from mappo.recipes import RECIPES

_EXAMPLES = """examples:
  mappo train                                          the navigation recipe, into runs/
  mappo train balance --learner.clip-epsilon 0.1       another recipe, one knob changed
  mappo train --environment.scenario wheel --environment.scenario-kwargs '{"n_agents": 3}'
  mappo show-config balance > balance.json             edit it, then
  mappo train --config balance.json
  mappo evaluate runs/20260101-120000                  a run's best checkpoint on held-out seeds
  mappo train --extend runs/20260101-120000 --collection.total-frames 200000

exit status: 0 done, 1 the stage failed, 2 the command or the configuration is wrong, 130 interrupted
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status, as the examples list it."""
    if "" not in sys.path:
        sys.path.insert(0, "")  # scenarios of the user's own are found here, as by python -m
    arguments = _parser().parse_args(dashed(sys.argv[1:] if argv is None else argv))
    try:
        return int(arguments.run(arguments))
    except ConfigError as error:
        print(f"mappo {arguments.command}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # as in `mappo show-config | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mappo",
        description=mappo.__doc__,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"mappo {mappo.__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, run: Callable[[argparse.Namespace], int], summary: str) -> argparse.ArgumentParser:
        command = subparsers.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        command.set_defaults(run=run)
        return command

    command = add("validate", _validate, "check that a task is fit to train on")
    command.add_argument("--output", type=Path, metavar="FILE", help="write the report as JSON")
    add_config_arguments(command)

    command = add("train", _train, "train a policy; write checkpoint and history")
    add_run_argument(command)
    command.add_argument(
        "--extend",
        type=Path,
        metavar="RUN",
        help="go on with this run (or checkpoint) and its configuration up to a higher --collection.total-frames",
    )
    command.add_argument(
        "--warm-start",
        type=Path,
        metavar="RUN",
        help="begin with the networks of this run's best checkpoint (or of a checkpoint); everything else is new",
    )
    add_config_arguments(command)

    command = add("evaluate", _evaluate, "judge a checkpoint on held-out seeds, beside baselines")
    command.add_argument(
        "checkpoint", type=Path, metavar="RUN", help="a run, for its best checkpoint, or a checkpoint"
    )
    command.add_argument("--output", type=Path, metavar="FILE", help="write the report as JSON")
    add_config_arguments(command, with_recipe=False, required="RUN")

    command = add("compare", _compare, "compare evaluations of several training seeds or configurations")
    command.add_argument("reports", type=Path, nargs="+", metavar="REPORT", help="what evaluate --output wrote")
    command.add_argument("--output", type=Path, metavar="FILE", help="write the comparison as JSON")

    add("recipes", _recipes, "list the named configurations")

    command = add("show-config", _show_config, "print a complete configuration as JSON")
    add_config_arguments(command)
    return parser


def _validate(arguments: argparse.Namespace) -> int:
    config = to_json(config_from_arguments(arguments))
    from mappo import stages  # imports torch: commands that need it pay for it

    return _status(lambda: stages.validate(config, arguments.output))


def _train(arguments: argparse.Namespace) -> int:
    extend = arguments.extend and _checkpoint(arguments.extend, "last")
    warm_start = arguments.warm_start and _checkpoint(arguments.warm_start, "best")
    if extend and arguments.recipe:
        raise ConfigError(f"--extend takes the run's configuration: leave the recipe {arguments.recipe} out")
    config = _config_of(extend, arguments) if extend else config_from_arguments(arguments)
    run = run_directory(arguments)
    from mappo import stages

    return _status(
        lambda: stages.train(
            to_json(config),
            run / "last",
            run / "best",
            run / "history.csv",
            extend=extend,
            warm_start=warm_start,
        )
    )


def _evaluate(arguments: argparse.Namespace) -> int:
    checkpoint = _checkpoint(arguments.checkpoint, "best")
    config = _config_of(checkpoint, arguments)
    from mappo import stages

    return _status(lambda: stages.evaluate(to_json(config), checkpoint, arguments.output))


def _compare(arguments: argparse.Namespace) -> int:
    from mappo import stages

    return _status(lambda: stages.compare(arguments.reports, arguments.output))


def _checkpoint(path: Path, name: str) -> Path:
    """A run's checkpoint of this name, unless the path is a checkpoint itself.

    Raises:
        ConfigError: a run that was not finished, and so has no last checkpoint.
    """
    if name == "last" and (path / "best").is_dir() and not (path / "last").is_dir():
        raise ConfigError(f"{path}: this run did not finish; its best checkpoint so far is {path / 'best'}")
    return path / name if (path / name).is_dir() else path


def _config_of(checkpoint: Path, arguments: argparse.Namespace) -> ExperimentConfig:
    """A checkpoint's configuration, changed by the file, changed by the flags.

    Raises:
        ConfigError: the checkpoint cannot be read, names code that only the user may name, or as for any
            configuration.
    """
    from mappo import checkpoint as checkpoints

    try:
        trained = checkpoints.load(checkpoint).config
    except checkpoints.CheckpointError as error:
        raise ConfigError(str(error)) from error
    changes = changes_from_arguments(arguments)
    config = override(trained, *changes)
    named = any("scenario" in change.get("environment", {}) for change in changes)
    if ":" in config.environment.scenario and not named:
        raise ConfigError(
            f"the checkpoint's scenario {trained.environment.scenario!r} is code outside VMAS, which a checkpoint "
            "cannot be trusted to name: if it is yours, give it as --environment.scenario"
        )
    return config


def _recipes(_: argparse.Namespace) -> int:
    for name, make in RECIPES.items():
        first, *rest = inspect.cleandoc(make.__doc__ or "").splitlines()
        print(f"{name}, {make().collection.total_frames:,} frames: {first}")
        print("\n".join(f"    {line}" for line in rest if line))
    return 0


def _show_config(arguments: argparse.Namespace) -> int:
    print(json.dumps(to_dict(config_from_arguments(arguments)), indent=2))
    return 0


def _status(stage: Callable[[], object]) -> int:
    from mappo.stages import StageFailed

    try:
        stage()
    except StageFailed:  # the stage has printed the reason
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
