"""The commands that run one stage each: validate, train, evaluate, promote, compare and report."""

import argparse
from pathlib import Path

from mappo.cli.arguments import (
    CHAMPIONS_HELP,
    RUN_HELP,
    Commands,
    add_checkpoint_arguments,
    add_command,
    add_config_arguments,
    add_gate_arguments,
    add_keep_argument,
    add_monitor_arguments,
    add_run_arguments,
    changes_from_arguments,
    config_from_arguments,
    gate_from_arguments,
    run_directory,
)
from mappo.cli.status import stage_status, status, watched_status
from mappo.config import ExperimentConfig, differences, override, to_json
from mappo.errors import ConfigError
from mappo.strict_json import to_dict

_EVALUATION_FIELDS = ("environment.", "evaluation.", "threads", "device")  # prefixes of fields that matter to one


def add(commands: Commands) -> None:
    """Add the commands that run one stage each."""
    command = add_command(commands, "validate", _validate, "check that a task can be used for training")
    command.add_argument("--output", type=Path, metavar="FILE", help="write the report as JSON")
    add_monitor_arguments(command)
    add_config_arguments(command)

    command = add_command(commands, "train", _train, "train a run, or resume it; write checkpoints and history")
    add_run_arguments(command)
    add_keep_argument(command)
    command.add_argument(
        "--extend",
        default="",
        metavar="RUN",
        help="extend this finished run, with its configuration, up to a higher --collection.total-frames",
    )
    command.add_argument(
        "--warm-start",
        default="",
        metavar="RUN",
        help="start from the networks of this run's best checkpoint; everything else is new",
    )
    command.add_argument(
        "--tensorboard", type=Path, metavar="DIRECTORY", help="write TensorBoard event files into this directory"
    )
    add_monitor_arguments(command)
    add_config_arguments(command)

    command = add_command(commands, "evaluate", _evaluate, "evaluate a checkpoint and baselines on held-out seeds")
    add_checkpoint_arguments(command)
    command.add_argument("--output", type=Path, metavar="FILE", help="write the report as JSON")
    add_monitor_arguments(command)
    add_config_arguments(command, with_recipe=False, required="RUN")

    command = add_command(
        commands, "promote", _promote, "make a run's checkpoint the champion of its task if it is better"
    )
    add_checkpoint_arguments(command)
    command.add_argument("--champions", metavar="LOCATION", default="champions", help=CHAMPIONS_HELP)
    command.add_argument("--output", type=Path, metavar="FILE", help="write the decision as JSON")
    add_gate_arguments(command)
    add_monitor_arguments(command)
    add_config_arguments(command, with_recipe=False, required="RUN")

    command = add_command(
        commands, "compare", _compare, "compare the evaluations of several training seeds or configurations"
    )
    command.add_argument(
        "reports",
        type=Path,
        nargs="+",
        metavar="REPORT",
        help="evaluation report, as `mappo evaluate --output` writes it",
    )
    command.add_argument("--output", type=Path, metavar="FILE", help="write the comparison as JSON")

    command = add_command(
        commands, "report", _report, "write one HTML page about a run, or about several runs side by side"
    )
    command.add_argument("runs", nargs="+", metavar="RUN", help=RUN_HELP)
    command.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="file of the page (default: report.html in the directory of the run, if it is one run in a "
        "directory, else here)",
    )


def _validate(arguments: argparse.Namespace) -> int:
    config = to_json(config_from_arguments(arguments))
    from mappo.stages.validate import validate  # imported here, because it imports torch, which takes seconds

    return watched_status(lambda: validate(config, arguments.output))


def _train(arguments: argparse.Namespace) -> int:
    extend = arguments.extend
    if extend and arguments.recipe:
        raise ConfigError(f"--extend uses the run's configuration: leave the recipe {arguments.recipe} out")
    config = _config_of_checkpoint(extend, "last", arguments) if extend else config_from_arguments(arguments)
    from mappo.runs.locations import run_location
    from mappo.stages.train import train

    location = run_location(arguments.store, arguments.run, "")
    return watched_status(
        lambda: train(
            to_json(config),
            location,
            run_directory(arguments) / "history.csv",
            extend=extend,
            warm_start=arguments.warm_start,
            keep=arguments.keep,
            tensorboard=arguments.tensorboard,
        )
    )


def _evaluate(arguments: argparse.Namespace) -> int:
    run = arguments.run_location
    config = _config_of_checkpoint(run, arguments.checkpoint, arguments, fixed=True)
    from mappo.stages.evaluate import evaluate

    return watched_status(
        lambda: evaluate(to_json(config), run, arguments.output, checkpoint=arguments.checkpoint, keep_at=run)
    )


def _promote(arguments: argparse.Namespace) -> int:
    gate = gate_from_arguments(arguments)
    config = _config_of_checkpoint(arguments.run_location, arguments.checkpoint, arguments)
    from mappo.stages.promote import promote

    return watched_status(
        lambda: promote(
            to_json(config),
            arguments.run_location,
            arguments.champions,
            arguments.output,
            gate=to_dict(gate),
            checkpoint=arguments.checkpoint,
        )
    )


def _compare(arguments: argparse.Namespace) -> int:
    from mappo.stages.compare import compare

    return status(lambda: compare(arguments.reports, arguments.output))


def _report(arguments: argparse.Namespace) -> int:
    from mappo.stages.report import PAGE, page_of_run, report

    runs = arguments.runs
    own_page = page_of_run(runs[0]) if len(runs) == 1 else None
    return stage_status(lambda: report(runs, arguments.output or own_page or Path(PAGE)))


def _config_of_checkpoint(
    run_location: str, checkpoint: str, arguments: argparse.Namespace, fixed: bool = False
) -> ExperimentConfig:
    """Return the configuration of a run's checkpoint; --config overrides it, and flags override --config.

    `fixed`: only fields that matter to an evaluation may differ from the checkpoint's.

    Raises:
        ConfigError: the checkpoint cannot be read, only the checkpoint names code outside VMAS, or a value is not
            allowed.
    """
    from mappo.errors import CheckpointError, StoreError
    from mappo.runs.run import load_checkpoint

    try:
        trained_config = load_checkpoint(run_location, checkpoint, parts=()).config
    except (CheckpointError, StoreError) as error:
        raise ConfigError(str(error)) from error
    changes = changes_from_arguments(arguments)
    config = override(trained_config, *changes)
    is_named_by_user = any("scenario" in change.get("environment", {}) for change in changes)
    if ":" in config.environment.scenario and not is_named_by_user:
        # A checkpoint may come from somebody else, and importing the code that it names would run that code.
        raise ConfigError(
            f"the checkpoint's scenario {trained_config.environment.scenario!r} is code outside VMAS, which runs "
            "only if you name it: if you trust this code, give it as --environment.scenario"
        )
    if fixed:
        _require_evaluation_fields(trained_config, config)
    return config


def _require_evaluation_fields(trained_config: ExperimentConfig, config: ExperimentConfig) -> None:
    """Refuse changes of fields that an evaluation does not read: the policy has been trained already."""
    changes = differences(trained_config, config)
    refused = [name for name in changes if not name.startswith(_EVALUATION_FIELDS)]
    if refused:
        raise ConfigError(
            "\n".join(f"{name} = {changes[name]}: the run was trained with the former" for name in refused)
            + "; an evaluation can change environment.*, evaluation.*, threads and device only"
        )
