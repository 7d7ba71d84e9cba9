import json
import re
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import kfp_server_api
import pytest
import yaml
from kfp_server_api import ApiException, V2beta1Run, V2beta1RuntimeConfig

from tests.support.argo import ALWAYS, BEFORE_2_17, STOCK
from tests.support.kubeflow_rules import Refused, check_cron
from tests.support.kubeflow_server import KubeflowServer, KubernetesServer
from tests.support.recordings import by_name, manifest_of, nodes_of

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import kfp

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


def container(**more: Any) -> dict[str, Any]:
    return {"executorLabel": "exec-work", **more}


def task(component: str, *after: str, **more: Any) -> dict[str, Any]:
    return {
        "componentRef": {"name": component},
        "taskInfo": {"name": component},
        "dependentTasks": [*after],
        **more,
    }


SCHEDULED = {"parameters": {"at": {"runtimeValue": {"constant": "{{$.pipeline_job_schedule_time_utc}}"}}}}


def pipeline() -> dict[str, Any]:
    """Return a pipeline: validate, train with retries, then a loop that evaluates for each seed."""
    seeds = {"parameters": {"seeds": {"parameterType": "LIST"}}}
    loop_inputs = {"parameters": {"seeds": {"componentInputParameter": "seeds"}}}
    loop = {"items": {"inputParameter": "seeds"}, "itemInput": "seed"}
    return {
        "schemaVersion": "2.1.0",
        "pipelineInfo": {"name": "training"},
        "root": {
            "inputDefinitions": {
                "parameters": {
                    "run": {"parameterType": "STRING"},
                    "frames": {"parameterType": "NUMBER_INTEGER", "defaultValue": 1},
                    "seeds": {"parameterType": "LIST", "defaultValue": ["1", "2"]},
                }
            },
            "dag": {
                "tasks": {
                    "validate": task("comp-validate", inputs=SCHEDULED),
                    "train": task("comp-train", "validate", retryPolicy={"maxRetryCount": 3}),
                    "loop": task("comp-loop", "train", inputs=loop_inputs, parameterIterator=loop),
                }
            },
        },
        "components": {
            "comp-validate": container(),
            "comp-train": container(),
            "comp-evaluate": container(),
            "comp-loop": {"inputDefinitions": seeds, "dag": {"tasks": {"evaluate": task("comp-evaluate")}}},
        },
        "deploymentSpec": {"executors": {"exec-work": {"container": {"image": "a:1", "command": ["true"]}}}},
    }


@pytest.fixture
def server() -> Iterator[KubeflowServer]:
    with KubeflowServer() as server:
        yield server


@pytest.fixture
def client(server: KubeflowServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> kfp.Client:
    return connect(server, monkeypatch, tmp_path)


def connect(server: KubeflowServer, monkeypatch: pytest.MonkeyPatch, directory: Path, **more: Any) -> kfp.Client:
    monkeypatch.setattr(kfp.Client, "_LOCAL_KFP_CONTEXT", str(directory / "context.json"))
    return kfp.Client(host=server.url, **more)


@pytest.fixture
def package(tmp_path: Path) -> str:
    (tmp_path / "training.yaml").write_text(yaml.safe_dump(pipeline()))
    return str(tmp_path / "training.yaml")


@pytest.fixture
def run_id(client: kfp.Client, package: str) -> str:
    return start(client, package)


def start(client: kfp.Client, package: str, **parameters: Any) -> str:
    parameters = {"run": "a", **parameters}
    return client.run_pipeline(None, "first", pipeline_package_path=package, params=parameters).run_id


def refused(call: Any, *arguments: Any, **named: Any) -> tuple[int, str]:
    with pytest.raises(ApiException) as raised:
        call(*arguments, **named)
    return raised.value.status, json.loads(raised.value.body)["message"]


def states(client: kfp.Client, run_id: str) -> dict[str, str]:
    details = client.get_run(run_id).run_details
    return {detail.display_name: detail.state for detail in details.task_details} if details else {}


def manifest(server: KubeflowServer, run_id: str) -> dict[str, Any]:
    with urllib.request.urlopen(f"{server.url}/apis/v1beta1/runs/{run_id}", timeout=5) as answer:
        return manifest_of(json.loads(answer.read()))


def phases(server: KubeflowServer, run_id: str) -> dict[str, tuple[str, str]]:
    """Return the phase and message of every node by the node's name without the workflow's name."""
    workflow = manifest(server, run_id)
    nodes = by_name(nodes_of(workflow), workflow["metadata"]["name"])
    return {name: (node["phase"], node.get("message", "")) for name, node in nodes.items()}


def log(server: KubeflowServer, run_id: str, pod: str) -> str:
    address = f"{server.url}/apis/v1alpha1/runs/{run_id}/nodes/{pod}/log"
    with urllib.request.urlopen(address, timeout=5) as answer:
        return answer.read().decode()


def test_run_advances_only_when_the_test_advances_it(server, client, run_id):
    assert client.get_run(run_id).state == "PENDING"
    assert states(client, run_id) == {}
    assert server.advance(run_id) == "RUNNING"
    assert states(client, run_id)["validate"] == "RUNNING"
    assert states(client, run_id)["validate-driver"] == "SUCCEEDED"
    assert server.finish(run_id) == "SUCCEEDED"
    assert [status.state for status in client.get_run(run_id).state_history] == ["PENDING", "RUNNING", "SUCCEEDED"]


def test_end_of_an_unfinished_run_is_1970_and_of_an_unfinished_task_the_year_1(server, client, run_id):
    server.advance(run_id)
    run = client.get_run(run_id)
    assert run.finished_at.year == 1970
    assert {detail.end_time.year for detail in run.run_details.task_details if detail.state == "RUNNING"} == {1}


def test_stages_have_the_same_nodes_as_in_argo(server, client, run_id):
    server.finish(run_id)
    details = client.get_run(run_id).run_details.task_details
    names = [detail.display_name for detail in details]
    assert names.count("iteration-item") == names.count("evaluate") == 2
    assert names.count("executor") == 4
    assert {"root", "root-driver", "train-driver", "iteration-driver", "executor(0)"} < set(names)
    assert not any(detail.pod_name or detail.outputs or detail.error for detail in details)


def test_children_lead_to_every_other_node(server, client, run_id):
    server.finish(run_id)
    details = client.get_run(run_id).run_details.task_details
    children = [child.pod_name for detail in details for child in detail.child_tasks or []]
    assert len(children) == len(set(children)) == len(details) - 1


def test_lost_attempts_are_listed(server, client, run_id):
    first = server.reach(run_id, "train")
    second = server.retry_stage(run_id, "train", "out of memory")
    assert phases(server, run_id)["(0).root(0).train(0).executor(0)"] == ("Error", "pod deleted")
    assert phases(server, run_id)["(0).root(0).train(0).executor(1)"] == ("Running", "")
    assert second != first
    assert server.finish(run_id) == "SUCCEEDED"


def test_stages_after_a_failed_stage_are_omitted(server, client, run_id):
    assert server.fail_stage(run_id, "train", "boom") == "FAILED"
    assert states(client, run_id)["train"] == "FAILED"
    message = "main: Error (exit code 1)"
    assert phases(server, run_id)["(0).root(0).train(0).executor(0)"] == ("Failed", message)
    assert states(client, run_id)["loop"] is None
    assert client.get_run(run_id).error is None


@contextmanager
def running(**options: Any) -> Iterator[tuple[KubeflowServer, str]]:
    """Start a run on a server with these options."""
    with KubeflowServer(**options) as server:
        parameters = {"run": "a-[[RunUUID]]-[[ScheduledTime]]"}
        run = {"display_name": "first", "pipeline_spec": pipeline(), "runtime_config": {"parameters": parameters}}
        yield server, post(server, "/apis/v2beta1/runs", run)["run_id"]


def post(server: KubeflowServer, path: str, content: Any) -> Any:
    request = urllib.request.Request(server.url + path, json.dumps(content).encode())
    with urllib.request.urlopen(request, timeout=5) as answer:
        return json.loads(answer.read())


def delete_pods(server: KubeflowServer, run_id: str, stage: str) -> int:
    """Delete every pod of a stage until the run ends; return the number of pods."""
    count = 0
    while server.runs[run_id]["state"] == "RUNNING" or not count:
        server.delete_pod(run_id, stage)
        server.workflows[run_id].settle()
        count += 1
    return count


def test_stock_defaults_multiply_attempts_of_lost_pods_at_every_level():
    """The pod, its DAG, the root and the whole workflow have 2 retries each by the defaults."""
    with running() as (server, run_id):
        assert delete_pods(server, run_id, "validate") == 3**4
        nodes = phases(server, run_id)
        assert nodes["(2).root(2).validate(2).executor(2)"] == ("Error", "pod deleted")
        assert nodes["(0).root(1).validate"] == nodes[""] == ("Error", "No more retries left")
        workflow = manifest(server, run_id)
    assert (workflow["status"]["phase"], workflow["status"]["message"]) == ("Error", "No more retries left")


def test_stage_has_its_own_limit_and_the_policy_of_the_defaults():
    with running() as (server, run_id):
        assert delete_pods(server, run_id, "train") == 4 * 3**3


def test_failed_containers_are_retried_and_lost_pods_are_not_when_there_are_no_defaults():
    with running(template_defaults=BEFORE_2_17) as (server, run_id):
        assert server.fail_stage(run_id, "train", attempts=3) == "RUNNING"
        assert server.fail_stage(run_id, "train") == "FAILED"
        assert phases(server, run_id)[".root.train.executor"] == ("Failed", "No more retries left")
    with running(template_defaults=BEFORE_2_17) as (server, run_id):
        server.delete_pod(run_id, "train")
        assert server.advance(run_id) == "FAILED"
        assert phases(server, run_id)[".root.train.executor"] == ("Error", "pod deleted")


def test_failed_and_lost_pods_are_retried_at_one_level_with_policy_always():
    with running(template_defaults=ALWAYS) as (server, run_id):
        server.delete_pod(run_id, "train")
        assert server.fail_stage(run_id, "train", attempts=2) == "RUNNING"
        assert server.fail_stage(run_id, "train", exit_code=139) == "FAILED"
        nodes = phases(server, run_id)
    assert nodes["(0).root(0).train(0).executor(3)"] == ("Failed", "main: Error (exit code 139)")
    assert nodes["(0).root(0).train"] == nodes[""] == ("Failed", "No more retries left")


def test_retry_stage_ends_the_attempt_in_the_way_that_the_policy_retries():
    for defaults, phase in ((STOCK, "Error"), (BEFORE_2_17, "Failed")):
        with running(template_defaults=defaults) as (server, run_id):
            server.retry_stage(run_id, "train")
            nodes = phases(server, run_id)
        first_attempts = [actual for name, (actual, _) in nodes.items() if name.endswith("executor(0)")]
        assert first_attempts.count(phase) == 1


def test_driver_that_fails_ends_the_run():
    with running() as (server, run_id):
        assert server.fail_driver(run_id, "train", "no such secret") == "FAILED"
        nodes = phases(server, run_id)
        assert nodes["(0).root(0).train-driver(0)"] == ("Failed", "main: Error (exit code 1)")
        assert nodes["(0).root(0).train"] == ("Omitted", "omitted: depends condition not met")


def test_waiting_pod_has_a_message_and_no_log_and_runs_later():
    with running() as (server, run_id):
        pod = server.wait_stage(run_id, "train", "Unschedulable: 0/1 nodes are available")
        name = "(0).root(0).train(0).executor(0)"
        assert phases(server, run_id)[name] == ("Pending", "Unschedulable: 0/1 nodes are available")
        with pytest.raises(urllib.error.HTTPError) as raised:
            log(server, run_id, pod)
        raised.value.close()
        server.reach(run_id, "train")
        assert phases(server, run_id)[name] == ("Running", "")


def test_pending_pod_that_is_deleted_is_recreated_under_its_name():
    with running() as (server, run_id):
        waiting = server.wait_stage(run_id, "train")
        assert server.delete_pod(run_id, "train") == waiting
        assert server.reach(run_id, "train") == waiting


def test_artifacts_lie_below_the_root_of_the_config_map_kfp_launcher():
    with running(pipeline_root="s3://bucket/prefix/") as (server, run_id):
        server.reach(run_id, "validate")
        outputs = server.executor_input_of(run_id, "validate")["outputs"]["artifacts"]
    (uri,) = (output["artifacts"][0]["uri"] for output in outputs.values())
    assert re.fullmatch(rf"s3://bucket/prefix/training/{run_id}/validate/[0-9a-f-]{{36}}/executor-logs", uri)


def test_pod_that_exceeds_its_deadline_fails():
    with running() as (server, run_id):
        server.fail_stage(run_id, "train", reason="DeadlineExceeded")
        message = "Pod was active on the node longer than the specified deadline"
        assert phases(server, run_id)["(0).root(0).train(0).executor(0)"] == ("Failed", message)


def test_cancelling_a_run_ends_its_running_pods():
    with running() as (server, run_id):
        server.reach(run_id, "train")
        post(server, f"/apis/v2beta1/runs/{run_id}:terminate", {})
        assert server.advance(run_id) == "FAILED"
        nodes = phases(server, run_id)
    assert nodes["(0).root(0).train(0).executor(0)"] == ("Failed", "Step exceeded its deadline")
    assert nodes["(0).root(0).train"][1].startswith("retry exceeded workflow deadline ")


def test_stage_of_a_loop_is_reached_by_its_number(server, client, run_id):
    second = server.reach(run_id, "evaluate[1]")
    assert server.reach(run_id, "evaluate[0]") != second
    name = "(0).root(0).loop(0).iteration-iterations(1:1)(0).iteration-item(0).evaluate(0).executor(0)"
    assert phases(server, run_id)[name] == ("Running", "")


def test_v1beta1_is_not_found_on_a_server_without_it():
    with running(v1beta1=False) as (server, run_id), pytest.raises(urllib.error.HTTPError) as raised:
        manifest(server, run_id)
    assert raised.value.code == 404
    assert json.loads(raised.value.read())["code"] == 5


def test_unknown_run_is_not_found_in_v1beta1(server):
    with pytest.raises(urllib.error.HTTPError) as raised:
        manifest(server, "none")
    assert json.loads(raised.value.read())["code"] == 5


def test_workflow_that_stays_too_large_fails():
    with running(max_bytes=28_000) as (server, run_id):
        server.reach(run_id, "validate")
        assert server.finish(run_id) == "FAILED"
        status = manifest(server, run_id)["status"]
    assert status["phase"] == "Error"
    assert status["message"].startswith("workflow is longer than maximum allowed size. compressed size ")


def test_only_the_id_placeholder_is_replaced_in_the_parameters_of_a_run():
    with running() as (server, run_id):
        server.reach(run_id, "validate")
        values = server.workflows[run_id].driver.executions["13"].values
    assert values["run"] == f"a-{run_id}-[[ScheduledTime]]"


def test_retry_of_a_run_continues_at_the_failed_stage(server, client, run_id):
    server.fail_stage(run_id, "train")
    kfp_server_api.RunServiceApi(client._run_api.api_client).run_service_retry_run(run_id)
    assert client.get_run(run_id).state == states(client, run_id)["train"] == "RUNNING"
    assert server.finish(run_id) == "SUCCEEDED"
    assert states(client, run_id)["validate"] == "SUCCEEDED"


def test_retry_refuses_a_run_that_has_not_failed(server, client, run_id):
    retry = client._run_api.run_service_retry_run
    server.finish(run_id)
    status, message = refused(retry, run_id)
    assert status == 409
    assert "Workflow must be Failed/Error to retry" in message


def test_terminated_run_is_canceling_before_it_fails_and_cannot_be_terminated_again(server, client, run_id):
    server.advance(run_id)
    client.terminate_run(run_id)
    assert client.get_run(run_id).state == "CANCELING"
    run = client.get_run(run_id)
    assert [status.state for status in run.state_history] == ["PENDING", "RUNNING", "CANCELING", "FAILED"]
    status, message = refused(client.terminate_run, run_id)
    assert status == 400
    assert message.endswith(f"Failed to terminate a run {run_id}. Row not found")


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        (
            {"run": 1},
            "input parameter run requires type string, but the input parameter is not of string value type",
        ),
        ({"run": "a", "frames": "2"}, "input parameter frames requires type double or integer"),
        ({"run": "a", "size": 1}, "parameter(s) provided are not required by pipeline: size"),
        ({}, "parameter run is not optional, yet has neither default value nor user provided value"),
    ],
)
def test_parameters_are_checked(client, parameters, message):
    body = V2beta1Run(
        display_name="a", pipeline_spec=pipeline(), runtime_config=V2beta1RuntimeConfig(parameters=parameters)
    )
    status, answer = refused(client._run_api.run_service_create_run, run=body)
    assert status == 400
    assert message in answer


@pytest.mark.parametrize(
    "body",
    [
        {"pipeline_spec": pipeline()},
        {"display_name": "a"},
        {"display_name": "a", "pipeline_spec": {"root": {}}},
        {"display_name": "a", "pipeline_version_reference": {"pipeline_version_id": "none"}},
        {
            "display_name": "a",
            "pipeline_spec": pipeline(),
            "runtime_config": {"parameters": {"run": "a" * 10_000}},
        },
    ],
)
def test_run_without_a_name_or_a_valid_pipeline_is_an_internal_error(client, body):
    assert refused(client._run_api.run_service_create_run, run=body)[0] == 500


@pytest.mark.parametrize("body", [{"display_name": "a", "colour": "b"}, {"display_name": 1}, {"state": "HAPPY"}])
def test_body_with_unknown_fields_or_wrong_types_is_refused(client, body):
    status, message = refused(client._run_api.run_service_create_run, run=body)
    assert status == 400
    assert message.startswith("proto:")


def test_pages_hold_every_run_once(client, package):
    ids = {start(client, package) for _ in range(5)}
    listed, token = [], ""
    while token is not None:
        answer = client.list_runs(page_size=2, page_token=token, sort_by="created_at desc")
        listed += [run.run_id for run in answer.runs]
        token = answer.next_page_token
    assert len(listed) == answer.total_size == 5
    assert set(listed) == ids
    assert refused(client.list_runs, page_token="xyz")[0] == 400


def test_filter_finds_runs_by_state(server, client, package):
    first, _ = start(client, package), start(client, package)
    server.finish(first)
    predicate = {"operation": 1, "key": "state", "stringValue": "SUCCEEDED"}
    runs = client.list_runs(filter=json.dumps({"predicates": [predicate]})).runs
    assert [run.run_id for run in runs] == [first]
    assert refused(client.list_runs, filter='{"predicates": [{"key": "colour"}]}')[0] == 400


def test_names_of_pipelines_and_of_their_versions_are_unique(client, package):
    uploaded = client.upload_pipeline(package, pipeline_name="training")
    with pytest.raises(ApiException) as raised:
        client.upload_pipeline(package, pipeline_name="training")
    assert raised.value.status == 409
    version = client.upload_pipeline_version(package, "v2", pipeline_id=uploaded.pipeline_id)
    with pytest.raises(ApiException) as raised:
        client.upload_pipeline_version(package, "v2", pipeline_id=uploaded.pipeline_id)
    assert raised.value.status == 409
    assert client.get_pipeline_id("training") == uploaded.pipeline_id
    run = client.run_pipeline(
        None,
        "a",
        pipeline_id=uploaded.pipeline_id,
        version_id=version.pipeline_version_id,
        params={"run": "a"},
    )
    assert run.pipeline_version_reference.pipeline_version_id == version.pipeline_version_id
    assert refused(client.delete_pipeline, uploaded.pipeline_id)[0] == 400


def test_upload_of_a_file_without_a_pipeline_is_refused(client, tmp_path):
    (tmp_path / "other.yaml").write_text("kind: Workflow\n")
    with pytest.raises(ApiException) as raised:
        client.upload_pipeline(str(tmp_path / "other.yaml"), pipeline_name="training")
    assert raised.value.status == 400
    assert json.loads(raised.value.body)["error_message"] == "no pipeline spec is provided"


def test_second_experiment_with_the_same_name_is_refused(client):
    client.create_experiment("seeds")
    body = kfp_server_api.V2beta1Experiment(display_name="seeds")
    status, message = refused(client._experiment_api.experiment_service_create_experiment, experiment=body)
    assert status == 409
    assert "The name seeds already exists" in message


def schedule(client: kfp.Client, package: str, cron: str = "0 0 3 * * *", **more: Any) -> Any:
    experiment = client.get_experiment(experiment_name="Default").experiment_id
    options = {"params": {"run": "night-[[ScheduledTime]]-[[Index]]"}, "cron_expression": cron, **more}
    return client.create_recurring_run(experiment, "nightly", pipeline_package_path=package, **options)


def test_schedule_fires_with_its_parameters_unchanged(server, client, package):
    job = schedule(client, package, max_concurrency=1, no_catchup=True)
    assert (job.status, job.max_concurrency) == ("ENABLED", "1")
    fired = client.get_run(server.fire(job.recurring_run_id, at=0))
    assert fired.runtime_config.parameters["run"] == "night-[[ScheduledTime]]-[[Index]]"
    assert re.fullmatch(r"nightly[0-9a-f]{5}-1-\d+", fired.display_name)
    assert fired.recurring_run_id == job.recurring_run_id
    assert server.fire(job.recurring_run_id) is None
    server.finish(fired.run_id)
    client.disable_recurring_run(job.recurring_run_id)
    assert server.fire(job.recurring_run_id) is None


def test_driver_fills_in_the_scheduled_time_of_a_scheduled_run(server, client, package):
    job = schedule(client, package)
    run_id = server.fire(job.recurring_run_id, at=1795898040)
    values = server.executor_input_of(run_id, "validate")["inputs"]["parameterValues"]
    assert values == {"at": "2026-11-28T20:34:00Z"}
    assert client.get_run(run_id).scheduled_at.isoformat() == "2026-11-28T20:34:00+00:00"


def test_driver_fills_in_the_time_of_creation_of_an_unscheduled_run(server, client, run_id):
    server.reach(run_id, "validate")
    values = server.executor_input_of(run_id, "validate")["inputs"]["parameterValues"]
    assert values["at"] == f"{client.get_run(run_id).created_at:%Y-%m-%dT%H:%M:%SZ}"


def test_schedules_may_share_a_name(client, package):
    schedule(client, package)
    schedule(client, package)
    assert len(client.list_recurring_runs().recurring_runs) == 2


@pytest.mark.parametrize("more", [{"max_concurrency": 0}, {"max_concurrency": 11}, {"cron": "61 * * * * *"}])
def test_schedule_with_an_illegal_limit_or_cron_is_refused(client, package, more):
    assert refused(schedule, client, package, **more)[0] == 400


@pytest.mark.parametrize(
    "cron", ["0 0 3 * * MON-fri", "0 3 * * *", "*/5 0 3 ? JAN,3 0-6", "@every 1h30m", "@daily"]
)
def test_cron_expressions_that_robfig_accepts_are_accepted(cron):
    check_cron(cron)


@pytest.mark.parametrize(
    "cron", ["", "0 3 * *", "0 0 3 * * 7", "0 0 24 * * *", "@never", "0 0 3 0 * *", "a b c d e"]
)
def test_cron_expressions_that_robfig_refuses_are_refused(cron):
    with pytest.raises(Refused):
        check_cron(cron)


def test_log_of_a_running_pod_is_found_only_by_the_name_of_the_pod(server, run_id):
    pod = server.write_log(run_id, "train", "iteration 1\n")
    assert log(server, run_id, pod) == "iteration 1\n"
    for key in ("unknown", node_id(server, run_id, pod)):
        with pytest.raises(urllib.error.HTTPError) as raised:
            log(server, run_id, key)
        assert raised.value.code == 500
        assert "error_message" in json.loads(raised.value.read())


def test_archived_logs_are_found_by_pod_and_by_node_when_the_workflow_is_removed(server, run_id):
    pod = server.write_log(run_id, "train", "iteration 1\n")
    server.finish(run_id)
    server.remove_workflow(run_id)
    assert log(server, run_id, pod) == log(server, run_id, node_id(server, run_id, pod)) == "iteration 1\n"


def test_log_of_a_deleted_pod_is_archived(server, run_id):
    first = server.write_log(run_id, "train", "iteration 1\n")
    server.delete_pod(run_id, "train")
    second = server.write_log(run_id, "train", "iteration 2\n")
    assert (log(server, run_id, first), log(server, run_id, second)) == ("iteration 1\n", "iteration 2\n")


def node_id(server: KubeflowServer, run_id: str, pod: str) -> str:
    return f"{manifest(server, run_id)['metadata']['name']}-{pod.rpartition('-')[2]}"


def test_requests_with_an_expired_token_are_refused(monkeypatch, tmp_path):
    with KubeflowServer(tokens={"good"}) as server:
        client = connect(server, monkeypatch, tmp_path, existing_token="good", namespace="team")
        assert client.list_runs().runs is None
        server.tokens.clear()
        with pytest.raises(ApiException) as raised:
            client.list_runs()
        assert raised.value.status == 401
        assert json.loads(raised.value.body)["code"] == 16


def test_login_page_is_html(monkeypatch, tmp_path):
    with KubeflowServer(tokens=set(), login_page=True) as server, urllib.request.urlopen(server.url) as answer:
        assert answer.headers.get_content_type() == "text/html"


def test_other_namespaces_are_forbidden(monkeypatch, tmp_path):
    with KubeflowServer(multi_user=True) as server:
        client = connect(server, monkeypatch, tmp_path, namespace="team")
        client.create_experiment("seeds")
        assert client.list_experiments().experiments[0].namespace == "team"
        status, message = refused(client.list_runs, namespace="other")
        assert status == 403
        assert "is not authorized with reason" in message
        assert refused(client._run_api.run_service_list_runs)[0] == 400


def test_faults_occur_as_often_as_requested(server, client):
    server.fail(503, times=2, path="/runs")
    assert [refused(client.list_runs)[0] for _ in range(2)] == [503, 503]
    assert client.list_runs().total_size is None
    server.drop()
    with pytest.raises(Exception, match="closed|aborted|Max retries"):
        urllib.request.urlopen(server.url, timeout=5)
    assert server.count("GET", "/runs") == 3


def test_server_keeps_its_address_and_its_runs_when_it_restarts(server, client, run_id):
    url = server.url
    server.stop()
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(url, timeout=5)
    server.start()
    assert server.url == url
    assert client.get_run(run_id).display_name == "first"


def test_kubernetes_server_answers_for_existing_missing_and_forbidden_objects():
    with KubernetesServer(tokens={"good"}) as server:
        server.add("/api/v1/namespaces/team/secrets/s3")
        server.add("/api/v1/namespaces/team/pods/a", labels={"pipeline/runid": "1"})
        server.forbidden.append("/nodes")
        assert kubernetes(server, "/api/v1/namespaces/team/secrets/s3")[0] == 200
        assert kubernetes(server, "/api/v1/namespaces/team/secrets/none")[0] == 404
        assert kubernetes(server, "/api/v1/nodes")[0] == 403
        pods = json.loads(kubernetes(server, "/api/v1/namespaces/team/pods?labelSelector=pipeline/runid%3D1")[1])
        assert [item["metadata"]["name"] for item in pods["items"]] == ["a"]


def kubernetes(server: KubernetesServer, path: str) -> tuple[int, str]:
    request = urllib.request.Request(server.url + path, headers={"Authorization": "Bearer good"})
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()
