"""Everything needed to go on exactly, as bytes: safetensors for numbers, JSON for the rest, no pickle.

A checkpoint is a manifest and the parts that it names. Every part is known by the SHA-256 of its content, which
is verified before a byte of it is parsed; names, shapes, dtypes and finiteness are checked against the networks
that a checkpoint is loaded into. Where the bytes live is the business of `mappo.runs.run`.
"""

import hashlib
import json
import platform
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from typing import Annotated, Literal

import safetensors.torch
import torch
from pydantic import ConfigDict, Field, JsonValue, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as strict_dataclass
from torch import Tensor

import mappo
from mappo.config import ExperimentConfig, config_hash, from_dict
from mappo.environment.simulation_state import SimulationState
from mappo.errors import CheckpointError, ConfigError
from mappo.learning.networks import Networks
from mappo.strict_json import json_hash, to_dict

FORMAT: Literal[3] = 3
MAX_MANIFEST_BYTES = 1 << 20
_MAX_PART_BYTES = {
    "networks": 1 << 32,
    "optimiser": 1 << 32,
    "simulation": 1 << 32,
    "structure": 1 << 26,
    "history": 1 << 28,
}
_SUFFIXES = {"structure": "json", "history": "csv"}
_PACKAGES = ("torch", "torchrl", "tensordict", "vmas", "numpy")
_STRICT = ConfigDict(extra="forbid", strict=True)

Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0)]


@strict_dataclass(frozen=True, config=_STRICT)
class Part:
    """One file of a checkpoint."""

    sha256: Sha256
    size_bytes: Count


@strict_dataclass(frozen=True, config=_STRICT)
class Platform:
    """What besides the configuration decides the bits: other values give other rounding."""

    device: str
    threads: Annotated[int, Field(ge=1)]
    cpu: str
    versions: dict[str, str]

    @classmethod
    def here(cls, device: torch.device) -> "Platform":
        """That of this process."""
        return cls(
            device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            threads=torch.get_num_threads(),
            cpu=f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
            versions={"mappo": mappo.__version__, "python": platform.python_version(), **_package_versions()},
        )


@strict_dataclass(frozen=True, config=_STRICT)
class Manifest:
    """What a checkpoint is, in one small JSON file.

    selection_return is the mean return of the evaluation at this point of training, None when there was none;
    highest_return that of the best checkpoint so far. started_from says where training started, if not from
    scratch.
    """

    format: Literal[3]
    config: dict[str, JsonValue]
    config_hash: str
    seed: int
    iteration: Count
    frames: Count
    selection_return: Annotated[float, Field(allow_inf_nan=False)] | None
    highest_return: Annotated[float, Field(allow_inf_nan=False)] | None
    started_from: str
    platform: Platform
    parts: dict[Literal["networks", "optimiser", "simulation", "structure", "history"], Part]

    @property
    def size_bytes(self) -> int:
        """That of all parts."""
        return sum(part.size_bytes for part in self.parts.values())

    def file_name(self, part: str) -> str:
        """The name of a part's file: its hash, and what kind of file it is."""
        return f"{self.parts[part].sha256}.{_SUFFIXES.get(part, 'safetensors')}"  # type: ignore[index]


_MANIFEST = TypeAdapter(Manifest)


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """All that training is, after an iteration.

    tensors are the networks'; optimiser is what Adam remembers of each parameter; state the simulation, what is
    carried from batch to batch, and the random states; history the rows so far, as CSV. The rest is in `Manifest`.
    """

    config: ExperimentConfig
    iteration: int
    frames: int
    tensors: dict[str, Tensor]
    optimiser: dict[str, Tensor]
    state: SimulationState
    history: str
    platform: Platform
    selection_return: float | None = None
    highest_return: float | None = None
    started_from: str = ""

    @property
    def is_best(self) -> bool:
        """Whether no checkpoint before this one has a higher return in the evaluation during training."""
        return self.selection_return is not None and self.selection_return == self.highest_return


def pack(checkpoint: Checkpoint) -> tuple[Manifest, dict[str, bytes]]:
    """A checkpoint as its manifest and its parts by file name; the same checkpoint gives the same bytes."""
    contents = {
        "networks": _tensor_bytes(checkpoint.tensors),
        "optimiser": _tensor_bytes(checkpoint.optimiser),
        "simulation": _tensor_bytes(checkpoint.state.tensors),
        "structure": json.dumps(checkpoint.state.structure, allow_nan=False).encode(),
        "history": checkpoint.history.encode(),
    }
    manifest = Manifest(
        format=FORMAT,
        config=to_dict(checkpoint.config),
        config_hash=config_hash(checkpoint.config),
        seed=checkpoint.config.seed,
        iteration=checkpoint.iteration,
        frames=checkpoint.frames,
        selection_return=checkpoint.selection_return,
        highest_return=checkpoint.highest_return,
        started_from=checkpoint.started_from,
        platform=checkpoint.platform,
        parts={name: Part(sha256_of(content), len(content)) for name, content in contents.items()},  # type: ignore[misc]
    )
    return manifest, {manifest.file_name(part): content for part, content in contents.items()}


def manifest_bytes(manifest: Manifest) -> bytes:
    """The manifest as canonical JSON."""
    record = _MANIFEST.dump_python(manifest, mode="json")
    return (json.dumps(record, sort_keys=True, indent=1, allow_nan=False) + "\n").encode()


def parse_manifest(content: bytes, place: str) -> Manifest:
    """Read a manifest; `place` is for the message.

    Raises:
        CheckpointError: not a manifest, of another format, or with a configuration that is not what its hash says.
    """
    try:
        manifest = _MANIFEST.validate_json(content)
    except ValidationError as error:
        problem = error.errors()[0]
        name = ".".join(str(part) for part in problem["loc"])
        if name == "format":
            raise CheckpointError(f"{place}: format {problem['input']!r}, this version reads {FORMAT}") from None
        raise CheckpointError(f"{place}: not the manifest of a checkpoint: {name}: {problem['msg']}") from None
    if json_hash(manifest.config) != manifest.config_hash:
        raise CheckpointError(f"{place}: the configuration is not the one that its hash names")
    if missing := _MAX_PART_BYTES.keys() - manifest.parts.keys():
        raise CheckpointError(f"{place}: parts are missing: {', '.join(sorted(missing))}")
    return manifest


def unpack(manifest: Manifest, read: Callable[[str, int, str], bytes], place: str) -> Checkpoint:
    """Put a checkpoint together; `read` gives the bytes of a file by name, largest size and SHA-256.

    Raises:
        CheckpointError: a part is too large, not what its name says, or this version cannot understand it.
    """
    contents = {}
    for name, part in manifest.parts.items():
        if part.size_bytes > _MAX_PART_BYTES[name]:
            raise CheckpointError(
                f"{place}: {name}: {part.size_bytes} bytes, at most {_MAX_PART_BYTES[name]} are read"
            )
        contents[name] = read(manifest.file_name(name), part.size_bytes, part.sha256)
    try:
        return Checkpoint(
            config=from_dict(manifest.config),
            iteration=manifest.iteration,
            frames=manifest.frames,
            tensors=safetensors.torch.load(contents["networks"]),
            optimiser=safetensors.torch.load(contents["optimiser"]),
            state=SimulationState(
                json.loads(contents["structure"]), safetensors.torch.load(contents["simulation"])
            ),
            history=contents["history"].decode(),
            platform=manifest.platform,
            selection_return=manifest.selection_return,
            highest_return=manifest.highest_return,
            started_from=manifest.started_from,
        )
    except (ConfigError, safetensors.SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{place}: unreadable: {type(error).__name__}: {error}") from error


def verify(content: bytes, sha256: str, place: str) -> bytes:
    """The content, if it has this hash.

    Raises:
        CheckpointError: it has another.
    """
    if (digest := sha256_of(content)) != sha256:
        raise CheckpointError(f"{place}: damaged or replaced: its SHA-256 is {digest}, not {sha256}")
    return content


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


@cache
def _package_versions() -> dict[str, str]:
    return {name: version(name) for name in _PACKAGES}


def _tensor_bytes(tensors: dict[str, Tensor]) -> bytes:
    content: bytes = safetensors.torch.save({name: tensors[name].cpu().contiguous() for name in sorted(tensors)})
    return content


def sha256_of(content: bytes) -> str:
    """The SHA-256 of bytes, in hexadecimal."""
    return hashlib.sha256(content).hexdigest()
