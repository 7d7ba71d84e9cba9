"""The nightly dump of the database of studies, made, kept and restored with the scripts of the CronJob itself."""

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from mappo.recipes import recipe
from mappo.tuning.database import Database
from mappo.tuning.plan import Plan
from mappo.tuning.search_space import TuningConfig, default_space
from mappo.tuning.study import Study
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
    done = subprocess.run(
        ["sh", SCRIPTS / name],
        env={"PATH": os.environ["PATH"], "HOME": str(directory), "BACKUP": str(directory), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
    )
    assert (done.returncode != 0) == (status != 0), done.stdout
    return done.stdout


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


def kept(bucket: str) -> list[str]:
    with s3_client() as s3:
        listed = s3.list_objects_v2(Bucket=bucket, Prefix="mappo/backups/")
    return [each["Key"] for each in listed.get("Contents", [])]


def test_a_study_comes_back_from_its_dump_in_s3(server, bucket, tmp_path):
    url = server.create("dumped")
    database = Database(url)
    study = Study.prepare(
        database, "s", Plan(CONFIG, default_space(CONFIG), TuningConfig()), 3, store="s3://bucket/runs"
    )
    for value in (1.0, 2.0):
        claim = study.claim(f"worker-{value}")
        claim.report(84_000, value)
        claim.finish("complete", value)
    before = (study.trials(), study.place)

    assert "dumped" in script("dump.sh", tmp_path, MAPPO_DATABASE=url)
    assert "kept as" in upload(tmp_path, bucket, "30d")
    database.close()
    (key,) = kept(bucket)
    with s3_client() as s3:
        s3.download_file(bucket, key, str(tmp_path / "restored.dump"))
    fresh = server.create("restored")
    restore = ["pg_restore", "--no-owner", "--exit-on-error", "--dbname", fresh, tmp_path / "restored.dump"]
    subprocess.run(restore, check=True, timeout=60)
    restored = Database(fresh)
    again = Study.load(restored, "s")
    assert (again.trials(), again.place) == before
    claim = again.claim("worker-3")
    assert claim.number == 2
    claim.finish("complete", 3.0)
    restored.close()


def test_old_dumps_are_deleted_and_the_new_one_never(bucket, tmp_path):
    (tmp_path / "mappo.dump").write_text("first")
    upload(tmp_path, bucket, "30d")
    (first,) = kept(bucket)
    time.sleep(1.1)
    upload(tmp_path, bucket, "0s")
    (second,) = kept(bucket)
    assert second > first


def test_a_dump_that_fails_is_no_dump(server, tmp_path):
    said = script("dump.sh", tmp_path, status=1, MAPPO_DATABASE=server.url("nowhere"))
    assert "nowhere" in said
    assert "dumped" not in said
