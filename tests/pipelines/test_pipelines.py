import argparse
import inspect
import re
import subprocess
import sys

import pytest
import yaml
from kfp import dsl

import components.cell
import components.choose
import components.compare
import components.evaluate
import components.prepare
import components.promote
import components.report
import components.summarise
import components.train
import components.tune
import components.validate
from benchmarks.readme import current_config, form_of, sample_in_readme, sample_of
from mappo.cli.arguments import add_config_arguments, config_from_arguments
from mappo.config import config_hash, from_dict, from_json, override, to_json
from mappo.errors import ConfigError
from mappo.evaluation.statistics import Estimate
from mappo.recipes import recipe
from mappo.runs.locations import run_location
from mappo.tuning.database import Database
from mappo.tuning.search_space import value_of
from mappo.tuning.study import Study
from mappo.tuning.study_config import BudgetConfig, StudyConfig, study_config_to_json
from mappo.tuning.worker import fresh_seeds
from pipelines.__main__ import main
from pipelines.local import _StageLines, run_locally
from tests.cli.test_main import TINY, run_flags
from tests.conftest import read_json
from tests.support.runs import iterations
from tests.support.services import file_system_of

COMPONENTS = [
    components.validate.validate,
    components.train.train,
    components.evaluate.evaluate,
    components.compare.compare,
    components.prepare.prepare,
    components.tune.tune,
    components.choose.choose,
    components.promote.promote,
    components.report.report,
    components.cell.cell,
    components.summarise.summarise,
]


def compile_pipeline(tmp_path, *arguments):
    path = tmp_path / "training.yaml"
    flags = {argument.partition("=")[0] for argument in arguments}
    name = "seeds" if "--seeds" in flags else "tuning" if "--study" in flags else "training"
    image = ["--image", "example.org/mappo:1.2"]
    assert main(["compile", "--pipeline", name, *image, "--output", str(path), *arguments]) == 0
    return path


def read_pipeline(path):
    """Return the first document, the specification; the second has the settings for Kubernetes."""
    return next(yaml.safe_load_all(path.read_text()))


def artifact(run, stage, name):
    (path,) = run.glob(f"mappo-training-*/{stage}/{name}")
    return path


def test_local_pipeline_runs_end_to_end(tmp_path, capsys):
    run = tmp_path / "run"
    assert main(["run", *run_flags(run), *TINY]) == 0
    output = capsys.readouterr().out
    assert all(f"[{stage}] " in output for stage in ("validate", "train", "evaluate"))
    assert "KFP Executor" not in output
    assert "KFP Executor" in (run / "pipeline.log").read_text()

    report = read_json(artifact(run, "evaluate", "report"))
    trained = report["trained"]["mean"]
    assert f"trained   {Estimate(**trained)}" in output
    assert (run / "evaluation.json").exists()  # the evaluation is kept with the run
    page = run / "report.html"
    assert page.as_uri() in output
    assert page.read_bytes().startswith(b"<!doctype html>")
    for stage, name in (("train", "best"), ("train", "history"), ("evaluate", "report")):
        assert str(artifact(run, stage, name)) in output
    shown, config = sample_in_readme()
    assert form_of(sample_of(output, str(run.parent))) == form_of(shown)  # else: python -m benchmarks.readme
    assert config == current_config()

    artifacts = read_json(artifact(run, "train", "executor_output.json"))["artifacts"]
    metadata = artifacts["best"]["artifacts"][0]["metadata"]
    assert artifacts["checkpoints"]["artifacts"][0]["metadata"]["location"] == str(run)
    assert iterations(run) == [2, 1]
    assert len(iterations(artifact(run, "train", "best"))) == 1
    assert metadata["config_hash"] == report["config_hash"]
    config = artifacts["checkpoints"]["artifacts"][0]["metadata"]["config"]
    assert config_hash(from_json(config)) == metadata["config_hash"]
    assert artifacts["metrics"]["artifacts"][0]["metadata"]["frames"] == 120


def test_failed_stage_stops_the_pipeline_with_stage_and_reason(tmp_path, capsys):
    run = tmp_path / "run"
    assert main(["run", *run_flags(run), "--environment.scenario=tests.support.scenarios:Nowhere", *TINY]) == 1
    error = capsys.readouterr().err
    assert "stage validate failed: environment: environment.scenario = 'tests.support.scenarios:Nowhere'" in error
    assert str(run / "pipeline.log") in error
    assert not list(run.glob("mappo-training-*/train"))


def test_lines_of_stages_are_read_when_their_log_is_on_a_full_disk(tmp_path, capsys):
    with file_system_of(64, tmp_path / "disk") as disk, (disk / "log").open("wb", buffering=0) as log:
        lines = _StageLines(log, sys.stdout)
        lines.write("a long line of a library\n" * 10_000 + "[train] failed: the reason\n")
        assert log.tell() == 2**16
    assert lines.reasons("train") == "the reason"
    assert capsys.readouterr().out == "[train] failed: the reason\n"


def test_wrong_configuration_is_refused_before_anything_runs(tmp_path, capsys):
    assert main(["run", *run_flags(tmp_path / "run"), "--learner.epochs=0"]) == 2
    assert "learner.epochs = 0" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_unwritable_output_is_an_error_of_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["run", *run_flags(tmp_path / "file" / "run"), *TINY]) == 2
    assert main(["compile", "--image", "a:1", "--output", str(tmp_path / "file" / "compiled")]) == 2
    assert capsys.readouterr().err.count("error: ") == 2


def test_training_step_without_a_store_keeps_the_run_at_the_uri_of_its_artifact(tmp_path):
    """On a cluster, that URI is the same for every attempt of the step."""

    @dsl.pipeline(name="training-alone")
    def training_alone(config: str, store: str = "", run: str = "") -> dsl.Artifact:
        return components.train.train(config=config, store=store, run=run).outputs["checkpoints"]

    parser = argparse.ArgumentParser()
    add_config_arguments(parser)
    config = to_json(config_from_arguments(parser.parse_args(TINY)))
    (checkpoints,) = run_locally(training_alone, {"config": config}, tmp_path).values()
    assert iterations(checkpoints) == [2, 1]


def test_run_location_is_store_and_name_or_the_artifacts_uri():
    assert run_location("", "", "s3://a/checkpoints") == "s3://a/checkpoints"
    assert run_location("s3://a/runs/", "first", "s3://a/checkpoints") == "s3://a/runs/first"
    assert run_location("runs", "first", "x", seed="7") == "runs/first-7"
    with pytest.raises(ConfigError, match="a name needs a store"):
        run_location("", "first", "x")


def test_stages_are_retried_on_a_cluster(tmp_path):
    for arguments in ([], ["--seeds=1,2"]):
        specification = read_pipeline(compile_pipeline(tmp_path, *arguments))
        dags = [specification["root"], *specification["components"].values()]
        tasks = [task for dag in dags if "dag" in dag for task in dag["dag"]["tasks"].items()]
        retries = {name: task["retryPolicy"]["maxRetryCount"] for name, task in tasks if "retryPolicy" in task}
        assert retries == {"validate": 1, "train": 3, "evaluate": 2} | ({"compare": 2} if arguments else {})


def test_compiled_store_and_run_are_empty_parameters_passed_to_training(tmp_path):
    root = read_pipeline(compile_pipeline(tmp_path))["root"]
    parameters, training = root["inputDefinitions"]["parameters"], root["dag"]["tasks"]["train"]["inputs"]
    for name in ("store", "run"):
        assert parameters[name].get("defaultValue", "") == ""
        assert parameters[name]["isOptional"]
        assert training["parameters"][name] == {"componentInputParameter": name}


def test_compiled_parameters_keep_type_and_value(tmp_path):
    path = compile_pipeline(tmp_path, "balance", "--learner.clip-epsilon=0.1")
    parameters = read_pipeline(path)["root"]["inputDefinitions"]["parameters"]
    assert parameters["image"]["parameterType"] == "STRING"
    assert parameters["image"]["defaultValue"] == "example.org/mappo:1.2"
    expected = override(recipe("balance"), {"learner": {"clip_epsilon": 0.1}})
    assert parameters["config"]["defaultValue"] == to_json(expected)
    assert from_json(parameters["config"]["defaultValue"]) == expected


def test_compiled_stages_take_the_image_parameter_and_are_never_cached(tmp_path):
    specification = read_pipeline(compile_pipeline(tmp_path))
    executors = specification["deploymentSpec"]["executors"]
    assert {executor["container"]["image"] for executor in executors.values()} == {
        "{{$.inputs.parameters['pipelinechannel--image']}}"
    }
    tasks = specification["root"]["dag"]["tasks"]
    assert set(tasks) == {"validate", "train", "evaluate"}
    for task in tasks.values():
        assert not task.get("cachingOptions", {}).get("enableCache", False)
    assert tasks["train"]["dependentTasks"] == ["validate"]
    assert tasks["evaluate"]["dependentTasks"] == ["train"]


def test_compiling_twice_gives_equal_text(tmp_path):
    first = compile_pipeline(tmp_path).read_text()
    assert compile_pipeline(tmp_path).read_text() == first


def test_compiled_commands_install_nothing(tmp_path):
    assert "pip install" not in compile_pipeline(tmp_path).read_text()


@pytest.mark.parametrize("image", ["mappo", "registry:5000/mappo", "mappo:", "map po:1", "mappo@sha256:12"])
def test_image_without_tag_or_digest_is_refused(tmp_path, capsys, image):
    assert main(["compile", "--image", image, "--output", str(tmp_path / "compiled")]) == 2
    assert repr(image) in capsys.readouterr().err


def test_image_with_tag_is_accepted(tmp_path):
    """`tests/pipelines/test_site.py` has all notations."""
    image = ["--image", "registry:5000/team/mappo:v1.0"]
    assert main(["compile", "--pipeline=training", *image, "--output", str(tmp_path / "compiled")]) == 0


def test_compiling_without_an_image_is_refused(capsys):
    assert main(["compile"]) == 2
    assert "--image" in capsys.readouterr().err


@pytest.mark.parametrize("component", COMPONENTS, ids=lambda component: component.name)
def test_component_is_thin_and_described(component):
    _, documentation, body = inspect.getsource(component.python_func).split('"""')
    assert len([line for line in body.splitlines() if line.strip()]) <= 15
    assert component.description == documentation.split("\n")[0]
    for name in inspect.signature(component.python_func).parameters:
        assert f"    {name}: " in documentation


@dsl.component(base_image="python", install_kfp_package=False)
def give() -> int:
    return 7


@dsl.component(base_image="python", install_kfp_package=False)
def note(directory: str, item: str, number: int, nested: dict):
    import json
    from pathlib import Path

    Path(directory, item).write_text(json.dumps([number, nested]))


@dsl.pipeline(name="inner")
def note_in_an_inner_pipeline(directory: str, number: int, nested: dict):
    with dsl.ParallelFor(["3", "4"], parallelism=1) as item:
        note(directory=directory, item=item, number=number, nested=nested)


@dsl.pipeline(name="outer")
def note_in_a_nested_loop(directory: str, nested: dict):
    number = give()
    note_in_an_inner_pipeline(directory=directory, number=number.output, nested=nested)


@dsl.pipeline(name="trap")
def note_in_a_trap(directory: str, nested: dict):
    number = give()
    with dsl.ParallelFor(["3", "4"], parallelism=1) as item:
        note(directory=directory, item=item, number=number.output, nested=nested)


def test_loop_in_an_inner_pipeline_gets_the_specified_values(tmp_path):
    """Local runs and clusters agree, since every loop of our pipelines is in an inner pipeline."""
    run_locally(note_in_a_nested_loop, {"directory": str(tmp_path), "nested": {"a": ["b"]}}, tmp_path / "run")
    assert [read_json(tmp_path / item) for item in ("3", "4")] == [[7, {"a": ["b"]}]] * 2


def test_loop_that_compiling_refuses_gets_wrong_values_in_a_local_run(tmp_path):
    """If this test fails, Kubeflow has fixed the defect, and loops need no inner pipeline any more."""
    run_locally(note_in_a_trap, {"directory": str(tmp_path), "nested": {}}, tmp_path / "run")
    assert [read_json(tmp_path / item)[0] for item in ("3", "4")] != [7, 7]


def test_missing_kubeflow_sdk_is_explained(tmp_path):
    script = (
        "import sys; sys.modules['kfp'] = None; from pipelines.__main__ import main; "
        f"sys.exit(main(['compile', '--image', 'a:1', '--output', '{tmp_path}/compiled']))"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "pip install" in result.stderr
    assert "Traceback" not in result.stderr


def test_parameter_descriptions_reach_the_run_form(tmp_path):
    parameters = read_pipeline(compile_pipeline(tmp_path))["root"]["inputDefinitions"]["parameters"]
    assert all(parameter["description"] for parameter in parameters.values())


def test_error_shows_the_end_of_the_log_when_a_stage_is_killed(tmp_path):
    """A stage that a signal ends prints no reason; the error then holds the last lines of the log."""
    module = tmp_path / "killed.py"
    module.write_text(
        "import sys\n"
        "from pathlib import Path\n"
        "from kfp import dsl\n"
        "from pipelines.local import PipelineFailed, run_locally\n"
        "\n"
        "@dsl.component(base_image='python', install_kfp_package=False)\n"
        "def die():\n"
        "    import os, signal\n"
        "    print('the last words', flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "\n"
        "@dsl.pipeline(name='killed')\n"
        "def killed():\n"
        "    die()\n"
        "\n"
        "try:\n"
        "    run_locally(killed, {}, Path(sys.argv[1]))\n"
        "except PipelineFailed as error:\n"
        "    sys.exit(str(error))\n"
    )
    result = subprocess.run(
        [sys.executable, module, tmp_path / "run"], capture_output=True, text=True, check=False, cwd="."
    )
    assert result.returncode == 1
    assert "stage die failed" in result.stderr
    assert "the last words" in result.stderr


@pytest.mark.long
def test_seeds_pipeline_runs_end_to_end_and_compares_over_seeds(tmp_path, capsys):
    run = tmp_path / "run"
    assert main(["run", "--environment.scenario=simple", "--seeds=3,5", *run_flags(run), *TINY]) == 0
    output = capsys.readouterr().out
    (path,) = run.glob("mappo-seeds-*/compare/report")
    report = read_json(path)
    (configuration,) = report["configurations"]
    assert configuration["training_seeds"] == [3, 5]
    evaluations = [read_json(path) for path in sorted(run.glob("mappo-seeds-*/*/evaluate/report"))]
    assert configuration["episode_returns"] == [
        evaluation["trained"]["mean"]["value"] for evaluation in evaluations
    ]
    assert {evaluation["training_config"]["seed"] for evaluation in evaluations} == {3, 5}
    end = output.rpartition("[compare]")[2]
    assert f"trained {configuration['mean']['value']:.3g}" in " ".join(end.split())
    assert str(path) in end
    for seed in (3, 5):
        assert re.search(rf"^run of seed {seed} +{run}-{seed}$", end, re.M)
        assert re.search(rf"^page +{(tmp_path / f'run-{seed}' / 'report.html').as_uri()}$", end, re.M)


@pytest.mark.long
def test_tuning_pipeline_runs_end_to_end_with_two_workers(tmp_path, capsys, monkeypatch):
    """The study lies in the database; best and default are trained again, and the best is promoted."""
    monkeypatch.setenv("MAPPO_DATABASE", f"sqlite:///{tmp_path}/studies.db")
    run, champions = tmp_path / "run", tmp_path / "champions"
    flags = ["--study=s", "--trials=4", "--workers=2", "--retrain-seeds=2", "--tuning.pruner=none"]
    task = ["--environment.scenario=tests.support.scenarios:PushRight", "--environment.max-episode-frames=10"]
    flags += ["--gate.num-seeds=5", "--gate.episodes-per-seed=8", f"--champions={champions}"]
    assert main(["run", *flags, *run_flags(run), *TINY, *task, "--learner.learning-rate=0.02"]) == 0
    output = capsys.readouterr().out

    database = Database(f"sqlite:///{tmp_path}/studies.db")
    study = Study.load(database, "s")
    trials, best = study.trials(), study.best()
    database.close()
    assert [trial.state for trial in trials] == ["complete"] * 4
    assert "[tune] no trial is left to start" in output

    def tuning_artifact(stage, name):
        (path,) = run.glob(f"mappo-tuning-*/{stage}/{name}")
        assert stage == "promote" or name == "page" or str(path) in output
        return path

    chosen = read_json(tuning_artifact("choose", "best"))
    assert all(value_of(from_dict(chosen), path) == value for path, value in best.values.items())
    comparison = read_json(tuning_artifact("report", "comparison"))
    seeds = [str(seed) for seed in fresh_seeds(study, 2)]
    for configuration in comparison["configurations"]:
        assert [str(seed) for seed in configuration["training_seeds"]] == seeds
    decision = read_json(tuning_artifact("promote", "decision"))
    assert decision["candidate"]["seed"] == int(seeds[0])
    assert (decision["opponent"], decision["action"]) == ("random", "promoted")
    (policy,) = champions.rglob("policy.pt2")
    assert (policy.parent / "model-card.md").exists()
    page = tuning_artifact("report", "page").read_text()
    assert "Study s: tests.support.scenarios:PushRight" in page
    assert (run / "study.html").read_text() == page
    assert f"file://{run}/study.html" in output
    assert inspect.isbuiltin(print), "Kubeflow's runner replaces it"


def test_compiled_tuning_pipeline_has_a_loop_over_workers_and_no_task_per_trial(tmp_path):
    specification = read_pipeline(compile_pipeline(tmp_path, "--study=s", "--workers=3", "--trials=50"))
    root = specification["root"]
    assert root["inputDefinitions"]["parameters"]["workers"]["defaultValue"] == ["1", "2", "3"]
    assert root["inputDefinitions"]["parameters"]["study_config"]["defaultValue"] == study_config_to_json(
        StudyConfig(budget=BudgetConfig(num_trials=50))
    )
    names = {"prepare", "mappo-workers", "choose", "retrain-default", "retrain-best", "promote", "report"}
    assert set(root["dag"]["tasks"]) == names
    tasks = root["dag"]["tasks"]
    assert tasks["choose"]["dependentTasks"] == ["mappo-workers", "prepare"]
    assert "retrain-best" in tasks["promote"]["dependentTasks"]
    run_id = tasks["prepare"]["inputs"]["parameters"]["run_id"]
    assert run_id == {"runtimeValue": {"constant": "{{$.pipeline_job_uuid}}"}}


def test_compiled_seeds_pipeline_has_its_loop_in_an_inner_pipeline(tmp_path):
    """Kubeflow's local runner confuses loop items with outputs of tasks around the loop."""
    specification = read_pipeline(compile_pipeline(tmp_path, "--seeds=0,1,2", "--parallel-seeds=2"))
    root = specification["root"]
    assert root["inputDefinitions"]["parameters"]["seeds"]["defaultValue"] == ["0", "1", "2"]
    assert set(root["dag"]["tasks"]) == {"validate", "mappo-each-seed", "compare"}
    assert root["dag"]["tasks"]["mappo-each-seed"]["dependentTasks"] == ["validate"]
    (loop,) = specification["components"]["comp-mappo-each-seed"]["dag"]["tasks"].values()
    assert loop["iteratorPolicy"] == {"parallelismLimit": 2}
    for executor in specification["deploymentSpec"]["executors"].values():
        assert executor["container"]["image"] == "{{$.inputs.parameters['pipelinechannel--image']}}"


@pytest.mark.parametrize(
    ("seeds", "reason"),
    [("", "''"), ("1,1", "may appear once"), ("1,two", "'two'"), ("-1", "seed = -1"), ("1.5", "seed = 1.5")],
)
def test_wrong_seeds_are_refused_with_the_reason(tmp_path, capsys, seeds, reason):
    assert main(["run", f"--seeds={seeds}", *run_flags(tmp_path / "run"), *TINY]) == 2
    assert reason in capsys.readouterr().err


def test_flags_seed_and_seeds_exclude_each_other(capsys):
    assert main(["run", "--seeds=1,2", "--seed=3"]) == 2
    assert "exclude each other" in capsys.readouterr().err


def test_stages_get_the_version_that_compiled_the_pipeline(tmp_path):
    import mappo

    specification = read_pipeline(compile_pipeline(tmp_path))
    for task in specification["root"]["dag"]["tasks"].values():
        compiled_by = task["inputs"]["parameters"]["compiled_by"]
        assert compiled_by == {"runtimeValue": {"constant": mappo.__version__}}
