"""Run the pipeline as `make run` does, and write the end of its output into README.

    python -m benchmarks.readme

Run it on an idle machine, since README shows times. A test compares the form of README's text with what the
pipeline prints, and its configuration with the default one.
"""

import re
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import mappo
from mappo.config import config_hash
from mappo.recipes import DEFAULT_RECIPE, recipe

README = Path(__file__).parents[1] / "README.md"
_SAMPLE = re.compile(
    r"<!-- mappo (?P<version>\S+), configuration (?P<config>\w+), by `python -m benchmarks.readme` -->\n"
    r"```\n(?P<text>.*?)```\n",
    re.DOTALL,
)
_BEGINNING = re.compile(r"^\[train\] [\d,]+ frames in ", re.MULTILINE)
_SHOWN_STORE = "/home/you/mappo/runs"


def main() -> None:
    """Run the pipeline and replace README's text."""
    with TemporaryDirectory() as store:
        command = [sys.executable, "-m", "pipelines", "run", "--store", store]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        text = sample_of(output, store)
    made = f"mappo {mappo.__version__}, configuration {current_config()}, by `python -m benchmarks.readme`"
    readme, count = _SAMPLE.subn(lambda _: f"<!-- {made} -->\n```\n{text}```\n", README.read_text())
    assert count == 1
    README.write_text(readme)
    print(text, end="")


def sample_of(output: str, store: str) -> str:
    """Return the end of a pipeline's output as README shows it: another store, and short paths of artifacts."""
    match = _BEGINNING.search(output)
    assert match, output
    text = output[match.start() :].replace(store, _SHOWN_STORE)
    return re.sub(r"mappo-training-[^/]+", "mappo-training-...", text)


def sample_in_readme() -> tuple[str, str]:
    """Return the text that README shows, and the hash of its configuration."""
    match = _SAMPLE.search(README.read_text())
    assert match, "README has no sample of the pipeline's output"
    return match["text"], match["config"]


def current_config() -> str:
    """Return the hash of the default configuration, as commands print it."""
    return config_hash(recipe(DEFAULT_RECIPE))[:12]


def form_of(text: str) -> list[str]:
    """Return the lines of a text without what differs between runs: numbers, names, widths of columns."""
    lines = [re.sub(r"/runs/[\w-]+|/run(?=[/ ])", "/runs/NAME", line) for line in text.splitlines()]
    return [" ".join(re.sub(r"-?\d[\d,.e+-]*", "N", line).replace("seeds", "seed").split()) for line in lines]


if __name__ == "__main__":
    main()
