"""How a contender tells what its iterations took, and waits in between; nothing of mappo is imported."""

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
    """The clock of a training, which stands still while the other side looks at what is written down."""

    def __init__(self, directory: Path):
        self._directory = directory
        self._started, self._paused = time.perf_counter(), 0.0
        self._utilisation: _Utilisation | None = None  # of the iterations after the first

    def iteration(
        self,
        frames: int,
        collect_seconds: float,
        learn_seconds: float,
        weights: Mapping[str, torch.Tensor] | None = None,
        evaluation: tuple[float, float] | None = None,
    ) -> None:
        """Write a line, and wait for one. `evaluation`: a mean return, and how many of the seconds it took."""
        now = time.perf_counter()
        evaluation_seconds = evaluation[1] if evaluation else 0.0
        self._paused += evaluation_seconds
        line: dict[str, Any] = {
            "frames": frames,
            "seconds": now - self._started - self._paused,
            "collect_seconds": collect_seconds,
            "learn_seconds": learn_seconds,
            "peak_memory_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
            "gpu_utilisation": self._utilisation and self._utilisation.mean(now - evaluation_seconds),
            "evaluation_return": evaluation[0] if evaluation else None,
        }
        if weights is not None:
            torch.save({name: value.detach() for name, value in weights.items()}, self._directory / "policy.pt")
        print(json.dumps(line), flush=True)
        if not sys.stdin.readline():
            sys.exit(0)
        self._paused += time.perf_counter() - now
        if torch.cuda.is_available():
            self._utilisation = self._utilisation or _Utilisation()
            self._utilisation.begin()


class _Utilisation:
    """Percent of the time in which a GPU runs anything, as its driver samples it."""

    def __init__(self) -> None:
        what = ("--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "--loop-ms=50")
        command = ["nvidia-smi", "--id=0", *what]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self._samples: list[tuple[float, float]] = []  # when, and how much
        Thread(target=self._read, daemon=True).start()

    def begin(self) -> None:
        self._samples.clear()

    def mean(self, until: float) -> float | None:
        """Since the beginning; None where no sample was taken."""
        values = [value for when, value in list(self._samples) if when <= until]
        return sum(values) / len(values) if values else None

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.strip().isdigit():  # some GPUs do not say
                self._samples.append((time.perf_counter(), float(line)))
