"""The time limit of a trial: a hang ends, wherever the worker hangs."""

import subprocess
import sys
import textwrap
import time

import pytest

from mappo.errors import TrialOverdue
from mappo.recipes import recipe
from mappo.tuning.database import Database
from mappo.tuning.plan import Plan
from mappo.tuning.search_space import default_space
from mappo.tuning.study import Study
from mappo.tuning.study_config import TuningConfig

CONFIG = recipe("navigation")
TUNING = TuningConfig(grace_seconds=2, trial_hours=1 / 3600)
PLAN = Plan(CONFIG, default_space(CONFIG), TUNING)


@pytest.fixture
def study(tmp_path):
    database = Database(f"sqlite:///{tmp_path}/studies.db")
    yield Study.prepare(database, "s", PLAN, 2)
    database.close()


def test_python_code_that_hangs_is_interrupted(study):
    with study.claim("w") as claim:
        with pytest.raises(TrialOverdue, match="took longer than tuning.trial_hours = 0.000277778, or hung"):
            time.sleep(60)
        assert claim.is_overdue
        claim.finish("failed", reason=claim.overdue_reason)
    with study.claim("w") as claim:  # the limit of one trial leaves the next alone
        assert not claim.is_overdue
        claim.finish("complete", 1.0)


HANGS = {
    "a loop that catches every exception": """
        import time
        while True:
            try:
                time.sleep(60)
            except BaseException:
                pass
    """,
    "a native call": """
        import ctypes
        mutex, libc = ctypes.create_string_buffer(256), ctypes.CDLL(None)
        libc.pthread_mutex_lock(mutex)
        libc.pthread_mutex_lock(mutex)
    """,
    "a native call that holds Python's lock": """
        import ctypes
        mutex, libc = ctypes.create_string_buffer(256), ctypes.PyDLL(None)
        libc.pthread_mutex_lock(mutex)
        libc.pthread_mutex_lock(mutex)
    """,
}


@pytest.mark.parametrize("hang", HANGS)
def test_a_worker_whose_hang_cannot_be_interrupted_ends_and_leaves_the_trial(study, tmp_path, hang):
    program = f"""
        import logging
        from mappo.tuning.database import Database
        from mappo.tuning.study import Study
        logging.basicConfig()
        with Study.load(Database("sqlite:///{tmp_path}/studies.db"), "s").claim("hangs"):
            {textwrap.indent(textwrap.dedent(HANGS[hang]), " " * 12).strip()}
    """
    process = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=60, check=False
    )
    assert process.returncode == 1, process.stderr
    claim = study.claim("other")
    (trial, *_) = study.trials()
    if "lock" in hang:  # no heartbeat was sent either, so that another worker may have the trial
        assert claim is None or claim.number == 0
        return
    assert "cannot be interrupted, so this worker ends" in process.stderr
    assert (trial.state, trial.reason) == ("failed", "took longer than tuning.trial_hours = 0.000277778, or hung")
    assert claim.number == 1
