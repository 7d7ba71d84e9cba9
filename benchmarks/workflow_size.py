"""Print the size of a run's workflow, and how many seeds and workers fit in one (docs/kubeflow.md).

python -m benchmarks.workflow_size
"""

import json
from typing import Any

from mappo.config import to_json
from mappo.recipes import navigation
from pipelines.compiling import compile_pipeline
from pipelines.site import Site
from pipelines.sizes import MAX_BYTES, workflow_bytes


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


def _retraining(num_seeds: int) -> str:
    return json.dumps({"retraining": {"num_seeds": num_seeds}})


def _seeds(count: int) -> dict[str, Any]:
    return {"seeds": [str(seed) for seed in range(count)]}


if __name__ == "__main__":
    main()
