import os
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from mappo.errors import SimulationStateError
from mappo.training import forked_trial
from mappo.training.forked_trial import require_success


def nothing():
    pass


def fail():
    raise KeyError("no\nsuch name")


def exit_with_success():
    raise SystemExit(0)


def endless_in_c():
    max(range(10**15))


def endless_in_python():
    while True:
        pass


def swallow_everything():
    while True:
        with suppress(BaseException):
            time.sleep(1)


@pytest.mark.parametrize(
    ("attempt", "reason"),
    [
        (fail, r"KeyError: 'no\\nsuch name'"),
        (exit_with_success, "SystemExit: 0"),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "it ends the process, with status -9"),
        (lambda: os._exit(0), "it ends the process, with status 0"),
        (endless_in_c, "it takes more than 0 s"),
        (endless_in_python, "it takes more than 0 s"),
        (swallow_everything, "it takes more than 0 s"),
    ],
)
def test_trial_that_fails_or_never_ends_is_an_error(attempt, reason, monkeypatch):
    monkeypatch.setattr(forked_trial, "SECONDS", 0.2)
    with pytest.raises(SimulationStateError, match=f"the restored simulation cannot be played: {reason}"):
        require_success(nothing, attempt)


def test_trial_changes_nothing_in_this_process():
    tensor, state = torch.zeros(3), torch.get_rng_state()

    def attempt():
        tensor.add_(torch.rand(3))
        torch.set_num_threads(7)

    threads, children = torch.get_num_threads(), _children()
    require_success(nothing, attempt)
    assert torch.equal(tensor, torch.zeros(3))
    assert torch.equal(state, torch.get_rng_state())
    assert torch.get_num_threads() == threads
    assert _children() == children, "the copy is gone"


def _children():
    return Path(f"/proc/self/task/{os.getpid()}/children").read_text()


def test_trial_may_take_longer_than_the_limit_if_its_rehearsal_does(monkeypatch):
    monkeypatch.setattr(forked_trial, "SECONDS", 0.2)
    require_success(lambda: time.sleep(0.1), lambda: time.sleep(1.0))


def test_nothing_is_tried_where_the_task_itself_fails():
    require_success(fail, fail)
