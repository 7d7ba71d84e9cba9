import csv
import os

import pytest
import torch

from mappo import checkpoint as checkpoints
from mappo.config import override
from mappo.evaluate import evaluate
from mappo.history import COLUMNS, HistoryFile
from mappo.recipes import recipe
from mappo.train import train
from tests.conftest import endless


def run(config, directory, on_report=lambda report: None, start=None):
    return train(config, directory / "last", directory / "best", on_report, start).tensors


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_same_seed_gives_the_same_bits_and_another_seed_does_not(tiny, tmp_path):
    one = run(tiny, tmp_path / "1")
    torch.rand(100)  # what the process drew before does not matter
    assert equal(one, run(tiny, tmp_path / "2"))
    assert not equal(one, run(override(tiny, {"seed": 1}), tmp_path / "3"))


def test_evaluating_in_the_middle_does_not_disturb_training(tiny, tmp_path):
    undisturbed = run(tiny, tmp_path / "1")
    saved = checkpoints.load(tmp_path / "1" / "last")
    assert equal(undisturbed, run(tiny, tmp_path / "2", on_report=lambda report: evaluate(tiny, saved)))


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
            120 / (report.collect_seconds + report.learn_seconds), rel=0.01
        )


def test_history_file_has_a_row_an_iteration_and_empty_cells_for_nan(tiny, tmp_path):
    config = override(tiny, {"environment": {"max_episode_frames": 30}, "collection": {"total_frames": 240}})
    file = HistoryFile(tmp_path / "history.csv")
    run(config, tmp_path / "run", file.append)
    file.close()
    with (tmp_path / "history.csv").open(newline="") as history:
        rows = list(csv.DictReader(history))
    assert tuple(rows[0]) == COLUMNS
    assert [row["frames"] for row in rows] == ["120", "240"]
    assert rows[0]["num_episodes"] == "0"
    assert rows[0]["episode_return_mean"] == ""  # no episode of 30 frames ends in the first 20
    assert rows[1]["num_episodes"] == "6"
    assert float(rows[1]["loss_critic"]) > 0


def test_returns_are_of_whole_episodes_also_when_they_span_batches(tmp_path):
    config = override(
        endless(max_episode_frames=30),
        {"collection": {"rollout_frames": 20, "total_frames": 480}, "learner": {"minibatch_frames": 80}},
    )
    reports = []
    run(config, tmp_path / "run", reports.append)
    returns = [report.episodes.episode_return_mean for report in reports if report.episodes.num_episodes]
    assert returns == [30.0, 30.0]  # one reward a frame


def test_episodes_that_end_at_different_times_are_counted_each(tmp_path):
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
    loaded = checkpoints.load(tmp_path / "run" / "last")
    assert equal(tensors, loaded.tensors)
    assert (loaded.config, loaded.frames, loaded.iteration) == (tiny, 360, 3)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("name", "at_least"), [("navigation", 0.9), ("balance", 40.0), ("swarm", 45.0), ("seed-document", 35.0)]
)
def test_recipe_learns_its_task(name, at_least, seed, tmp_path):
    """A trained policy reaches the return that the recipe promises, clearly above a random one."""
    config = override(recipe(name), {"seed": seed})
    train(config, tmp_path / "last", tmp_path / "best", lambda report: None)
    report = evaluate(config, checkpoints.load(tmp_path / "best"))
    print(f"{name}, seed {seed}: trained {report.trained.mean}, random {report.random.mean}")
    assert report.trained.mean.value >= at_least
    assert report.trained.mean.low > report.random.mean.high
