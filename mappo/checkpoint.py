"""A trained policy on disk: safetensors for the numbers, canonical JSON for the rest, no pickle.

A checkpoint is a directory with two files. `checkpoint.json` says what it is and holds the SHA-256 of
`networks.safetensors`, which is verified before a byte of it is parsed.
"""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import safetensors.torch
import torch
from pydantic import ConfigDict, Field, JsonValue, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as strict_dataclass
from torch import Tensor

import mappo
from mappo.config import ConfigError, ExperimentConfig, config_hash, from_dict, json_hash, to_dict
from mappo.networks import Networks

FORMAT: Literal[1] = 1
MANIFEST, TENSORS = "checkpoint.json", "networks.safetensors"
_MAX_MANIFEST_BYTES = 1 << 20
_MAX_TENSORS_BYTES = 1 << 32


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or not into these networks; the message says why."""


@strict_dataclass(frozen=True, config=ConfigDict(extra="forbid", strict=True))
class _Manifest:
    """What `checkpoint.json` holds."""

    format: Literal[1]
    config: dict[str, JsonValue]
    config_hash: str
    iteration: Annotated[int, Field(ge=0)]
    frames: Annotated[int, Field(ge=0)]
    seed: int
    versions: dict[str, str]
    tensors_sha256: str


_MANIFEST = TypeAdapter(_Manifest)


@dataclass(frozen=True)
class Checkpoint:
    """What training left: its configuration, how far it came, and the networks' tensors by name."""

    config: ExperimentConfig
    iteration: int
    frames: int
    tensors: dict[str, Tensor]


def save(checkpoint: Checkpoint, directory: Path) -> None:
    """Write a checkpoint; the manifest comes last, so that a directory without one is no checkpoint."""
    directory.mkdir(parents=True, exist_ok=True)
    blob = safetensors.torch.save({name: tensor.contiguous() for name, tensor in checkpoint.tensors.items()})
    manifest = _Manifest(
        format=FORMAT,
        config=to_dict(checkpoint.config),
        config_hash=config_hash(checkpoint.config),
        iteration=checkpoint.iteration,
        frames=checkpoint.frames,
        seed=checkpoint.config.seed,
        versions={"mappo": mappo.__version__, "torch": torch.__version__},
        tensors_sha256=hashlib.sha256(blob).hexdigest(),
    )
    _replace(directory / TENSORS, blob)
    _replace(directory / MANIFEST, _MANIFEST.dump_json(manifest, indent=1))


def load(directory: Path) -> Checkpoint:
    """Read a checkpoint whose content is what its manifest says.

    Raises:
        CheckpointError: not there, damaged, too large, of another format, or with a configuration that this
            version does not understand.
    """
    manifest = _read_manifest(directory / MANIFEST)
    if json_hash(manifest.config) != manifest.config_hash:
        raise CheckpointError(f"{directory / MANIFEST}: the configuration is not the one that its hash names")
    blob = _read(directory / TENSORS, _MAX_TENSORS_BYTES)
    digest = hashlib.sha256(blob).hexdigest()
    if digest != manifest.tensors_sha256:
        raise CheckpointError(
            f"{directory / TENSORS}: damaged or replaced: its SHA-256 is {digest}, "
            f"the manifest says {manifest.tensors_sha256}"
        )
    try:
        config = from_dict(manifest.config)
        tensors = safetensors.torch.load(blob)
    except (ConfigError, safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{directory}: unreadable: {type(error).__name__}: {error}") from error
    return Checkpoint(config, manifest.iteration, manifest.frames, tensors)


def restore_networks(checkpoint: Checkpoint, networks: Networks) -> None:
    """Copy a checkpoint's tensors into networks of the same names, shapes and dtypes.

    Raises:
        CheckpointError: names, shapes or dtypes differ, or a value is not finite; nothing is copied.
    """
    target = networks.modules().state_dict()
    if problems := _differences(checkpoint.tensors, target) or _not_finite(checkpoint.tensors):
        raise CheckpointError(
            "the checkpoint does not fit these networks (another task or other hidden_sizes?): "
            + "; ".join(problems)
        )
    networks.modules().load_state_dict(checkpoint.tensors)


def _differences(tensors: dict[str, Tensor], target: dict[str, Tensor]) -> list[str]:
    problems = [f"{name} is missing" for name in target if name not in tensors]
    problems += [f"{name} is unknown" for name in tensors if name not in target]
    for name in target.keys() & tensors.keys():
        found, wanted = tensors[name], target[name]
        if (found.shape, found.dtype) != (wanted.shape, wanted.dtype):
            problems.append(
                f"{name} is {list(found.shape)} {found.dtype}, not {list(wanted.shape)} {wanted.dtype}"
            )
    return sorted(problems)


def _not_finite(tensors: dict[str, Tensor]) -> list[str]:
    return [f"{name} is not finite" for name, tensor in sorted(tensors.items()) if not tensor.isfinite().all()]


def _read_manifest(path: Path) -> _Manifest:
    text = _read(path, _MAX_MANIFEST_BYTES)
    try:
        return _MANIFEST.validate_json(text)
    except ValidationError as error:
        problem = error.errors()[0]
        field = ".".join(str(part) for part in problem["loc"])
        if field == "format":
            raise CheckpointError(f"{path}: format {problem['input']!r}, this version reads {FORMAT}") from None
        raise CheckpointError(f"{path}: not the manifest of a checkpoint: {field}: {problem['msg']}") from None


def _read(path: Path, limit: int) -> bytes:
    try:
        if (size := path.stat().st_size) > limit:
            raise CheckpointError(f"{path}: {size} bytes, at most {limit} are read")
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error


def _replace(path: Path, content: bytes) -> None:
    """Write a file so that it has either its old content or all of the new one."""
    partial = path.with_suffix(path.suffix + ".partial")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
