"""Build the image and run it as Kubernetes would: not as root, only /tmp writable, no capabilities."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import requires
from pathlib import Path

import pytest

from mappo.config import to_json
from mappo.runs.run import Run
from pipelines.compiling import compile_pipeline
from pipelines.site import check_site
from tests.support.containers import ROOT, Containers, containers
from tests.support.pods import stage_pod
from tests.support.services import ACCESS_KEY, REGION, SECRET_KEY, use_s3

pytestmark = pytest.mark.long
BASE, IMAGE = "localhost/debian-python:bookworm", "localhost/mappo:test"
TINY = ("--collection.total-frames", "1200", "--collection.num-envs", "6", "--learner.epochs", "2")


@pytest.fixture(scope="module")
def machine() -> Iterator[Containers]:
    with containers() as machine:
        machine.make_base(BASE)
        machine.build(IMAGE, BASE)
        yield machine


@pytest.fixture
def bucket(rgw_endpoint, monkeypatch) -> str:
    return use_s3(monkeypatch, rgw_endpoint)


def s3_environment() -> dict[str, str]:
    return {
        "AWS_ENDPOINT_URL": os.environ["AWS_ENDPOINT_URL"],
        "AWS_ACCESS_KEY_ID": ACCESS_KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        "AWS_DEFAULT_REGION": REGION,
    }


def test_image_runs_as_an_unprivileged_user_and_has_no_other_tools_than_the_compiler(machine):
    inspected = json.loads(machine.call("podman", "image", "inspect", IMAGE))[0]["Config"]
    assert inspected["User"] == "10001:10001"
    assert inspected["Entrypoint"] == ["mappo"]
    labels = {
        name.rsplit(".", 1)[1]: value for name, value in inspected["Labels"].items() if "opencontainers" in name
    }
    assert re.fullmatch("[0-9a-f]{40}", labels["revision"])
    assert labels["name"] == BASE
    tools = "for each in make pip git curl; do command -v $each; done; true"
    assert machine.run(IMAGE, "--version").startswith("mappo ")
    assert machine.look(IMAGE, "sh", "-c", tools) == ""


def test_bill_of_materials_names_every_package(machine):
    def components(name: str) -> set[str]:
        text = machine.look(IMAGE, "cat", f"/opt/mappo/sbom/{name}.cdx.json")
        return {package["name"].lower().replace("_", "-") for package in json.loads(text)["components"]}

    requirements = [text for text in requires("mappo") or [] if "extra ==" not in text]
    needed = {re.match(r"[\w-]+", text)[0] for text in requirements}  # type: ignore[index]
    python = components("python")
    assert python >= needed | {"mappo", "kfp"}
    assert not python & {"pytest", "kubernetes", "grpcio", "tensorboard"}
    assert components("debian") >= {"libc6", "python3-minimal"}


def test_environment_is_validated_in_the_container(machine):
    output = machine.run(IMAGE, "validate", *TINY)
    assert "none failed" in output


def test_own_scenario_is_added_by_the_steps_of_the_guide(machine, tmp_path):
    (tmp_path / "my_tasks").mkdir()
    (tmp_path / "my_tasks" / "__init__.py").touch()
    (tmp_path / "my_tasks" / "rescue.py").write_text(
        "from vmas.scenarios.navigation import Scenario\n\n\nclass Rescue(Scenario):\n    pass\n"
    )
    guide = (ROOT / "docs" / "own-scenarios.md").read_text()
    lines = re.search(r"    FROM .*\n(    .*\n)+", guide)[0]  # type: ignore[index]
    (tmp_path / "Dockerfile").write_text(re.sub("FROM .*", f"FROM {IMAGE}", lines.replace("    ", "")))
    machine.call("buildah", "build", "--tag", "localhost/my-tasks:test", tmp_path)
    output = machine.run(
        "localhost/my-tasks:test", "validate", "--environment.scenario", "my_tasks.rescue:Rescue", *TINY
    )
    assert "none failed" in output


def test_training_in_the_container_saves_checkpoints_in_a_store(machine, bucket):
    store = f"s3://{bucket}/runs"
    machine.run(IMAGE, "train", *TINY, "--run", "first", "--store", store, env=s3_environment())
    run = Run.at(f"{store}/first")
    assert run.load(run.choose("last")).frames == 1200


def test_training_in_the_container_compiles_and_is_as_fast_as_outside(machine, tmp_path):
    """The ratio of the speeds is printed; a slow machine must not fail the test."""
    longer = ("navigation", "--collection.total-frames", "60000", "--collection.simulation", "fast")
    longer += ("--learner.update", "fast", "--device", "cpu")
    inside = machine.run(IMAGE, "train", *longer, "--run", "first", "--store", "/tmp/runs", memory="4g")
    command = [sys.executable, "-m", "mappo", "train", *longer, "--run", "first", "--store", str(tmp_path)]
    outside = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    for output in (inside, outside):
        assert "the simulation is fast: compiled and checked in" in output
    one, other = (
        float(re.findall(r"60,000 of 60,000 .* ([\d,]+) frames/s", text)[0].replace(",", ""))
        for text in (inside, outside)
    )
    print(f"{one:,.0f} frames/s in the container, {other:,.0f} outside: {one / other:.2f}")


def test_training_without_memory_for_the_compiler_is_plain(machine):
    output = machine.run(IMAGE, "train", *TINY, "--run", "first", "--store", "/tmp/runs")
    assert "simulation plain, update plain (auto: less than 1.00 GiB are free for the compiler)" in output


def test_training_names_the_directory_that_it_cannot_write(machine):
    output = machine.run(IMAGE, "train", *TINY, "--store", "/nowhere", status=1)
    assert "/nowhere" in output
    assert "Traceback" not in output


@pytest.fixture
def compiled(tiny, tmp_path) -> Path:
    path = tmp_path / "training.yaml"
    site = check_site({"image": IMAGE, "stages": {"train": {"memory": "1Gi", "cpu": "1", "shm": "64Mi"}}})
    path.write_text(compile_pipeline("training", site, {"config": to_json(tiny)}).text)
    return path


@pytest.mark.parametrize("stage", ["validate", "train"])
def test_stage_of_a_compiled_pipeline_runs_as_a_pod(machine, bucket, compiled, tiny, tmp_path, stage):
    root = f"s3://{bucket}/artifacts/{stage}"
    arguments = {
        "config": to_json(tiny),
        "run": "pod",
        "store": f"s3://{bucket}/runs" if stage == "train" else None,
    }
    pod = stage_pod(compiled, stage, IMAGE, arguments, root=root, secret=s3_environment())
    manifest = tmp_path / "pod.json"
    manifest.write_text(json.dumps(pod))
    machine.call("podman", "play", "kube", manifest)
    try:
        name = f"mappo-{stage}-main"
        assert machine.call("podman", "wait", name).strip() == "0", machine.call("podman", "logs", name)
    finally:
        machine.call("podman", "play", "kube", "--down", manifest)
    if stage == "train":
        run = Run.at(f"s3://{bucket}/runs/pod")
        assert run.load(run.choose("last")).config == tiny
