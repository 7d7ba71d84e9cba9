"""`runs`: list, show, watch, read logs of, cancel and retry what was submitted."""

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
_RUN_HELP = "its ID, its name, or latest"
_EPILOG = """examples:
  python -m pipelines runs list --limit 5
  python -m pipelines runs watch latest
  python -m pipelines runs logs train latest | tail
  python -m pipelines runs show RUN --output json

exit status of watch: 0 the run succeeded, 1 it failed or was cancelled, 130 detached by Ctrl-C
"""


def add(commands: Any) -> None:
    """Add the commands."""
    summary = "list, show, watch, read logs of, cancel or retry runs"
    group = add_command(commands, "runs", summary, _EPILOG)
    verbs = group.add_subparsers(dest="verb", required=True, metavar="VERB")
    listing = _verb(verbs, "list", "the newest runs", _list)
    listing.add_argument("--limit", type=int, default=20, metavar="N", help="at most so many (default: 20)")
    listing.add_argument("--experiment", default="", metavar="NAME", help="only those of an experiment")
    _verb(verbs, "show", "one run and its stages", _show).add_argument("run", help=_RUN_HELP)
    watching = _verb(verbs, "watch", "a run until it ends", _watch)
    watching.add_argument("run", help=_RUN_HELP)
    add_watch_arguments(watching)
    logs = _verb(verbs, "logs", "what a stage has printed", _logs)
    logs.add_argument("stage", help="validate, train, evaluate ...; train[1] for the second of several")
    logs.add_argument("run", nargs="?", default="latest", help=f"{_RUN_HELP} (default: latest)")
    logs.add_argument(
        "--attempt", type=int, metavar="N", help="the log of attempt N, counted from 0 (default: the newest)"
    )
    _verb(verbs, "cancel", "end a run", _cancel).add_argument("run", help=_RUN_HELP)
    retrying = _verb(verbs, "retry", "run the stages again that failed; training resumes", _retry)
    retrying.add_argument("run", help=_RUN_HELP)


def add_watch_arguments(command: argparse.ArgumentParser) -> None:
    """Add `--interval`."""
    command.add_argument(
        "--interval", type=float, default=5.0, metavar="SECONDS", help="seconds between polls (default: 5)"
    )


def described(kubeflow: Api, run: Any) -> dict[str, Any]:
    """A run, for people and scripts."""
    return {
        "name": run.display_name,
        "id": run.run_id,
        "state": run.state or "PENDING",
        "created": moment(run.created_at),
        "ended": moment(run.finished_at),
        "error": run.error.message if run.error else "",
    } | ({"link": f"{kubeflow.url}/#/runs/details/{run.run_id}"} if kubeflow.has_pages else {})


def watch(arguments: argparse.Namespace, kubeflow: Api, run: Any) -> int:
    """Show a run until it ends; the exit status."""
    kubeflow = connect(arguments, _WATCH_PATIENCE_SECONDS)
    logs = Logs(kubeflow, run.run_id)
    try:
        specification = _specification(kubeflow, run)
        with _shown(arguments) as show:
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
        show_one(arguments, {**described(kubeflow, run), "stages": _rows(stages)})
    is_good = run.state in ("SUCCEEDED", "SKIPPED")
    if not is_good and was_cancelled(run):
        print(f"run {run.run_id} was cancelled", file=sys.stderr)
    elif not is_good:
        print(f"run {run.run_id} ended as {run.state}", file=sys.stderr)
    return 0 if is_good else 1


def _verb(verbs: Any, name: str, summary: str, execute: Callable[[argparse.Namespace], int]) -> Any:
    verb = verbs.add_parser(name, help=summary, description=f"Show {summary}." if " " in summary else summary)
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
    run = client.run_of(kubeflow, arguments.run)
    rows = _rows(_stages(kubeflow, run, _specification(kubeflow, run), Logs(kubeflow, run.run_id)))
    if arguments.output == "json":
        config = run.runtime_config
        show_one(
            arguments, {**described(kubeflow, run), "parameters": config and config.parameters, "stages": rows}
        )
        return 0
    show_one(arguments, described(kubeflow, run))
    print()
    show_rows(arguments, rows, "no stage has begun")
    return 0


def _watch(arguments: argparse.Namespace) -> int:
    kubeflow = connect(arguments)
    return watch(arguments, kubeflow, client.run_of(kubeflow, arguments.run))


def _logs(arguments: argparse.Namespace) -> int:
    kubeflow = connect(arguments)
    run = client.run_of(kubeflow, arguments.run)
    stages = stages_of(kubeflow, run, _specification(kubeflow, run))
    chosen = [each for each in stages if arguments.stage in (each.name, each.name.partition("[")[0], each.task)]
    if not chosen:
        there = ", ".join(each.name for each in stages) or "none yet"
        raise ConfigError(f"stage {arguments.stage!r}: there is {there}")
    logs = Logs(kubeflow, run.run_id)
    begun = [stage for stage in chosen if stage.attempts or stage.cause] or chosen
    found = {stage.name: _chosen_log(logs, stage, arguments.attempt) for stage in begun}
    if arguments.output == "json":
        show_rows(arguments, [{"stage": name, "log": log} for name, log in found.items()], "")
        return 0
    for name, log in found.items():
        if len(found) > 1:
            print(f"==> {name} <==")
        sys.stdout.write(log)
    return 0


def _chosen_log(logs: Logs, stage: StageProgress, attempt: int | None) -> str:
    """Return the log of an attempt; of the newest without a number."""
    texts = logs.of_attempts(stage if attempt is not None else replace(stage, attempts=stage.attempts[-1:]))
    if attempt is not None and not 0 <= attempt < len(texts):
        raise ConfigError(f"--attempt {attempt}: stage {stage.name} has attempts 0 to {len(texts) - 1}")
    return texts[-1 if attempt is None else attempt]


def _cancel(arguments: argparse.Namespace) -> int:
    kubeflow = connect(arguments)
    run = client.run_of(kubeflow, arguments.run)
    client.cancel(kubeflow, run)
    show_one(arguments, described(kubeflow, client.get_run(kubeflow, run.run_id)))
    return 0


def _retry(arguments: argparse.Namespace) -> int:
    kubeflow = connect(arguments)
    run = client.run_of(kubeflow, arguments.run)
    client.retry(kubeflow, run)
    show_one(arguments, described(kubeflow, client.get_run(kubeflow, run.run_id)))
    return 0


def _stages(kubeflow: Api, run: Any, specification: Mapping[str, Any], logs: Logs) -> list[StageProgress]:
    """Return the stages of a run with what their logs tell: attempts within one pod, and reasons."""
    return [logs.told_by(stage) for stage in stages_of(kubeflow, run, specification)]


def _specification(kubeflow: Api, run: Any) -> Mapping[str, Any]:
    """Return what the run is made from; empty if the server does not know it any more."""
    try:
        return client.specification_of(kubeflow, run)
    except ConfigError:
        return {}
    except ApiError as error:
        if error.status != 404:
            raise
        return {}


@contextmanager
def _shown(arguments: argparse.Namespace) -> Any:
    """A function that shows how far a run is: a live table in a terminal, else a line for each change."""
    if sys.stdout.isatty() and arguments.output == "table":
        with Live(console=console(), auto_refresh=False) as live:
            yield lambda run, stages: live.update(_live(run, stages), refresh=True)
        return
    before: dict[str, tuple[Any, ...]] = {}
    out = sys.stderr if arguments.output == "json" else sys.stdout

    def lines(run: Any, stages: list[StageProgress]) -> None:
        for row in [*_rows(stages), {"stage": "run", "state": run.state or "PENDING"}]:
            now = (row["state"], row.get("attempt"), row.get("message"))
            is_silent = row["state"] == "PENDING" and not row.get("message")
            if before.get(row["stage"]) != now and not is_silent:
                before[row["stage"]] = now
                shown = [row["stage"], row["state"], row.get("duration", ""), row.get("message", "")]
                print("  ".join(str(each) for each in shown if each), file=out, flush=True)

    yield lines


def _live(run: Any, stages: list[StageProgress]) -> Any:
    shown = table(_rows(stages))
    shown.title, shown.title_justify = f"{run.display_name}: {run.state or 'PENDING'}", "left"
    return shown


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
