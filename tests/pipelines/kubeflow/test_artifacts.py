import base64
import json
import os
import subprocess
import threading
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from mappo.config import to_json
from mappo.stages.evaluate import evaluate
from mappo.stages.train import train
from pipelines.kubeflow.artifacts import artifacts_of
from pipelines.kubeflow.workflow import Workflow
from tests.support.recordings import manifest_of, raw, recording
from tests.support.services import ACCESS_KEY, SECRET_KEY, free_ports, s3_client

SUBMIT = ["submit", "--file", str(Path(__file__).parents[2] / "golden" / "training.yaml")]
ROOT = "s3://{bucket}/some/root"
STOCK_ROOT = "minio://mlpipeline/v2/artifacts"


class RecordedServer(ThreadingHTTPServer):
    """The API of one recorded run, with its answers of v2beta1 and v1beta1. `set_root` moves the artifacts."""

    def __init__(self, v2: str, v1: str):
        super().__init__(("127.0.0.1", 0), _Recorded)
        self.run_id, self._v1 = recording(v2)["run"]["run_id"], json.dumps(raw(v1))
        self.answers = {
            "/apis/v2beta1/healthz": json.dumps({"multi_user": False}),
            f"/apis/v2beta1/runs/{self.run_id}": json.dumps(recording(v2)["run"]),
        }
        self.set_root(STOCK_ROOT)

    def set_root(self, root: str) -> None:
        self.answers[f"/apis/v1beta1/runs/{self.run_id}"] = self._v1.replace(STOCK_ROOT, root)


class _Recorded(BaseHTTPRequestHandler):
    def do_GET(self):
        answer = self.server.answers.get(self.path.partition("?")[0])
        self.send_response(200 if answer else 404)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write((answer or '{"code": 5, "message": "Not Found"}').encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def recorded(request, kubeflow, monkeypatch):
    """Start a server with the recorded answers of a training, or of the recordings in the test's parameter."""
    v2, v1 = getattr(request, "param", ("training-pod-deleted-succeeded", "raw-training"))
    with RecordedServer(v2, v1) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        monkeypatch.setenv("KF_PIPELINES_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def stock(s3):
    """Create the bucket of Kubeflow's own store; delete its objects afterwards."""
    with s3_client() as client:
        client.create_bucket(Bucket="mlpipeline")
        yield "mlpipeline"
        for entry in client.list_objects_v2(Bucket="mlpipeline").get("Contents", []):
            client.delete_object(Bucket="mlpipeline", Key=entry["Key"])


def locations(name):
    """Return the URIs of all artifacts in a recording."""
    nodes = recording(name)["workflow"]["nodes"]
    nodes = nodes.values() if isinstance(nodes, dict) else nodes
    return {uri for node in nodes for uris in node.get("artifact_uris", {}).values() for uri in uris}


def put(location, content):
    bucket, _, key = location.partition("://")[2].partition("/")
    with s3_client() as client:
        client.put_object(Bucket=bucket, Key=key, Body=content)


# --- with v1beta1, whose workflow holds the locations ---


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("training-pod-deleted-succeeded", "raw-training"),
        ("tuning-succeeded", "raw-tuning-compressed"),
    ],
)
def test_every_artifact_of_a_recorded_run_is_found(name, answer):
    artifacts = artifacts_of(Workflow(manifest_of(raw(answer))))
    assert {artifact.location for artifact in artifacts} == locations(name)
    assert len({(artifact.stage, artifact.name) for artifact in artifacts}) == len(artifacts)


@pytest.mark.parametrize(
    "root",
    ["minio://{}/v2/artifacts", "s3://{}", "minio://{}/private-artifacts/team/v2/artifacts"],
)
def test_artifacts_are_listed_and_fetched_wherever_the_root_is(recorded, s3, read, tmp_path, root):
    recorded.set_root(root.format(s3))
    folder = f"{root.format(s3)}/mappo-training/{recorded.run_id}"
    rows = {f"{row['stage']}/{row['name']}": row for row in read("artifacts", "list", recorded.run_id)}
    assert set(rows) == {
        *("validate/report", "train/best", "train/checkpoints", "train/history", "train/metrics"),
        *("evaluate/metrics", "evaluate/page", "evaluate/report"),
    }
    assert all((row["objects"], row["bytes"]) == (0, 0) for row in rows.values())
    assert all(row["location"].startswith(f"{folder}/{name.partition('/')[0]}/") for name, row in rows.items())
    put(f"{rows['train/best']['location']}/manifest.json", b"{}")
    put(f"{rows['train/best']['location']}/blobs/a.safetensors", b"123")
    put(f"{rows['train/best']['location']}-not", b"another's")
    put(rows["evaluate/report"]["location"], b"report")
    put(f"{folder}/train/{uuid.uuid4()}/best/manifest.json", b"of no stage")
    rows = {f"{row['stage']}/{row['name']}": row for row in read("artifacts", "list", recorded.run_id)}
    assert (rows["train/best"]["objects"], rows["train/best"]["bytes"]) == (2, 5)
    assert (rows["evaluate/report"]["objects"], rows["evaluate/report"]["bytes"]) == (1, 6)
    assert set(read("artifacts", "fetch", recorded.run_id)) == {"train/best", "evaluate/report"}
    directory = tmp_path / "artifacts" / recorded.run_id
    assert {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*.*")} == {
        "train/best/manifest.json": b"{}",
        "train/best/blobs/a.safetensors": b"123",
    }
    assert (directory / "evaluate" / "report").read_bytes() == b"report"


def test_fetched_pages_have_a_suffix_by_which_browsers_know_them(recorded, s3, read):
    recorded.set_root(f"s3://{s3}/root")
    rows = {f"{row['stage']}/{row['name']}": row for row in read("artifacts", "list", recorded.run_id)}
    put(rows["evaluate/page"]["location"], b"<!doctype html>\n<html>")
    fetched = read("artifacts", "fetch", recorded.run_id, "evaluate/page")
    (path,) = fetched.values()
    assert path.endswith("evaluate/page.html")
    assert Path(path).read_bytes() == b"<!doctype html>\n<html>"
    assert read("artifacts", "fetch", recorded.run_id, "evaluate/page") == fetched


def test_fetching_artifacts_that_no_stage_has_written_yet_is_refused_with_the_reason(recorded, stock, cli):
    status, _, err = cli("artifacts", "fetch", recorded.run_id)
    assert (status, "no artifacts yet" in err) == (2, True)
    status, _, err = cli("artifacts", "fetch", recorded.run_id, "train/best")
    assert (status, "artifact 'train/best': nothing is written yet" in err) == (2, True)


def test_executor_logs_are_listed_when_they_exist(recorded, stock, read):
    artifacts = artifacts_of(Workflow(manifest_of(raw("raw-training"))))
    by_name = {(artifact.stage, artifact.name): artifact for artifact in artifacts}
    put(f"{by_name['train', 'executor-logs'].location}/main.log", b"a line")
    rows = read("artifacts", "list", recorded.run_id)
    assert [row["stage"] for row in rows if row["name"] == "executor-logs"] == ["train"]


@pytest.mark.parametrize("recorded", [("tuning-succeeded", "raw-tuning-compressed")], indirect=True)
def test_artifacts_of_loops_are_fetched_by_stage_and_item(recorded, stock, read, tmp_path):
    for artifact in artifacts_of(Workflow(manifest_of(raw("raw-tuning-compressed")))):
        if artifact.name == "history":
            put(artifact.location, artifact.stage.encode())
    stages = [
        f"{nested}/train[{index}]" for nested in ("mappo-each-seed", "mappo-each-seed-2") for index in (0, 1)
    ]
    for names, expected in {
        ("train",): stages,
        ("train/history",): stages,
        ("train[1]",): [stages[1], stages[3]],
        ("mappo-each-seed-2/train[0]/history",): [stages[2]],
        ("mappo-each-seed/train[0]", "train[1]/history"): [stages[0], stages[1], stages[3]],
    }.items():
        directory = tmp_path / str(len(expected)) / names[0].replace("/", "-")
        fetched = read("artifacts", "fetch", recorded.run_id, *names, "--to", str(directory))
        assert set(fetched) == {f"{stage}/history" for stage in expected}
        assert all((directory / stage / "history").read_text() == stage for stage in expected)


def test_a_fetched_checkpoint_can_be_evaluated(kubeflow, read, s3, tmp_path, tiny, capsys):
    """The test trains, and stores the checkpoint under the key that the launcher uses."""
    run = read(*SUBMIT, "--pipeline-root", ROOT.format(bucket=s3))
    kubeflow.finish(run["id"])
    rows = read("artifacts", "list", "latest")
    (location,) = (row["location"] for row in rows if (row["stage"], row["name"]) == ("train", "best"))
    train(to_json(tiny), tmp_path / "run", tmp_path / "history", tmp_path / "best")
    capsys.readouterr()
    for path in (tmp_path / "best").rglob("*"):
        if path.is_file():
            put(f"{location}/{path.relative_to(tmp_path / 'best')}", path.read_bytes())
    read("artifacts", "fetch", "latest", "--to", str(tmp_path / "fetched"))
    report = tmp_path / "evaluation.json"
    evaluate(to_json(tiny), tmp_path / "fetched" / "train" / "best", report)
    assert json.loads(report.read_text())["training_frames"] == 360


# --- a store that cannot be reached ---


@pytest.fixture
def _impatient(monkeypatch):
    monkeypatch.setattr("pipelines.kubeflow.artifacts._LIST_SECONDS", 0.5)


@pytest.mark.usefixtures("_impatient")
def test_locations_and_commands_for_access_are_shown_when_kubeflows_store_cannot_be_reached(
    recorded, s3, cli, monkeypatch, tmp_path
):
    """The test runs the printed commands with a fake kubectl that returns the secret."""
    (port,) = free_ports(1)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    status, out, err = cli("artifacts", "list", recorded.run_id, "--output", "json", "--context", "mine")
    assert status == 3
    rows = json.loads(out)
    expected = {
        location for location in locations("training-pod-deleted-succeeded") if "executor-logs" not in location
    }
    assert {row["location"] for row in rows} == expected
    assert all((row["objects"], row["bytes"]) == (None, None) for row in rows)
    assert f"http://127.0.0.1:{port} (from AWS_ENDPOINT_URL; MAPPO_MINIO_ENDPOINT goes before it)" in err
    commands = "\n".join(line.strip() for line in err.splitlines() if line.startswith("    "))
    assert commands.startswith("kubectl --context mine -n kubeflow port-forward svc/seaweedfs 9000 &\n")
    kubectl = tmp_path / "kubectl"
    secret = {"accesskey": ACCESS_KEY, "secretkey": SECRET_KEY}
    cases = "\n".join(
        f"*'get secret mlpipeline-minio-artifact -o jsonpath={{.data.{key}}}') printf %s "
        f"{base64.b64encode(value.encode()).decode()};;"
        for key, value in secret.items()
    )
    kubectl.write_text(f'#!/bin/sh\ncase "$*" in\n{cases}\nesac\n')
    kubectl.chmod(0o755)
    result = subprocess.run(
        ["bash", "-ec", f'{commands}\necho "$AWS_ENDPOINT_URL $AWS_ACCESS_KEY_ID $AWS_SECRET_ACCESS_KEY"'],
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout == f"http://localhost:9000 {ACCESS_KEY} {SECRET_KEY}\n"


def test_locations_are_still_listed_when_the_kind_of_store_cannot_be_read(recorded, cli):
    recorded.set_root("gs://bucket/artifacts")
    status, out, err = cli("artifacts", "list", recorded.run_id)
    assert status == 3
    assert "gs:// cannot be read from here" in err
    assert "kubectl" not in err
    assert f"gs://bucket/artifacts/mappo-training/{recorded.run_id}/train/" in out
    assert cli("artifacts", "fetch", recorded.run_id)[0] == 3


# --- without v1beta1, by KFP's layout ---


@pytest.fixture
def finished(kubeflow, read, s3):
    """Store the artifacts of a run as the launcher lays them out; return the run's ID and the contents."""
    kubeflow.v1beta1 = False
    run = read(*SUBMIT, "--pipeline-root", ROOT.format(bucket=s3))
    kubeflow.finish(run["id"])
    executions = {stage: str(uuid.uuid4()) for stage in ("validate", "train", "evaluate")}
    contents = {
        "validate/report": b'{"checks": []}',
        "train/best/manifest.json": b"{}",
        "train/best/blobs/a.safetensors": b"\0" * 3_000_000,
        "train/history": b"iteration,frames\n",
        "train/metrics": b"",
        "evaluate/report": b'{"trained": 1}',
    }
    with s3_client() as client:
        for key, content in contents.items():
            stage, rest = key.split("/", 1)
            path = f"some/root/mappo-training/{run['id']}/{stage}/{executions[stage]}/{rest}"
            client.put_object(Bucket=s3, Key=path, Body=content)
        client.put_object(
            Bucket=s3, Key=f"some/root/mappo-training/{uuid.uuid4()}/train/x/best", Body=b"another run's"
        )
    return run["id"], contents


def test_artifacts_are_listed_by_stage_and_name_without_v1beta1(finished, read):
    rows = read("artifacts", "list", "latest")
    assert [(row["stage"], row["name"], row["objects"], row["bytes"]) for row in rows] == [
        ("evaluate", "report", 1, 14),
        ("train", "best", 2, 3_000_002),
        ("train", "history", 1, 17),
        ("train", "metrics", 1, 0),
        ("validate", "report", 1, 14),
    ]
    assert all(row["location"].startswith("s3://") for row in rows)


def test_all_artifacts_are_fetched_without_v1beta1(finished, read, tmp_path):
    run_id, contents = finished
    fetched = read("artifacts", "fetch", run_id)
    directory = tmp_path / "artifacts" / run_id
    assert {
        str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    } == contents
    assert set(fetched) == {"validate/report", "train/best", "train/history", "train/metrics", "evaluate/report"}


def test_selected_artifacts_are_fetched_by_name_without_v1beta1(finished, read, tmp_path):
    directory = tmp_path / "fetched"
    read("artifacts", "fetch", "latest", "train/history", "evaluate", "--to", str(directory))
    fetched = {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}
    assert fetched == {"train/history", "evaluate/report"}


def test_an_unknown_name_is_refused_naming_the_existing_artifacts(finished, cli):
    status, _, err = cli("artifacts", "fetch", "latest", "bestest")
    assert status == 2
    assert "train/best, train/history" in err


def test_executions_of_one_stage_are_fetched_into_separate_directories(finished, read, s3, tmp_path):
    """A pipeline with several seeds has one execution for each seed."""
    run_id, _ = finished
    with s3_client() as client:
        key = f"some/root/mappo-training/{run_id}/evaluate/{uuid.uuid4()}/report"
        client.put_object(Bucket=s3, Key=key, Body=b"second")
    read("artifacts", "fetch", "latest", "evaluate/report", "--to", str(tmp_path / "fetched"))
    contents = {path.read_bytes() for path in (tmp_path / "fetched" / "evaluate").rglob("report")}
    assert contents == {b'{"trained": 1}', b"second"}


def test_artifacts_are_listed_below_the_given_root_without_v1beta1(kubeflow, read, s3, cli):
    kubeflow.v1beta1 = False
    run = read(*SUBMIT, "--upload")
    with s3_client() as client:
        client.put_object(
            Bucket=s3, Key=f"root/mappo-training/{run['id']}/train/{uuid.UUID(int=1)}/history", Body=b"a"
        )
    for root in (f"s3://{s3}/root", f"s3://{s3}/root/?region=auto"):
        rows = read("artifacts", "list", run["id"], "--pipeline-root", root)
        assert [row["name"] for row in rows] == ["history"]
    status, _, err = cli("artifacts", "fetch", run["id"], "--pipeline-root", f"s3://{s3}/elsewhere")
    assert (status, "no artifacts yet; this server does not tell the locations" in err) == (2, True)


@pytest.mark.usefixtures("_impatient")
def test_a_store_that_does_not_answer_is_named_with_status_3(finished, cli, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    status, _, err = cli("artifacts", "list", "latest")
    assert status == 3
    assert "http://127.0.0.1:1" in err
