import csv
import dataclasses
import math
import os
import re

import pytest
import torch

from mappo.config import override
from mappo.environment.random_streams import Stream
from mappo.errors import CheckpointError, ConfigError, NonFiniteLoss, NonFiniteReturn
from mappo.evaluation import statistics
from mappo.evaluation.episodes import play_episodes, trained_policy
from mappo.evaluation.evaluation import evaluate
from mappo.evaluation.measurements import Measurer
from mappo.recipes import recipe
from mappo.runs.run import load_checkpoint
from mappo.training.history import COLUMNS, MEASURED, parse_history
from mappo.training.training_state import StartingPoint
from tests.conftest import endless
from tests.support.runs import iterations, train_here


def run(config, directory, on_report=lambda report: None, start=None):
    return train_here(config, directory, on_report, start).tensors


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_same_seed_gives_bit_identical_parameters_and_another_seed_does_not(tiny, tmp_path):
    one = run(tiny, tmp_path / "1")
    torch.rand(100)  # random numbers that the process drew before must not matter
    assert equal(one, run(tiny, tmp_path / "2"))
    assert not equal(one, run(override(tiny, {"seed": 1}), tmp_path / "3"))


def test_evaluation_by_a_callback_does_not_change_training(tiny, tmp_path):
    undisturbed = run(tiny, tmp_path / "1")
    checkpoint = load_checkpoint(tmp_path / "1", "last")
    assert equal(undisturbed, run(tiny, tmp_path / "2", on_report=lambda report: evaluate(tiny, checkpoint)))


def test_reports_count_frames_iterations_and_episodes(tiny, tmp_path):
    reports = []
    run(tiny, tmp_path / "run", reports.append)
    assert [report.progress.iteration for report in reports] == [1, 2, 3]
    assert [report.progress.frames for report in reports] == [120, 240, 360]
    assert [report.episodes.num_episodes for report in reports] == [12, 12, 12]  # 6 environments, 2 episodes each
    for report in reports:
        episodes = report.episodes
        assert episodes.episode_return_min <= episodes.episode_return_mean <= episodes.episode_return_max
        assert report.frames_per_second == pytest.approx(
            120 / (report.collect_seconds + report.learn_seconds + report.evaluate_seconds + report.save_seconds),
            rel=0.05,
        )


def test_training_rounds_total_frames_up_to_whole_iterations(tiny, tmp_path):
    reports = []
    run(override(tiny, {"collection": {"total_frames": 121}}), tmp_path / "run", reports.append)
    assert [report.progress.frames for report in reports] == [120, 240]


def test_history_file_has_a_row_per_iteration_and_empty_cells_for_nan(tiny, tmp_path):
    config = override(tiny, {"environment": {"max_episode_frames": 30}, "collection": {"total_frames": 240}})
    run(config, tmp_path / "run")
    with (tmp_path / "run" / "history.csv").open(newline="") as history:
        rows = list(csv.DictReader(history))
    assert tuple(rows[0]) == (*COLUMNS, "measured_pos_rew", "measured_final_rew", "measured_agent_collisions")
    assert [row["frames"] for row in rows] == ["120", "240"]
    assert rows[0]["num_episodes"] == "0"
    assert rows[0]["episode_return_mean"] == ""  # no episode of 30 frames ends in the first 20
    assert rows[1]["num_episodes"] == "6"
    assert float(rows[1]["loss_critic"]) > 0


def test_returns_cover_whole_episodes_when_episodes_span_batches(tmp_path):
    config = override(
        endless(max_episode_frames=30),
        {"collection": {"rollout_frames": 20, "total_frames": 480}, "learner": {"minibatch_frames": 80}},
    )
    reports = []
    run(config, tmp_path / "run", reports.append)
    returns = [report.episodes.episode_return_mean for report in reports if report.episodes.num_episodes]
    assert returns == [30.0, 30.0]  # one reward a frame


def test_every_episode_is_counted_when_episodes_end_at_different_times(tmp_path):
    """Environment i terminates every 2 + i frames: its episodes return 2 + i, and only it is reset."""
    config = override(
        endless(scenario_kwargs={"terminate_after": [2, 3, 4]}),
        {
            "collection": {"num_envs": 3, "rollout_frames": 12, "total_frames": 36},
            "learner": {"minibatch_frames": 36},
            "selection": {"interval_iterations": 0},
        },
    )
    reports = []
    run(config, tmp_path / "run", reports.append)
    (episodes,) = [report.episodes for report in reports]
    assert episodes.num_episodes == 6 + 4 + 3
    assert (episodes.episode_return_min, episodes.episode_return_max) == (2, 4)
    assert episodes.episode_return_mean == pytest.approx((6 * 2 + 4 * 3 + 3 * 4) / 13)


def test_memory_does_not_grow_over_iterations(tiny, tmp_path):
    """Resident memory after 40 iterations is within 8 MB of that after 15; a kept batch would add far more."""
    config = override(
        tiny,
        {
            "collection": {"num_envs": 60, "rollout_frames": 50, "total_frames": 40 * 3_000},
            "learner": {"epochs": 1, "minibatch_frames": 3_000},
            "selection": {"interval_iterations": 10, "episodes_per_seed": 4},
        },
    )
    resident = []
    pages = os.sysconf("SC_PAGE_SIZE")

    def measure(report):
        with open("/proc/self/statm") as statm:  # noqa: PTH123
            resident.append(int(statm.read().split()[1]) * pages)

    run(config, tmp_path / "run", measure)
    assert len(resident) == 40
    assert resident[-1] - resident[14] < 8 * 2**20


def test_checkpoint_holds_the_trained_networks(tiny, tmp_path):
    tensors = run(tiny, tmp_path / "run")
    loaded = load_checkpoint(tmp_path / "run", "last")
    assert equal(tensors, loaded.tensors)
    assert (loaded.config, loaded.frames, loaded.iteration) == (tiny, 360, 3)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("name", "at_least"), [("navigation", 0.9), ("balance", 40.0), ("swarm", 45.0), ("seed-document", 30.0)]
)
def test_recipe_learns_its_task(name, at_least, seed, tmp_path):
    """A trained policy reaches the return that the recipe promises, clearly above a random one."""
    config = override(recipe(name), {"seed": seed})
    run(config, tmp_path)
    report = evaluate(config, load_checkpoint(tmp_path, "best"))
    print(f"{name}, seed {seed}: trained {report.trained.mean}, random {report.random.mean}")
    assert report.trained.mean.value >= at_least
    assert report.trained.mean.low > report.random.mean.high


def select(config, interval, **changes):
    return override(config, {"selection": {"interval_iterations": interval, "episodes_per_seed": 3}, **changes})


def learned(report):
    """Return the numbers of an iteration, without wall-clock times, memory, evaluations and saves."""
    row = report.row()
    return {
        name: value
        for name, value in row.items()
        if not re.search("seconds|bytes|per_second|evaluation|measured|_saves", name)
    }


@pytest.mark.parametrize("networks", [{}, {"normalise_observations": True, "normalise_values": True}])
def test_training_with_evaluations_is_bit_identical_to_training_without(tiny, tmp_path, networks):
    tensors, histories = [], []
    for interval in (0, 1, 2, 100):
        reports = []
        config = select(tiny, interval, networks=networks)
        tensors.append(run(config, tmp_path / str(interval), reports.append))
        histories.append([learned(report) for report in reports])
    assert all(equal(tensors[0], other) for other in tensors[1:])
    assert all(histories[0] == other for other in histories[1:])


def test_history_has_the_measurements_of_evaluations_during_training(tiny, tmp_path):
    config = override(tiny, {"selection": {"interval_iterations": 2}})
    checkpoint = train_here(config, tmp_path / "run")
    rows = parse_history(checkpoint.history)
    assert checkpoint.history == (tmp_path / "run" / "history.csv").read_text()
    policy, measurer = trained_policy(config, checkpoint), Measurer()
    play_episodes(policy, config, config.selection, Stream.SELECTION, measurer.measure_frame)
    for name, measured in measurer.measurements(statistics.mean).items():
        column = [row[f"measured_{name}"] for row in rows]
        assert [math.isnan(value) for value in column] == [True, False, False]
        assert column[-1] == pytest.approx(measured.mean.value, rel=1e-6)


def test_measurements_that_are_nan_or_missing_harm_nothing(tmp_path):
    small = {"collection": {"total_frames": 800}, "selection": {"interval_iterations": 1}}
    for scenario in ("OddInfo", "Measured", "ManyMeasurements", "Endless"):
        config = override(endless(scenario=f"tests.support.scenarios:{scenario}"), small)
        reports = []
        rows = parse_history(train_here(config, tmp_path / scenario, reports.append).history)
        measured = [column for column in rows[0] if column.startswith(MEASURED)]
        assert len(measured) == {"OddInfo": 2, "Measured": 6, "ManyMeasurements": 20, "Endless": 0}[scenario]
        for row, report in zip(rows, reports, strict=True):
            known = {column: row[column] for column in measured if not math.isnan(row[column])}
            assert known == {f"{MEASURED}{name}": mean for name, mean in report.measurements.items()}
        assert bool(reports[0].measurements) == (scenario in ("Measured", "ManyMeasurements"))


@pytest.mark.parametrize(("interval", "evaluated"), [(0, []), (1, [1, 2, 3]), (2, [2, 3]), (3, [3]), (100, [3])])
def test_evaluations_are_due_every_interval_and_at_the_end(tiny, tmp_path, interval, evaluated):
    reports = []
    run(select(tiny, interval), tmp_path, reports.append)
    due = [report.progress.iteration for report in reports if not math.isnan(report.evaluation_return_mean)]
    assert due == evaluated


def test_best_checkpoint_has_the_highest_evaluation_return(tiny, tmp_path):
    changes = {"collection": {"total_frames": 960}, "learner": {"learning_rate": 0.1}, "seed": 2}
    config = override(select(tiny, 1), changes)
    reports = []
    run(config, tmp_path, reports.append)
    by_iteration = {report.progress.iteration: report.evaluation_return_mean for report in reports}
    best, last = (load_checkpoint(tmp_path, name) for name in ("best", "last"))
    assert best.iteration == max(by_iteration, key=by_iteration.get)
    assert best.selection_return == by_iteration[best.iteration]
    assert (last.iteration, last.selection_return) == (8, by_iteration[8])
    assert best.iteration < 8  # at this learning rate training must get worse, otherwise the test shows nothing


def test_best_checkpoint_is_the_last_one_when_training_has_no_evaluations(tiny, tmp_path):
    run(select(tiny, 0), tmp_path)
    best, last = (load_checkpoint(tmp_path, name) for name in ("best", "last"))
    assert equal(best.tensors, last.tensors)
    assert best.selection_return is None


def test_best_checkpoint_survives_when_training_diverges_later(tmp_path):
    """Rewards are NaN from frame 11 of an episode on: the first batch and its evaluation do not see that frame."""
    config = override(
        endless(
            scenario="tests.support.scenarios:NanReward",
            scenario_kwargs={"terminate_after": 0},
            max_episode_frames=50,
        ),
        {
            "collection": {"rollout_frames": 8, "total_frames": 256},
            "learner": {"minibatch_frames": 64},
            "selection": {"interval_iterations": 1, "episodes_per_seed": 2},
        },
    )
    with pytest.raises(NonFiniteReturn):
        run(config, tmp_path / "evaluated")
    survived = override(config, {"environment": {"scenario": "tests.support.scenarios:NanLater"}})
    with pytest.raises(NonFiniteLoss):
        run(survived, tmp_path / "trained")
    assert load_checkpoint(tmp_path / "trained", "best").iteration == 1
    assert iterations(tmp_path / "trained") == [1]


def test_extended_run_continues_where_the_first_run_stopped(tiny, tmp_path):
    first = train_here(tiny, tmp_path / "first")
    longer = override(
        tiny, {"collection": {"total_frames": 600}, "threads": 2, "selection": {"interval_iterations": 0}}
    )
    reports = []
    checkpoint = load_checkpoint(tmp_path / "first", "last")
    extended = train_here(longer, tmp_path / "2", reports.append, StartingPoint("extend", checkpoint))
    assert [report.progress.iteration for report in reports] == [4, 5]
    assert [report.progress.frames for report in reports] == [480, 600]
    rate = tiny.learner.learning_rate
    assert [report.losses.learning_rate for report in reports] == pytest.approx([rate * 2 / 5, rate * 1 / 5])
    assert not equal(extended.tensors, first.tensors)
    steps = {name: value for name, value in extended.optimiser.items() if name.endswith(".step")}
    assert {value.item() for value in steps.values()} == {5 * 2 * 3}  # iterations, epochs, minibatches


def test_extension_starts_from_the_networks_of_the_first_run(tiny, tmp_path):
    """The learning rate is almost 0, so that training hardly changes the networks."""
    small = override(tiny, {"learner": {"learning_rate": 1e-12, "learning_rate_schedule": "constant"}})
    first = train_here(small, tmp_path / "first")
    longer = override(small, {"collection": {"total_frames": 480}})
    extended = train_here(longer, tmp_path / "a", start=StartingPoint("extend", first))
    for name, tensor in first.tensors.items():
        assert torch.allclose(tensor, extended.tensors[name], atol=1e-6), name


def test_extension_collects_other_episodes_than_the_first_run(tiny, tmp_path):
    first = train_here(tiny, tmp_path / "first")
    longer = override(tiny, {"collection": {"total_frames": 480}})
    reports, scratch = [], []
    train_here(longer, tmp_path / "a", reports.append, StartingPoint("extend", first))
    train_here(longer, tmp_path / "c", scratch.append, StartingPoint("warm-start", first))
    assert reports[0].episodes != scratch[0].episodes


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"collection": {"total_frames": 360}}, "has 360 frames already; set a larger number"),
        ({"collection": {"total_frames": 600}, "learner": {"epochs": 3}}, "learner.epochs = 2 -> 3"),
        ({"collection": {"total_frames": 600}, "seed": 3}, "seed = 0 -> 3"),
        ({"collection": {"total_frames": 600, "num_envs": 12}}, "collection.num_envs = 6 -> 12"),
    ],
)
def test_extension_with_another_configuration_is_refused_with_the_changed_fields(tiny, tmp_path, changes, reason):
    first = train_here(tiny, tmp_path / "first")
    with pytest.raises(ConfigError, match=reason):
        train_here(override(tiny, changes), tmp_path / "a", print, StartingPoint("extend", first))
    assert not (tmp_path / "a").exists()


def test_extension_is_refused_when_the_optimiser_of_the_checkpoint_is_missing_or_broken(tiny, tmp_path):
    first = train_here(tiny, tmp_path / "first")
    longer = override(tiny, {"collection": {"total_frames": 600}})
    broken = {name: value * float("nan") for name, value in first.optimiser.items()}
    for optimiser in ({}, broken):
        start = StartingPoint("extend", dataclasses.replace(first, optimiser=optimiser))
        with pytest.raises(
            CheckpointError, match="cannot resume from the checkpoint: the optimiser's step, exp_avg"
        ):
            train_here(longer, tmp_path / "a", print, start)


def test_extension_of_an_unfinished_run_is_refused(tiny, tmp_path):
    first = dataclasses.replace(train_here(tiny, tmp_path / "first"), iteration=2, frames=240)
    with pytest.raises(ConfigError, match="the run to extend is not finished: the run has 2 of 3 iterations"):
        train_here(
            override(tiny, {"collection": {"total_frames": 600}}),
            tmp_path / "a",
            start=StartingPoint("extend", first),
        )


def test_warm_start_takes_over_the_networks_and_nothing_else(tiny, tmp_path):
    first = train_here(tiny, tmp_path / "first")
    other = override(
        tiny,
        {"seed": 9, "learner": {"learning_rate": 1e-12, "epochs": 1}, "environment": {"max_episode_frames": 5}},
    )
    reports = []
    warm = train_here(other, tmp_path / "a", reports.append, StartingPoint("warm-start", first))
    assert [report.progress.frames for report in reports] == [120, 240, 360]
    assert all(torch.allclose(first.tensors[name], warm.tensors[name], atol=1e-6) for name in first.tensors)


def test_warm_start_is_refused_when_the_networks_have_other_shapes(tiny, tmp_path):
    first = train_here(tiny, tmp_path / "first")
    other = override(tiny, {"networks": {"hidden_sizes": [17]}})
    with pytest.raises(CheckpointError, match="does not fit these networks"):
        train_here(other, tmp_path / "a", print, StartingPoint("warm-start", first))


def test_batch_that_does_not_fit_in_memory_is_refused_before_training(tiny, tmp_path):
    huge = {"num_envs": 1_000_000, "rollout_frames": 1_000_000, "total_frames": 10**12}
    with pytest.raises(ConfigError, match="GiB are free on cpu; collect fewer frames at once"):
        run(override(tiny, {"collection": huge}), tmp_path)


def test_report_contains_the_peak_of_memory(tiny, tmp_path):
    reports = []
    run(tiny, tmp_path, reports.append)
    assert 50e6 < reports[-1].peak_memory_bytes < 50e9
    assert reports[-1].peak_gpu_memory_bytes == 0


@pytest.mark.parametrize("scenario", ["simple_reference", "football", "swarm"])
@pytest.mark.parametrize("actions", ["continuous", "discrete", "multi-discrete"])
def test_training_works_with_every_kind_of_action(tiny, tmp_path, scenario, actions):
    """The agents of simple_reference speak; the episodes of football end early."""
    environment = {"scenario": scenario, "scenario_kwargs": {}, "actions": actions}
    reports = []
    run(
        override(tiny, {"environment": environment, "networks": {"share_policy": False}}), tmp_path, reports.append
    )
    assert reports[-1].progress.frames == 360


def test_best_of_an_extended_run_is_at_least_its_start_and_checkpoints_name_the_start(tiny, tmp_path):
    config = select(tiny, 1)
    first = train_here(config, tmp_path / "first")
    worse = override(config, {"collection": {"total_frames": 480}})
    train_here(worse, tmp_path / "2", start=StartingPoint("extend", first))
    best, last = (load_checkpoint(tmp_path / "2", name) for name in ("best", "last"))
    assert best.selection_return >= first.selection_return
    assert best.started_from == last.started_from == "extended after 360 frames"
    warm = train_here(config, tmp_path / "3", start=StartingPoint("warm-start", last))
    assert warm.started_from.startswith("warm start from configuration")
    assert warm.started_from.endswith("after 480 frames")
