"""The pipeline of a matrix: on the test server, here with Kubeflow's local runner, and as pods run its stages."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from mappo.matrix.matrix import matrix_from_json, read_matrix
from pipelines.__main__ import main
from pipelines.compiling import Compiled, compile_pipeline
from pipelines.kubeflow.api import Api
from pipelines.kubeflow.client import submit
from pipelines.kubeflow.connection import Connection
from pipelines.kubeflow.submission import Submission
from pipelines.site import Site, StagePod, StagePods
from tests.stages.test_whole_matrix import BROKEN, ONE
from tests.support.argo import BEFORE_2_17, STOCK

REPOSITORY = Path(__file__).parents[2]
MATRIX = REPOSITORY / "tests" / "data" / "matrix.yaml"
CELLS = [cell.name for cell in read_matrix(MATRIX).cells]
SUBMIT = ["submit", "--image", "a:1", "--matrix", str(MATRIX), "-p", "store=s3://bucket/runs"]
TWO = ONE + BROKEN  # of these two cells, the second fails


def states(read, run_id: str) -> dict[str, str]:
    return {row["stage"]: row["state"] for row in read("runs", "show", run_id)["stages"]}


def rows(file: Path) -> list[tuple[str, str]]:
    return [(row["task"], row["state"]) for row in csv.DictReader(file.read_text().splitlines())]


# --- on the test server ---


def test_submitted_matrix_has_all_its_cells_and_the_order_of_its_file(kubeflow, read):
    read(*SUBMIT, "--parallel-seeds=3", "-p", f"cells={json.dumps(CELLS[:2])}")
    (run,) = kubeflow.runs.values()
    specification = run["pipeline_spec"]["pipeline_spec"]
    assert specification["pipelineInfo"]["name"] == "mappo-matrix"
    declared = specification["root"]["inputDefinitions"]["parameters"]
    assert matrix_from_json(declared["matrix"]["defaultValue"]) == read_matrix(MATRIX)
    assert declared["cells"]["defaultValue"] == CELLS
    assert "defaultValue" not in declared["store"]
    assert run["runtime_config"]["parameters"] == {"store": "s3://bucket/runs", "cells": CELLS[:2]}
    (loop,) = specification["components"]["comp-mappo-each-cell"]["dag"]["tasks"].values()
    assert loop["iteratorPolicy"] == {"parallelismLimit": 3}


@pytest.mark.parametrize("policy", [STOCK, BEFORE_2_17])
@pytest.mark.parametrize("notifies", [False, True])
def test_failed_cell_fails_the_run_and_the_others_are_summarised(kubeflow, read, tmp_path, policy, notifies):
    kubeflow.template_defaults = policy
    (tmp_path / "site.yaml").write_text(f"image: a:1\nnotify_secret: {'team' if notifies else 'null'}\n")
    run_id = read(*SUBMIT, "--site", str(tmp_path / "site.yaml"), "-p", f"cells={json.dumps(CELLS[:3])}")["id"]
    kubeflow.fail_stage(run_id, "cell[1]", attempts=1 if policy is STOCK else 4)  # the site has 3 retries
    assert states(read, run_id)["summarise"] == "PENDING"  # the third cell has not ended
    kubeflow.reach(run_id, "summarise")
    values = kubeflow.executor_input_of(run_id, "summarise")["inputs"]["parameterValues"]
    assert (values["store"], matrix_from_json(values["matrix"])) == ("s3://bucket/runs", read_matrix(MATRIX))
    assert kubeflow.finish(run_id) == "FAILED"
    cells = {"cell[0]": "SUCCEEDED", "cell[1]": "FAILED", "cell[2]": "SUCCEEDED"}
    after = {"summarise": "SUCCEEDED", **({"notify": "SUCCEEDED"} if notifies else {})}
    assert list(states(read, run_id).items()) == list((cells | after).items())


def test_run_without_a_failed_cell_succeeds(kubeflow, read):
    run_id = read(*SUBMIT)["id"]
    assert kubeflow.finish(run_id) == "SUCCEEDED"
    assert list(states(read, run_id)) == [*(f"cell[{index}]" for index in range(8)), "summarise"]


def test_tables_are_those_of_the_first_end_after_a_retry_and_their_failure_fails_no_run(kubeflow, read, cli):
    """docs/kubeflow.md says so: submit again, and look at the stage. Argo keeps a hook, and does not count it."""
    run_id = read(*SUBMIT)["id"]
    kubeflow.fail_stage(run_id, "cell[1]")
    assert kubeflow.finish(run_id) == "FAILED"
    outputs = kubeflow.executor_input_of(run_id, "summarise")["outputs"]
    assert cli("runs", "retry", run_id)[0] == 0
    assert kubeflow.finish(run_id) == "SUCCEEDED"
    assert kubeflow.executor_input_of(run_id, "summarise")["outputs"] == outputs
    run_id = read(*SUBMIT)["id"]
    kubeflow.fail_stage(run_id, "summarise")
    assert kubeflow.finish(run_id) == "SUCCEEDED"
    assert states(read, run_id)["summarise"] == "FAILED"


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--seeds=0,1"], "--seeds and --matrix exclude each other"),
        (["--study=s"], "--matrix and --study exclude each other"),
        (["balance"], "the file has all settings of its cells"),
        (["--learner.epochs=3"], "the file has all settings of its cells"),
        (["-p", "store=runs"], "a directory of a pod is lost with the pod"),
        (["-p", "cell_memory=lots"], "amount of memory"),
        (["-p", "cell_gpus=1"], "parameter cell_gpus: unknown; did you mean"),
    ],
)
def test_wrong_submission_of_a_matrix_is_refused_without_a_request(kubeflow, cli, arguments, reason):
    status, _, err = cli(*SUBMIT, *arguments)
    assert status == 2
    assert reason in err
    assert not kubeflow.requests


def test_wrong_file_is_refused_with_its_line(kubeflow, cli, tmp_path):
    (tmp_path / "m.yaml").write_text(MATRIX.read_text().replace("{success: terminated}", "{recipe: none}"))
    for file, reason in (
        ("m.yaml", "m.yaml: line 10: tasks.balance.recipe"),
        ("no.yaml", "no.yaml: No such file"),
    ):
        status, _, err = cli("submit", "--image=a:1", "--matrix", file, "-p", "store=s3://bucket/runs")
        assert (status, reason in err) == (2, True), err
    assert not kubeflow.requests


def test_compiled_matrix_takes_another_matrix_beside_its_file(kubeflow, read, cli, tmp_path):
    golden = str(REPOSITORY / "tests" / "golden" / "matrix.yaml")
    (tmp_path / "m.yaml").write_text(MATRIX.read_text().replace("[0, 1]", "[7]"))
    read("submit", "--file", golden, "--matrix", "m.yaml", "-p", "store=s3://bucket/runs")
    (run,) = kubeflow.runs.values()
    assert run["runtime_config"]["parameters"]["cells"] == [
        cell.name for cell in read_matrix(tmp_path / "m.yaml").cells
    ]
    assert (
        cli("compile", "--image=a:1", "--pipeline=matrix", "--output=m.yaml")[0] == 0
    )  # without a matrix of its own
    status, _, err = cli("submit", "--file=m.yaml", "-p", "store=s3://bucket/runs")
    assert (status, "parameter matrix: missing" in err) == (2, True)


def test_schedule_of_a_matrix_tells_if_only_its_first_run_trains(kubeflow, read, cli, tmp_path):
    create = ["schedule", "create", "m", "--cron", "@weekly", *SUBMIT[1:-2]]
    status, _, err = cli(*create, "-p", "store=s3://bucket/runs")
    assert status == 0
    assert "note: schedule m: store = s3://bucket/runs: all runs of this schedule continue this one matrix" in err
    assert "store=s3://bucket/runs/[[ScheduledTime]] trains anew each time" in err
    by_flags = read(*create, "-p", "store=s3://bucket/[[ScheduledTime]]")
    assert by_flags["schedule"] == "m, replaced"
    (tmp_path / "ops").mkdir()
    (tmp_path / "ops" / "matrix.yaml").write_bytes(MATRIX.read_bytes())
    (tmp_path / "ops" / "schedules.yaml").write_text(
        "owner: a\nschedules:\n  f: {cron: '@weekly', image: 'a:1', matrix: matrix.yaml,\n"
        "      parameter: {store: 's3://bucket/[[ScheduledTime]]'}}\n"
    )
    (row,) = read("schedule", "apply", "ops/schedules.yaml")
    assert row["change"] == "created"
    flags, file = kubeflow.recurring_runs.values()
    assert file["pipeline_spec"] == flags["pipeline_spec"]
    assert file["runtime_config"] == flags["runtime_config"]


# --- its stages ---


@pytest.mark.long
def test_local_run_summarises_although_a_cell_failed_and_continues(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))  # the stages run in their own processes
    Path("m.yaml").write_text(TWO)
    assert main(["run", "--matrix=m.yaml", "--run=first"]) == 1
    output = capsys.readouterr()
    assert "stage cell failed: broken-mappo-0: train: " in output.err
    assert "[summarise] 1 of 2 cells are done, 1 failed" in output.out
    (folder,) = Path("runs/first").glob("mappo-matrix-*/summarise")
    assert rows(folder / "cells") == [("navigation", "done"), ("broken", "failed")]
    assert (folder / "markdown").read_text().startswith("# tiny\n")
    assert f"matrix table         {folder / 'table'}" in output.out
    page = Path("runs/first/matrix.html")
    assert page.absolute().as_uri() in output.out
    assert 'href="../tiny/navigation-mappo-0/report.html"' in page.read_text()
    assert Path("runs/tiny/navigation-mappo-0/report.html").exists()


@pytest.mark.long
def test_stages_in_their_pods_fill_the_matrix_and_a_second_run_continues_it(kubeflow, tmp_path):
    run_pods(
        *(kubeflow, tmp_path, TWO),
        ("cell[0]", 0, "[evaluate] saved with the run as its evaluation"),
        ("cell[1]", 1, "[cell] not tried again: another attempt would fail in the same way"),
        ("summarise", 0, "[summarise] 1 of 2 cells are done, 1 failed"),
    )
    run_pods(
        *(kubeflow, tmp_path, ONE),
        ("cell[0]", 0, "[cell] navigation-mappo-0: done before, with return "),
        ("summarise", 0, "[summarise] 1 of 1 cells are done, 0 failed"),
    )
    assert len(list((tmp_path / "runs/tiny/navigation-mappo-0/attempts").iterdir())) == 1


def run_pods(kubeflow, directory: Path, text: str, *steps: tuple[str, int, str]) -> None:
    """Run the pipeline of a matrix; each step is a stage, its exit status and a line of its log."""
    text = json.dumps(yaml.safe_load(text))
    cells = [cell.name for cell in matrix_from_json(text).cells]
    site = Site(image="a:1", stages=StagePods(cell=StagePod(retries=1, backoff_seconds=1)))
    pipeline = compile_pipeline("matrix", site, {"matrix": text, "cells": cells})
    submission = Submission(
        pipeline, {"store": str(directory / "runs")}, pipeline_root=str(directory / "artifacts")
    )
    run_id = submit(Api(Connection(endpoint=kubeflow.url)), submission).run_id
    for step, status, line in steps:
        kubeflow.reach(run_id, step)
        process = pod(pipeline, step, kubeflow.executor_input_of(run_id, step))
        assert (process.returncode, line in process.stdout) == (status, True), process.stdout + process.stderr
        if status:
            kubeflow.fail_stage(run_id, step)
    outputs = kubeflow.executor_input_of(run_id, "summarise")["outputs"]["artifacts"]
    states = [state for _, state in rows(Path(outputs["cells"]["artifacts"][0]["uri"]))]
    assert states == ["failed" if status else "done" for _, status, _ in steps[:-1]]


def pod(pipeline: Compiled, step: str, executor_input: object) -> "subprocess.CompletedProcess[str]":
    """Run a stage as its pod does: the compiled command with the input that the driver wrote."""
    executors = pipeline.specification["deploymentSpec"]["executors"]
    container = executors[f"exec-{step.partition('[')[0]}"]["container"]
    words = [*container["command"][1:], *container["args"]]
    command = [sys.executable, *(word.replace("{{$}}", json.dumps(executor_input)) for word in words)]
    names = {"KFP_POD_NAME": step, "KFP_POD_UID": step, "PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(command, env={**os.environ, **names}, capture_output=True, text=True, check=False)
