"""The test command passes wherever a user starts it."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROGRAM = """
import os, signal, subprocess
from tests.support.surroundings import set_surroundings
set_surroundings()
print(sorted(name for name in os.environ if name.startswith(("MAPPO_", "AWS_"))))
for number in (signal.SIGINT, signal.SIGTERM):
    print(subprocess.run(["sh", "-c", f"kill -{number.value} $$; echo alive"], capture_output=True).returncode)
try:
    signal.raise_signal(signal.SIGINT)
except KeyboardInterrupt:
    print("interrupted")
"""


@pytest.mark.parametrize("prefix", ["trap '' INT TERM; ", "nohup "])
def test_signals_and_settings_are_the_same_when_the_shell_ignores_ctrl_c_and_the_user_has_settings(prefix):
    settings = "export MAPPO_DATABASE=sqlite:///a MAPPO_REQUIRE_SERVICES=1 AWS_PROFILE=mine"
    run = subprocess.run(
        ["bash", "-c", f'{settings}; {prefix}"$0" -c "$1" & wait $!', sys.executable, PROGRAM],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.stdout.splitlines() == ["['MAPPO_REQUIRE_SERVICES']", "-2", "-15", "interrupted"], run.stderr
