import json

import pytest
import torch

from mappo.config import EnvironmentConfig
from mappo.environment.environment import make_environment
from mappo.environment.keys import ACTION, DONE, OBSERVATION, REWARD
from mappo.environment.known_scenarios import scenario_modules
from mappo.environment.random_streams import Stream, private_random_streams, random_states, set_random_states
from mappo.environment.simulation_state import SimulationState, capture, restore
from mappo.errors import ConfigError, SimulationStateError
from tests.conftest import CPU

WITH_MUCH_STATE = [  # joints, ropes, lidar, controllers, Gaussian fields, communication, random references
    *(
        "balance",
        "discovery",
        "football",
        "joint_passage_size",
        "navigation",
        "sampling",
        "simple_reference",
        "swarm",
    ),
    *("vel_control", "waterfall", "tests.support.scenarios:ManyKindsOfState"),
]


def environment_of(scenario, stream=Stream.TRAINING, **options):
    config = EnvironmentConfig(scenario=scenario, max_episode_frames=12, **options)
    return make_environment(config, 5, 0, stream, CPU)


def play(environment, carried, frames):
    """Return a batch [envs, time] of random actions, with resets of finished episodes, and `carried`."""
    batch = []
    for _ in range(frames):
        frame, carried = environment.step_and_maybe_reset(environment.rand_action(carried))
        batch.append(frame)
    return torch.stack(batch, 1), carried


def through_json(state):
    return SimulationState(
        json.loads(
            json.dumps(
                state.structure,
                allow_nan=False,
            )
        ),
        state.tensors,
    )


def is_same(first, second):
    return torch.equal(first.nan_to_num(7), second.nan_to_num(7))


def assert_continues_identically(scenario, **options):
    with private_random_streams(0, Stream.TRAINING, CPU):
        original = environment_of(scenario, **options)
        _, carried = play(original, original.reset(), 17)
        state = through_json(capture(original, carried=dict(carried.items(True, True)), random=random_states(CPU)))
        expected, _ = play(original, carried, 30)
        restored = environment_of(scenario, stream=Stream.EVALUATION, **options)
        _, carried = play(restored, restored.reset(), 3)
        others = restore(state, restored)
        set_random_states(others["random"], CPU)
        recaptured = capture(restored, carried=others["carried"], random=random_states(CPU))
        for name, value in others["carried"].items():
            carried[name] = value
        actual, _ = play(restored, carried, 30)
    assert expected["next", DONE].any()
    for key in (ACTION, ("next", *OBSERVATION), ("next", *REWARD), ("next", DONE)):
        assert is_same(expected[key], actual[key]), key
    assert recaptured.structure == state.structure
    assert all(is_same(recaptured.tensors[name], value) for name, value in state.tensors.items())


@pytest.mark.filterwarnings("ignore:Force limits")
@pytest.mark.parametrize("scenario", WITH_MUCH_STATE)
def test_restored_simulation_continues_bit_identically(scenario):
    assert_continues_identically(scenario)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:Force limits")
@pytest.mark.parametrize("scenario", sorted(set(scenario_modules()) - set(WITH_MUCH_STATE)))
def test_restored_simulation_continues_bit_identically_in_every_other_scenario(scenario):
    try:
        environment_of(scenario)
    except ConfigError as error:
        pytest.skip(str(error)[:80])
    assert_continues_identically(scenario)


def test_slots_that_share_a_tensor_or_memory_share_it_after_restore():
    environment = environment_of("tests.support.scenarios:ManyKindsOfState")
    environment.reset()
    scenario = environment.base_env._env.scenario
    scenario.alias = scenario.whole
    state = capture(environment)
    other = environment_of("tests.support.scenarios:ManyKindsOfState")
    restore(state, other)
    restored = other.base_env._env.scenario
    assert restored.alias is restored.whole
    restored.whole[0, 1] = 42.0
    assert restored.part[0, 0] == 42.0
    assert restored.whole is not scenario.whole


def test_captured_state_is_a_copy():
    environment = environment_of("navigation")
    _, carried = play(environment, environment.reset(), 2)
    state = capture(environment)
    tensors = {name: value.clone() for name, value in state.tensors.items()}
    play(environment, carried, 3)
    assert all(is_same(state.tensors[name], value) for name, value in tensors.items())


def test_restore_of_another_task_raises_an_error_that_names_the_path():
    state = capture(environment_of("navigation"))
    with pytest.raises(SimulationStateError, match=r"world\._|scenario"):
        restore(state, environment_of("balance"))


def test_hostile_state_is_refused():
    def refuses(change):
        state = through_json(capture(environment_of("tests.support.scenarios:Endless")))
        change(state.structure)
        with pytest.raises(SimulationStateError):
            restore(state, environment_of("tests.support.scenarios:Endless"))

    def scenario(structure):
        return structure["objects"]["scenario"][1]

    refuses(lambda structure: scenario(structure).update({"reward": 5}))  # would replace a method
    refuses(lambda structure: scenario(structure).update({"__class__": 5}))
    refuses(lambda structure: scenario(structure).update({"age": {"run": "rm"}}))
    refuses(lambda structure: scenario(structure).update({"age": {"tensor": 10_000}}))
    refuses(lambda structure: scenario(structure).update({"age": {"object": "nowhere"}}))
    refuses(lambda structure: structure["views"][0].update({"size": [10**9, 10**9]}))
    refuses(lambda structure: structure["views"][0].update({"memory": "none"}))
    refuses(lambda structure: structure["objects"].update({"world.new": ["os.system", {}]}))
    refuses(lambda structure: structure.pop("objects"))
    refuses(lambda structure: structure.update({"others": 3}))


def test_tensor_that_cannot_be_captured_is_named():
    environment = environment_of("tests.support.scenarios:Endless")
    environment.base_env._env.scenario.odd = torch.eye(3).to_sparse()
    with pytest.raises(SimulationStateError, match=r"scenario\.odd: a torch.sparse_coo tensor"):
        capture(environment)
