import json
import random
import time

import numpy as np
import pytest
import torch

from mappo.config import EnvironmentConfig
from mappo.environment import (
    DONE,
    OBSERVATION,
    REWARD,
    SCENARIOS,
    Stream,
    make_environment,
    private_random_streams,
    random_states,
    set_random_states,
)
from mappo.simulation import SimulationStateError, State, capture, restore
from tests.conftest import CPU


def environment_of(scenario, stream=Stream.TRAINING, num_envs=5, **options):
    return make_environment(
        EnvironmentConfig(scenario=scenario, max_episode_frames=12, **options), num_envs, 0, stream, CPU
    )


def play(environment, carried, frames, actions=None):
    """Observations, rewards and ends [envs, time] of random play; also what is carried, and the actions."""
    played = []
    for frame in range(frames):
        carried = environment.rand_action(carried)
        if actions is not None:
            carried["agents", "action"] = actions[:, frame]
        stepped, carried = environment.step_and_maybe_reset(carried)
        played.append(stepped)
    return torch.stack(played, 1), carried


def through_json(state):
    return State(json.loads(json.dumps(state.structure, allow_nan=False)), state.tensors)


def goes_on_the_same(scenario, **options):
    with private_random_streams(0, Stream.TRAINING, CPU):
        original = environment_of(scenario, **options)
        _, carried = play(original, original.reset(), 17)
        state = through_json(capture(original, carried=dict(carried.items(True, True)), random_states=random_states(CPU)))
        expected, _ = play(original, carried, 30)
        restored = environment_of(scenario, stream=Stream.EVALUATION, **options)
        play(restored, restored.reset(), 3)
        others = restore(state, restored)
        set_random_states(others["random_states"], CPU)
        again = capture(restored, carried=others["carried"], random_states=random_states(CPU))
        assert again.structure == state.structure
        assert all(torch.equal(again.tensors[name].nan_to_num(7), value.nan_to_num(7)) for name, value in state.tensors.items())
        carried = restored.reset()
        others2 = restore(state, restored)
        set_random_states(others2["random_states"], CPU)
        for key, value in others["carried"].items():
            carried[key] = value
        found, _ = play(restored, carried, 30)
    for key in (OBSERVATION, REWARD, DONE, ("agents", "action")):
        name = ("next", *key) if isinstance(key, tuple) else ("next", key)
        name = key if key == ("agents", "action") else name
        assert torch.equal(expected[name].nan_to_num(7), found[name].nan_to_num(7)), name
    assert expected["next", DONE].any()


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_restored(scenario):
    from mappo.config import ConfigError
    try:
        goes_on_the_same(scenario)
    except ConfigError as e:
        pytest.skip(str(e)[:100])
