"""The test server compared with a real one: the same pipelines at the same moments have the same nodes."""

import json
import re
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import cache
from typing import Any

import pytest
import yaml

from mappo.config import to_json
from mappo.recipes import recipe
from pipelines.compiling import compile_pipeline
from pipelines.site import Site
from tests.support.argo import ALWAYS, BEFORE_2_17
from tests.support.kubeflow_driver import Outputs
from tests.support.kubeflow_server import KubeflowServer
from tests.support.recordings import by_name, manifest_of, nodes_of, parameters_of, raw, recording

SEEDS = ["211571803", "184016739"]
PARAMETERS = {
    "training": {"run": "c2", "store": "s3://mappo/runs"},
    "seeds": {"seeds": ["0", "1"]},
    "tuning": {"study": "s2", "workers": ["1", "2"], "store": "s3://mappo/runs"},
}
Drive = Callable[[KubeflowServer, str], object]


@cache
def compiled_now(name: str, labels: int = 1) -> dict[str, Any]:
    """Return a pipeline as this package compiles it, for a site like that of the recordings."""
    site = Site(
        image="localhost/mappo:real", pod_labels={"kueue.x-k8s.io/queue-name": "gpus"} if labels > 1 else {}
    )
    stages = {field.name: getattr(site.stages, field.name) for field in fields(site.stages)}
    quick = {stage: replace(pod, retries=2, backoff_seconds=5) for stage, pod in stages.items()}
    site = replace(site, stages=replace(site.stages, **quick))
    config = {"config": to_json(recipe("navigation"))}
    return compile_pipeline(name, site, config, parallel_seeds=1 if name == "seeds" else 0).body


@cache
def recorded_pipeline(name: str) -> dict[str, Any]:
    """Return the pipeline of a recorded run, as it was compiled at the time of the recording."""
    pipeline = raw(name)["run"]["pipeline_spec"]["pipeline_manifest"]
    return dict(zip(("pipeline_spec", "platform_spec"), yaml.safe_load_all(pipeline), strict=True))


def produce_seeds(task: str, executor_input: dict[str, Any]) -> Outputs:
    return {"parameters": {"seeds": SEEDS}} if task == "choose" else {}


@contextmanager
def started(pipeline: Mapping[str, Any], parameters: Any, **options: Any) -> Iterator[tuple[KubeflowServer, str]]:
    with KubeflowServer(**{"produce": produce_seeds, **options}) as server:
        run = {"display_name": "a", "pipeline_spec": pipeline, "runtime_config": {"parameters": parameters}}
        yield server, call(server, "/apis/v2beta1/runs", run)["run_id"]


def call(server: KubeflowServer, path: str, content: Any = None) -> Any:
    data = None if content is None else json.dumps(content).encode()
    with urllib.request.urlopen(urllib.request.Request(server.url + path, data), timeout=30) as answer:
        return json.loads(answer.read())


def manifest(server: KubeflowServer, run_id: str) -> dict[str, Any]:
    return manifest_of(call(server, f"/apis/v1beta1/runs/{run_id}"))


def named_nodes(workflow: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    return by_name(nodes_of(workflow), workflow["metadata"]["name"])


def comparable(nodes: Mapping[str, Mapping[str, Any]], workflow: str) -> dict[str, dict[str, Any]]:
    """Return the fields of nodes to compare: without times, IDs and fields that the recorder omitted."""
    keys = ("type", "templateName", "phase", "message", "children", "boundary", "hostNodeName")
    return {
        name: {key: node.get(key) for key in keys} | {"displayName": node["displayName"].replace(workflow, "WF")}
        for name, node in nodes.items()
    }


def cancel(server: KubeflowServer, run_id: str) -> None:
    server.reach_driver(run_id, "root")
    call(server, f"/apis/v2beta1/runs/{run_id}:terminate", {})
    server.advance(run_id)


def retry(server: KubeflowServer, run_id: str) -> None:
    server.fail_stage(run_id, "train")
    call(server, f"/apis/v2beta1/runs/{run_id}:retry", {})
    server.wait_stage(run_id, "evaluate")


def preempt(server: KubeflowServer, run_id: str) -> None:
    server.delete_pod(run_id, "train")
    server.wait_stage(run_id, "train")


def lose_worker(server: KubeflowServer, run_id: str) -> None:
    """Delete the pod of worker 0, let worker 1 finish, and let worker 0 run again."""
    server.delete_pod(run_id, "tune[0]")
    server.advance(run_id)


def lose_worker_and_finish(server: KubeflowServer, run_id: str) -> None:
    lose_worker(server, run_id)
    server.finish(run_id)


def message_of(name: str) -> str:
    """Return the message of the waiting pod in a recording."""
    nodes = recording(name)["workflow"]["nodes"].values()
    return next(node["message"] for node in nodes if node["phase"] == "Pending")


def fail_twice(server: KubeflowServer, run_id: str) -> None:
    server.fail_stage(run_id, "train", attempts=2)
    server.reach(run_id, "train")


def lose_pod_and_finish(server: KubeflowServer, run_id: str) -> None:
    server.delete_pod(run_id, "train")
    server.finish(run_id)


ITEM = "iteration-iterations(1:1)(0).iteration-item"
MOMENTS: dict[str, tuple[str, Any, Drive]] = {
    "training-succeeded": ("training", {}, KubeflowServer.finish),
    "training-running": ("training", {}, lambda server, run: server.wait_stage(run, "evaluate")),
    "training-failed-container": ("training", {}, lambda server, run: server.fail_stage(run, "train")),
    "training-failed-retried-always": ("training", {"template_defaults": ALWAYS}, fail_twice),
    "training-pod-deleted": ("training", {}, lambda server, run: server.delete_pod(run, "train")),
    "training-pod-deleted-succeeded": ("training", {}, lose_pod_and_finish),
    "training-out-of-memory": (
        "training",
        {},
        lambda server, run: server.fail_stage(run, "train", reason="OOMKilled"),
    ),
    "training-cancelled-pending": ("seeds", {}, cancel),
    "training-unschedulable": (
        "training",
        {},
        lambda server, run: server.wait_stage(run, "train", message_of("training-unschedulable")),
    ),
    "image-not-found": (
        "training",
        {},
        lambda server, run: server.wait_stage(run, "validate", message_of("image-not-found")),
    ),
    "training-forbidden-secret": ("training", {}, lambda server, run: server.fail_stage(run, "validate")),
    "no-template-defaults-succeeded": ("training", {"template_defaults": BEFORE_2_17}, KubeflowServer.finish),
    "no-template-defaults-failed": (
        "training",
        {"template_defaults": BEFORE_2_17},
        lambda server, run: server.fail_stage(run, "train", attempts=3),
    ),
    "profile-running": ("training", {}, lambda server, run: server.reach(run, "train")),
    "kueue-gated": ("labelled", {}, lambda server, run: server.wait_stage(run, "train")),
    "kueue-preempted": ("labelled", {}, preempt),
    "retried-by-api": ("training", {}, retry),
    "seeds-running": ("seeds", {}, lambda server, run: server.reach_driver(run, ITEM)),
    "seeds-succeeded": ("seeds", {}, KubeflowServer.finish),
    "tuning-worker-deleted": ("tuning", {}, lose_worker),
    "tuning-succeeded": ("tuning", {}, lose_worker_and_finish),
}
# The recordings whose answer of v2beta1 differs from that of the test server, with the reason.
OTHER_RUNS = {
    "training-failed-retried-always": "the controller was restarted, so the run had no state",
    "tuning-succeeded": "task_details stopped at another moment, since they depend on the sizes of nodes",
}


def drive(name: str) -> Any:
    """Drive a pipeline to a recorded moment; return the manifest and the answer of v2beta1 at that moment."""
    pipeline, options, act = MOMENTS[name]
    plain = {"labelled": "training"}.get(pipeline, pipeline)
    with started(compiled_now(plain, 2 if pipeline == "labelled" else 1), PARAMETERS[plain], **options) as (
        server,
        run_id,
    ):
        act(server, run_id)
        return manifest(server, run_id), call(server, f"/apis/v2beta1/runs/{run_id}")


@pytest.mark.parametrize("name", MOMENTS)
def test_nodes_and_answer_of_v2beta1_equal_the_recorded_ones(name):
    workflow, run = drive(name)
    answer = renamed(recording(name)) if MOMENTS[name][0] == "tuning" else recording(name)
    recorded = answer["workflow"]
    expected = comparable(by_name(recorded["nodes"], recorded["name"]), recorded["name"])
    actual = comparable(named_nodes(workflow), workflow["metadata"]["name"])
    assert without_times(actual) == without_times(expected)
    assert workflow["status"]["phase"] == recorded["phase"]
    assert labels_of(workflow["metadata"]) == labels_of(recorded)
    if name not in OTHER_RUNS:
        assert comparable_run(run) == comparable_run(answer["run"])


def renamed(answer: Any) -> Any:
    """Return a recorded study with the present names of its nested pipelines."""
    text = json.dumps(answer).replace("mappo-each-seed-2", "retrain-best")
    return json.loads(text.replace("mappo-each-seed", "retrain-default"))


def labels_of(workflow: Mapping[str, Any]) -> dict[str, str]:
    """Return a workflow's labels without those of its run and of the persistence agent."""
    labels = workflow["labels"]
    return {key: value for key, value in labels.items() if not key.startswith("pipeline/")}


def without_times(nodes: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Replace the time in messages about a deadline, and return the nodes."""
    for node in nodes.values():
        node["message"] = re.sub(r" [-0-9]{10} [:0-9]{8} ", " TIME ", node["message"] or "")
    return nodes


def comparable_run(run: Mapping[str, Any]) -> dict[str, Any]:
    """Return the answer of v2beta1 about a run and its tasks, without times and IDs."""
    tasks = run["run_details"]["task_details"]
    workflow = min((child["pod_name"] for task in tasks for child in task.get("child_tasks", [])), key=len)
    name = workflow.rpartition("-")[0]
    return {
        "state": run["state"],
        "history": [status["state"] for status in run["state_history"]],
        "is_finished": run["finished_at"] > "1970-01-01T00:00:00Z",
        "tasks": sorted(
            (task["display_name"].replace(name, "WF"), task.get("state", ""), len(task.get("child_tasks", [])))
            for task in tasks
        ),
        "keys": sorted({key for task in tasks for key in task}),
        "ends": sum(task["end_time"] == "0001-01-01T00:00:00Z" for task in tasks),
    }


@pytest.mark.parametrize("name", OTHER_RUNS)
def test_state_of_the_run_is_the_recorded_one_when_its_tasks_differ(name):
    _, run = drive(name)
    assert run["state"] == recording(name)["run"]["state"]


def test_run_of_a_schedule_equals_the_recorded_one():
    """The run has the name of its workflow and no service account, and nothing is replaced in its parameters."""
    recorded_run = recording("schedule-first-run")
    at = int(recorded_run["workflow"]["labels"]["scheduledworkflows.kubeflow.org/workflowEpoch"])
    with KubeflowServer() as server:
        job = call(server, "/apis/v2beta1/recurringruns", schedule(recorded_run["run"]["runtime_config"]))
        run_id = server.fire(job["recurring_run_id"], at)
        server.fail_stage(run_id, "train")
        workflow, run = manifest(server, run_id), call(server, f"/apis/v2beta1/runs/{run_id}")
    recorded, name = recorded_run["workflow"], workflow["metadata"]["name"]
    nodes = comparable(by_name(recorded["nodes"], recorded["name"]), recorded["name"])
    assert comparable(named_nodes(workflow), name) == nodes
    assert comparable_run(run) == comparable_run(recorded_run["run"])
    assert set(labels_of(workflow["metadata"])) == set(labels_of(recorded))
    omitted = {"pipeline_spec"}  # by the recorder
    assert set(run) - omitted == set(recorded_run["run"])
    assert run["runtime_config"] == recorded_run["run"]["runtime_config"]
    assert run["scheduled_at"] == recorded_run["run"]["scheduled_at"]
    assert re.fullmatch(r"every2[a-z0-9]{5}-1-\d+", name)
    assert run["display_name"] == name


def schedule(runtime_config: Any) -> dict[str, Any]:
    return {
        "display_name": "every2",
        "pipeline_spec": compiled_now("training"),
        "runtime_config": runtime_config,
        "trigger": {"cron_schedule": {"cron": "0 */2 * * * *"}},
        "max_concurrency": "1",
        "mode": "ENABLE",
    }


# --- the recorded pipelines, run again: sizes of nodes, and the pods that drivers write ---

RAW: dict[str, tuple[str, dict[str, Any], Drive]] = {
    "training": ("raw-training", {"run": "c2", "store": "s3://mappo/runs"}, lose_pod_and_finish),
    "tuning": ("raw-tuning-compressed", {"store": "s3://mappo/runs"}, lose_worker_and_finish),
}


def recorded_inputs(name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the full name of every stage's driver in a raw recording, and the executor input that it wrote."""
    for driver, node in named_nodes(manifest_of(raw(RAW[name][0]))).items():
        if node["type"] == "Pod" and node["templateName"] == "system-container-driver":
            yield driver, executor_input(node)


def executor_input(node: Mapping[str, Any]) -> dict[str, Any]:
    command = json.loads(parameters_of(node, "outputs")["pod-spec-patch"])["containers"][0]["command"]
    return json.loads(command[command.index("--executor_input") + 1])


@cache
def recorded_outputs(name: str) -> dict[str, Any]:
    """Return the metadata of the artifacts that stages of a raw recording read, by URI."""
    return {
        artifact["uri"]: artifact["metadata"]
        for _, executor_input in recorded_inputs(name)
        for artifacts in executor_input["inputs"].get("artifacts", {}).values()
        for artifact in artifacts["artifacts"]
    }


def produce_as_recorded(name: str) -> Callable[[str, dict[str, Any]], Outputs]:
    """Return a function that returns the recorded outputs of a stage; in a loop, those of the same seed."""
    inputs = dict(recorded_inputs(name))
    values = {driver: recorded["inputs"]["parameterValues"] for driver, recorded in inputs.items()}

    def produce(task: str, executor_input: dict[str, Any]) -> Outputs:
        keys = ("seed", "run", "config")
        actual = executor_input["inputs"]["parameterValues"]
        drivers = [
            driver
            for driver, recorded in values.items()
            if f".{task}-driver" in driver and all(recorded.get(key) == actual.get(key) for key in keys)
        ]
        artifacts = inputs[drivers[0]]["outputs"]["artifacts"] if drivers else {}
        uris = {key: artifact["artifacts"][0]["uri"] for key, artifact in artifacts.items()}
        metadata = {key: recorded_outputs(name).get(uri) for key, uri in uris.items()}
        metadata = {key: entry for key, entry in metadata.items() if entry}
        return {"parameters": parameters(task), "metadata": metadata}

    def parameters(task: str) -> dict[str, Any]:
        if task == "prepare":
            return {"Output": "s2"}
        if task != "choose":
            return {}
        best = next(
            recorded for driver, recorded in values.items() if "seed-2(0)" in driver and "train-driver" in driver
        )
        return {"seeds": SEEDS, "trial": 4, "place": best["store"], "runs": best["run"], "config": best["config"]}

    return produce


@cache
def run_again(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run a recorded pipeline on the test server; return the answers of v1beta1 and v2beta1 at the end."""
    source, parameters, act = RAW[name]
    with started(recorded_pipeline(source), parameters, produce=produce_as_recorded(name)) as (server, run_id):
        act(server, run_id)
        return call(server, f"/apis/v1beta1/runs/{run_id}"), call(server, f"/apis/v2beta1/runs/{run_id}")


def json_size(value: Any) -> int:
    return len(json.dumps(value, separators=(",", ":"), ensure_ascii=False))


def without_ids(text: str) -> str:
    """Return a pod's patch without random IDs and numbers that count over all runs."""
    text = re.sub(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", "UUID", text)
    text = re.sub(r'"--execution_id","\d+"', '"--execution_id","N"', text)
    return re.sub(r'\{\\"name\\":\\"\d+\\"', '{"name":"N"', text)


@pytest.mark.parametrize("name", RAW)
def test_drivers_write_the_recorded_pods(name):
    rerun = named_nodes(manifest_of(run_again(name)[0]))
    recorded = named_nodes(manifest_of(raw(RAW[name][0])))
    for driver, _ in recorded_inputs(name):
        actual, expected = (
            parameters_of(nodes[driver], "outputs")["pod-spec-patch"] for nodes in (rerun, recorded)
        )
        assert without_ids(actual) == without_ids(expected), driver


@pytest.mark.parametrize("name", RAW)
def test_nodes_have_the_recorded_fields_and_sizes(name):
    rerun = named_nodes(manifest_of(run_again(name)[0]))
    recorded = named_nodes(manifest_of(raw(RAW[name][0])))
    for name_of_node, expected in recorded.items():
        actual = rerun[name_of_node]
        assert set(actual) == set(expected), name_of_node
        for side in ("inputs", "outputs"):
            actual_sizes, expected_sizes = (
                {key: len(value) for key, value in parameters_of(node, side).items()}
                for node in (actual, expected)
            )
            assert list(actual_sizes) == list(expected_sizes), name_of_node
            assert all(abs(actual_sizes[key] - size) <= 10 for key, size in expected_sizes.items()), name_of_node
    assert json_size(rerun) == pytest.approx(json_size(recorded), rel=0.01)


@pytest.mark.parametrize("name", RAW)
def test_workflows_have_the_recorded_fields_and_templates(name):
    rerun, recorded = manifest_of(run_again(name)[0]), manifest_of(raw(RAW[name][0]))
    assert set(recorded["metadata"]) - set(rerun["metadata"]) == {"managedFields", "resourceVersion", "generation"}
    assert set(rerun["spec"]) == set(recorded["spec"])
    assert set(recorded["status"]) - set(rerun["status"]) == {"resourcesDuration"}
    assert set(rerun["status"]) < set(recorded["status"])
    templates = {template["name"]: template for template in recorded["spec"]["templates"]}
    for template in rerun["spec"]["templates"]:
        assert without_hashes(template) == without_hashes(templates.pop(template["name"]))
    assert not templates
    actual, expected = (
        {
            without_hashes(argument["name"]): argument["value"]
            for argument in workflow["spec"]["arguments"]["parameters"]
        }
        for workflow in (rerun, recorded)
    )
    assert actual == expected


def without_hashes(value: Any) -> str:
    """Return JSON without run IDs, display names and hashes of components, which Kubeflow computes differently."""
    text = json.dumps(value, sort_keys=True)
    text = re.sub(r"(components|implementations)-[0-9a-f]{64}", r"\1-HASH", text)
    text = re.sub(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", "UUID", text)
    return re.sub(r'"--run_display_name", "[^"]*"', '"--run_display_name", "NAME"', text)


@pytest.mark.parametrize("name", RAW)
def test_answer_of_v1beta1_has_the_recorded_fields(name):
    rerun, recorded = run_again(name)[0], raw(RAW[name][0])
    assert set(rerun) == set(recorded)
    assert set(rerun["run"]) == set(recorded["run"])
    assert set(rerun["pipeline_runtime"]) == set(recorded["pipeline_runtime"])
    assert rerun["run"]["status"] == recorded["run"]["status"]
    assert rerun["run"]["pipeline_spec"]["runtime_config"] == recorded["run"]["pipeline_spec"]["runtime_config"]
    pipelines = [
        list(yaml.safe_load_all(run["run"]["pipeline_spec"]["pipeline_manifest"])) for run in (rerun, recorded)
    ]
    assert pipelines[0] == pipelines[1]


def test_large_workflows_are_compressed_and_their_task_details_stop_changing_as_recorded():
    v1, v2 = run_again("tuning")
    actual, recorded = manifest_of(v1)["status"], manifest_of(raw("raw-tuning-compressed"))["status"]
    assert "nodes" not in actual
    assert len(actual["compressedNodes"]) == pytest.approx(len(recorded["compressedNodes"]), rel=0.15)
    states = {task["state"] for task in v2["run_details"]["task_details"]}
    assert v2["state"] == "SUCCEEDED"
    assert "RUNNING" in states
    assert len(v2["run_details"]["task_details"]) < len(nodes_of(manifest_of(v1)))
