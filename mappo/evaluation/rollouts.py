"""Episodes to look at: what was where in every frame, drawn later by anything, without OpenGL or a display.

Positions, rotations, colours and lidar readings are read from the simulator while an evaluation is played again.
What a scenario draws by itself (its `extra_render`) needs OpenGL, and is left out.
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
from mappo.environment.random_streams import Stream
from mappo.evaluation.episodes import PolicyOf, heuristic_policy, play_episodes, trained_policy
from mappo.evaluation.evaluation import EvaluationReport
from mappo.runs.checkpoint import Checkpoint

MAX_BYTES = 2_000_000  # of one episode; beyond that, frames are left out, each other, then more
_TURN = 2 * math.pi
_STEPS = 32_767  # of 16 bits: positions are fractions of the largest


@dataclass(frozen=True)
class Series:
    """Numbers as 16-bit integers, base64 of little-endian bytes; value = integer * unit. shape: of the numbers."""

    shape: list[int]
    unit: float
    data: str


@dataclass(frozen=True)
class Entity:
    """Something that is drawn. size: radius of a sphere, length and width of a box, length and width of a line.

    colours and visible list changes as [frame, value]; colours are red, green, blue and alpha, each 0 to 1.
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
    """Rays of an agent, the entity of this index: angles in radians, relative to it; distances [frames, rays]."""

    entity: int
    angles: list[float]
    max_range: float
    distances: Series


@dataclass(frozen=True)
class Episode:
    """One episode under one policy. label: best, median or worst of the trained policy's.

    poses [frames + 1, entities, 3]: x, y and rotation, of every `stride`-th frame and the last. rewards [frames]:
    mean over agents.
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
    """What the scenario's camera shows: half the height around its origin; semidims: of its walls, if any."""

    zoom: float
    origin: list[float]
    aspect_ratio: float
    semidims: list[float | None]


@dataclass(frozen=True)
class Rollouts:
    """Episodes of one evaluation: the best, the median and the worst, trained beside random and heuristic."""

    format: int
    scenario: str
    seconds_per_frame: float
    view: View
    episodes: list[Episode]


def record(config: ExperimentConfig, checkpoint: Checkpoint, report: EvaluationReport) -> Rollouts:
    """Play the trained policy's best, median and worst episode again, and the baselines' beside them.

    Raises:
        CheckpointError: the checkpoint's networks do not fit the task.
    """
    per_seed = config.evaluation.episodes_per_seed
    chosen = {label: divmod(index, per_seed) for label, index in _chosen(report.trained.episode_returns).items()}
    policies: dict[str, PolicyOf] = {
        "trained": trained_policy(config, checkpoint),
        "random": lambda environment: environment.rand_action,
    }
    if report.heuristic:
        policies["heuristic"] = partial(heuristic_policy, scenario=config.environment.scenario)
    episodes: list[Episode] = []
    view: tuple[float, View] | None = None
    for name, policy in policies.items():
        for place in sorted({place for place, _ in chosen.values()}):
            labels = {number: label for label, (where, number) in chosen.items() if where == place}
            seed = config.evaluation.seeds[place]
            recorder = _Recorder(sorted({number for where, number in chosen.values() if where == place}))
            play_episodes(
                policy, config, replace(config.evaluation, seeds=(seed,)), Stream.EVALUATION, recorder.look
            )
            view = view or recorder.view
            episodes += [
                recorder.episode(name, label, seed, number)
                for label, (where, number) in chosen.items()
                if where == place and number in labels
            ]
    assert view is not None
    order = ["best", "median", "worst"]
    episodes.sort(key=lambda episode: ([*policies].index(episode.policy), order.index(episode.label)))
    return Rollouts(1, config.environment.scenario, view[0], view[1], episodes)


def values(series: Series) -> "np.ndarray[Any, Any]":
    """The numbers of a series, in its shape."""
    raw = np.frombuffer(base64.b64decode(series.data), dtype="<i2").reshape(series.shape)
    return raw.astype(np.float64) * series.unit


def _chosen(returns: Sequence[float]) -> dict[str, int]:
    """Which episodes are the best, the median and the worst; one episode is all three."""
    order = sorted(range(len(returns)), key=lambda index: returns[index])
    return {"best": order[-1], "median": order[(len(order) - 1) // 2], "worst": order[0]}


class _Recorder:
    """Looks at some of the environments of a simulator after every frame."""

    def __init__(self, numbers: list[int]):
        self._numbers = numbers
        self._poses: dict[int, list[Any]] = {number: [] for number in numbers}
        self._rays: dict[int, list[list[Any]]] = {number: [] for number in numbers}
        self._rewards: dict[int, list[float]] = {number: [] for number in numbers}
        self._looks: dict[int, list[list[tuple[Any, Any]]]] = {number: [] for number in numbers}
        self.view: tuple[float, View] | None = None
        self._simulator: Any = None

    def look(self, environment: EnvBase, running: torch.Tensor, rewards: torch.Tensor | None) -> None:
        """See a frame, the first without rewards; `running` [envs]: where the episode had not ended before it."""
        simulator = self._simulator = environment.base_env._env
        world = simulator.world
        if self.view is None:
            self.view = world.dt, _view(simulator)
        entities = world.entities
        pose = torch.stack([torch.cat([each.state.pos, each.state.rot], dim=-1) for each in entities], dim=1).cpu()
        sensors = [sensor._last_measurement for _, sensor in _lidars(simulator)]
        for number in self._numbers:
            if running[number]:
                self._poses[number].append(pose[number].numpy())
                self._rays[number].append(
                    [None if each is None else each[number].cpu().numpy() for each in sensors]
                )
                self._looks[number].append(
                    [(_colour(each, number), _is_visible(each, number)) for each in entities]
                )
                if rewards is not None:
                    self._rewards[number].append(float(rewards[number]))

    def episode(self, policy: str, label: str, seed: int, number: int) -> Episode:
        """What was seen in one environment."""
        poses = np.stack(self._poses[number])
        lidars = _lidars(self._simulator)
        size = poses.size * 2 + 2 * len(poses) * sum(sensor._angles.shape[1] for _, sensor in lidars)
        stride = max(1, math.ceil(size / MAX_BYTES))
        kept = sorted({*range(0, len(poses), stride), len(poses) - 1})
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
                _entity(entity, [self._looks[number][frame][index] for frame in kept])
                for index, entity in enumerate(self._simulator.world.entities)
            ],
            poses=_poses(poses[kept]),
            lidars=[
                Lidar(
                    entity=self._simulator.world.entities.index(agent),
                    angles=sensor._angles[number].tolist(),
                    max_range=float(sensor._max_range),
                    distances=_series(np.stack([rays[frame][index] for frame in kept])),
                )
                for index, (agent, sensor) in enumerate(lidars)
                if rays[0][index] is not None
            ],
            rewards=self._rewards[number],
        )


def _lidars(simulator: Any) -> list[tuple[Any, Any]]:
    """Agents and those of their sensors that have rays and are meant to be seen."""
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


def _entity(entity: Any, looks: list[tuple[Any, Any]]) -> Entity:
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
        colours=_changes([colour for colour, _ in looks]),
        visible=_changes([is_visible for _, is_visible in looks]),
    )


def _changes(values: list[Any]) -> list[Any]:
    """[index, value] of the first, and of each that is not as the one before."""
    return [[index, value] for index, value in enumerate(values) if index == 0 or value != values[index - 1]]


def _colour(entity: Any, number: int) -> list[float]:
    colour = entity.color
    if isinstance(colour, torch.Tensor):
        colour = (colour[number] if colour.dim() > 1 else colour).tolist()
    red, green, blue = (round(min(max(float(part), 0.0), 1.0), 3) for part in list(colour)[:3])
    return [red, green, blue, round(float(getattr(entity, "_alpha", 1.0)), 3)]  # agents of VMAS are translucent


def _is_visible(entity: Any, number: int) -> bool:
    return bool(entity.is_rendering[number])


def _poses(poses: "np.ndarray[Any, Any]") -> Series:
    """One unit for x, y and rotation; rotations within half a turn."""
    turned = poses.astype(np.float64)
    turned[..., 2] = (turned[..., 2] + math.pi) % _TURN - math.pi
    return _series(turned)


def _series(numbers: "np.ndarray[Any, Any]") -> Series:
    """Not finite is 0: nothing could be drawn of it."""
    finite = np.nan_to_num(numbers.astype(np.float64), posinf=0.0, neginf=0.0)
    unit = max(float(np.abs(finite).max(initial=0.0)), 1e-9) / _STEPS
    data = np.round(finite / unit).astype("<i2").tobytes()
    return Series(list(numbers.shape), unit, base64.b64encode(data).decode())
