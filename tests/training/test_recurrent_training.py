"""The training of networks with a memory: collected, saved, resumed, evaluated, compared, promoted."""

import json
from dataclasses import replace

import pytest
import torch

from mappo.__main__ import main
from mappo.config import EvaluationConfig, from_dict, override
from mappo.environment.environment import make_environment
from mappo.environment.keys import CRITIC_MEMORY, DONE, MEMORY, STEP_COUNT, next_key
from mappo.environment.random_streams import Stream, private_random_streams
from mappo.errors import CheckpointError, SimulationStateError
from mappo.evaluation.episodes import play_episodes, trained_policy
from mappo.evaluation.evaluation import evaluate
from mappo.learning.networks import make_networks
from mappo.promotion.champions import Champions, policy_key, task_name
from mappo.promotion.gate import Gate
from mappo.promotion.promotion import judge
from mappo.recipes import recipe
from mappo.runs.checkpoint import restore_networks
from mappo.runs.run import Run, load_checkpoint
from mappo.strict_json import json_hash, to_dict
from mappo.training.local_collector import LocalCollector
from mappo.training.training_state import StartingPoint
from tests.conftest import CPU, TINY
from tests.promotion.test_champions import crown
from tests.runs.test_checkpoint import edited_manifest, put_manifest
from tests.support.runs import assert_same_training, last, train_here

RECURRENT = override(
    from_dict({**TINY, "environment": {**TINY["environment"], "max_episode_frames": 7}}),
    {"networks": {"memory": "gru", "memory_size": 5}},
)


@pytest.fixture(scope="module")
def recurrent(tmp_path_factory):
    """Return the last checkpoint of a run of RECURRENT."""
    return train_here(RECURRENT, tmp_path_factory.mktemp("recurrent"))


def batches_of(config, simulation, count=2):
    """Return batches in a row of a collector of this kind of simulation, whose steps are traced, not compiled."""
    with private_random_streams(0, Stream.TRAINING, CPU):
        collector = LocalCollector(config, CPU, simulation)
        networks = make_networks(config.networks, collector.environment)
        collector.begin(networks.player)
        return networks, [collector.collect(networks.player) for _ in range(count)]


@pytest.mark.usefixtures("traced_only")
def test_fast_simulation_carries_the_memory_as_the_plain_environment_does():
    """Frames are equal up to the first reset; after that, the memory is that of the observations of the batch."""
    environment = {"scenario": "tests.support.scenarios:PushRight", "scenario_kwargs": {}}
    config = override(RECURRENT, {"environment": environment})
    networks, plain = batches_of(config, "plain")
    _, fast = batches_of(config, "fast")
    for key in plain[0].keys(True, True):
        torch.testing.assert_close(fast[0][key][:, :7], plain[0][key][:, :7])
    assert set(fast[0].keys(True, True)) == set(plain[0].keys(True, True))
    whole = torch.cat(fast, dim=1)
    assert (whole[STEP_COUNT] == 0).sum() >= 6 * 5
    for key, module in ((MEMORY, networks.policy[0].module), (CRITIC_MEMORY, networks.critic.module)):
        memory = whole[key]
        assert (memory[whole[STEP_COUNT][..., 0] == 0] == 0).all()
        with torch.no_grad():
            *_, following = module(whole["agents", "observation"], memory)
        is_kept = ~whole[next_key(DONE)][:, :-1, 0]
        torch.testing.assert_close(memory[:, 1:][is_kept], following[:, :-1][is_kept])


@pytest.mark.long
def test_processes_carry_the_memory_of_their_environments(tmp_path):
    """Two processes play other episodes than one, but all of training resumes exactly."""
    config = override(RECURRENT, {"collection": {"processes": 2}})
    whole = train_here(config, tmp_path / "whole")
    stop_training(config, tmp_path / "stopped")
    assert_same_training(train_here(config, tmp_path / "stopped"), whole)


DAMAGES = {
    "not finite": lambda memory: memory.fill_(float("nan")),
    "not between -1 and 1": lambda memory: memory.fill_(1e20),
}


@pytest.mark.parametrize(("name", "key"), [("agents/memory", MEMORY), ("critic_memory", CRITIC_MEMORY)])
@pytest.mark.parametrize("damage", DAMAGES)
def test_impossible_memory_in_a_checkpoint_is_refused(name, key, damage):
    with private_random_streams(0, Stream.TRAINING, CPU):
        collector = LocalCollector(RECURRENT, CPU)
        networks = make_networks(RECURRENT.networks, collector.environment)
        collector.begin(networks.player)
        collector.collect(networks.player)
        DAMAGES[damage](collector._carried[key])
        state = collector.capture()
        with pytest.raises(SimulationStateError, match=f"{name}, carried between batches, is {damage}"):
            collector.restore(state)


@pytest.mark.parametrize("networks", [{}, {"memory": "gru", "memory_size": 6}, {"memory": "gru", "critic": "own"}])
def test_state_of_a_run_with_another_memory_is_refused(networks):
    states = []
    for values in (networks, {"memory": "gru", "memory_size": 5}):
        config = override(from_dict(TINY), {"networks": values})
        with private_random_streams(0, Stream.TRAINING, CPU):
            collector = LocalCollector(config, CPU)
            collector.begin(make_networks(config.networks, collector.environment).player)
            states.append(collector.capture())
    with private_random_streams(0, Stream.TRAINING, CPU), pytest.raises(SimulationStateError, match="memory"):
        collector.restore(states[0])


def test_checkpoint_with_other_networks_is_refused(recurrent, checkpoint):
    for config, other in ((RECURRENT, checkpoint), (from_dict(TINY), recurrent)):
        with private_random_streams(0, Stream.TRAINING, CPU):
            environment = make_environment(config.environment, 1, 0, Stream.TRAINING, CPU)
            networks = make_networks(config.networks, environment)
        with pytest.raises(CheckpointError, match="cell.weight_hh is"):
            restore_networks(other, networks)


def test_run_of_a_version_without_memory_continues(tmp_path):
    """A configuration that such a version saved lacks the fields."""
    config = from_dict(TINY)
    whole = train_here(config, tmp_path / "whole")
    stop_training(config, tmp_path / "old")
    values = to_dict(config)
    for section, name in (("networks", "memory"), ("networks", "memory_size"), ("learner", "chunk_frames")):
        del values[section][name]
    run = Run.at(tmp_path / "old")
    put_manifest(run, edited_manifest(run, config=values, config_hash=json_hash(values)))
    assert_same_training(train_here(config, tmp_path / "old"), whole)


def stop_training(config, directory):
    """Train, and stop after the second of three iterations."""

    def stop(report):
        if report.progress.iteration == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_here(config, directory, stop)
    assert last(directory).iteration < 3


def test_run_extends_and_warm_starts_with_its_memory(recurrent, tmp_path):
    longer = override(RECURRENT, {"collection": {"total_frames": 600}})
    assert train_here(longer, tmp_path / "longer", start=StartingPoint("extend", recurrent)).iteration == 5
    warm = train_here(RECURRENT, tmp_path / "warm", start=StartingPoint("warm-start", recurrent))
    assert warm.iteration == 3


def test_selection_evaluates_the_policy_as_the_evaluation_does(recurrent):
    """The evaluation during training remembers, too: its return is that of the same episodes played again."""
    returns, _ = play_episodes(
        trained_policy(RECURRENT, recurrent), RECURRENT, RECURRENT.selection, Stream.SELECTION
    )
    assert recurrent.selection_return == pytest.approx(sum(returns) / len(returns), abs=1e-12)


def test_gate_compares_recurrent_policies_with_others_of_the_same_task(recurrent, checkpoint, tmp_path):
    """A policy plays with its own networks, whichever of the two is the champion."""
    environment = RECURRENT.environment
    other = replace(checkpoint, config=replace(checkpoint.config, environment=environment))
    gate = Gate(num_seeds=10, episodes_per_seed=2)
    for candidate, champion in ((recurrent, other), (other, recurrent)):
        champions = Champions(str(tmp_path / policy_key(champion)), task_name(environment))
        crown(champions, champion)
        decision = judge(RECURRENT, candidate, champions, champions.current(), gate)
        assert decision.opponent == "champion 1"
        for policy, returns in ((candidate, decision.candidate_returns), (champion, decision.opponent_returns)):
            config = replace(RECURRENT, networks=policy.config.networks)
            episodes = EvaluationConfig(seeds=tuple(decision.seeds), episodes_per_seed=2)
            assert play_episodes(trained_policy(config, policy), config, episodes, Stream.GATE)[0] == returns


def test_commands_take_a_recurrent_run(tmp_path, monkeypatch, capsys):
    """Train, evaluate, compare and report, as a user does."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**TINY, "networks": {"memory": "gru", "memory_size": 5}}))
    for seed in ("0", "1"):
        assert main(["train", "--config", "config.json", "--seed", seed, "--run", f"run-{seed}"]) == 0
        assert main(["evaluate", f"runs/run-{seed}", "--output", f"{seed}.json"]) == 0
    assert main(["compare", "0.json", "1.json"]) == 0
    assert main(["report", "runs/run-0", "--output", "page.html"]) == 0
    assert "with recurrent networks" in (tmp_path / "page.html").read_text()
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.long
@pytest.mark.parametrize("seed", range(2))
def test_memory_learns_recall_and_networks_without_memory_stay_at_chance(seed, tmp_path):
    """The best return is 1, and 0.5 on average without memory."""
    returns = {}
    for memory in ("gru", "none"):
        config = override(recipe("recall"), {"seed": seed, "networks": {"memory": memory}})
        train_here(config, tmp_path / memory)
        returns[memory] = evaluate(config, load_checkpoint(tmp_path / memory, "best")).trained.mean
    print(f"recall, seed {seed}: {returns}")
    assert returns["gru"].value >= 0.9
    assert returns["none"].value < 0.6
