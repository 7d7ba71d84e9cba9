import json
from dataclasses import asdict
from functools import partial

import pytest
import torch

from mappo.config import override
from mappo.environment.environment import make_environment
from mappo.environment.random_streams import Stream, private_random_streams
from mappo.environment.reductions import MAX_MEASUREMENTS, MAX_NAME_LENGTH, guess_reductions
from mappo.errors import ConfigError
from mappo.evaluation import statistics
from mappo.evaluation.episodes import play_episodes
from mappo.evaluation.evaluation import evaluate
from mappo.evaluation.measurements import Measurer, terminations
from mappo.reporting.run_record import parse_evaluation
from mappo.strict_json import parse_json
from tests.conftest import CPU, endless
from tests.evaluation.test_evaluation import SEEDS, make_checkpoint

MEASURED = "tests.support.scenarios:Measured"


def measure(scenario, average=statistics.mean, episodes_per_value=1, episodes=SEEDS, **environment):
    """Return the measurements of random episodes, by name."""
    config, measurer = endless(scenario=scenario, **environment), Measurer()
    play = partial(play_episodes, lambda environment: environment.rand_action, config, episodes)
    play(Stream.EVALUATION, measurer.measure_frame)
    return measurer.measurements(average, episodes_per_value)


def test_all_reductions_equal_those_computed_by_hand():
    """Frames measure 2, -1, 7, 4; the episodes of a seed end after 2, 3 and 4 frames."""
    measured = measure(MEASURED, max_episode_frames=4, scenario_kwargs={"terminate_after": [2, 3, 0]})
    assert {name: (each.reduction, each.episode_values) for name, each in measured.items()} == {
        "x_last": ("last", [-1.0, 7.0, 4.0] * 2),
        "x_sum": ("sum", [1.0, 8.0, 12.0] * 2),
        "x_mean": ("mean", pytest.approx([0.5, 8 / 3, 3.0] * 2)),
        "x_maximum": ("maximum", [2.0, 7.0, 7.0] * 2),
        "late": ("mean", [None, 3.0, 3.5] * 2),
        "misspelt": ("sum", [None] * 6),
    }
    assert measured["x_sum"].mean == statistics.mean([1.0, 8.0, 12.0] * 2)
    assert str(measured["late"]) == f"{statistics.mean([3.0, 3.5] * 2)} in 4 of 6 episodes"
    assert (measured["misspelt"].mean, str(measured["misspelt"])) == (None, "not measured")


def test_interval_over_seeds_resamples_the_means_of_seeds():
    measured = measure(
        MEASURED,
        statistics.mean_over_seeds,
        3,
        max_episode_frames=4,
        scenario_kwargs={"terminate_after": [2, 3, 0]},
    )
    assert measured["x_sum"].mean == statistics.mean_over_seeds([7.0, 7.0])
    assert measured["late"].mean == statistics.mean_over_seeds([3.25, 3.25])


def test_evaluation_has_the_measurements_of_every_policy_with_the_intervals_of_its_returns(tiny):
    checkpoint, _ = make_checkpoint(tiny)
    report = evaluate(tiny, checkpoint)
    for returns in report.policies().values():
        reductions = {name: each.reduction for name, each in returns.measurements.items()}
        scenario = {"agent_collisions": "sum", "final_rew": "last", "pos_rew": "sum"}
        assert reductions == {"terminated": "last", **scenario}
        totals = [
            sum(values)
            for values in zip(
                *(returns.measurements[name].episode_values for name in ("agent_collisions", "pos_rew")),
                strict=True,
            )
        ]
        assert totals == pytest.approx(returns.episode_returns, abs=0.02)  # the final reward is 0.01 a frame
        for each in returns.measurements.values():
            assert each.mean == statistics.mean(each.episode_values)
    assert evaluate(tiny, checkpoint) == report


def test_terminated_is_the_share_of_episodes_that_the_task_ended_before_the_time_limit():
    """The episodes of a seed end after 2, 3 and 4 frames, the last one by the limit."""
    arguments = {"terminate_after": [2, 3, 0]}
    config = override(
        endless(scenario=MEASURED, max_episode_frames=4, scenario_kwargs=arguments),
        {"evaluation": {"seeds": [1, 2], "episodes_per_seed": 3}},
    )
    report = evaluate(config, make_checkpoint(config)[0])
    for returns in report.policies().values():
        terminated = returns.measurements["terminated"]
        assert terminated.episode_values == [1.0, 1.0, 0.0] * 2
        assert terminated.mean == statistics.mean([1.0, 1.0, 0.0] * 2)


def test_terminated_counts_whole_seeds_where_the_episodes_of_a_seed_depend_on_each_other():
    measured = terminations([2, 9, 9, 9], 9, statistics.mean_over_seeds, 2)["terminated"]
    assert measured.mean == statistics.mean_over_seeds([0.5, 0.0])


def test_measurement_of_the_scenario_with_this_name_is_the_one_that_counts(monkeypatch):
    monkeypatch.setattr("tests.support.scenarios.Measured.MEASUREMENTS", {"terminated": "sum"})
    config = endless(scenario=MEASURED, max_episode_frames=4, scenario_kwargs={"terminate_after": [2]})
    report = evaluate(config, make_checkpoint(config)[0])
    assert report.trained.measurements["terminated"].reduction == "sum"


@pytest.mark.parametrize("scenario", ["tests.support.scenarios:OddInfo", "tests.support.scenarios:Endless"])
def test_info_that_is_nan_or_missing_harms_nothing(scenario):
    config = endless(scenario=scenario, max_episode_frames=5)
    report = evaluate(config, make_checkpoint(config)[0])
    assert report.trained.episode_returns == [5.0] * len(report.trained.episode_returns)
    of_info = [each for name, each in report.trained.measurements.items() if name != "terminated"]
    assert all(each.mean is None for each in of_info)
    assert parse_json(json.dumps(asdict(report), allow_nan=False))


def test_evaluation_from_before_there_were_measurements_can_be_read():
    report = asdict(evaluate(config := endless(max_episode_frames=2), make_checkpoint(config)[0]))
    for policy in ("trained", "random"):
        del report[policy]["measurements"]
    assert parse_evaluation("old", json.dumps(report).encode()).trained.measurements == {}


def test_name_of_a_report_that_would_break_lines_is_refused():
    report = evaluate(config := endless(max_episode_frames=2), make_checkpoint(config)[0])
    hostile = asdict(report)
    hostile["trained"]["measurements"]["\x1b[2J"] = {"reduction": "sum", "episode_values": [], "mean": None}
    with pytest.raises(ConfigError, match="not an evaluation report: trained.measurements"):
        parse_evaluation("hostile", json.dumps(hostile).encode())


def test_number_and_length_of_names_are_bounded_and_what_is_no_number_is_left_out():
    measured = measure("tests.support.scenarios:ManyMeasurements", max_episode_frames=3)
    assert set(measured) == {f"number {index}" for index in range(MAX_MEASUREMENTS)}
    assert all(len(name) <= MAX_NAME_LENGTH for name in measured)


@pytest.mark.parametrize(
    ("declared", "reason"),
    [
        ({"speed": "average"}, "MEASUREMENTS['speed'] = 'average': give one of last, sum, mean, maximum"),
        ({"speed": ["sum"]}, "MEASUREMENTS['speed'] = ['sum']: give one of"),
        ({3: "sum"}, "MEASUREMENTS: 3 is not a name of at most 64 printable characters"),
        ({"x" * 65: "sum"}, "is not a name"),
        (["speed"], "MEASUREMENTS is not a dictionary"),
        ({f"x{index}": "sum" for index in range(21)}, "MEASUREMENTS has 21 names; at most 20 are measured"),
    ],
)
def test_mistake_in_a_declaration_is_an_error_when_the_environment_is_made(declared, reason, monkeypatch):
    monkeypatch.setattr("tests.support.scenarios.BadMeasurements.MEASUREMENTS", declared)
    config = endless(scenario="tests.support.scenarios:BadMeasurements")
    with pytest.raises(ConfigError) as error:
        make_environment(config.environment, 1, 0, Stream.TRAINING, CPU)
    assert reason in str(error.value)
    assert "BadMeasurements" in str(error.value)


GUESSES = {  # of each scenario of VMAS with info() whose agents are equal; sums, unless the name says otherwise
    "balance": {"pos_rew", "ground_rew"},
    "ball_passage": {"pos_rew", "collision_rew"},
    "ball_trajectory": {"pos_rew", "speed_rew", "dist_rew"},
    "buzz_wire": {"pos_rew", "collision_rew"},
    "discovery": {"covering_reward", "collision_rew", "targets_covered"},
    "dropout": {"pos_rew", "energy_rew"},
    "flocking": {"agent_collision_rew", "agent_distance_rew"},
    "football": {
        *("sparse_reward", "ball_goal_pos_rew", "all_agent_ball_pos_rew", "dist_ball_to_goal last"),
        *("min_agent_dist_to_ball mean", "touching_ball mean"),
    },
    "give_way": {"pos_rew", "final_rew last", "energy_rew", "agent_collision_rew", "obstacle_collision_rew"},
    "joint_passage": {"pos_rew", "rot_rew", "collision_rew", "energy_rew", "passed maximum"},
    "joint_passage_size": {"pos_rew", "rot_rew", "collision_rew", "energy_rew", "passed maximum"},
    "multi_give_way": {"pos_rew", "final_rew last", "agent_collision_rew"},
    "navigation": {"pos_rew", "final_rew last", "agent_collisions"},
    "road_traffic": {
        *("is_collision_with_agents", "is_collision_with_lanelets", "rot mean", "act_vel mean", "act_steer mean"),
        *("distance_ref mean", "distance_left_b mean", "distance_right_b mean"),
    },
    "sampling": {"agent_sample"},
    "wind_flocking": {
        *("dist_rew", "rot_rew", "pos_rew", "agent_wind_rew", "agent_vel_rew", "agent_energy_rew"),
        "delta_vel_to_goal mean",
    },
}


@pytest.mark.parametrize(("scenario", "expected"), GUESSES.items(), ids=GUESSES)
def test_measurements_of_scenarios_of_vmas_are_known(scenario, expected):
    config = endless(scenario=scenario)
    with private_random_streams(0, Stream.EVALUATION, CPU), torch.no_grad():
        environment = make_environment(config.environment, 2, 0, Stream.EVALUATION, CPU)
        environment.rand_step(environment.reset())
        guess_reductions(reductions := {}, environment.base_env.measured())
    assert {f"{name} {reduction}".removesuffix(" sum") for name, reduction in reductions.items()} == expected


def test_training_with_measurements_keeps_no_info(tiny):
    """Check that no frame of a rollout has keys for `info()`."""
    with private_random_streams(0, Stream.TRAINING, CPU):
        environment = make_environment(tiny.environment, 2, 0, Stream.TRAINING, CPU)
        keys = environment.rollout(3).keys(include_nested=True, leaves_only=True)
    assert not [key for key in keys if "info" in str(key)]


def test_measurements_of_a_seed_do_not_depend_on_other_seeds(tiny):
    checkpoint, _ = make_checkpoint(tiny)
    both = evaluate(tiny, checkpoint)
    second = evaluate(override(tiny, {"evaluation": {"seeds": [2]}}), checkpoint)
    for name, each in second.trained.measurements.items():
        assert both.trained.measurements[name].episode_values[4:] == each.episode_values
