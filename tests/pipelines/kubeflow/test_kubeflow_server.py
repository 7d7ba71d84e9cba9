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
    """Validate, then train with retries, then a loop over the seeds."""
    seeds = {"parameters": {"seeds": {"parameterType": "LIST"}}}
    given = {"parameters": {"seeds": {"componentInputParameter": "seeds"}}}
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
                    "loop": task("comp-loop", "train", inputs=given, parameterIterator=loop),
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
    """Return phase and message of every node by its name without the workflow's."""
    workflow = manifest(server, run_id)
    nodes = by_name(nodes_of(workflow), workflow["metadata"]["name"])
    return {name: (node["phase"], node.get("message", "")) for name, node in nodes.items()}


def log(server: KubeflowServer, run_id: str, pod: str) -> str:
    address = f"{server.url}/apis/v1alpha1/runs/{run_id}/nodes/{pod}/log"
    with urllib.request.urlopen(address, timeout=5) as answer:
        return answer.read().decode()


def test_run_goes_on_only_when_told(server, client, run_id):
    assert client.get_run(run_id).state == "PENDING"
    assert states(client, run_id) == {}
    assert server.advance(run_id) == "RUNNING"
    assert states(client, run_id)["validate"] == "RUNNING"
    assert states(client, run_id)["validate-driver"] == "SUCCEEDED"
    assert server.finish(run_id) == "SUCCEEDED"
    assert [status.state for status in client.get_run(run_id).state_history] == ["PENDING", "RUNNING", "SUCCEEDED"]


def test_unfinished_has_ends_long_ago(server, client, run_id):
    server.advance(run_id)
    run = client.get_run(run_id)
    assert run.finished_at.year == 1970
    assert {detail.end_time.year for detail in run.run_details.task_details if detail.state == "RUNNING"} == {1}


def test_stages_have_the_nodes_of_argo(server, client, run_id):
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


def test_attempts_that_were_lost_are_listed(server, client, run_id):
    first = server.reach(run_id, "train")
    second = server.retry_stage(run_id, "train", "out of memory")
    assert phases(server, run_id)["(0).root(0).train(0).executor(0)"] == ("Error", "pod deleted")
    assert phases(server, run_id)["(0).root(0).train(0).executor(1)"] == ("Running", "")
    assert second != first
    assert server.finish(run_id) == "SUCCEEDED"


def test_failure_omits_what_follows(server, client, run_id):
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
    """Delete every pod of a stage until the run ends; how many there were."""
    count = 0
    while server.runs[run_id]["state"] == "RUNNING" or not count:
        server.delete_pod(run_id, stage)
        server.workflows[run_id].settle()
        count += 1
    return count


def test_stock_defaults_multiply_attempts_of_lost_pods_at_every_level():
    """The pod, its DAG, the root and the whole each have the 2 retries of the defaults."""
    with running() as (server, run_id):
        assert delete_pods(server, run_id, "validate") == 3**4
        found = phases(server, run_id)
        assert found["(2).root(2).validate(2).executor(2)"] == ("Error", "pod deleted")
        assert found["(0).root(1).validate"] == found[""] == ("Error", "No more retries left")
        workflow = manifest(server, run_id)
    assert (workflow["status"]["phase"], workflow["status"]["message"]) == ("Error", "No more retries left")


def test_stage_keeps_its_own_limit_with_the_policy_of_the_defaults():
    with running() as (server, run_id):
        assert delete_pods(server, run_id, "train") == 4 * 3**3


def test_without_defaults_containers_that_failed_are_tried_again_and_lost_pods_are_not():
    with running(template_defaults=BEFORE_2_17) as (server, run_id):
        assert server.fail_stage(run_id, "train", attempts=3) == "RUNNING"
        assert server.fail_stage(run_id, "train") == "FAILED"
        assert phases(server, run_id)[".root.train.executor"] == ("Failed", "No more retries left")
    with running(template_defaults=BEFORE_2_17) as (server, run_id):
        server.delete_pod(run_id, "train")
        assert server.advance(run_id) == "FAILED"
        assert phases(server, run_id)[".root.train.executor"] == ("Error", "pod deleted")


def test_always_tries_both_again_and_multiplies_nothing():
    with running(template_defaults=ALWAYS) as (server, run_id):
        server.delete_pod(run_id, "train")
        assert server.fail_stage(run_id, "train", attempts=2) == "RUNNING"
        assert server.fail_stage(run_id, "train", exit_code=139) == "FAILED"
        found = phases(server, run_id)
    assert found["(0).root(0).train(0).executor(3)"] == ("Failed", "main: Error (exit code 139)")
    assert found["(0).root(0).train"] == found[""] == ("Failed", "No more retries left")


def test_loss_that_is_tried_again_depends_on_the_policy():
    for defaults, phase in ((STOCK, "Error"), (BEFORE_2_17, "Failed")):
        with running(template_defaults=defaults) as (server, run_id):
            server.retry_stage(run_id, "train")
            nodes = phases(server, run_id)
        assert [found for name, (found, _) in nodes.items() if name.endswith("executor(0)")].count(phase) == 1


def test_driver_that_fails_ends_the_run():
    with running() as (server, run_id):
        assert server.fail_driver(run_id, "train", "no such secret") == "FAILED"
        found = phases(server, run_id)
        assert found["(0).root(0).train-driver(0)"] == ("Failed", "main: Error (exit code 1)")
        assert found["(0).root(0).train"] == ("Omitted", "omitted: depends condition not met")


def test_pod_that_waits_says_why_and_goes_on():
    with running() as (server, run_id):
        pod = server.wait_stage(run_id, "train", "Unschedulable: 0/1 nodes are available")
        name = "(0).root(0).train(0).executor(0)"
        assert phases(server, run_id)[name] == ("Pending", "Unschedulable: 0/1 nodes are available")
        with pytest.raises(urllib.error.HTTPError) as raised:
            log(server, run_id, pod)
        raised.value.close()
        server.reach(run_id, "train")
        assert phases(server, run_id)[name] == ("Running", "")


def test_pod_that_is_deleted_before_it_ran_is_made_anew():
    with running() as (server, run_id):
        waiting = server.wait_stage(run_id, "train")
        assert server.delete_pod(run_id, "train") == waiting
        assert server.reach(run_id, "train") == waiting


def test_artifacts_lie_below_the_root_that_kfp_launcher_says():
    with running(pipeline_root="s3://bucket/prefix/") as (server, run_id):
        server.reach(run_id, "validate")
        given = server.driver_outputs_of(run_id, "validate")
    (uri,) = (each["artifacts"][0]["uri"] for each in given["outputs"]["artifacts"].values())
    assert re.fullmatch(rf"s3://bucket/prefix/training/{run_id}/validate/[0-9a-f-]{{36}}/executor-logs", uri)


def test_pod_that_overruns_its_deadline_has_failed():
    with running() as (server, run_id):
        server.fail_stage(run_id, "train", reason="DeadlineExceeded")
        message = "Pod was active on the node longer than the specified deadline"
        assert phases(server, run_id)["(0).root(0).train(0).executor(0)"] == ("Failed", message)


def test_cancelling_ends_pods_that_run():
    with running() as (server, run_id):
        server.reach(run_id, "train")
        post(server, f"/apis/v2beta1/runs/{run_id}:terminate", {})
        assert server.advance(run_id) == "FAILED"
        found = phases(server, run_id)
    assert found["(0).root(0).train(0).executor(0)"] == ("Failed", "Step exceeded its deadline")
    assert found["(0).root(0).train"][1].startswith("retry exceeded workflow deadline ")


def test_stage_of_a_loop_is_reached_by_its_number(server, client, run_id):
    second = server.reach(run_id, "evaluate[1]")
    assert server.reach(run_id, "evaluate[0]") != second
    name = "(0).root(0).loop(0).iteration-iterations(1:1)(0).iteration-item(0).evaluate(0).executor(0)"
    assert phases(server, run_id)[name] == ("Running", "")


def test_servers_before_have_no_v1beta1():
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


def test_parameters_of_a_run_have_its_id_and_nothing_else_filled_in():
    with running() as (server, run_id):
        server.reach(run_id, "validate")
        given = server.workflows[run_id].driver.executions["13"].values
    assert given["run"] == f"a-{run_id}-[[ScheduledTime]]"


def test_retry_goes_on_at_the_failed_stage(server, client, run_id):
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


def test_terminate_cancels_first_and_refuses_what_is_finished(server, client, run_id):
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
    status, said = refused(client._run_api.run_service_create_run, run=body)
    assert status == 400
    assert message in said


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
def test_run_is_an_internal_error_without_name_or_pipeline(client, body):
    assert refused(client._run_api.run_service_create_run, run=body)[0] == 500


@pytest.mark.parametrize("body", [{"display_name": "a", "colour": "b"}, {"display_name": 1}, {"state": "HAPPY"}])
def test_body_has_only_known_fields_of_their_types(client, body):
    status, message = refused(client._run_api.run_service_create_run, run=body)
    assert status == 400
    assert message.startswith("proto:")


def test_pages_hold_every_run_once(client, package):
    ids = {start(client, package) for _ in range(5)}
    seen, token = [], ""
    while token is not None:
        answer = client.list_runs(page_size=2, page_token=token, sort_by="created_at desc")
        seen += [run.run_id for run in answer.runs]
        token = answer.next_page_token
    assert len(seen) == answer.total_size == 5
    assert set(seen) == ids
    assert refused(client.list_runs, page_token="xyz")[0] == 400


def test_filter_finds_runs_by_state(server, client, package):
    first, _ = start(client, package), start(client, package)
    server.finish(first)
    predicate = {"operation": 1, "key": "state", "stringValue": "SUCCEEDED"}
    found = client.list_runs(filter=json.dumps({"predicates": [predicate]})).runs
    assert [run.run_id for run in found] == [first]
    assert refused(client.list_runs, filter='{"predicates": [{"key": "colour"}]}')[0] == 400


def test_pipelines_and_versions_have_names_of_their_own(client, package):
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


def test_upload_wants_a_pipeline(client, tmp_path):
    (tmp_path / "other.yaml").write_text("kind: Workflow\n")
    with pytest.raises(ApiException) as raised:
        client.upload_pipeline(str(tmp_path / "other.yaml"), pipeline_name="training")
    assert raised.value.status == 400
    assert json.loads(raised.value.body)["error_message"] == "no pipeline spec is provided"


def test_experiment_exists_once(client):
    client.create_experiment("seeds")
    body = kfp_server_api.V2beta1Experiment(display_name="seeds")
    status, message = refused(client._experiment_api.experiment_service_create_experiment, experiment=body)
    assert status == 409
    assert "The name seeds already exists" in message


def schedule(client: kfp.Client, package: str, cron: str = "0 0 3 * * *", **more: Any) -> Any:
    experiment = client.get_experiment(experiment_name="Default").experiment_id
    given = {"params": {"run": "night-[[ScheduledTime]]-[[Index]]"}, "cron_expression": cron, **more}
    return client.create_recurring_run(experiment, "nightly", pipeline_package_path=package, **given)


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


def test_driver_fills_in_the_time_of_the_schedule(server, client, package):
    job = schedule(client, package)
    run_id = server.fire(job.recurring_run_id, at=1795898040)
    given = server.driver_outputs_of(run_id, "validate")["inputs"]["parameterValues"]
    assert given == {"at": "2026-11-28T20:34:00Z"}
    assert client.get_run(run_id).scheduled_at.isoformat() == "2026-11-28T20:34:00+00:00"


def test_driver_fills_in_the_creation_of_a_run_without_schedule(server, client, run_id):
    server.reach(run_id, "validate")
    given = server.driver_outputs_of(run_id, "validate")["inputs"]["parameterValues"]
    assert given["at"] == f"{client.get_run(run_id).created_at:%Y-%m-%dT%H:%M:%SZ}"


def test_schedules_may_share_a_name(client, package):
    schedule(client, package)
    schedule(client, package)
    assert len(client.list_recurring_runs().recurring_runs) == 2


@pytest.mark.parametrize("more", [{"max_concurrency": 0}, {"max_concurrency": 11}, {"cron": "61 * * * * *"}])
def test_schedule_is_checked(client, package, more):
    assert refused(schedule, client, package, **more)[0] == 400


@pytest.mark.parametrize(
    "cron", ["0 0 3 * * MON-fri", "0 3 * * *", "*/5 0 3 ? JAN,3 0-6", "@every 1h30m", "@daily"]
)
def test_cron_accepts_what_robfig_does(cron):
    check_cron(cron)


@pytest.mark.parametrize(
    "cron", ["", "0 3 * *", "0 0 3 * * 7", "0 0 24 * * *", "@never", "0 0 3 0 * *", "a b c d e"]
)
def test_cron_refuses_what_robfig_does(cron):
    with pytest.raises(Refused):
        check_cron(cron)


def test_logs_are_those_of_a_pod(server, run_id):
    pod = server.write_log(run_id, "train", "iteration 1\n")
    assert log(server, run_id, pod) == "iteration 1\n"
    for key in ("gone", node_id(server, run_id, pod)):
        with pytest.raises(urllib.error.HTTPError) as raised:
            log(server, run_id, key)
        assert raised.value.code == 500
        assert "error_message" in json.loads(raised.value.read())


def test_archived_logs_have_two_names_once_the_workflow_is_gone(server, run_id):
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


def test_tokens_expire(monkeypatch, tmp_path):
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


def test_faults_come_as_often_as_asked(server, client):
    server.fail(503, times=2, path="/runs")
    assert [refused(client.list_runs)[0] for _ in range(2)] == [503, 503]
    assert client.list_runs().total_size is None
    server.drop()
    with pytest.raises(Exception, match="closed|aborted|Max retries"):
        urllib.request.urlopen(server.url, timeout=5)
    assert server.count("GET", "/runs") == 3


def test_server_comes_back_with_its_runs(server, client, run_id):
    url = server.url
    server.stop()
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(url, timeout=5)
    server.start()
    assert server.url == url
    assert client.get_run(run_id).display_name == "first"


def test_kubernetes_answers_as_statuses():
    with KubernetesServer(tokens={"good"}) as server:
        server.add("/api/v1/namespaces/team/secrets/s3")
        server.add("/api/v1/namespaces/team/pods/a", labels={"pipeline/runid": "1"})
        server.forbidden.append("/nodes")
        assert kubernetes(server, "/api/v1/namespaces/team/secrets/s3")[0] == 200
        assert kubernetes(server, "/api/v1/namespaces/team/secrets/none")[0] == 404
        assert kubernetes(server, "/api/v1/nodes")[0] == 403
        found = json.loads(kubernetes(server, "/api/v1/namespaces/team/pods?labelSelector=pipeline/runid%3D1")[1])
        assert [item["metadata"]["name"] for item in found["items"]] == ["a"]


def kubernetes(server: KubernetesServer, path: str) -> tuple[int, str]:
    request = urllib.request.Request(server.url + path, headers={"Authorization": "Bearer good"})
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()
