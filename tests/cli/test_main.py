import json
import os
import pty
import re
import subprocess
import sys
import time

import pytest

from mappo.__main__ import _parser, main
from mappo.config import require_run_name
from mappo.promotion.champions import Champions, policy_key
from mappo.recipes import RECIPES, recipe
from mappo.runs.run import load_checkpoint
from mappo.strict_json import to_dict
from tests.conftest import read_json

TINY = [
    "--environment.max-episode-frames=10",
    "--networks.hidden-sizes=16",
    "--learner.epochs=1",
    "--learner.minibatch-frames=60",
    "--learner.update=plain",
    "--collection.simulation=plain",
    "--collection.num-envs=6",
    "--collection.rollout-frames=10",
    "--collection.total-frames=120",
    "--evaluation.seeds=1",
    "--evaluation.episodes-per-seed=4",
]


def run_flags(directory):
    """Return the flags that put a run into this directory."""
    return ["--store", str(directory.parent), "--run", directory.name]


def fields(values, path=""):
    for name, value in values.items():
        nested = isinstance(value, dict) and name != "scenario_kwargs"
        yield from fields(value, f"{path}{name}.") if nested else [f"{path}{name}"]


@pytest.mark.parametrize("command", ["validate", "train", "evaluate", "show-config"])
def test_help_explains_every_setting(command, capsys):
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    output = capsys.readouterr().out
    for path in fields(to_dict(recipe("navigation"))):
        assert f"--{path.replace('_', '-')} " in output


def test_help_gives_the_range_of_a_setting(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    output = " ".join(capsys.readouterr().out.split())
    for limits in (
        "(> 0, < 1; default: 0.2)",
        "(at least 1; each >= 1, <= 65536; default: 256,256)",
        "(>= 0, < 4294967296;",
    ):
        assert limits in output


def test_champion_is_promoted_rolled_back_shown_and_exported(tmp_path, monkeypatch, capsys):
    """Give the commands as a user does, with the defaults of the other flags."""
    monkeypatch.chdir(tmp_path)
    scenario = ["--environment.scenario", "tests.support.scenarios:PushRight"]
    fast_learner = ["--learner.learning-rate=0.02", "--learner.epochs=20", "--collection.total-frames=1200"]
    for name, seed in (("first", "0"), ("second", "1")):
        assert main(["train", *TINY, *scenario, *fast_learner, "--run", name, "--seed", seed]) == 0
    assert main(["promote", "runs/first", *scenario, "--gate.num-seeds", "4", "--output", "decision.json"]) == 0
    decision = read_json(tmp_path / "decision.json")
    output = capsys.readouterr().out
    assert (decision["opponent"], decision["champion"]) == ("random", 1)
    assert f"difference {decision['difference']:.4g}, with 95% confidence above" in output
    assert "[promote] the candidate is promoted; the champion is decision 1" in output
    assert f"to view the champion: mappo champion show champions --task {decision['task']}" in output
    assert main(["champion", "rollback"]) == 2

    champions = Champions("champions", decision["task"])
    second = load_checkpoint("runs/second")
    champions.save_policy(second, {})
    champions.decide(champions.current(), "promoted", policy_key(second), {})
    assert main(["champion", "rollback", "--reason", "it rams walls"]) == 0
    capsys.readouterr()
    assert main(["champion", "history"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["1", "2", "3"]
    assert "better than random" in lines[0]
    assert lines[2].endswith("it rams walls")
    assert main(["champion", "show"]) == 0
    summary = capsys.readouterr().out
    assert re.search(r"^reason +it rams walls$", summary, re.M)
    assert main(["champion", "history", "--output", "json"]) == 0
    assert [row["number"] for row in json.loads(capsys.readouterr().out)] == [1, 2, 3]
    assert main(["champion", "show", "--output", "json"]) == 0
    policy = json.loads(capsys.readouterr().out)
    assert re.search(rf"^place +{policy['place']}$", summary, re.M)
    assert (policy["number"], policy["policy"]) == (3, decision["candidate"]["policy"])
    assert main(["evaluate", policy["place"], *scenario]) == 0
    assert main(["champion", "export", "--output", "mine"]) == 0
    assert {path.name for path in (tmp_path / "mine").iterdir()} == {"policy.pt2", "model-card.md"}
    capsys.readouterr()
    assert main(["champion", "export", "--output", "mine", "--format", "onnx"]) == 0
    lines = ["mine/policy.onnx", "mine/contract.json", "mine/model-card.md (unchanged)"]
    assert capsys.readouterr().out.splitlines() == lines
    contract = read_json(tmp_path / "mine" / "contract.json")
    assert (contract["policy"], contract["task"]) == (policy["policy"], policy["task"])
    assert main(["champion", "list", "--output", "json"]) == 0
    assert [row["task"] for row in json.loads(capsys.readouterr().out)] == [decision["task"]]


def test_wrong_gate_or_missing_champion_is_reported_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["promote", "runs/none", "--gate.confidence", "95"]) == 2
    assert "confidence = 95: input should be less than 1" in capsys.readouterr().err
    for action in ("list", "show", "history", "export"):
        assert main(["champion", action]) == 2
        assert "champions: no task has a champion; `mappo promote` makes one" in "".join(capsys.readouterr())


def test_abbreviated_flag_is_refused(capsys):
    with pytest.raises(SystemExit) as end:
        main(["show-config", "--learner.epoch", "3"])
    assert end.value.code == 2


def test_recipes_command_lists_every_recipe(capsys):
    assert main(["recipes"]) == 0
    output = capsys.readouterr().out
    assert all(name in output for name in RECIPES)


def show_config(capsys, *arguments):
    assert main(["show-config", *arguments]) == 0
    return json.loads(capsys.readouterr().out)


def test_flags_override_the_file_which_overrides_the_recipe(capsys, tmp_path):
    file = tmp_path / "changes.json"
    file.write_text('{"seed": 3, "learner": {"epochs": 7}}')
    config = show_config(
        capsys, "balance", "--config", str(file), "--learner.epochs=9", "--learner.clip_epsilon", "0.1"
    )
    expected = to_dict(recipe("balance"))
    expected["seed"] = 3
    expected["learner"] |= {"epochs": 9, "clip_epsilon": 0.1}
    assert config == expected


def test_flags_of_every_kind_are_understood(capsys):
    config = show_config(
        capsys,
        "--environment.scenario=wheel",
        '--environment.scenario-kwargs={"n_agents": 3}',
        "--networks.hidden-sizes=64,32",
        "--evaluation.seeds=[5]",
        "--evaluation.deterministic=false",
        "--device=cpu",
    )
    assert config["environment"]["scenario"] == "wheel"
    assert config["environment"]["scenario_kwargs"] == {"n_agents": 3}
    assert config["networks"]["hidden_sizes"] == [64, 32]
    assert config["evaluation"]["seeds"] == [5]
    assert config["evaluation"]["deterministic"] is False
    assert config["device"] == "cpu"


def test_printed_configuration_can_be_read_back(capsys, tmp_path):
    config = show_config(capsys, "balance", "--seed=4")
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config))
    assert show_config(capsys, "--config", str(file)) == config


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "navigatoin"], "recipe = 'navigatoin'"),
        (["train", "--learner.clip-epsilon=2"], "learner.clip_epsilon = 2: input should be less than 1"),
        (["train", "--learner.epochs=many"], 'learner.epochs = "many"'),
        (["train", "--config=/no/such/file"], "/no/such/file"),
        (["validate", '--environment.scenario-kwargs={"a"'], "environment.scenario_kwargs"),
        (["train", "--learner.discount=NaN"], "learner.discount: NaN: numbers must be finite"),
    ],
)
def test_wrong_command_exits_with_2_and_names_the_cause(arguments, message, capsys):
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_unknown_flag_is_refused(capsys):
    with pytest.raises(SystemExit) as end:
        main(["train", "--learner.clip-epsilom=0.1"])
    assert end.value.code == 2
    assert "--learner.clip-epsilom" in capsys.readouterr().err


def test_train_then_evaluate_writes_a_run_and_a_report(capsys, tmp_path):
    run = tmp_path / "run"
    assert main(["train", *run_flags(run), *TINY]) == 0
    assert {path.name for path in run.iterdir()} == {
        *("attempts", "blobs", "checkpoints", "latest.json", "history.csv")
    }
    output = capsys.readouterr().out
    assert "[train] navigation: 120 frames in 2 iterations of 60" in output
    assert "120 of 120 frames" in output
    assert main(["evaluate", str(run), "--evaluation.seeds=3,4", "--output", str(tmp_path / "report.json")]) == 0
    output = capsys.readouterr().out
    report = read_json(tmp_path / "report.json")
    assert report["config"]["evaluation"]["seeds"] == [3, 4]
    assert report["training_frames"] == 120
    assert f"mean return {report['trained']['mean']['value']:.3g}" in output
    assert "resampled: evaluation episodes" in output


def test_finished_run_stays_unchanged_when_trained_again(capsys, tmp_path):
    command = ["train", *run_flags(tmp_path / "run"), *TINY]
    assert main(command) == 0
    contents = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    capsys.readouterr()
    assert main(command) == 0
    assert "this run has already finished, after 120 frames" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == contents


def test_existing_run_refuses_another_configuration_naming_the_field(capsys, tmp_path):
    command = ["train", *run_flags(tmp_path / "run"), *TINY]
    assert main(command) == 0
    assert main([*command, "--learner.epochs=2", "--evaluation.seeds=9"]) == 2
    output = capsys.readouterr().err
    assert "started with another configuration: learner.epochs = 1 -> 2; use that configuration" in output


def test_runs_without_a_name_that_start_in_the_same_second_have_different_names(monkeypatch):
    monkeypatch.setattr(time, "strftime", lambda *_: "20260101-000000")
    names = {_parser().parse_args([command]).run for command in ["train"] * 40}
    assert len(names) == 40
    assert all(require_run_name(name).startswith("20260101-000000-") for name in names)


def test_empty_run_name_is_refused(capsys, tmp_path):
    assert main(["train", "--run=", "--store", str(tmp_path), *TINY]) == 2
    error = capsys.readouterr().err
    assert error.startswith("mappo train: error: run")
    assert f"store = {str(tmp_path)!r}" in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["Run", "../run", "a/b", "-x", "a" * 64, "a.b", "a b"])
def test_invalid_run_name_is_refused(name, capsys, tmp_path):
    assert main(["train", f"--run={name}", "--store", str(tmp_path), *TINY]) == 2
    assert f"run {name!r}: a name has" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "store",
    [
        "http://bucket/x",
        "s3://",
        "s3://UPPER/x",
        "s3://bucket/x?endpoint=y",
        "s3://b/../x",
        "s3//bucket",
        "s3:/bucket",
    ],
)
def test_invalid_store_location_is_refused(store, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--store", store, *TINY]) == 2
    assert "give a directory, s3://bucket/prefix" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_checkpoints_are_listed_shown_verified_pruned_and_garbage_collected(capsys, tmp_path):
    run = tmp_path / "run"
    longer = ["--collection.total-frames=300", "--selection.interval-iterations=2"]
    assert main(["train", *run_flags(run), *TINY, *longer]) == 0
    capsys.readouterr()

    def output_of(*arguments, status=0):
        assert main(["checkpoints", arguments[0], str(run), *arguments[1:]]) == status
        return "".join(capsys.readouterr())

    lines = output_of("list").splitlines()
    assert [line.split()[0] for line in lines[1:4]] == ["5", "4", "3"]
    assert lines[1].split()[1] == "300"
    assert "last" in lines[1]
    assert sum("best" in line for line in lines) == 1
    rows = json.loads(output_of("list", "--output", "json"))
    assert [(row["iteration"], row["frames"], row["last"], row["damaged"]) for row in rows][:2] == [
        (5, 300, True, False),
        (4, 240, False, False),
    ]
    assert sum(row["best"] for row in rows) == 1
    manifest = json.loads(output_of("show", "--checkpoint", "4"))
    assert (manifest["iteration"], manifest["frames"], manifest["seed"]) == (4, 240, 0)
    assert {"torch", "torchrl", "vmas", "mappo"} <= manifest["platform"]["versions"].keys()
    assert output_of("verify").count("good") == len(lines) - 1

    files = {path for path in run.rglob("*") if path.is_file()}
    assert "would delete iteration 3 of attempt 1" in output_of("prune", "--keep", "1")
    assert {path for path in run.rglob("*") if path.is_file()} == files
    output_of("prune", "--keep", "1", "--delete")
    assert len(output_of("list").splitlines()) <= 3
    assert "0 to delete" in output_of("gc")  # the files are younger than a day
    assert "deleted blobs/" in output_of("gc", "--grace-hours", "-1", "--delete")
    assert "damaged" not in output_of("verify")

    newest = next(path for path in run.glob("checkpoints/*/0000000005-*.json"))
    newest.write_text("{}")
    assert "damaged  iteration 5 of attempt 1" in output_of("verify", status=1)
    assert json.loads(output_of("list", "--output", "json").partition("\n[checkpoints] warning")[0])[0]["damaged"]
    assert "no checkpoint '77'" in output_of("show", "--checkpoint", "77", status=2)
    assert main(["checkpoints", "list", str(tmp_path / "none")]) == 2
    assert f"{tmp_path / 'none'}: there is no such run" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main(["checkpoints", "list", str(tmp_path / "empty")]) == 2
    assert f"{tmp_path / 'empty'}: there is no checkpoint of a run here" in capsys.readouterr().err


def test_evaluate_uses_the_requested_checkpoint(capsys, tmp_path):
    assert main(["train", *run_flags(tmp_path / "run"), *TINY]) == 0
    for which in ("1", "last"):
        output = str(tmp_path / f"{which}.json")
        assert main(["evaluate", str(tmp_path / "run"), "--checkpoint", which, "--output", output]) == 0
    assert read_json(tmp_path / "1.json")["training_frames"] == 60
    assert read_json(tmp_path / "last.json")["training_frames"] == 120
    assert main(["evaluate", str(tmp_path / "run"), "--checkpoint", "9"]) == 2
    assert "give best, last, or one of iterations 1, 2" in capsys.readouterr().err


def test_failed_validation_exits_with_1_and_still_writes_its_report(capsys, tmp_path):
    report = tmp_path / "report.json"
    arguments = ["--environment.scenario=tests.support.scenarios:GreedyReset", "--output", str(report), *TINY]
    assert main(["validate", *arguments]) == 1
    assert "[validate] failed: partial reset:" in capsys.readouterr().out
    assert [check["outcome"] for check in read_json(report)["checks"]].count("failed") == 1


def test_diverging_training_exits_with_1_naming_the_losses(capsys, tmp_path):
    arguments = ["--environment.scenario=tests.support.scenarios:NanReward", *run_flags(tmp_path / "run"), *TINY]
    arguments += ["--environment.max-episode-frames=20", "--collection.rollout-frames=20"]
    assert main(["train", *arguments]) == 1
    assert "[train] failed: loss_policy = nan, loss_critic = nan" in capsys.readouterr().out
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_missing_checkpoint_exits_with_2(capsys, tmp_path):
    assert main(["evaluate", str(tmp_path)]) == 2
    assert f"{tmp_path}: there is no checkpoint of a run here" in capsys.readouterr().err


def test_code_named_by_a_checkpoint_is_not_imported_unless_the_user_names_it(capsys, tmp_path):
    own_scenario = "--environment.scenario=tests.support.scenarios:Endless"
    run = str(tmp_path / "run")
    assert main(["train", own_scenario, *run_flags(tmp_path / "run"), *TINY]) == 0
    assert main(["evaluate", run]) == 2
    assert "--environment.scenario" in capsys.readouterr().err
    assert main(["evaluate", run, own_scenario]) == 0
    file = tmp_path / "config.json"
    file.write_text('{"environment": {"scenario": "tests.support.scenarios:Endless"}}')
    assert main(["evaluate", run, "--config", str(file)]) == 0


def test_closed_pipe_prints_no_traceback():
    command = f"{sys.executable} -m mappo show-config | head -n 1"
    process = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert (process.stdout, process.stderr) == ("{\n", "")


def test_terminal_gets_a_progress_bar(tmp_path):
    command = [sys.executable, "-m", "mappo", "train", *run_flags(tmp_path / "run"), *TINY]
    parent, child = pty.openpty()
    process = subprocess.Popen(command, stdout=child, stderr=child)
    os.close(child)
    output = b""
    while True:
        try:
            output += os.read(parent, 4096)
        except OSError:
            break
    os.close(parent)
    assert process.wait() == 0
    assert b"100%" in output
    assert b"return " in output


def test_help_does_not_import_torch():
    script = "import sys, mappo.__main__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_importing_mappo_needs_no_kubeflow():
    script = "import sys; sys.modules['kfp'] = None; import mappo.stages.runtime, mappo.__main__"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_extend_and_warm_start_begin_with_another_run(capsys, tmp_path):
    first, second = (str(tmp_path / name) for name in ("first", "second"))
    assert main(["train", *run_flags(tmp_path / "first"), *TINY]) == 0
    assert (
        main(["train", "--extend", first, *run_flags(tmp_path / "second"), "--collection.total-frames=240"]) == 0
    )
    output = capsys.readouterr().out
    assert "extends a run of 120 frames" in output
    assert "240 of 240 frames" in output
    assert main(["train", "--warm-start", second, *run_flags(tmp_path / "third"), "--seed=3", *TINY]) == 0
    assert "starts with the networks of a run of 240 frames" in capsys.readouterr().out
    assert main(["train", "--extend", first, *run_flags(tmp_path / "x"), "--seed=5"]) == 2
    assert "seed = 0 -> 5" in capsys.readouterr().err
    assert main(["train", "balance", "--extend", first]) == 2
    assert "leave the recipe balance out" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["train", "--extend", first, "--warm-start", first, *run_flags(tmp_path / "y")])
    assert "--warm-start: not allowed with argument --extend" in capsys.readouterr().err


def test_extending_never_imports_code_that_only_the_checkpoint_names(capsys, tmp_path):
    own_scenario = "--environment.scenario=tests.support.scenarios:Endless"
    run = str(tmp_path / "run")
    assert main(["train", own_scenario, *run_flags(tmp_path / "run"), *TINY]) == 0
    longer = ["train", "--extend", run, "--collection.total-frames=240", *run_flags(tmp_path / "longer")]
    assert main(longer) == 2
    assert "--environment.scenario" in capsys.readouterr().err
    assert main([*longer, own_scenario]) == 0


def test_compare_prints_and_writes_a_comparison_of_training_seeds(capsys, tmp_path):
    reports = []
    for seed in ("1", "2"):
        run, report = str(tmp_path / seed), str(tmp_path / f"{seed}.json")
        assert main(["train", *run_flags(tmp_path / seed), "--seed", seed, *TINY]) == 0
        assert main(["evaluate", run, "--output", report]) == 0
        reports.append(report)
    assert main(["compare", *reports, "--output", str(tmp_path / "comparison.json")]) == 0
    assert "training seeds  1: " in capsys.readouterr().out
    assert read_json(tmp_path / "comparison.json")["configurations"][0]["training_seeds"] == [1, 2]
    assert (
        main(["compare", *(str(tmp_path / seed) for seed in ("1", "2"))]) == 0
    )  # the runs keep these evaluations
    assert "training seeds  1: " in capsys.readouterr().out
    assert main(["compare", reports[0], str(tmp_path / "none.json")]) == 2
    assert "none.json: there is no such run; nor is there such a file" in capsys.readouterr().err
    assert main(["compare", str(tmp_path)]) == 2
    assert f"this run has no evaluation; `mappo evaluate {tmp_path}` makes one" in capsys.readouterr().out


def test_checkpoint_may_name_the_scenario_swarm(capsys, tmp_path):
    run = str(tmp_path / "run")
    assert main(["train", "--environment.scenario=swarm", *run_flags(tmp_path / "run"), *TINY]) == 0
    assert main(["evaluate", run]) == 0
    assert "heuristic mean return" in capsys.readouterr().out


def test_corrected_command_works_after_a_failed_start(tmp_path, capsys):
    first, second = str(tmp_path / "first"), run_flags(tmp_path / "second")
    assert main(["train", *run_flags(tmp_path / "first"), *TINY]) == 0
    assert main(["train", "--extend", first, *second]) == 2
    assert "set a larger number" in capsys.readouterr().err
    assert not (tmp_path / "second").exists()
    assert main(["train", "--extend", first, *second, "--collection.total-frames=240"]) == 0


def test_compare_explains_what_to_give_when_a_file_is_no_report(tmp_path, capsys):
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    assert main(["compare", str(tmp_path)]) == 2
    assert f"this run has no evaluation; `mappo evaluate {tmp_path}` makes one" in capsys.readouterr().out
    assert main(["compare", str(tmp_path / "binary")]) == 2
    assert "binary: not an evaluation report" in capsys.readouterr().out


@pytest.mark.parametrize(("flag", "value"), [("--metrics-port", "http"), ("--pushgateway", "nowhere")])
def test_invalid_monitoring_setting_exits_with_2_naming_it(flag, value, capsys, tmp_path, monkeypatch):
    for name in ("MAPPO_METRICS_PORT", "MAPPO_PUSHGATEWAY", "MAPPO_STUDY"):
        monkeypatch.setenv(name, "")
    assert main(["train", flag, value, *run_flags(tmp_path / "run"), *TINY]) == 2
    assert f"error: MAPPO_{flag[2:].upper().replace('-', '_')}" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_training_prints_the_address_of_its_metrics(capsys, tmp_path, monkeypatch):
    for name, value in (("MAPPO_METRICS_PORT", ""), ("MAPPO_LINGER_SECONDS", "0")):
        monkeypatch.setenv(name, value)
    assert main(["train", "--metrics-port", "0", *run_flags(tmp_path / "run"), *TINY]) == 0
    assert re.search(r"\[train\] metrics: http://localhost:\d+/metrics", capsys.readouterr().out)
