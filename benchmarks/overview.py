"""Measure how long `mappo runs` takes on a store of many runs: the first look, and looks after it.

    python -m benchmarks.overview runs-of-benchmark                     a directory, which must be empty
    python -m benchmarks.overview s3://bucket/prefix --runs 1000        a bucket, by the credentials of boto3

One small run is trained and evaluated. The others are copies of it that name other processors, so that no two
manifests are equal. The parts of their checkpoints, of which a look reads none, are empty. Each look is a process
of its own, as a user starts it; the first finds an empty cache.
"""

import argparse
import hashlib
import os
import resource
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

from mappo.config import override, to_json
from mappo.recipes import recipe
from mappo.runs.checkpoint_ref import CheckpointRef
from mappo.runs.locations import joined, open_store
from mappo.stages.evaluate import evaluate
from mappo.stages.train import train

_SMALL = {
    "networks": {"hidden_sizes": [16]},
    "learner": {"epochs": 1},
    "collection": {"total_frames": 24_000},
    "selection": {"interval_iterations": 1},
}
_THREADS = 10  # that write the copies
_LOOKS = 3


def main() -> None:
    """Fill the store and print a line for each look."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.overview",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("store", metavar="STORE", help="an empty directory, or s3://bucket/prefix without keys")
    parser.add_argument("--runs", type=int, default=1_000, metavar="N", help="runs in the store (default: 1000)")
    arguments = parser.parse_args()
    if open_store(arguments.store).entries():
        parser.error(f"{arguments.store} is not empty")
    with TemporaryDirectory() as directory:
        files = _trained_run(Path(directory) / "run")
        with ThreadPoolExecutor(_THREADS) as threads:
            names = [f"run-{number:04d}" for number in range(arguments.runs)]
            list(threads.map(lambda name: _copy(files, arguments.store, name), names))
        print(f"{arguments.runs} runs, {arguments.runs * len(files):,} files", flush=True)
        for number in range(1, _LOOKS + 1):
            seconds, cpu_seconds = _look(arguments.store, Path(directory))
            print(f"look {number}: {seconds:.1f} s, of CPU {cpu_seconds:.1f} s", flush=True)


def _trained_run(run: Path) -> dict[str, bytes]:
    """Train and evaluate a small run; return its files by key."""
    config = to_json(override(recipe("navigation"), _SMALL))
    train(config, run, run.parent / "history.csv")
    evaluate(config, run, keep_at=str(run))
    return {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*") if path.is_file()}


def _copy(files: dict[str, bytes], store: str, name: str) -> None:
    """Write the files of a run under a name; each manifest names another processor, and has a hash of its own."""
    run = open_store(joined(store, name))
    for key, content in files.items():
        if ref := CheckpointRef.from_key(key):
            content = content.replace(b'"cpu": "', b'"cpu": "%s, ' % name.encode())
            key = key.replace(ref.sha256, hashlib.sha256(content).hexdigest())
        run.write(key, b"" if key.startswith("blobs/") else content)


def _look(store: str, cache: Path) -> tuple[float, float]:
    """Return the seconds that `mappo runs` takes, and those of CPU time."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    command = [sys.executable, "-m", "mappo", "runs", store, "--output", "json"]
    subprocess.run(
        command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "XDG_CACHE_HOME": str(cache)}
    )
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    main()
