"""Check the Dockerfile without a build; tests/test_image.py builds it."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "Dockerfile").read_text()


def test_dockerfile_passes_hadolint():
    program = Path(sys.executable).with_name("hadolint")
    result = subprocess.run([program, ROOT / "Dockerfile"], capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout) == (0, ""), result.stderr


def test_last_stage_has_a_numeric_user_and_an_entry_point_that_receives_signals():
    last = TEXT.rpartition("\nFROM ")[2]
    assert re.search(r"^USER [1-9]\d+:[1-9]\d+$", last, re.MULTILINE)
    assert re.search(r'^ENTRYPOINT \["mappo"\]$', last, re.MULTILINE), "a shell would not pass SIGTERM on"


def test_build_context_holds_only_the_copied_files():
    """The git history, runs, secrets and virtual environments in the directory are excluded."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    ignored = [line for line in lines if not line.startswith("#")]
    assert ignored[0] == "*"
    allowed = {line.removeprefix("!").rstrip("/") for line in ignored if line.startswith("!")}
    copied = {
        name for line in re.findall(r"^COPY (?!--from)(.*) \S+$", TEXT, re.MULTILINE) for name in line.split()
    }
    assert allowed == copied
