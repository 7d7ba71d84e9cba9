import pytest

from mappo.config import from_dict
from mappo.validate import Check, validate


def outcomes(scenario, **environment):
    config = from_dict(
        {
            "environment": {"scenario": scenario, "max_episode_frames": 40, **environment},
            "collection": {"num_envs": 4},
            "learner": {"minibatch_frames": 100},
        }
    )
    return {check.name: check for check in validate(config, on_check=print).checks}


@pytest.mark.parametrize("scenario", ["navigation", "balance", "tests.scenarios:Endless"])
def test_sound_environment_fails_no_check(scenario):
    checks = outcomes(scenario)
    assert len(checks) == 10
    assert [check for check in checks.values() if check.outcome == "failed"] == []


def test_environment_with_joints_passes():
    assert outcomes("joint_passage_size")["partial reset"].outcome == "passed"


@pytest.mark.parametrize(
    ("scenario", "check", "advice"),
    [
        ("NanReward", "finite values", "reward of agent 0 is [nan] at frame 11"),
        ("LeakyEnvironments", "independence", "observation at frame 1"),
        ("UnseededObservations", "seeding", "observation at frame 1"),
        ("GreedyReset", "partial reset", "reset_world_at(env_index)"),
        ("Exploding", "finite values", "ZeroDivisionError: the scenario divides by zero"),
    ],
)
def test_broken_scenario_fails_the_check_that_is_for_it(scenario, check, advice):
    found = outcomes(f"tests.scenarios:{scenario}")[check]
    assert found.outcome == "failed"
    assert advice in found.detail


def test_time_limit_reported_as_termination_is_a_warning():
    found = outcomes("tests.scenarios:TerminatingTimeLimit")["time limit"]
    assert found.outcome == "warning"
    assert "max_episode_frames" in found.detail
    assert "frame 20" in found.detail


def test_episodes_that_do_not_depend_on_the_seed_are_a_warning():
    found = outcomes("tests.scenarios:Endless")["seeding"]
    assert found.outcome == "warning"


def test_environment_that_cannot_be_built_ends_the_checks_there():
    checks = outcomes("navigtion")
    assert list(checks) == ["device", "environment"]
    assert "did you mean navigation?" in checks["environment"].detail


def test_missing_device_ends_the_checks_there():
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    heard = []
    report = validate(from_dict({"device": "cuda"}), heard.append)
    assert [(check.name, check.outcome) for check in report.checks] == [("device", "failed")]
    assert heard == report.failures
    assert isinstance(heard[0], Check)
