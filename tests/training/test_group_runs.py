"""Check runs of several groups from training to promotion: numbers by group, exact resumes, exported policies."""

import csv
import io
import math
from dataclasses import asdict

import pytest
import torch
from torchrl.envs.utils import ExplorationType, set_exploration_type

from mappo.config import from_dict, override
from mappo.environment.environment import groups_of, make_environment
from mappo.environment.keys import ACTION, OBSERVATION
from mappo.environment.random_streams import Stream
from mappo.errors import CheckpointError
from mappo.evaluation.evaluation import evaluate
from mappo.evaluation.rollouts import record
from mappo.learning.networks import make_networks
from mappo.monitoring.monitor import Monitor
from mappo.monitoring.settings import MonitorSettings
from mappo.promotion.champions import CARD, POLICY, Champions, task_name
from mappo.promotion.gate import Gate
from mappo.promotion.promotion import promote
from mappo.reporting.progress import _return
from mappo.reporting.run_page import build
from mappo.reporting.run_record import of_checkpoint
from mappo.reporting.tables import decision_lines, group_lines
from mappo.runs.checkpoint import restore_networks
from mappo.training.first_iteration import rehearse_first_iteration
from mappo.training.history import (
    BY_GROUP,
    COLUMNS,
    HistoryFile,
    Progress,
    by_group,
    parse_history,
    require_history,
)
from tests.conftest import CPU, TINY
from tests.support.runs import assert_same_training, train_here

# The scenarios of VMAS whose agents differ, with their groups.
UNEQUAL = {
    "simple_tag": ["adversary", "agent"],
    "simple_adversary": ["adversary", "agent"],
    "simple_push": ["adversary", "agent"],
    "simple_world_comm": ["lead_adversary", "adversary", "agent"],
    "simple_crypto": ["eve", "bob", "alice"],
    "simple_speaker_listener": ["speaker", "listener"],
    "diff_drive": ["diff_drive", "holo_rot"],
    "kinematic_bicycle": ["bicycle", "holo_rot"],
}


def small(scenario, *changes):
    task = {"scenario": scenario, "scenario_kwargs": {}, "max_episode_frames": 10}
    return override(
        from_dict(TINY),
        {"environment": task, "selection": {"interval_iterations": 2, "episodes_per_seed": 2}},
        *changes,
    )


@pytest.fixture(scope="module")
def payday(tmp_path_factory):
    """A run in which an episode of ten frames pays a hunter 10 and costs the prey 3,000; hunters count."""
    config = small("tests.support.scenarios:Payday", {"environment": {"return_groups": ["hunter"]}})
    reports = []
    directory = tmp_path_factory.mktemp("payday")
    return config, train_here(config, directory, reports.append), reports, directory


def test_history_has_the_returns_and_measures_of_each_group(payday):
    _, checkpoint, reports, directory = payday
    (first, *_), text = parse_history(checkpoint.history), (directory / "history.csv").read_text()
    assert text == checkpoint.history
    expected = [*COLUMNS, *(f"{name}/{group}" for group in ("hunter", "prey") for name in BY_GROUP)]
    assert text.splitlines()[0].split(",") == expected
    assert by_group(first, "episode_return_mean") == {"hunter": 10.0, "prey": -3000.0}
    assert first["episode_return_mean"] == first["episode_return_max"] == 10.0, (
        "hunters count, and the prey does not"
    )
    assert checkpoint.selection_return == 10.0
    assert all(math.isfinite(value) for name, value in first.items() if "/" in name)
    assert _return(reports[0].episodes) == "return hunter 10.000, prey -3000.000"


def test_history_with_the_columns_of_other_groups_is_refused(payday):
    _, checkpoint, _, _ = payday
    require_history(checkpoint.history, Progress(), Progress(checkpoint.iteration, checkpoint.frames))
    for change in (("kl/prey", "kl/hunter"), (",kl/prey", ""), ("clip_fraction/prey", "loss/prey")):
        with pytest.raises(CheckpointError, match="the history has other columns"):
            HistoryFile(None).restore(checkpoint.history.replace(*change))


def test_evaluation_report_page_and_metrics_have_returns_by_group(payday):
    config, checkpoint, reports, _ = payday
    report = evaluate(config, checkpoint)
    for returns in (report.trained, report.random):
        assert {name: group.episode_returns for name, group in returns.groups.items()} == {
            "hunter": [10.0] * 8,
            "prey": [-3000.0] * 8,
        }
        assert returns.episode_returns == [10.0] * 8
    rollouts = record(config, checkpoint, report)
    assert {episode.episode_return for episode in rollouts.episodes} == {10.0}
    page = build([of_checkpoint("run", checkpoint, checkpoint.history, report, asdict(rollouts))])
    for text in (
        "Return by group",
        "mean return of prey by the random policy",
        "-3e+03 [-3e+03, -3e+03]",
        "prey: trained",
    ):
        assert text in page
    assert group_lines({"trained": report.trained.groups})[2].split() == ["prey", "-3e+03", "[-3e+03,", "-3e+03]"]
    monitor = Monitor("evaluate", "r", MonitorSettings(study="s"), lambda _: None)
    monitor.evaluated(report)
    labels = 'group="prey",policy="trained",run="r",study="s"'
    assert f"mappo_evaluation_group_return_mean{{{labels}}} -3000.0" in monitor.text().decode()
    monitor = Monitor("train", "r", MonitorSettings(study="s"), lambda _: None)
    monitor.planned(config)
    monitor.iterated(reports[0])
    text = monitor.text().decode()
    assert 'mappo_group_return_mean{group="hunter",run="r",study="s"} 10.0' in text
    entropy = reports[0].losses.by_group["entropy/prey"]
    assert f'mappo_group_entropy_nats{{group="prey",run="r",study="s"}} {entropy}' in text


def test_gate_decides_by_the_groups_that_count_and_exports_each_group(tmp_path):
    """The candidate's hunters push to the right, and the prey to the left, as it should."""
    config = small("tests.support.scenarios:Teams", {"environment": {"return_groups": ["hunter"]}})
    trained = train_here(config, tmp_path / "run")
    tensors = dict(trained.tensors)
    for name in [name for name in tensors if name.startswith("policy.") and name.endswith("2.bias")]:
        tensors[name] = torch.zeros_like(tensors[name])
        tensors[name][0] = 3.0 if "hunter" in name else -3.0
    champions = Champions(tmp_path / "champions", task_name(config.environment))
    decision = promote(
        config,
        type(trained)(**{**vars(trained), "tensors": tensors}),
        champions,
        Gate(num_seeds=2, episodes_per_seed=10),
    )
    assert decision.action == "promoted"
    hunters, prey = (decision.candidate_groups[name].mean.value for name in ("hunter", "prey"))
    assert hunters == decision.candidate_mean.value > 5
    assert prey > 2
    lines = decision_lines(decision)
    assert any(line.startswith("prey ") for line in lines)
    card = champions.file(champions.current(), CARD).decode()
    assert "| group prey | prey_0: 2 observation features and 4 action values each |" in card
    assert 'actions = policy({"hunter": ..., "prey": ...})' in card

    environment = make_environment(config.environment, 3, 1, Stream.EVALUATION, CPU)
    networks = make_networks(config.networks, environment)
    restore_networks(type(trained)(**{**vars(trained), "tensors": tensors}), networks)
    state = environment.reset()
    with set_exploration_type(ExplorationType.DETERMINISTIC), torch.no_grad():
        actions = networks.policy(state)[ACTION]
    exported = torch.export.load(io.BytesIO(champions.file(champions.current(), POLICY))).module()
    groups = groups_of(environment)
    results = exported({group.name: group.observations(state[OBSERVATION]) for group in groups})
    assert [tensor.shape for tensor in results.values()] == [(3, 2, 2), (3, 1, 4)]
    for group in groups:
        torch.testing.assert_close(results[group.name], group.actions(actions))


def test_run_of_opponents_resumes_bit_by_bit(tmp_path):
    class Stopped(Exception):
        pass

    config = small("simple_tag", {"networks": {"normalise_values": True, "normalise_observations": True}})
    whole = train_here(config, tmp_path / "whole")

    def stop(report):
        if report.progress.iteration == 2:
            raise Stopped

    with pytest.raises(Stopped):
        train_here(config, tmp_path / "halves", stop)
    assert_same_training(train_here(config, tmp_path / "halves"), whole)
    rows = csv.DictReader(io.StringIO((tmp_path / "halves" / "history.csv").read_text()))
    assert [row["iteration"] for row in rows] == ["1", "2", "3"]


@pytest.mark.parametrize("scenario", UNEQUAL)
def test_unequal_agents_of_vmas_learn_in_groups(scenario):
    config = small(scenario, {"environment": {"actions": "discrete"}} if scenario == "simple_world_comm" else {})
    environment = make_environment(config.environment, 1, 0, Stream.TRAINING, CPU)
    assert [group.name for group in groups_of(environment)] == UNEQUAL[scenario]
    assert "is collected and learnt from" in rehearse_first_iteration(config)
