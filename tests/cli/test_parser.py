"""The errors of mistyped commands, flags and values suggest the right one; help shows defaults."""

import pytest

import pipelines.__main__
from mappo.__main__ import main


@pytest.mark.parametrize(
    ("command", "error"),
    [
        ("trian", "mappo: error: argument COMMAND: 'trian' is unknown; did you mean train?"),
        ("checkpoints lst x", "mappo checkpoints: error: argument ACTION: 'lst' is unknown; did you mean list?"),
        (
            "train --learner.clip-epsilom 1",
            "mappo train: error: --learner.clip-epsilom: there is no such flag; did",
        ),
        ("train --clip-epsilon 0.1", "did you mean --learner.clip-epsilon?"),
        ("train --clip-epsilon=0.1", "did you mean --learner.clip-epsilon?"),
        ("train --quiet", "--quiet: there is no such flag; `mappo train --help` lists all"),
        ("train navigation balance", "mappo train: error: one argument too many: balance"),
        ("evaluate --run first", "mappo evaluate: error: --run: there is no such flag; give RUN without a flag"),
        ("--seed 3 train", "--seed: there is no such flag; flags follow the command"),
        ("train --environment.actions discret", "'discret' is unknown; did you mean discrete?"),
        ("train --networks.share-policy True", "'True' is unknown; did you mean true?"),
        ("completion zish", "'zish' is unknown; did you mean zsh?"),
    ],
)
def test_mistyped_word_exits_with_2_and_a_suggestion(command, error, capsys):
    with pytest.raises(SystemExit) as end:
        main(command.split())
    assert end.value.code == 2
    assert error in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "error"),
    [
        ("submitt", "'submitt' is unknown; did you mean submit?"),
        ("runs lst", "pipelines runs: error: argument VERB: 'lst' is unknown; did you mean list?"),
        ("run --learner.clip-epsilom 1", "did you mean --learner.clip-epsilon?"),
        ("runs list --limt 3", "pipelines runs list: error: --limt: there is no such flag; did you mean --limit?"),
        ("runs list --lim 3", "--lim: there is no such flag; did you mean --limit?"),
    ],
)
def test_mistyped_word_of_pipelines_exits_with_2_and_a_suggestion(command, error, capsys):
    with pytest.raises(SystemExit) as end:
        pipelines.__main__.main(command.split())
    assert end.value.code == 2
    assert error in capsys.readouterr().err


def test_text_that_looks_like_a_flag_may_be_a_value(capsys):
    assert main(["show-config", "--environment.scenario=--no:Flag"]) == 0
    assert '"scenario": "--no:Flag"' in capsys.readouterr().out


@pytest.mark.parametrize("program", [main, pipelines.__main__.main])
def test_both_programs_say_their_version(program, capsys):
    with pytest.raises(SystemExit) as end:
        program(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out.startswith("mappo 0.")


@pytest.mark.parametrize(
    ("command", "flag", "default"),
    [
        ("train", "--learner.clip-epsilon", "default: 0.2"),
        ("train", "--networks.hidden-sizes", "default: 256,256"),
        ("train", "--networks.share-policy", "default: true"),
        ("train", "--environment.scenario-kwargs", '{"n_agents": 3, "shared_rew": false, "lidar_range": 0.35}'),
        ("tune", "--seed", "default: 0"),
    ],
)
def test_help_shows_the_defaults_of_the_default_recipe(command, flag, default, capsys):
    text = help_of(command, capsys)
    section = text[text.index(f" {flag} ") :]
    assert default in section[: section.index(" --", 5)]
    assert "Defaults of fields are those of the recipe navigation" in text


def test_help_of_evaluate_shows_no_default_because_the_run_has_them(capsys):
    assert "default: 0.2" not in help_of("evaluate", capsys)


def help_of(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    return " ".join(capsys.readouterr().out.split())
