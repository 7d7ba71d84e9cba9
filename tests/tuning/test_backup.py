"""The nightly dump of the database of studies: tests dump, upload and restore with the CronJob's scripts."""

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from mappo.recipes import recipe
from mappo.tuning.database import Database
from mappo.tuning.plan import Plan
from mappo.tuning.search_space import default_space
from mappo.tuning.study import Study
from mappo.tuning.study_config import TuningConfig
from tests.support.overlays import ROOT
from tests.support.services import ACCESS_KEY, REGION, SECRET_KEY, missing, postgres, s3_client, use_s3

SCRIPTS = ROOT / "k8s" / "components" / "study-database"
CONFIG = recipe("navigation")


@pytest.fixture(scope="module")
def server():
    with postgres() as server:
        yield server


@pytest.fixture
def bucket(rgw_endpoint, monkeypatch) -> str:
    return use_s3(monkeypatch, rgw_endpoint)


def script(name: str, directory: Path, status: int = 0, **environment: str) -> str:
    """Run one of the CronJob's scripts as its container would."""
    for program in ("pg_dump", "rclone"):
        if not shutil.which(program):
            missing(program, "sudo apt install --no-install-recommends postgresql-client rclone")
    completed = subprocess.run(
        ["sh", SCRIPTS / name],
        env={"PATH": os.environ["PATH"], "HOME": str(directory), "BACKUP": str(directory), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
    )
    assert (completed.returncode != 0) == (status != 0), completed.stdout
    return completed.stdout


def upload(directory: Path, bucket: str, keep: str) -> str:
    return script(
        "upload.sh",
        directory,
        PLACE=f"{bucket}/mappo/backups",
        KEEP=keep,
        AWS_ACCESS_KEY_ID=ACCESS_KEY,
        AWS_SECRET_ACCESS_KEY=SECRET_KEY,
        AWS_ENDPOINT_URL=os.environ["AWS_ENDPOINT_URL"],
        AWS_DEFAULT_REGION=REGION,
    )


def backups(bucket: str) -> list[str]:
    with s3_client() as s3:
        listing = s3.list_objects_v2(Bucket=bucket, Prefix="mappo/backups/")
    return [entry["Key"] for entry in listing.get("Contents", [])]


def test_a_study_is_restored_from_its_dump_in_s3(server, bucket, tmp_path):
    url = server.create("dumped")
    database = Database(url)
    study = Study.prepare(
        database, "s", Plan(CONFIG, default_space(CONFIG), TuningConfig()), 3, store="s3://bucket/runs"
    )
    for value in (1.0, 2.0):
        claim = study.claim(f"worker-{value}")
        claim.report_frames(84_000, value)
        claim.finish("complete", value)
    dumped = (study.trials(), study.store)

    assert "dumped" in script("dump.sh", tmp_path, MAPPO_DATABASE=url)
    assert "uploaded to" in upload(tmp_path, bucket, "30d")
    database.close()
    (key,) = backups(bucket)
    with s3_client() as s3:
        s3.download_file(bucket, key, str(tmp_path / "restored.dump"))
    target_url = server.create("restored")
    restore = ["pg_restore", "--no-owner", "--exit-on-error", "--dbname", target_url, tmp_path / "restored.dump"]
    subprocess.run(restore, check=True, timeout=60)
    restored_database = Database(target_url)
    restored = Study.load(restored_database, "s")
    assert (restored.trials(), restored.store) == dumped
    claim = restored.claim("worker-3")
    assert claim.number == 2
    claim.finish("complete", 3.0)
    restored_database.close()


def test_an_upload_deletes_expired_dumps_but_not_the_new_one(bucket, tmp_path):
    (tmp_path / "mappo.dump").write_text("first")
    upload(tmp_path, bucket, "30d")
    (first,) = backups(bucket)
    time.sleep(1.1)
    upload(tmp_path, bucket, "0s")
    (second,) = backups(bucket)
    assert second > first


def test_a_failed_dump_exits_with_1_and_does_not_claim_success(server, tmp_path):
    output = script("dump.sh", tmp_path, status=1, MAPPO_DATABASE=server.url("nowhere"))
    assert "nowhere" in output
    assert "dumped" not in output
