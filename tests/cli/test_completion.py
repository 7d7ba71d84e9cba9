"""The completion scripts in the shells themselves."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.services import missing

_BASH = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1))
"$(complete -p "$1" | sed 's/.*-F \\([^ ]*\\).*/\\1/')" 2>/dev/null
printf '%s\\n' "${COMPREPLY[@]}"
"""
_FISH = "source $argv[1]; complete -C (string join -- ' ' $argv[2..])"


@pytest.fixture(scope="module", params=["bash", "fish"])
def complete(request, tmp_path_factory):
    """Return a function that returns what a shell offers for the last word of a command."""
    shell = shutil.which(request.param) or missing(request.param, f"sudo apt install {request.param}")
    directory = tmp_path_factory.mktemp(request.param)

    def run(*words: str) -> set[str]:
        module = "mappo" if words[0] == "mappo" else "pipelines"
        script = directory / module
        if not script.exists():
            command = [sys.executable, "-m", module, "completion", request.param]
            script.write_bytes(subprocess.run(command, check=True, capture_output=True).stdout)
        arguments = ["--no-config", "-c", _FISH] if request.param == "fish" else ["-c", _BASH, "bash"]
        environment = {"HOME": str(directory), "PATH": "/usr/bin:/bin"}
        output = subprocess.run(
            [shell, *arguments, str(script), *words],
            cwd=Path(__file__).parents[2],
            env=environment,
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        return {line.partition("\t")[0] for line in output.splitlines()} - {""}

    return run


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["mappo", "tra"], {"train"}),
        (["mappo", "train", "navigation-"], {"navigation-quick", "navigation-ippo"}),
        (["mappo", "train", "--learner.cl"], {"--learner.clip-epsilon"}),
        (["mappo", "train", "--environment.actions", "mul"], {"multi-discrete"}),
        (["mappo", "checkpoints", "v"], {"verify"}),
        (["mappo-pipelines", "sched"], {"schedule"}),
        (["mappo-pipelines", "schedule", "tri"], {"trigger"}),
    ],
)
def test_shell_offers_commands_flags_and_values(complete, words, offered):
    assert complete(*words) == offered


def test_zsh_accepts_its_script(tmp_path):
    shell = shutil.which("zsh") or missing("zsh", "sudo apt install zsh")
    script = subprocess.run(
        [sys.executable, "-m", "mappo", "completion", "zsh"], check=True, capture_output=True, text=True
    ).stdout
    assert script.startswith("#compdef mappo\n")
    subprocess.run([shell, "-n"], input=script, check=True, text=True)
