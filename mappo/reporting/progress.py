"""The progress of training: a bar on a terminal, lines everywhere else."""

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
from mappo.training.history import Episodes, IterationReport, TrainingStarted, by_group

_SECONDS_BETWEEN_LINES = 5.0


class ProgressLines:
    """The progress of training as lines for logs, printed every few seconds and after every evaluation."""

    def __init__(self, config: CollectionConfig):
        self._total = config.num_iterations * config.frames_per_batch
        self._start = time.monotonic()
        self._frames_before: int | None = None  # frames of the run before the first report
        self._last_print = -_SECONDS_BETWEEN_LINES
        self._episodes: Episodes | None = None  # the latest completed episodes
        self._frames_per_batch = config.frames_per_batch

    def begin(self, start: TrainingStarted) -> None:
        """Show that training starts, or resumes from a checkpoint."""
        if start.is_resumed:
            say("train", _resumed(start))
        self._start = time.monotonic()

    def show(self, report: IterationReport) -> None:
        """Show a completed iteration."""
        frames, current = report.progress.frames, time.monotonic()
        if self._frames_before is None:
            self._frames_before = frames - self._frames_per_batch
        self._episodes = report.episodes if report.episodes.num_episodes else self._episodes
        is_due = current - self._last_print >= _SECONDS_BETWEEN_LINES
        if not is_due and frames < self._total and math.isnan(report.evaluation_return_mean):
            return
        self._last_print = current
        seconds_left = (current - self._start) / (frames - self._frames_before) * (self._total - frames)
        say(
            "train",
            f"{frames:>{len(f'{self._total:,}')},} of {self._total:,} frames  {_return(self._episodes)}"
            f"{_evaluation(report)}  {report.frames_per_second:,.0f} frames/s  {seconds_left:.0f} s left",
        )


class ProgressBar:
    """The progress of training as a bar on a terminal."""

    def __init__(self, bar: "tqdm[Any]"):
        self._bar = bar

    def begin(self, start: TrainingStarted) -> None:
        """Show that training starts, or resumes from a checkpoint."""
        if start.is_resumed:
            tqdm.write(f"[train] {_resumed(start)}", file=sys.stdout)
        self._bar.reset()
        self._bar.initial = self._bar.n = self._bar.last_print_n = start.progress.frames

    def show(self, report: IterationReport) -> None:
        """Show a completed iteration."""
        if report.episodes.num_episodes:
            returns = by_group(report.episodes.by_group, "episode_return_mean")
            text = " ".join(f"{group} {value:.3f}" for group, value in returns.items())
            mean = f"return {report.episodes.episode_return_mean:.3f}"
            self._bar.set_postfix_str(text or mean, refresh=False)
        self._bar.update(report.progress.frames - self._bar.n)


@contextmanager
def training_progress(config: CollectionConfig) -> Iterator[ProgressLines | ProgressBar]:
    """Open a progress display; its `begin` and `show` are listeners for the start and for every iteration."""
    if not sys.stdout.isatty():
        yield ProgressLines(config)
        return
    with _bar(config.num_iterations * config.frames_per_batch) as bar:
        yield ProgressBar(bar)


def _bar(total: int) -> "tqdm[Any]":
    columns, lines = get_terminal_size()  # some terminals report 0 x 0, and tqdm would then show nothing
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


def _resumed(start: TrainingStarted) -> str:
    progress = start.progress
    return f"resumed after {progress.frames:,} frames ({progress.iteration} iterations), attempt {start.attempt}"


def _return(episodes: Episodes | None) -> str:
    if episodes is None:
        return "no completed episode yet"
    if returns := by_group(episodes.by_group, "episode_return_mean"):
        return "return " + ", ".join(f"{group} {value:.3f}" for group, value in returns.items())
    low, high = episodes.episode_return_min, episodes.episode_return_max
    return f"return {episodes.episode_return_mean:.3f} ({low:.2f} .. {high:.2f})"


def _evaluation(report: IterationReport) -> str:
    mean = report.evaluation_return_mean
    return "" if math.isnan(mean) else f"  evaluated {mean:.3f}"
