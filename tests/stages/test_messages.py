"""The messages of commands on this machine, as a real server receives them."""

import json

import pytest

from mappo.__main__ import main
from mappo.errors import Preempted, StageFailed
from mappo.reporting.webhook import Webhook
from mappo.stages.notify import notifying
from mappo.stages.runtime import StageResult
from tests.support.webhook import receiver

NOWHERE = "tests.support.scenarios:Nowhere"  # its module exists, so the stage itself finds the mistake


def raising(error):
    def action() -> StageResult:
        raise error

    return action


@pytest.mark.parametrize(
    ("action", "outcome", "reason"),
    [
        (lambda: StageResult({}, {"frames": 360.0}), "succeeded", ""),
        (raising(StageFailed("train: out of memory")), "failed", "train: out of memory"),
        (raising(ZeroDivisionError("by zero")), "failed", "ZeroDivisionError: by zero"),
        (raising(Preempted()), "interrupted", "SIGTERM ended the process; the same command resumes it"),
    ],
)
def test_end_of_a_command_is_told_and_stays_the_same(action, outcome, reason):
    with receiver() as server:
        act = notifying(Webhook(server.url, "json"), "run first", {"run": "runs/first"}, action)
        if outcome == "succeeded":
            assert act().metrics == {"frames": 360.0}
        else:
            with pytest.raises((StageFailed, ZeroDivisionError, Preempted)):
                act()
        body = json.loads(server.requests[0].body)
    assert (body["subject"], body["outcome"], body["reason"]) == ("run first", outcome, reason)
    assert body["results"] == ({"frames of training": "360"} if outcome == "succeeded" else {})


def test_ctrl_c_sends_no_message():
    with receiver() as server:
        with pytest.raises(KeyboardInterrupt):
            notifying(Webhook(server.url, "json"), "a", {}, raising(KeyboardInterrupt()))()
        assert server.requests == []


def test_failed_command_sends_its_reason_and_keeps_its_exit_status(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with receiver() as server:
        monkeypatch.setenv("MAPPO_NOTIFY_URL", f"{server.url}/secret-path")
        assert main(["train", "--environment.scenario", NOWHERE, "--run", "first", "--notify"]) == 2
        body = json.loads(server.requests[0].body)
    assert (body["subject"], body["outcome"]) == ("run first", "failed")
    assert NOWHERE in body["reason"]
    assert "secret-path" not in "".join(capsys.readouterr())


@pytest.mark.parametrize("url", ["", "secret-path"])
def test_notify_without_a_webhook_is_refused_before_anything_runs(url, monkeypatch, capsys):
    monkeypatch.setenv("MAPPO_NOTIFY_URL", url)
    assert main(["train", "--notify"]) == 2
    error = capsys.readouterr().err
    assert "MAPPO_NOTIFY_URL" in error
    assert "secret-path" not in error
