"""Measure what the history adds to an iteration, a save and a start, in runs of up to a million iterations.

    python -m benchmarks.history                             up to a million iterations, in a directory
    python -m benchmarks.history --iterations 10000 --store s3://bucket/prefix

The rows are those of a real iteration. `append` and `copy` are what the training thread spends on the history
in an
iteration: it writes a row to history.csv, and copies the last rows for the next checkpoint. `save` is the
time of a whole save in the saver's thread, of a small task, and `KB` its size. `start` reads the history and
writes history.csv.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from mappo.config import override
from mappo.recipes import recipe
from mappo.runs.attempt import claim
from mappo.runs.checkpoint import Checkpoint
from mappo.runs.run import Run
from mappo.training.history import HistoryFile, IterationReport, Progress
from mappo.training.training import train

_SAVE_EVERY = 500  # rows between two saves on the way to the next length
_MEASURED = 50


def main() -> None:
    """Print a row for each length of the history."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.history",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--iterations", type=int, default=10**6, metavar="N", help="longest run (default: 1000000)"
    )
    parser.add_argument("--store", metavar="STORE", help="store to save in (default: a temporary directory)")
    arguments = parser.parse_args()
    with TemporaryDirectory() as directory:
        checkpoint, report = _trained(Path(directory))
        run = Run.at(f"{arguments.store or directory}/history-{time.time_ns()}")
        history = HistoryFile(Path(directory) / "history.csv")
        _measure(run, history, checkpoint, report, arguments.iterations)


def _trained(directory: Path) -> tuple[Checkpoint, IterationReport]:
    """Return a checkpoint of a small task, and the report of its last iteration."""
    reports: list[IterationReport] = []
    config = override(
        recipe("navigation"),
        {
            "networks": {"hidden_sizes": [16]},
            "learner": {"epochs": 1, "minibatch_frames": 60, "update": "plain"},
            "collection": {"num_envs": 6, "rollout_frames": 10, "total_frames": 240, "simulation": "plain"},
        },
    )
    history = HistoryFile(directory / "trained.csv")
    return train(config, Run.at(directory / "trained"), history, reports.append), reports[-1]


def _measure(
    run: Run, history: HistoryFile, checkpoint: Checkpoint, report: IterationReport, iterations: int
) -> None:
    attempt = claim(run)

    def save(iteration: int) -> None:
        attempt.save(replace(checkpoint, iteration=iteration, history=history.text, segments=history.segments))

    print(f"{'iterations':>10} {'append us':>9} {'copy us':>8} {'save ms':>8} {'KB':>6} {'start s':>8}")
    iteration = 0
    for length in _lengths(iterations):
        while iteration < length:
            iteration += 1
            history.append(replace(report, progress=Progress(iteration, 60 * iteration)))
            if iteration % _SAVE_EVERY == 0:
                save(iteration)
                attempt.tidy()
        append, copy, saves = [], [], []
        for _ in range(_MEASURED):
            iteration += 1
            row = replace(report, progress=Progress(iteration, 60 * iteration))
            append.append(_seconds(partial(history.append, row)))
            copy.append(_seconds(lambda: history.text))
            saves.append(_seconds(partial(save, iteration)))
            attempt.tidy()
        print(
            f"{length:>10,} {1e6 * statistics.median(append):>9.0f} {1e6 * statistics.median(copy):>8.0f} "
            f"{1e3 * statistics.median(saves):>8.1f} {run.manifest(run.choose('last')).size_bytes / 1e3:>6.0f} "
            f"{_seconds(lambda: _start(run)):>8.2f}",
            flush=True,
        )


def _start(run: Run) -> None:
    """Read the history as a process does that resumes the run."""
    with TemporaryDirectory() as directory:
        checkpoint = run.load(run.choose("last"))
        history = HistoryFile(Path(directory) / "history.csv")
        earlier = checkpoint.earlier_rows
        history.restore(checkpoint.history, earlier, lambda: run.earlier_rows(earlier))
        history.begin()
        history.close()


def _lengths(iterations: int) -> Iterator[int]:
    length = 100
    while length <= iterations:
        yield length
        length *= 10


def _seconds(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
