import pytest

from mappo.config import from_dict
from mappo.environment.validation import Check, validate


@pytest.fixture(autouse=True)
def _short_speed_check(monkeypatch):
    monkeypatch.setattr("mappo.environment.checks._SPEED_SECONDS", 0.01)


def outcomes(scenario, **environment):
    config = from_dict(
        {
            "environment": {"scenario": scenario, "max_episode_frames": 40, **environment},
            "collection": {"num_envs": 4},
            "learner": {"minibatch_frames": 100},
        }
    )
    return {check.name: check for check in validate(config, on_check=print).checks}


@pytest.mark.parametrize(
    "scenario", ["navigation", "balance", "wheel", "swarm", "tests.support.scenarios:SoundRace"]
)
def test_sound_environment_fails_no_check(scenario):
    checks = outcomes(scenario)
    assert len(checks) == 13
    assert [check for check in checks.values() if check.outcome == "failed"] == []


def test_random_events_of_one_environment_are_no_leak_into_the_others():
    """Targets of discovery that are found are placed anew, by the random state that all environments share."""
    found = outcomes("discovery", actions="multi-discrete")["independence"]
    assert found.outcome == "passed", found


def test_environment_that_keeps_state_out_of_sight_gets_a_warning_about_resumption():
    found = outcomes("tests.support.scenarios:HiddenState")["resumption"]
    assert found.outcome == "warning"
    assert "observation at frame 1 after it" in found.detail
    assert "keep in attributes" in found.detail


def test_environment_with_joints_passes():
    """VMAS moves the joints of all environments when one is reset, which shows a little in the others."""
    assert outcomes("joint_passage_size")["partial reset"].outcome == "passed"


@pytest.mark.parametrize(
    ("scenario", "check", "advice"),
    [
        ("NanReward", "finite values", "reward of agent 0 is [nan] at frame 11"),
        ("LeakyEnvironments", "independence", "observation at frame 1"),
        ("LeakyReward", "independence", "reward at frame 1"),
        ("UnseededObservations", "seeding", "observation at frame 1"),
        ("LeaksFromTheLast", "independence", "changed environment 0 (reward at frame 1)"),
        (
            "GreedyReset",
            "partial reset",
            "moved agent_0 in the others: reset_world_at(env_index) must write only row",
        ),
        ("LazyReset", "partial reset", "left agent_0 at the origin"),
        ("ForgetsOneAgent", "partial reset", "left agent_1 at the origin"),
        ("AlwaysDone", "time limit", "terminated at frame 1, whatever was done: done() must be false"),
        (
            "Exploding",
            "interface",
            "ZeroDivisionError: the scenario divides by zero, in post_step, scenarios.py line",
        ),
        ("LateExplosion", "time limit", "ZeroDivisionError: too old, in post_step, scenarios.py line"),
        ("ObservationWithoutEnvironments", "interface", "observation() returned float32 [3] for agent_0; with 8"),
        ("ObservationThatGrows", "interface", "observation() returned float32 [8, 2] for agent_0"),
        ("RewardOfAllAgents", "interface", "must return a tensor float32 [8]"),
        ("NumberAsReward", "interface", "reward() returned a float for agent_0"),
        (
            "DoneAsNumbers",
            "interface",
            "done() returned float32 [8]; with 8 environments it must return a tensor bool",
        ),
        ("TerminatingTimeLimit", "time limit", "terminated at frame 20, whatever was done"),
        ("UnboundedReward", "reward scale", "rewards grow with the frame"),
    ],
)
def test_broken_scenario_fails_the_check_that_is_for_it(scenario, check, advice):
    found = outcomes(f"tests.support.scenarios:{scenario}")[check]
    assert found.outcome == "failed"
    assert advice in found.detail


def test_time_limit_reported_as_termination_is_told_where_it_belongs():
    found = outcomes("tests.support.scenarios:TerminatingTimeLimit")["time limit"]
    assert "environment.max_episode_frames = 20" in found.detail


@pytest.mark.parametrize("scenario", ["GreedyClock", "GreedyAgentAttribute"])
def test_reset_that_writes_attributes_of_other_environments_is_a_warning(scenario):
    """Some of VMAS's own scenarios do so a little, football for one; entities that move are a failure."""
    found = outcomes(f"tests.support.scenarios:{scenario}")["partial reset"]
    assert found.outcome == "warning"
    assert "changed the others (observation at frame 1 after it): reset_world_at(env_index) must" in found.detail


def test_end_that_agents_see_coming_is_a_warning():
    found = outcomes("tests.support.scenarios:FiniteHorizon")["time limit"]
    assert found.outcome == "warning"
    assert "terminated at frame 20" in found.detail


def test_sparse_large_reward_is_a_warning():
    assert outcomes("tests.support.scenarios:SparseReward")["reward scale"].outcome == "warning"


def test_nothing_is_checked_after_an_answer_of_the_wrong_shape():
    assert list(outcomes("tests.support.scenarios:NumberAsReward")) == ["device", "environment", "interface"]


def test_large_but_bounded_reward_is_a_warning():
    found = outcomes("tests.support.scenarios:Endless", scenario_kwargs={"reward": 5_000.0})["reward scale"]
    assert found.outcome == "warning"
    assert "scale rewards to about 1" in found.detail


def test_batch_that_cannot_fit_fails_before_training():
    config = from_dict({"collection": {"num_envs": 1_000_000, "rollout_frames": 1_000_000}})
    last = validate(config, on_check=print).checks[-1]
    assert (last.name, last.outcome) == ("memory", "failed")
    assert "collect fewer frames at once" in last.detail


def test_episodes_that_do_not_depend_on_the_seed_are_a_warning():
    found = outcomes("tests.support.scenarios:Endless")["seeding"]
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
