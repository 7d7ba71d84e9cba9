"""The refusal of wrong commands: before torch is imported, with exit status 2 and the fix."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mappo.__main__ import main
from mappo.cli.prechecks import require_resumable
from mappo.config import ExperimentConfig, from_dict, override
from mappo.environment.known_scenarios import keyword_arguments, require_known_scenario, scenario_modules
from mappo.errors import ConfigError, MappoError
from mappo.runs.attempt import claim
from mappo.runs.attempt_notes import AttemptNote, note_key
from mappo.runs.checkpoint import Checkpoint
from mappo.runs.locations import require_location
from mappo.runs.run import Run
from tests.conftest import TINY

ROOT = Path(__file__).parents[2]
WRONG = {  # a command, and what its error says
    "train --environment.scenario navigaton": "there is no such scenario; did you mean navigation?",
    'train --environment.scenario-kwargs {"n_agent":5}': "takes no such argument; did you mean n_agents?",
    'train --environment.scenario-kwargs {"device":5}': "not arguments of a scenario: device",
    "train --environment.scenario-kwargs {n_agents:5}": "quote names and text: '{\"n_agents\": 3}'",
    "train --environment.scenario nosuch.module:Task": "there is no module 'nosuch'",
    "train --store s3:/bucket/runs": "did you mean s3://bucket/runs?",
    "train --store s3//bucket": "did you mean s3://bucket?",
    "train --run First": "run 'First': a name has",
    "train --extend runs/frist": "runs/frist: there is no such run; did you mean runs/first?",
    "train --extend first --collection.total-frames 120": "the run to extend has 360 frames already",
    "train --run first": "run runs/first started with another configuration: environment.",
    "train --config nothere.json": "--config nothere.json: No such file or directory",
    "train --config broken.json": "--config broken.json is not JSON: ",
    "train navigatoin": "did you mean navigation?",
    "train --metrics-port no": "MAPPO_METRICS_PORT = 'no'",
    "tune --study one --space {bad": "--space is not JSON: ",
    "tune --study Bad": "study 'Bad': a name has",
    "tune --study one --store s3:/bucket": "did you mean s3://bucket?",
    "evaluate runs/first --checkpoint 99": "no checkpoint '99': give best, last, or one of iterations",
    "evaluate runs/nosuch": "runs/nosuch: there is no such run",
    "promote first --champions s3:/bucket": "did you mean s3://bucket?",
    "report frist": "frist: there is no such run; did you mean runs/first?",
    "compare a.json first": "a.json: there is no such run; nor is there such a file",
    "checkpoints list nowhere": "nowhere: there is no such run",
    "checkpoints show first --checkpoint 14": "no checkpoint '14'",
    "champion list nowhere": "nowhere: no task has a champion",
    "study list": "there is no study in sqlite:///runs/studies.db",
    "show-config runs/nosuch": "runs/nosuch: there is no such run",
}
_SCRIPT = """
import contextlib, io, json, sys
from mappo.__main__ import main
results = {}
for command in json.loads(sys.stdin.read()):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as errors:
        status = main(command.split())
    results[command] = status, errors.getvalue(), "torch" in sys.modules
print(json.dumps(results))
"""


def results_of(commands: list[str], directory: Path) -> dict[str, tuple[int, str, bool]]:
    """Run commands in one other process; return status, error output and whether torch was imported, for each."""
    process = subprocess.run(
        [sys.executable, "-c", _SCRIPT],
        input=json.dumps(commands),
        cwd=directory,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    return {command: tuple(result) for command, result in json.loads(process.stdout).items()}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, checkpoint: Checkpoint) -> Path:
    """Make a directory with the finished run runs/first."""
    directory = tmp_path_factory.mktemp("place")
    claim(Run.at(directory / "runs" / "first")).save(checkpoint)
    (directory / "broken.json").write_text('{"seed": 1,}')
    return directory


@pytest.fixture(scope="module")
def results(place: Path) -> dict[str, tuple[int, str, bool]]:
    return results_of(list(WRONG), place)


@pytest.mark.parametrize("command", WRONG)
def test_wrong_command_exits_with_2_before_torch_is_imported(results, command):
    status, error, has_torch = results[command]
    assert WRONG[command] in error
    assert (status, has_torch) == (2, False)
    assert error.startswith(f"mappo {command.split()[0]}: error: ")


def test_wrong_commands_of_pipelines_exit_with_2_and_start_nothing(place, monkeypatch, capsys):
    from pipelines.__main__ import main as pipelines

    monkeypatch.chdir(place)
    for command, message in {
        "compile --image a/b:1 --environment.scenario navigaton": "did you mean navigation?",
        "run --environment.scenario navigaton": "did you mean navigation?",
        "run --store s3:/bucket": "did you mean s3://bucket?",
        "run --run First": "run 'First': a name has",
        "run --run first": "started with another configuration",
        "doctor --site nosuch.yaml": "--site nosuch.yaml: No such file or directory; k8s/site.yaml is",
    }.items():
        assert pipelines(command.split()) == 2, command
        assert message in capsys.readouterr().err
    assert sorted(path.name for path in place.iterdir()) == ["broken.json", "runs"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_missing_gpu_exits_with_2(place, capsys, monkeypatch):
    monkeypatch.chdir(place)
    assert main(["train", "--device", "cuda"]) == 2
    assert "device = 'cuda': no CUDA device is available" in "".join(capsys.readouterr())


def test_names_of_scenarios_are_those_of_vmas():
    import vmas

    assert set(scenario_modules()) == {
        "recall",
        "swarm",
        *vmas.scenarios,
        *vmas.mpe_scenarios,
        *vmas.debug_scenarios,
    }


@pytest.mark.parametrize(
    ("scenario", "expected"),
    [
        ("wheel", {"n_agents": "4", "line_length": "2", "line_mass": "30", "desired_velocity": "0.05"}),
        ("simple", {}),
        ("dropout", {"n_agents": "4", "energy_coeff": "DEFAULT_ENERGY_COEFF", "start_same_point": "False"}),
    ],
)
def test_arguments_of_a_scenario_are_read_from_its_source(scenario, expected):
    assert keyword_arguments(scenario) == expected


def test_every_use_of_arguments_in_a_source_is_understood():
    """Compare with a plain count of the text, for every scenario."""
    for scenario, module in scenario_modules().items():
        lines = Path(__import__(module, fromlist=["Scenario"]).__file__).read_text().splitlines()
        source = "\n".join(line.partition("#")[0] for line in lines)
        names = set(re.findall(r"kwargs(?:\.\w+\(|\[)\s*[\"'](\w+)[\"']", source))
        assert set(keyword_arguments(scenario)) == names, scenario


def test_arguments_of_a_scenario_of_ones_own_are_not_checked_here():
    require_known_scenario(
        from_dict({"environment": {"scenario": "a:B", "scenario_kwargs": {"x": 1}}}).environment
    )


def test_message_lists_the_arguments_when_none_is_close():
    config = override(ExperimentConfig(), {"environment": {"scenario": "wheel", "scenario_kwargs": {"zzz": 1}}})
    with pytest.raises(ConfigError, match=r"its arguments, with defaults: n_agents \(4\), line_length \(2\)"):
        require_known_scenario(config.environment)


@pytest.mark.parametrize("location", ["runs/a:b", "s3", "s3/bucket", "./s3:x", "minio-backup/runs"])
def test_directory_that_is_no_mistyped_bucket_is_accepted(location):
    assert require_location(location) == location


@pytest.mark.parametrize("location", ["s3:/b1t/x", "S3://bkt/x", "s3//bkt", "s3;//bkt", "minio:bkt/x"])
def test_mistyped_bucket_is_refused_with_the_right_form(location):
    with pytest.raises(MappoError, match=r"did you mean (s3|minio)://b"):
        require_location(location)


def test_run_that_a_live_process_trains_is_named(tmp_path, capsys):
    """A note of this test's parent is that of a live process, unless it is older than the parent."""
    run, config = tmp_path / "run", from_dict(TINY)
    (run / "attempts").mkdir(parents=True)

    def note_of(number: int, process: int, started: float, host: str = socket.gethostname()) -> str:
        (run / note_key(number)).write_bytes(AttemptNote("0123abcd", host, process, started).to_bytes())
        require_resumable(str(run), config)
        return capsys.readouterr().err

    assert note_of(1, os.getppid(), 0.0) == ""
    assert note_of(2, os.getpid(), 2e9) == ""
    assert f"process {os.getppid()} of this machine trains {run} (attempt 3)" in note_of(3, os.getppid(), 2e9)
    assert note_of(4, os.getppid(), 2e9, "another-host") == ""
