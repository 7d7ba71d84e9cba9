"""How a contender tells what its iterations took, and waits in between; nothing of mappo is imported."""

import json
import resource
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch


class Progress:
    """The clock of a training, which stands still while the other side looks at what is written down."""

    def __init__(self, directory: Path):
        self._directory = directory
        self._started, self._paused = time.perf_counter(), 0.0

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
        if evaluation:
            self._paused += evaluation[1]
        line: dict[str, Any] = {
            "frames": frames,
            "seconds": now - self._started - self._paused,
            "collect_seconds": collect_seconds,
            "learn_seconds": learn_seconds,
            "peak_memory_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
            "evaluation_return": evaluation[0] if evaluation else None,
        }
        if weights is not None:
            torch.save({name: value.detach() for name, value in weights.items()}, self._directory / "policy.pt")
        print(json.dumps(line), flush=True)
        if not sys.stdin.readline():
            sys.exit(0)
        self._paused += time.perf_counter() - now
