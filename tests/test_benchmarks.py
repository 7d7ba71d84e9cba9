import math
import os
import re
import subprocess
import sys

import pytest
import torch
from torchrl.envs.utils import ExplorationType, set_exploration_type

from benchmarks import overview, recipes, startup, throughput, tuning, update
from benchmarks.contenders import Iteration, contenders, evaluation_return, policy_with
from mappo.config import override
from mappo.environment.environment import make_environment
from mappo.environment.random_streams import Stream, private_random_streams
from mappo.learning.networks import make_networks
from mappo.runs.overview import overview as runs_overview
from mappo.runs.run import load_checkpoint
from tests.cli.test_main import TINY
from tests.support.runs import train_here


def test_recipes_benchmark_trains_evaluates_and_lists_recipes(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["recipes", "navigation", "balance", "--seeds", "0,3", *TINY])
    recipes.main()
    lines = capsys.readouterr().out.rsplit("\n\n", maxsplit=1)[1].splitlines()
    runs = [f"{name} {seed}: 120 frames in " for name in ("navigation", "balance") for seed in (0, 3)]
    assert all(line.startswith(run) for line, run in zip(lines, runs, strict=True))


@pytest.mark.long
def test_rate_benchmark_compares_ways_to_tune_with_equal_time(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["tuning", "rate", "navigation", "--minutes", "0.4", *TINY])
    tuning.main()
    rows = [line.split() for line in capsys.readouterr().out.splitlines()][1:]
    assert [row[0] for row in rows] == ["mappo", "torchrl", "torchrl"]
    assert all(float(row[2]) == pytest.approx(0.4, abs=0.1) for row in rows)
    for _, _, minutes, trials, _, trials_per_hour, best in rows[1:]:
        assert int(trials) > 0
        assert float(trials_per_hour) == pytest.approx(60 * int(trials) / float(minutes), rel=0.2)
        assert -10 < float(best) < 10


def test_overhead_benchmark_prints_a_ratio_to_a_plain_loop(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["tuning", "overhead", "navigation", "--trials", "1", *TINY])
    tuning.main()
    assert re.search(r"^ratio \d+\.\d+ \(", capsys.readouterr().out, re.MULTILINE)


def test_first_frame_command_of_the_startup_benchmark_succeeds():
    process = subprocess.run(
        [sys.executable, *startup.COMMANDS["first frame"]], capture_output=True, text=True, timeout=120
    )
    assert process.returncode == 0, process.stderr


@pytest.mark.long
def test_contenders_take_turns_and_are_evaluated_by_the_same_code(tiny, tmp_path):
    config = override(tiny, {"selection": {"interval_iterations": 1, "episodes_per_seed": 4}})
    with contenders({name: (name, config) for name in ("mappo", "TorchRL")}, os.environ) as by_name:
        turns = [
            {name: contender.run_iteration(is_evaluated=True) for name, contender in by_name.items()}
            for _ in range(2)
        ]
    for name in by_name:
        first, second = (turn[name] for turn in turns)
        assert (first.frames, second.frames) == (120, 240)
        assert second.seconds - first.seconds >= second.collect_seconds + second.learn_seconds
        assert first.evaluation_return != second.evaluation_return
    train_here(override(config, {"collection": {"total_frames": 120}}), tmp_path)
    checkpoint = load_checkpoint(str(tmp_path), "last")
    policy = {name: value for name, value in checkpoint.tensors.items() if name.startswith("policy")}
    assert evaluation_return(config, policy) == pytest.approx(checkpoint.selection_return, abs=1e-6)


def test_weights_of_each_group_go_into_its_own_policy(tiny):
    config = override(tiny, {"environment": {"scenario": "simple_tag", "scenario_kwargs": {}}})
    with private_random_streams(1, Stream.TRAINING, torch.device("cpu")):
        environment = make_environment(config.environment, 3, 1, Stream.TRAINING, torch.device("cpu"))
        networks = make_networks(config.networks, environment)
    weights = {
        f"{part.group.name}.{name}": value
        for part in reversed(networks.parts)
        for name, value in part.policy.named_parameters()
    }
    state = environment.reset()
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        actions = policy_with(config, weights)(state.clone())["agents", "action"]
        assert torch.equal(actions, networks.policy(state)["agents", "action"])


def test_update_benchmark_compares_an_update_with_its_multiplications(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["update", "navigation", "--turns", "1", *TINY])
    monkeypatch.setattr(update, "_UPDATES", ("plain",))
    update.main()
    rows = {line[:16].strip(): line[16:].split() for line in capsys.readouterr().out.splitlines()[2:]}
    assert list(rows) == ["step plain", "gradients plain", "Adam plain", "bound"]
    assert float(rows["step plain"][1]) > float(rows["bound"][1]) == 1


def test_speed_is_not_compared_when_returns_differ():
    def iteration(value):
        return Iteration(1, 1.0, 1.0, 1.0, 1, None, value)

    throughput._require_agreement({"one": iteration(0.9), "other": iteration(0.75)}, 0.2)
    for distant_return in (0.6, math.nan):
        with pytest.raises(SystemExit, match=r"differ by more than 0\.2.*one 0\.90, other"):
            throughput._require_agreement({"one": iteration(0.9), "other": iteration(distant_return)}, 0.2)


@pytest.mark.long
def test_overview_benchmark_looks_at_copies_that_differ(monkeypatch, capsys, tmp_path):
    store = str(tmp_path / "store")
    monkeypatch.setattr(sys, "argv", ["overview", store, "--runs", "3"])
    overview.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines[-3:]] == ["look 1", "look 2", "look 3"]
    summaries = runs_overview(store)
    assert [(run.name, run.problem) for run in summaries] == [(f"run-000{number}", "") for number in range(3)]
    assert all(run.evaluation for run in summaries)
    manifests = list((tmp_path / "store").rglob("checkpoints/*/*.json"))
    assert len({path.name for path in manifests}) == len(manifests) > 3
