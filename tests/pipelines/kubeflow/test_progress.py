"""The stages of recorded runs of a real Kubeflow (`tests.support.recordings`), and of runs of the test server."""

import base64
import gzip
import json
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import kfp_server_api
import pytest
import yaml

from mappo.config import to_json
from mappo.recipes import navigation
from pipelines.compiling import compile_pipeline
from pipelines.errors import ApiError
from pipelines.kubeflow.api import Api
from pipelines.kubeflow.client import get_run, submit
from pipelines.kubeflow.client import specification_of as specification_of_run
from pipelines.kubeflow.connection import Connection
from pipelines.kubeflow.progress import Logs, stages_of
from pipelines.kubeflow.reasons import explain
from pipelines.kubeflow.stages import StageProgress
from pipelines.kubeflow.submission import Submission
from pipelines.kubeflow.workflow import Workflow, workflow_of
from pipelines.site import Site
from tests.support.argo import ALWAYS, BEFORE_2_17
from tests.support.kubeflow_server import KubeflowServer
from tests.support.recordings import manifest_of, raw, recording

NOW = datetime(2026, 11, 28, 22, tzinfo=UTC)
DELETED = "its pod was deleted: evicted, preempted, or its node was lost"
REASON_IN_LOG = "no credentials"
PENDING, NOT_REACHED = ("PENDING", 0, ""), ("NOT REACHED", 0, "")
DONE = ("SUCCEEDED", 1, "")
GARBAGE = [
    json.dumps({"pipeline_runtime": {"workflow_manifest": json.dumps({"status": {"compressedNodes": text}})}})
    for text in (
        "no base64!",
        base64.b64encode(b"no gzip").decode(),
        base64.b64encode(gzip.compress(b"{}")[:-9]).decode(),
    )
]


class Recorded:
    """An API that returns a recorded workflow; the log of every pod ends with the stage's reason of a failure."""

    def __init__(self, manifest: dict[str, Any], log: str = f"[train] failed: {REASON_IN_LOG}\n"):
        self.manifest, self.log, self.requests = manifest, log, list[str]()

    def text(self, path: str) -> str:
        self.requests.append(path)
        if path.startswith("/apis/v1beta1/"):
            return json.dumps({"pipeline_runtime": {"workflow_manifest": json.dumps(self.manifest)}})
        if self.log:
            return self.log
        raise ApiError("the log is gone", 404)


def api(name: str, log: str | None = None) -> Recorded:
    workflow = recording(name)["workflow"]
    manifest = {"metadata": {"name": workflow["name"]}, "status": {"nodes": workflow["nodes"]}}
    return Recorded(manifest) if log is None else Recorded(manifest, log)


def run_of(name: str) -> Any:
    client = kfp_server_api.ApiClient()
    return client._ApiClient__deserialize(recording(name)["run"], "V2beta1Run")


def specification_of(name: str) -> dict[str, Any]:
    """Return the recorded pipeline of a run; empty if no pipeline was recorded."""
    answers = {"mappo-training": "raw-training", "mappo-tuning": "raw-tuning-compressed"}
    workflow = recording(name)["workflow"]["name"]
    answer = next((raw_name for start, raw_name in answers.items() if workflow.startswith((start, "every"))), None)
    if answer is None:
        return {}
    documents = yaml.safe_load_all(raw(answer)["run"]["pipeline_spec"]["pipeline_manifest"])
    return dict(zip(("pipeline_spec", "platform_spec"), documents, strict=False))


def stages(name: str, kubeflow: Recorded | None = None) -> list[StageProgress]:
    kubeflow, run = kubeflow or api(name), run_of(name)
    logs = Logs(kubeflow, run.run_id)
    return [logs.add_details(stage) for stage in stages_of(kubeflow, run, specification_of(name))]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("training-running", {"validate": DONE, "train": DONE, "evaluate": ("PENDING", 1, "")}),
        ("training-succeeded", {"validate": DONE, "train": DONE, "evaluate": DONE}),
        (
            "training-failed-container",
            {"validate": DONE, "train": ("FAILED", 1, REASON_IN_LOG), "evaluate": NOT_REACHED},
        ),
        (
            "training-failed-retried-always",
            {"validate": DONE, "train": ("RUNNING", 3, f"retried: {REASON_IN_LOG}"), "evaluate": PENDING},
        ),
        (
            "no-template-defaults-failed",
            {"validate": DONE, "train": ("FAILED", 3, REASON_IN_LOG), "evaluate": NOT_REACHED},
        ),
        ("no-template-defaults-succeeded", {"validate": DONE, "train": DONE, "evaluate": DONE}),
        (
            "training-pod-deleted",
            {
                "validate": DONE,
                "train": ("RUNNING", 1, f"retried: {DELETED}; the next attempt starts after 5 seconds"),
                "evaluate": PENDING,
            },
        ),
        (
            "training-pod-deleted-succeeded",
            {"validate": DONE, "train": ("SUCCEEDED", 2, ""), "evaluate": DONE},
        ),
        (
            "training-out-of-memory",
            {
                "validate": DONE,
                "train": (
                    "FAILED",
                    1,
                    "out of memory: the pod was killed at its memory limit; raise the limit by -p "
                    "train_memory=..., or by stages.train.memory in the site's file",
                ),
                "evaluate": NOT_REACHED,
            },
        ),
        (
            "training-unschedulable",
            {
                "validate": DONE,
                "train": (
                    "PENDING",
                    1,
                    "waits for a node: 0/1 nodes are available: 1 Insufficient nvidia.com/gpu",
                ),
                "evaluate": PENDING,
            },
        ),
        (
            "image-not-found",
            {
                "validate": (
                    "PENDING",
                    1,
                    "waits for its image, which cannot be pulled: localhost/nope:1: connection refused",
                ),
                "train": PENDING,
                "evaluate": PENDING,
            },
        ),
        (
            "training-forbidden-secret",
            {"validate": ("FAILED", 1, REASON_IN_LOG), "train": NOT_REACHED, "evaluate": NOT_REACHED},
        ),
        (
            "schedule-first-run",
            {"validate": DONE, "train": ("FAILED", 1, REASON_IN_LOG), "evaluate": NOT_REACHED},
        ),
        (
            "kueue-preempted",
            {"validate": DONE, "train": ("PENDING", 2, f"retried: {DELETED}"), "evaluate": PENDING},
        ),
        ("retried-by-api", {"validate": DONE, "train": DONE, "evaluate": ("PENDING", 1, "")}),
        ("profile-running", {"validate": DONE, "train": ("RUNNING", 1, ""), "evaluate": PENDING}),
        ("training-cancelled-pending", {}),
        (
            "seeds-succeeded",
            {
                "validate": DONE,
                "train[0]": DONE,
                "evaluate[0]": DONE,
                "train[1]": DONE,
                "evaluate[1]": DONE,
                "compare": DONE,
            },
        ),
        (
            "tuning-worker-deleted",
            {
                "prepare": DONE,
                "tune[0]": ("RUNNING", 2, f"retried: {DELETED}"),
                "tune[1]": DONE,
                "choose": PENDING,
                "mappo-each-seed/train": PENDING,
                "mappo-each-seed/evaluate": PENDING,
                "mappo-each-seed-2/train": PENDING,
                "mappo-each-seed-2/evaluate": PENDING,
                "promote": PENDING,
                "report": PENDING,
            },
        ),
    ],
)
def test_stages_of_a_recorded_run_have_their_recorded_states_attempts_and_reasons(name, expected):
    progress = {stage.name: (stage.state, stage.num_attempts, stage.reason) for stage in stages(name)}
    assert progress == expected


def test_durations_last_from_the_first_attempt_to_the_end():
    by_name = {stage.name: stage.seconds(NOW) for stage in stages("training-pod-deleted-succeeded")}
    assert by_name == {"validate": 45.0, "train": 197.0, "evaluate": 40.0}


def test_compressed_nodes_give_the_same_stages_as_plain_nodes():
    compressed = Workflow(manifest_of(raw("raw-tuning-compressed")))
    nodes = recording("tuning-succeeded")["workflow"]["nodes"]
    plain = Workflow({"metadata": {"name": compressed.name}, "status": {"nodes": nodes}})
    assert compressed.stages() == plain.stages()
    for stage in plain.stages():
        actual, expected = compressed.newest_node(stage), plain.newest_node(stage)
        assert actual
        assert expected
        assert (actual.phase, actual.message, actual.started_at, actual.ended_at) == (
            expected.phase,
            expected.message,
            expected.started_at,
            expected.ended_at,
        )


def test_every_stage_of_a_study_has_a_unique_name():
    names = [
        stage.name for stage in stages("tuning-succeeded", Recorded(manifest_of(raw("raw-tuning-compressed"))))
    ]
    assert len(names) == len(set(names)) == 14
    assert {"mappo-each-seed/train[1]", "mappo-each-seed-2/evaluate[0]", "tune[1]"} <= set(names)


def test_reason_of_out_of_memory_names_the_limit_in_the_drivers_patch():
    manifest = manifest_of(raw("raw-training"))
    for node in manifest["status"]["nodes"].values():
        if node["name"].endswith("train(0).executor(0)"):
            node["message"] = "main: OOMKilled (exit code 137)"
    (train,) = [stage for stage in stages("training-succeeded", Recorded(manifest)) if stage.name == "train"]
    assert "limit of 3Gi" in train.attempts[0].reason


def test_logs_of_each_attempt_are_requested_by_the_name_of_its_pod():
    kubeflow, run = api("training-failed-retried-always", "line\n"), run_of("training-failed-retried-always")
    (train,) = [stage for stage in stages_of(kubeflow, run, {}) if stage.name == "train"]
    assert Logs(kubeflow, run.run_id).of_attempts(train) == ["line\n"] * 3
    pods = {pod["name"] for pod in recording("training-failed-retried-always")["pods"]}
    requested = [path.split("/")[-2] for path in kubeflow.requests if path.endswith("/log")]
    assert len(requested) == 3
    assert set(requested) <= pods


def test_attempts_within_one_pod_are_counted_and_have_separate_logs():
    text = (
        "first words\n[train] attempt 0; 2 left\none\n"
        "[train] attempt 0 ended: signal 9; attempt 1 begins in 30 s\n"
        "[train] attempt 1; 1 left\ntwo\n"
    )
    kubeflow, run = api("training-running", text), run_of("training-running")
    (train,) = [stage for stage in stages_of(kubeflow, run, {}) if stage.name == "train"]
    logs = Logs(kubeflow, run.run_id)
    assert logs.add_details(train).num_attempts == 2
    first, second = logs.of_attempts(train)
    assert first.startswith("first words\n")
    assert first.endswith("begins in 30 s\n")
    assert second == "[train] attempt 1; 1 left\ntwo\n"


def test_log_of_a_pod_that_has_ended_is_read_once():
    kubeflow, run = api("training-succeeded"), run_of("training-succeeded")
    logs = Logs(kubeflow, run.run_id)
    for _ in range(3):
        for stage in stages_of(kubeflow, run, {}):
            logs.add_details(stage)
    assert sum(path.endswith("/log") for path in kubeflow.requests) == 3


def test_reason_of_a_failure_mentions_that_the_log_cannot_be_read():
    (train,) = [
        stage
        for stage in stages("training-failed-container", api("training-failed-container", ""))
        if stage.name == "train"
    ]
    assert train.reason == "main: Error (exit code 1); the log cannot be read"


def test_reason_of_a_gated_pod_names_the_queue():
    assert explain("", "train", is_gated=True).startswith(
        "waits until its pod is admitted, perhaps for quota of Kueue"
    )
    assert explain("", "train") == ""


@pytest.mark.parametrize(
    ("message", "explanation"),
    [
        (
            "retry exceeded workflow deadline 2026-11-28 20:09:19 +0000 UTC",
            "deadline exceeded: raise stages.train.timeout_seconds",
        ),
        ("Step exceeded its deadline", "deadline exceeded"),
        ("Pod was active on the node longer than the specified deadline", "deadline exceeded"),
        (
            'pods "x" is forbidden: exceeded quota: mappo, requested: requests.cpu=4, used: requests.cpu=62',
            "waits for the namespace's quota: mappo, requested: requests.cpu=4",
        ),
        (
            'CreateContainerConfigError: secret "a" not found',
            'waits, since its container cannot be created: secret "a"',
        ),
        ("The node was low on resource: memory.", "its pod was deleted: evicted"),
        ("an unknown message", "an unknown message"),
        ("No more retries left", ""),
        ("omitted: depends condition not met", ""),
    ],
)
def test_messages_of_argo_and_kubernetes_are_explained(message, explanation):
    text = explain(message, "train")
    assert text.startswith(explanation) if explanation else text == ""


def test_deadline_of_a_cancelled_run_is_explained_by_the_cancellation():
    assert (
        explain("Step exceeded its deadline", "train", is_cancelled=True) == "ended, since the run was cancelled"
    )


@pytest.mark.parametrize("status", [403, 404, 405, 501])
def test_server_without_v1beta1_has_no_workflow(status):
    class ServerWithoutV1:
        def text(self, path: str) -> str:
            raise ApiError("no", status)

    assert workflow_of(ServerWithoutV1(), "run") is None


@pytest.mark.parametrize(
    "answer",
    [
        "[]",
        "{}x",
        *GARBAGE,
        '{"pipeline_runtime": {"workflow_manifest": "["}}',
        '{"pipeline_runtime": 1}',
    ],
)
def test_workflow_that_cannot_be_read_raises_api_error(answer):
    class ServerWithBrokenAnswer:
        def text(self, path: str) -> str:
            return answer

    with pytest.raises(ApiError, match="workflow cannot be read"):
        workflow_of(ServerWithBrokenAnswer(), "run")


# --- cases without a recording; the test server follows Argo's sources ---


@pytest.fixture
def read_stages(kubeflow: KubeflowServer) -> Callable[[str], dict[str, StageProgress]]:
    """Return a function that reads the stages of a run of the test server by name, as `runs show` does."""

    def read(run_id: str) -> dict[str, StageProgress]:
        api = Api(Connection(endpoint=kubeflow.url))
        run = get_run(api, run_id)
        logs = Logs(api, run_id)
        return {
            stage.name: logs.add_details(stage) for stage in stages_of(api, run, specification_of_run(api, run))
        }

    return read


def submitted(kubeflow: KubeflowServer, name: str = "training", **parameters: Any) -> str:
    config = {"config": to_json(navigation()), **({"seeds": ["0"]} if name == "seeds" else {})}
    pipeline = compile_pipeline(name, Site(image="a/b:1"), config)
    api = Api(Connection(endpoint=kubeflow.url))
    return submit(api, Submission(pipeline, parameters)).run_id


def summary(stages: dict[str, StageProgress]) -> dict[str, tuple[str, int, str]]:
    """Return state, number of attempts and reason of each stage."""
    return {name: (stage.state, stage.num_attempts, stage.reason) for name, stage in stages.items()}


def test_stage_has_a_reason_when_its_driver_waits_or_fails(kubeflow, read_stages):
    run_id = submitted(kubeflow)
    pod = kubeflow.workflows[run_id].reach_driver("train")
    kubeflow.workflows[run_id].wait(pod, "Unschedulable: 0/1 nodes are available: 1 Insufficient cpu. no more")
    kubeflow.set_state(run_id, "RUNNING")
    assert summary(read_stages(run_id))["train"] == (
        "PENDING",
        0,
        "waits for a node: 0/1 nodes are available: 1 Insufficient cpu. no more",
    )
    failing = submitted(kubeflow)
    kubeflow.fail_driver(failing, "train", "failed to get secret x: forbidden")
    assert summary(read_stages(failing)) == {
        "validate": DONE,
        "train": ("FAILED", 0, "driver: failed to get secret x: forbidden"),
        "evaluate": NOT_REACHED,
    }


def test_first_stage_has_the_reason_when_the_driver_of_the_whole_pipeline_fails(kubeflow, read_stages):
    run_id = submitted(kubeflow)
    kubeflow.fail_driver(run_id, "root", "no config map kfp-launcher")
    assert summary(read_stages(run_id)) == {
        "validate": ("NOT REACHED", 0, "driver: no config map kfp-launcher"),
        "train": NOT_REACHED,
        "evaluate": NOT_REACHED,
    }


def test_reason_is_that_of_the_last_failed_attempt(kubeflow, read_stages):
    kubeflow.template_defaults = BEFORE_2_17
    run_id = submitted(kubeflow)
    kubeflow.fail_stage(run_id, "train", "[train] failed: first cause")
    kubeflow.fail_stage(run_id, "train", "[train] failed: second cause")
    kubeflow.reach(run_id, "train")
    assert summary(read_stages(run_id))["train"] == ("RUNNING", 3, "retried: second cause")


def test_pods_that_the_stage_refuses_are_not_counted_as_attempts(kubeflow, read_stages):
    kubeflow.template_defaults = ALWAYS
    run_id = submitted(kubeflow)
    kubeflow.fail_stage(run_id, "train", "[train] attempt 0; 3 left\n[train] failed: wrong key")
    refusal = "[train] failed: wrong key\n[train] not tried again: 1 of at most 4 attempts were made"
    kubeflow.fail_stage(run_id, "train", refusal, attempts=3)
    assert summary(read_stages(run_id))["train"] == ("FAILED", 1, "wrong key")


def test_other_logs_are_shown_when_one_log_is_lost_with_its_node(kubeflow):
    run_id = submitted(kubeflow)
    kubeflow.write_log(run_id, "train", "first\n")
    lost = kubeflow.delete_pod(run_id, "train")
    kubeflow.fail(500, times=9, path=lost.rpartition("-")[2])
    kubeflow.write_log(run_id, "train", "second\n")
    api = Api(Connection(endpoint=kubeflow.url), patience_seconds=0)
    (train,) = [stage for stage in stages_of(api, get_run(api, run_id), {}) if stage.name == "train"]
    first, second = Logs(api, run_id).of_attempts(train)
    assert first.startswith("[train] the log cannot be read: ")
    assert second == "second\n"


def test_stages_of_a_loop_with_more_than_nine_items_are_in_numeric_order(kubeflow, read_stages):
    run_id = submitted(kubeflow, "seeds", seeds=[str(seed) for seed in range(12)])
    kubeflow.finish(run_id)
    loop = [name for name in read_stages(run_id) if name.startswith("train")]
    assert loop == [f"train[{index}]" for index in range(12)]


def test_no_stage_runs_or_waits_when_the_run_has_ended(kubeflow, read_stages):
    kubeflow.max_bytes = 150_000  # the workflow grows beyond this size, so Argo ends it
    run_id = submitted(kubeflow, "seeds", seeds=[str(seed) for seed in range(12)])
    kubeflow.finish(run_id)
    states = {stage.state for stage in read_stages(run_id).values()}
    assert states & {"RUNNING", "PENDING"} == set()
    assert any("maximum allowed size" in stage.reason for stage in read_stages(run_id).values())
