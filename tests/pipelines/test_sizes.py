"""Compare estimated sizes of workflows with recordings of a real Kubeflow and with the test server."""

import json
import random
import string
from typing import Any

import pytest
import yaml

from mappo.config import to_json
from mappo.errors import ConfigError
from mappo.matrix.matrix import matrix_from_json
from mappo.recipes import navigation
from pipelines.compiling import Compiled, compile_pipeline
from pipelines.kubeflow.api import Api
from pipelines.kubeflow.client import submit
from pipelines.kubeflow.connection import Connection
from pipelines.kubeflow.submission import Submission
from pipelines.parameter_guards import check_parameters
from pipelines.plan import planned_stages
from pipelines.site import Site
from pipelines.sizes import MAX_BYTES, check_size, workflow_bytes
from tests.support.kubeflow_server import KubeflowServer
from tests.support.recordings import manifest_of, raw

IMAGE = "ghcr.io/you/mappo:1.0"
CONFIG = {"config": to_json(navigation())}
DEFAULTS: dict[str, dict[str, Any]] = {
    "training": CONFIG,
    "seeds": {**CONFIG, "seeds": ["0"]},
    "tuning": {**CONFIG, "study": "a"},
    "matrix": {"store": "s3://bucket/runs"},
}


def matrix(num_tasks: int) -> dict[str, Any]:
    """Return the parameters of a matrix with this number of tasks, 2 algorithms and 5 seeds."""
    tasks = {
        f"balance-{number}": {
            "recipe": "balance",
            "changes": {"environment": {"scenario_kwargs": {"n_agents": 2 + number}}},
        }
        for number in range(num_tasks)
    }
    values = {
        "name": "benchmark",
        "seeds": [0, 1, 2, 3, 4],
        "changes": {"collection": {"total_frames": 300_000}},
        "algorithms": {"mappo": {}, "ippo": {"networks": {"critic": "own"}}},
        "tasks": tasks,
    }
    text = json.dumps(values, separators=(",", ":"))
    return {"matrix": text, "cells": [cell.name for cell in matrix_from_json(text).cells]}


def compiled(name: str, site: Site | None = None) -> Compiled:
    return compile_pipeline(name, site or Site(image=IMAGE), DEFAULTS[name])


def seeds(count: int) -> dict[str, Any]:
    return {"seeds": [str(seed) for seed in range(count)]}


def workflow_at_its_end(compiled: Compiled, parameters: dict[str, Any]) -> dict[str, Any]:
    """Return the workflow of a finished run on the test server, whose nodes are as large as recorded ones."""
    with KubeflowServer() as server:
        api = Api(Connection(endpoint=server.url))
        run = submit(api, Submission(compiled, parameters))
        server.finish(run.run_id)
        answer = json.loads(api.text(f"/apis/v1beta1/runs/{run.run_id}"))
    return manifest_of(answer)


def size_of(manifest: dict[str, Any]) -> int:
    nodes = {name: manifest["status"].get(name) for name in ("nodes", "compressedNodes")}
    return len(json.dumps([manifest["spec"], nodes], separators=(",", ":")))


def retraining(num_seeds: int) -> str:
    """Return the settings of a study that trains its best from this number of seeds, as JSON."""
    return json.dumps({"retraining": {"num_seeds": num_seeds}})


def is_near(estimate: int, actual: int) -> bool:
    """Return whether an estimate is at most 5 % too low, and at most a third too high (which refuses early)."""
    return 0.95 * actual <= estimate <= 1.34 * actual


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("raw-training", {}), ("raw-tuning-compressed", {"study_config": retraining(2), "workers": ["1", "2"]})],
)
def test_estimate_is_near_the_size_in_a_real_kubeflow(name, parameters):
    answer = raw(name)
    documents = list(yaml.safe_load_all(answer["run"]["pipeline_spec"]["pipeline_manifest"]))
    body = dict(zip(("pipeline_spec", "platform_spec"), documents, strict=False))
    assert is_near(workflow_bytes(body, parameters), size_of(manifest_of(answer)))


@pytest.mark.parametrize("count", [1, 20])
def test_estimate_is_near_the_size_on_the_test_server(count):
    pipeline = compiled("seeds")
    actual = size_of(workflow_at_its_end(pipeline, seeds(count)))
    assert is_near(workflow_bytes(pipeline.body, seeds(count)), actual)


def test_estimate_of_a_matrix_is_near_the_size_on_the_test_server():
    pipeline, parameters = compiled("matrix"), matrix(2)
    actual = size_of(workflow_at_its_end(pipeline, parameters))
    assert is_near(workflow_bytes(pipeline.body, parameters), actual)


@pytest.mark.long
def test_workflow_of_130_cells_fits_on_the_test_server():
    assert size_of(workflow_at_its_end(compiled("matrix"), matrix(13))) < MAX_BYTES


def test_documented_number_of_cells_fits_and_is_accepted():
    """docs/kubeflow.md says 150 cells, such as 15 tasks with 2 algorithms and 5 seeds."""
    pipeline = compiled("matrix")
    check_size(pipeline.body, matrix(15))
    check_parameters(pipeline.documents, matrix(15))
    with pytest.raises(ConfigError, match="give fewer seeds, cells or workers"):
        check_size(pipeline.body, matrix(20))


@pytest.mark.long
def test_documented_numbers_of_seeds_and_workers_fit():
    """docs/kubeflow.md says 60 seeds, and a study of 8 workers whose best is trained from 20 seeds."""
    check_size(compiled("seeds").body, seeds(60))
    workers = [str(worker) for worker in range(8)]
    check_size(compiled("tuning").body, {"study": "a", "workers": workers, "study_config": retraining(20)})


def test_run_that_does_not_fit_is_refused_with_its_size():
    with pytest.raises(
        ConfigError, match=rf"grow to about [\d,]+ bytes, .* holds {MAX_BYTES:,}: give fewer seeds"
    ):
        check_size(compiled("seeds").body, seeds(200))


def test_absurd_numbers_are_refused_without_an_estimate():
    with pytest.raises(ConfigError, match="100,000 seeds, cells or workers in one run"):
        check_size(compiled("tuning").body, {"study": "a", "study_config": retraining(100_000)})


def test_long_configuration_lowers_the_number_of_seeds_that_fit():
    config = json.loads(to_json(navigation()))
    config["environment"]["scenario_kwargs"]["map"] = "".join(
        random.Random(0).choices(string.ascii_letters, k=5000)
    )
    pipeline = compile_pipeline("seeds", Site(image=IMAGE), {"config": json.dumps(config), "seeds": ["0"]})
    check_size(compiled("seeds").body, seeds(60))
    with pytest.raises(ConfigError, match="give fewer seeds"):
        check_size(pipeline.body, seeds(60))


def test_plan_has_the_stages_of_every_iteration():
    pipeline = compiled("tuning")
    plan = planned_stages(pipeline.body, {"study": "a", "workers": ["1", "2", "3"]}, unknown_items=4)
    count = [stage.path[-1] for stage in plan].count
    assert {name: count(name) for name in ("prepare", "tune", "train", "evaluate", "report")} == {
        "prepare": 1,
        "tune": 3,
        "train": 8,
        "evaluate": 8,
        "report": 1,
    }


@pytest.mark.parametrize("name", DEFAULTS)
def test_compiled_steps_hold_no_source_and_no_description_of_a_component(name):
    specification = compiled(name).specification
    inner = json.dumps([specification["components"], specification["deploymentSpec"]])
    assert "description" not in inner
    assert "def train(" not in inner
    assert "description" in json.dumps(specification["root"]["inputDefinitions"])  # for the form of a run


@pytest.mark.parametrize("name", DEFAULTS)
def test_compiled_tasks_have_no_unread_input(name):
    specification = compiled(name).specification
    for component in (specification["root"], *specification["components"].values()):
        for task in component.get("dag", {}).get("tasks", {}).values():
            target = specification["components"][task["componentRef"]["name"]]
            declared = target.get("inputDefinitions", {}).get("parameters", {})
            inputs = task.get("inputs", {}).get("parameters", {})
            assert all(name in declared or name.startswith("pipelinechannel--") for name in inputs)
