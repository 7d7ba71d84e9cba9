"""Run all benchmarks of speed, one after the other, and write each output and its command to a file.

python -m benchmarks                               the quick form, under 15 minutes on 2 cores: make bench
python -m benchmarks --full                        five seeds, all sizes: hours; existing results are kept
python -m benchmarks --full --output docs/results  the results that the repository publishes
"""

import argparse
import os
import platform
import shlex
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

QUICK = {
    "returns": "benchmarks.returns --seeds 0",
    "throughput-base": "benchmarks.throughput benchmarl-base --iterations 2",
    "simulator": "benchmarks.simulator navigation balance --envs 60 --turns 5",
    "update": "benchmarks.update benchmarl-base --turns 10",
    "startup": "benchmarks.startup --turns 2",
}
_PROCESSES = "'mappo plain,mappo 2 processes'"
FULL = {
    "returns": "benchmarks.returns --seeds 0,1,2,3,4",
    "throughput-base": "benchmarks.throughput benchmarl-base --iterations 6",
    "throughput-fine-tuned": "benchmarks.throughput benchmarl-fine-tuned --iterations 2",
    "throughput-navigation": "benchmarks.throughput navigation --iterations 6",
    "processes": f"benchmarks.throughput navigation --contenders {_PROCESSES} --iterations 6",
    "processes-4096": f"benchmarks.throughput navigation --contenders {_PROCESSES} --learner.epochs 1 "
    "--collection.num-envs 4096 --learner.minibatch-frames 40960 --iterations 4",
    "simulator": "benchmarks.simulator",
    "simulator-one-thread": "benchmarks.simulator --envs 60,4096 --threads 1",
    "update": "benchmarks.update benchmarl-base",
    "update-two-threads": "benchmarks.update benchmarl-base --threads 2",
    "growth": "benchmarks.growth",
    "memory": "benchmarks.growth --iterations 200",
    "startup": "benchmarks.startup",
    "collapse": "benchmarks.collapse navigation-quick --seeds 0,1,2,3,4 --collection.simulation fast "
    "--learner.update fast",
}


def main() -> None:
    """Run the benchmarks; with --full, only those that have no result yet."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--full", action="store_true", help="measure more seeds and sizes; can be resumed")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIRECTORY",
        help="directory of the results (default: runs/bench-quick or runs/bench-full)",
    )
    arguments = parser.parse_args()
    output = arguments.output or Path("runs") / f"bench-{'full' if arguments.full else 'quick'}"
    output.mkdir(parents=True, exist_ok=True)
    for name, command in (FULL if arguments.full else QUICK).items():
        result = output / f"{name}.txt"
        if arguments.full and result.exists():
            print(f"{result} exists already; delete it to measure again", flush=True)
        else:
            _measure(command, result)


def _measure(command: str, result: Path) -> None:
    """Run a benchmark and print its output; write the output to a file if the benchmark succeeds."""
    print(f"\n$ python -m {command}", flush=True)
    start, lines = time.monotonic(), [f"$ python -m {command}\n{_machine()}\n\n"]
    with subprocess.Popen(
        [sys.executable, "-m", *shlex.split(command)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    if process.returncode:
        sys.exit(f"python -m {command}: exit status {process.returncode}")
    lines.append(f"\n({time.monotonic() - start:.0f} s in all)\n")
    result.write_text("".join(lines))


def _machine() -> str:
    """Return a description of this machine and of the versions on which results depend."""
    names = [line.partition(":")[2].strip() for line in _cpuinfo() if line.startswith("model name")]
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "torchrl", "vmas"))
    cpu = names[0] if names else platform.machine()
    return f"{os.cpu_count()} CPUs {cpu}, Python {platform.python_version()}, {versions}"


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


if __name__ == "__main__":
    main()
