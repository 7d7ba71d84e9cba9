"""Run every command as a user does, against a test server that behaves like Kubeflow's."""

import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import mappo
from mappo.config import from_json, override, to_json
from mappo.recipes import recipe
from mappo.tuning.study_config import BudgetConfig, StudyConfig, study_config_from_json
from pipelines.__main__ import main
from tests.conftest import endless
from tests.support.argo import ALWAYS, BEFORE_2_17, STOCK, Workflow
from tests.support.kubeflow_server import KubeflowServer

REPOSITORY = Path(__file__).parents[2]
GOLDEN = REPOSITORY / "tests" / "golden" / "training.yaml"
SUBMIT = ["submit", "--file", str(GOLDEN)]
IN_STORE = ["-p", "store=s3://bucket/runs"]
QUICK = ["--interval", "0.1"]


# --- submit ---


def test_pipeline_compiled_on_submission_has_the_configuration_as_its_default(kubeflow, read):
    submitted = read(
        *("submit", "balance", "--image", "a:1", "--name", "mine", "--learner.epochs=7"),
        *("-p", "store=s3://a1b/c", "-p", "run=first"),
    )
    (run,) = kubeflow.runs.values()
    assert submitted["id"] == run["run_id"]
    assert submitted["name"].startswith("mine ")
    assert submitted["state"] == "PENDING"
    parameters = run["pipeline_spec"]["pipeline_spec"]["root"]["inputDefinitions"]["parameters"]
    expected = override(recipe("balance"), {"learner": {"epochs": 7}})
    assert from_json(parameters["config"]["defaultValue"]) == expected
    assert parameters["image"]["defaultValue"] == "a:1"
    assert run["runtime_config"]["parameters"] == {"store": "s3://a1b/c", "run": "first"}
    assert "platforms" in run["pipeline_spec"]["platform_spec"]


def test_flags_set_parameters_of_a_compiled_pipeline(kubeflow, read):
    read(*SUBMIT, "balance", "--seed=3", "--image", "b:2", "-p", "train_gpu_count=1", "--experiment", "mine")
    (run,) = kubeflow.runs.values()
    parameters = run["runtime_config"]["parameters"]
    assert from_json(parameters.pop("config")) == override(recipe("balance"), {"seed": 3})
    assert parameters == {"image": "b:2", "train_gpu_count": "1"}
    assert kubeflow.experiments[run["experiment_id"]]["display_name"] == "mine"


def test_flag_seeds_submits_the_seeds_pipeline(kubeflow, read):
    read("submit", "--image", "a:1", "--seeds", "4,5", "--parallel-seeds", "1")
    (run,) = kubeflow.runs.values()
    specification = run["pipeline_spec"]["pipeline_spec"]
    assert specification["pipelineInfo"]["name"] == "mappo-seeds"
    assert specification["root"]["inputDefinitions"]["parameters"]["seeds"]["defaultValue"] == ["4", "5"]


def test_pipeline_version_is_uploaded_once_and_referenced_by_its_runs(kubeflow, read, cli, tmp_path):
    for _ in range(2):
        read(*SUBMIT, "--upload")
    (pipeline,), (version,) = kubeflow.pipelines.values(), kubeflow.versions.values()
    assert pipeline["display_name"] == "mappo-training"
    assert version["display_name"].startswith(f"{mappo.__version__}-")
    references = [run["pipeline_version_reference"] for run in kubeflow.runs.values()]
    assert (
        references
        == [{"pipeline_id": pipeline["pipeline_id"], "pipeline_version_id": version["pipeline_version_id"]}] * 2
    )
    read(*SUBMIT, "--upload", "mine")
    status, _, err = cli("submit", "--image", "other:1", "--upload", "mine")
    assert status == 2
    assert "version 'mine' of mappo-training exists with another content" in err
    placed = tmp_path / "placed.yaml"
    placed.write_text(GOLDEN.read_text().replace("sizeLimit: 2Gi", "sizeLimit: 64Gi"))
    status, _, err = cli("submit", "--file", str(placed), "--upload", "mine")
    assert status == 2
    assert "another content" in err


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["-p", "train_gpus=1"], "parameter train_gpus: unknown; did you mean"),
        (["-p", "train_cpu=many"], "must be a number of cores"),
        (["-p", "train_tolerations=x"], "must be a JSON list"),
        (["-p", "config={}}"], "parameter config"),
        (["-p", "image=a"], "must be NAME:TAG"),
        (["-p", "train_cpu"], "must be NAME=VALUE"),
        (["--site", "k8s/site.yaml"], "leave out --file, or them"),
        (["--learner.epochs=0"], "learner.epochs = 0"),
        (["-p", "run=nightly"], "a name needs a store"),
        (["-p", "run=Nightly_1", *IN_STORE], "run 'Nightly_1': a name has"),
        (["-p", "run=n-[[ScheduledTime.2006-01-02T15:04]]", *IN_STORE], "write [[ScheduledTime]]"),
        (["-p", "run=n-[[CurrentTime]]", *IN_STORE], "write [[ScheduledTime]]"),
        (["-p", "store=s3://bucket/über", "-p", "run=a"], "not a location"),
        (["-p", "store=runs", "-p", "run=a"], "a directory of a pod is lost"),
        (["--device=cpu", "-p", "train_gpu_count=1"], "leaves the GPUs of stage train unused"),
        (["--edition", "a"], "parameter edition: unknown"),
    ],
)
def test_wrong_submission_is_refused_without_a_request(kubeflow, cli, arguments, reason):
    status, _, err = cli(*SUBMIT, *arguments)
    assert status == 2
    assert reason in err
    assert not kubeflow.requests


def test_file_that_is_not_a_compiled_pipeline_is_refused(kubeflow, cli, tmp_path):
    for text in ("a: 1", "- 1", "a: [", ""):
        (tmp_path / "x.yaml").write_text(text)
        status, _, err = cli("submit", "--file", str(tmp_path / "x.yaml"))
        assert status == 2
        assert "not a compiled pipeline" in err
    assert cli("submit", "--file", "none.yaml")[0] == 2


def test_pipeline_root_and_service_account_reach_the_server(kubeflow, read):
    read(*SUBMIT, "--pipeline-root", "s3://bucket/root", "--service-account", "trainer")
    (run,) = kubeflow.runs.values()
    assert run["runtime_config"]["pipeline_root"] == "s3://bucket/root"
    assert run["service_account"] == "trainer"


def test_multi_user_kubeflow_keeps_everything_in_the_users_namespace(monkeypatch, kubeflow, read, cli):
    with KubeflowServer(multi_user=True, tokens={"mine"}) as server:
        monkeypatch.setenv("KF_PIPELINES_ENDPOINT", server.url)
        monkeypatch.setenv("KF_PIPELINES_TOKEN", "mine")
        status, _, err = cli(*SUBMIT)
        assert status == 2
        assert "--namespace" in err
        monkeypatch.setenv("KF_PIPELINES_NAMESPACE", "team")
        submitted = read(*SUBMIT, "--upload")
        read("schedule", "create", "nightly", "--cron", "@daily", "--file", str(GOLDEN))
        assert [row["id"] for row in read("runs", "list")] == [submitted["id"]]
        assert [row["name"] for row in read("schedule", "list")] == ["nightly"]
        (experiment,) = server.experiments.values()
        assert experiment["namespace"] == "team"
        (pipeline,) = server.pipelines.values()
        assert pipeline["namespace"] == "team"
        status, _, err = cli("runs", "list", "--namespace", "foreign")
        assert status == 3
        assert "may not do that here" in err


# --- runs ---


@pytest.fixture
def run_id(kubeflow, read) -> str:
    return read(*SUBMIT)["id"]


def test_runs_of_all_pages_are_listed_newest_first(kubeflow, read, cli):
    run_ids = [read(*SUBMIT, "--name", str(index))["id"] for index in range(3)]
    for index, run in enumerate(kubeflow.runs.values()):
        run["created_at"] = f"2026-01-0{index + 1}T00:00:00Z"
    assert [row["id"] for row in read("runs", "list")] == run_ids[::-1]
    assert [row["id"] for row in read("runs", "list", "--limit", "2")] == run_ids[:0:-1]
    assert [row["id"] for row in read("runs", "list", "--experiment", "Default")] == run_ids[::-1]
    assert read("runs", "show", "latest")["id"] == run_ids[-1]
    assert cli("runs", "list", "--limit", "-1")[0] == 2


def test_run_is_shown_with_all_its_stages_in_order(kubeflow, read, run_id):
    kubeflow.retry_stage(run_id, "train")
    summary = read("runs", "show", run_id)
    assert [(row["stage"], row["state"], row["attempt"]) for row in summary["stages"]] == [
        ("validate", "SUCCEEDED", 1),
        ("train", "RUNNING", 2),
        ("evaluate", "PENDING", ""),
    ]
    assert read("runs", "show", summary["name"])["id"] == run_id


def test_run_is_found_by_its_submitted_name_and_the_newest_wins(kubeflow, read, cli):
    run_ids = [read(*SUBMIT, "--name", name)["id"] for name in ("c3", "c3", "c3 x", "xc3", "c30", "C3")]
    for index, run in enumerate(kubeflow.runs.values()):
        run["created_at"] = f"2026-01-0{index + 1}T00:00:00Z"
    assert read("runs", "show", "c3")["id"] == run_ids[1]
    assert read("runs", "show", "c3 x")["id"] == run_ids[2]
    kubeflow.runs[run_ids[0]]["display_name"] = "c3"
    assert read("runs", "show", "c3")["id"] == run_ids[0]
    assert "no run has this ID or name" in cli("runs", "show", "3")[2]


def test_stages_of_a_loop_are_shown_with_their_index(kubeflow, read):
    submitted = read("submit", "--image", "a:1", "--seeds", "4,5", "--parallel-seeds", "1")
    kubeflow.fail_stage(submitted["id"], "evaluate")
    rows = read("runs", "show", submitted["id"])["stages"]
    states = {row["stage"]: row["state"] for row in rows}
    assert states["validate"] == states["train[0]"] == "SUCCEEDED"
    assert states["evaluate[0]"] == "FAILED"
    assert list(states) == ["validate", "train[0]", "evaluate[0]", "train[1]", "evaluate[1]", "compare"]


@pytest.mark.parametrize("reverse", [False, True])
def test_stage_without_pods_does_not_get_the_state_of_another_seed(monkeypatch, kubeflow, read, reverse):
    """The API returns details in no order, and only pods assign them to stages; an omitted stage has no pod."""
    submitted = read("submit", "--image", "a:1", "--seeds", "4,5", "--parallel-seeds", "2")
    details = Workflow.details
    monkeypatch.setattr(Workflow, "details", lambda flow: sorted(details(flow), key=_state, reverse=reverse))
    kubeflow.fail_stage(submitted["id"], "train")
    kubeflow.reach(submitted["id"], "evaluate")
    states = {row["stage"]: row["state"] for row in read("runs", "show", submitted["id"])["stages"]}
    assert states == {
        "validate": "SUCCEEDED",
        "train[0]": "FAILED",
        "evaluate[0]": "PENDING",
        "train[1]": "SUCCEEDED",
        "evaluate[1]": "RUNNING",
        "compare": "PENDING",
    }


def _state(detail: dict) -> str:
    return str(detail.get("state", ""))


def test_run_of_a_deleted_pipeline_version_is_shown_and_watched(kubeflow, read, cli):
    submitted = read("submit", "--image", "a:1", "--upload")
    kubeflow.finish(submitted["id"])
    kubeflow.versions.clear()
    assert {row["stage"] for row in read("runs", "show", submitted["id"])["stages"]} == {
        "validate",
        "train",
        "evaluate",
    }
    assert cli("runs", "watch", submitted["id"], *QUICK)[0] == 0


def test_archived_runs_are_not_listed(kubeflow, read):
    first, second = (read("submit", "--image", "a:1")["id"] for _ in range(2))
    kubeflow.runs[second]["storage_state"] = "ARCHIVED"
    assert [row["id"] for row in read("runs", "list")] == [first]
    assert read("runs", "show", "latest")["id"] == first


def test_watch_ends_with_status_0_when_the_run_succeeds(kubeflow, cli, run_id):
    threading.Timer(0.5, kubeflow.finish, [run_id]).start()
    status, out, _ = cli("runs", "watch", run_id, *QUICK)
    assert status == 0
    assert out.splitlines()[-1] == "run  SUCCEEDED"
    assert "evaluate  SUCCEEDED" in out


def test_watch_of_a_failing_run_shows_stage_and_reason_and_ends_with_status_1(kubeflow, cli, run_id):
    kubeflow.fail_stage(run_id, "train", "[train] iteration 3\n[train] failed: s3://a/b: access denied")
    status, out, err = cli("runs", "watch", run_id, *QUICK)
    assert status == 1
    assert "train  FAILED" in out
    assert "s3://a/b: access denied" in out
    assert "evaluate  NOT REACHED" in out
    assert "ended as FAILED" in err


@pytest.mark.parametrize("ends_as", ["CANCELED", "FAILED"])
def test_watch_ends_with_status_1_when_the_run_is_cancelled(monkeypatch, kubeflow, cli, ends_as):
    """The state of a cancelled run depends on the server's version."""
    with KubeflowServer(terminated_state=ends_as) as server:
        monkeypatch.setenv("KF_PIPELINES_ENDPOINT", server.url)
        assert cli(*SUBMIT)[0] == 0
        (run_id,) = server.runs
        server.reach(run_id, "train")
        threading.Timer(0.5, main, [["runs", "cancel", run_id]]).start()
        status, out, err = cli("runs", "watch", run_id, *QUICK)
    assert status == 1
    assert f"run  {ends_as}" in out
    assert "was cancelled" in err


def test_watch_continues_through_errors_a_restart_and_a_new_token(monkeypatch, kubeflow, cli, run_id, tmp_path):
    (tmp_path / "token").write_text("old")
    kubeflow.tokens = {"old"}

    def trouble() -> None:
        kubeflow.fail(502)
        time.sleep(1)
        kubeflow.drop()
        time.sleep(1)
        kubeflow.stop()
        kubeflow.start()
        (tmp_path / "token").write_text("new")
        kubeflow.tokens = {"new"}
        time.sleep(1)
        kubeflow.finish(run_id)

    threading.Thread(target=trouble).start()
    status, out, err = cli("runs", "watch", run_id, *QUICK, "--token-file", str(tmp_path / "token"))
    assert status == 0
    assert "run  SUCCEEDED" in out
    assert "trying again" in err


def test_watch_ends_with_status_3_when_the_token_expires_for_good(monkeypatch, kubeflow, cli, run_id):
    monkeypatch.setenv("KF_PIPELINES_TOKEN", "old")
    kubeflow.tokens = {"old"}
    threading.Timer(0.5, setattr, [kubeflow, "tokens", {"new"}]).start()
    status, _, err = cli("runs", "watch", run_id, *QUICK)
    assert status == 3
    assert "missing, wrong or expired" in err
    assert "the run continues" in err


def test_submit_and_watch_as_json_print_one_object_at_the_end(kubeflow, cli):
    def finish() -> None:
        while not kubeflow.runs:
            time.sleep(0.1)
        kubeflow.finish(next(iter(kubeflow.runs)))

    threading.Thread(target=finish).start()
    status, out, _ = cli(*SUBMIT, "--watch", *QUICK, "--output", "json")
    assert status == 0
    assert json.loads(out)["state"] == "SUCCEEDED"


def test_control_c_detaches_and_shows_how_to_cancel(kubeflow, run_id):
    kubeflow.reach(run_id, "train")
    process = _process("runs", "watch", run_id, *QUICK)
    assert process.stdout
    while "train  RUNNING" not in (line := process.stdout.readline()):
        assert line
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert f"runs cancel {run_id}" in err
    assert kubeflow.runs[run_id]["state"] == "RUNNING"


def _read_until_closed(terminal: int) -> str:
    output = b""
    try:
        while chunk := os.read(terminal, 4096):
            output += chunk
    except OSError:  # the terminal's other end is closed
        pass
    return output.decode()


def test_watch_on_a_terminal_updates_one_table(kubeflow, run_id):
    kubeflow.reach(run_id, "train")
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "pipelines", "runs", "watch", run_id, *QUICK],
        stdout=follower,
        env={**os.environ, "COLUMNS": "100", "TERM": "xterm"},
        cwd=REPOSITORY,
    )
    os.close(follower)
    threading.Timer(6, kubeflow.finish, [run_id]).start()
    text = _read_until_closed(leader)
    assert process.wait(30) == 0
    assert "\x1b[" in text
    assert "RUNNING" in text
    assert text.rstrip().rpartition("stage")[2].count("SUCCEEDED") == 3


def test_logs_shows_the_newest_attempt(kubeflow, cli, read, run_id):
    kubeflow.retry_stage(run_id, "train")
    kubeflow.write_log(run_id, "train", "second attempt\n")
    assert cli("runs", "logs", "train", run_id)[:2] == (0, "second attempt\n")
    (row,) = read("runs", "logs", "train", run_id)
    assert row == {"stage": "train", "log": "second attempt\n"}
    status, _, err = cli("runs", "logs", "evaluate", run_id)
    assert status == 3
    assert "the stage has no pod yet" in err
    status, _, err = cli("runs", "logs", "tune", run_id)
    assert status == 2
    assert "validate, train, evaluate" in err


def test_logs_of_all_attempts_are_shown_after_the_workflow_is_removed(kubeflow, cli, run_id):
    kubeflow.write_log(run_id, "train", "first\n")
    kubeflow.retry_stage(run_id, "train", "lost")
    kubeflow.write_log(run_id, "train", "[train] attempt 1; 2 left\nsecond\n[train] attempt 2; 1 left\nthird\n")
    kubeflow.finish(run_id)
    kubeflow.remove_workflow(run_id)
    logs = ["first\nlost\n", "[train] attempt 1; 2 left\nsecond\n", "[train] attempt 2; 1 left\nthird\n"]
    for number, log in enumerate(logs):
        assert cli("runs", "logs", "train", run_id, "--attempt", str(number))[:2] == (0, log)
    assert cli("runs", "logs", "train", run_id)[1] == logs[-1]
    status, _, err = cli("runs", "logs", "train", run_id, "--attempt", "3")
    assert (status, "stage train has attempts 0 to 2" in err) == (2, True)


def test_attempts_within_a_pod_are_shown(kubeflow, read, run_id):
    kubeflow.write_log(run_id, "train", "[train] attempt 0; 3 left\n[train] attempt 1; 2 left\n")
    assert [row["attempt"] for row in read("runs", "show", run_id)["stages"]] == [1, 2, ""]


@pytest.mark.parametrize(
    ("policy", "has_v1beta1"), [(STOCK, True), (BEFORE_2_17, True), (ALWAYS, True), (BEFORE_2_17, False)]
)
def test_stages_are_shown_under_every_policy_and_without_v1beta1(kubeflow, read, cli, policy, has_v1beta1):
    kubeflow.template_defaults, kubeflow.v1beta1 = policy, has_v1beta1
    run_id = read(*SUBMIT)["id"]
    kubeflow.write_log(run_id, "train", "words\n")
    states = {row["stage"]: row["state"] for row in read("runs", "show", run_id)["stages"]}
    assert states == {"validate": "SUCCEEDED", "train": "RUNNING", "evaluate": "PENDING"}
    assert cli("runs", "logs", "train", run_id)[1] == "words\n"


def test_five_seeds_are_watched_to_the_end_when_argo_compresses_their_nodes(kubeflow, read, cli):
    kubeflow.max_bytes = 300_000
    submitted = read("submit", "--image", "a:1", "--seeds", "0,1,2,3,4")
    threading.Timer(1, kubeflow.finish, [submitted["id"]]).start()
    status, out, _ = cli("runs", "watch", submitted["id"], "--output", "json", *QUICK)
    stages = json.loads(out)["stages"]
    assert status == 0
    assert len(stages) == 12
    assert {stage["state"] for stage in stages} == {"SUCCEEDED"}
    manifest = kubeflow.workflows[submitted["id"]].manifest()
    assert "compressedNodes" in manifest["status"]


@pytest.mark.parametrize(
    ("act", "state", "message"),
    [
        (
            lambda server, run: server.wait_stage(run, "train", "Unschedulable: 0/1 nodes are available: 1 x. y"),
            "PENDING",
            "waits for a node: 0/1 nodes are available: 1 x",
        ),
        (
            lambda server, run: server.fail_stage(run, "train", reason="OOMKilled"),
            "FAILED",
            "out of memory: the pod was killed at its memory limit of 20Gi; raise the limit by -p train_memory=",
        ),
        (
            lambda server, run: server.fail_stage(run, "train", reason="DeadlineExceeded"),
            "FAILED",
            "deadline exceeded: raise stages.train.timeout_seconds in the site's file",
        ),
        (
            lambda server, run: server.fail_driver(run, "train", "no such config map"),
            "FAILED",
            "driver: ",
        ),
        (
            lambda server, run: [server.delete_pod(run, "train"), server.reach(run, "train")],
            "RUNNING",
            "retried: its pod was deleted: evicted, preempted, or its node was lost",
        ),
    ],
)
def test_stage_has_the_reason_why_it_waits_failed_or_is_retried(kubeflow, read, run_id, act, state, message):
    act(kubeflow, run_id)
    train = read("runs", "show", run_id)["stages"][1]
    assert train["state"] == state
    assert train["message"].startswith(message), train["message"]


def test_stages_keep_their_states_while_the_run_is_being_cancelled(monkeypatch, kubeflow, read, cli, run_id):
    kubeflow.reach(run_id, "train")
    monkeypatch.setattr(kubeflow, "_end_terminated", lambda _: None)
    assert cli("runs", "cancel", run_id)[0] == 0
    states = {row["stage"]: row["state"] for row in read("runs", "show", run_id)["stages"]}
    assert states == {"validate": "SUCCEEDED", "train": "RUNNING", "evaluate": "PENDING"}


def test_too_large_run_is_refused_before_it_is_sent(kubeflow, cli):
    seeds = ",".join(map(str, range(200)))
    status, _, err = cli("submit", "--image", "a:1", "--seeds", seeds)
    assert status == 2
    assert "give fewer seeds, cells or workers" in err
    assert kubeflow.count("POST") == 0


def test_retry_accepts_a_failed_run_and_refuses_a_running_one(kubeflow, cli, run_id):
    kubeflow.fail_stage(run_id, "train")
    assert cli("runs", "retry", run_id)[0] == 0
    assert kubeflow.runs[run_id]["state"] == "RUNNING"
    status, _, err = cli("runs", "retry", run_id)
    assert status == 2
    assert "only a failed or cancelled run can be retried" in err


def test_cancel_refuses_a_run_that_has_ended(kubeflow, cli, run_id):
    kubeflow.reach(run_id, "train")
    assert cli("runs", "cancel", run_id)[0] == 0
    kubeflow.advance(run_id)
    status, _, err = cli("runs", "cancel", run_id)
    assert status == 2
    assert "has ended already" in err


def test_unknown_run_is_an_error(kubeflow, cli):
    for verb in ("show", "watch", "cancel", "retry"):
        status, _, err = cli("runs", verb, "nothing")
        assert status == 2
        assert "run 'nothing': no run has this ID or name" in err
    assert "there is no run yet" in cli("runs", "show", "latest")[2]
    assert "no runs yet" in cli("runs", "list")[1]


# --- schedule ---

CREATE = ["schedule", "create", "nightly", "--cron", "30 2 * * *", "--file", str(GOLDEN)]


def test_schedule_created_twice_exists_once(kubeflow, read):
    assert read(*CREATE)["schedule"] == "nightly, created"
    assert read(*CREATE)["schedule"] == "nightly, unchanged"
    (job,) = kubeflow.recurring_runs.values()
    assert job["trigger"]["cron_schedule"]["cron"] == "0 30 2 * * *"
    assert job["no_catchup"] is True
    assert job["max_concurrency"] == "1"
    assert job["status"] == "ENABLED"


@pytest.mark.parametrize(
    "change",
    [
        ["--cron", "30 3 * * *"],
        ["-p", "store=s3://a1b/c", "-p", "run=first"],
        ["--max-concurrency", "2"],
        ["--experiment", "other"],
        ["--seed=1"],
    ],
)
def test_schedule_created_with_a_difference_is_replaced(kubeflow, read, change):
    first = read(*CREATE)["id"]
    second = read(*CREATE, *change)
    assert second["schedule"] == "nightly, replaced"
    assert list(kubeflow.recurring_runs) == [second["id"]] != [first]


def test_schedule_is_kept_when_its_replacement_fails(kubeflow, read, cli):
    first = read(*CREATE)["id"]
    kubeflow.fail(400, method="POST", path="/recurringruns")
    assert cli(*CREATE, "--max-concurrency", "2")[0] == 3
    assert list(kubeflow.recurring_runs) == [first]


def test_schedule_is_created_once_when_the_servers_answer_is_lost(kubeflow, read):
    kubeflow.drop(method="POST", path="/recurringruns", after=True)
    read(*CREATE)
    assert len(kubeflow.recurring_runs) == 1


def test_paused_schedule_stays_paused_when_it_is_replaced(kubeflow, read):
    read(*CREATE)
    (row,) = read("schedule", "pause", "nightly")
    assert row["status"] == "DISABLED"
    assert read(*CREATE, "--max-concurrency", "2")["status"] == "DISABLED"
    (row,) = read("schedule", "resume", "nightly")
    assert row["status"] == "ENABLED"


def test_next_times_and_time_zone_are_shown(kubeflow, read, cli):
    summary = read(*CREATE, "--time-zone", "Europe/Berlin")
    assert summary["fires next"].count(", ") == 4
    assert summary["fires next"].count("02:30:00 CE") == 5
    assert summary["time zone"].startswith("Europe/Berlin")
    status, _, err = cli(*CREATE, "--time-zone", "Mars/Base")
    assert status == 2
    assert "--time-zone 'Mars/Base'" in err


def test_dry_run_sends_no_request(kubeflow, read):
    assert read(*CREATE, "--dry-run")["schedule"] == "nightly, not created"
    assert not kubeflow.requests


def test_wrong_schedule_is_refused(kubeflow, cli):
    for arguments in (
        ["--cron", "* * * *"],
        ["--max-concurrency", "11"],
        ["-p", "train_cpu=x"],
        ["-p", "run=n-[[Index]]", *IN_STORE],
        ["-p", "run=n-[[ScheduledTime]]"],
        ["--dry-run", "-p", "s3_secret=[[ScheduledTime]]"],
    ):
        assert cli(*CREATE, *arguments)[0] == 2
    assert not kubeflow.requests


def test_triggered_run_equals_a_scheduled_run(kubeflow, read):
    read(*CREATE, "-p", "run=nightly-[[ScheduledTime]]", *IN_STORE, "--pipeline-root", "s3://a/root")
    triggered = read("schedule", "trigger", "nightly")
    run = kubeflow.runs[triggered["id"]]
    assert run["runtime_config"]["pipeline_root"] == "s3://a/root"
    assert run["runtime_config"]["parameters"]["run"] == "nightly-[[ScheduledTime]]"
    (job,) = kubeflow.recurring_runs
    fired = kubeflow.runs[kubeflow.fire(job)]
    assert fired["pipeline_spec"] == run["pipeline_spec"]
    assert fired["experiment_id"] == run["experiment_id"]
    assert fired["runtime_config"]["parameters"] == run["runtime_config"]["parameters"]


def test_schedule_without_parameters_is_triggered(kubeflow, read):
    read(*CREATE)
    assert kubeflow.runs[read("schedule", "trigger", "nightly")["id"]]["state"] == "PENDING"


@pytest.mark.parametrize(("cron", "fires"), [("30 2 * * *", ":02:30 UTC"), ("@every 2h", None)])
def test_schedule_from_another_client_is_shown_as_the_server_reads_it(kubeflow, read, cron, fires):
    read(*CREATE)
    (job,) = kubeflow.recurring_runs.values()
    job["trigger"]["cron_schedule"]["cron"] = cron
    (summary,) = read("schedule", "show", "nightly")
    assert summary["cron"] == cron
    assert summary.get("fires next", "").count(fires or "-") == (5 if fires else 0)


def test_schedule_is_shown_and_deleted(kubeflow, read, cli):
    created = read(*CREATE)
    (summary,) = read("schedule", "show", created["id"])
    assert summary["name"] == "nightly"
    assert summary["catch up"] == "no"
    assert "nightly" in cli("schedule", "list")[1]
    assert cli("schedule", "delete", "nightly")[0] == 0
    assert not kubeflow.recurring_runs
    for verb in ("show", "pause", "resume", "delete", "trigger"):
        status, _, err = cli("schedule", verb, "nightly")
        assert status == 2
        assert "schedule 'nightly': no schedule has this name" in err


# --- all ---


def test_every_command_has_help_with_its_flags(capsys):
    for command in (
        ["run"],
        ["observe"],
        ["compile"],
        ["submit"],
        *(["runs", verb] for verb in ("list", "show", "watch", "logs", "cancel", "retry")),
        *(["artifacts", verb] for verb in ("list", "fetch")),
        *(
            ["schedule", verb]
            for verb in ("create", "apply", "list", "show", "pause", "resume", "delete", "trigger")
        ),
        ["export-metrics"],
        ["doctor"],
    ):
        with pytest.raises(SystemExit) as end:
            main([*command, "--help"])
        assert end.value.code == 0
        assert f"python -m pipelines {' '.join(command)}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "description"),
    [
        (["run"], "Run a pipeline on this machine, without a cluster."),
        (["runs", "list"], "List the newest runs."),
        (["runs", "show"], "Show a run and its stages."),
        (["runs", "watch"], "Show the progress of a run until it ends."),
        (["runs", "logs"], "Print the log of a stage."),
        (["runs", "cancel"], "End a run."),
        (["runs", "retry"], "Run the failed stages of a run again; training resumes."),
        (["schedule", "list"], "List all schedules."),
        (["schedule", "delete"], "Delete a schedule; its runs stay."),
        (["artifacts", "fetch"], "Copy artifacts into a directory."),
    ],
)
def test_help_describes_the_command_in_one_sentence(capsys, command, description):
    with pytest.raises(SystemExit):
        main([*command, "--help"])
    paragraphs = [" ".join(text.split()) for text in capsys.readouterr().out.split("\n\n")]
    assert description in paragraphs


def test_missing_server_gives_one_line_and_status_3(monkeypatch, kubeflow, cli):
    kubeflow.fail(404, path="/healthz")
    status, out, err = cli("runs", "list")
    assert (status, out) == (3, "")
    assert err.startswith("pipelines runs list: error: ")
    assert len(err.splitlines()) == 1


def _process(*arguments: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-u", "-m", "pipelines", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
    )


def test_schedule_of_a_study_passes_the_edition_to_each_run(kubeflow, read, cli):
    site = ["--site", str(GOLDEN.parent / "site.yaml")]
    study = ["--study", "weekly", "--edition", "[[ScheduledTime]]", "--trials", "30", "--workers", "3"]
    champions = ["--champions", "s3://bucket/champions"]
    create = ["schedule", "create", "tuning", "--cron", "0 3 * * 6", *site, *study, *champions]
    assert read(*create)["schedule"] == "tuning, created"
    assert read(*create)["schedule"] == "tuning, unchanged"
    triggered = read("schedule", "trigger", "tuning")
    parameters = _defaults(kubeflow, triggered["id"])
    assert parameters["edition"] == "[[ScheduledTime]]"
    assert (parameters["study"], parameters["workers"]) == ("weekly", ["1", "2", "3"])
    settings = study_config_from_json(parameters["study_config"])
    assert settings == StudyConfig(budget=BudgetConfig(num_trials=30))
    assert parameters["champions"] == "s3://bucket/champions"


def _defaults(kubeflow, run_id: str) -> dict:
    specification = kubeflow.runs[run_id]["pipeline_spec"]
    specification = specification.get("pipeline_spec", specification)
    declared = specification["root"]["inputDefinitions"]["parameters"]
    return {name: definition.get("defaultValue") for name, definition in declared.items()}


@pytest.mark.parametrize(
    ("parameter", "reason"),
    [
        (
            'study_config={"budget": {"num_trials": 0}}',
            "budget.num_trials = 0: input should be greater than or equal to 1",
        ),
        ("study=A b", "study 'A b'"),
        ("workers=[]", "must be different names"),
        ('study_config={"tuning": {"pruner": "magic"}}', "pruner"),
        ('study_config={"gate": {"margin": -1}}', "margin"),
        ("study_config={", "not JSON"),
        ("tune_memory=lots", "amount of memory"),
        ("database_secret=A_B", "Kubernetes name"),
    ],
)
def test_tuning_parameter_that_a_stage_would_refuse_is_refused(kubeflow, cli, parameter, reason):
    golden = str(GOLDEN.parent / "tuning.yaml")
    status, _, error = cli("submit", "--file", golden, "-p", parameter)
    assert status == 2
    assert reason in error


def test_compiled_pipeline_may_have_only_the_known_placeholder_as_a_default(cli, tmp_path):
    compile_ = ["compile", "--image", "a:1", "--output", str(tmp_path / "a.yaml"), "--study", "weekly"]
    assert cli(*compile_, "--edition", "[[ScheduledTime]]")[0] == 0
    status, _, error = cli(*compile_, "--edition", "[[CurrentTime]]")
    assert status == 2
    assert "parameter edition: '[[CurrentTime]]': nothing replaces [[CurrentTime]]" in error
    status, _, error = cli("compile", "--image", "a:1", "--output", str(tmp_path / "a.yaml"), "--edition", "a")
    assert (status, "give --study NAME too" in error) == (2, True)


@pytest.mark.long
def test_local_run_replaces_the_scheduled_time_once_for_all_stages(monkeypatch, cli, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))  # the stages run in their own processes
    status, _, err = cli("run", "--run", "n-[[ScheduledTime]]", "--config", str(_tiny(tmp_path)))
    assert status == 0, err
    (run,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"n-\d{14}", run.name)
    assert (run / "latest.json").exists()
    status, _, err = cli("run", "--run", "n-[[Index]]")
    assert (status, "write [[ScheduledTime]]" in err) == (2, True)


def _tiny(directory: Path) -> Path:
    path = directory / "tiny.json"
    path.write_text(to_json(endless()))
    return path


def test_closed_output_pipe_ends_the_command_quietly_with_the_status_of_sigpipe(kubeflow, read):
    for _ in range(3):
        read(*SUBMIT)
    for arguments in (
        ["runs", "list"],
        ["runs", "list", "--output", "json"],
        ["runs", "show", "latest"],
    ):
        reader, writer = os.pipe()
        os.close(reader)
        process = subprocess.run(
            [sys.executable, "-m", "pipelines", *arguments],
            stdout=writer,
            stderr=subprocess.PIPE,
            cwd=REPOSITORY,
            check=False,
        )
        os.close(writer)
        assert (process.returncode, process.stderr) == (128 + signal.SIGPIPE, b"")


def test_retries_of_a_request_are_reported_in_two_lines_in_a_file(kubeflow, cli):
    kubeflow.fail(503, times=4)
    status, _, err = cli("runs", "list")
    assert status == 0
    first, last = err.splitlines()
    assert first.startswith(f"note: {kubeflow.url}: error 503")
    assert first.endswith("; trying again")
    assert re.fullmatch(r"note: tried 5 times in \d+ s", last)


def test_retries_of_a_request_are_counted_in_one_line_on_a_terminal(kubeflow):
    kubeflow.fail(503, times=3)
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "pipelines", "runs", "list"],
        stdout=subprocess.DEVNULL,
        stderr=follower,
        env={**os.environ, "COLUMNS": "60", "TERM": "xterm"},
        cwd=REPOSITORY,
    )
    os.close(follower)
    text = _read_until_closed(leader)
    assert process.wait(30) == 0
    lines = text.split("\r\x1b[K")
    assert [line.partition(" in ")[0] for line in lines[1:]] == [f"note: tried {n} times" for n in (1, 2, 3, 4)]
    assert text.count("\n") == 1
    assert all(len(line.strip()) < 60 for line in lines)


def test_token_of_several_lines_is_refused_and_not_shown(monkeypatch, kubeflow, cli):
    monkeypatch.setenv("KF_PIPELINES_TOKEN", "secret\nsecret")
    status, _, err = cli("runs", "list")
    assert status == 2
    assert "KF_PIPELINES_TOKEN: holds a line break" in err
    assert "secret" not in err
