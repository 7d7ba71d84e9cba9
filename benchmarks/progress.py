"""The reports of a contender, which waits after each iteration; this module imports nothing of mappo."""

import json
import resource
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from threading import Thread
from typing import Any

import torch


class Progress:
    """The clock and the reports of a training; the clock stops while the training waits for its next turn."""

    def __init__(self, directory: Path):
        self._directory = directory
        self._start_time, self._paused = time.perf_counter(), 0.0
        self._utilisation: _Utilisation | None = None  # starts after the first iteration

    def report_iteration(
        self,
        frames: int,
        collect_seconds: float,
        learn_seconds: float,
        weights: Mapping[str, torch.Tensor] | None = None,
        evaluation: tuple[float, float] | None = None,
    ) -> None:
        """Write a line of JSON and wait for a line, which starts the next iteration.

        evaluation: the mean return of an evaluation and its duration in seconds, which the clock leaves out.
        """
        learn_end = time.perf_counter()
        evaluation_seconds = evaluation[1] if evaluation else 0.0
        self._paused += evaluation_seconds
        line: dict[str, Any] = {
            "frames": frames,
            "seconds": learn_end - self._start_time - self._paused,
            "collect_seconds": collect_seconds,
            "learn_seconds": learn_seconds,
            "peak_memory_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
            "gpu_utilisation": self._utilisation and self._utilisation.mean(learn_end - evaluation_seconds),
            "evaluation_return": evaluation[0] if evaluation else None,
        }
        if weights is not None:
            torch.save({name: value.detach() for name, value in weights.items()}, self._directory / "policy.pt")
        print(json.dumps(line), flush=True)
        if not sys.stdin.readline():
            sys.exit(0)
        self._paused += time.perf_counter() - learn_end
        if torch.cuda.is_available():
            self._utilisation = self._utilisation or _Utilisation()
            self._utilisation.begin()


class _Utilisation:
    """The percentage of time in which the GPU was busy, as its driver samples it."""

    def __init__(self) -> None:
        query = ("--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "--loop-ms=50")
        command = ["nvidia-smi", "--id=0", *query]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self._samples: list[tuple[float, float]] = []  # time and percentage
        Thread(target=self._read, daemon=True).start()

    def begin(self) -> None:
        self._samples.clear()

    def mean(self, until: float) -> float | None:
        """Return the mean of the samples since `begin` and up to `until`, or None without a sample."""
        values = [value for sample_time, value in list(self._samples) if sample_time <= until]
        return sum(values) / len(values) if values else None

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.strip().isdigit():  # some GPUs report no utilisation
                self._samples.append((time.perf_counter(), float(line)))
