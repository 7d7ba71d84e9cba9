import dataclasses

import pytest

from mappo.config import override
from mappo.errors import ConfigError
from mappo.evaluation.comparison import compare
from mappo.evaluation.evaluation import EpisodeReturns, EvaluationReport
from mappo.evaluation.measurements import Measurement
from mappo.evaluation.statistics import Estimate, mean
from mappo.reporting.tables import comparison_table
from mappo.strict_json import to_dict


def report(config, returns, heuristic=None, started_from="", measurements=None):
    """Return an evaluation of `config` with known returns, and with known measurements of the trained policy."""

    def summary(values):
        return EpisodeReturns(values, mean(values), mean(values), 10.0)

    return EvaluationReport(
        config=to_dict(config),
        config_hash="",
        training_config=to_dict(config),
        training_config_hash="",
        training_frames=1,
        started_from=started_from,
        resampled="",
        trained=dataclasses.replace(summary(returns), measurements=measurements or {}),
        random=summary([0.0, 1.0]),
        heuristic=heuristic and summary(heuristic),
        no_heuristic="",
    )


def seeds(config, means):
    return [report(override(config, {"seed": seed}), [value - 1, value + 1]) for seed, value in means.items()]


def test_interval_over_seeds_equals_students_t_computed_by_hand(tiny):
    """Means 1, 2, 3: deviation 1, standard error 1/sqrt(3), t(2, 97.5 %) = 4.302653."""
    result = compare(seeds(tiny, {0: 1.0, 1: 2.0, 7: 3.0}))
    (only,) = result.configurations
    assert (only.training_seeds, only.episode_returns) == ([0, 1, 7], [1.0, 2.0, 3.0])
    half = 4.302653 / 3**0.5
    assert only.mean.value == 2
    assert (only.mean.low, only.mean.high) == pytest.approx((2 - half, 2 + half), rel=1e-5)
    assert only.gain is None
    assert only.differs == {}


def test_gain_over_the_first_configuration_has_welchs_interval_computed_by_hand(tiny):
    """Means 1, 2, 3 against 5, 6, 7: difference 4, error sqrt(2/3), 4 degrees of freedom, t = 2.776445."""
    other = override(tiny, {"learner": {"clip_epsilon": 0.1}})
    result = compare(seeds(tiny, {0: 1.0, 1: 2.0, 2: 3.0}) + seeds(other, {0: 5.0, 1: 6.0, 2: 7.0}))
    second = result.configurations[1]
    half = 2.776445 * (2 / 3) ** 0.5
    assert second.differs == {"learner.clip_epsilon": "0.2 -> 0.1"}
    assert second.gain.value == pytest.approx(4)
    assert (second.gain.low, second.gain.high) == pytest.approx((4 - half, 4 + half), rel=1e-5)


def test_measurements_are_compared_over_seeds_where_every_seed_has_them(tiny):
    """Collisions 1, 2, 3 against 5, 6, 7: the intervals of the two tests above."""

    def measured(config, numbers, other):
        return [
            report(
                override(config, {"seed": seed}),
                [0.0],
                measurements={
                    "collisions": Measurement(
                        "sum", [number - 1, None, number + 1], mean([number - 1, number + 1])
                    ),
                    "sometimes": Measurement("last", [None], None if seed else mean([1.0])),
                    "changed": Measurement(other, [1.0], mean([1.0])),
                },
            )
            for seed, number in enumerate(numbers)
        ]

    slower = override(tiny, {"learner": {"clip_epsilon": 0.1}})
    result = compare(measured(tiny, [1.0, 2.0, 3.0], "sum") + measured(slower, [5.0, 6.0, 7.0], "last"))
    first, second = (configuration.measurements for configuration in result.configurations)
    assert first.keys() == second.keys() == {"collisions", "changed"}
    assert (first["collisions"].reduction, first["collisions"].seed_values) == ("sum", [1.0, 2.0, 3.0])
    half = 4.302653 / 3**0.5
    assert (first["collisions"].mean.low, first["collisions"].mean.high) == pytest.approx((2 - half, 2 + half))
    assert first["collisions"].difference is None
    difference, half = second["collisions"].difference, 2.776445 * (2 / 3) ** 0.5
    assert (difference.value, difference.low, difference.high) == pytest.approx((4, 4 - half, 4 + half))
    assert second["changed"].difference is None
    row = f"collisions (sum)          2 [-0.484, 4.48]  6 [3.52, 8.48]; difference {difference}"
    assert row in comparison_table(result)


def test_one_seed_has_no_interval(tiny):
    (only,) = compare(seeds(tiny, {3: 1.5})).configurations
    assert only.mean == Estimate(1.5, None, None)


def test_equal_returns_have_an_interval_of_no_width(tiny):
    (only,) = compare(seeds(tiny, {3: 1.5, 4: 1.5})).configurations
    assert only.mean == Estimate(1.5, 1.5, 1.5)


def test_threads_and_device_do_not_distinguish_configurations(tiny):
    other_machine = override(tiny, {"threads": 2, "device": "cpu"})
    result = compare(seeds(tiny, {0: 1.0}) + seeds(other_machine, {1: 2.0}))
    assert [configuration.training_seeds for configuration in result.configurations] == [[0, 1]]


def test_same_seed_twice_is_refused(tiny):
    with pytest.raises(ConfigError, match="seed 4: trained and evaluated more than once"):
        compare(seeds(tiny, {4: 1.0}) + seeds(tiny, {4: 2.0}))


def test_reports_on_other_episodes_are_refused_naming_the_difference(tiny):
    other = override(tiny, {"evaluation": {"seeds": [9]}})
    with pytest.raises(ConfigError, match=r"report 2 .* evaluation.seeds = \[1, 2\] -> \[9\]"):
        compare(seeds(tiny, {0: 1.0}) + seeds(other, {1: 2.0}))


def test_comparison_without_reports_is_refused():
    with pytest.raises(ConfigError, match="no evaluation report"):
        compare([])


def test_comparison_has_the_baselines_of_the_reports(tiny):
    result = compare([report(tiny, [1.0], heuristic=[5.0, 6.0])])
    assert result.random.mean.value == 0.5
    assert result.heuristic.mean.value == 5.5
    assert dataclasses.asdict(result)["intervals"].startswith("95 % Student's t")


def test_warm_started_run_is_another_configuration_than_the_runs_from_scratch(tiny):
    warm = report(
        override(tiny, {"seed": 1}), [3.0], started_from="warm start from configuration abc after 10 frames"
    )
    scratch, other = compare([*seeds(tiny, {0: 1.0}), warm]).configurations
    assert (scratch.training_seeds, other.training_seeds) == ([0], [1])
    assert other.differs == {"started from": "scratch -> warm start from configuration abc after 10 frames"}


def test_checkpoints_of_different_kinds_are_not_compared(tiny):
    one, other = seeds(tiny, {0: 1.0, 1: 2.0})
    with pytest.raises(ConfigError, match=r"different kinds, 'best' \(report 1\) and '1' \(report 2\)"):
        compare([dataclasses.replace(one, checkpoint="best"), dataclasses.replace(other, checkpoint="1")])
    compare([dataclasses.replace(one, checkpoint="best"), other])  # of an older version, which does not say


def test_different_frames_and_unfinished_runs_are_said(tiny):
    one, other = seeds(tiny, {0: 1.0, 1: 2.0})
    one = dataclasses.replace(one, training_frames=240, run_frames=360)
    same = compare([one, dataclasses.replace(other, training_frames=240, run_frames=360)])
    assert not any("frames" in line or "finished" in line for line in comparison_table(same))
    result = compare([one, dataclasses.replace(other, training_frames=120, run_frames=240)])
    (trained,) = result.configurations
    assert (trained.training_frames, trained.unfinished) == ([240, 120], [1])
    lines = comparison_table(result)
    assert "the checkpoints are those after different numbers of frames; trained: 240, 120" in lines
    assert "warning: trained: training from seed 1 had not finished when it was evaluated" in lines


def test_configurations_of_a_study_have_names(tiny):
    other = override(tiny, {"learner": {"clip_epsilon": 0.1}})
    result = compare(seeds(tiny, {0: 1.0, 1: 2.0}) + seeds(other, {0: 5.0, 1: 6.0}))
    lines = comparison_table(result, ("default", "best"))
    assert [line.split()[0] for line in lines[1:3]] == ["default", "best"]
    assert any(line.strip().startswith("4 [") and "more than default" in line for line in lines)
    assert comparison_table(compare(seeds(tiny, {0: 1.0, 1: 2.0})), ("default", "best"))[1].startswith("default")
