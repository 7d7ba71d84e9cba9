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
    add_gate_arguments,
    add_monitor_arguments,
    add_run_arguments,
    apply_monitor_arguments,
    changes_from_arguments,
    config_from_arguments,
    dashed,
    gate_from_arguments,
    run_directory,
)
from mappo.config import ConfigError, ExperimentConfig, override, to_dict, to_json
from mappo.recipes import RECIPES
from mappo.study_commands import add_study, add_tune

_EXAMPLES = """examples:
  mappo train                                          the navigation recipe, into runs/
  mappo train balance --learner.clip-epsilon 0.1       another recipe, one knob changed
  mappo train --environment.scenario wheel --environment.scenario-kwargs '{"n_agents": 3}'
  mappo show-config balance > balance.json             edit it, then
  mappo train --config balance.json
  mappo train --run first --store s3://bucket/runs     under a name; the same command goes on after a kill
  mappo evaluate runs/20260101-120000                  a run's best checkpoint on held-out seeds
  mappo train --extend runs/20260101-120000 --collection.total-frames 200000
  mappo checkpoints list runs/20260101-120000
  mappo tune --study first --trials 20                 clip_epsilon, gae_lambda and epochs, by Optuna
  mappo promote runs/20260101-120000                   the champion of its task, if it is better
  mappo train --metrics-port 9464                      watched by Prometheus at http://localhost:9464/metrics

exit status: 0 done, 1 the stage failed, 2 the command or the configuration is wrong, 130 interrupted,
143 preempted (SIGTERM); the same command with the same --run goes on where an interrupted one stopped
"""
_CHAMPIONS_HELP = "where champions are kept: a directory or s3://bucket/prefix (default: champions)"
_REPORTS = ("validation", "evaluation", "comparison", "decision")
_RUN_HELP = "a run: its directory, such as runs/first, or s3://bucket/prefix/first"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status, as the examples list it."""
    if "" not in sys.path:
        sys.path.insert(0, "")  # scenarios of the user's own are found here, as by python -m
    arguments = _parser().parse_args(dashed(sys.argv[1:] if argv is None else argv))
    apply_monitor_arguments(arguments)
    try:
        return int(arguments.execute(arguments))
    except ConfigError as error:
        print(f"mappo {arguments.command}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        again = f"; to go on, give the same command with --run {arguments.run}" if "run" in arguments else ""
        print(f"\ninterrupted{again}", file=sys.stderr)
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

    def add(
        name: str, run: Callable[[argparse.Namespace], int] | None, summary: str
    ) -> argparse.ArgumentParser:  # None: the command says so itself
        command = subparsers.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        command.set_defaults(execute=run)
        return command

    command = add("validate", _validate, "check that a task is fit to train on")
    command.add_argument("--output", type=Path, metavar="FILE", help="write the report as JSON")
    add_monitor_arguments(command)
    add_config_arguments(command)

    command = add("train", _train, "train a run, or go on with it; write checkpoints and history")
    add_run_arguments(command)
    command.add_argument(
        "--keep", type=_positive, metavar="N", default=3, help="checkpoints to keep besides the best (default: 3)"
    )
    command.add_argument(
        "--extend",
        default="",
        metavar="RUN",
        help="begin where this run ended, with its configuration, up to a higher --collection.total-frames",
    )
    command.add_argument(
        "--warm-start",
        default="",
        metavar="RUN",
        help="begin with the networks of this run's best checkpoint; everything else is new",
    )
    command.add_argument(
        "--tensorboard", type=Path, metavar="DIRECTORY", help="write TensorBoard event files here, too"
    )
    add_monitor_arguments(command)
    add_config_arguments(command)

    command = add("evaluate", _evaluate, "judge a checkpoint on held-out seeds, beside baselines")
    command.add_argument("trained", metavar="RUN", help=_RUN_HELP)
    command.add_argument(
        "--checkpoint", metavar="WHICH", default="best", help="best, last, or an iteration (default: best)"
    )
    command.add_argument("--output", type=Path, metavar="FILE", help="write the report as JSON")
    add_monitor_arguments(command)
    add_config_arguments(command, with_recipe=False, required="RUN")

    command = add("promote", _promote, "put a run's checkpoint in the champion's place if it is better")
    command.add_argument("trained", metavar="RUN", help=_RUN_HELP)
    command.add_argument(
        "--checkpoint", metavar="WHICH", default="best", help="best, last, or an iteration (default: best)"
    )
    command.add_argument("--champions", metavar="PLACE", default="champions", help=_CHAMPIONS_HELP)
    command.add_argument("--output", type=Path, metavar="FILE", help="write the decision as JSON")
    add_gate_arguments(command)
    add_monitor_arguments(command)
    add_config_arguments(command, with_recipe=False, required="RUN")

    add_tune(add("tune", None, "tune the configuration: a study of trials, and its best trained again"))
    add_study(add("study", None, "studies: list, show, export, work, resume, delete"))

    _add_champion(add("champion", _champion, "the policies in use: list, show, history, rollback, export"))

    command = add("compare", _compare, "compare evaluations of several training seeds or configurations")
    command.add_argument("reports", type=Path, nargs="+", metavar="REPORT", help="what evaluate --output wrote")
    command.add_argument("--output", type=Path, metavar="FILE", help="write the comparison as JSON")

    command = add("report", _report, "write one HTML page of a run, or of several side by side")
    command.add_argument("runs", nargs="+", metavar="RUN", help=_RUN_HELP)
    command.add_argument(
        "--output", type=Path, default=Path("report.html"), metavar="FILE", help="(default: report.html)"
    )

    _add_checkpoints(add("checkpoints", _checkpoints, "list, show, verify or tidy up what a run has saved"))

    command = add("schema", _schema, "print the JSON Schema of a report")
    command.add_argument("report", choices=_REPORTS, metavar="REPORT", help=f"one of {', '.join(_REPORTS)}")

    add("recipes", _recipes, "list the named configurations")

    command = add("show-config", _show_config, "print a complete configuration as JSON")
    add_config_arguments(command)
    return parser


def _validate(arguments: argparse.Namespace) -> int:
    config = to_json(config_from_arguments(arguments))
    from mappo import stages  # imports torch: commands that need it pay for it

    return _watched_status(lambda: stages.validate(config, arguments.output))


def _train(arguments: argparse.Namespace) -> int:
    extend = arguments.extend
    if extend and arguments.recipe:
        raise ConfigError(f"--extend takes the run's configuration: leave the recipe {arguments.recipe} out")
    config = _config_of(extend, "last", arguments) if extend else config_from_arguments(arguments)
    from mappo import stages
    from mappo.names import run_location

    location = run_location(arguments.store, arguments.run, "")
    return _watched_status(
        lambda: stages.train(
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
    config = _config_of(arguments.trained, arguments.checkpoint, arguments)
    from mappo import stages

    return _watched_status(
        lambda: stages.evaluate(
            to_json(config), arguments.trained, arguments.output, checkpoint=arguments.checkpoint, keep=True
        )
    )


def _promote(arguments: argparse.Namespace) -> int:
    gate = gate_from_arguments(arguments)
    config = _config_of(arguments.trained, arguments.checkpoint, arguments)
    from mappo import stages

    return _watched_status(
        lambda: stages.promote(
            to_json(config),
            arguments.trained,
            arguments.champions,
            arguments.output,
            gate=to_dict(gate),
            checkpoint=arguments.checkpoint,
        )
    )


def _add_champion(command: argparse.ArgumentParser) -> None:
    actions = command.add_subparsers(dest="action", required=True, metavar="ACTION")
    for name, summary in (
        ("list", "list the tasks that have a champion"),
        ("show", "print the decision in force, its numbers and where its policy is, as JSON"),
        ("history", "list the decisions that changed the champion"),
        ("rollback", "put an earlier champion in force; the history keeps both"),
        ("export", "copy the policy as a file that needs PyTorch alone, with its model card"),
    ):
        action = actions.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        action.add_argument("place", metavar="PLACE", nargs="?", default="champions", help=_CHAMPIONS_HELP)
        if name != "list":
            action.add_argument(
                "--task", default="", help="as list shows it; may be left out where there is one only"
            )
        if name == "rollback":
            action.add_argument(
                "--to", type=_positive, metavar="N", help="the decision to go back to (default: the policy before)"
            )
            action.add_argument("--reason", default="", metavar="TEXT", help="kept in the history")
        if name == "export":
            action.add_argument(
                "--output", type=Path, metavar="DIRECTORY", default=Path("policy"), help="(default: policy)"
            )


def _champion(arguments: argparse.Namespace) -> int:
    from mappo import upkeep

    known = ("place", "task", "to", "reason", "output")
    options = {name: value for name, value in vars(arguments).items() if name in known}
    return _status(lambda: upkeep.CHAMPION_ACTIONS[arguments.action](**options))


def _compare(arguments: argparse.Namespace) -> int:
    from mappo import stages

    return _status(lambda: stages.compare(arguments.reports, arguments.output))


def _report(arguments: argparse.Namespace) -> int:
    from mappo import stages

    return _status(lambda: stages.report(arguments.runs, arguments.output))


def _config_of(run: str, which: str, arguments: argparse.Namespace) -> ExperimentConfig:
    """The configuration of a run's checkpoint, changed by the file, changed by the flags.

    Raises:
        ConfigError: the checkpoint cannot be read, names code that only the user may name, or as for any
            configuration.
    """
    from mappo import runs
    from mappo.checkpoint import CheckpointError
    from mappo.storage import StoreError

    try:
        trained = runs.load(run, which).config
    except (CheckpointError, StoreError) as error:
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


def _add_checkpoints(command: argparse.ArgumentParser) -> None:
    actions = command.add_subparsers(dest="action", required=True, metavar="ACTION")
    for name, summary in (
        ("list", "list a run's checkpoints, newest first"),
        ("show", "print the manifest of one: configuration, versions, hashes"),
        ("verify", "read all parts of all checkpoints and compare their hashes; exit status 1 if one is damaged"),
        ("prune", "delete all but the last ones and the best"),
        ("gc", "delete what no checkpoint needs, such as parts of saves that a crash cut short"),
    ):
        action = actions.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        action.add_argument("trained", metavar="RUN", help=_RUN_HELP)
        if name == "show":
            action.add_argument(
                "--checkpoint", metavar="WHICH", default="last", help="best, last, or an iteration (default: last)"
            )
        if name == "prune":
            action.add_argument(
                "--keep", type=_positive, metavar="N", default=3, help="how many besides the best (default: 3)"
            )
        if name == "gc":
            action.add_argument(
                "--grace-hours",
                type=float,
                metavar="X",
                default=24.0,
                help="leave what is younger: a training may be about to need it (default: 24)",
            )
        if name in ("prune", "gc"):
            action.add_argument("--delete", action="store_true", help="delete; without it, only say what would be")


def _checkpoints(arguments: argparse.Namespace) -> int:
    from mappo import upkeep

    options = {
        name: value
        for name, value in vars(arguments).items()
        if name in ("checkpoint", "keep", "grace_hours", "delete")
    }
    return _status(lambda: upkeep.ACTIONS[arguments.action](arguments.trained, **options))


def _schema(arguments: argparse.Namespace) -> int:
    from mappo import upkeep

    upkeep.show_schema(arguments.report)
    return 0


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value}: must be 1 or more")
    return value


def _recipes(_: argparse.Namespace) -> int:
    for name, make in RECIPES.items():
        first, *rest = inspect.cleandoc(make.__doc__ or "").splitlines()
        print(f"{name}, {make().collection.total_frames:,} frames: {first}")
        print("\n".join(f"    {line}" for line in rest if line))
    return 0


def _show_config(arguments: argparse.Namespace) -> int:
    print(json.dumps(to_dict(config_from_arguments(arguments)), indent=2))
    return 0


def _watched_status(stage: Callable[[], object]) -> int:
    """Of a stage that can be watched, once it is certain that what says how is right."""
    from mappo.monitor import Settings

    Settings.from_environment()
    return _status(stage)


def _status(stage: Callable[[], object]) -> int:
    from mappo.stages import StageFailed

    try:
        stage()
    except StageFailed:  # the stage has printed the reason
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
