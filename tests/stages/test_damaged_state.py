"""The stages that use a trained policy: they read nothing of the simulator, and nothing that they do not need."""

from pathlib import Path

import pytest

from mappo.__main__ import main
from mappo.config import override, to_json
from mappo.runs.attempt import claim
from mappo.runs.run import Run
from mappo.stages.evaluate import evaluate
from mappo.stages.promote import promote
from mappo.stages.report import report
from mappo.stages.train import train
from tests.conftest import read_json


@pytest.fixture(params=["simulation", "structure", "optimiser"])
def run(request, checkpoint, tmp_path) -> Path:
    """Save a run whose parts are damaged or missing, but for networks and history."""
    run = Run.at(tmp_path / "run")
    ref = claim(run).save(checkpoint)
    manifest = run.manifest(ref)
    for part in ("simulation", "structure", "optimiser"):
        key = ref.blob(manifest.file_name(part))
        run.store.delete(key) if part == request.param else run.store.write(key, b"damaged")
    return tmp_path / "run"


def test_policy_is_evaluated_promoted_reported_and_started_from(run, checkpoint, tmp_path, capsys):
    config = to_json(checkpoint.config)
    evaluate(config, run, tmp_path / "evaluation", keep_at=str(run))
    gate = {"num_seeds": 4, "episodes_per_seed": 5, "confidence": 0.51}
    promote(config, run, str(tmp_path / "champions"), tmp_path / "decision", gate=gate)
    report([str(run)], tmp_path / "report.html")
    assert main(["evaluate", str(run)]) == 0
    longer = override(checkpoint.config, {"seed": 1, "collection": {"total_frames": 120}})
    train(to_json(longer), tmp_path / "warm", tmp_path / "history.csv", warm_start=str(run))
    Run.at(run).export(Run.at(run).choose(), tmp_path / "copy")
    evaluate(config, tmp_path / "copy", tmp_path / "of_copy")
    assert read_json(tmp_path / "of_copy") == read_json(tmp_path / "evaluation") | {"run_frames": None}
    assert "failed" not in capsys.readouterr().out


def test_champion_has_a_page_although_it_has_no_history(checkpoint, tmp_path):
    from mappo.promotion.champions import Champions
    from tests.promotion.test_champions import crown

    champions = Champions(tmp_path, "navigation-12345678")
    crown(champions, checkpoint)
    report([champions.policy_location(champions.current())], tmp_path / "report.html")
    assert "navigation" in (tmp_path / "report.html").read_text()


def test_damage_to_what_is_needed_is_reported_in_one_line(checkpoint, tmp_path, capsys):
    run = Run.at(tmp_path / "run")
    ref = claim(run).save(checkpoint)
    run.store.write(ref.blob(run.manifest(ref).file_name("networks")), b"damaged")
    assert main(["evaluate", str(tmp_path / "run")]) == 1
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "failed" in line]
    assert "damaged or replaced" in line
