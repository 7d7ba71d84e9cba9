"""The export of a trained policy to ONNX, with a contract beside it. It needs the packages of the extra `onnx`."""

import copy
import logging
import warnings
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torchrl.modules import ProbabilisticActor

import mappo
from mappo.config import config_hash
from mappo.environment.action_components import action_components
from mappo.environment.groups import Group
from mappo.environment.keys import ACTION, MEMORY, OBSERVATION, next_key
from mappo.errors import ConfigError, NotExportable
from mappo.learning.networks import GroupNetworks
from mappo.promotion import contract
from mappo.promotion.champions import CONTRACT, ONNX, policy_key, task_name
from mappo.promotion.contract import Contract, Measure, Parity, contract_bytes
from mappo.promotion.export import TracedPolicy, by_group
from mappo.runs.checkpoint import sha256_of

OPSET = 18  # the oldest version of ONNX's operators that PyTorch writes itself, which most runtimes can load
_TOLERANCE, _TIMES_ROUNDING = 1e-6, 10  # another order of sums rounds several times as much as PyTorch does
_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
_OBSERVATION, _ACTION = "observation", "action"
_MEMORY, _NEXT_MEMORY = ["memory"], ["next_memory"]  # of a policy that has one


def missing_packages() -> str:
    """Return the names of the packages of the extra `onnx` that are not installed."""
    return ", ".join(name for name in _PACKAGES if find_spec(name) is None)


def export_onnx(traced: TracedPolicy) -> dict[str, bytes]:
    """Export a policy; return the ONNX file and its contract, by file name.

    The graph takes the observations of any number of environments in the scenario's own units, and returns the
    most likely actions. To verify it, run it in onnxruntime on the recorded frames, and compare its actions with
    those of the trained policy.

    Raises:
        ConfigError: a package of the extra `onnx` is missing.
        NotExportable: the graph returns other actions than the trained policy.
    """
    if missing := missing_packages():
        raise ConfigError(f"{ONNX} cannot be made; missing packages: {missing}: pip install 'mappo[onnx]'")
    content = _graph(traced)
    return {ONNX: content, CONTRACT: contract_bytes(_contract(traced, content, _compare(traced, content)))}


def _graph(traced: TracedPolicy) -> bytes:
    from onnxscript.ir.passes.common import ClearMetadataAndDocStringPass

    has_memory, envs = traced.memories is not None, {0: "envs"}  # the name of the axis in the file
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns that torchvision is not installed
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PyTorch warns of its own code
        warnings.filterwarnings("ignore", "# The axis name", UserWarning)  # the groups share the axis `envs`
        exported = torch.onnx.export(
            traced.program,
            input_names=[*_names(traced, _OBSERVATION), *_MEMORY[:has_memory]],
            output_names=[*_names(traced, _ACTION), *_NEXT_MEMORY[:has_memory]],
            opset_version=OPSET,
            dynamic_shapes=(_for_groups(traced, envs), *[envs][:has_memory]),
            verbose=False,
        )
    assert exported is not None
    ClearMetadataAndDocStringPass()(exported.model)  # they hold paths of this machine
    content: bytes = exported.model_proto.SerializeToString(deterministic=True)
    return content


def _compare(traced: TracedPolicy, content: bytes) -> Parity:
    """Run the graph on the recorded frames, in the order of time; return how far its actions differ.

    Raises:
        NotExportable: an action differs by more than the tolerance.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    played = [_play(session, traced, index) for index in range(len(traced.observations))]
    differences = [
        _differences(traced, part, torch.stack([actions[part.group.name] for actions, _ in played]))
        for part in traced.networks.parts
    ]
    if traced.memories:
        differences.append(_memory_differences(traced, torch.stack([memory for _, (memory,) in played])))
    measure: Measure = "action" if traced.actions.is_floating_point() else "log-probability"
    difference, rounding = (
        float(torch.stack([values.abs().max() for values in pair]).max())
        for pair in zip(*differences, strict=True)
    )
    tolerance = max(_TOLERANCE, _TIMES_ROUNDING * rounding)
    if not difference <= tolerance:  # also if it is NaN
        raise NotExportable(
            f"{ONNX}: in onnxruntime, the {measure} differs from the trained policy's by {difference:.3g}; at "
            f"most {tolerance:.3g} is allowed"
        )
    num_frames, num_envs, *_ = traced.actions.shape
    return Parity(num_frames * num_envs, measure, difference, tolerance)


def _play(session: Any, traced: TracedPolicy, index: int) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Return the actions of a recorded frame by the group's name, and the memory after it, if there is one."""
    observation, *memory = traced.inputs(index)
    inputs = by_group(traced.groups, observation)
    fed = {name: inputs[group].numpy() for name, group in _names(traced, _OBSERVATION).items()}
    fed |= {name: tensor.numpy() for name, tensor in zip(_MEMORY, memory, strict=False)}
    outputs = _names(traced, _ACTION)
    returned = [torch.from_numpy(array) for array in session.run([*outputs, *_NEXT_MEMORY[: len(memory)]], fed)]
    return dict(zip(outputs.values(), returned, strict=False)), returned[len(outputs) :]


@torch.no_grad()
def _differences(traced: TracedPolicy, part: GroupNetworks, actions: Tensor) -> tuple[Tensor, Tensor]:
    """Return how far actions of a group [frames, ...] are from the policy's, and those from exact ones.

    Exact actions are the trained policy's in float64: their distance is the rounding of PyTorch.

    Raises:
        NotExportable: the actions have another shape or type.
    """
    group = part.group
    trained = group.actions(traced.actions)
    if (actions.shape, actions.dtype) != (trained.shape, trained.dtype):
        raise NotExportable(
            f"{ONNX}: actions of {group.name} are {list(actions.shape)} {actions.dtype}, not "
            f"{list(trained.shape)} {trained.dtype}"
        )
    policy, exact = (module.get_dist(frames) for module, frames in _policies(traced, part))
    if actions.is_floating_point():
        space = traced.environment.full_action_spec_unbatched[ACTION].space
        unit = group.actions((space.high - space.low) / 2).clamp_min(1)
        rounding = policy.deterministic_sample - exact.deterministic_sample
        return (actions - trained) / unit, rounding / unit
    likely = policy.log_prob(trained)
    return policy.log_prob(actions) - likely, exact.log_prob(trained) - likely


@torch.no_grad()
def _memory_differences(traced: TracedPolicy, memory: Tensor) -> tuple[Tensor, Tensor]:
    """Return how far memories [frames, envs, agents, units] are from the policy's, and those from exact ones."""
    assert traced.memories
    policy, exact = (
        module[0](frames)[next_key(MEMORY)] for module, frames in _policies(traced, traced.networks.parts[0])
    )
    return memory - traced.memories[1], policy - exact


def _policies(traced: TracedPolicy, part: GroupNetworks) -> list[tuple[ProbabilisticActor, TensorDictBase]]:
    """Return the trained policy of a group and a copy in float64, each with the recorded frames."""
    tensors = {OBSERVATION: traced.observations} | ({MEMORY: traced.memories[0]} if traced.memories else {})
    frames = TensorDict(tensors, traced.observations.shape[:2])
    return [(part.policy, frames), (copy.deepcopy(part.policy).double(), frames.double())]


def _names(traced: TracedPolicy, kind: str) -> dict[str, str]:
    """Return the group of each input or output by its name, in the graph's order."""
    names = tree_leaves({group.name: group.name for group in traced.groups})
    return {_name(traced, kind, name): name for name in names}


def _name(traced: TracedPolicy, kind: str, group: str) -> str:
    return kind if len(traced.groups) == 1 else f"{kind}_{group}"


def _for_groups(traced: TracedPolicy, value: Any) -> Any:
    """Return a value for each group as the graph's inputs are: alone, or by the group's name."""
    return value if len(traced.groups) == 1 else {group.name: value for group in traced.groups}


def _contract(traced: TracedPolicy, content: bytes, parity: Parity) -> Contract:
    config = traced.checkpoint.config
    return Contract(
        format=1,
        file=ONNX,
        sha256=sha256_of(content),
        opset=OPSET,
        task=task_name(config.environment),
        scenario=config.environment.scenario,
        policy=policy_key(traced.checkpoint),
        config_hash=config_hash(config),
        seconds_per_frame=float(traced.environment.base_env._env.world.dt),
        groups=[_contract_group(traced, group) for group in traced.groups],
        state=_state(traced),
        parity=parity,
        versions={"mappo": mappo.__version__, **{name: version(name) for name in ("torch", *_PACKAGES)}},
    )


def _contract_group(traced: TracedPolicy, group: Group) -> contract.Group:
    components = action_components(traced.environment)
    agents = [traced.environment.base_env.agent_names[index] for index in group.agents]
    observations, actions = group.observations(traced.observations), group.actions(traced.actions)
    features = observations.flatten(0, -2)
    observation = contract.ObservationInput(
        name=_name(traced, _OBSERVATION, group.name),
        dtype="float32",
        shape=["envs", *observations.shape[2:]],
        dimensions=["envs", "agents", "features"],
        recorded_low=features.amin(0).tolist(),
        recorded_high=features.amax(0).tolist(),
    )
    action = contract.ActionOutput(
        name=_name(traced, _ACTION, group.name),
        dtype="float32" if actions.is_floating_point() else "int64",
        shape=["envs", *actions.shape[2:]],
        dimensions=["envs", "agents", "components"][: actions.ndim - 1],
        kind=traced.checkpoint.config.environment.actions,
        components={agent: components[agent] for agent in agents},
    )
    return contract.Group(name=group.name, agents=agents, observation=observation, action=action)


def _state(traced: TracedPolicy) -> list[contract.StateTensor]:
    if traced.memories is None:
        return []
    shape: contract.Shape = ["envs", *traced.memories[0].shape[2:]]
    return [
        contract.StateTensor(
            name=_MEMORY[0],
            next_name=_NEXT_MEMORY[0],
            dtype="float32",
            shape=shape,
            dimensions=["envs", "agents", "units"],
        )
    ]
