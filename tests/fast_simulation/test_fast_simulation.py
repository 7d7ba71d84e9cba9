import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from tensordict.nn import TensorDictModule

from mappo.config import EnvironmentConfig
from mappo.environment.environment import make_environment
from mappo.environment.keys import ACTION, OBSERVATION
from mappo.environment.random_streams import Stream, private_random_streams, random_states, set_random_states
from mappo.environment.state_walk import same_bits
from mappo.errors import NotFaithful
from mappo.fast_simulation.equivalence import check_steps
from mappo.fast_simulation.fast_simulation import FastEnvironment
from mappo.fast_simulation.fresh_states import FreshStatePool
from mappo.fast_simulation.making import make_fast_simulation
from mappo.fast_simulation.pure_step import find_varying, trace_step
from mappo.fast_simulation.python_state import find_slots
from mappo.fast_simulation.resets import ResetCheck
from mappo.fast_simulation.simulation import FastSimulation
from mappo.fast_simulation.slots import copies
from tests.cli.test_main import TINY
from tests.conftest import CPU

pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit.*:DeprecationWarning"),  # raised inside torch's compiler
    pytest.mark.filterwarnings("ignore:Force limits not specified"),  # by vel_control
]

QUICK = ["dropout", "wheel"]
SLOW = [
    *("balance", "dispersion", "drone", "flocking", "give_way", "goal", "multi_give_way", "navigation", "passage"),
    *("asym_joint", "buzz_wire", "circle_trajectory", "joint_passage", "joint_passage_size", "line_trajectory"),
    *(
        "sampling",
        "waterfall",
        "reverse_transport",
        "simple",
        "simple_spread",
        "recall",
        "swarm",
        "transport",
        "vel_control",
    ),
    *("simple_tag", "simple_crypto", "simple_world_comm", "diff_drive", "kinematic_bicycle"),  # unequal agents
]


def environment_of(scenario, num_envs=16, stream=Stream.VALIDATION, **options):
    config = EnvironmentConfig(scenario=scenario, max_episode_frames=25, **options)
    return make_environment(config, num_envs, 0, stream, CPU)


def traced(environment):
    """Return the step of an environment and what resets do."""
    environment.reset()
    varying = find_varying(environment)
    check = ResetCheck(environment, varying)
    step = trace_step(environment, varying)
    return step, check.resets(step)


def assert_agrees(scenario, **options):
    """Check state, observations, rewards and flags in every frame of a rollout, and the slots of resets."""
    with private_random_streams(0, Stream.VALIDATION, CPU):
        environment = environment_of(scenario, **options)
        step, resets = traced(environment)
        assert resets.names <= set(step.names)
        check_steps(environment, resets, step)


_made = {}  # simulations by scenario and number of environments, whose traced steps later tests use again


def simulation_of(scenario, num_envs=16, is_compiled=False):
    """Return a fast simulation and its environment, which is new."""
    config = EnvironmentConfig(scenario=scenario, max_episode_frames=25)
    environment = make_environment(config, num_envs, 0, Stream.TRAINING, CPU)
    key = scenario, num_envs, is_compiled
    if key not in _made:
        _made[key] = make_fast_simulation(config, environment, is_compiled)
    return FastSimulation(environment, _made[key]._step, _made[key]._resets), environment


def play(simulation, environment, frames, state, observation, pool):
    """Play random actions; return observations and rewards, and the tensors carried to the next frame.

    One environment is reset in every other frame.
    """
    outputs = []
    for index in range(frames):
        pool = simulation.refilled(pool)
        state, observation, reward, done = simulation.step(state, environment.rand_action()[ACTION])
        outputs += [observation, reward]
        done = done.clone()
        done[index % len(done)] |= index % 2 == 0
        state, observation, fresh = simulation.reset_finished(done, state, observation, pool.fresh)
        pool = pool.after_frame(fresh)
    return outputs, (state, observation, pool)


def same(outputs, others):
    return len(outputs) == len(others) and all(
        same_bits(output, other) for output, other in zip(outputs, others, strict=True)
    )


@pytest.mark.parametrize("scenario", QUICK)
def test_one_step_agrees_with_plain_vmas(scenario):
    assert_agrees(scenario)


@pytest.mark.long
@pytest.mark.parametrize("scenario", SLOW)
def test_one_step_agrees_with_plain_vmas_in_large_scenarios(scenario):
    assert_agrees(scenario)


VARIANTS = [  # other arguments of accepted scenarios
    *(("navigation", {"n_agents": count}) for count in (1, 2, 7)),
    ("navigation", {"collisions": False, "shared_rew": False}),
    ("navigation", {"agents_with_same_goal": 2, "observe_all_goals": True, "collisions": False}),
    *(("balance", {"n_agents": count}) for count in (2, 5)),
    ("balance", {"random_package_pos_on_line": False}),
    *(("transport", {"n_agents": count, "n_packages": packages}) for count, packages in ((2, 2), (5, 1))),
    ("reverse_transport", {"n_agents": 3}),
    *(("dispersion", {"n_agents": 6, "share_reward": share}) for share in (False, True)),
    ("dispersion", {"penalise_by_time": True, "n_food": 6}),
    *(("wheel", {"n_agents": 5, "line_length": length}) for length in (1.0, 3.0)),
    ("dropout", {"n_agents": 6, "energy_coeff": 0.2}),
    ("passage", {"n_passages": 2, "shared_reward": True}),
    ("give_way", {"mirror_passage": True, "observe_rel_pos": True}),
    ("flocking", {"n_agents": 3, "n_obstacles": 2}),
    ("sampling", {"n_agents": 2, "shared_rew": False}),
    ("simple_spread", {"n_agents": 5, "obs_agents": False}),
    ("line_trajectory", {"obs_noise": 0.3}),
    ("asym_joint", {"random_start_angle": True}),
]


@pytest.mark.long
@pytest.mark.parametrize(("scenario", "kwargs"), [*((name, {}) for name in (*QUICK, *SLOW)), *VARIANTS], ids=str)
def test_every_frame_of_a_long_rollout_agrees_with_plain_vmas(scenario, kwargs):
    with private_random_streams(1, Stream.VALIDATION, CPU):
        environment = environment_of(scenario, num_envs=12, scenario_kwargs=kwargs)
        step, resets = traced(environment)
        check_steps(environment, resets, step, frames=300)


@pytest.mark.parametrize(
    ("scenario", "kwargs"),
    [
        *((name, {}) for name in QUICK),
        *(pytest.param(name, {}, marks=pytest.mark.long) for name in SLOW),
        *(pytest.param(*variant, marks=pytest.mark.long) for variant in VARIANTS),
    ],
    ids=str,
)
def test_audit_accepts_what_was_accepted(scenario, kwargs, monkeypatch):
    monkeypatch.setattr("mappo.fast_simulation.audit.INTERVAL_FRAMES", 2)
    config = EnvironmentConfig(scenario=scenario, scenario_kwargs=kwargs, max_episode_frames=10)
    with private_random_streams(3, Stream.TRAINING, CPU):
        environment = make_environment(config, 8, 3, Stream.TRAINING, CPU)
        policy = TensorDictModule(lambda _: environment.rand_action()[ACTION], [OBSERVATION], [ACTION])
        simulation = FastEnvironment(make_fast_simulation(config, environment, False), environment, 10)
        simulation.collect(policy, 30, simulation.reset())


@pytest.mark.parametrize("actions", [pytest.param("discrete", marks=pytest.mark.long), "multi-discrete"])
def test_one_step_agrees_with_plain_vmas_when_actions_are_discrete(actions):
    assert_agrees("transport", actions=actions)


def test_step_of_agents_that_speak_agrees_with_plain_vmas():
    assert_agrees("tests.support.scenarios:MoveAndSpeak")


def test_step_of_agents_that_differ_agrees_with_plain_vmas():
    assert_agrees("tests.support.scenarios:Teams")


def test_masked_writes_agree_with_plain_vmas():
    assert_agrees("tests.support.scenarios:MaskedWrites")


def test_one_step_agrees_with_plain_vmas_when_a_pair_is_near_in_one_environment_only():
    """VMAS skips collisions of a pair that is near in no environment, although forces reach a little further."""
    assert_agrees("transport", num_envs=60)


@pytest.mark.parametrize(
    ("scenario", "reason"),
    [
        ("HostBranch", r"Python depends on a tensor's value \(scenarios.py:\d+: if \(self.age > 5\).any"),
        ("CountOfMasked", r"sum of x\[mask\] depends on how many elements it selects"),
        ("ManyKindsOfState", r"a step draws random numbers from a generator of its own \(scenarios.py"),
        ("HiddenState", r"the scenario keeps state outside of tensors: scenario.frames"),
        ("SharedClock", r"environments share state: scenario.clock"),
        ("GreedyReset", r"a reset of one environment changes others: "),
        ("LazyReset", r"a reset of one environment differs from a reset of all environments: "),
        ("Exploding", r"Python depends on a tensor's value"),
        ("RareState", r"the state of scenario.late.frames cannot be read: it is a builtins.range_iterator"),
    ],
)
def test_scenario_that_cannot_be_traced_is_refused_with_the_reason(scenario, reason):
    with pytest.raises(NotFaithful, match=reason):
        simulation_of(f"tests.support.scenarios:{scenario}")


@pytest.mark.parametrize(
    ("scenario", "reason"),
    [
        ("discovery", r"Python depends on a tensor's value \(vmas/simulator/utils.py:\d+: "),
        ("pollock", r"a step has more than 25000 operations"),
        ("wind_flocking", r"a reset depends on the state before it: scenario.big_agent.wind_shaping"),
        ("simple_reference", r"the scenario keeps state outside of tensors: world._agents\[0\].goal_b"),
        *(
            pytest.param(
                scenario, rf"the scenario keeps state outside of tensors: {state}", marks=pytest.mark.long
            )
            for scenario, state in (
                ("ball_passage", "scenario.passages_to_place"),
                ("football", "scenario.red_controller.team_disps"),
                ("ball_trajectory", "scenario.pos_shaping"),
                ("het_mass", "scenario.blue_agent._mass"),
                ("simple_adversary", r"world._agents\[0\]._goal"),
                ("simple_push", r"world._agents\[0\]._goal"),
                ("simple_speaker_listener", r"world._agents\[0\].goal_b"),
            )
        ),
    ],
)
def test_scenario_of_vmas_that_cannot_be_traced_is_refused_with_the_reason(scenario, reason):
    with pytest.raises(NotFaithful, match=reason):
        simulation_of(scenario)


def test_scenario_whose_environments_differ_is_refused():
    config = EnvironmentConfig(
        scenario="tests.support.scenarios:Endless", scenario_kwargs={"terminate_after": list(range(5, 9))}
    )
    with pytest.raises(NotFaithful, match=r"environments differ: scenario\.terminate_after"):
        make_fast_simulation(config, make_environment(config, 4, 0, Stream.TRAINING, CPU), False)


def _increased(value):
    return 1.01 * value if value.dtype.is_floating_point else value


def test_check_finds_a_wrong_step():
    with private_random_streams(0, Stream.VALIDATION, CPU):
        environment = environment_of("tests.support.scenarios:MaskedWrites")
        step, resets = traced(environment)
        wrong = replace(step, run=lambda *inputs: [_increased(value) for value in step.run(*inputs)])
        with pytest.raises(
            NotFaithful, match=r"instead of .*; \d+ of \d+ numbers differ after frame 1 of the check"
        ):
            check_steps(environment, resets, step, wrong)


def test_making_the_fast_simulation_changes_no_random_state_and_no_environment():
    with private_random_streams(3, Stream.TRAINING, CPU):
        initial = random_states(CPU)
        config = EnvironmentConfig(scenario="wheel")
        environment = make_environment(config, 4, 0, Stream.TRAINING, CPU)
        seeded = random_states(CPU)
        make_fast_simulation(config, environment, False)
        final = random_states(CPU)
    assert str(initial["numpy"]) == str(final["numpy"])
    assert torch.equal(seeded["torch"], final["torch"])
    assert torch.equal(seeded["vmas"][0], final["vmas"][0])


def test_first_state_equals_that_of_the_plain_environment():
    with private_random_streams(3, Stream.TRAINING, CPU):
        expected = environment_of("swarm", stream=Stream.TRAINING).reset()[OBSERVATION]
    with private_random_streams(3, Stream.TRAINING, CPU):
        simulation, _ = simulation_of("swarm")
        _, observation, _ = simulation.begin()
    assert torch.equal(observation, expected)


GOAL = "world._landmarks[0]._state._pos"


def test_finished_environments_take_fresh_states_in_order_and_others_do_not_change():
    with private_random_streams(3, Stream.TRAINING, CPU):
        simulation, _ = simulation_of("swarm", 4)
        state, observation, pool = simulation.begin()
        fresh = simulation.refilled(pool).fresh
        done = torch.tensor([[False], [True], [False], [True]])
        new_state, new_observation, remaining = simulation.reset_finished(done, state, observation, fresh)
        assert torch.equal(new_state[GOAL][[1, 3]], remaining.state[GOAL][[0, 1], 0])
        assert torch.equal(new_state[GOAL][[0, 2]], state[GOAL][[0, 2]])
        assert torch.equal(new_observation[[1, 3]], remaining.observation[[0, 1], 0])
        assert torch.equal(new_observation[[0, 2]], observation[[0, 2]])
        assert remaining.num_taken - fresh.num_taken == 2


@pytest.mark.parametrize("is_on_cpu", [True, False])
def test_every_fresh_state_is_taken_once_and_in_the_order_of_resets(is_on_cpu, monkeypatch):
    """The pool is also saved and rebuilt, as in checkpoints. The code path of a GPU must give the same result."""
    resets, taken = [], []
    with private_random_streams(3, Stream.TRAINING, CPU):
        simulation, _ = simulation_of("swarm", 4)
        monkeypatch.setattr(simulation, "_is_on_cpu", is_on_cpu)
        reset = simulation._reset
        monkeypatch.setattr(simulation, "_reset", lambda: resets.append(reset()) or resets[-1])
        state, observation, pool = simulation.begin()
        for index in range(40):
            done = torch.rand(4, 1) < index / 40
            pool = simulation.refilled(pool)
            state, observation, fresh = simulation.reset_finished(done, state, observation, pool.fresh)
            pool = pool.after_frame(fresh)
            taken += state[GOAL][done.squeeze(-1)].tolist()
            if index % 3 == 0:
                pool = FreshStatePool.from_tensors(*pool.to_tensors())
    assert taken == [goal for start, _ in resets for goal in start[GOAL].tolist()][: len(taken)]
    assert len(taken) <= 4 * len(resets) < len(taken) + 12


def test_fresh_observation_is_what_the_plain_environment_shows_in_the_fresh_state():
    with private_random_streams(3, Stream.TRAINING, CPU):
        simulation, environment = simulation_of("swarm", 4)
        *_, pool = simulation.begin()
        fresh = pool.with_new_set(*simulation._reset()).fresh
        slots = find_slots(environment)
        starts = {path: value[:, 0] for path, value in fresh.state.items()}
        for path, value in {**copies(slots, starts), **starts}.items():
            slots[path].put(value)
        observations = environment.base_env._env.get_from_scenario(True, False, False, False)[0]
    assert torch.equal(torch.stack(observations, 1), fresh.observation[:, 0])


def test_equal_seeds_give_bit_identical_rollouts():
    def outputs():
        with private_random_streams(3, Stream.TRAINING, CPU):
            simulation, environment = simulation_of("dropout")
            start = simulation.begin()
            return play(simulation, environment, 30, *start)[0]

    assert same(outputs(), outputs())


def test_rollout_continues_bit_identically_from_the_carried_tensors():
    def copy(carried):
        state, observation, pool = carried
        return {path: value.clone() for path, value in state.items()}, observation.clone(), pool

    with private_random_streams(3, Stream.TRAINING, CPU):
        simulation, environment = simulation_of("dropout")
        _, carried = play(simulation, environment, 11, *simulation.begin())
        carried, states = copy(carried), random_states(CPU)
        expected, _ = play(simulation, environment, 30, *carried)
        other_simulation, other_environment = simulation_of("dropout")
        other_simulation.begin()
        set_random_states(states, CPU)
        outputs, _ = play(other_simulation, other_environment, 30, *carried)
    assert same(expected, outputs)


@pytest.mark.long  # each compilation takes 12 s; test_kept_steps.py and test_resume.py compile and check others
def test_compiled_step_agrees_with_plain_vmas():
    with private_random_streams(3, Stream.TRAINING, CPU):
        simulation, environment = simulation_of("tests.support.scenarios:MaskedWrites", is_compiled=True)
        outputs, _ = play(simulation, environment, 30, *simulation.begin())
    assert all(output.isfinite().all() for output in outputs)


@pytest.mark.long
@pytest.mark.parametrize("scenario", [*QUICK, *SLOW])
def test_compiled_step_agrees_with_plain_vmas_in_every_accepted_scenario(scenario):
    simulation_of(scenario, 60, is_compiled=True)


def test_step_does_not_change_its_arguments():
    with private_random_streams(3, Stream.TRAINING, CPU):
        simulation, environment = simulation_of("dropout")
        state, *_ = simulation.begin()
        copy = {path: value.clone() for path, value in state.items()}
        simulation.step(state, environment.rand_action()[ACTION])
    assert all(same_bits(state[path], value) for path, value in copy.items())


@pytest.mark.long
def test_training_names_the_missing_packages_when_there_is_no_compiler(tmp_path):
    environment = {**os.environ, "CXX": "/nowhere/g++", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "mappo", "train", *TINY]
    command += ["--environment.scenario=tests.support.scenarios:MaskedWrites"]
    command += ["--collection.simulation=fast", "--run=first", f"--store={tmp_path}"]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert process.returncode == 2
    output = process.stdout + process.stderr
    assert "collection.simulation = fast" in output
    assert "sudo apt install g++ python3-dev" in output
    assert "Traceback" not in output
