import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from mappo.config import EnvironmentConfig
from mappo.environment.environment import make_environment
from mappo.environment.keys import ACTION, OBSERVATION
from mappo.environment.random_streams import Stream, private_random_streams, random_states, set_random_states
from mappo.errors import NotFaithful
from mappo.fast_simulation.equivalence import check_steps, slots_of_resets
from mappo.fast_simulation.fast_simulation import make_fast_simulation
from mappo.fast_simulation.fresh_states import FreshStatePool
from mappo.fast_simulation.pure_step import trace_step
from mappo.fast_simulation.slots import copies, find_slots, same_bits
from tests.cli.test_main import TINY
from tests.conftest import CPU

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.*:DeprecationWarning")  # torch's compiler itself

QUICK = ["balance", "dropout", "navigation", "swarm", "transport", "wheel"]
SLOW = ["dispersion", "flocking", "give_way", "multi_give_way", "passage", "reverse_transport"]


def environment_of(scenario, num_envs=16, stream=Stream.VALIDATION, **options):
    config = EnvironmentConfig(scenario=scenario, max_episode_frames=25, **options)
    return make_environment(config, num_envs, 0, stream, CPU)


def assert_agrees(scenario, **options):
    """State, observations, rewards and flags of every frame of a rollout; what resets write."""
    with private_random_streams(0, Stream.VALIDATION, CPU):
        environment = environment_of(scenario, **options)
        step = trace_step(environment)
        assert slots_of_resets(environment, step) <= set(step.names)
        check_steps(environment, step)


def simulation_of(scenario, num_envs=16, is_compiled=False):
    config = EnvironmentConfig(scenario=scenario, max_episode_frames=25)
    environment = make_environment(config, num_envs, 0, Stream.TRAINING, CPU)
    return make_fast_simulation(config, environment, is_compiled), environment


def play(simulation, environment, frames, state, observation, supply):
    """What random play shows, where one environment ends in every other frame; and what is carried."""
    seen = []
    for index in range(frames):
        supply = simulation.supplied(supply)
        state, observation, reward, done = simulation.step(state, environment.rand_action()[ACTION])
        seen += [observation, reward]
        done = done.clone()
        done[index % len(done)] |= index % 2 == 0
        state, observation, fresh = simulation.reset_finished(done, state, observation, supply.fresh)
        supply = supply.after(fresh)
    return seen, (state, observation, supply)


def same(one, other):
    return len(one) == len(other) and all(
        same_bits(each, another) for each, another in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("scenario", QUICK)
def test_one_step_agrees_with_plain_vmas(scenario):
    assert_agrees(scenario)


@pytest.mark.long
@pytest.mark.parametrize("scenario", SLOW)
def test_one_step_agrees_with_plain_vmas_in_large_scenarios(scenario):
    assert_agrees(scenario)


@pytest.mark.parametrize("actions", ["discrete", "multi-discrete"])
def test_one_step_agrees_with_plain_vmas_where_actions_are_choices(actions):
    assert_agrees("transport", actions=actions)


def test_agents_that_speak_agree_with_plain_vmas():
    assert_agrees("tests.support.scenarios:MoveAndSpeak")


def test_masked_writes_agree_with_plain_vmas():
    assert_agrees("tests.support.scenarios:MaskedWrites")


def test_what_only_one_environment_is_near_to_counts_as_in_plain_vmas():
    """VMAS skips collisions of a pair that is near in no environment; forces would reach a little further."""
    assert_agrees("transport", num_envs=60)


@pytest.mark.parametrize(
    ("scenario", "reason"),
    [
        ("HostBranch", r"Python depends on a tensor's value \(scenarios.py:\d+: if \(self.age > 5\).any"),
        (
            "NoisyObservation",
            r"it draws random numbers in a step: aten.rand_like.default \(scenarios.py:\d+: return",
        ),
        ("CountOfMasked", r"sum of as many values as a mask has"),
        ("ManyKindsOfState", r"it keeps state outside of tensors: "),
        ("HiddenState", r"it keeps state outside of tensors: scenario.frames"),
        ("SharedClock", r"environments share state: scenario.clock"),
        ("GreedyReset", r"a reset of one environment changes others: "),
        ("LazyReset", r"a reset of one environment is not like a reset of all: "),
        ("Exploding", r"Python depends on a tensor's value"),
        ("RareState", r"outside of tensors|differ after frame"),
    ],
)
def test_scenario_that_cannot_be_captured_is_refused_with_the_reason(scenario, reason):
    with pytest.raises(NotFaithful, match=reason):
        simulation_of(f"tests.support.scenarios:{scenario}")


@pytest.mark.parametrize(
    ("scenario", "reason"),
    [
        ("discovery", r"Python depends on a tensor's value \(vmas/simulator/utils.py:\d+: if torch.any\(overlaps"),
        ("ball_passage", r"it keeps state outside of tensors: scenario.passages_to_place"),
        ("football", r"it keeps state outside of tensors: "),
        ("sampling", r"it replaces objects, and not only tensors: scenario\.gaussians"),
    ],
)
def test_scenario_of_vmas_that_cannot_be_captured_is_refused_with_the_reason(scenario, reason):
    with pytest.raises(NotFaithful, match=reason):
        simulation_of(scenario)


def test_scenario_whose_environments_differ_is_refused():
    config = EnvironmentConfig(
        scenario="tests.support.scenarios:Endless", scenario_kwargs={"terminate_after": list(range(5, 9))}
    )
    with pytest.raises(NotFaithful, match=r"environments differ: scenario\.terminate_after"):
        make_fast_simulation(config, make_environment(config, 4, 0, Stream.TRAINING, CPU), False)


def _a_little_more(value):
    return 1.01 * value if value.dtype.is_floating_point else value


def test_step_that_is_wrong_is_found_by_the_check():
    with private_random_streams(0, Stream.VALIDATION, CPU):
        environment = environment_of("balance")
        step = trace_step(environment)
        wrong = replace(step, run=lambda *inputs: [_a_little_more(each) for each in step.run(*inputs)])
        with pytest.raises(NotFaithful, match=r"and not .*; \d+ of \d+ numbers differ after frame 1 of a trial"):
            check_steps(environment, step, wrong)


def test_capture_touches_no_random_numbers_and_no_environment():
    with private_random_streams(3, Stream.TRAINING, CPU):
        before = random_states(CPU)
        config = EnvironmentConfig(scenario="wheel")
        environment = make_environment(config, 4, 0, Stream.TRAINING, CPU)
        seeded = random_states(CPU)
        make_fast_simulation(config, environment, False)
        after = random_states(CPU)
    assert str(before["numpy"]) == str(after["numpy"])
    assert torch.equal(seeded["torch"], after["torch"])
    assert torch.equal(seeded["vmas"][0], after["vmas"][0])


def test_first_state_is_that_of_the_plain_environment():
    with private_random_streams(3, Stream.TRAINING, CPU):
        expected = environment_of("navigation", stream=Stream.TRAINING).reset()[OBSERVATION]
    with private_random_streams(3, Stream.TRAINING, CPU):
        simulation, _ = simulation_of("navigation")
        _, observation, _ = simulation.begin()
    assert torch.equal(observation, expected)


GOAL = "world._landmarks[0]._state._pos"


def test_finished_environments_take_fresh_states_in_order_and_others_stay():
    with private_random_streams(3, Stream.TRAINING, CPU):
        simulation, _ = simulation_of("navigation", 4)
        state, observation, supply = simulation.begin()
        fresh = simulation.supplied(supply).fresh
        done = torch.tensor([[False], [True], [False], [True]])
        after, shown, left = simulation.reset_finished(done, state, observation, fresh)
        assert torch.equal(after[GOAL][[1, 3]], left.state[GOAL][[0, 1], 0])
        assert torch.equal(after[GOAL][[0, 2]], state[GOAL][[0, 2]])
        assert torch.equal(shown[[1, 3]], left.observation[[0, 1], 0])
        assert torch.equal(shown[[0, 2]], observation[[0, 2]])
        assert left.taken - fresh.taken == 2


@pytest.mark.parametrize("is_waited_for", [True, False])
def test_every_fresh_state_is_taken_once_and_in_the_order_in_which_resets_made_them(is_waited_for, monkeypatch):
    """Kept in between, as in checkpoints; a GPU is not waited for, which leads to the same."""
    made, taken = [], []
    with private_random_streams(3, Stream.TRAINING, CPU):
        simulation, _ = simulation_of("navigation", 4)
        monkeypatch.setattr(simulation, "_is_waited_for", is_waited_for)
        resets = simulation._reset
        monkeypatch.setattr(simulation, "_reset", lambda: made.append(resets()) or made[-1])
        state, observation, supply = simulation.begin()
        for index in range(40):
            done = torch.rand(4, 1) < index / 40
            supply = simulation.supplied(supply)
            state, observation, fresh = simulation.reset_finished(done, state, observation, supply.fresh)
            supply = supply.after(fresh)
            taken += state[GOAL][done.squeeze(-1)].tolist()
            if index % 3 == 0:
                supply = FreshStatePool.of(*supply.kept())
    assert taken == [goal for start, _ in made[1:] for goal in start[GOAL].tolist()][: len(taken)]
    assert len(taken) <= 4 * (len(made) - 1) < len(taken) + 12


def test_fresh_state_is_one_that_the_plain_environment_plays_on_from():
    """The observation that goes with a fresh state is the one that a step of nothing but zeros starts from."""
    with private_random_streams(3, Stream.TRAINING, CPU):
        simulation, environment = simulation_of("navigation", 4)
        *_, supply = simulation.begin()
        fresh = supply.with_another_set(*simulation._reset()).fresh
        slots = find_slots(environment)
        starts = {path: value[:, 0] for path, value in fresh.state.items()}
        for path, value in {**copies(slots, starts), **starts}.items():
            slots[path].put(value)
        seen = environment.base_env._env.get_from_scenario(True, False, False, False)[0]
    assert torch.equal(torch.stack(seen, 1), fresh.observation[:, 0])


def test_equal_seeds_play_the_same_bits():
    def played():
        with private_random_streams(3, Stream.TRAINING, CPU):
            simulation, environment = simulation_of("transport")
            start = simulation.begin()
            return play(simulation, environment, 30, *start)[0]

    assert same(played(), played())


def test_play_goes_on_bit_by_bit_from_what_is_carried():
    def copy(carried):
        state, observation, supply = carried
        kept = {path: value.clone() for path, value in state.items()}
        return kept, observation.clone(), supply

    with private_random_streams(3, Stream.TRAINING, CPU):
        simulation, environment = simulation_of("transport")
        _, carried = play(simulation, environment, 11, *simulation.begin())
        carried, torch_state = copy(carried), random_states(CPU)
        expected, _ = play(simulation, environment, 30, *carried)
        again, another = simulation_of("transport")
        set_random_states(torch_state, CPU)
        found, _ = play(again, another, 30, *carried)
    assert same(expected, found)


def test_compiled_step_agrees_with_plain_vmas():
    with private_random_streams(3, Stream.TRAINING, CPU):
        simulation, environment = simulation_of("tests.support.scenarios:MaskedWrites", is_compiled=True)
        seen, _ = play(simulation, environment, 30, *simulation.begin())
    assert all(each.isfinite().all() for each in seen)


@pytest.mark.long
@pytest.mark.parametrize("scenario", [*QUICK, *SLOW])
def test_compiled_step_agrees_with_plain_vmas_in_every_accepted_scenario(scenario):
    simulation_of(scenario, 60, is_compiled=True)


def test_arguments_of_a_step_are_not_changed():
    with private_random_streams(3, Stream.TRAINING, CPU):
        simulation, environment = simulation_of("transport")
        state, *_ = simulation.begin()
        before = {path: value.clone() for path, value in state.items()}
        simulation.step(state, environment.rand_action()[ACTION])
    assert all(same_bits(state[path], value) for path, value in before.items())


def test_without_a_compiler_training_says_what_is_missing(tmp_path):
    environment = {**os.environ, "CXX": "/nowhere/g++", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "mappo", "train", "--environment.scenario=dropout", *TINY]
    command += ["--collection.simulation=fast", "--run=first", f"--store={tmp_path}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    said = done.stdout + done.stderr
    assert "collection.simulation = fast" in said
    assert "sudo apt install g++ python3-dev" in said
    assert "Traceback" not in said
