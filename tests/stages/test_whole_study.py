"""The tuning of a whole study: mappo tune, mappo study, editions of a series, and the page."""

import csv
import io
import json
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from mappo.__main__ import main
from mappo.cli.study_actions import delete
from mappo.config import from_dict, override, to_json
from mappo.errors import StageFailed
from mappo.runs.run import Run
from mappo.stages.choose import choose
from mappo.stages.prepare import prepare
from mappo.stages.tune import work_on_study
from mappo.tuning.database import Database
from mappo.tuning.study import Study
from mappo.tuning.worker import trial_run
from tests.conftest import TINY, read_json
from tests.support.browser import chromium, complaints, open_page, requests
from tests.support.services import wait

CONFIG = override(from_dict(TINY), {"selection": {"interval_iterations": 1}, "collection": {"total_frames": 240}})
FLAGS = ["--tuning.episodes-per-seed=4", "--tuning.pruner=none", "--retrain-seeds=2"]


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """An empty directory to work in."""
    for name in ("MAPPO_DATABASE", "MAPPO_PIPELINE_RUN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.json").write_text(to_json(CONFIG))
    return tmp_path


def tune(*arguments: str) -> int:
    return main(["tune", "--config=tiny.json", *FLAGS, *arguments])


def settings(trials: int, tuning: dict | None = None, space: dict | None = None) -> str:
    """The settings of a study as JSON, for so many trials."""
    return json.dumps({"budget": {"num_trials": trials}, "tuning": tuning or {}, "space": space or {}})


def study_of(name: str) -> Study:
    return Study.load(Database("sqlite:///runs/studies.db"), name)


def test_tuning_ends_with_a_comparison_on_fresh_seeds_and_trains_another_best_when_asked_for_more(place, capsys):
    assert tune("--study=first", "--trials=3") == 0
    study = study_of("first")
    directory = Path(study.store)
    comparison = read_json(directory / "comparison.json")
    best = study.best()
    assert len(comparison["configurations"]) == (1 if best.number == 0 else 2)
    for each in comparison["configurations"]:
        assert len(each["training_seeds"]) == 2
        assert 0 not in each["training_seeds"]
    chosen = from_dict(read_json(directory / "best.json"))
    for path, value in best.values.items():
        assert json.loads(to_json(chosen))["learner"][path.removeprefix("learner.")] == value
    assert read_json(directory / "decision.json")["action"] == "not asked"
    shown = capsys.readouterr().out
    assert "best.json, comparison.json, decision.json" in shown
    assert shown.splitlines()[-1] == f"[report] page: {(directory / 'study.html').absolute().as_uri()}"
    names = ["default"] if best.number == 0 else ["default", "best"]
    lines = [line.removeprefix("[compare] ") for line in shown.splitlines() if line.startswith("[compare] ")]
    assert [line.split()[0] for line in lines if "training seeds  " in line] == names
    assert main(["study", "show", "first"]) == 0
    assert {*lines} <= {*capsys.readouterr().out.splitlines()}
    assert "no location for champions was given" in shown

    before = {path.name for path in directory.iterdir() if path.is_dir()}
    Study.prepare(Database("sqlite:///runs/studies.db"), "first", study.plan, 4)
    claim = study.claim("other")
    claim.finish("complete", 1e6)
    assert tune("--study=first", "--trials=5") == 0
    assert [trial.state for trial in study.trials()] == ["complete"] * 5
    assert "this run has already finished" in capsys.readouterr().out  # those of the default
    assert before < {path.name for path in directory.iterdir()}
    assert len(list(directory.glob("best-0003-*/evaluation.json"))) == 2  # another best has runs of its own
    chosen = from_dict(read_json(directory / "best.json"))
    assert chosen.learner.epochs == claim.values["learner.epochs"]
    assert "1e+06 (trial 3)" in (directory / "study.html").read_text()


def test_studies_are_listed_shown_exported_and_deleted(place, capsys):
    prepare(to_json(CONFIG), "one", "runs", settings(2, {"episodes_per_seed": 4}))
    work_on_study("one")
    capsys.readouterr()

    assert main(["study", "list"]) == 0
    assert re.search(r"one +2/2 +-?\d.* navigation", capsys.readouterr().out)
    assert main(["study", "show", "one"]) == 0
    shown = capsys.readouterr().out
    assert "best of the study: trial" in shown
    assert re.search(r"\n +0  complete +\S+ +0.2 +0.9 +2 .*default\n", shown)
    assert main(["study", "export", "one"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    trials = study_of("one").trials()
    assert [(int(row["number"]), float(row["value"])) for row in rows] == [
        (trial.number, trial.value) for trial in trials
    ]
    assert main(["study", "export", "one", "--output", "one.json"]) == 0
    whole = read_json(place / "one.json")
    assert whole["trials"][1]["values"] == trials[1].values
    assert from_dict(whole["plan"]["config"]) == CONFIG

    assert main(["study", "delete", "one"]) == 0
    assert "would delete study one with 2 trials" in capsys.readouterr().out
    assert main(["study", "delete", "one", "--delete"]) == 0
    assert main(["study", "list"]) == 2
    assert "there is no study in sqlite:///runs/studies.db; `mappo tune" in capsys.readouterr().err


def test_a_study_begun_anew_under_a_deleted_name_does_not_meet_the_runs_of_the_old(place):
    for clip_epsilon in (0.2, 0.3):
        config = to_json(override(CONFIG, {"learner": {"clip_epsilon": clip_epsilon}}))
        prepare(config, "one", "runs", settings(1, {"episodes_per_seed": 4}))
        work_on_study("one")
        study = study_of("one")
        (trial,) = study.trials()
        assert trial.state == "complete"
        run = Run.at(f"{study.store}/{trial_run(0, trial.values, 0)}")
        assert run.load(run.choose("last")).config.learner.clip_epsilon == clip_epsilon
        delete("one", really=True)


def test_an_edition_begins_with_the_best_of_the_one_before(place, capsys):
    tuning = {"episodes_per_seed": 4, "pruner": "none"}

    def edition(name: str) -> Study:
        prepare(to_json(CONFIG), "nightly", "runs", settings(3, tuning), edition=name)
        return study_of(f"nightly-{name}")

    first = edition("20260101000000")
    assert len(first.trials()) == 1
    work_on_study(first.name)
    second = edition("20260102000000")
    assert second.trials()[1].origin == "warm start"
    assert second.trials()[1].values == first.best().values
    assert "the second trial is the best of study nightly-20260101000000" in capsys.readouterr().out
    third = edition("20260103000000")  # the second has no best yet
    assert third.trials()[1].values == first.best().values
    assert len(edition("20260103000000").trials()) == 2  # asked again


def test_an_edition_without_room_for_the_old_best_says_so(place, capsys):
    wide = {"learner.epochs": {"type": "int", "low": 1, "high": 40}}
    narrow = {"learner.epochs": {"type": "int", "low": 2, "high": 3}}
    for name, space in (("20260101000000", wide), ("20260102000000", narrow)):
        study_config = settings(4, {"episodes_per_seed": 4, "pruner": "none"}, space)
        prepare(to_json(CONFIG), "nightly", "runs", study_config, edition=name)
        if space is wide:
            study = study_of(f"nightly-{name}")
            claims = [study.claim(f"worker-{index}") for index in range(4)]
            for claim in claims:
                claim.finish("complete", float(claim.values["learner.epochs"]))
            assert study.best().values["learner.epochs"] > 3
    assert "no warm start from study nightly-20260101000000: its best is outside the space: learner.epochs" in (
        capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--study=A b"], "study 'A b'"),
        (["--study=s", "--trials=0"], "budget.num_trials = 0: input should be greater than or equal to 1"),
        (["--study=s", "--space={"], "not JSON"),
        (["--study=s", "--space=nowhere.json"], "neither a JSON object nor a file"),
        (["--study=s", '--space={"seed": {"type": "int", "low": 0, "high": 3}}'], "may not be tuned"),
        (["--study=s", "--tuning.pruner=magic"], "pruner"),
        (["--study=s", "--tuning.pruner=wilcoxon"], "at least 4"),
        (["--study=s", "--gate.confidence=2"], "confidence"),
        (["--study=s", '--gate.constraints={"x": {"at_most": 1, "at_least": 0}}'], "a constraint has one"),
        (["--study=s", "--tuning.constraints=[1]"], "tuning.constraints = [1]"),
        (["--study=s", "--hours=-1"], "hours = -1"),
        (["--study=s", '--space={"learner.nothing": null}'], "learner.nothing"),
    ],
)
def test_wrong_flags_exit_with_2_before_anything_is_made(place, capsys, arguments, words):
    with suppress(SystemExit):  # argparse's own
        assert main(["tune", "--config=tiny.json", *arguments]) == 2
    assert words in capsys.readouterr().err
    assert not (place / "runs").exists()


def test_too_few_retraining_seeds_and_no_completed_trial_are_said(place, capsys):
    prepare(to_json(CONFIG), "one", "runs", settings(1))
    with pytest.raises(
        StageFailed, match=r"study_config: retraining.num_seeds = 1: .* greater than or equal to 2"
    ):
        choose("one", json.dumps({"retraining": {"num_seeds": 1}}))
    claim = study_of("one").claim("w")
    claim.finish("failed", reason="the reason")
    with pytest.raises(StageFailed, match="no trial is complete: the reason"):
        choose("one", "{}")


RECKLESS = ["--environment.scenario=tests.support.scenarios:Reckless", "--tuning.episodes-per-seed=4"]


def test_a_study_without_a_feasible_trial_says_so_and_promotes_nothing(place, capsys):
    never = '--tuning.constraints={"collisions": {"at_most": -1}}'
    assert tune("--study=first", "--trials=2", "--champions=champions", *RECKLESS, never) == 1
    shown = capsys.readouterr().out
    assert "a trial is feasible if collisions is at most -1" in shown
    assert "; none is feasible so far" in shown
    reason = (
        "no trial is feasible: none of 2 complete trials keeps the constraints on collisions (at most -1; near"
    )
    assert f"failed: study first: {reason}" in shown
    assert not (place / "champions").exists()
    assert main(["study", "show", "first"]) == 0
    shown = capsys.readouterr().out
    assert reason in shown
    assert "constraints: collisions at most -1; 0 of 2 complete trials are feasible" in shown
    assert re.search(r"trial +state +value +collisions +feasible ", shown)
    assert main(["study", "export", "first"]) == 0
    for row in csv.DictReader(io.StringIO(capsys.readouterr().out)):
        assert (row["is_feasible"], float(row["measured_collisions"]) >= 0) == ("False", True)


def test_constraints_on_what_is_not_measured_are_refused_before_any_trial(place, capsys):
    for flag in ("tuning", "gate"):
        assert tune("--study=first", *RECKLESS, f'--{flag}.constraints={{"colisions": {{"at_most": 1}}}}') == 2
        assert (
            f"failed: {flag}.constraints: 'colisions' is not measured; did you mean collisions? "
            "tests.support.scenarios:Reckless measures collisions (sum)" in capsys.readouterr().out
        )
    assert main(["study", "list"]) == 2
    assert "there is no study in" in capsys.readouterr().err


def test_a_pod_without_a_database_is_told_which_secret_is_missing(place, monkeypatch, capsys):
    monkeypatch.setenv("MAPPO_PIPELINE_RUN", "1234")
    with pytest.raises(StageFailed, match="MAPPO_DATABASE is not set in this pod.*database_secret"):
        prepare(to_json(CONFIG), "one", "runs", settings(1))


def test_an_unknown_study_exits_with_2_and_says_which_there_are(place, capsys):
    prepare(to_json(CONFIG), "one", "runs", settings(1))
    for action in ("show", "work", "resume", "delete", "export"):
        assert main(["study", action, "nothing"]) == 2
        shown = "".join(capsys.readouterr())
        assert "there is no study 'nothing' in sqlite:///runs/studies.db; its studies: one" in shown


def test_looking_for_a_study_where_none_was_made_makes_no_database(place, capsys):
    for arguments in (["list"], ["show", "one"], ["resume", "one"]):
        assert main(["study", *arguments]) == 2
        assert "there is no study in sqlite:///runs/studies.db; MAPPO_DATABASE" in "".join(capsys.readouterr())
    assert not (place / "runs").exists()


def test_a_study_in_a_database_elsewhere_is_gone_on_with_from_any_directory(place, monkeypatch):
    monkeypatch.setenv("MAPPO_DATABASE", f"sqlite:///{place}/elsewhere.db")
    prepare(to_json(CONFIG), "one", "runs", settings(1))
    study = Study.load(Database(f"sqlite:///{place}/elsewhere.db"), "one")
    assert Path(study.store).parent == place / "runs"


def test_a_study_is_resumed_with_more_trials_and_more_time_and_keeps_its_own_settings(place, capsys):
    study_config = {
        "budget": {"num_trials": 2, "hours": 1},
        "tuning": {"episodes_per_seed": 4, "pruner": "none"},
        "retraining": {"num_seeds": 2},
        "gate": {"num_seeds": 4, "episodes_per_seed": 5},
    }
    prepare(to_json(CONFIG), "one", "runs", json.dumps(study_config), champions="champions")
    work_on_study("one")
    decision = Path(study_of("one").store) / "decision.json"
    assert main(["study", "resume", "one", "--trials=3", "--hours=0.5", "--gate.margin=0.25"]) == 0
    study = study_of("one")
    assert [trial.state for trial in study.trials()] == ["complete"] * 3
    for configuration in read_json(decision.with_name("comparison.json"))["configurations"]:
        assert len(configuration["training_seeds"]) == 2
    if (kept := read_json(decision))["action"] == "kept":  # the decision of a champion is the one that made it
        assert (kept["gate"]["num_seeds"], kept["gate"]["margin"]) == (4, 0.25)
    assert (study.ending.gate.num_seeds, study.ending.gate.margin) == (4, 0.25)
    assert study.ending.champions == "champions"
    assert main(["study", "resume", "one", "--hours=-1"]) == 2
    assert "hours = -1" in capsys.readouterr().err


@pytest.mark.long
def test_interrupted_tuning_with_two_workers_leaves_nothing_running_and_is_resumed(place):
    long = override(CONFIG, {"collection": {"total_frames": 6000}})
    (place / "long.json").write_text(to_json(long))
    command = [
        sys.executable,
        "-m",
        "mappo",
        "tune",
        "--config=long.json",
        "--study=s",
        "--trials=3",
        "--workers=2",
    ]
    with (place / "log").open("w") as log:
        process = subprocess.Popen([*command, *FLAGS], stdout=log, stderr=log, start_new_session=True)
    wait(lambda: (place / "runs" / "studies.db").exists(), 60, "no study")
    database = Database("sqlite:///runs/studies.db")

    def reported() -> int:
        try:
            return sum(bool(trial.curve) for trial in Study.load(database, "s").trials())
        except Exception:
            return 0

    wait(lambda: reported() == 2, 90, "no two trials")
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 143, (place / "log").read_text()
    time.sleep(0.5)
    assert {trial.state for trial in Study.load(database, "s").trials()} == {"waiting"}
    group = ["pgrep", "--pgroup", str(process.pid), "--full", "mappo study work"]
    shown = subprocess.run(group, capture_output=True, text=True, check=False)
    assert shown.stdout == ""
    database.close()


def test_the_code_of_a_scenario_runs_only_where_the_user_names_it(place, capsys, monkeypatch):
    scenario = "tests.support.scenarios:Endless"
    config = override(CONFIG, {"environment": {"scenario": scenario, "scenario_kwargs": {}}})
    prepare(to_json(config), "one", "runs", settings(1, {"episodes_per_seed": 4}))
    capsys.readouterr()
    for arguments in (["work", "one"], ["work", "one", "--environment.scenario=os:abort"], ["resume", "one"]):
        assert main(["study", *arguments]) == 2
        assert f"failed: study one: its scenario '{scenario}' is code outside VMAS" in capsys.readouterr().out
    assert {trial.state for trial in study_of("one").trials()} == {"waiting"}
    assert main(["study", "work", "one", f"--environment.scenario={scenario}"]) == 0
    assert [trial.state for trial in study_of("one").trials()] == ["complete"]


@pytest.mark.long
def test_two_tunings_of_one_name_that_start_together_end_well_both(place):
    command = [sys.executable, "-m", "mappo", "tune", "--config=tiny.json", "--study=s", "--trials=4", *FLAGS]
    logs = [place / "first.log", place / "second.log"]
    with logs[0].open("w") as first, logs[1].open("w") as second:
        processes = [subprocess.Popen(command, stdout=log, stderr=log) for log in (first, second)]
        statuses = [process.wait(timeout=300) for process in processes]
    assert statuses == [0, 0], "\n".join(log.read_text() for log in logs)
    study = study_of("s")
    assert [trial.state for trial in study.trials()] == ["complete"] * 4
    assert all(len(trial.attempts) <= 1 for trial in study.trials())
    comparison = read_json(Path(study.store) / "comparison.json")
    assert all(len(configuration["training_seeds"]) == 2 for configuration in comparison["configurations"])


@pytest.mark.long
def test_a_tuning_waits_while_another_process_finishes_its_study(place):
    prepare(to_json(CONFIG), "s", "runs", settings(1, {"episodes_per_seed": 4, "pruner": "none"}))
    log = place / "tune.log"
    command = [sys.executable, "-m", "mappo", "tune", "--config=tiny.json", "--study=s", "--trials=1", *FLAGS]
    with log.open("w") as output:
        with Database("sqlite:///runs/studies.db").long_lock("s", pytest.fail):
            process = subprocess.Popen(command, stdout=output, stderr=output)
            wait(lambda: "another process finishes this study; waiting" in log.read_text(), 120, log)
            assert process.poll() is None
            assert not (Path(study_of("s").store) / "comparison.json").exists()
        assert process.wait(timeout=300) == 0, log.read_text()


def test_page_of_a_study_shows_its_trials_and_what_came_of_it(place):
    critics = '{"networks.critic": {"type": "categorical", "choices": ["central", "own"]}}'
    limit = '--tuning.constraints={"agent_collisions": {"at_least": -50}}'
    assert tune("--study=first", "--trials=4", f"--space={critics}", limit, "--champions=champions") == 0
    study = study_of("first")
    page = Path(study.store) / "study.html"
    with chromium() as browser:
        open_page(browser, page)
        wait(lambda: browser.execute_script("return document.body.dataset.plots"), 30, "no plots")
        assert complaints(browser) == []
        assert requests(browser) == []
        text = browser.find_element("tag name", "body").text
        assert len(browser.find_elements("css selector", ".js-plotly-plot .main-svg")) >= 6
    best = study.best()
    assert f"{best.value:.4g} (trial {best.number})" in text
    for title in ("Values over the study", "Which settings mattered", "Learning curves of all trials", "Workers"):
        assert title in text
    for trial in study.trials():
        assert f"{trial.value:.4g}" in text
    assert '"clip_epsilon"' in text
    assert "proximal policy optimisation (MAPPO) and independent proximal policy optimisation (IPPO)" in text
    assert {trial.values["networks.critic"] for trial in study.trials()} == {"central", "own"}
    assert "constraints: agent_collisions at least -50; 4 of 4 complete trials are feasible" in text
    verdict = read_json(Path(study.store) / "decision.json")["constraints"]["agent_collisions"]
    assert verdict["constraint"]["at_least"] == -50
    assert f"Constraint on agent_collisions: {verdict['mean']:.4g}, with 95% confidence above" in text
    assert page.stat().st_size < 8e6
