"""Train recipes, evaluate their best checkpoints, and print times and returns.

    python -m benchmarks.recipes navigation swarm --seeds 0,1,2
    python -m benchmarks.recipes navigation --save                keep the result, which `mappo recipes` shows

Flags after the recipes change their configurations, as in `mappo train`. Times are wall-clock times of training on
this machine; returns are means over the episodes of the evaluation stage, with their 95 % intervals.
"""

import argparse
import json
import sys
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory

from mappo.cli.arguments import add_config_arguments, changes_from_arguments, dashed
from mappo.config import ExperimentConfig, override, to_json
from mappo.recipes import RECIPES, recipe
from mappo.reporting.recipe_results import FILE, RecipeResult, changes_of_recipe, recipe_results
from mappo.stages.evaluate import evaluate
from mappo.stages.train import train
from mappo.strict_json import checked


def main() -> None:
    """Print one line for each recipe and seed; save the results if asked to."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.recipes",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_config_arguments(parser, with_recipe=False)
    parser.usage = "%(prog)s RECIPE [RECIPE ...] [--seeds N,N,...] [--save] [--SECTION.FIELD VALUE ...]"
    parser.add_argument("recipes", nargs="+", choices=RECIPES, metavar="RECIPE")
    parser.add_argument("--seeds", default="0", metavar="N,N,...", help="training seeds (default: 0)")
    parser.add_argument("--save", action="store_true", help="save the results of unchanged recipes, with one seed")
    arguments = parser.parse_args(dashed(sys.argv[1:]))
    changes, seeds = changes_from_arguments(arguments), arguments.seeds.split(",")
    if arguments.save and (len(seeds) > 1 or any(changes)):
        parser.error("--save: give one seed and no other settings")
    lines = []
    for name in arguments.recipes:
        for seed in seeds:
            result = _measure(name, override(recipe(name), *changes, {"seed": int(seed)}))
            lines.append(f"{name} {seed}: {result.line(result.frames)}")
            if arguments.save:
                _save(name, result)
    print("\n" + "\n".join(lines))


def _measure(name: str, config: ExperimentConfig) -> RecipeResult:
    with TemporaryDirectory() as directory:
        run = Path(directory)
        trained = train(to_json(config), run, run / "history.csv").metrics
        evaluate(to_json(config), run, run / "report")
        report = json.loads((run / "report").read_text())
    means = {
        policy: report[policy]["mean"] if report[policy] else None for policy in ("trained", "random", "heuristic")
    }
    record = {
        "changes": changes_of_recipe(name),
        "seed": config.seed,
        "frames": int(trained["frames"]),
        "seconds": round(trained["elapsed_seconds"], 1),
        **means,
    }
    return checked(RecipeResult, record)


def _save(name: str, result: RecipeResult) -> None:
    results = recipe_results() | {name: result}
    records = {key: asdict(results[key]) for key in RECIPES if key in results}
    Path(str(files("mappo.reporting") / FILE)).write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()
