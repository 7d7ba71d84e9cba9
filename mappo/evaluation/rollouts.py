"""The recorded episodes of an evaluation: positions, rotations, colours and lidar readings of every frame.

A recorder reads them from the simulator while it plays episodes of an evaluation again. A page draws them later,
without OpenGL and without a display. Shapes that a scenario draws itself (in `extra_render`) need OpenGL and are
not recorded.
"""

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torchrl.envs import EnvBase

from mappo.config import ExperimentConfig
from mappo.environment.environment import groups_of
from mappo.environment.groups import mean_reward
from mappo.environment.random_streams import Stream
from mappo.evaluation.episodes import PolicyOf, heuristic_policy, play_episodes, trained_policy
from mappo.evaluation.evaluation import EvaluationReport
from mappo.runs.checkpoint import Checkpoint

MAX_BYTES = (
    2_000_000  # the largest size of one episode; of a longer one, only every second (third ...) frame is kept
)
_TURN = 2 * math.pi
_STEPS = 32_767  # the largest 16-bit integer, which stands for the largest number of a series


@dataclass(frozen=True)
class Series:
    """An array of numbers as 16-bit integers: number = integer * unit.

    shape: the shape of the array. data: its little-endian bytes in base64.
    """

    shape: list[int]
    unit: float
    data: str


@dataclass(frozen=True)
class Entity:
    """An agent or a landmark that is drawn.

    size: the radius of a sphere, or the length and width of a box or a line. colours and visible: the changes
    over time, as [frame, value]. A colour is red, green, blue and alpha, from 0 to 1.
    """

    name: str
    kind: str
    shape: str
    size: list[float]
    is_hollow: bool
    colours: list[Any]
    visible: list[Any]


@dataclass(frozen=True)
class Lidar:
    """The lidar of an agent. entity: the agent's index among the entities.

    angles: the angles of the rays in radians, relative to the agent. distances [frames, rays]: the measured
    distances.
    """

    entity: int
    angles: list[float]
    max_range: float
    distances: Series


@dataclass(frozen=True)
class Episode:
    """An episode of one policy. label: best, median or worst, by the return of the trained policy.

    number: the index of the episode among those of its seed. poses [frames + 1, entities, 3]: x, y and rotation,
    of every `stride`-th frame and of the last. rewards [frames]: the mean over agents, of every frame.
    """

    policy: str
    label: str
    seed: int
    number: int
    episode_return: float
    num_frames: int
    stride: int
    entities: list[Entity]
    poses: Series
    lidars: list[Lidar]
    rewards: list[float]


@dataclass(frozen=True)
class View:
    """The camera of the scenario. zoom: half the height of the visible area, whose centre is origin.

    semidims: half the width and half the height of the walls; None where there is no wall.
    """

    zoom: float
    origin: list[float]
    aspect_ratio: float
    semidims: list[float | None]


@dataclass(frozen=True)
class Rollouts:
    """The recorded episodes of one evaluation: the best, the median and the worst, under each policy."""

    format: int
    scenario: str
    seconds_per_frame: float
    view: View
    episodes: list[Episode]


def record(config: ExperimentConfig, checkpoint: Checkpoint, report: EvaluationReport) -> Rollouts:
    """Play the best, the median and the worst episode of the trained policy again, and record them.

    Record the baselines, too, from the same initial states.

    Raises:
        CheckpointError: the checkpoint's networks do not fit the task.
    """
    per_seed = config.evaluation.episodes_per_seed
    labelled = _labelled_episodes(report.trained.episode_returns)
    # The values of `chosen` are the index of the seed and the number of the episode among those of this seed.
    chosen = {label: divmod(index, per_seed) for label, index in labelled.items()}
    policies: dict[str, PolicyOf] = {
        "trained": trained_policy(config, checkpoint),
        "random": lambda environment: environment.rand_action,
    }
    if report.heuristic:
        policies["heuristic"] = partial(heuristic_policy, scenario=config.environment.scenario)
    episodes: list[Episode] = []
    view: tuple[float, View] | None = None
    for name, policy in policies.items():
        for seed_index in sorted({seed_index for seed_index, _ in chosen.values()}):
            numbers = {label: number for label, (index, number) in chosen.items() if index == seed_index}
            seed = config.evaluation.seeds[seed_index]
            recorder = _Recorder(sorted(set(numbers.values())))
            play_episodes(
                policy, config, replace(config.evaluation, seeds=(seed,)), Stream.EVALUATION, recorder.record_frame
            )
            view = view or recorder.view
            episodes += [recorder.episode(name, label, seed, number) for label, number in numbers.items()]
    assert view is not None
    order = ["best", "median", "worst"]
    episodes.sort(key=lambda episode: ([*policies].index(episode.policy), order.index(episode.label)))
    return Rollouts(1, config.environment.scenario, view[0], view[1], episodes)


def values(series: Series) -> "np.ndarray[Any, Any]":
    """Decode a series: return its numbers as an array."""
    integers = np.frombuffer(base64.b64decode(series.data), dtype="<i2").reshape(series.shape)
    return integers.astype(np.float64) * series.unit


def _labelled_episodes(returns: Sequence[float]) -> dict[str, int]:
    """Return the indices of the best, the median and the worst episode. A single episode has all three labels."""
    order = sorted(range(len(returns)), key=lambda index: returns[index])
    return {"best": order[-1], "median": order[(len(order) - 1) // 2], "worst": order[0]}


class _Recorder:
    """The recorder of some environments of a simulator. `numbers` are their indices."""

    def __init__(self, numbers: list[int]):
        self._numbers = numbers
        self._poses: dict[int, list[Any]] = {number: [] for number in numbers}
        self._rays: dict[int, list[list[Any]]] = {number: [] for number in numbers}
        self._rewards: dict[int, list[float]] = {number: [] for number in numbers}
        self._appearances: dict[int, list[list[tuple[Any, Any]]]] = {number: [] for number in numbers}
        self.view: tuple[float, View] | None = None
        self._simulator: Any = None

    def record_frame(self, environment: EnvBase, running: torch.Tensor, rewards: torch.Tensor | None) -> None:
        """Record the environments whose episode was `running` before this frame [envs].

        Rewards are [envs, agents]; a reset has none.
        """
        mean_rewards = None if rewards is None else mean_reward(groups_of(environment), rewards)
        simulator = self._simulator = environment.base_env._env
        world = simulator.world
        if self.view is None:
            self.view = world.dt, _view(simulator)
        entities = world.entities
        poses = torch.stack(
            [torch.cat([entity.state.pos, entity.state.rot], dim=-1) for entity in entities], dim=1
        ).cpu()
        measurements = [sensor._last_measurement for _, sensor in _lidars(simulator)]
        for number in self._numbers:
            if running[number]:
                self._poses[number].append(poses[number].numpy())
                self._rays[number].append(
                    [None if distances is None else distances[number].cpu().numpy() for distances in measurements]
                )
                self._appearances[number].append(
                    [(_colour(entity, number), _is_visible(entity, number)) for entity in entities]
                )
                if mean_rewards is not None:
                    self._rewards[number].append(float(mean_rewards[number]))

    def episode(self, policy: str, label: str, seed: int, number: int) -> Episode:
        """Return the recorded episode of one environment."""
        poses = np.stack(self._poses[number])
        lidars = _lidars(self._simulator)
        num_bytes = poses.size * 2 + 2 * len(poses) * sum(sensor._angles.shape[1] for _, sensor in lidars)
        stride = max(1, math.ceil(num_bytes / MAX_BYTES))
        frames = sorted({*range(0, len(poses), stride), len(poses) - 1})
        rays = self._rays[number]
        return Episode(
            policy=policy,
            label=label,
            seed=seed,
            number=number,
            episode_return=sum(self._rewards[number]),
            num_frames=len(poses) - 1,
            stride=stride,
            entities=[
                _entity(entity, [self._appearances[number][frame][index] for frame in frames])
                for index, entity in enumerate(self._simulator.world.entities)
            ],
            poses=_poses(poses[frames]),
            lidars=[
                Lidar(
                    entity=self._simulator.world.entities.index(agent),
                    angles=sensor._angles[number].tolist(),
                    max_range=float(sensor._max_range),
                    distances=_series(np.stack([rays[frame][index] for frame in frames])),
                )
                for index, (agent, sensor) in enumerate(lidars)
                if rays[0][index] is not None
            ],
            rewards=self._rewards[number],
        )


def _lidars(simulator: Any) -> list[tuple[Any, Any]]:
    """Return (agent, sensor) for each sensor that has rays and that the scenario draws."""
    return [
        (agent, sensor)
        for agent in simulator.world.agents
        for sensor in agent.sensors
        if hasattr(sensor, "_angles") and getattr(sensor, "_render", True)
    ]


def _view(simulator: Any) -> View:
    scenario, world = simulator.scenario, simulator.world
    width, height = scenario.viewer_size
    semidims = [None if dim is None else float(dim) for dim in (world.x_semidim, world.y_semidim)]
    if not getattr(scenario, "visualize_semidims", True):
        semidims = [None, None]
    half_height = float(scenario.viewer_zoom) ** 2  # VMAS multiplies by it twice
    return View(half_height, [float(x) for x in scenario.render_origin], width / height, semidims)


def _entity(entity: Any, appearances: list[tuple[Any, Any]]) -> Entity:
    shape = entity.shape
    kind = type(shape).__name__.lower()
    sizes = {"sphere": ("radius",), "box": ("length", "width"), "line": ("length", "width")}
    radius = float(shape.circumscribed_radius())
    size = [float(getattr(shape, name)) for name in sizes[kind]] if kind in sizes else [radius]
    return Entity(
        name=entity.name,
        kind="agent" if hasattr(entity, "action") else "landmark",
        shape=kind if kind in sizes else "sphere",
        size=size,
        is_hollow=bool(getattr(shape, "hollow", False)),
        colours=_changes([colour for colour, _ in appearances]),
        visible=_changes([is_visible for _, is_visible in appearances]),
    )


def _changes(values: list[Any]) -> list[Any]:
    """Return [index, value] of the first value, and of each value that differs from the previous one."""
    return [[index, value] for index, value in enumerate(values) if index == 0 or value != values[index - 1]]


def _colour(entity: Any, number: int) -> list[float]:
    colour = entity.color
    if isinstance(colour, torch.Tensor):
        colour = (colour[number] if colour.dim() > 1 else colour).tolist()
    red, green, blue = (round(min(max(float(channel), 0.0), 1.0), 3) for channel in list(colour)[:3])
    return [red, green, blue, round(float(getattr(entity, "_alpha", 1.0)), 3)]  # VMAS draws agents translucent


def _is_visible(entity: Any, number: int) -> bool:
    return bool(entity.is_rendering[number])


def _poses(poses: "np.ndarray[Any, Any]") -> Series:
    """Encode poses with one unit for x, y and rotation.

    Rotations are first reduced to half a turn, so that a large rotation does not make the unit coarse.
    """
    wrapped = poses.astype(np.float64)
    wrapped[..., 2] = (wrapped[..., 2] + math.pi) % _TURN - math.pi
    return _series(wrapped)


def _series(numbers: "np.ndarray[Any, Any]") -> Series:
    """Encode numbers; NaN and infinity become 0, since they cannot be drawn."""
    finite = np.nan_to_num(numbers.astype(np.float64), posinf=0.0, neginf=0.0)
    unit = max(float(np.abs(finite).max(initial=0.0)), 1e-9) / _STEPS
    data = np.round(finite / unit).astype("<i2").tobytes()
    return Series(list(numbers.shape), unit, base64.b64encode(data).decode())
