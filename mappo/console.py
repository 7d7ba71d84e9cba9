"""What a stage shows: a progress bar on a terminal, plain readable lines anywhere else."""

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from shutil import get_terminal_size
from typing import Any

from tqdm import tqdm

from mappo.checkpoint import Checkpoint
from mappo.compare import ComparisonReport
from mappo.config import CollectionConfig, ExperimentConfig, config_hash
from mappo.environment import resolve_device
from mappo.evaluate import EpisodeReturns
from mappo.history import Episodes, IterationReport
from mappo.resources import gibibytes
from mappo.statistics import Estimate
from mappo.train import Start
from mappo.validate import Check

_SECONDS_BETWEEN_LINES = 5.0


def say(stage: str, message: str) -> None:
    """Print one line of a stage; `[stage]` in front tells it from what libraries print."""
    print(f"[{stage}] {message}", flush=True)


def estimate(value: Estimate) -> str:
    """An estimate with its interval, as in `0.98 [0.96, 1.00]`."""
    interval = "" if value.low is None else f" [{value.low:.3g}, {value.high:.3g}]"
    return f"{value.value:.3g}{interval}"


def comparison_table(report: ComparisonReport) -> list[str]:
    """A line for each baseline and configuration, and what the intervals mean."""
    baselines = {"random": report.random, "heuristic": report.heuristic}
    lines = [
        f"{name:<9} {estimate(returns.mean):<24} evaluation episodes"
        for name, returns in baselines.items()
        if returns
    ]
    for number, configuration in enumerate(report.configurations, start=1):
        name = "trained" if len(report.configurations) == 1 else f"trained {number}"
        seeds = ", ".join(
            f"{seed}: {value:.3g}"
            for seed, value in zip(configuration.training_seeds, configuration.episode_returns, strict=True)
        )
        lines.append(f"{name:<9} {estimate(configuration.mean):<24} training seeds  {seeds}")
        if configuration.gain:
            changed = ", ".join(f"{name} = {change}" for name, change in configuration.differs.items())
            lines.append(f"{'':<9} {estimate(configuration.gain)} more than trained 1; {changed}")
    return [*lines, f"intervals of trained policies: {report.intervals}"]


def say_check(check: Check) -> None:
    """One line of the validation."""
    say("validate", f"{check.outcome:<7}  {check.name:<13}  {check.detail}")


def say_plan(config: ExperimentConfig, threads: int, start: Start | None) -> None:
    """What is about to be trained, on what."""
    collection = config.collection
    frames = collection.num_iterations * collection.frames_per_batch
    say(
        "train",
        f"{config.environment.scenario}: {frames:,} frames in {collection.num_iterations} iterations of "
        f"{collection.frames_per_batch:,} ({collection.num_envs} environments x {collection.rollout_frames}) "
        f"on {resolve_device(config.device)}, {threads} CPU thread{'s' * (threads > 1)}, seed {config.seed}, "
        f"configuration {config_hash(config)[:12]}",
    )
    if frames != collection.total_frames:
        say("train", f"total_frames = {collection.total_frames:,} was rounded up to whole iterations")
    if start:
        done = start.checkpoint
        begins = "goes on after" if start.kind == "extend" else "begins with the networks of a run after"
        say("train", f"{begins} {done.frames:,} frames, configuration {config_hash(done.config)[:12]}")


def say_trained(final: IterationReport, chosen: Checkpoint, last: Path, best: Path) -> None:
    """What training took and where its checkpoints are."""
    gpu = f", {gibibytes(final.peak_gpu_memory_bytes)} of the GPU's" if final.peak_gpu_memory_bytes else ""
    say(
        "train",
        f"{final.progress.frames:,} frames in {final.elapsed_seconds:.1f} s; "
        f"peak memory {gibibytes(final.peak_memory_bytes)}{gpu}",
    )
    by = (
        "no evaluation during training"
        if chosen.selection_return is None
        else f"mean return {chosen.selection_return:.3g} in evaluation"
    )
    say("train", f"saved the last checkpoint: {last}")
    say("train", f"saved the best, after {chosen.frames:,} frames ({by}): {best}")


def returns_line(policy: str, returns: EpisodeReturns) -> str:
    """What one policy earned in the evaluation."""
    return (
        f"{policy:<8} mean return {estimate(returns.mean)}  "
        f"interquartile mean {estimate(returns.interquartile_mean)}  "
        f"{len(returns.episode_returns)} episodes of {returns.episode_frames_mean:.0f} frames"
    )


@contextmanager
def training_progress(config: CollectionConfig, already: int) -> Iterator[Callable[[IterationReport], None]]:
    """Show training as it goes, after the frames done already; the block gets what to call with reports."""
    total = config.num_iterations * config.frames_per_batch
    if not sys.stdout.isatty():
        yield _line_printer(total, already)
        return
    with _bar(total, already) as bar:
        yield lambda report: _advance(bar, report)


def _bar(total: int, already: int) -> "tqdm[Any]":
    columns, lines = get_terminal_size()  # a usual size where the terminal says 0 x 0, when tqdm shows nothing
    return tqdm(
        total=total,
        initial=already,
        unit=" frames",
        unit_scale=True,
        desc="train",
        bar_format="{desc} {percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt}, {rate_fmt}, {remaining} left{postfix}",
        file=sys.stdout,
        ncols=columns,
        nrows=lines,
    )


def _advance(bar: "tqdm[Any]", report: IterationReport) -> None:
    if report.episodes.num_episodes:
        bar.set_postfix_str(f"return {report.episodes.episode_return_mean:.3f}", refresh=False)
    bar.update(report.progress.frames - bar.n)


def _line_printer(total: int, already: int) -> Callable[[IterationReport], None]:
    printed = -_SECONDS_BETWEEN_LINES
    episodes: Episodes | None = None  # the latest that ended

    def show(report: IterationReport) -> None:
        nonlocal printed, episodes
        episodes = report.episodes if report.episodes.num_episodes else episodes
        frames, now = report.progress.frames, time.monotonic()
        if now - printed < _SECONDS_BETWEEN_LINES and frames < total and math.isnan(report.evaluation_return_mean):
            return
        printed = now
        left = report.elapsed_seconds / (frames - already) * (total - frames)
        say(
            "train",
            f"{frames:>{len(f'{total:,}')},} of {total:,} frames  {_return(episodes)}{_evaluation(report)}  "
            f"{report.frames_per_second:,.0f} frames/s  {left:.0f} s left",
        )

    return show


def _return(latest: Episodes | None) -> str:
    if latest is None:
        return "no episode ended yet"
    low, high = latest.episode_return_min, latest.episode_return_max
    return f"return {latest.episode_return_mean:.3f} ({low:.2f} .. {high:.2f})"


def _evaluation(report: IterationReport) -> str:
    evaluated = report.evaluation_return_mean
    return "" if math.isnan(evaluated) else f"  evaluated {evaluated:.3f}"
