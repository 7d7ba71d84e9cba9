import json
import uuid

import pytest

from mappo import stages
from mappo.config import to_json
from mappo.storage import open_store
from tests.services import s3_client
from tests.test_commands import SUBMIT

ROOT = "s3://{bucket}/some/root"


@pytest.fixture
def finished(kubeflow, read, s3):
    """A run's ID, its bucket, and what its stages left there, as the launcher lays it out."""
    made = read(*SUBMIT, "--pipeline-root", ROOT.format(bucket=s3))
    kubeflow.finish(made["id"])
    salts = {stage: str(uuid.uuid4()) for stage in ("validate", "train", "evaluate")}
    left = {
        "validate/report": b'{"checks": []}',
        "train/best/manifest.json": b"{}",
        "train/best/blobs/a.safetensors": b"\0" * 3_000_000,
        "train/history": b"iteration,frames\n",
        "train/metrics": b"",
        "evaluate/report": b'{"trained": 1}',
    }
    with s3_client() as client:
        for key, content in left.items():
            stage, rest = key.split("/", 1)
            path = f"some/root/mappo-training/{made['id']}/{stage}/{salts[stage]}/{rest}"
            client.put_object(Bucket=s3, Key=path, Body=content)
        client.put_object(
            Bucket=s3, Key=f"some/root/mappo-training/{uuid.uuid4()}/train/x/best", Body=b"another run's"
        )
    return made["id"], left


def test_artifacts_are_listed_by_stage_and_name(finished, read):
    rows = read("artifacts", "list", "latest")
    assert [(row["stage"], row["name"], row["objects"], row["bytes"]) for row in rows] == [
        ("evaluate", "report", 1, 14),
        ("train", "best", 2, 3_000_002),
        ("train", "history", 1, 17),
        ("train", "metrics", 1, 0),
        ("validate", "report", 1, 14),
    ]
    assert all(row["location"].startswith("s3://") for row in rows)


def test_fetched_artifacts_are_what_was_left(finished, read, tmp_path):
    run_id, left = finished
    fetched = read("artifacts", "fetch", run_id)
    directory = tmp_path / "artifacts" / run_id
    assert {
        str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    } == left
    assert set(fetched) == {"validate/report", "train/best", "train/history", "train/metrics", "evaluate/report"}


def test_some_artifacts_are_fetched_by_name_into_a_directory(finished, read, tmp_path):
    read("artifacts", "fetch", "latest", "train/history", "evaluate", "--to", str(tmp_path / "here"))
    found = {str(path.relative_to(tmp_path / "here")) for path in (tmp_path / "here").rglob("*") if path.is_file()}
    assert found == {"train/history", "evaluate/report"}


def test_a_name_that_is_not_there_is_refused_naming_those_that_are(finished, cli):
    status, _, err = cli("artifacts", "fetch", "latest", "bestest")
    assert status == 2
    assert "train/best, train/history" in err


def test_executions_of_one_stage_are_kept_apart(finished, read, s3, tmp_path):
    """As those of several seeds."""
    run_id, _ = finished
    with s3_client() as client:
        key = f"some/root/mappo-training/{run_id}/evaluate/{uuid.uuid4()}/report"
        client.put_object(Bucket=s3, Key=key, Body=b"second")
    read("artifacts", "fetch", "latest", "evaluate/report", "--to", str(tmp_path / "here"))
    contents = {path.read_bytes() for path in (tmp_path / "here" / "evaluate").rglob("report")}
    assert contents == {b'{"trained": 1}', b"second"}


def test_a_fetched_checkpoint_can_be_read(kubeflow, read, s3, tmp_path, tiny, capsys):
    """That of a real training, where the launcher puts it."""
    made = read(*SUBMIT, "--pipeline-root", ROOT.format(bucket=s3))
    stages.train(to_json(tiny), tmp_path / "run", tmp_path / "history", tmp_path / "best")
    capsys.readouterr()
    place = f"some/root/mappo-training/{made['id']}/train/{uuid.uuid4()}/best"
    with s3_client() as client:
        for path in (tmp_path / "best").rglob("*"):
            if path.is_file():
                key = f"{place}/{path.relative_to(tmp_path / 'best')}"
                client.put_object(Bucket=s3, Key=key, Body=path.read_bytes())
    read("artifacts", "fetch", "latest", "--to", str(tmp_path / "here"))
    report = tmp_path / "evaluation.json"
    stages.evaluate(to_json(tiny), tmp_path / "here" / "train" / "best", report)
    assert json.loads(report.read_text())["training_frames"] == 360


def test_a_root_that_the_run_does_not_name_is_given(kubeflow, read, s3, cli):
    made = read(*SUBMIT, "--upload")
    with s3_client() as client:
        client.put_object(
            Bucket=s3, Key=f"root/mappo-training/{made['id']}/train/{uuid.UUID(int=1)}/history", Body=b"a"
        )
    rows = read("artifacts", "list", made["id"], "--pipeline-root", f"s3://{s3}/root")
    assert [row["name"] for row in rows] == ["history"]
    assert cli("artifacts", "fetch", made["id"], "--pipeline-root", f"s3://{s3}/elsewhere")[0] == 2


def test_a_store_that_does_not_answer_is_one_line_and_status_3(finished, cli, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setattr("pipelines.kubeflow.artifacts.open_store", _impatient)
    status, _, err = cli("artifacts", "list", "latest")
    assert status == 3
    assert "http://127.0.0.1:1" in err


def _impatient(place: str):
    return open_store(place, patience_seconds=0)
