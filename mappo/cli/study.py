"""The commands `mappo tune` and `mappo study`: their flags and their output."""

import argparse
import csv
import io
import json
import sys
from pathlib import Path
from typing import Any

from mappo.cli.arguments import (
    Commands,
    add_budget_arguments,
    add_command,
    add_config_arguments,
    add_format_argument,
    add_reporting_arguments,
    add_retraining_arguments,
    add_study_arguments,
    config_from_arguments,
    study_changes_from_arguments,
    study_config_from_arguments,
)
from mappo.cli.prechecks import require_possible_here
from mappo.cli.status import look_up, notified_status
from mappo.config import require_run_name, to_json
from mappo.errors import ConfigError
from mappo.monitoring.settings import MonitorSettings
from mappo.runs.locations import require_location
from mappo.strict_json import checked
from mappo.tuning.study_config import StudyConfig, study_config_to_json

_DATABASE_HELP = (
    "Studies are kept in the database whose URL is MAPPO_DATABASE in the environment "
    "(postgresql://user:password@host/name), or in runs/studies.db."
)


def add(commands: Commands) -> None:
    """Add the commands."""
    _add_tune(
        add_command(
            commands, "tune", _tune, "tune a configuration: a study of trials, then its best trained again"
        )
    )
    _add_study(add_command(commands, "study", None, "studies: list, show, export, work, resume, delete"))


def _add_tune(command: argparse.ArgumentParser) -> None:
    command.description = (
        "Tune a configuration: run the trials of a study, train the best and the default configuration again "
        "from fresh seeds, evaluate both on held-out episodes and compare them. The same command continues after "
        "a kill. "
        f"{_DATABASE_HELP}"
    )
    add_study_arguments(command, is_required=True)
    command.add_argument(
        "--store",
        default="runs",
        metavar="STORE",
        help="store of the trials' runs: a directory or s3://bucket/prefix (default: runs)",
    )
    add_reporting_arguments(command)
    add_config_arguments(command)


def _add_study(command: argparse.ArgumentParser) -> None:
    command.description = f"Show, continue or delete studies. {_DATABASE_HELP}"
    actions = command.add_subparsers(dest="action", required=True, metavar="ACTION")
    for name, execute, summary in (
        ("list", _list, "list the studies"),
        ("show", _show, "list a study's trials, and what the best changes"),
        ("export", _export, "write a study's trials as CSV, or all of it as JSON"),
        ("work", _work, "work on a study's trials, beside any number of other workers anywhere"),
        ("resume", _resume, "continue a study as mappo tune does: trials, then the best again from fresh seeds"),
        ("delete", _delete, "delete a study; the runs of its trials stay"),
    ):
        action = add_command(actions, name, execute, summary)
        if name != "list":
            action.add_argument("study", metavar="STUDY", help="name of the study")
        if name in ("list", "show"):
            add_format_argument(action)
        if name == "export":
            action.add_argument(
                "--output", type=Path, metavar="FILE", help="FILE.csv or FILE.json (default: CSV to the terminal)"
            )
        if name in ("work", "resume"):
            action.add_argument(
                "--environment.scenario",
                dest="scenario",
                default="",
                metavar="MODULE:CLASS",
                help="scenario of the study, named to let its code run here; needed if it is not one of VMAS's",
            )
        if name in ("work", "resume"):
            add_reporting_arguments(action)
        if name == "resume":
            add_budget_arguments(action)
            add_retraining_arguments(action, is_resumed=True)
        if name == "delete":
            action.add_argument(
                "--delete", action="store_true", help="delete; without this flag, only print what would be deleted"
            )


def _tune(arguments: argparse.Namespace) -> int:
    config = config_from_arguments(arguments)
    study_config = study_config_to_json(study_config_from_arguments(arguments, config))
    name = require_run_name(arguments.study, "study")
    store, champions = require_location(arguments.store), arguments.champions
    if champions:
        require_location(champions)
    require_possible_here(config)
    from mappo.stages.prepare import prepare
    from mappo.stages.runtime import StageResult
    from mappo.stages.whole_study import run_study

    def tune() -> StageResult:
        prepare(to_json(config), name, store, study_config, champions=champions)
        return run_study(name, arguments.workers, study_config, champions, config.environment.scenario)

    return notified_status(arguments, f"study {name}", tune, {"store": store})


def _resume(arguments: argparse.Namespace) -> int:
    name, changes = require_run_name(arguments.study, "study"), study_changes_from_arguments(arguments)
    checked(StudyConfig, changes)
    MonitorSettings.from_environment()
    if arguments.champions is not None:
        changes["champions"] = arguments.champions
    from mappo.cli.study_actions import request
    from mappo.stages.runtime import StageResult

    def resume() -> StageResult:
        ending = request(name, changes, arguments.scenario)
        from mappo.stages.whole_study import run_study

        study_config = study_config_to_json(StudyConfig(retraining=ending.retraining, gate=ending.gate))
        return run_study(name, arguments.workers, study_config, ending.champions, arguments.scenario)

    return notified_status(arguments, f"study {name}", resume)


def _work(arguments: argparse.Namespace) -> int:
    MonitorSettings.from_environment()
    from mappo.stages.tune import work_on_study

    subject = f"worker of study {arguments.study}"
    return notified_status(arguments, subject, lambda: work_on_study(arguments.study, arguments.scenario))


def _list(arguments: argparse.Namespace) -> int:
    from mappo.cli.study_actions import list_lines, list_rows

    if arguments.output == "json":
        return look_up("study", lambda: print(json.dumps(list_rows(), indent=1)))
    return look_up("study", lambda: print("\n".join(list_lines())))


def _show(arguments: argparse.Namespace) -> int:
    from mappo.cli.study_actions import show_lines, study_as_dict

    if arguments.output == "json":
        return look_up("study", lambda: print(json.dumps(study_as_dict(arguments.study), indent=1)))
    return look_up("study", lambda: print("\n".join(show_lines(arguments.study))))


def _export(arguments: argparse.Namespace) -> int:
    from mappo.cli.study_actions import study_as_dict

    output: Path | None = arguments.output
    if output and output.suffix not in (".csv", ".json"):
        raise ConfigError(f"--output {output}: must end in .csv or .json")

    def export() -> None:
        study = study_as_dict(arguments.study)
        text = json.dumps(study, indent=1) + "\n" if output and output.suffix == ".json" else _csv(study)
        if not output:
            sys.stdout.write(text)
            return
        from mappo.runs.owned_file import write_whole

        try:
            write_whole(output, text)
        except OSError as error:
            raise ConfigError(f"--output {output}: {error.strerror}") from None

    return look_up("study", export)


def _delete(arguments: argparse.Namespace) -> int:
    from mappo.cli.study_actions import delete

    return look_up("study", lambda: print(delete(arguments.study, really=arguments.delete)))


def _csv(study: dict[str, Any]) -> str:
    paths = list(study["plan"]["space"])
    columns = ("number", "state", "value", "origin", "reason", "seconds", "is_feasible")
    constrained = [f"measured_{name}" for name in study["plan"]["tuning"]["constraints"]]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*columns, "attempts", *constrained, *paths])
    for trial in study["trials"]:
        values = [_cell(trial["values"].get(path)) for path in paths]
        measured = [trial["measured"].get(name.removeprefix("measured_")) for name in constrained]
        writer.writerow([*(trial[name] for name in columns), len(trial["attempts"]), *measured, *values])
    return text.getvalue()


def _cell(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, list | dict) else value
