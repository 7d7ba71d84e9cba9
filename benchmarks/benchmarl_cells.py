"""Train BenchMARL's MAPPO on the tasks of a matrix, evaluate it as the matrix does, and write the cells as CSV.

    python -m benchmarks.benchmarl_cells benchmarks/matrix.yaml --tasks balance,wheel --output cells.csv
    python -m benchmarks.benchmarl_cells benchmarks/groups.yaml --equal --output cells.csv
    mappo matrix table benchmarks/matrix.yaml --results cells.csv

BenchMARL trains with its own environment for the frames of the task's first algorithm: with its base
configuration, or, with `--equal`, with the sizes, epochs and coefficients of that algorithm, as far as
BenchMARL has them. The last policy plays the episodes of the matrix's evaluation, in the same mode. Each cell
is written when it is done, and a cell of the file is not trained again: the same command continues.
"""

import argparse
import os
import platform
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from benchmarks.contenders import Contender, policy_with
from mappo.config import ExperimentConfig, config_hash
from mappo.environment.random_streams import Stream
from mappo.evaluation import statistics
from mappo.evaluation.episodes import play_episodes
from mappo.evaluation.measurements import Measurer, terminations
from mappo.matrix.cell_result import CellResult
from mappo.matrix.matrix import Cell, Matrix, episodes_hash, read_matrix
from mappo.matrix.results_file import cells_csv, read_foreign
from mappo.recipes import recipe

ALGORITHM = "benchmarl"


def main() -> None:
    """Train the cells that the output file lacks, one after the other."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.benchmarl_cells",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="the file of the matrix")
    parser.add_argument("--tasks", default="", metavar="NAME,...", help="tasks to train (default: all)")
    parser.add_argument("--seeds", default="0,1", metavar="N,N,...", help="training seeds (default: 0,1)")
    parser.add_argument("--equal", action="store_true", help="train with the hyperparameters of the matrix")
    parser.add_argument("--output", type=Path, required=True, metavar="CSV", help="the cells, and those to keep")
    arguments = parser.parse_args()
    matrix = read_matrix(arguments.file)
    tasks = arguments.tasks.split(",") if arguments.tasks else [task.name for task in matrix.tasks]
    rows = read_foreign([arguments.output] if arguments.output.exists() else [], matrix).rows
    results = list(rows.values())
    for seed in map(int, arguments.seeds.split(",")):
        for task in tasks:
            if (task, ALGORITHM, seed) not in rows:
                results.append(_train(matrix, task, seed, arguments.equal))
                arguments.output.write_text(cells_csv(results))
                print(f"{task} {seed}: return {results[-1].return_mean:.3g}", flush=True)


def _train(matrix: Matrix, task: str, seed: int, is_equal: bool) -> CellResult:
    config = _config(next(cell for cell in matrix.cells if cell.task == task), seed, is_equal)
    with TemporaryDirectory() as directory:
        contender = Contender("BenchMARL", config, Path(directory) / "run", os.environ)
        try:
            iteration = contender.run_iteration()
            while iteration.frames < config.collection.total_frames:
                iteration = contender.run_iteration()
            weights = torch.load(Path(directory) / "run" / "policy.pt")
        finally:
            contender.stop()
    return _evaluated(matrix, task, config, weights, iteration.frames, iteration.seconds)


def _config(cell: Cell, seed: int, is_equal: bool) -> ExperimentConfig:
    """Return the configuration of BenchMARL for the task, the frames and the evaluation of a cell."""
    base, own = recipe("benchmarl-base"), cell.config
    trained = own if is_equal else base
    return replace(
        base,
        environment=own.environment,
        evaluation=own.evaluation,
        learner=trained.learner,
        collection=replace(trained.collection, total_frames=own.collection.total_frames),
        seed=seed,
        threads=own.threads,
    )


def _evaluated(
    matrix: Matrix,
    task: str,
    config: ExperimentConfig,
    weights: dict[str, torch.Tensor],
    frames: int,
    seconds: float,
) -> CellResult:
    policy, measurer = policy_with(config, weights), Measurer()
    returns, lengths = play_episodes(
        lambda _: policy, config, config.evaluation, Stream.EVALUATION, measurer.measure_frame
    )
    measured = measurer.measurements(statistics.plain_mean)
    measured |= terminations(lengths, config.environment.max_episode_frames, statistics.plain_mean)
    means = {name: each.mean.value for name, each in measured.items() if each.mean}
    columns = matrix.task(task)
    return CellResult(
        *(task, ALGORITHM, config.seed, "done"),
        return_mean=sum(returns) / len(returns),
        success=means.get(columns.success),
        collisions=means.get(columns.collisions),
        frames=frames,
        final_frames=frames,
        judged_frames=frames,
        seconds=seconds,
        hardware=f"cpu ({platform.machine()})",
        threads=config.threads,
        versions=f"benchmarl={_version()} vmas={version('vmas')}",
        config_hash=config_hash(config),
        evaluation_hash=episodes_hash(config),
        measurements=means,
    )


def _version() -> str:
    """Return the version of BenchMARL that its environment has."""
    requirements = Path("benchmarks/requirements-benchmarl.txt").read_text()
    return next(line.partition("==")[2] for line in requirements.splitlines() if line.startswith("benchmarl=="))


if __name__ == "__main__":
    main()
