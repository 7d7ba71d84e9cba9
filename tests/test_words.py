"""The words of the code: docstrings begin with a verb or an article, help texts with no paraphrase."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("mappo", "components", "pipelines", "k8s", "benchmarks", "tests")
ARTICLES = {"The", "A", "An"}
VERBS = set((ROOT / "tests" / "data" / "verbs.txt").read_text().split())  # that docstrings begin with today
PARAPHRASES = ("what ", "of ", "that of ", "by ", "as ", "in ", "who ", "whether ", "how ", "where ")
COMMANDS = re.compile(r"`(mappo|python -m|make) ")  # a module may begin with the command that it implements


def docstrings(path: Path) -> dict[int, str]:
    """Return the docstrings of a file by line, except those of tests, whose names are their claims."""
    found = {}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text and not getattr(node, "name", "").startswith("test_"):
                found[getattr(node, "lineno", 1)] = text
    return found


def begins_plainly(text: str) -> bool:
    """Return whether a docstring begins with a verb, or with an article and a noun."""
    first = re.split(r"\W", text, maxsplit=1)[0]
    return first in ARTICLES | VERBS or bool(COMMANDS.match(text))


@pytest.mark.parametrize(
    "text", ["What it does.", "Of one slot.", "Whether it ends.", "That of the run.", "Returns it."]
)
def test_paraphrase_does_not_begin_plainly(text):
    assert not begins_plainly(text)


@pytest.mark.parametrize("folder", FOLDERS)
def test_docstring_begins_with_a_verb_or_an_article(folder):
    unclear = [
        f"{path.relative_to(ROOT)}:{line}: {text.splitlines()[0]}"
        for path in sorted((ROOT / folder).rglob("*.py"))
        for line, text in docstrings(path).items()
        if not begins_plainly(text)
    ]
    assert unclear == []


def help_texts(path: Path) -> dict[int, str]:
    """Return the texts of `help=` and `description=` in a file, by line."""
    return {
        keyword.value.lineno: keyword.value.value
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        for keyword in node.keywords
        if keyword.arg in ("help", "description")
        and isinstance(keyword.value, ast.Constant)
        and isinstance(keyword.value.value, str)
    }


@pytest.mark.parametrize("folder", ["mappo", "components", "pipelines", "k8s", "benchmarks"])
def test_help_text_begins_with_no_paraphrase(folder):
    unclear = [
        f"{path.relative_to(ROOT)}:{line}: {text}"
        for path in sorted((ROOT / folder).rglob("*.py"))
        for line, text in help_texts(path).items()
        if text.lower().startswith(PARAPHRASES)
    ]
    assert unclear == []
