"""The contract of an exported policy: the meaning of its inputs and outputs, for programs without mappo."""

import json
from dataclasses import asdict
from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from mappo.environment.action_components import ActionComponent
from mappo.runs.checkpoint import Count, Sha256
from mappo.strict_json import STRICT

ActionKind = Literal["continuous", "discrete", "multi-discrete"]
Measure = Literal["action", "log-probability"]
Shape = list[Count | Literal["envs"]]
"""The shape of a tensor. `envs` is any number of environments that are controlled at once, and 1 for one team."""


@dataclass(frozen=True, config=STRICT)
class ObservationInput:
    """The input of the observations of a group, in the scenario's own units: the graph standardises them itself.

    dimensions: the meaning of each dimension of `shape`. recorded_low and recorded_high: the smallest and the
    largest value of each feature in the recorded frames, over all agents; the policy was not tested outside.
    """

    name: str
    dtype: Literal["float32"]
    shape: Shape
    dimensions: list[str]
    recorded_low: list[float]
    recorded_high: list[float]


@dataclass(frozen=True, config=STRICT)
class ActionOutput:
    """The output of the most likely actions of a group.

    dimensions: the meaning of each dimension of `shape`. kind: `continuous`: a number for each component;
    `multi-discrete`: a choice for each component; `discrete`: one choice among all combinations of the components,
    of which the choice of the last component changes fastest. components: those of each agent, by its name.
    """

    name: str
    dtype: Literal["float32", "int64"]
    shape: Shape
    dimensions: list[str]
    kind: ActionKind
    components: dict[str, list[ActionComponent]]


@dataclass(frozen=True, config=STRICT)
class Group:
    """A group of agents that observe and act alike. agents: their names, in the order of the tensors."""

    name: str
    agents: list[str]
    observation: ObservationInput
    action: ActionOutput


@dataclass(frozen=True, config=STRICT)
class StateTensor:
    """A tensor that the policy carries from frame to frame.

    The output `next_name` of a frame is the input `name` of the next. An episode starts with zeros.
    """

    name: str
    next_name: str
    dtype: Literal["float32"]
    shape: Shape
    dimensions: list[str]


@dataclass(frozen=True, config=STRICT)
class Parity:
    """The comparison of the file with the trained policy, on recorded frames of all agents.

    measure: the measure of a difference. `action`: the difference of a component, divided by half of the
    component's range if that is more than 1. `log-probability`, of discrete actions: that of the choice, so two
    choices that are equally likely do not differ. largest_difference: over all frames. tolerance: the largest
    difference that is allowed: 1e-6, or ten times the rounding of PyTorch itself if that is more.
    """

    frames: Annotated[int, Field(ge=1)]
    measure: Measure
    largest_difference: Annotated[float, Field(ge=0)]
    tolerance: float


@dataclass(frozen=True, config=STRICT)
class Contract:
    """The contract of an exported policy.

    file and sha256: the ONNX file that it describes. opset: the version of ONNX's operators. policy: the key of
    the networks among the champions of the task. seconds_per_frame: the simulated time from one action to the
    next, at which the policy expects observations. state: the tensors that the caller carries from frame to frame;
    empty if the policy has no memory. versions: those of the packages that made the file.
    """

    format: Literal[1]
    file: str
    sha256: Sha256
    opset: int
    task: str
    scenario: str
    policy: str
    config_hash: Sha256
    seconds_per_frame: Annotated[float, Field(gt=0)]
    groups: list[Group]
    state: list[StateTensor]
    parity: Parity
    versions: dict[str, str]


def contract_bytes(contract: Contract) -> bytes:
    """Return a contract as JSON; equal contracts give equal bytes."""
    return (json.dumps(asdict(contract), indent=1, allow_nan=False) + "\n").encode()
