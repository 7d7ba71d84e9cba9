import pytest
import torch
from vmas import make_env

from mappo.config import EnvironmentConfig
from mappo.environment.environment import make_environment
from mappo.environment.random_streams import Stream
from mappo.environment.scenarios.recall import HeuristicPolicy, Scenario
from mappo.errors import ConfigError
from tests.conftest import CPU


def play(act, num_envs=64, further_frames=0, **arguments):
    """Play an episode; return the cues, the observations of agent 0 [frames + 1, envs, 6], and the returns."""
    environment = make_env(Scenario(), num_envs=num_envs, device="cpu", seed=0, **arguments)
    observations = environment.reset()
    cues, seen, returns = environment.scenario.cue.clone(), [observations[0]], 0.0
    for _ in range(environment.scenario.hold_frames + environment.scenario.free_frames + further_frames):
        observations, rewards, _, _ = environment.step([act(observed) for observed in observations])
        seen.append(observations[0])
        returns = returns + torch.stack(rewards).mean(0)
    return cues[:, 0], torch.stack(seen), returns


def to_the_right(observed):
    return torch.tensor([1.0, 0.0]).expand(len(observed), 2)


def test_agent_that_remembers_returns_one():
    heuristic = HeuristicPolicy(continuous_action=True)
    returns = play(lambda observed: heuristic.compute_action(observed, 1.0), n_agents=3)[2]
    assert returns.tolist() == pytest.approx([1.0] * 64)


def test_agent_that_always_goes_right_returns_one_or_nothing():
    cues, _, returns = play(to_the_right)
    assert returns.tolist() == pytest.approx((cues > 0).float().tolist())
    assert 0.3 < returns.mean() < 0.7


def test_cue_is_seen_in_the_first_frame_only():
    cues, seen, _ = play(to_the_right)
    assert torch.equal(seen[0, :, 4], cues)
    assert set(cues.tolist()) == {-1.0, 1.0}
    assert (seen[1:, :, 4] == 0).all()


def test_gate_holds_the_agents_so_that_nothing_but_memory_can_keep_the_cue():
    """Agents push to the cue's side from the first frame on; until the gate opens, all see the same."""
    heuristic = HeuristicPolicy(continuous_action=True)
    _, seen, _ = play(lambda observed: heuristic.compute_action(observed, 1.0), hold_frames=3)
    assert (seen[1:4] == seen[1:4, :1]).all()
    assert seen[:5, 0, 5].tolist() == [1.0, 1.0, 1.0, 0.0, 0.0]
    assert (seen[4, :, 0] != 0).all()


def test_frames_after_the_free_frames_earn_nothing():
    cues, _, returns = play(to_the_right, further_frames=5, hold_frames=2, free_frames=4)
    assert returns.tolist() == pytest.approx((cues > 0).float().tolist())


def test_reset_of_one_environment_leaves_the_others():
    environment = make_env(Scenario(), num_envs=4, device="cpu", seed=0)
    environment.reset()
    for _ in range(9):
        environment.step([to_the_right(torch.zeros(4, 6))] * 2)
    cues, positions = environment.scenario.cue.clone(), environment.world.agents[0].state.pos.clone()
    environment.reset_at(2)
    others = [0, 1, 3]
    assert torch.equal(environment.scenario.cue[others], cues[others])
    assert torch.equal(environment.world.agents[0].state.pos[others], positions[others])
    assert environment.world.agents[0].state.pos[2, 0] == 0
    assert environment.scenario.frame.flatten().tolist() == [9.0, 9.0, 0.0, 9.0]


@pytest.mark.parametrize(
    "arguments", [{"n_agents": 0}, {"hold_frames": 0}, {"free_frames": 1.5}, {"holdframes": 1}]
)
def test_invalid_arguments_are_refused_and_named(arguments):
    with pytest.raises(ConfigError, match=next(iter(arguments))):
        config = EnvironmentConfig(scenario="recall", scenario_kwargs=arguments)
        make_environment(config, 2, 0, Stream.TRAINING, CPU)
