from dataclasses import asdict
from typing import ClassVar

import pytest
import torch
from vmas.simulator.core import Agent, World
from vmas.simulator.dynamics.diff_drive import DiffDrive
from vmas.simulator.dynamics.drone import Drone
from vmas.simulator.dynamics.forward import Forward
from vmas.simulator.dynamics.holonomic import Holonomic
from vmas.simulator.dynamics.holonomic_with_rot import HolonomicWithRotation
from vmas.simulator.dynamics.kinematic_bicycle import KinematicBicycle
from vmas.simulator.dynamics.roatation import Rotation

from mappo.config import EnvironmentConfig
from mappo.environment.action_components import action_components
from mappo.environment.environment import make_environment
from mappo.environment.random_streams import Stream
from tests.conftest import CPU
from tests.support.scenarios import Endless


class TwoUnlike(Endless):
    """A task of two agents with ranges and multipliers of their own, which speak three words."""

    NUM_CHOICES: ClassVar = [2, 5]

    def make_world(self, batch_dim, device, **kwargs):
        super().make_world(batch_dim, device, **kwargs)
        world = World(batch_dim, device, dim_c=3)
        for index, limits in enumerate(([1.0, 2.0], [0.5, 0.0])):
            world.add_agent(
                Agent(
                    name=f"robot_{index}",
                    u_range=limits,
                    u_multiplier=[1.0, 0.7],
                    discrete_action_nvec=[*self.NUM_CHOICES],
                    silent=False,
                )
            )
        return world


class Steered(TwoUnlike):
    """A task that gives the action another meaning."""

    def process_action(self, agent):
        agent.action.u = -agent.action.u


class Driven(Endless):
    """A task of one agent with the dynamics of this name."""

    def make_world(self, batch_dim, device, **kwargs):
        dynamics = kwargs.pop("dynamics")
        super().make_world(batch_dim, device, **kwargs)
        world = World(batch_dim, device)
        world.add_agent(Agent(name="robot", dynamics=DYNAMICS[dynamics](world)))
        return world


DYNAMICS = {
    "Holonomic": lambda _: Holonomic(),
    "HolonomicWithRotation": lambda _: HolonomicWithRotation(),
    "Forward": lambda _: Forward(),
    "Rotation": lambda _: Rotation(),
    "DiffDrive": DiffDrive,
    "KinematicBicycle": lambda world: KinematicBicycle(world, 0.1, 0.1, 0.1, max_steering_angle=1.0),
    "Drone": Drone,
}


def environment_of(scenario: type, actions: str = "continuous", **kwargs: str):
    config = EnvironmentConfig(
        scenario=f"{__name__}:{scenario.__name__}", actions=actions, scenario_kwargs={**kwargs}
    )
    return make_environment(config, 1, 0, Stream.EVALUATION, CPU)


def act(environment, *choices: int) -> list[dict[str, list[float]]]:
    """Let every agent take a discrete action in VMAS; return the forces and the message of each."""
    simulator = environment.base_env._env
    simulator.step([torch.tensor([[*choices]]) for _ in simulator.agents])
    return [{"u": agent.action.u[0].tolist(), "message": agent.action.c[0].tolist()} for agent in simulator.agents]


def test_choices_are_the_actions_that_vmas_takes_for_them():
    environment = environment_of(TwoUnlike, "multi-discrete")
    first, second = action_components(environment).values()
    assert first[1].choices == [0.0, -2.0, -1.0, 1.0, 2.0]
    for choices in ((0, 0, 0), (1, 1, 1), (0, 2, 2), (1, 3, 0), (0, 4, 1)):
        for components, acted in zip((first, second), act(environment, *choices), strict=True):
            *physical, word = (
                part.choices[choice] * part.multiplier for part, choice in zip(components, choices, strict=True)
            )
            assert acted["u"] == pytest.approx(physical)
            assert acted["message"].index(1.0) == word


def test_one_discrete_action_counts_through_the_choices_of_the_last_component_first():
    environment = environment_of(TwoUnlike, "discrete")
    components = next(iter(action_components(environment).values()))
    counts = [len(part.choices) for part in components]
    assert counts == [2, 5, 3]
    for choices in ((0, 0, 1), (0, 1, 0), (1, 0, 0), (1, 4, 2)):
        number = (choices[0] * counts[1] + choices[1]) * counts[2] + choices[2]
        acted = act(environment, number)[0]
        force, other_force, word = (part.choices[choice] for part, choice in zip(components, choices, strict=True))
        assert acted["u"] == pytest.approx([force, 0.7 * other_force])
        assert acted["message"].index(1.0) == word


def test_continuous_components_have_the_bounds_of_each_agent_and_component():
    environment = environment_of(TwoUnlike)
    components = action_components(environment)
    assert [*components] == ["robot_0", "robot_1"]
    for (name, parts), space in zip(components.items(), environment.base_env.action_space, strict=True):
        assert [part.low for part in parts] == space.low.tolist(), name
        assert [part.high for part in parts] == space.high.tolist(), name
    assert asdict(components["robot_0"][1]) == {
        "name": "force along y",
        "unit": "mass * length / s^2",
        "low": -2.0,
        "high": 2.0,
        "multiplier": 0.7,
        "choices": [],
    }
    assert [part.name for part in components["robot_1"][2:]] == [
        f"word {index} of the message" for index in (0, 1, 2)
    ]


def test_component_whose_meaning_only_the_scenario_knows_has_no_unit():
    parts = action_components(environment_of(Steered))["robot_0"]
    assert [(part.name, part.unit) for part in parts[:2]] == [("component 0", ""), ("component 1", "")]


@pytest.mark.parametrize("dynamics", DYNAMICS)
def test_every_dynamics_of_vmas_names_its_components(dynamics):
    environment = environment_of(Driven, dynamics=dynamics)
    (parts,) = action_components(environment).values()
    assert len(parts) == environment.base_env._env.agents[0].dynamics.needed_action_size
    assert all(part.unit for part in parts)
