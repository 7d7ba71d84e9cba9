"""`mappo tune` and `mappo study`: their flags, and what they print."""

import argparse
import csv
import io
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mappo.cli.arguments import (
    Commands,
    add_command,
    add_config_arguments,
    add_finish_arguments,
    add_study_arguments,
    config_from_arguments,
    count,
    gate_from_arguments,
    tuning_from_arguments,
)
from mappo.cli.status import status
from mappo.config import require_run_name, to_json
from mappo.errors import ConfigError
from mappo.strict_json import to_dict

if TYPE_CHECKING:
    from mappo.tuning.study_config import Retraining

_DATABASE_HELP = (
    "Studies are kept in the database whose URL is MAPPO_DATABASE in the environment "
    "(postgresql://user:password@host/name), or in runs/studies.db."
)


def add(commands: Commands) -> None:
    """Add both commands."""
    _add_tune(
        add_command(
            commands, "tune", _tune, "tune the configuration: a study of trials, and its best trained again"
        )
    )
    _add_study(add_command(commands, "study", None, "studies: list, show, export, work, resume, delete"))


def _add_tune(command: argparse.ArgumentParser) -> None:
    command.description = (
        "Tune the configuration: trials of a study, pruned; then the best and the default trained again from "
        "fresh seeds, judged on held-out episodes and compared. The same command goes on after a kill. "
        f"{_DATABASE_HELP}"
    )
    add_study_arguments(command, is_required=True)
    command.add_argument(
        "--store",
        default="runs",
        metavar="STORE",
        help="where runs of trials are kept: a directory, or s3://bucket/prefix (default: runs)",
    )
    add_config_arguments(command)


def _add_study(command: argparse.ArgumentParser) -> None:
    command.description = f"What is known of studies. {_DATABASE_HELP}"
    actions = command.add_subparsers(dest="action", required=True, metavar="ACTION")
    for name, execute, summary in (
        ("list", _list, "list the studies"),
        ("show", _show, "list a study's trials, and what the best changes"),
        ("export", _export, "write a study's trials as CSV, or all of it as JSON"),
        ("work", _work, "work on a study's trials, beside any number of other workers anywhere"),
        ("resume", _resume, "go on with a study as mappo tune does: trials, then the best again from fresh seeds"),
        ("delete", _delete, "delete a study; the runs of its trials stay"),
    ):
        action = actions.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        action.set_defaults(execute=execute)
        if name != "list":
            action.add_argument("study", metavar="STUDY", help="its name")
        if name == "export":
            action.add_argument(
                "--output", type=Path, metavar="FILE", help="FILE.csv or FILE.json (default: CSV to the terminal)"
            )
        if name == "resume":
            action.add_argument(
                "--trials", type=count, metavar="N", help="ask for so many trials (default: what was asked for)"
            )
            action.add_argument(
                "--hours",
                type=float,
                metavar="X",
                help="start no trial later than this (default: as was asked for)",
            )
            add_finish_arguments(action)
        if name == "delete":
            action.add_argument("--delete", action="store_true", help="delete; without it, only say what would be")


def _tune(arguments: argparse.Namespace) -> int:
    config = config_from_arguments(arguments)
    space, tuning = tuning_from_arguments(arguments, config)
    name = require_run_name(arguments.study)
    from mappo.stages.prepare import prepare
    from mappo.stages.whole_study import run_study
    from mappo.tuning.study_config import Budget

    finish = _finish(arguments)  # what is wrong with it is said before hours of tuning

    budget = Budget(arguments.trials, arguments.hours)

    def tune() -> None:
        prepare(
            *(to_json(config), name, arguments.store, budget),
            space=json.dumps(space),
            tuning=to_dict(tuning),
        )
        run_study(name, arguments.workers, finish)

    return status(tune)


def _resume(arguments: argparse.Namespace) -> int:
    from mappo.cli.study_actions import ask_for_trials
    from mappo.stages.whole_study import run_study
    from mappo.tuning.study_config import Budget

    name, finish = require_run_name(arguments.study), _finish(arguments)
    budget = Budget(arguments.trials or 1, arguments.hours or 0.0)  # which refuses what cannot be

    def resume() -> None:
        ask_for_trials(name, arguments.trials, arguments.hours and budget.hours)
        run_study(name, arguments.workers, finish)

    return status(resume)


def _finish(arguments: argparse.Namespace) -> "Retraining":
    from mappo.tuning.study_config import Retraining

    return Retraining(arguments.retrain_seeds, arguments.champions, gate_from_arguments(arguments))


def _work(arguments: argparse.Namespace) -> int:
    from mappo.stages.tune import work_on_study

    return status(lambda: work_on_study(arguments.study))


def _list(_: argparse.Namespace) -> int:
    from mappo.cli.study_actions import list_lines

    return status(lambda: print("\n".join(list_lines())))


def _show(arguments: argparse.Namespace) -> int:
    from mappo.cli.study_actions import show_lines

    return status(lambda: print("\n".join(show_lines(arguments.study))))


def _export(arguments: argparse.Namespace) -> int:
    from mappo.cli.study_actions import exported

    output: Path | None = arguments.output
    if output and output.suffix not in (".csv", ".json"):
        raise ConfigError(f"--output {output}: must end in .csv or .json")

    def export() -> None:
        found = exported(arguments.study)
        text = json.dumps(found, indent=1) + "\n" if output and output.suffix == ".json" else _csv(found)
        if output:
            output.write_text(text)
        else:
            sys.stdout.write(text)

    return status(export)


def _delete(arguments: argparse.Namespace) -> int:
    from mappo.cli.study_actions import delete

    return status(lambda: print(delete(arguments.study, really=arguments.delete)))


def _csv(found: dict[str, Any]) -> str:
    paths = list(found["plan"]["space"])
    plain = ("number", "state", "value", "origin", "reason", "seconds")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*plain, "attempts", *paths])
    for trial in found["trials"]:
        values = [_cell(trial["values"].get(path)) for path in paths]
        writer.writerow([*(trial[name] for name in plain), len(trial["attempts"]), *values])
    return text.getvalue()


def _cell(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, list | dict) else value
