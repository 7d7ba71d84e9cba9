"""The runs on a real MLflow server, read by MLflow's own client; and servers that are dead, slow or refuse."""

import csv
import io
import json
import logging
import math
import socket
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from mappo.__main__ import main
from mappo.config import from_dict, override
from mappo.errors import ConfigError, Pruned
from mappo.monitoring import mlflow_sender
from mappo.monitoring.mlflow_settings import MlflowSettings, prepare_client
from mappo.monitoring.tracking import evaluation_metrics, parameters_of, tracked_run
from mappo.runs.run import load_checkpoint
from mappo.training.history import IterationReport, Progress, TrainingStarted
from tests import conftest
from tests.cli.test_main import TINY
from tests.support.mlflow_server import mlflow_server
from tests.support.runs import train_here
from tests.support.webhook import receiver

CURVE = "learning/kl"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    prepare_client({"MLFLOW_TRACKING_URI": ""})
    with mlflow_server(tmp_path_factory.mktemp("mlflow")) as url:
        yield url


@pytest.fixture(scope="module")
def reports(tmp_path_factory) -> list[IterationReport]:
    """Return the reports of a real training of three iterations."""
    reports: list[IterationReport] = []
    train_here(from_dict(conftest.TINY), tmp_path_factory.mktemp("reported"), reports.append)
    return reports


@pytest.fixture
def client(server, monkeypatch, tmp_path):
    """Return a client of the server, which the environment names, with an experiment of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", tmp_path.name)
    from mlflow import MlflowClient

    return MlflowClient(server)


def runs(client, name: str) -> list:
    experiment = client.get_experiment_by_name(name)
    return list(client.search_runs([experiment.experiment_id])) if experiment else []


def points(client, run_id: str, metric: str) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in client.get_metric_history(run_id, metric)]


def track(config, reports, location="runs/first", attempt=1, **options):
    with tracked_run(config, "first", location, **options) as tracked:
        tracked.began(TrainingStarted(Progress(), attempt, attempt > 1))
        for report in reports:
            tracked.iterated(report)
    return tracked


def test_run_holds_every_number_of_the_history_and_the_configuration(client, tmp_path, capsys):
    assert main(["train", *TINY, "--run", "first"]) == 0
    assert main(["evaluate", "runs/first", "--output", "evaluation.json"]) == 0
    (run,) = runs(client, tmp_path.name)  # the evaluation is in the run of the training
    assert (run.info.status, run.info.run_name) == ("FINISHED", "first")
    rows = list(csv.DictReader(io.StringIO(load_checkpoint("runs/first", "last").history)))
    for column, metric in (("kl", "learning/kl"), ("episode_return_mean", "return/episode_return_mean")):
        expected = [(int(row["frames"]), float(row[column])) for row in rows if row[column]]
        assert points(client, run.info.run_id, metric) == expected
    assert run.data.params["learner.clip_epsilon"] == "0.2"
    assert run.data.params["environment.scenario"] == "navigation"
    evaluation = json.loads(Path("evaluation.json").read_text())
    mean = evaluation["trained"]["mean"]
    for end, name in (("", "value"), ("_low", "low"), ("_high", "high")):
        ((step, value),) = points(client, run.info.run_id, f"evaluation/trained/return_mean{end}")
        assert (step, value) == (int(rows[-1]["frames"]), mean[name])
    measured = [name for name in run.data.metrics if name.startswith("evaluation/trained/measured_")]
    assert measured
    output = capsys.readouterr().out
    assert f"[train] MLflow run: {client.tracking_uri}/#/experiments/{run.info.experiment_id}/runs/" in output
    assert "warning" not in output
    assert "View run" not in output


def test_resumed_run_continues_its_mlflow_run_without_a_point_twice(client, tmp_path, reports):
    """Let the first process die after iteration 2, and the second resume from the checkpoint of iteration 1."""
    config = from_dict(conftest.TINY)
    with pytest.raises(SystemExit), tracked_run(config, "first", "runs/first") as tracked:
        tracked.began(TrainingStarted(Progress(), 1, False))
        tracked.iterated(reports[0])
        tracked.iterated(reports[1])
        wait_until(lambda: tracked.run_id and len(points(client, tracked.run_id, CURVE)) == 2)
        raise SystemExit
    (run,) = runs(client, tmp_path.name)
    assert run.info.status == "KILLED"
    track(config, reports[1:], attempt=2)
    (run,) = runs(client, tmp_path.name)
    assert [step for step, _ in points(client, run.info.run_id, CURVE)] == [120, 240, 360]
    assert run.info.status == "FINISHED"


def test_new_run_at_the_place_of_another_gets_an_mlflow_run_of_its_own(client, tmp_path, reports):
    config = from_dict(conftest.TINY)
    ids = {track(config, reports[:1]).run_id for _ in range(2)}
    assert {run.info.run_id for run in runs(client, tmp_path.name)} == ids
    assert len(ids) == 2


def test_stage_on_kubeflow_logs_to_the_run_that_kubeflow_made_and_does_not_end_it(
    client, tmp_path, reports, monkeypatch
):
    """Kubeflow itself logs inputs and final metrics at step 0, then ends the run."""
    experiment = client.create_experiment(tmp_path.name)
    given = client.create_run(experiment, run_name="train").info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", given)
    config = from_dict(conftest.TINY)
    assert track(config, reports).run_id == given
    (run,) = runs(client, tmp_path.name)
    assert run.info.status == "RUNNING"
    client.log_param(given, "seed", '"7"')  # would be refused, had the stage logged another `seed`
    client.log_metric(given, "kl", 0.5, timestamp=0, step=0)
    assert [step for step, _ in points(client, given, CURVE)] == [120, 240, 360]
    nested = track(config, reports[:1], "runs/trial-0", is_nested=True).run_id
    assert client.get_run(nested).data.tags["mlflow.parentRunId"] == given
    assert client.get_run(nested).info.status == "FINISHED"


def test_page_becomes_an_artifact(client, tmp_path):
    page = tmp_path / "page"  # Kubeflow's name of the file
    page.write_text("<p>a</p>")
    with tracked_run(from_dict(conftest.TINY), "first", "runs/first") as tracked:
        tracked.attach(page)
    (artifact,) = client.list_artifacts(tracked.run_id)
    assert (artifact.path, artifact.file_size) == ("page.html", 8)


def test_limits_of_mlflow_are_kept(client, tmp_path, reports):
    """Log names with every character, 150 parameters, a long value, and 400 iterations at once."""
    values = {f"option {number}": "a" for number in range(150)}
    scenario = {"scenario_kwargs": {**values, "é/../:x": "long " * 2000}}
    config = override(from_dict(conftest.TINY), {"environment": scenario})
    many = [
        replace(reports[0], progress=Progress(number, 120 * number), elapsed_seconds=float(number))
        for number in range(1, 401)
    ]
    tracked = track(config, many)
    run = client.get_run(tracked.run_id)
    assert len(points(client, tracked.run_id, CURVE)) == 400
    long = run.data.params["environment.scenario_kwargs._____:x"]
    assert len(long) == 6000
    assert long.endswith("... (10000 characters)")
    assert sum(name.startswith("environment.scenario_kwargs.option") for name in run.data.params) == 150


def test_pruned_failed_and_interrupted_runs_have_their_status(client, tmp_path, reports):
    for error, status in ((Pruned("a"), "KILLED"), (ValueError("a"), "FAILED"), (KeyboardInterrupt(), "KILLED")):
        with pytest.raises(type(error)), tracked_run(from_dict(conftest.TINY), "a", f"runs/{status}") as tracked:
            tracked.began(TrainingStarted(Progress(), 1, False))
            wait_until(lambda tracked=tracked: tracked.run_id)
            raise error
        assert client.get_run(tracked.run_id).info.status == status


def test_parameters_have_the_names_of_flags():
    config = from_dict(conftest.TINY)
    parameters = parameters_of(config)
    assert parameters["experiment.seed"] == "0"
    assert parameters["environment.scenario_kwargs.n_agents"] == "2"
    assert parameters["networks.hidden_sizes"] == "[16]"
    assert not {"seed", "config", "run", "store"} & parameters.keys()  # inputs of Kubeflow's tasks


# --- servers that are dead, slow or refuse ---


def wait_until(condition, seconds=30.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def warnings_of(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def track_badly(uri, monkeypatch, reports, seconds=1.0) -> float:
    """Track a run on a bad server; return the seconds that reporting took, and require that the end is in time."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setattr("mappo.monitoring.tracking._END_SECONDS", seconds)
    with tracked_run(from_dict(conftest.TINY), "first", "runs/first") as tracked:
        tracked.began(TrainingStarted(Progress(), 1, False))
        start = time.perf_counter()
        for _ in range(100):
            tracked.iterated(reports[0])
        reporting = time.perf_counter() - start
        end = time.monotonic()
    assert time.monotonic() - end < seconds + 1
    return reporting


def test_dead_server_costs_one_line_and_no_time(monkeypatch, reports, caplog):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        uri = f"http://127.0.0.1:{listener.getsockname()[1]}"
    assert track_badly(uri, monkeypatch, reports) < 0.5
    (line,) = warnings_of(caplog)
    assert line.startswith(f"MLflow at {uri}: it cannot be reached; the stage continues")


def test_silent_server_costs_one_line_and_no_time(monkeypatch, reports, caplog):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        assert track_badly(f"http://127.0.0.1:{listener.getsockname()[1]}", monkeypatch, reports) < 0.5
        (line,) = warnings_of(caplog)
        assert "it did not take everything in time" in line


@pytest.mark.parametrize("status", [401, 403, 404])
def test_server_that_refuses_costs_one_line(monkeypatch, reports, caplog, status):
    monkeypatch.setenv("MLFLOW_RUN_ID", "a" * 32)
    with receiver() as server:
        server.status = status
        assert track_badly(server.url, monkeypatch, reports, 5.0) < 0.5
    (line,) = warnings_of(caplog)
    assert f"it answered {status}" in line


def test_server_that_comes_late_gets_everything(client, tmp_path, monkeypatch, reports, server):
    """Let the first requests fail, as while a server restarts."""
    failures = iter([ConnectionError("no"), ConnectionError("no")])
    opened = mlflow_sender.Sender._open

    def open_late(self):
        for error in failures:
            raise error
        return opened(self)

    monkeypatch.setattr(mlflow_sender.Sender, "_open", open_late)
    tracked = track(from_dict(conftest.TINY), reports)
    assert [step for step, _ in points(client, tracked.run_id, CURVE)] == [120, 240, 360]


def test_queue_is_bounded_while_a_server_is_dead(monkeypatch, reports):
    monkeypatch.setattr(mlflow_sender, "_MAX_ROWS", 50)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setattr("mappo.monitoring.tracking._END_SECONDS", 0.1)
    with tracked_run(from_dict(conftest.TINY), "first", "runs/first") as tracked:
        tracked.began(TrainingStarted(Progress(), 1, False))
        for _ in range(200):
            tracked.iterated(reports[0])
        assert len(tracked._sender._rows) <= 50


def test_without_a_server_no_sender_is_made(monkeypatch, tmp_path, reports):
    """The import contract of pyproject.toml holds that nothing else can import mlflow."""
    monkeypatch.setattr(mlflow_sender, "_client_module", lambda: pytest.fail("mlflow is imported"))
    monkeypatch.setenv("MLFLOW_RUN_ID", "a")  # Kubeflow may set it without a URI
    tracked = track(from_dict(conftest.TINY), reports)
    tracked.measured(1, {"a": 1.0})
    tracked.attach(tmp_path)
    assert tracked.run_id == ""


def test_missing_package_is_said_at_once_to_who_asks_for_it(monkeypatch, capsys, tmp_path, caplog):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "mlflow", None)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with tracked_run(from_dict(conftest.TINY), "a", "b") as tracked:
        tracked.began(TrainingStarted(Progress(), 1, False))
    assert "pip install 'mappo[mlflow]'" in warnings_of(caplog)[0]
    assert main(["train", *TINY, "--mlflow", "http://127.0.0.1:9"]) == 2
    assert "error: MLFLOW_TRACKING_URI is set, but the package mlflow-skinny is missing" in capsys.readouterr().err


def test_credentials_in_the_uri_become_variables():
    uri = "https://user:p%40ss@mlflow.example.org:5000/path/"
    environment = {"MLFLOW_TRACKING_URI": uri}
    settings = MlflowSettings.from_environment(environment)
    assert settings
    assert settings.uri == "https://mlflow.example.org:5000/path"
    prepare_client(environment)
    assert environment["MLFLOW_TRACKING_USERNAME"] == "user"
    assert environment["MLFLOW_TRACKING_PASSWORD"] == "p@ss"
    assert environment["MLFLOW_DISABLE_TELEMETRY"] == "true"


@pytest.mark.parametrize(
    "uri", ["databricks", "sqlite:///a", "http://", "http://a/b@c", "http://a/?b=c", "http://a b"]
)
def test_uri_of_no_server_is_refused_without_being_shown(uri, monkeypatch, caplog):
    with pytest.raises(ConfigError, match="MLFLOW_TRACKING_URI: must be a URL such as") as error:
        MlflowSettings.from_environment({"MLFLOW_TRACKING_URI": uri})
    assert uri not in str(error.value)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with tracked_run(from_dict(conftest.TINY), "a", "b") as tracked:
        tracked.began(TrainingStarted(Progress(), 1, False))
    assert len(warnings_of(caplog)) == 1


def test_evaluation_metrics_have_intervals_of_every_policy(tmp_path):
    from mappo.evaluation.evaluation import evaluate

    config = from_dict(conftest.TINY)
    report = evaluate(config, train_here(config, tmp_path))
    metrics = evaluation_metrics(report)
    assert metrics["evaluation/random/return_mean"] == report.random.mean.value
    assert metrics["evaluation/trained/return_interquartile_mean_high"] == report.trained.interquartile_mean.high
    assert metrics["evaluation/trained/episodes"] == 8
    assert all(math.isfinite(value) for value in metrics.values())
