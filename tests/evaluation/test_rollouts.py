import base64
import json
import math
from dataclasses import asdict, replace

import numpy as np
import pytest

from mappo.compute.resources import resolve_device
from mappo.config import from_dict, override
from mappo.environment.environment import make_environment
from mappo.environment.random_streams import Stream, private_random_streams
from mappo.evaluation import rollouts
from mappo.evaluation.evaluation import evaluate
from mappo.evaluation.rollouts import record, values
from mappo.runs.run import Run
from mappo.training.history import HistoryFile
from mappo.training.training import train
from tests.conftest import TINY


@pytest.fixture(scope="module")
def recorded(checkpoint):
    """The report of an evaluation of navigation with two agents, and its recorded episodes."""
    report = evaluate(checkpoint.config, checkpoint)
    return report, record(checkpoint.config, checkpoint, report)


def test_recorded_episodes_are_those_of_the_evaluation(recorded):
    report, recordings = recorded
    returns = report.trained.episode_returns
    trained = {episode.label: episode for episode in recordings.episodes if episode.policy == "trained"}
    per_seed = len(returns) // 2
    for label, expected in (("best", max(returns)), ("worst", min(returns)), ("median", sorted(returns)[3])):
        episode = trained[label]
        assert episode.episode_return == pytest.approx(expected, abs=1e-4)
        index = [1, 2].index(episode.seed) * per_seed + episode.number
        assert returns[index] == pytest.approx(expected)
    assert [(episode.policy, episode.label) for episode in recordings.episodes] == [
        (policy, label) for policy in ("trained", "random") for label in ("best", "median", "worst")
    ]


def test_both_policies_start_at_the_simulators_initial_positions(recorded, checkpoint):
    """Compare the first poses with those of a simulator that is only reset."""
    _, recordings = recorded
    config, device = checkpoint.config, resolve_device("cpu")
    for label in ("best", "worst"):
        trained, random = (episode for episode in recordings.episodes if episode.label == label)
        with private_random_streams(trained.seed, Stream.EVALUATION, device):
            environment = make_environment(config.environment, 4, trained.seed, Stream.EVALUATION, device)
            environment.reset()
        entities = environment.base_env._env.world.entities
        expected = np.array([entity.state.pos[trained.number].tolist() for entity in entities])
        for episode in (trained, random):
            poses = values(episode.poses)
            assert poses.shape == (episode.num_frames + 1, len(entities), 3)
            assert poses[0, :, :2] == pytest.approx(expected, abs=2 * episode.poses.unit)
        assert [entity.name for entity in trained.entities] == [entity.name for entity in entities]


def test_agents_move_and_goals_do_not(recorded):
    _, recordings = recorded
    episode = recordings.episodes[0]
    distances = np.abs(np.diff(values(episode.poses)[..., :2], axis=0)).sum(axis=(0, 2))
    for entity, distance in zip(episode.entities, distances, strict=True):
        assert (distance > 0) == (entity.kind == "agent")


def test_rays_end_at_their_range_or_at_another_agent(recorded):
    _, recordings = recorded
    for episode in recordings.episodes:
        assert len(episode.lidars) == 2
        for lidar in episode.lidars:
            distances = values(lidar.distances)
            assert distances.shape == (episode.num_frames + 1, len(lidar.angles))
            assert distances.min() >= 0
            assert distances.max() <= lidar.max_range + 1e-3
    positions = values(episode.poses)[:, :2, :2]
    gaps = np.linalg.norm(positions[:, 0] - positions[:, 1], axis=-1)
    hits = values(episode.lidars[0].distances).min(axis=1) < episode.lidars[0].max_range - 1e-3
    assert not hits[gaps > episode.lidars[0].max_range + 0.2].any()


def test_series_keeps_its_numbers_to_a_30000th_of_the_largest():
    numbers = np.array([[0.0, -2.5, math.pi], [1e-3, 2.5, -math.inf]])
    series = rollouts._series(numbers)
    assert values(series) == pytest.approx(np.array([[0.0, -2.5, math.pi], [1e-3, 2.5, 0.0]]), abs=1e-4)
    assert len(base64.b64decode(series.data)) == 2 * numbers.size


def test_recording_is_valid_json_without_nan(recorded):
    json.dumps(asdict(recorded[1]), allow_nan=False)


@pytest.mark.parametrize(
    ("scenario", "kwargs"),
    [
        ("balance", {}),  # lines, a box, colours
        ("swarm", {}),
        ("football", {"n_blue_agents": 2, "n_red_agents": 2, "ai_red_agents": True}),
        ("joint_passage_size", {}),  # joints
        ("discovery", {}),  # targets that change
        ("simple", {}),  # one agent
        pytest.param("tests.support.scenarios:Crowd", {"n_agents": 150}, marks=pytest.mark.long),  # many
    ],
)
def test_scenarios_of_all_kinds_are_recorded(scenario, kwargs, tmp_path):
    changes = {
        "environment": {"scenario": scenario, "scenario_kwargs": kwargs, "max_episode_frames": 6},
        "collection": {"num_envs": 2, "rollout_frames": 6, "total_frames": 12},
        "learner": {"minibatch_frames": 12, "epochs": 1},
        "evaluation": {"seeds": [1], "episodes_per_seed": 1},
    }
    config = override(from_dict(TINY), changes)
    trained = train(config, Run.at(tmp_path), HistoryFile(tmp_path / "history.csv"), lambda _: None)
    recordings = record(config, trained, evaluate(config, trained))
    # The evaluation has one episode, which has all three labels.
    assert {episode.label for episode in recordings.episodes} == {"best", "median", "worst"}
    has_heuristic = scenario in {"balance", "swarm", "discovery"}
    assert ("heuristic" in {episode.policy for episode in recordings.episodes}) == has_heuristic
    for episode in recordings.episodes:
        assert np.isfinite(values(episode.poses)).all()
        assert all(entity.size and min(entity.size) >= 0 for entity in episode.entities)
        assert len(episode.rewards) == episode.num_frames


def test_long_episode_omits_frames_but_keeps_the_last(checkpoint, monkeypatch):
    report = evaluate(checkpoint.config, checkpoint)
    monkeypatch.setattr(rollouts, "MAX_BYTES", 400)
    episode = record(checkpoint.config, checkpoint, report).episodes[0]
    monkeypatch.undo()
    whole = record(checkpoint.config, checkpoint, report).episodes[0]
    assert episode.stride > 1
    assert values(episode.poses)[-1] == pytest.approx(values(whole.poses)[-1], abs=1e-3)
    assert len(episode.rewards) == episode.num_frames == whole.num_frames
    assert replace(episode, poses=whole.poses, lidars=whole.lidars, stride=1, entities=whole.entities) == whole
