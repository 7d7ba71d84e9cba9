"""The progress of training: a bar on a terminal, lines anywhere else."""

import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from shutil import get_terminal_size
from typing import Any

from tqdm import tqdm

from mappo.config import CollectionConfig
from mappo.reporting.terminal import say
from mappo.training.history import Episodes, IterationReport, TrainingStarted

_SECONDS_BETWEEN_LINES = 5.0


class ProgressLines:
    """Training as lines, for logs: every few seconds, and with every evaluation."""

    def __init__(self, config: CollectionConfig):
        self._total = config.num_iterations * config.frames_per_batch
        self._began = time.monotonic()
        self._already: int | None = None  # frames done before the first report
        self._printed = -_SECONDS_BETWEEN_LINES
        self._episodes: Episodes | None = None  # the latest that ended
        self._frames_per_batch = config.frames_per_batch

    def begin(self, beginning: TrainingStarted) -> None:
        """Training begins, or goes on from a checkpoint."""
        if beginning.is_resumed:
            say("train", _goes_on(beginning))
        self._began = time.monotonic()

    def show(self, report: IterationReport) -> None:
        """One iteration is done."""
        frames, now = report.progress.frames, time.monotonic()
        if self._already is None:
            self._already = frames - self._frames_per_batch
        self._episodes = report.episodes if report.episodes.num_episodes else self._episodes
        is_due = now - self._printed >= _SECONDS_BETWEEN_LINES
        if not is_due and frames < self._total and math.isnan(report.evaluation_return_mean):
            return
        self._printed = now
        left = (now - self._began) / (frames - self._already) * (self._total - frames)
        say(
            "train",
            f"{frames:>{len(f'{self._total:,}')},} of {self._total:,} frames  {_return(self._episodes)}"
            f"{_evaluation(report)}  {report.frames_per_second:,.0f} frames/s  {left:.0f} s left",
        )


class ProgressBar:
    """Training as a bar, for a terminal."""

    def __init__(self, bar: "tqdm[Any]"):
        self._bar = bar

    def begin(self, beginning: TrainingStarted) -> None:
        """Training begins, or goes on from a checkpoint."""
        if beginning.is_resumed:
            tqdm.write(f"[train] {_goes_on(beginning)}", file=sys.stdout)
        self._bar.reset()
        self._bar.initial = self._bar.n = self._bar.last_print_n = beginning.progress.frames

    def show(self, report: IterationReport) -> None:
        """One iteration is done."""
        if report.episodes.num_episodes:
            self._bar.set_postfix_str(f"return {report.episodes.episode_return_mean:.3f}", refresh=False)
        self._bar.update(report.progress.frames - self._bar.n)


@contextmanager
def training_progress(config: CollectionConfig) -> Iterator[ProgressLines | ProgressBar]:
    """What shows training as it goes; the block tells it of the start and of iterations."""
    if not sys.stdout.isatty():
        yield ProgressLines(config)
        return
    with _bar(config.num_iterations * config.frames_per_batch) as bar:
        yield ProgressBar(bar)


def _bar(total: int) -> "tqdm[Any]":
    columns, lines = get_terminal_size()  # a usual size where the terminal says 0 x 0, when tqdm shows nothing
    return tqdm(
        total=total,
        unit=" frames",
        unit_scale=True,
        desc="train",
        bar_format="{desc} {percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt}, {rate_fmt}, {remaining} left{postfix}",
        file=sys.stdout,
        ncols=columns,
        nrows=lines,
    )


def _goes_on(beginning: TrainingStarted) -> str:
    progress = beginning.progress
    return (
        f"goes on after {progress.frames:,} frames ({progress.iteration} iterations), attempt {beginning.attempt}"
    )


def _return(latest: Episodes | None) -> str:
    if latest is None:
        return "no episode ended yet"
    low, high = latest.episode_return_min, latest.episode_return_max
    return f"return {latest.episode_return_mean:.3f} ({low:.2f} .. {high:.2f})"


def _evaluation(report: IterationReport) -> str:
    evaluated = report.evaluation_return_mean
    return "" if math.isnan(evaluated) else f"  evaluated {evaluated:.3f}"
