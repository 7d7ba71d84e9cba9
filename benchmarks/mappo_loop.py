"""Train with this project's trainer and report progress as the other contenders do.

python -m benchmarks.mappo_loop SETTINGS DIRECTORY
"""

import math
import sys
from pathlib import Path

import torch

from benchmarks.progress import Progress
from mappo.config import from_json
from mappo.runs.run import Run
from mappo.training.history import HistoryFile, IterationReport
from mappo.training.training import train


def main() -> None:
    """Train and report every iteration."""
    config, directory = from_json(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(config.threads or torch.get_num_threads())
    progress = Progress(directory)

    def on_report(report: IterationReport) -> None:
        value = report.evaluation_return_mean
        evaluation = None if math.isnan(value) else (value, report.evaluate_seconds)
        progress.report_iteration(
            report.progress.frames, report.collect_seconds, report.learn_seconds, evaluation=evaluation
        )

    train(config, Run.at(directory / "run"), HistoryFile(directory / "history.csv"), on_report)


if __name__ == "__main__":
    main()
