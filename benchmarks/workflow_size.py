"""Print the size of a run's workflow, and how many seeds, workers and cells fit in one (docs/kubeflow.md).

python -m benchmarks.workflow_size
"""

import json
from pathlib import Path
from typing import Any

from mappo.config import to_json
from mappo.matrix.matrix import matrix_from_json, matrix_json
from mappo.recipes import navigation
from pipelines.compiling import compile_pipeline
from pipelines.site import Site
from pipelines.sizes import MAX_BYTES, workflow_bytes

_MATRIX = Path(__file__).with_name("matrix.yaml")


def main() -> None:
    """Print the estimates that `submit` makes."""
    site, config = Site(image="ghcr.io/you/mappo:1.0"), to_json(navigation())
    seeds = compile_pipeline("seeds", site, {"config": config, "seeds": ["0"]}).body
    study = compile_pipeline("tuning", site, {"config": config, "study": "a"}).body
    for count in (20, 40, 60):
        print(f"{count:>3} seeds: {workflow_bytes(seeds, _seeds(count)):>9,} bytes of {MAX_BYTES:,}")
    bytes_per_seed = (workflow_bytes(seeds, _seeds(60)) - workflow_bytes(seeds, _seeds(20))) / 40
    print(f"each further seed: {bytes_per_seed:,.0f} bytes, compressed")
    max_seeds = max(count for count in range(1, 200) if workflow_bytes(seeds, _seeds(count)) <= MAX_BYTES)
    print(f"at most {max_seeds} seeds")
    workers = [str(worker) for worker in range(8)]
    possible_counts = [
        count
        for count in range(2, 60)
        if workflow_bytes(study, {"study": "a", "workers": workers, "study_config": _retraining(count)})
        <= MAX_BYTES
    ]
    print(f"a study with 8 workers: at most {max(possible_counts)} seeds for the best and as many for the default")
    text = matrix_json(_MATRIX)
    cells = [cell.name for cell in matrix_from_json(text).cells]
    matrix = compile_pipeline("matrix", site, {}).body
    sizes = {
        count: workflow_bytes(matrix, {"matrix": text, "cells": cells[:count], "store": "s3://bucket/runs"})
        for count in (20, len(cells))
    }
    print(f"the {len(cells)} cells of {_MATRIX.name}: {sizes[len(cells)]:,} bytes")
    print(f"each further cell: {(sizes[len(cells)] - sizes[20]) / (len(cells) - 20):,.0f} bytes, compressed")


def _retraining(num_seeds: int) -> str:
    return json.dumps({"retraining": {"num_seeds": num_seeds}})


def _seeds(count: int) -> dict[str, Any]:
    return {"seeds": [str(seed) for seed in range(count)]}


if __name__ == "__main__":
    main()
