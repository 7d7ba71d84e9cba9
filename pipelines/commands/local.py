"""The commands `run` and `observe`: run a pipeline on this machine, without a cluster."""

import argparse
import os
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from components.placeholders import fill
from mappo.cli.arguments import (
    add_config_arguments,
    add_monitor_arguments,
    add_reporting_arguments,
    add_run_arguments,
    apply_monitor_arguments,
    config_from_arguments,
    run_directory,
)
from mappo.cli.matrix_look_ups import write_page
from mappo.cli.prechecks import require_possible_here, require_resumable
from mappo.compute.standard_streams import dropped_output
from mappo.config import require_run_name
from mappo.matrix.matrix import matrix_json, read_matrix
from mappo.reporting.notification import Message, Outcome
from mappo.reporting.webhook import required_webhook
from mappo.runs.locations import joined, require_location
from pipelines.commands.arguments import add_pipeline_arguments, parameters_of, pipeline_of

_PAGES = {"run_page": "report.html", "study_page": "study.html", "matrix_page": "matrix.html"}
_OF_TABULATION = {  # the artifacts of a matrix, by the names in the folder of its last stage
    "cells": "cell_results",
    "table": "matrix_table",
    "markdown": "matrix_markdown",
    "page": "matrix_page",
}
_OF_SEEDS = {  # the artifacts of a seed, below its folder
    "best_checkpoint": "train/best",
    "evaluation_report": "evaluate/report",
    "run_page": "evaluate/page",
    "training_history": "train/history",
}


def add(commands: Any) -> None:
    """Add the commands `run` and `observe`."""
    for name, execute, summary in (
        ("run", _run, "run a pipeline on this machine, without a cluster"),
        ("observe", _observe, "run a pipeline here, with a Prometheus and a Pushgateway that serve until Ctrl-C"),
    ):
        command = commands.add_parser(
            name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.", allow_abbrev=False
        )
        add_run_arguments(command)
        add_pipeline_arguments(command)
        if name == "run":
            add_monitor_arguments(command)
        else:
            add_reporting_arguments(command)
        add_config_arguments(command)
        command.set_defaults(execute=execute)


def _run(arguments: argparse.Namespace) -> int:
    apply_monitor_arguments(arguments)
    _check(arguments)
    with dropped_output():
        return _run_here(arguments)


def _check(arguments: argparse.Namespace) -> None:
    """Fill in the time, and check what can be checked before torch is imported and a stage starts.

    Raises:
        ConfigError: the configuration, a name or the machine does not fit.
        NotALocation: the store is not a location.
    """
    _fill_in_time(arguments)
    require_location(arguments.store)
    require_run_name(arguments.run)
    name = pipeline_of(arguments)
    if name == "matrix":
        for cell in {(cell.task, cell.algorithm): cell for cell in read_matrix(arguments.matrix).cells}.values():
            require_possible_here(cell.config)
        return
    config = config_from_arguments(arguments)
    require_possible_here(config)
    if name == "training":
        require_resumable(joined(arguments.store, arguments.run), config)


def _run_here(arguments: argparse.Namespace) -> int:
    name, pipeline, parameters = _pipeline(arguments)
    directory = run_directory(arguments)
    store = arguments.store if "://" in arguments.store else str(Path(arguments.store).absolute())
    parameters |= {"store": store} | ({"run": arguments.run} if name in ("training", "seeds") else {})
    from pipelines.errors import PipelineFailed
    from pipelines.local import run_locally

    start = time.monotonic()
    try:
        artifacts = run_locally(pipeline, parameters, directory)
    except PipelineFailed as error:
        print(f"pipelines run: {error}", file=sys.stderr)
        artifacts = _newest_tabulation(directory) if name == "matrix" else {}
        _tell(arguments, name, directory, str(error), artifacts)
        for line in (*_paths(artifacts), *map(_page_line, _copied_pages(artifacts, arguments))):
            print(line)
        return 1
    seconds = time.monotonic() - start
    _tell(arguments, name, directory, "", artifacts)
    results = {"training": _training_results, "seeds": _seeds_results}.get(name, _no_results)(artifacts)
    took = f"the whole pipeline took {seconds:.1f} s"
    lines = ["", *results, took, "", *_paths(artifacts), *map(_page_line, _copied_pages(artifacts, arguments))]
    if name == "seeds":
        lines += _seed_paths(artifacts, joined(store, arguments.run), parameters["seeds"])
    print("\n".join(lines))
    return 0


def _tell(
    arguments: argparse.Namespace, pipeline: str, directory: Path, reason: str, artifacts: dict[str, Path]
) -> None:
    """Send a message about the end of the pipeline, if the user asks for it. A failure has a reason."""
    if arguments.notify:
        from mappo.stages.notify import results_of_files, send, subject_of

        names = {"tuning": arguments.study, "matrix": arguments.matrix and matrix_json(arguments.matrix)}
        subject = subject_of(pipeline, names.get(pipeline, arguments.run), "")
        results = {} if reason else results_of_files(pipeline, artifacts)
        outcome: Outcome = "failed" if reason else "succeeded"
        send(
            required_webhook(),
            Message(subject, outcome, reason, results, {"artifacts": str(directory.absolute())}),
        )


def _observe(arguments: argparse.Namespace) -> int:
    from pipelines.observe import observers

    _check(arguments)
    # Exit by an exception on SIGTERM, so that the servers end too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with dropped_output(), observers(run_directory(arguments) / "observers") as servers:
        os.environ.update(servers.environment)
        print("\n".join([*servers.lines(), ""]), flush=True)
        status = _run_here(arguments)
        try:
            print("\n".join(["", *servers.lines(), "", f"running until {_end_signal()}"]), flush=True)
            signal.pause()
        except KeyboardInterrupt:
            print()
        return status


def _end_signal() -> str:
    """Return how a user ends this command; a shell script makes commands that it starts with & ignore Ctrl-C."""
    is_ignored = signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    return f"SIGTERM: kill {os.getpid()}" if is_ignored else "Ctrl-C"


def _fill_in_time(arguments: argparse.Namespace) -> None:
    """Replace [[ScheduledTime]] by the time of this command, once, so that all stages use the same time."""
    now = datetime.now(UTC).isoformat()
    for name in ("run", "store", "edition"):
        setattr(arguments, name, fill(getattr(arguments, name), now))


def _pipeline(arguments: argparse.Namespace) -> tuple[str, Any, dict[str, Any]]:
    """Return name and function of the pipeline that the arguments select, and its parameters."""
    name = pipeline_of(arguments)
    parameters = parameters_of(arguments, name)
    if name == "training":
        from pipelines.training import make_training_pipeline

        return name, make_training_pipeline(None), parameters
    if name == "seeds":
        from pipelines.seeds import make_seeds_pipeline

        return name, make_seeds_pipeline(None, parallelism=1), parameters
    if name == "matrix":
        from pipelines.matrix import make_matrix_pipeline

        return name, make_matrix_pipeline(None, parallelism=1), parameters
    from mappo.tuning.study import TERMINAL
    from pipelines.tuning import make_tuning_pipeline

    return name, make_tuning_pipeline(None, parallelism=1), parameters | {"session": TERMINAL}


def _training_results(artifacts: dict[str, Path]) -> list[str]:
    from mappo.reporting.run_record import parse_evaluation  # imports torch
    from mappo.training.history import parse_history

    path = artifacts["evaluation_report"]
    report = parse_evaluation(str(path), path.read_bytes())
    last = parse_history(artifacts["training_history"].read_text())[-1]
    frames, training_seconds = int(last["frames"]), last["elapsed_seconds"]
    return [
        f"{'policy':<9} {'mean return':<24} interquartile mean",
        *(
            f"{policy:<9} {returns.mean!s:<24} {returns.interquartile_mean}"
            for policy, returns in report.policies().items()
        ),
        f"95 % intervals over {len(report.trained.episode_returns)} held-out episodes, after "
        f"{report.training_frames:,} frames; resampled: {report.resampled}",
        "",
        f"trained on {frames:,} frames in {training_seconds:.1f} s ({frames / training_seconds:,.0f} frames/s)",
    ]


def _seeds_results(artifacts: dict[str, Path]) -> list[str]:
    from mappo.reporting.tables import comparison_table  # imports torch
    from mappo.stages.compare import read_comparison

    return [*comparison_table(read_comparison(artifacts["comparison_report"])), ""]


def _no_results(_: dict[str, Path]) -> list[str]:
    """Return no line: the last stage of tuning, or of a matrix, has just printed its table."""
    return []


def _newest_tabulation(directory: Path) -> dict[str, Path]:
    """Return the tables and the page that the newest run of a matrix left although cells failed, if it did."""
    newest = max(directory.glob("mappo-matrix-*"), default=directory)  # their names end with the time
    files = {artifact: newest / "summarise" / name for name, artifact in _OF_TABULATION.items()}
    return {artifact: file for artifact, file in files.items() if file.is_file()}


def _copied_pages(artifacts: dict[str, Path], arguments: argparse.Namespace) -> list[Path]:
    """Copy the pages among the artifacts to files with a suffix, by which browsers know them; return the files.

    The page of a matrix is written anew, since its links to the pages of runs are relative.
    """
    pages = []
    for name, file in _PAGES.items():
        if name in artifacts:
            page = run_directory(arguments) / file
            if name == "matrix_page":
                write_page(arguments.matrix, arguments.store, (), page)
            else:
                shutil.copyfile(artifacts[name], page)
            pages.append(page)
    return pages


def _page_line(page: Path) -> str:
    return f"{'page':<20} {page.absolute().as_uri()}"


def _seed_paths(artifacts: dict[str, Path], run: str, seeds: Sequence[str]) -> list[str]:
    """Return the run of each seed and the paths of its artifacts, which the pipeline itself does not put out."""
    lines = []
    for index, seed in enumerate(seeds):
        lines += ["", f"{f'run of seed {seed}':<20} {run}-{seed}"]
        folder = artifacts["comparison_report"].parents[1] / f"for-loop-1-iteration-{index}"
        lines += _paths({name: folder / path for name, path in _OF_SEEDS.items()})
        if (page := Path(f"{run}-{seed}", "report.html")).exists():  # not if the run is in a bucket
            lines.append(_page_line(page))
    return lines


def _paths(artifacts: dict[str, Path]) -> list[str]:
    """Return a line for each artifact that is no page, with its path from here."""
    paths = {name: path for name, path in artifacts.items() if path.exists() and not name.endswith("_page")}
    return [f"{name.replace('_', ' '):<20} {_from_here(path)}" for name, path in paths.items()]


def _from_here(path: Path) -> Path:
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path
