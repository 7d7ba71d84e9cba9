import random
import warnings

import numpy as np
import pytest
import torch

from mappo.compute.resources import resolve_device
from mappo.config import EnvironmentConfig
from mappo.environment.environment import make_environment
from mappo.environment.keys import ACTION, DONE, OBSERVATION, REWARD, TERMINATED, TRUNCATED
from mappo.environment.random_streams import Stream, private_random_streams
from mappo.errors import ConfigError
from tests.conftest import CPU, endless


def make(scenario, num_envs=3, seed=0, stream=Stream.TRAINING, **kwargs):
    return make_environment(EnvironmentConfig(scenario=scenario, **kwargs), num_envs, seed, stream, CPU)


def test_time_limit_is_truncation_and_not_termination():
    environment = make("tests.support.scenarios:Endless", max_episode_frames=4)
    rollout = environment.rollout(6, break_when_any_done=False)["next"]
    is_at_limit = torch.tensor([False, False, False, True, False, False])
    for env in range(3):
        assert torch.equal(rollout[TRUNCATED][env, :, 0], is_at_limit)
        assert torch.equal(rollout[DONE][env, :, 0], is_at_limit)
    assert not rollout[TERMINATED].any()


def test_early_end_is_termination_and_not_truncation():
    environment = make(
        "tests.support.scenarios:Endless", max_episode_frames=10, scenario_kwargs={"terminate_after": 3}
    )
    rollout = environment.rollout(6, break_when_any_done=False)["next"]
    ends = torch.tensor([False, False, True, False, False, True])
    for env in range(3):
        assert torch.equal(rollout[TERMINATED][env, :, 0], ends)
    assert not rollout[TRUNCATED].any()


def test_training_and_evaluation_have_different_episodes_for_the_same_seed():
    starts = [make("navigation", seed=7, stream=stream).reset()[OBSERVATION] for stream in Stream]
    assert len({tuple(start.flatten().tolist()) for start in starts}) == len(Stream)


def test_same_seed_and_stream_give_the_same_episodes():
    def episode():
        with private_random_streams(5, Stream.TRAINING, CPU):
            return make("balance", seed=5).rollout(10)

    first, second = episode(), episode()
    for key in (OBSERVATION, ACTION, ("next", *REWARD)):
        assert torch.equal(first[key], second[key])


def test_private_random_streams_do_not_change_random_numbers_outside():
    environment = make("navigation")

    def draw():
        state = environment.reset()  # draws from VMAS's own state
        return torch.rand(1).item(), np.random.rand(), random.random(), state[OBSERVATION].sum().item()

    def seed():
        torch.manual_seed(1)
        np.random.seed(1)
        random.seed(1)
        environment.set_seed(1)

    seed()
    expected = [draw(), draw()]
    seed()
    first = draw()
    with pytest.raises(KeyError), private_random_streams(3, Stream.EVALUATION, CPU):
        make("balance", seed=3).rollout(5)
        raise KeyError
    assert [first, draw()] == expected


def test_scenario_that_draws_random_numbers_in_its_construction_is_reproducible():
    def observations():
        with private_random_streams(5, Stream.TRAINING, CPU):
            np.random.rand()
            return make("football", num_envs=2).rollout(2)[OBSERVATION]

    first = observations()
    np.random.rand(17)
    assert torch.equal(first, observations())


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"scenario": "navigtion"}, ["navigtion", "did you mean navigation?"]),
        ({"scenario": "zzz"}, ["zzz", "balance", "wheel"]),
        ({"scenario": "navigation", "scenario_kwargs": {"n_agent": 3}}, ["n_agent", "did you mean n_agents?"]),
        (
            {"scenario": "vmas.scenarios.navigation:Scenario", "scenario_kwargs": {"n_agent": 3}},
            ["refuses an argument", "{'n_agent': 3} passed but not used by the scenario."],
        ),
        ({"scenario": "navigation", "scenario_kwargs": {"terminated_truncated": True}}, ["terminated_truncated"]),
        ({"scenario": ":X"}, [":X", "cannot be imported"]),
        ({"scenario": "os:abort"}, ["os:abort", "not a subclass of vmas' BaseScenario"]),
        ({"scenario": "sys:exit"}, ["sys:exit", "not a subclass of vmas' BaseScenario"]),
        ({"scenario": "builtins:dict"}, ["builtins:dict", "not a subclass of vmas' BaseScenario"]),
        (
            {"scenario": "tests.support.exits:Scenario"},
            ["cannot be imported", "SystemExit"],
        ),
        ({"scenario": ".a:B"}, [".a:B", "cannot be imported"]),
        ({"scenario": "vmas.simulator.scenario:BaseScenario"}, ["cannot be imported", "abstract"]),
        ({"scenario": "navigation", "scenario_kwargs": {"num_envs": 3}}, ["num_envs"]),
        ({"scenario": "navigation", "scenario_kwargs": {"n_agents": "x"}}, ["cannot be built", "n_agents"]),
        ({"scenario": "simple_tag"}, ["adversary_0: observation (16,)", "agent_0: observation (14,)"]),
        (
            {"scenario": "tests.support.scenarios:Missing"},
            ["tests.support.scenarios:Missing", "cannot be imported"],
        ),
        ({"scenario": "no.such.module:Class"}, ["no.such.module:Class", "cannot be imported"]),
        ({"scenario": "json:JSONDecoder"}, ["json:JSONDecoder", "BaseScenario"]),
    ],
)
def test_unusable_task_raises_an_error_that_names_the_field(config, words):
    with pytest.raises(ConfigError) as error:
        make(**config)
    for word in ["environment", *words]:
        assert word in str(error.value)


@pytest.mark.parametrize("scenario", ["balance", "dropout", "football", "simple_reference", "wheel"])
def test_scenario_with_equal_agents_has_one_group_of_agents(scenario):
    environment = make(scenario)
    rollout = environment.rollout(2)
    num_agents = environment.n_agents
    assert rollout[OBSERVATION].shape[:3] == (3, rollout.shape[1], num_agents)
    assert rollout["next", *REWARD].shape == (3, rollout.shape[1], num_agents, 1)


def test_cuda_is_refused_when_there_is_no_gpu():
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    with pytest.raises(ConfigError, match="device = 'cuda'"):
        resolve_device("cuda")
    assert resolve_device("auto") == CPU


def test_custom_scenario_receives_its_arguments():
    environment = make_environment(
        endless(scenario_kwargs={"n_agents": 4}).environment, 2, 0, Stream.TRAINING, CPU
    )
    assert environment.rollout(1)[OBSERVATION].shape == (2, 1, 4, 1)


def test_warning_of_a_scenario_is_issued_once_per_process():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            make("vel_control")
    assert len([warning for warning in caught if "Force limits" in str(warning.message)]) <= 1


@pytest.mark.parametrize(
    "name", ["os:abort", "sys:exit", "builtins:exit", "subprocess:Popen", "os:environ", "math:pi", "os:_exit"]
)
def test_nothing_but_a_scenario_is_called(name):
    with pytest.raises(ConfigError, match=f"scenario = '{name}': not a subclass of vmas' BaseScenario"):
        make(name)


@pytest.mark.parametrize(
    "statement", ["raise SystemExit(0)", "1 / 0", "import not_there", "Scenario = (", "exit()"]
)
def test_module_that_cannot_be_imported_is_an_error(statement, tmp_path, monkeypatch):
    (tmp_path / "broken_module.py").write_text(statement)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match="scenario = 'broken_module:Scenario': cannot be imported"):
        make("broken_module:Scenario")


@pytest.mark.parametrize("kind", ["ExitsWhenMade", "ExitsWhenBuilt"])
def test_scenario_that_exits_is_an_error(kind):
    with pytest.raises(ConfigError, match="SystemExit: 0 "):
        make(f"tests.support.scenarios:{kind}")
