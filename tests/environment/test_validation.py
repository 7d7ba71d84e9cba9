import re
import signal

import pytest

from mappo.config import from_dict
from mappo.environment import validation
from mappo.environment.environment import make_environment
from mappo.environment.keys import ACTION
from mappo.environment.random_streams import Stream, private_random_streams
from mappo.environment.validation import Check, validate
from mappo.training.first_iteration import rehearse_first_iteration
from tests.conftest import CPU


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
    assert len(checks) == 15
    assert [check for check in checks.values() if check.outcome == "failed"] == []


def test_independence_passes_when_environments_share_a_random_state():
    """In discovery, a target that an agent has reached moves to a position from the shared random state."""
    check = outcomes("discovery", actions="multi-discrete")["independence"]
    assert check.outcome == "passed", check


def test_resumption_is_a_warning_when_a_closure_holds_state():
    check = outcomes("tests.support.scenarios:HiddenState")["resumption"]
    assert check.outcome == "warning"
    assert "observation at frame 1 after it" in check.detail
    assert "keep in attributes" in check.detail


def test_environment_with_joints_passes():
    """VMAS moves the joints of all environments when one is reset, which slightly changes the others."""
    assert outcomes("joint_passage_size")["partial reset"].outcome == "passed"


def test_entities_may_stay_at_the_origin_if_nothing_depends_on_where_they_are():
    """In simple_crypto, agents only talk: its reset of one environment draws a new secret and places nobody."""
    check = outcomes("simple_crypto")["partial reset"]
    assert (check.outcome, check.detail.partition("; ")[2]) == (
        "passed",
        "it leaves eve_0, bob_0, alice_0 at the origin, on which nothing depends",
    )


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
        ("LazyReset", "partial reset", "left agent_0, agent_1 at the origin"),
        ("ForgetsOneAgent", "partial reset", "left agent_1 at the origin"),
        ("AlwaysDone", "time limit", "terminated at frame 1, whatever the actions: done() must return false"),
        (
            "Exploding",
            "interface",
            "ZeroDivisionError: the scenario divides by zero (in post_step, scenarios.py line",
        ),
        ("LateExplosion", "time limit", "ZeroDivisionError: too old (in post_step, scenarios.py line"),
        ("ObservationWithoutEnvironments", "interface", "observation() returned float32 [3] for agent_0; with 8"),
        ("ObservationThatGrows", "interface", "observation() returned float32 [8, 2] for agent_0"),
        ("RewardOfAllAgents", "interface", "must return a tensor float32 [8]"),
        ("NumberAsReward", "interface", "reward() returned a float for agent_0"),
        (
            "DoneAsNumbers",
            "interface",
            "done() returned float32 [8]; with 8 environments it must return a tensor bool",
        ),
        ("TerminatingTimeLimit", "time limit", "terminated at frame 20, whatever the actions"),
        ("UnboundedReward", "reward scale", "rewards grow with the frame"),
        (
            "StickyDone",
            "forgetting",
            "right after a reset of environment 0, because no reset clears scenario.reached",
        ),
        ("ForgetsTimer", "forgetting", "resetting environment 0 alone keeps scenario.timer of the episode before"),
        ("NoRange", "environment", "the ranges of all actions are 0, so there is nothing to learn"),
        ("NegativeRange", "environment", "component 1 of the action of weak has the range 0.5 to -0.5"),
        ("BreaksWhenBuilt", "environment", "KeyError: 'radius' (in _radius, scenarios.py line"),
    ],
)
def test_broken_scenario_fails_its_check(scenario, check, advice):
    result = outcomes(f"tests.support.scenarios:{scenario}")[check]
    assert result.outcome == "failed"
    assert advice in result.detail


def test_failure_names_the_right_option_when_a_time_limit_is_a_termination():
    check = outcomes("tests.support.scenarios:TerminatingTimeLimit")["time limit"]
    assert "environment.max_episode_frames = 20" in check.detail


@pytest.mark.parametrize("scenario", ["GreedyClock", "GreedyAgentAttribute"])
def test_reset_that_writes_attributes_of_other_environments_is_a_warning(scenario):
    """Some VMAS scenarios, such as football, have a small effect of this kind. Moved entities are a failure."""
    check = outcomes(f"tests.support.scenarios:{scenario}")["partial reset"]
    assert check.outcome == "warning"
    assert "changed the others (observation at frame 1 after it): reset_world_at(env_index) must" in check.detail


def test_fixed_end_of_the_task_is_a_warning_when_observations_show_the_time():
    check = outcomes("tests.support.scenarios:FiniteHorizon")["time limit"]
    assert check.outcome == "warning"
    assert "terminated at frame 20" in check.detail


def test_measurements_are_listed_with_what_is_left_out_of_them():
    check = outcomes("navigation")["measurements"]
    assert (check.outcome, check.detail) == ("passed", "agent_collisions (sum), final_rew (last), pos_rew (sum)")
    check = outcomes("tests.support.scenarios:ManyMeasurements")["measurements"]
    assert "; left out of info(): 'line\\nbreak', '" in check.detail
    assert check.detail.endswith(f"{', '.join(f'number {index}' for index in range(20, 30))}, position")
    assert outcomes("swarm")["measurements"].detail == "none"


def test_declared_measurement_that_info_does_not_return_is_a_warning():
    check = outcomes("tests.support.scenarios:Measured")["measurements"]
    assert check.outcome == "warning"
    assert "no numbers [envs] named misspelt over 30 frames: correct MEASUREMENTS or info()" in check.detail


def test_sparse_large_reward_is_a_warning():
    assert outcomes("tests.support.scenarios:SparseReward")["reward scale"].outcome == "warning"


def test_checks_end_when_a_result_has_the_wrong_shape():
    assert list(outcomes("tests.support.scenarios:NumberAsReward")) == ["device", "environment", "interface"]


def test_large_but_bounded_reward_is_a_warning():
    check = outcomes("tests.support.scenarios:Endless", scenario_kwargs={"reward": 5_000.0})["reward scale"]
    assert check.outcome == "warning"
    assert "scale rewards to about 1" in check.detail


def test_batch_that_cannot_fit_fails_before_training():
    config = from_dict({"collection": {"num_envs": 1_000_000, "rollout_frames": 1_000_000}})
    last_check = validate(config, on_check=print).checks[-1]
    assert (last_check.name, last_check.outcome) == ("memory", "failed")
    assert "collect fewer frames at once" in last_check.detail


def test_episodes_that_do_not_depend_on_the_seed_are_a_warning():
    check = outcomes("tests.support.scenarios:Endless")["seeding"]
    assert check.outcome == "warning"


def test_checks_end_when_the_environment_cannot_be_built():
    checks = outcomes("navigtion")
    assert list(checks) == ["device", "environment"]
    assert "did you mean navigation?" in checks["environment"].detail


def test_checks_end_when_the_device_is_missing():
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    reported = []
    report = validate(from_dict({"device": "cuda"}), reported.append)
    assert [(check.name, check.outcome) for check in report.checks] == [("device", "failed")]
    assert reported == report.failures
    assert isinstance(reported[0], Check)


def test_state_that_resets_keep_is_a_warning_with_its_name():
    check = outcomes("tests.support.scenarios:KeepsSeason")["forgetting"]
    assert check.outcome == "warning"
    assert "resets keep scenario.timer of the episode before" in check.detail


@pytest.mark.parametrize("scenario", ["OwnRanges", "FixedComponent", "OddInfo"])
def test_first_iteration_works_with_ranges_by_agent_and_odd_information(scenario):
    config = from_dict({"environment": {"scenario": f"tests.support.scenarios:{scenario}"}})
    assert "a batch of 16 frames is collected and learnt from" in rehearse_first_iteration(config)


def test_actions_keep_the_range_of_each_agent():
    config = from_dict({"environment": {"scenario": "tests.support.scenarios:OwnRanges"}}).environment
    with private_random_streams(0, Stream.TRAINING, CPU):
        environment = make_environment(config, 64, 0, Stream.TRAINING, CPU)
        largest = environment.rand_action()[ACTION].abs().amax((0, 2))
    assert largest[0] == pytest.approx(1.0, abs=0.1)
    assert largest[1] == pytest.approx(0.5, abs=0.05)


def test_component_that_cannot_move_is_named_and_fails_no_check():
    checks = outcomes("tests.support.scenarios:FixedComponent")
    assert checks["environment"].detail.endswith("each; constants, since their range is 0: component 1 of strong")
    assert [name for name, check in checks.items() if check.outcome == "failed"] == []


def test_misspelt_argument_of_an_own_scenario_is_warned_of():
    config = from_dict(
        {"environment": {"scenario": "tests.support.scenarios:Endless", "scenario_kwargs": {"n_agnets": 3}}}
    )
    with (
        private_random_streams(0, Stream.TRAINING, CPU),
        pytest.warns(
            UserWarning, match=r"Endless does not mention 'n_agnets' in its code; did you mean n_agents\?"
        ),
    ):
        make_environment(config.environment, 2, 0, Stream.TRAINING, CPU)


def test_check_that_takes_long_says_where_it_is(monkeypatch):
    """With 100 agents, VMAS looks for free places that do not exist, without end and without a word."""
    monkeypatch.setattr(validation, "SLOW_SECONDS", 0.2)
    lines = []

    def tell(line):
        lines.append(line)
        signal.raise_signal(signal.SIGUSR1)

    def stop(*_):
        raise TimeoutError("long enough")

    previous = signal.signal(signal.SIGUSR1, stop)
    try:
        config = from_dict({"environment": {"scenario": "navigation", "scenario_kwargs": {"n_agents": 100}}})
        report = validate(config, on_check=print, on_slow=tell)
    finally:
        signal.signal(signal.SIGUSR1, previous)
    place = r"\(in reset_world_at, navigation.py line \d+\)"
    assert re.fullmatch(rf"environment: still running after 0 s {place}", lines[0])
    assert "TimeoutError: long enough" in report.checks[-1].detail
