"""Every command against a server that behaves as Kubeflow's, as a user gives it."""

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


def test_a_pipeline_compiled_now_runs_with_the_configuration_as_its_default(kubeflow, read):
    made = read(
        *("submit", "balance", "--image", "a:1", "--name", "mine", "--learner.epochs=7"),
        *("-p", "store=s3://a1b/c", "-p", "run=first"),
    )
    (run,) = kubeflow.runs.values()
    assert made["id"] == run["run_id"]
    assert made["name"].startswith("mine ")
    assert made["state"] == "PENDING"
    parameters = run["pipeline_spec"]["pipeline_spec"]["root"]["inputDefinitions"]["parameters"]
    expected = override(recipe("balance"), {"learner": {"epochs": 7}})
    assert from_json(parameters["config"]["defaultValue"]) == expected
    assert parameters["image"]["defaultValue"] == "a:1"
    assert run["runtime_config"]["parameters"] == {"store": "s3://a1b/c", "run": "first"}
    assert "platforms" in run["pipeline_spec"]["platform_spec"]


def test_flags_beside_a_compiled_pipeline_become_its_parameters(kubeflow, read):
    read(*SUBMIT, "balance", "--seed=3", "--image", "b:2", "-p", "train_gpu_count=1", "--experiment", "mine")
    (run,) = kubeflow.runs.values()
    given = run["runtime_config"]["parameters"]
    assert from_json(given.pop("config")) == override(recipe("balance"), {"seed": 3})
    assert given == {"image": "b:2", "train_gpu_count": "1"}
    assert kubeflow.experiments[run["experiment_id"]]["display_name"] == "mine"


def test_several_seeds_submit_the_pipeline_of_seeds(kubeflow, read):
    read("submit", "--image", "a:1", "--seeds", "4,5", "--parallel-seeds", "1")
    (run,) = kubeflow.runs.values()
    specification = run["pipeline_spec"]["pipeline_spec"]
    assert specification["pipelineInfo"]["name"] == "mappo-seeds"
    assert specification["root"]["inputDefinitions"]["parameters"]["seeds"]["defaultValue"] == ["4", "5"]


def test_an_uploaded_version_is_made_once_and_referred_to(kubeflow, read, cli, tmp_path):
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
    assert "version 'mine' of mappo-training is there with another content" in err
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
def test_a_wrong_submission_is_refused_before_the_server_is_asked(kubeflow, cli, arguments, reason):
    status, _, err = cli(*SUBMIT, *arguments)
    assert status == 2
    assert reason in err
    assert not kubeflow.requests


def test_a_file_that_is_no_compiled_pipeline_is_refused(kubeflow, cli, tmp_path):
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


def test_in_a_kubeflow_of_several_users_everything_is_in_ones_own_namespace(monkeypatch, kubeflow, read, cli):
    with KubeflowServer(multi_user=True, tokens={"mine"}) as server:
        monkeypatch.setenv("KF_PIPELINES_ENDPOINT", server.url)
        monkeypatch.setenv("KF_PIPELINES_TOKEN", "mine")
        status, _, err = cli(*SUBMIT)
        assert status == 2
        assert "--namespace" in err
        monkeypatch.setenv("KF_PIPELINES_NAMESPACE", "team")
        made = read(*SUBMIT, "--upload")
        read("schedule", "create", "nightly", "--cron", "@daily", "--file", str(GOLDEN))
        assert [row["id"] for row in read("runs", "list")] == [made["id"]]
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


def test_listed_runs_are_the_newest_first_over_all_pages(kubeflow, read, cli):
    made = [read(*SUBMIT, "--name", str(index))["id"] for index in range(3)]
    for index, run in enumerate(kubeflow.runs.values()):
        run["created_at"] = f"2026-01-0{index + 1}T00:00:00Z"
    assert [row["id"] for row in read("runs", "list")] == made[::-1]
    assert [row["id"] for row in read("runs", "list", "--limit", "2")] == made[:0:-1]
    assert [row["id"] for row in read("runs", "list", "--experiment", "Default")] == made[::-1]
    assert read("runs", "show", "latest")["id"] == made[-1]
    assert cli("runs", "list", "--limit", "-1")[0] == 2


def test_a_run_is_shown_with_all_its_stages_in_order(kubeflow, read, run_id):
    kubeflow.retry_stage(run_id, "train")
    shown = read("runs", "show", run_id)
    assert [(row["stage"], row["state"], row["attempt"]) for row in shown["stages"]] == [
        ("validate", "SUCCEEDED", 1),
        ("train", "RUNNING", 2),
        ("evaluate", "PENDING", ""),
    ]
    assert read("runs", "show", shown["name"])["id"] == run_id


def test_a_run_is_found_by_the_name_it_was_submitted_under_and_the_newest_counts(kubeflow, read, cli):
    made = [read(*SUBMIT, "--name", name)["id"] for name in ("c3", "c3", "c3 x", "xc3", "c30", "C3")]
    for index, run in enumerate(kubeflow.runs.values()):
        run["created_at"] = f"2026-01-0{index + 1}T00:00:00Z"
    assert read("runs", "show", "c3")["id"] == made[1]
    assert read("runs", "show", "c3 x")["id"] == made[2]
    kubeflow.runs[made[0]]["display_name"] = "c3"
    assert read("runs", "show", "c3")["id"] == made[0]
    assert "there is none" in cli("runs", "show", "3")[2]


def test_stages_of_a_loop_are_shown_one_by_one(kubeflow, read):
    made = read("submit", "--image", "a:1", "--seeds", "4,5", "--parallel-seeds", "1")
    kubeflow.fail_stage(made["id"], "evaluate")
    rows = read("runs", "show", made["id"])["stages"]
    found = {row["stage"]: row["state"] for row in rows}
    assert found["validate"] == found["train[0]"] == "SUCCEEDED"
    assert found["evaluate[0]"] == "FAILED"
    assert list(found) == ["validate", "train[0]", "evaluate[0]", "train[1]", "evaluate[1]", "compare"]


@pytest.mark.parametrize("reverse", [False, True])
def test_a_stage_without_pods_is_never_taken_for_that_of_another_seed(monkeypatch, kubeflow, read, reverse):
    """The API tells which entry is whose only by their pods, in no order; one that is left out has none."""
    made = read("submit", "--image", "a:1", "--seeds", "4,5", "--parallel-seeds", "2")
    told = Workflow.details
    monkeypatch.setattr(Workflow, "details", lambda flow: sorted(told(flow), key=_state, reverse=reverse))
    kubeflow.fail_stage(made["id"], "train")
    kubeflow.reach(made["id"], "evaluate")
    found = {row["stage"]: row["state"] for row in read("runs", "show", made["id"])["stages"]}
    assert found == {
        "validate": "SUCCEEDED",
        "train[0]": "FAILED",
        "evaluate[0]": "PENDING",
        "train[1]": "SUCCEEDED",
        "evaluate[1]": "RUNNING",
        "compare": "PENDING",
    }


def _state(detail: dict) -> str:
    return str(detail.get("state", ""))


def test_a_run_whose_pipeline_version_was_deleted_is_still_shown_and_watched(kubeflow, read, cli):
    made = read("submit", "--image", "a:1", "--upload")
    kubeflow.finish(made["id"])
    kubeflow.versions.clear()
    assert {row["stage"] for row in read("runs", "show", made["id"])["stages"]} == {
        "validate",
        "train",
        "evaluate",
    }
    assert cli("runs", "watch", made["id"], *QUICK)[0] == 0


def test_archived_runs_are_not_listed(kubeflow, read):
    first, second = (read("submit", "--image", "a:1")["id"] for _ in range(2))
    kubeflow.runs[second]["storage_state"] = "ARCHIVED"
    assert [row["id"] for row in read("runs", "list")] == [first]
    assert read("runs", "show", "latest")["id"] == first


def test_a_run_that_succeeds_is_watched_to_its_end(kubeflow, cli, run_id):
    threading.Timer(0.5, kubeflow.finish, [run_id]).start()
    status, out, _ = cli("runs", "watch", run_id, *QUICK)
    assert status == 0
    assert out.splitlines()[-1] == "run  SUCCEEDED"
    assert "evaluate  SUCCEEDED" in out


def test_a_run_that_fails_says_which_stage_why_and_ends_with_1(kubeflow, cli, run_id):
    kubeflow.fail_stage(run_id, "train", "[train] iteration 3\n[train] failed: s3://a/b: access denied")
    status, out, err = cli("runs", "watch", run_id, *QUICK)
    assert status == 1
    assert "train  FAILED" in out
    assert "s3://a/b: access denied" in out
    assert "evaluate  NOT REACHED" in out
    assert "ended as FAILED" in err


@pytest.mark.parametrize("ends_as", ["CANCELED", "FAILED"])
def test_a_run_that_is_cancelled_elsewhere_ends_the_watching_with_1(monkeypatch, kubeflow, cli, ends_as):
    """What the server calls its end depends on its version."""
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


def test_watching_goes_on_through_errors_a_restart_and_a_new_token(monkeypatch, kubeflow, cli, run_id, tmp_path):
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


def test_a_token_that_expires_for_good_ends_the_watching_and_says_that_the_run_goes_on(
    monkeypatch, kubeflow, cli, run_id
):
    monkeypatch.setenv("KF_PIPELINES_TOKEN", "old")
    kubeflow.tokens = {"old"}
    threading.Timer(0.5, setattr, [kubeflow, "tokens", {"new"}]).start()
    status, _, err = cli("runs", "watch", run_id, *QUICK)
    assert status == 3
    assert "missing, wrong or expired" in err
    assert "the run continues" in err


def test_submitting_and_watching_as_json_prints_one_object_at_the_end(kubeflow, cli):
    def finish() -> None:
        while not kubeflow.runs:
            time.sleep(0.1)
        kubeflow.finish(next(iter(kubeflow.runs)))

    threading.Thread(target=finish).start()
    status, out, _ = cli(*SUBMIT, "--watch", *QUICK, "--output", "json")
    assert status == 0
    assert json.loads(out)["state"] == "SUCCEEDED"


def test_control_c_detaches_and_says_how_to_cancel(kubeflow, run_id):
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
    shown = b""
    try:
        while chunk := os.read(terminal, 4096):
            shown += chunk
    except OSError:  # the terminal's other end is closed
        pass
    return shown.decode()


def test_in_a_terminal_there_is_one_table_that_changes(kubeflow, run_id):
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


def test_logs_are_those_of_the_newest_attempt(kubeflow, cli, read, run_id):
    kubeflow.retry_stage(run_id, "train")
    kubeflow.write_log(run_id, "train", "second attempt\n")
    assert cli("runs", "logs", "train", run_id)[:2] == (0, "second attempt\n")
    (row,) = read("runs", "logs", "train", run_id)
    assert row == {"stage": "train", "log": "second attempt\n"}
    status, _, err = cli("runs", "logs", "evaluate", run_id)
    assert status == 3
    assert "no pod has been started" in err
    status, _, err = cli("runs", "logs", "tune", run_id)
    assert status == 2
    assert "validate, train, evaluate" in err


def test_each_attempt_has_a_log_also_an_hour_after_the_end(kubeflow, cli, run_id):
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
    found = {row["stage"]: row["state"] for row in read("runs", "show", run_id)["stages"]}
    assert found == {"validate": "SUCCEEDED", "train": "RUNNING", "evaluate": "PENDING"}
    assert cli("runs", "logs", "train", run_id)[1] == "words\n"


def test_five_seeds_are_watched_to_the_end_though_argo_compresses_their_nodes(kubeflow, read, cli):
    kubeflow.max_bytes = 300_000
    made = read("submit", "--image", "a:1", "--seeds", "0,1,2,3,4")
    threading.Timer(1, kubeflow.finish, [made["id"]]).start()
    status, out, _ = cli("runs", "watch", made["id"], "--output", "json", *QUICK)
    stages = json.loads(out)["stages"]
    assert status == 0
    assert len(stages) == 12
    assert {stage["state"] for stage in stages} == {"SUCCEEDED"}
    manifest = kubeflow.workflows[made["id"]].manifest()
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
            "out of memory: the pod was killed at its limit of 20Gi; give it more: -p train_memory=..., or ",
        ),
        (
            lambda server, run: server.fail_stage(run, "train", reason="DeadlineExceeded"),
            "FAILED",
            "its time was up: stages.train.timeout_seconds in the site's file gives it more",
        ),
        (
            lambda server, run: server.fail_driver(run, "train", "no such config map"),
            "FAILED",
            "driver: ",
        ),
        (
            lambda server, run: [server.delete_pod(run, "train"), server.reach(run, "train")],
            "RUNNING",
            "tried again: its pod was deleted: evicted, preempted, or its node was lost",
        ),
    ],
)
def test_a_stage_says_why_it_waits_failed_or_is_tried_again(kubeflow, read, run_id, act, state, message):
    act(kubeflow, run_id)
    train = read("runs", "show", run_id)["stages"][1]
    assert train["state"] == state
    assert train["message"].startswith(message), train["message"]


def test_stages_of_a_run_that_is_being_cancelled_are_shown_as_they_are(monkeypatch, kubeflow, read, cli, run_id):
    kubeflow.reach(run_id, "train")
    monkeypatch.setattr(kubeflow, "_end_terminated", lambda _: None)
    assert cli("runs", "cancel", run_id)[0] == 0
    found = {row["stage"]: row["state"] for row in read("runs", "show", run_id)["stages"]}
    assert found == {"validate": "SUCCEEDED", "train": "RUNNING", "evaluate": "PENDING"}


def test_a_run_that_would_not_fit_is_refused_before_it_is_sent(kubeflow, cli):
    seeds = ",".join(map(str, range(200)))
    status, _, err = cli("submit", "--image", "a:1", "--seeds", seeds)
    assert status == 2
    assert "give fewer seeds or workers" in err
    assert kubeflow.count("POST") == 0


def test_a_failed_run_is_tried_again_and_one_that_runs_is_not(kubeflow, cli, run_id):
    kubeflow.fail_stage(run_id, "train")
    assert cli("runs", "retry", run_id)[0] == 0
    assert kubeflow.runs[run_id]["state"] == "RUNNING"
    status, _, err = cli("runs", "retry", run_id)
    assert status == 2
    assert "only what failed or was cancelled" in err


def test_a_run_is_cancelled_once(kubeflow, cli, run_id):
    kubeflow.reach(run_id, "train")
    assert cli("runs", "cancel", run_id)[0] == 0
    kubeflow.advance(run_id)
    status, _, err = cli("runs", "cancel", run_id)
    assert status == 2
    assert "has ended already" in err


def test_a_run_that_is_not_there_is_an_error(kubeflow, cli):
    for verb in ("show", "watch", "cancel", "retry"):
        status, _, err = cli("runs", verb, "nothing")
        assert status == 2
        assert "run 'nothing': there is none" in err
    assert "there is no run" in cli("runs", "show", "latest")[2]
    assert "no runs yet" in cli("runs", "list")[1]


# --- schedule ---

CREATE = ["schedule", "create", "nightly", "--cron", "30 2 * * *", "--file", str(GOLDEN)]


def test_creating_a_schedule_twice_leaves_one(kubeflow, read):
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
def test_creating_a_schedule_with_any_difference_replaces_it(kubeflow, read, change):
    first = read(*CREATE)["id"]
    second = read(*CREATE, *change)
    assert second["schedule"] == "nightly, replaced"
    assert list(kubeflow.recurring_runs) == [second["id"]] != [first]


def test_a_schedule_that_cannot_be_replaced_is_still_there(kubeflow, read, cli):
    first = read(*CREATE)["id"]
    kubeflow.fail(400, method="POST", path="/recurringruns")
    assert cli(*CREATE, "--max-concurrency", "2")[0] == 3
    assert list(kubeflow.recurring_runs) == [first]


def test_a_schedule_whose_answer_was_lost_is_made_once(kubeflow, read):
    kubeflow.drop(method="POST", path="/recurringruns", after=True)
    read(*CREATE)
    assert len(kubeflow.recurring_runs) == 1


def test_a_paused_schedule_stays_paused_when_it_is_replaced(kubeflow, read):
    read(*CREATE)
    (row,) = read("schedule", "pause", "nightly")
    assert row["status"] == "DISABLED"
    assert read(*CREATE, "--max-concurrency", "2")["status"] == "DISABLED"
    (row,) = read("schedule", "resume", "nightly")
    assert row["status"] == "ENABLED"


def test_next_times_and_the_time_zone_are_stated(kubeflow, read, cli):
    shown = read(*CREATE, "--time-zone", "Europe/Berlin")
    assert shown["fires next"].count(", ") == 4
    assert shown["fires next"].count("02:30:00 CE") == 5
    assert shown["time zone"].startswith("Europe/Berlin")
    status, _, err = cli(*CREATE, "--time-zone", "Mars/Base")
    assert status == 2
    assert "--time-zone 'Mars/Base'" in err


def test_a_dry_run_asks_the_server_nothing(kubeflow, read):
    assert read(*CREATE, "--dry-run")["schedule"] == "nightly, not created"
    assert not kubeflow.requests


def test_a_wrong_schedule_is_refused(kubeflow, cli):
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


def test_a_triggered_schedule_runs_what_it_would_run(kubeflow, read):
    read(*CREATE, "-p", "run=nightly-[[ScheduledTime]]", *IN_STORE, "--pipeline-root", "s3://a/root")
    made = read("schedule", "trigger", "nightly")
    run = kubeflow.runs[made["id"]]
    assert run["runtime_config"]["pipeline_root"] == "s3://a/root"
    assert run["runtime_config"]["parameters"]["run"] == "nightly-[[ScheduledTime]]"
    (job,) = kubeflow.recurring_runs
    fired = kubeflow.runs[kubeflow.fire(job)]
    assert fired["pipeline_spec"] == run["pipeline_spec"]
    assert fired["experiment_id"] == run["experiment_id"]
    assert fired["runtime_config"]["parameters"] == run["runtime_config"]["parameters"]


def test_a_schedule_without_parameters_is_triggered(kubeflow, read):
    read(*CREATE)
    assert kubeflow.runs[read("schedule", "trigger", "nightly")["id"]]["state"] == "PENDING"


@pytest.mark.parametrize(("cron", "fires"), [("30 2 * * *", ":02:30 UTC"), ("@every 2h", None)])
def test_a_schedule_that_somebody_else_made_is_shown_as_the_server_reads_it(kubeflow, read, cron, fires):
    read(*CREATE)
    (job,) = kubeflow.recurring_runs.values()
    job["trigger"]["cron_schedule"]["cron"] = cron
    (shown,) = read("schedule", "show", "nightly")
    assert shown["cron"] == cron
    assert shown.get("fires next", "").count(fires or "-") == (5 if fires else 0)


def test_a_schedule_is_shown_and_deleted(kubeflow, read, cli):
    made = read(*CREATE)
    (shown,) = read("schedule", "show", made["id"])
    assert shown["name"] == "nightly"
    assert shown["catch up"] == "no"
    assert "nightly" in cli("schedule", "list")[1]
    assert cli("schedule", "delete", "nightly")[0] == 0
    assert not kubeflow.recurring_runs
    for verb in ("show", "pause", "resume", "delete", "trigger"):
        status, _, err = cli("schedule", verb, "nightly")
        assert status == 2
        assert "schedule 'nightly': there is none" in err


# --- all ---


def test_every_command_has_help_with_its_flags(capsys):
    for command in (
        ["run"],
        ["observe"],
        ["compile"],
        ["submit"],
        *(["runs", verb] for verb in ("list", "show", "watch", "logs", "cancel", "retry")),
        *(["artifacts", verb] for verb in ("list", "fetch")),
        *(["schedule", verb] for verb in ("create", "list", "show", "pause", "resume", "delete", "trigger")),
        ["doctor"],
    ):
        with pytest.raises(SystemExit) as end:
            main([*command, "--help"])
        assert end.value.code == 0
        assert f"python -m pipelines {' '.join(command)}" in capsys.readouterr().out


def test_no_server_is_one_line_and_status_3(monkeypatch, kubeflow, cli):
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


def test_a_schedule_of_tuning_makes_an_edition_each_time(kubeflow, read, cli):
    site = ["--site", str(GOLDEN.parent / "site.yaml")]
    study = ["--study", "weekly", "--edition", "[[ScheduledTime]]", "--trials", "30", "--workers", "3"]
    champions = ["--champions", "s3://bucket/champions"]
    create = ["schedule", "create", "tuning", "--cron", "0 3 * * 6", *site, *study, *champions]
    assert read(*create)["schedule"] == "tuning, created"
    assert read(*create)["schedule"] == "tuning, unchanged"
    made = read("schedule", "trigger", "tuning")
    given = _defaults(kubeflow, made["id"])
    assert given["edition"] == "[[ScheduledTime]]"
    assert (given["study"], given["num_trials"], given["workers"]) == ("weekly", 30, ["1", "2", "3"])
    assert given["champions"] == "s3://bucket/champions"
    assert json.loads(given["tuning"])["pruner"] == "median"


def _defaults(kubeflow, run_id: str) -> dict:
    specification = kubeflow.runs[run_id]["pipeline_spec"]
    specification = specification.get("pipeline_spec", specification)
    declared = specification["root"]["inputDefinitions"]["parameters"]
    return {name: each.get("defaultValue") for name, each in declared.items()}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("num_trials=0", "num_trials: 0: must be 1 or more"),
        ("retrain_seeds=1", "must be 2 or more"),
        ("hours=-1", "must be 0 or more"),
        ("study=A b", "study 'A b'"),
        ("workers=[]", "must be different names"),
        ('tuning={"pruner": "magic"}', "pruner"),
        ('gate={"margin": -1}', "margin"),
        ("space={", "not JSON"),
        ("tune_memory=lots", "amount of memory"),
        ("database_secret=A_B", "Kubernetes name"),
    ],
)
def test_parameters_of_tuning_that_a_stage_would_refuse_are_refused_here(kubeflow, cli, given, words):
    golden = str(GOLDEN.parent / "tuning.yaml")
    status, _, error = cli("submit", "--file", golden, "-p", given)
    assert status == 2
    assert words in error


def test_a_compiled_pipeline_has_the_known_placeholder_as_a_default_and_no_other(cli, tmp_path):
    compile_ = ["compile", "--image", "a:1", "--output", str(tmp_path / "a.yaml"), "--study", "weekly"]
    assert cli(*compile_, "--edition", "[[ScheduledTime]]")[0] == 0
    status, _, error = cli(*compile_, "--edition", "[[CurrentTime]]")
    assert status == 2
    assert "parameter edition: '[[CurrentTime]]': nothing replaces [[CurrentTime]]" in error
    status, _, error = cli("compile", "--image", "a:1", "--output", str(tmp_path / "a.yaml"), "--edition", "a")
    assert (status, "give --study NAME too" in error) == (2, True)


@pytest.mark.long
def test_a_run_on_this_machine_fills_in_the_time_once(monkeypatch, cli, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))  # for the stages, which are processes of their own
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


def test_output_into_a_pipe_that_is_closed_ends_quietly_with_the_status_of_the_signal(kubeflow, read):
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


def test_a_server_that_does_not_answer_is_two_lines_in_a_file(kubeflow, cli):
    kubeflow.fail(503, times=4)
    status, _, err = cli("runs", "list")
    assert status == 0
    first, last = err.splitlines()
    assert first.startswith(f"note: {kubeflow.url}: error 503")
    assert first.endswith("; trying again")
    assert re.fullmatch(r"note: tried 5 times in \d+ s", last)


def test_a_server_that_does_not_answer_is_one_line_that_counts_on_a_terminal(kubeflow):
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


def test_a_token_of_several_lines_is_refused_and_not_shown(monkeypatch, kubeflow, cli):
    monkeypatch.setenv("KF_PIPELINES_TOKEN", "secret\nsecret")
    status, _, err = cli("runs", "list")
    assert status == 2
    assert "KF_PIPELINES_TOKEN: holds a line break" in err
    assert "secret" not in err
