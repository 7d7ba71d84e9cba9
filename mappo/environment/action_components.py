"""The components of agents' actions: their names, units and bounds, and the values of discrete choices."""

from typing import Any

from pydantic.dataclasses import dataclass
from torch import Tensor
from torchrl.envs import EnvBase
from vmas.simulator.dynamics.diff_drive import DiffDrive
from vmas.simulator.dynamics.drone import Drone
from vmas.simulator.dynamics.forward import Forward
from vmas.simulator.dynamics.holonomic import Holonomic
from vmas.simulator.dynamics.holonomic_with_rot import HolonomicWithRotation
from vmas.simulator.dynamics.kinematic_bicycle import KinematicBicycle
from vmas.simulator.dynamics.roatation import Rotation
from vmas.simulator.scenario import BaseScenario

from mappo.strict_json import STRICT

_FORCE, _TORQUE, _SPEED = "mass * length / s^2", "mass * length^2 / s^2", "length / s"
_MEANINGS: dict[type, tuple[tuple[str, str], ...]] = {  # name and unit of each component that the dynamics read
    Holonomic: (("force along x", _FORCE), ("force along y", _FORCE)),
    HolonomicWithRotation: (("force along x", _FORCE), ("force along y", _FORCE), ("torque", _TORQUE)),
    Forward: (("force forward", _FORCE),),
    Rotation: (("torque", _TORQUE),),
    DiffDrive: (("forward speed", _SPEED), ("angular speed", "rad / s")),
    KinematicBicycle: (("forward speed", _SPEED), ("steering angle", "rad")),
    Drone: (
        ("thrust beyond the weight", _FORCE),
        ("torque about x", _TORQUE),
        ("torque about y", _TORQUE),
        ("torque about z", _TORQUE),
    ),
}


@dataclass(frozen=True, config=STRICT)
class ActionComponent:
    """A component of an agent's action.

    name: what the simulator does with it; `component 0` if only the scenario's own code knows. unit: of the action
    times the multiplier, in lengths and masses of the scenario and in seconds; empty if only the scenario knows.
    low and high: the bounds of the action. multiplier: the simulator multiplies the action by it. choices: the
    actions that the numbers 0, 1, ... of a discrete component stand for; empty if the component is continuous.
    """

    name: str
    unit: str
    low: float
    high: float
    multiplier: float
    choices: list[float]


def action_components(environment: EnvBase) -> dict[str, list[ActionComponent]]:
    """Return the components of each agent's action, by the agent's name.

    A policy with one discrete action for all components chooses among their combinations; the choice of the last
    component changes fastest.
    """
    simulator = environment.base_env._env
    return {agent.name: [*_physical(simulator, agent), *_spoken(simulator, agent)] for agent in simulator.agents}


def _physical(simulator: Any, agent: Any) -> list[ActionComponent]:
    components = []
    ranges, multipliers = _numbers(agent.action.u_range_tensor), _numbers(agent.action.u_multiplier_tensor)
    for index, (limit, multiplier) in enumerate(zip(ranges, multipliers, strict=True)):
        name, unit = _meaning(simulator.scenario, agent, index)
        choices = [] if simulator.continuous_actions else _choices(agent.discrete_action_nvec[index], limit)
        components.append(ActionComponent(name, unit, -limit, limit, multiplier, choices))
    return components


def _spoken(simulator: Any, agent: Any) -> list[ActionComponent]:
    """Return the components of an agent's message: a number for each word, or the choice of one word."""
    num_words = 0 if agent.silent else simulator.world.dim_c
    if simulator.continuous_actions:
        return [
            ActionComponent(f"word {index} of the message", "1", 0.0, 1.0, 1.0, []) for index in range(num_words)
        ]
    words = [float(word) for word in range(num_words)]
    return [ActionComponent("number of the word", "1", 0.0, words[-1], 1.0, words)] if words else []


def _meaning(scenario: BaseScenario, agent: Any, index: int) -> tuple[str, str]:
    known = _MEANINGS.get(type(agent.dynamics), ())
    has_own_code = type(scenario).process_action is not BaseScenario.process_action  # it may change every action
    return (f"component {index}", "") if has_own_code or index >= len(known) else known[index]


def _numbers(tensor: Tensor) -> list[float]:
    """Return the numbers of a float32 tensor as people write them: 0.7, and not 0.699999988079071."""
    return [float(str(value)) for value in tensor.cpu().numpy()]


def _choices(count: int, limit: float) -> list[float]:
    """Return the actions of the choices 0, 1, ... as VMAS orders them: the middle of an odd number is first."""
    steps = list(range(count))
    if count % 2:
        steps.insert(0, steps.pop(count // 2))
    return [step / (count - 1) * (2 * limit) - limit for step in steps]
