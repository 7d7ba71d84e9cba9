import json
import os
import pty
import subprocess
import sys

import pytest

from mappo.__main__ import main
from mappo.config import to_dict
from mappo.recipes import RECIPES, recipe
from tests.conftest import read_json

TINY = [
    "--environment.max-episode-frames=10",
    "--networks.hidden-sizes=16",
    "--learner.epochs=1",
    "--learner.minibatch-frames=60",
    "--collection.num-envs=6",
    "--collection.rollout-frames=10",
    "--collection.total-frames=120",
    "--evaluation.seeds=1",
    "--evaluation.episodes-per-seed=4",
]


def fields(values, path=""):
    for name, value in values.items():
        nested = isinstance(value, dict) and name != "scenario_kwargs"
        yield from fields(value, f"{path}{name}.") if nested else [f"{path}{name}"]


@pytest.mark.parametrize("command", ["validate", "train", "evaluate", "show-config"])
def test_help_explains_every_knob(command, capsys):
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    for path in fields(to_dict(recipe("navigation"))):
        assert f"--{path.replace('_', '-')} " in shown


def test_help_gives_ranges(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for limits in ("(> 0, < 1)", "(at least 1; each >= 1, <= 65536)", "(at least 1; each >= 0, < 4294967296)"):
        assert limits in shown


def test_abbreviated_flag_is_refused(capsys):
    with pytest.raises(SystemExit) as end:
        main(["show-config", "--learner.epoch", "3"])
    assert end.value.code == 2


def test_recipes_lists_each_with_its_description(capsys):
    assert main(["recipes"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in RECIPES)


def show(capsys, *arguments):
    assert main(["show-config", *arguments]) == 0
    return json.loads(capsys.readouterr().out)


def test_flags_override_the_file_which_overrides_the_recipe(capsys, tmp_path):
    file = tmp_path / "changes.json"
    file.write_text('{"seed": 3, "learner": {"epochs": 7}}')
    shown = show(capsys, "balance", "--config", str(file), "--learner.epochs=9", "--learner.clip_epsilon", "0.1")
    expected = to_dict(recipe("balance"))
    expected["seed"] = 3
    expected["learner"] |= {"epochs": 9, "clip_epsilon": 0.1}
    assert shown == expected


def test_flags_of_every_kind_are_understood(capsys):
    shown = show(
        capsys,
        "--environment.scenario=wheel",
        '--environment.scenario-kwargs={"n_agents": 3}',
        "--networks.hidden-sizes=64,32",
        "--evaluation.seeds=[5]",
        "--evaluation.deterministic=false",
        "--device=cpu",
    )
    assert shown["environment"]["scenario"] == "wheel"
    assert shown["environment"]["scenario_kwargs"] == {"n_agents": 3}
    assert shown["networks"]["hidden_sizes"] == [64, 32]
    assert shown["evaluation"]["seeds"] == [5]
    assert shown["evaluation"]["deterministic"] is False
    assert shown["device"] == "cpu"


def test_printed_configuration_can_be_read_back(capsys, tmp_path):
    shown = show(capsys, "balance", "--seed=4")
    file = tmp_path / "config.json"
    file.write_text(json.dumps(shown))
    assert show(capsys, "--config", str(file)) == shown


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["train", "navigatoin"], "recipe = 'navigatoin'"),
        (["train", "--learner.clip-epsilon=2"], "learner.clip_epsilon = 2: input should be less than 1"),
        (["train", "--learner.epochs=many"], 'learner.epochs = "many"'),
        (["train", "--config=/no/such/file"], "/no/such/file"),
        (["validate", '--environment.scenario-kwargs={"a"'], "environment.scenario_kwargs"),
        (["train", "--learner.discount=NaN"], "learner.discount: NaN: numbers must be finite"),
    ],
)
def test_wrong_command_exits_with_2_and_says_what_is_wrong(arguments, named, capsys):
    assert main(arguments) == 2
    assert named in capsys.readouterr().err


def test_unknown_flag_is_refused(capsys):
    with pytest.raises(SystemExit) as end:
        main(["train", "--learner.clip-epsilom=0.1"])
    assert end.value.code == 2
    assert "--learner.clip-epsilom" in capsys.readouterr().err


def test_train_then_evaluate_then_look(capsys, tmp_path):
    run = tmp_path / "run"
    assert main(["train", "--output", str(run), *TINY]) == 0
    assert {path.name for path in run.iterdir()} == {"last", "best", "history.csv"}
    shown = capsys.readouterr().out
    assert "[train] navigation: 120 frames in 2 iterations of 60" in shown
    assert "120 of 120 frames" in shown
    assert main(["evaluate", str(run), "--evaluation.seeds=3,4", "--output", str(tmp_path / "report.json")]) == 0
    shown = capsys.readouterr().out
    report = read_json(tmp_path / "report.json")
    assert report["config"]["evaluation"]["seeds"] == [3, 4]
    assert report["training_frames"] == 120
    assert f"mean return {report['trained']['mean']['value']:.3g}" in shown
    assert "resampled: evaluation episodes" in shown


def test_training_never_overwrites_a_run(capsys, tmp_path):
    (tmp_path / "precious").write_text("x")
    assert main(["train", "--output", str(tmp_path), *TINY]) == 2
    assert "nothing is overwritten" in capsys.readouterr().err
    assert (tmp_path / "precious").read_text() == "x"


def test_failed_validation_exits_with_1_and_still_writes_its_report(capsys, tmp_path):
    report = tmp_path / "report.json"
    arguments = ["--environment.scenario=tests.scenarios:GreedyReset", "--output", str(report), *TINY]
    assert main(["validate", *arguments]) == 1
    assert "[validate] failed: partial reset:" in capsys.readouterr().out
    assert [check["outcome"] for check in read_json(report)["checks"]].count("failed") == 1


def test_diverging_training_exits_with_1_naming_the_term(capsys, tmp_path):
    arguments = ["--environment.scenario=tests.scenarios:NanReward", "--output", str(tmp_path / "run"), *TINY]
    arguments += ["--environment.max-episode-frames=20", "--collection.rollout-frames=20"]
    assert main(["train", *arguments]) == 1
    assert "[train] failed: loss_policy = nan, loss_critic = nan" in capsys.readouterr().out
    assert not (tmp_path / "run" / "last").exists()


def test_missing_checkpoint_exits_with_2(capsys, tmp_path):
    assert main(["evaluate", str(tmp_path)]) == 2
    assert "checkpoint.json: No such file" in capsys.readouterr().err


def test_code_named_by_a_checkpoint_is_not_imported_unless_the_user_names_it(capsys, tmp_path):
    own = "--environment.scenario=tests.scenarios:Endless"
    run = str(tmp_path / "run")
    assert main(["train", own, "--output", run, *TINY]) == 0
    assert main(["evaluate", run]) == 2
    assert "--environment.scenario" in capsys.readouterr().err
    assert main(["evaluate", run, own]) == 0
    file = tmp_path / "config.json"
    file.write_text('{"environment": {"scenario": "tests.scenarios:Endless"}}')
    assert main(["evaluate", run, "--config", str(file)]) == 0


def test_closed_pipe_is_no_traceback():
    command = f"{sys.executable} -m mappo show-config | head -n 1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("{\n", "")


def test_terminal_gets_a_progress_bar(tmp_path):
    command = [sys.executable, "-m", "mappo", "train", "--output", str(tmp_path / "run"), *TINY]
    parent, child = pty.openpty()
    process = subprocess.Popen(command, stdout=child, stderr=child)
    os.close(child)
    shown = b""
    while True:
        try:
            shown += os.read(parent, 4096)
        except OSError:
            break
    os.close(parent)
    assert process.wait() == 0
    assert b"100%" in shown
    assert b"return " in shown


def test_help_does_not_import_torch():
    script = "import sys, mappo.__main__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_importing_mappo_needs_no_kubeflow():
    script = "import sys; sys.modules['kfp'] = None; import mappo.stages, mappo.__main__"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_extend_and_warm_start_from_the_terminal(capsys, tmp_path):
    first, second, third = (str(tmp_path / name) for name in ("first", "second", "third"))
    assert main(["train", "--output", first, *TINY]) == 0
    assert main(["train", "--extend", first, "--output", second, "--collection.total-frames=240"]) == 0
    shown = capsys.readouterr().out
    assert "goes on after 120 frames" in shown
    assert "240 of 240 frames" in shown
    assert main(["train", "--warm-start", second, "--output", third, "--seed=3", *TINY]) == 0
    assert "begins with the networks of a run after 240 frames" in capsys.readouterr().out
    assert main(["train", "--extend", first, "--output", str(tmp_path / "x"), "--seed=5"]) == 1
    assert "seed = 0 -> 5" in capsys.readouterr().out
    assert main(["train", "balance", "--extend", first]) == 2
    assert "leave the recipe balance out" in capsys.readouterr().err
    assert main(["train", "--extend", first, "--warm-start", first, "--output", str(tmp_path / "y")]) == 1
    assert "exclude each other" in capsys.readouterr().out


def test_extending_never_imports_code_that_only_the_checkpoint_names(capsys, tmp_path):
    own = "--environment.scenario=tests.scenarios:Endless"
    run = str(tmp_path / "run")
    assert main(["train", own, "--output", run, *TINY]) == 0
    longer = ["train", "--extend", run, "--collection.total-frames=240", "--output", str(tmp_path / "longer")]
    assert main(longer) == 2
    assert "--environment.scenario" in capsys.readouterr().err
    assert main([*longer, own]) == 0


def test_compare_from_the_terminal(capsys, tmp_path):
    reports = []
    for seed in ("1", "2"):
        run, report = str(tmp_path / seed), str(tmp_path / f"{seed}.json")
        assert main(["train", "--output", run, "--seed", seed, *TINY]) == 0
        assert main(["evaluate", run, "--output", report]) == 0
        reports.append(report)
    assert main(["compare", *reports, "--output", str(tmp_path / "comparison.json")]) == 0
    assert "training seeds  1: " in capsys.readouterr().out
    assert read_json(tmp_path / "comparison.json")["configurations"][0]["training_seeds"] == [1, 2]
    assert main(["compare", reports[0], str(tmp_path / "none.json")]) == 1
    assert "none.json" in capsys.readouterr().out


def test_swarm_is_a_scenario_by_name_that_a_checkpoint_may_name(capsys, tmp_path):
    run = str(tmp_path / "run")
    assert main(["train", "--environment.scenario=swarm", "--output", run, *TINY]) == 0
    assert main(["evaluate", run]) == 0
    assert "heuristic mean return" in capsys.readouterr().out


def test_failed_start_leaves_nothing_behind_so_that_the_corrected_command_works(tmp_path, capsys):
    first, second = str(tmp_path / "first"), str(tmp_path / "second")
    assert main(["train", "--output", first, *TINY]) == 0
    assert main(["train", "--extend", first, "--output", second]) == 1
    assert "ask for more" in capsys.readouterr().out
    assert main(["train", "--extend", first, "--output", second, "--collection.total-frames=240"]) == 0


def test_run_that_did_not_finish_cannot_be_extended_and_that_is_said(tmp_path, capsys):
    (tmp_path / "best").mkdir()
    assert main(["train", "--extend", str(tmp_path)]) == 2
    assert "did not finish" in capsys.readouterr().err


def test_comparing_something_else_says_what_to_give(tmp_path, capsys):
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    assert main(["compare", str(tmp_path)]) == 1
    assert "give the file that evaluate --output wrote" in capsys.readouterr().out
    assert main(["compare", str(tmp_path / "binary")]) == 1
    assert "binary: not an evaluation report" in capsys.readouterr().out
