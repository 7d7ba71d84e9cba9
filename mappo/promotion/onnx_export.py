"""The export of a trained policy to ONNX, with a contract beside it. It needs the packages of the extra `onnx`."""

import copy
import logging
import warnings
from importlib.metadata import version
from importlib.util import find_spec

import torch
from tensordict import TensorDict
from torch import Tensor

import mappo
from mappo.config import config_hash
from mappo.environment.action_components import action_components
from mappo.environment.keys import ACTION, OBSERVATION
from mappo.errors import ConfigError, NotExportable
from mappo.promotion.champions import CONTRACT, ONNX, policy_key, task_name
from mappo.promotion.contract import (
    ActionOutput,
    Contract,
    Group,
    Measure,
    ObservationInput,
    Parity,
    contract_bytes,
)
from mappo.promotion.export import TracedPolicy
from mappo.runs.checkpoint import sha256_of

OPSET = 18  # the oldest version of ONNX's operators that PyTorch writes itself, which most runtimes can load
_TOLERANCE, _TIMES_ROUNDING = 1e-6, 10  # another order of sums rounds several times as much as PyTorch does
_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
_OBSERVATION, _ACTION = "observation", "action"


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
    contract = _contract(traced, content, _compare(traced, content))
    return {ONNX: content, CONTRACT: contract_bytes(contract)}


def _graph(traced: TracedPolicy) -> bytes:
    from onnxscript.ir.passes.common import ClearMetadataAndDocStringPass

    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns that torchvision is not installed
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PyTorch warns of its own code
        exported = torch.onnx.export(
            traced.program,
            input_names=[_OBSERVATION],
            output_names=[_ACTION],
            opset_version=OPSET,
            dynamic_shapes=({0: "envs"},),  # its name in the file
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
    actions = torch.stack(
        [
            torch.from_numpy(session.run([_ACTION], {_OBSERVATION: observation.numpy()})[0])
            for observation in traced.observations
        ]
    )
    if (actions.shape, actions.dtype) != (traced.actions.shape, traced.actions.dtype):
        raise NotExportable(
            f"{ONNX}: actions are {list(actions.shape)} {actions.dtype}, not {list(traced.actions.shape)} "
            f"{traced.actions.dtype}"
        )
    measure: Measure = "action" if actions.is_floating_point() else "log-probability"
    difference, rounding = (float(values.abs().max()) for values in _differences(traced, actions))
    tolerance = max(_TOLERANCE, _TIMES_ROUNDING * rounding)
    if not difference <= tolerance:  # also if it is NaN
        raise NotExportable(
            f"{ONNX}: in onnxruntime, the {measure} differs from the trained policy's by {difference:.3g}; at "
            f"most {tolerance:.3g} is allowed"
        )
    num_frames, num_envs, *_ = actions.shape
    return Parity(num_frames * num_envs, measure, difference, tolerance)


@torch.no_grad()
def _differences(traced: TracedPolicy, actions: Tensor) -> tuple[Tensor, Tensor]:
    """Return how far actions [frames, envs, agents, ...] are from the trained policy's, and that from exact ones.

    Exact actions are the trained policy's in float64: their distance is the rounding of PyTorch.
    """
    exact_policy, observations = copy.deepcopy(traced.policy).double(), traced.observations
    policy, exact = (
        module.get_dist(TensorDict({OBSERVATION: values}, observations.shape[:2]))
        for module, values in ((traced.policy, observations), (exact_policy, observations.double()))
    )
    if actions.is_floating_point():
        space = traced.environment.full_action_spec_unbatched[ACTION].space
        unit = ((space.high - space.low) / 2).clamp_min(1)
        rounding = policy.deterministic_sample - exact.deterministic_sample
        return (actions - traced.actions) / unit, rounding / unit
    trained = policy.log_prob(traced.actions)
    return policy.log_prob(actions) - trained, exact.log_prob(traced.actions) - trained


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
        groups=[_group(traced)],
        state=[],
        parity=parity,
        versions={"mappo": mappo.__version__, **{name: version(name) for name in ("torch", *_PACKAGES)}},
    )


def _group(traced: TracedPolicy) -> Group:
    components = action_components(traced.environment)
    features = traced.observations.flatten(0, -2)
    actions = traced.actions
    observation = ObservationInput(
        name=_OBSERVATION,
        dtype="float32",
        shape=["envs", *traced.observations.shape[2:]],
        dimensions=["envs", "agents", "features"],
        recorded_low=features.amin(0).tolist(),
        recorded_high=features.amax(0).tolist(),
    )
    action = ActionOutput(
        name=_ACTION,
        dtype="float32" if actions.is_floating_point() else "int64",
        shape=["envs", *actions.shape[2:]],
        dimensions=["envs", "agents", "components"][: actions.ndim - 1],
        kind=traced.checkpoint.config.environment.actions,
        components=components,
    )
    return Group(name=OBSERVATION[0], agents=[*components], observation=observation, action=action)
