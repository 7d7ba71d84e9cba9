"""The house: its import contract holds, is complete, and is what docs/architecture.md draws."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.machinery import PathFinder
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][0]["layers"]
LINES = 350  # of a file, beyond which its docstring says why
PACKAGES = ("mappo", "components", "pipelines")


@pytest.fixture
def house(tmp_path: Path) -> Path:
    """A copy of the packages and of their contracts."""
    for name in PACKAGES:
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def check(house: Path) -> str:
    """Return what import-linter prints of broken contracts; empty when all are kept."""
    command = "import sys; sys.path.insert(0, ''); from importlinter import cli; cli.lint_imports_command()"
    run = subprocess.run(
        [sys.executable, "-c", command, "--no-cache"], cwd=house, capture_output=True, text=True, check=False
    )
    assert run.returncode in (0, 1), run.stdout + run.stderr
    return run.stdout if run.returncode else ""


def test_import_contracts_are_kept(house):
    assert check(house) == ""


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("mappo/errors.py", "import mappo.config", "mappo.errors is not allowed to import mappo.config"),
        ("mappo/runs/store.py", "import mappo.training.training", "mappo.runs is not allowed to import"),
        ("mappo/tuning/plan.py", "import mappo.tuning.study", "No cycles are allowed in mappo.tuning"),
        ("pipelines/plan.py", "import pipelines.sizes", "No cycles are allowed in pipelines"),
        ("mappo/stray.py", "", "stray"),
        ("mappo/learning/networks.py", "import boto3", "mappo.learning.networks -> boto3"),
        ("mappo/training/training.py", "import pipelines.plan", "mappo.training.training -> pipelines.plan"),
    ],
)
def test_planted_import_or_module_breaks_a_contract(house, file, text, message):
    path = house / file
    path.write_text(f"{path.read_text() if path.exists() else ''}\n{text}\n")
    assert message in check(house)


def test_architecture_page_draws_the_contract():
    drawn = re.search(r"\n\n((?:    [a-z_| ]+\n)+)\n`make check`", (ROOT / "docs/architecture.md").read_text())
    assert [line.strip() for line in drawn[1].splitlines()] == LAYERS


def test_architecture_page_names_files_that_exist():
    text = (ROOT / "docs/architecture.md").read_text()
    for folder, first in re.findall(r"^\| `([\w/]+/)` \|.*\| `([\w.]+)`", text, re.M):
        assert (ROOT / folder / first).exists(), folder + first
    wings = {line.split("/")[1] for line in re.findall(r"^\| `(mappo/\w+)/", text, re.M)}
    assert wings == {path.name for path in (ROOT / "mappo").iterdir() if (path / "__init__.py").exists()}


def test_stages_and_components_have_the_same_names():
    components = {path.stem for path in (ROOT / "components").glob("[a-z]*.py")} - {"executor", "placeholders"}
    shared = {"readable_errors", "runtime", "run_cell", "whole_matrix", "whole_study", "worker_processes"}
    stages = {path.stem for path in (ROOT / "mappo" / "stages").glob("[a-z]*.py")} - shared
    assert components == stages


def test_file_of_a_component_hides_no_package():
    """Kubeflow's executor puts the folder of components first on Python's path, before installed packages."""
    names = [path.stem for path in (ROOT / "components").glob("*.py") if path.stem not in ("__init__", "__main__")]
    installed = [path for path in sys.path if path and Path(path).resolve() != ROOT]
    assert [name for name in names if PathFinder.find_spec(name, installed)] == []


@pytest.mark.parametrize("path", sorted((ROOT / "mappo").glob("*/__init__.py")), ids=lambda path: path.parent.name)
def test_init_of_a_wing_holds_only_a_docstring(path):
    (docstring,) = ast.parse(path.read_text()).body
    assert isinstance(docstring, ast.Expr)


@pytest.mark.parametrize("package", PACKAGES)
def test_file_is_short_or_says_why_not(package):
    for path in (ROOT / package).rglob("*.py"):
        text = path.read_text()
        if len(text.splitlines()) > LINES:
            assert "This file is long" in (ast.get_docstring(ast.parse(text)) or ""), path.relative_to(ROOT)


def test_basenames_of_modules_are_unique_but_for_stages_and_components():
    files = [path for path in (ROOT / "mappo").rglob("[a-z]*.py") if path.parent.name not in ("cli", "stages")]
    names = [path.stem for path in files]
    assert len(names) == len(set(names))
