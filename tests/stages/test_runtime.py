import csv
import json

import jsonschema
import pytest
import torch

import mappo
from mappo.__main__ import main
from mappo.config import config_hash, override, to_json
from mappo.errors import Preempted, StageFailed
from mappo.stages import runtime
from mappo.stages.compare import compare
from mappo.stages.evaluate import evaluate
from mappo.stages.promote import promote
from mappo.stages.runtime import run_label
from mappo.stages.train import train
from mappo.stages.validate import validate
from tests.conftest import endless, read_json


def outputs(directory):
    return directory / "run", directory / "history", directory / "best"


def test_consecutive_stages_label_their_artifacts(tiny, tmp_path):
    config = to_json(tiny)
    validated = validate(config, tmp_path / "validation" / "report")
    trained = train(config, *outputs(tmp_path))
    evaluated = evaluate(config, tmp_path / "best", tmp_path / "report")
    for result in (validated, trained, evaluated):
        assert result.metadata["config_hash"] == config_hash(tiny)
        assert result.metadata["seed"] == "0"
        assert set(result.metadata) == {"config_hash", "mappo_version", "seed"}
    assert read_json(tmp_path / "validation" / "report")["config_hash"] == config_hash(tiny)
    assert trained.metrics["frames"] == 360
    with (tmp_path / "history").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 3
    report = read_json(tmp_path / "report")
    assert evaluated.metrics["trained_return_mean"] == report["trained"]["mean"]["value"]
    assert evaluated.metrics["random_return_mean_low"] == report["random"]["mean"]["low"]
    collisions = report["trained"]["measurements"]["agent_collisions"]
    assert evaluated.metrics["trained_measured_agent_collisions"] == collisions["mean"]["value"]


def test_signal_while_an_environment_is_made_ends_the_stage(tiny, tmp_path):
    """The scenario's own code runs then, whose errors and exits are reported as mistakes."""
    scenario = {"scenario": "tests.support.scenarios:TerminatedWhenBuilt", "scenario_kwargs": {}}
    config = to_json(override(tiny, {"environment": scenario}))
    with pytest.raises(Preempted):
        train(config, *outputs(tmp_path))


def test_reports_match_their_json_schemas(tiny, tmp_path, capsys):
    """Check the reports with the library jsonschema, also that the schema requires every field."""
    config, run = to_json(tiny), str(tmp_path / "run")
    validate(config, tmp_path / "validation")
    train(config, run, tmp_path / "history.csv")
    evaluate(config, run, tmp_path / "evaluation")
    compare([tmp_path / "evaluation"], tmp_path / "comparison")
    gate = {"num_seeds": 4, "episodes_per_seed": 5}
    promote(config, run, str(tmp_path / "champions"), tmp_path / "decision", gate=gate)
    for name in ("validation", "evaluation", "comparison", "decision"):
        capsys.readouterr()
        assert main(["schema", name]) == 0
        schema = json.loads(capsys.readouterr().out)
        jsonschema.Draft202012Validator.check_schema(schema)
        written = read_json(tmp_path / name)
        jsonschema.validate(written, schema)
        for field in written:
            with pytest.raises(jsonschema.ValidationError):
                jsonschema.validate({key: value for key, value in written.items() if key != field}, schema)


def test_non_finite_metrics_are_named_and_left_out(tmp_path, capsys):
    config = override(
        endless(max_episode_frames=500), {"collection": {"total_frames": 400}, "learner": {"epochs": 1}}
    )
    result = train(to_json(config), *outputs(tmp_path))
    assert "episode_return_mean" not in result.metrics
    assert "left out of the metrics: episode_return_max, episode_return_mean" in capsys.readouterr().out


def test_bad_configuration_fails_the_stage_with_every_problem_named(tmp_path, capsys):
    with pytest.raises(StageFailed):
        validate('{"seed": -1, "learner": {"epochs": 0}}', tmp_path / "report")
    output = capsys.readouterr().out
    assert "[validate] failed: seed = -1" in output
    assert "[validate] failed: learner.epochs = 0" in output


def test_unwritable_report_fails_the_stage_with_the_reason(tiny, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(StageFailed):
        train(to_json(tiny), tmp_path / "run", tmp_path / "file" / "history")
    assert "[train] failed:" in capsys.readouterr().out


def test_evaluation_with_one_episode_has_no_interval(tiny, tmp_path):
    config = override(tiny, {"evaluation": {"seeds": [1], "episodes_per_seed": 1}})
    train(to_json(config), *outputs(tmp_path))
    result = evaluate(to_json(config), tmp_path / "best", tmp_path / "report")
    assert "trained_return_mean" in result.metrics
    assert "trained_return_mean_low" not in result.metrics


def test_version_skew_between_pipeline_and_image_is_reported_before_an_unknown_option_fails(tmp_path, capsys):
    warning = f"warning: mappo 9.0 compiled this pipeline, but its image has mappo {mappo.__version__}"
    for compiled_by, is_reported in (("9.0", True), (mappo.__version__, False)):
        with pytest.raises(StageFailed, match="unknown key"):
            train('{"learner": {"from_the_future": 1}}', tmp_path, tmp_path / "history", compiled_by=compiled_by)
        assert (warning in capsys.readouterr().out) == is_reported


def test_seed_of_a_stage_replaces_the_seed_of_the_configuration(tiny, tmp_path):
    result = train(to_json(tiny), *outputs(tmp_path), seed="7")
    assert result.metadata["seed"] == "7"
    assert result.metadata["config_hash"] == config_hash(override(tiny, {"seed": 7}))


def test_threads_never_exceed_the_cpu_limit_and_zero_uses_the_limit(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runtime, "cpu_limit", lambda: 3)
    short = override(tiny, {"collection": {"total_frames": 120}, "learner": {"epochs": 1}})
    try:
        for requested, expected in ((1, 1), (2, 2), (0, 3), (64, 3)):
            train(to_json(override(short, {"threads": requested})), *outputs(tmp_path / str(requested)))
            assert torch.get_num_threads() == expected
    finally:
        torch.set_num_threads(1)
    assert "threads = 64: the CPU limit of this process allows 3" in capsys.readouterr().out


def test_comparison_fails_naming_file_and_field_when_a_file_is_no_report(tmp_path, capsys):
    (tmp_path / "report").write_text('{"config": 3}')
    with pytest.raises(StageFailed, match="report: not an evaluation report: config"):
        compare([tmp_path / "report"])


def test_run_label_is_the_name_the_pipeline_run_or_the_location(monkeypatch):
    assert run_label("first", "3", "s3://bucket/artifacts/checkpoints") == "first-3"
    assert run_label("", "", "runs/first") == "first"
    assert run_label("") == "none"
    monkeypatch.setenv("MAPPO_PIPELINE_RUN", "1234-abcd")
    assert run_label("", "3", "s3://bucket/artifacts/checkpoints") == "1234-abcd-3"
    assert run_label("first", "", "anywhere") == "first"


def test_non_finite_number_is_counted_by_its_source(tiny, tmp_path, monkeypatch):
    sources = []
    monkeypatch.setattr(runtime.Monitor, "met_non_finite", lambda _, source: sources.append(source))
    for scenario in ("NanReward", "NanObservation"):
        environment = {
            "scenario": f"tests.support.scenarios:{scenario}",
            "scenario_kwargs": {},
            "max_episode_frames": 20,
        }
        with pytest.raises(StageFailed):
            train(to_json(override(tiny, {"environment": environment})), *outputs(tmp_path / scenario))
    assert sources == ["loss", "observation"]
