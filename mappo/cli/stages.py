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
from mappo.cli.merging import merge
from mappo.cli.prechecks import require_possible_here, require_resumable
from mappo.cli.run_names import find_run, manifest_of, trained_config
from mappo.cli.status import notified_status, stage_status, status
from mappo.config import ExperimentConfig, differences, to_json
from mappo.errors import ConfigError, NoCheckpoint
from mappo.runs.checkpoint import Manifest
from mappo.runs.locations import require_location, run_location
from mappo.runs.run import Run
from mappo.strict_json import to_dict
from mappo.training.continuation import require_extension

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
    start = command.add_mutually_exclusive_group()
    start.add_argument(
        "--extend",
        default="",
        metavar="RUN",
        help="extend this finished run, with its configuration, up to a higher --collection.total-frames",
    )
    start.add_argument(
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
        nargs="+",
        metavar="REPORT",
        help="a run with an evaluation, or a file that `mappo evaluate --output` wrote",
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


# Stages are imported when everything that needs no torch is checked: the import takes seconds.


def _validate(arguments: argparse.Namespace) -> int:
    config = config_from_arguments(arguments)
    require_possible_here(config)
    from mappo.stages.validate import validate

    return notified_status(arguments, "validation", lambda: validate(to_json(config), arguments.output))


def _train(arguments: argparse.Namespace) -> int:
    location = run_location(require_location(arguments.store), arguments.run, "")
    extend = find_run(arguments.extend) if arguments.extend else ""
    warm_start = find_run(arguments.warm_start) if arguments.warm_start else ""
    config = _extending_config(extend, arguments) if extend else config_from_arguments(arguments)
    require_possible_here(config)
    require_resumable(location, config)
    from mappo.stages.train import train

    return notified_status(
        arguments,
        f"run {arguments.run}",
        lambda: train(
            to_json(config),
            location,
            run_directory(arguments) / "history.csv",
            extend=extend,
            warm_start=warm_start,
            keep=arguments.keep,
            tensorboard=arguments.tensorboard,
        ),
        {"run": location if "://" in location else str(Path(location).absolute())},
    )


def _evaluate(arguments: argparse.Namespace) -> int:
    run = find_run(arguments.run_location)
    manifest = manifest_of(run, arguments.checkpoint)
    config = _config_of_checkpoint(manifest, arguments)
    _require_evaluation_fields(trained_config(manifest), config)
    from mappo.stages.evaluate import evaluate

    return notified_status(
        arguments,
        f"evaluation of {arguments.run_location}",
        lambda: evaluate(to_json(config), run, arguments.output, checkpoint=arguments.checkpoint, keep_at=run),
    )


def _promote(arguments: argparse.Namespace) -> int:
    gate, run = gate_from_arguments(arguments), find_run(arguments.run_location)
    champions = require_location(arguments.champions)
    config = _config_of_checkpoint(manifest_of(run, arguments.checkpoint), arguments)
    from mappo.stages.promote import promote

    return notified_status(
        arguments,
        f"promotion of {arguments.run_location}",
        lambda: promote(
            to_json(config), run, champions, arguments.output, gate=to_dict(gate), checkpoint=arguments.checkpoint
        ),
        {"champions": champions},
    )


def _compare(arguments: argparse.Namespace) -> int:
    reports = [_report_source(text) for text in arguments.reports]
    from mappo.stages.compare import compare

    return status(lambda: compare(reports, arguments.output))


def _report_source(text: str) -> str:
    """Return a file as it is named, or the location of a run."""
    if Path(text).is_file():
        return text
    try:
        return find_run(text)
    except NoCheckpoint as error:
        raise NoCheckpoint(f"{error}; nor is there such a file") from None


def _report(arguments: argparse.Namespace) -> int:
    runs = [find_run(name) for name in arguments.runs]
    for run in runs:
        Run.at(run).choose("last")  # it exists
    from mappo.stages.report import PAGE, page_of_run, report

    own_page = page_of_run(runs[0]) if len(runs) == 1 else None
    return stage_status(lambda: report(runs, arguments.output or own_page or Path(PAGE)))


def _extending_config(run: str, arguments: argparse.Namespace) -> ExperimentConfig:
    """Return the configuration of a run that extends another one."""
    if arguments.recipe:
        raise ConfigError(f"--extend uses the run's configuration: leave the recipe {arguments.recipe} out")
    last = manifest_of(run, "last")
    config = _config_of_checkpoint(last, arguments)
    require_extension(trained_config(last), last.iteration, last.frames, config)
    return config


def _config_of_checkpoint(manifest: Manifest, arguments: argparse.Namespace) -> ExperimentConfig:
    """Return the configuration of a checkpoint; --config overrides it, and flags override --config.

    Raises:
        ConfigError: only the checkpoint names code outside VMAS, or a value is not allowed, also on this machine.
    """
    changes = changes_from_arguments(arguments)
    config = merge(trained_config(manifest), *changes)
    is_named_by_user = any("scenario" in change.get("environment", {}) for change in changes)
    if ":" in config.environment.scenario and not is_named_by_user:
        # A checkpoint may come from somebody else, and importing the code that it names would run that code.
        raise ConfigError(
            f"the checkpoint's scenario {config.environment.scenario!r} is code outside VMAS, which runs "
            "only if you name it: if you trust this code, give it as --environment.scenario"
        )
    require_possible_here(config)
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
