import json
import re
import subprocess
import sys
import textwrap
import venv
from dataclasses import asdict, replace
from pathlib import Path

import jsonschema
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from pydantic import TypeAdapter

from mappo.__main__ import main
from mappo.config import config_hash, override
from mappo.environment.action_components import action_components
from mappo.errors import ConfigError, NotExportable
from mappo.promotion.champions import CARD, CONTRACT, ONNX, Champions, policy_key, task_name
from mappo.promotion.contract import Contract
from mappo.promotion.export import TracedPolicy, trace_policy
from mappo.promotion.onnx_export import OPSET, export_onnx, missing_packages
from mappo.runs.checkpoint import sha256_of
from tests.support import onnx_client
from tests.support.runs import train_here

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def traced(checkpoint) -> TracedPolicy:
    return trace_policy(checkpoint)


@pytest.fixture(scope="module")
def files(traced) -> dict[str, bytes]:
    return export_onnx(traced)


def test_graph_standardises_observations_as_training_did(files, checkpoint):
    """Let the moments of the features be those of observations around 5 with a deviation of 2."""
    config = override(checkpoint.config, {"networks": {"normalise_observations": True}})
    num_features = checkpoint.tensors["policy.module.0.module.1.0.weight"].shape[1]
    means = torch.full((num_features,), 5.0, dtype=torch.float64)
    moments = {"means": means, "squares": means.square() + 4.0, "weight": torch.tensor(1.0, dtype=torch.float64)}
    normalisers = ("policy.module.0.module.0.moments", "critic.module.observation_normaliser.moments")
    tensors = {f"{module}.{name}": value.clone() for module in normalisers for name, value in moments.items()}
    normalised = replace(checkpoint, config=config, tensors={**checkpoint.tensors, **tensors})
    observation = torch.randn(3, 2, num_features)
    (expected,) = run(files[ONNX], observation)
    (actions,) = run(export_onnx(trace_policy(normalised))[ONNX], 2 * observation + 5)
    np.testing.assert_allclose(actions, expected, rtol=0, atol=1e-5)


def run(content: bytes, observation: torch.Tensor) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return session.run(None, {"observation": observation.numpy()})


def test_contract_names_the_tensors_of_the_graph_and_their_shapes(files):
    contract, model = json.loads(files[CONTRACT]), onnx.load_from_string(files[ONNX])
    onnx.checker.check_model(model, full_check=True)
    (group,) = contract["groups"]
    for tensor, values in ((group["observation"], model.graph.input), (group["action"], model.graph.output)):
        (value,) = values
        shape = [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim]
        assert (value.name, shape) == (tensor["name"], tensor["shape"])
        assert value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    assert [entry.version for entry in model.opset_import] == [contract["opset"]] == [OPSET]


def test_contract_describes_the_policy_and_its_task(files, checkpoint, traced):
    contract = json.loads(files[CONTRACT])
    environment = traced.environment
    assert contract["sha256"] == sha256_of(files[ONNX])
    assert contract["task"] == task_name(checkpoint.config.environment)
    assert contract["policy"] == policy_key(checkpoint)
    assert contract["config_hash"] == config_hash(checkpoint.config)
    assert contract["seconds_per_frame"] == environment.base_env._env.world.dt == 0.1
    (group,) = contract["groups"]
    assert group["agents"] == environment.base_env.agent_names == ["agent_0", "agent_1"]
    components = {name: [asdict(part) for part in parts] for name, parts in action_components(environment).items()}
    assert group["action"]["components"] == components
    assert [part["low"] for part in components["agent_1"]] == environment.base_env.action_space[1].low.tolist()
    observations = traced.observations
    assert group["observation"]["recorded_low"] == observations.amin((0, 1, 2)).tolist()
    assert group["observation"]["recorded_high"] == observations.amax((0, 1, 2)).tolist()
    assert contract["parity"]["frames"] == observations.shape[0] * observations.shape[1] == 1000
    assert 0 <= contract["parity"]["largest_difference"] <= contract["parity"]["tolerance"] == 1e-6
    assert contract["state"] == []
    for package in ("mappo", "torch", "onnx", "onnxscript", "onnxruntime"):
        assert contract["versions"][package]


def test_contract_fits_the_schema_that_the_command_prints(files, capsys):
    assert main(["schema", "contract"]) == 0
    jsonschema.validate(json.loads(files[CONTRACT]), json.loads(capsys.readouterr().out))
    TypeAdapter(Contract).validate_json(files[CONTRACT])


def test_same_policy_gives_the_same_bytes_without_paths_of_this_machine(files, checkpoint):
    assert export_onnx(trace_policy(checkpoint)) == files
    for path in (ROOT, sys.prefix, Path(torch.__file__).parent, "site-packages", "mappo/"):
        assert str(path).encode() not in files[ONNX]


def test_graph_that_acts_otherwise_is_refused(traced):
    other = replace(traced, actions=traced.actions + 2e-6)
    with pytest.raises(
        NotExportable, match=r"the action differs from the trained policy's by 2\.\d*e-06; at most"
    ):
        export_onnx(other)


def test_policy_that_rounds_more_is_allowed_to_differ_more(checkpoint):
    """Large weights and steep slopes multiply the rounding of each sum, in PyTorch and in onnxruntime."""
    steep = {
        name: value * 30 if name.startswith("policy.") else value for name, value in checkpoint.tensors.items()
    }
    parity = json.loads(export_onnx(trace_policy(replace(checkpoint, tensors=steep)))[CONTRACT])["parity"]
    assert 1e-6 < parity["tolerance"] < 1e-3
    assert parity["largest_difference"] < parity["tolerance"]


def test_graph_that_chooses_a_less_likely_action_is_refused(checkpoint, tmp_path):
    config = override(checkpoint.config, {"environment": {"actions": "discrete"}})
    traced = trace_policy(train_here(override(config, {"collection": {"total_frames": 120}}), tmp_path))
    actions = traced.actions.clone()
    actions[-1, -1, -1] = (actions[-1, -1, -1] + 1) % 9
    with pytest.raises(NotExportable, match="the log-probability differs from the trained policy's by"):
        export_onnx(replace(traced, actions=actions))


def test_graph_of_several_groups_has_an_input_and_an_output_for_each(checkpoint, tmp_path):
    """Feed each group by the names of the contract; the groups of `simple_tag` see 16 and 14 features."""
    changes = {"environment": {"scenario": "simple_tag"}, "collection": {"total_frames": 120}}
    traced = trace_policy(train_here(override(checkpoint.config, changes), tmp_path))
    files = export_onnx(traced)
    groups = json.loads(files[CONTRACT])["groups"]
    assert {group["name"]: group["observation"]["shape"] for group in groups} == {
        "adversary": ["envs", 3, 16],
        "agent": ["envs", 1, 14],
    }
    assert groups[0]["agents"] == ["adversary_0", "adversary_1", "adversary_2"]
    session = onnxruntime.InferenceSession(files[ONNX])
    observation, trained = traced.observations[7], traced.actions[7]
    inputs = {
        "observation_adversary": observation[:, :3].numpy(),
        "observation_agent": observation[:, 3:, :14].contiguous().numpy(),
    }
    outputs = session.run([group["action"]["name"] for group in groups], inputs)
    np.testing.assert_allclose(np.concatenate(outputs, 1), trained.numpy(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_missing_package_is_named_with_its_remedy(monkeypatch, traced, package):
    assert missing_packages() == ""
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=rf"missing packages: {package}: pip install 'mappo\[onnx\]'"):
        export_onnx(traced)


@pytest.mark.long
def test_champion_runs_in_an_environment_with_nothing_but_onnxruntime_and_numpy(
    checkpoint, traced, files, tmp_path
):
    """Export a champion as a user does, and run the policy on the recorded frames in a new virtual environment."""
    champions, policy = (
        Champions(tmp_path / "champions", task_name(checkpoint.config.environment)),
        tmp_path / "policy",
    )
    hashes = champions.save_policy(checkpoint, {CARD: b"# card"}, files)
    champions.decide(None, "promoted", policy_key(checkpoint), {}, files=hashes)
    export = ["champion", "export", str(tmp_path / "champions"), "--format", "onnx", "--output", str(policy)]
    assert main(export) == 0
    np.save(policy / "observations.npy", traced.observations.numpy())
    venv.create(tmp_path / "bare", with_pip=True)
    python = tmp_path / "bare" / "bin" / "python"
    install = [python, "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt", "onnxruntime", "numpy"]
    subprocess.run(install, check=True, timeout=600)
    command = [python, "-I", onnx_client.__file__]
    subprocess.run(command, input=f"{policy}\n", text=True, check=True, timeout=100)
    guide = (ROOT / "docs" / "promotion.md").read_text()
    example = textwrap.dedent(re.search(r"    import json\n(?:    .*\n|\n)+", guide)[0])
    shown = subprocess.run([python, "-I", "-c", example], cwd=policy, text=True, check=True, capture_output=True)
    assert re.findall("^agent_[01] ", shown.stdout, re.MULTILINE) == ["agent_0 ", "agent_1 "]
    actions = np.load(policy / "actions.npy")
    np.testing.assert_allclose(actions, traced.actions.numpy(), rtol=0, atol=1e-6)
