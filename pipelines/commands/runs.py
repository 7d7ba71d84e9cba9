"""The command `runs`: list, show, watch, cancel and retry submitted runs, and print their logs."""

import argparse
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from rich.live import Live

from mappo.errors import ConfigError
from pipelines.commands.arguments import add_command, add_connection_arguments, connect
from pipelines.commands.output import add_output_argument, console, duration, moment, show_one, show_rows, table
from pipelines.errors import ApiError
from pipelines.kubeflow import client
from pipelines.kubeflow.api import Api
from pipelines.kubeflow.progress import Logs, stages_of, was_cancelled
from pipelines.kubeflow.stages import StageProgress

_WATCH_PATIENCE_SECONDS = 600.0
_RUN_HELP = "ID or name of the run, or latest"
_EPILOG = """examples:
  python -m pipelines runs list --limit 5
  python -m pipelines runs watch latest
  python -m pipelines runs logs train latest | tail
  python -m pipelines runs show RUN --output json

exit status of watch: 0 the run succeeded, 1 it failed or was cancelled, 130 detached by Ctrl-C
"""


def add(commands: Any) -> None:
    """Add the commands of `runs`."""
    summary = "list, show, watch, cancel or retry runs, or print their logs"
    group = add_command(commands, "runs", summary, _EPILOG)
    verbs = group.add_subparsers(dest="verb", required=True, metavar="VERB")
    listing = _verb(verbs, "list", "list the newest runs", _list)
    listing.add_argument(
        "--limit", type=int, default=20, metavar="N", help="maximum number of runs to list (default: 20)"
    )
    listing.add_argument(
        "--experiment",
        default="",
        metavar="NAME",
        help="list only the runs of this experiment (default: of all experiments)",
    )
    _verb(verbs, "show", "show a run and its stages", _show).add_argument("run", help=_RUN_HELP)
    watching = _verb(verbs, "watch", "show the progress of a run until it ends", _watch)
    watching.add_argument("run", help=_RUN_HELP)
    add_watch_arguments(watching)
    logs = _verb(verbs, "logs", "print the log of a stage", _logs)
    logs.add_argument(
        "stage", help="name of the stage: validate, train, evaluate ...; train[1] is the second of several"
    )
    logs.add_argument("run", nargs="?", default="latest", help=f"{_RUN_HELP} (default: latest)")
    logs.add_argument(
        "--attempt", type=int, metavar="N", help="the log of attempt N, counted from 0 (default: the newest)"
    )
    _verb(verbs, "cancel", "end a run", _cancel).add_argument("run", help=_RUN_HELP)
    retrying = _verb(verbs, "retry", "run the failed stages of a run again; training resumes", _retry)
    retrying.add_argument("run", help=_RUN_HELP)


def add_watch_arguments(command: argparse.ArgumentParser) -> None:
    """Add `--interval`, the time between two polls of a watched run."""
    command.add_argument(
        "--interval", type=float, default=5.0, metavar="SECONDS", help="seconds between polls (default: 5)"
    )


def run_summary(kubeflow: Api, run: Any) -> dict[str, Any]:
    """Return the fields of a run that commands print."""
    return {
        "name": run.display_name,
        "id": run.run_id,
        "state": run.state or "PENDING",
        "created": moment(run.created_at),
        "ended": moment(run.finished_at),
        "error": run.error.message if run.error else "",
    } | ({"link": f"{kubeflow.url}/#/runs/details/{run.run_id}"} if kubeflow.has_pages else {})


def watch(arguments: argparse.Namespace, kubeflow: Api, run: Any) -> int:
    """Show the progress of a run until it ends; return the exit status."""
    kubeflow = connect(arguments, _WATCH_PATIENCE_SECONDS)
    logs = Logs(kubeflow, run.run_id)
    try:
        specification = _specification(kubeflow, run)
        with _progress_display(arguments) as show:
            while True:
                stages = _stages(kubeflow, run, specification, logs)
                show(run, stages)
                if run.state in client.ENDED:
                    break
                time.sleep(max(arguments.interval, 0.1))
                run = client.get_run(kubeflow, run.run_id)
    except KeyboardInterrupt:
        print(
            f"\ndetached; the run continues. To end it: python -m pipelines runs cancel {run.run_id}\n"
            f"to watch it again: python -m pipelines runs watch {run.run_id}",
            file=sys.stderr,
        )
        return 130
    except ApiError as error:
        raise ApiError(
            f"{error}\nthe run continues; to watch it again: runs watch {run.run_id}", error.status
        ) from None
    if arguments.output == "json":
        show_one(arguments, {**run_summary(kubeflow, run), "stages": _rows(stages)})
    has_succeeded = run.state in ("SUCCEEDED", "SKIPPED")
    if not has_succeeded and was_cancelled(run):
        print(f"run {run.run_id} was cancelled", file=sys.stderr)
    elif not has_succeeded:
        print(f"run {run.run_id} ended as {run.state}", file=sys.stderr)
    return 0 if has_succeeded else 1


def _verb(verbs: Any, name: str, summary: str, execute: Callable[[argparse.Namespace], int]) -> Any:
    verb = verbs.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
    add_connection_arguments(verb)
    add_output_argument(verb)
    verb.set_defaults(execute=execute)
    return verb


def _list(arguments: argparse.Namespace) -> int:
    if arguments.limit < 1:
        raise ConfigError(f"--limit {arguments.limit}: must be 1 or more")
    kubeflow = connect(arguments)
    now = datetime.now(UTC)
    rows = [
        {
            "id": run.run_id,
            "name": run.display_name,
            "state": run.state or "PENDING",
            "created": moment(run.created_at),
            "duration": duration(_seconds(run, now)),
        }
        for run in client.runs(kubeflow, arguments.limit, arguments.experiment)
    ]
    show_rows(arguments, rows, "no runs yet; `python -m pipelines submit` starts one")
    return 0


def _show(arguments: argparse.Namespace) -> int:
    kubeflow = connect(arguments)
    run = client.find_run(kubeflow, arguments.run)
    rows = _rows(_stages(kubeflow, run, _specification(kubeflow, run), Logs(kubeflow, run.run_id)))
    if arguments.output == "json":
        config = run.runtime_config
        show_one(
            arguments, {**run_summary(kubeflow, run), "parameters": config and config.parameters, "stages": rows}
        )
        return 0
    show_one(arguments, run_summary(kubeflow, run))
    print()
    show_rows(arguments, rows, "no stage has begun")
    return 0


def _watch(arguments: argparse.Namespace) -> int:
    kubeflow = connect(arguments)
    return watch(arguments, kubeflow, client.find_run(kubeflow, arguments.run))


def _logs(arguments: argparse.Namespace) -> int:
    kubeflow = connect(arguments)
    run = client.find_run(kubeflow, arguments.run)
    stages = stages_of(kubeflow, run, _specification(kubeflow, run))
    selected = [
        stage for stage in stages if arguments.stage in (stage.name, stage.name.partition("[")[0], stage.task)
    ]
    if not selected:
        names = ", ".join(stage.name for stage in stages) or "none yet"
        raise ConfigError(f"stage {arguments.stage!r}: no such stage; the run has {names}")
    logs = Logs(kubeflow, run.run_id)
    # Without a started stage, ask for all of them, so that the error tells why there is no log.
    started = [stage for stage in selected if stage.attempts or stage.cause] or selected
    texts = {stage.name: _log_text(logs, stage, arguments.attempt) for stage in started}
    if arguments.output == "json":
        show_rows(arguments, [{"stage": name, "log": log} for name, log in texts.items()], "")
        return 0
    for name, log in texts.items():
        if len(texts) > 1:
            print(f"==> {name} <==")
        sys.stdout.write(log)
    return 0


def _log_text(logs: Logs, stage: StageProgress, attempt: int | None) -> str:
    """Return the log of a stage's attempt; None stands for the newest."""
    texts = logs.of_attempts(stage if attempt is not None else replace(stage, attempts=stage.attempts[-1:]))
    if attempt is not None and not 0 <= attempt < len(texts):
        raise ConfigError(f"--attempt {attempt}: stage {stage.name} has attempts 0 to {len(texts) - 1}")
    return texts[-1 if attempt is None else attempt]


def _cancel(arguments: argparse.Namespace) -> int:
    kubeflow = connect(arguments)
    run = client.find_run(kubeflow, arguments.run)
    client.cancel(kubeflow, run)
    show_one(arguments, run_summary(kubeflow, client.get_run(kubeflow, run.run_id)))
    return 0


def _retry(arguments: argparse.Namespace) -> int:
    kubeflow = connect(arguments)
    run = client.find_run(kubeflow, arguments.run)
    client.retry(kubeflow, run)
    show_one(arguments, run_summary(kubeflow, client.get_run(kubeflow, run.run_id)))
    return 0


def _stages(kubeflow: Api, run: Any, specification: Mapping[str, Any], logs: Logs) -> list[StageProgress]:
    """Return the stages of a run, completed by details from their logs: attempts within one pod, and reasons."""
    return [logs.add_details(stage) for stage in stages_of(kubeflow, run, specification)]


def _specification(kubeflow: Api, run: Any) -> Mapping[str, Any]:
    """Return the specification of the run's pipeline; empty if the server no longer has it."""
    try:
        return client.specification_of(kubeflow, run)
    except ConfigError:
        return {}
    except ApiError as error:
        if error.status != 404:
            raise
        return {}


@contextmanager
def _progress_display(arguments: argparse.Namespace) -> Any:
    """Yield a function that shows a run's progress: a live table on a terminal, else a line for each change."""
    if sys.stdout.isatty() and arguments.output == "table":
        with Live(console=console(), auto_refresh=False) as live:
            yield lambda run, stages: live.update(_progress_table(run, stages), refresh=True)
        return
    previous: dict[str, tuple[Any, ...]] = {}
    stream = sys.stderr if arguments.output == "json" else sys.stdout

    def print_changes(run: Any, stages: list[StageProgress]) -> None:
        for row in [*_rows(stages), {"stage": "run", "state": run.state or "PENDING"}]:
            current = (row["state"], row.get("attempt"), row.get("message"))
            is_silent = row["state"] == "PENDING" and not row.get("message")
            if previous.get(row["stage"]) != current and not is_silent:
                previous[row["stage"]] = current
                fields = [row["stage"], row["state"], row.get("duration", ""), row.get("message", "")]
                print("  ".join(str(field) for field in fields if field), file=stream, flush=True)

    yield print_changes


def _progress_table(run: Any, stages: list[StageProgress]) -> Any:
    result = table(_rows(stages))
    result.title, result.title_justify = f"{run.display_name}: {run.state or 'PENDING'}", "left"
    return result


def _rows(stages: list[StageProgress]) -> list[dict[str, Any]]:
    now = datetime.now(UTC)
    return [
        {
            "stage": stage.name,
            "state": stage.state,
            "duration": duration(stage.seconds(now)),
            "attempt": stage.num_attempts or "",
            "message": stage.reason,
        }
        for stage in stages
    ]


def _seconds(run: Any, now: datetime) -> float | None:
    if not run.created_at:
        return None
    ended = run.finished_at if run.finished_at and run.finished_at.year > 1970 else now
    return float((ended - run.created_at).total_seconds())
