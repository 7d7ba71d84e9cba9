"""A program that runs an exported policy by its contract alone; it needs nothing but numpy and onnxruntime.

It reads directories from its input, one a line. Each holds policy.onnx, contract.json and observations.npy, an
array [frames, envs, agents, features]. It writes actions.npy, an array [frames, envs, agents, ...].
"""

import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime


def run(directory: Path) -> None:
    contract = json.loads((directory / "contract.json").read_text())
    content = (directory / contract["file"]).read_bytes()
    assert hashlib.sha256(content).hexdigest() == contract["sha256"]
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    (group,) = contract["groups"]
    frames = np.load(directory / "observations.npy").astype(group["observation"]["dtype"])
    state = {
        tensor["name"]: np.zeros(shape(tensor, frames.shape[1]), tensor["dtype"]) for tensor in contract["state"]
    }
    actions = []
    for observation in frames:
        assert list(observation.shape) == shape(group["observation"], len(observation))
        names = [group["action"]["name"], *(tensor["next_name"] for tensor in contract["state"])]
        action, *following = session.run(names, {group["observation"]["name"]: observation, **state})
        state = dict(zip(state, following, strict=True))
        check(group, action)
        actions.append(action)
    np.save(directory / "actions.npy", np.stack(actions))


def shape(tensor: dict, num_envs: int) -> list[int]:
    return [num_envs if size == "envs" else size for size in tensor["shape"]]


def check(group: dict, action: np.ndarray) -> None:
    """Check that the actions are those that the contract promises, for each agent."""
    promised = group["action"]
    assert list(action.shape) == shape(promised, len(action))
    assert action.dtype == promised["dtype"]
    for index, agent in enumerate(group["agents"]):
        components = promised["components"][agent]
        if promised["kind"] == "continuous":
            low, high = (np.array([part[name] for part in components], np.float32) for name in ("low", "high"))
            assert (low <= action[:, index]).all()
            assert (action[:, index] <= high).all()
        else:
            counts = np.array([len(part["choices"]) for part in components])
            limits = counts if promised["kind"] == "multi-discrete" else counts.prod()
            assert (action[:, index] >= 0).all()
            assert (action[:, index] < limits).all()


if __name__ == "__main__":
    for line in sys.stdin:
        run(Path(line.strip()))
        print("done", flush=True)
