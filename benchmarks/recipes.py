"""Train recipes with several seeds, evaluate them, and print a table of times and returns.

    python -m benchmarks.recipes navigation swarm --seeds 0,1,2

Flags after the recipes change their configurations, as in `mappo train`. Times are wall-clock times on this
machine; returns are the results of the evaluation stage for the best checkpoint.
"""

import argparse
import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from mappo.cli.arguments import add_config_arguments, changes_from_arguments, dashed
from mappo.config import override, to_json
from mappo.evaluation.statistics import Estimate
from mappo.recipes import RECIPES, recipe
from mappo.stages.evaluate import evaluate
from mappo.stages.train import train


def main() -> None:
    """Print one line for each recipe and seed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recipes", description=__doc__)
    add_config_arguments(parser, with_recipe=False)
    parser.usage = "%(prog)s RECIPE [RECIPE ...] [--seeds N,N,...] [--SECTION.FIELD VALUE ...]"
    parser.add_argument("recipes", nargs="+", choices=RECIPES, metavar="RECIPE")
    parser.add_argument("--seeds", default="0", metavar="N,N,...", help="training seeds (default: 0)")
    arguments = parser.parse_args(dashed(sys.argv[1:]))
    rows = []
    for name in arguments.recipes:
        for seed in arguments.seeds.split(","):
            config = override(recipe(name), *changes_from_arguments(arguments), {"seed": int(seed)})
            rows.append(f"{name:<20} {seed:>4}  {_measure(to_json(config))}")
    print(f"\n{'recipe':<20} seed  {'frames':>10} {'seconds':>8} {'frames/s':>9}  random, heuristic, trained")
    print("\n".join(rows))


def _measure(config: str) -> str:
    with TemporaryDirectory() as directory:
        run = Path(directory)
        trained = train(config, run, run / "history.csv").metrics
        evaluate(config, run, run / "report")
        report = json.loads((run / "report").read_text())
    frames, seconds = trained["frames"], trained["elapsed_seconds"]
    returns = ", ".join(
        _mean(report[policy]) if report[policy] else "none" for policy in ("random", "heuristic", "trained")
    )
    return f"{frames:>10,.0f} {seconds:>8,.0f} {frames / seconds:>9,.0f}  {returns}"


def _mean(returns: dict[str, dict[str, float]]) -> str:
    return str(Estimate(**returns["mean"]))


if __name__ == "__main__":
    main()
