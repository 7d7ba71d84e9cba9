"""The constraints on measurements: their bounds, their verdicts, and what is refused."""

import math

import numpy as np
import pytest
from scipy.stats import binomtest, chi2

from mappo.environment.measured_names import find_measurements, require_measured
from mappo.errors import ConfigError
from mappo.evaluation import statistics
from mappo.evaluation.constraints import Constraint
from mappo.evaluation.measurements import Measurement
from mappo.evaluation.verdicts import judge_constraint
from mappo.promotion.gate import Gate
from mappo.strict_json import checked, to_dict
from mappo.tuning.study_config import TuningConfig, study_config_from_json
from tests.conftest import endless


def measured(values, reduction="sum"):
    return Measurement(reduction, list(values), statistics.plain_mean(values))


def flags(number, size=200):
    return [1.0] * number + [0.0] * (size - number)


def test_bound_without_an_event_is_the_rule_of_three():
    """(1 - p)^n = 5 % for p of about 3 / n; the bound is -ln(0.05) / n."""
    assert statistics.rare_upper_bound(flags(0), 1.0, 0.95) == pytest.approx(-math.log(0.05) / 200)
    assert statistics.rare_upper_bound(flags(0), 7.0, 0.95) == pytest.approx(-7 * math.log(0.05) / 200)
    assert statistics.rare_upper_bound([2.5] * 10, 1.0, 0.95) == pytest.approx(2.5 - math.log(0.05) / 10)


@pytest.mark.parametrize("number", [0, 1, 2, 10, 60, 100])
def test_bound_of_flags_is_that_of_poisson_and_above_the_exact_one_of_a_proportion(number):
    bound = statistics.rare_upper_bound(flags(number), 1.0, 0.95)
    assert bound == pytest.approx(chi2.ppf(0.95, 2 * (number + 1)) / 2 / 200)
    assert bound > binomtest(number, 200, alternative="less").proportion_ci(0.95).high


def test_bound_of_students_t_is_the_one_computed_by_hand():
    """Values 1, 2, 3: mean 2, standard error 1/sqrt(3), t(2, 95 %, one-sided) = 2.919986."""
    assert statistics.upper_bound([1.0, 2.0, 3.0], 0.95) == pytest.approx(2 + 2.919986 / 3**0.5, abs=1e-6)


@pytest.mark.parametrize("probability", [0.005, 0.02, 0.1])
def test_bound_for_rare_events_misses_no_more_often_than_stated_where_students_t_does(probability):
    """With a probability of 5 %, more than 68 of 1,000 bounds miss with a probability of 0.6 %."""
    generator, misses, misses_of_t = np.random.default_rng(0), 0, 0
    for _ in range(1000):
        sizes = generator.choice([0.2, 1.0, 4.0], 200)
        values = (sizes * (generator.random(200) < probability)).tolist()
        mean = probability * (0.2 + 1.0 + 4.0) / 3
        misses += statistics.rare_upper_bound(values, 4.0, 0.95) < mean
        misses_of_t += len(set(values)) < 2 or statistics.upper_bound(values, 0.95) < mean
    assert misses <= 68
    assert misses_of_t > 100 or probability == 0.1


def test_verdict_has_the_mean_the_bound_and_its_condition():
    verdict = judge_constraint(Constraint(at_most=0.05), measured(flags(2)), 0.95, 1)
    assert (verdict.mean, verdict.is_kept, verdict.reduction) == (0.01, True, "sum")
    assert verdict.bound == pytest.approx(chi2.ppf(0.95, 6) / 400)
    assert str(verdict) == (
        "0.01, with 95% confidence below 0.03148; at most 0.05: kept (bound for rare events over 200 episodes; it "
        "holds if the events of one episode change it by at most 1)"
    )


def test_limits_from_below_mirror_those_from_above():
    generator = np.random.default_rng(0)
    for values in (flags(3), generator.normal(size=30).tolist()):
        above = judge_constraint(Constraint(at_most=0.3), measured(values), 0.9, 1)
        below = judge_constraint(Constraint(at_least=-0.3), measured([-value for value in values]), 0.9, 1)
        assert (below.mean, below.bound, below.is_kept) == (-above.mean, -above.bound, above.is_kept)


def test_mean_within_the_limit_is_not_enough():
    assert not judge_constraint(Constraint(at_most=0.01), measured(flags(0)), 0.95, 1).is_kept  # 0.015
    assert judge_constraint(Constraint(at_most=0.01), measured(flags(0, size=400)), 0.95, 1).is_kept
    assert not judge_constraint(Constraint(at_most=0.01), measured(flags(0, 400)), 0.99, 1).is_kept
    assert not judge_constraint(Constraint(at_most=0), measured(flags(0, size=100_000)), 0.95, 1).is_kept


def test_seeds_are_the_units_when_their_episodes_depend_on_each_other():
    values = [0.0] * 20 + [1.0] * 20 + [2.0] * 20  # three seeds
    verdict = judge_constraint(Constraint(at_most=3), measured(values), 0.95, 20)
    assert verdict.bound == pytest.approx(statistics.upper_bound([0.0, 1.0, 2.0], 0.95))
    assert "Student's t over 3 seeds" in verdict.method


@pytest.mark.parametrize("values", [[0.0, None], [None, None], None])
def test_policy_that_is_not_measured_in_every_episode_keeps_no_constraint(values):
    measurement = None if values is None else Measurement("last", values, None)
    verdict = judge_constraint(Constraint(at_most=1e9), measurement, 0.95, 1)
    assert (verdict.is_kept, verdict.mean, verdict.bound) == (False, None, None)
    assert "not measured" in str(verdict) or "in 1 of 2 episodes" in str(verdict)


@pytest.mark.parametrize(
    ("constraints", "message"),
    [
        ({"x": {}}, "at_most = None, at_least = None: a constraint has one of these limits"),
        ({"x": {"at_most": 1, "at_least": 0}}, "at_most = 1.0, at_least = 0.0: a constraint has one"),
        ({"x": {"at_mots": 1}}, "constraints.x.at_mots = 1: unknown key; did you mean at_most?"),
        ({"x": {"at_most": "1"}}, 'constraints.x.at_most = "1": input should be a valid number'),
        ({"x": {"at_most": 1, "largest_event": 0}}, "constraints.x.largest_event = 0: input should be greater"),
        ({"": {"at_most": 1}}, "string should have at least 1 character"),
        ({"a\nb": {"at_most": 1}}, "string should match pattern"),
        ({f"x{index}": {"at_most": 1} for index in range(21)}, "at most 20 items"),
    ],
)
@pytest.mark.parametrize("kind", [Gate, TuningConfig])
def test_impossible_constraints_are_refused(constraints, message, kind):
    with pytest.raises(ConfigError) as error:
        checked(kind, {"constraints": constraints})
    assert message in str(error.value)


def test_constraints_travel_as_json():
    text = '{"gate": {"constraints": {"a": {"at_most": 0.5}}}, "tuning": {"constraints": {"b": {"at_least": -1}}}}'
    settings = study_config_from_json(text)
    assert settings.gate.constraints == {"a": Constraint(at_most=0.5)}
    assert settings.tuning.constraints == {"b": Constraint(at_least=-1.0)}
    assert checked(type(settings), to_dict(settings)) == settings


def test_pruner_that_would_end_safe_trials_is_refused_with_constraints():
    for pruner in ("halving", "hyperband"):
        with pytest.raises(ConfigError, match="with constraints, take median, wilcoxon or none"):
            checked(TuningConfig, {"pruner": pruner, "constraints": {"x": {"at_most": 1}}})


@pytest.mark.parametrize(
    ("scenario", "names"),
    [
        ("navigation", {"pos_rew": "sum", "final_rew": "last", "agent_collisions": "sum"}),
        ("tests.support.scenarios:PushRightAndMeasure", {"reward_sum": "sum"}),
        ("tests.support.scenarios:Endless", {}),
        ("tests.support.scenarios:OddInfo", {"of agent_0": "mean", "of agent_1": "mean"}),
    ],
)
def test_measurements_of_a_scenario_are_found_before_training(scenario, names):
    assert find_measurements(endless(scenario=scenario).environment) == names


def test_unknown_measurements_are_refused_with_the_names_that_there_are():
    environment = endless(scenario="navigation").environment
    require_measured(["pos_rew"], environment, "gate.constraints")
    with pytest.raises(ConfigError) as error:
        require_measured(["agent_colisions", "pos_rew", "x"], environment, "gate.constraints")
    known = "agent_collisions (sum), final_rew (last), pos_rew (sum)"
    assert str(error.value).splitlines() == [
        "gate.constraints: 'agent_colisions' is not measured; did you mean agent_collisions? navigation measures "
        + known,
        f"gate.constraints: 'x' is not measured; navigation measures {known}",
    ]


def test_scenario_that_fails_is_an_error_that_names_its_line():
    with pytest.raises(ConfigError, match=r"ZeroDivisionError: the scenario divides by zero \(in post_step"):
        find_measurements(endless(scenario="tests.support.scenarios:Exploding").environment)
