import re
import shlex
from pathlib import Path

import pytest

import mappo.__main__
import pipelines.__main__
from mappo.cli.arguments import config_from_arguments
from mappo.errors import ConfigError
from mappo.recipes import RECIPES
from mappo.training.history import COLUMNS

ROOT = Path(__file__).parents[1]
COMMANDS = re.findall(
    r"^    (?:\$ )?((?:mappo|python -m pipelines) (?!.*error:).*?)\s*(?:#.*)?$",
    "\n".join(path.read_text() for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]),
    re.MULTILINE,
)


@pytest.mark.parametrize("command", COMMANDS)
def test_command_in_readme_and_docs_is_understood(command):
    """Every command parses, and its flags make a configuration unless README shows the error."""
    words = shlex.split(command.split(" > ")[0])
    module = mappo.__main__ if words[0] == "mappo" else pipelines.__main__
    arguments = module._parser().parse_args(words[1:] if words[0] == "mappo" else words[3:])
    if getattr(arguments, "recipe", "") in (None, *RECIPES) and arguments.config is None:
        assert f"error: {_error(arguments)}" in (ROOT / "README.md").read_text() or not _error(arguments)


def _error(arguments):
    try:
        config_from_arguments(arguments)
    except ConfigError as error:
        return str(error)
    return ""


def test_recipes_page_shows_what_the_command_prints(capsys):
    mappo.__main__.main(["recipes"])
    assert capsys.readouterr().out.strip() in (ROOT / "docs" / "recipes.md").read_text()


@pytest.mark.parametrize(("module", "column"), [(mappo.__main__, 2), (pipelines.__main__, 3)])
def test_help_and_documentation_have_the_same_exit_statuses(module, column):
    table = (ROOT / "docs" / "commands.md").read_text().partition("## Exit status")[2].partition("\n## ")[0]
    rows = [re.split(r"(?<!\\)\|", line) for line in table.splitlines() if re.match(r"\| \d", line)]
    documented = [row[1].strip() for row in rows if row[column].strip()]
    statuses = module._EXAMPLES.partition("exit status: ")[2]
    assert re.findall(r"(?:^|; )\s*(\d+) ", statuses.replace("\n", " ")) == documented


def test_readme_names_every_recipe():
    text = (ROOT / "README.md").read_text()
    assert [name for name in RECIPES if f"`{name}`" not in text] == []


def test_readme_counts_dashboards_and_alerts_right():
    text = " ".join((ROOT / "README.md").read_text().split())
    dashboards = list((ROOT / "k8s/components/dashboards").glob("*.json"))
    alerts = (ROOT / "k8s/components/alerts/rules.yaml").read_text().count("alert: ")
    assert (len(dashboards), alerts) == (3, 11)
    assert "three Grafana dashboards and eleven alerts" in text


def test_readme_has_no_placeholder():
    assert "@@" not in (ROOT / "README.md").read_text()


def test_readme_shows_commands_of_both_terminals():
    assert len(COMMANDS) >= 10


def test_every_column_of_the_history_is_explained():
    vocabulary = (ROOT / "docs" / "vocabulary.md").read_text()
    assert [name for name in COLUMNS if not re.search(rf"\b{name}\b", vocabulary)] == []
