"""A trained policy on disk: safetensors for the numbers, canonical JSON for the rest, no pickle.

A checkpoint is a directory with three files. `checkpoint.json` says what it is and holds the SHA-256 of the
networks' and the optimiser's tensors, which is verified before a byte of them is parsed. Their files carry the
beginning of that hash in their names, so that replacing `checkpoint.json` replaces the checkpoint as a whole.
"""

import hashlib
import os
from dataclasses import dataclass, field
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

FORMAT: Literal[2] = 2
MANIFEST = "checkpoint.json"
_MAX_MANIFEST_BYTES = 1 << 20
_MAX_TENSORS_BYTES = 1 << 32


Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or not into these networks; the message says why."""


@strict_dataclass(frozen=True, config=ConfigDict(extra="forbid", strict=True))
class _Manifest:
    """What `checkpoint.json` holds."""

    format: Literal[2]
    config: dict[str, JsonValue]
    config_hash: str
    iteration: Annotated[int, Field(ge=0)]
    frames: Annotated[int, Field(ge=0)]
    seed: int
    versions: dict[str, str]
    selection_return: float | None
    started_from: str
    networks_sha256: Sha256
    optimiser_sha256: Sha256

    def files(self) -> dict[str, str]:
        """Name and SHA-256 of each file of tensors."""
        hashes = {"networks": self.networks_sha256, "optimiser": self.optimiser_sha256}
        return {f"{kind}-{digest[:16]}.safetensors": digest for kind, digest in hashes.items()}


_MANIFEST = TypeAdapter(_Manifest)


@dataclass(frozen=True)
class Checkpoint:
    """What training left: its configuration, how far it came, and its tensors by name.

    tensors are the networks'; optimiser what Adam remembers of each parameter, for a run that goes on.
    selection_return is the mean return of the evaluation at this point of training; None when there was none.
    started_from says where training started, if not from scratch.
    """

    config: ExperimentConfig
    iteration: int
    frames: int
    tensors: dict[str, Tensor]
    optimiser: dict[str, Tensor] = field(default_factory=dict)
    selection_return: float | None = None
    started_from: str = ""


def save(checkpoint: Checkpoint, directory: Path) -> None:
    """Write a checkpoint, in the place of the one that may be there; a crash leaves the old one or the new one."""
    directory.mkdir(parents=True, exist_ok=True)
    networks, optimiser = (
        safetensors.torch.save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()})
        for tensors in (checkpoint.tensors, checkpoint.optimiser)
    )
    manifest = _Manifest(
        format=FORMAT,
        config=to_dict(checkpoint.config),
        config_hash=config_hash(checkpoint.config),
        iteration=checkpoint.iteration,
        frames=checkpoint.frames,
        seed=checkpoint.config.seed,
        versions={"mappo": mappo.__version__, "torch": torch.__version__},
        selection_return=checkpoint.selection_return,
        started_from=checkpoint.started_from,
        networks_sha256=hashlib.sha256(networks).hexdigest(),
        optimiser_sha256=hashlib.sha256(optimiser).hexdigest(),
    )
    files = manifest.files()
    for file, blob in zip(files, (networks, optimiser), strict=True):
        _replace(directory / file, blob)
    _replace(directory / MANIFEST, _MANIFEST.dump_json(manifest, indent=1))
    for old in {*directory.glob("networks-*.safetensors"), *directory.glob("optimiser-*.safetensors")}:
        if old.name not in files:
            old.unlink()


def load(directory: Path) -> Checkpoint:
    """Read a checkpoint whose content is what its manifest says.

    Raises:
        CheckpointError: not there, damaged, too large, of another format, or with a configuration that this
            version does not understand.
    """
    manifest = _read_manifest(directory / MANIFEST)
    if json_hash(manifest.config) != manifest.config_hash:
        raise CheckpointError(f"{directory / MANIFEST}: the configuration is not the one that its hash names")
    blobs = [_verified(directory / file, expected) for file, expected in manifest.files().items()]
    try:
        config = from_dict(manifest.config)
        networks, optimiser = (safetensors.torch.load(blob) for blob in blobs)
    except (ConfigError, safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{directory}: unreadable: {type(error).__name__}: {error}") from error
    return Checkpoint(
        config,
        manifest.iteration,
        manifest.frames,
        networks,
        optimiser,
        manifest.selection_return,
        manifest.started_from,
    )


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


def _verified(path: Path, expected: str) -> bytes:
    blob = _read(path, _MAX_TENSORS_BYTES)
    digest = hashlib.sha256(blob).hexdigest()
    if digest != expected:
        raise CheckpointError(
            f"{path}: damaged or replaced: its SHA-256 is {digest}, the manifest says {expected}"
        )
    return blob


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
