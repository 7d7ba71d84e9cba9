"""The format of a checkpoint: all state that an exact resume needs, as bytes.

Numbers are safetensors, the rest is JSON and CSV, and no pickle is used. A checkpoint is a manifest and the parts
that the manifest names. The manifest holds the SHA-256 of each part, which is verified before the part is parsed.
Names, shapes, dtypes and finiteness of tensors are checked against the networks that a checkpoint is loaded into.
`mappo.runs.run` decides under which keys the bytes are stored.

Manifests can be read without torch, which takes seconds to import: only functions that need torch import it.
"""

import hashlib
import json
import platform
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import ConfigDict, Field, JsonValue, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as strict_dataclass
from safetensors import SafetensorError

import mappo
from mappo.compute.computation import PLAIN, Computation
from mappo.config import ExperimentConfig, config_hash, from_dict
from mappo.errors import CheckpointError, ConfigError, one_line
from mappo.runs.segments import Segment, SharedFile
from mappo.strict_json import first_problem, json_hash, to_dict

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from mappo.environment.simulation_state import SimulationState
    from mappo.learning.networks import Networks

FORMAT: Literal[3] = 3
MAX_MANIFEST_BYTES = 1 << 20
PartName = Literal["networks", "optimiser", "simulation", "structure", "history"]
MAX_PART_BYTES: dict[PartName, int] = {
    "networks": 1 << 32,
    "optimiser": 1 << 32,
    "simulation": 1 << 32,
    "structure": 1 << 26,
    "history": 1 << 28,
}
PARTS = tuple(MAX_PART_BYTES)
_SUFFIXES: dict[PartName, str] = {"structure": "json", "history": "csv"}
_PACKAGES = ("torch", "torchrl", "tensordict", "vmas", "numpy")
_STRICT = ConfigDict(extra="forbid", strict=True)

Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0)]


@strict_dataclass(frozen=True, config=_STRICT)
class Part:
    """A file of a checkpoint: its hash and its size."""

    sha256: Sha256
    size_bytes: Count


@strict_dataclass(frozen=True, config=_STRICT)
class Platform:
    """The device, the CPU and the versions of a training: with other values, floating-point rounding differs."""

    device: str
    threads: Annotated[int, Field(ge=1)]
    cpu: str
    versions: dict[str, str]

    @classmethod
    def current(cls, device: "torch.device") -> "Platform":
        """Return the platform of this process, which trains on `device`."""
        import torch

        return cls(
            device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            threads=torch.get_num_threads(),
            cpu=f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
            versions={"mappo": mappo.__version__, "python": platform.python_version(), **_package_versions()},
        )


@strict_dataclass(frozen=True, config=_STRICT)
class Manifest:
    """The description of a checkpoint, stored as one small JSON file.

    selection_return: the mean return of the evaluation at this point of training; None if there was no
    evaluation. highest_return: the selection_return of the best checkpoint so far. started_from: the run that
    training started from; empty if it started from scratch. computation: what the run compiles. earlier_rows: the
    index of the history's rows before those in the part `history`.
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
    parts: dict[PartName, Part]
    computation: Computation | None = None  # None: saved by 0.5, whose configuration has no `auto`
    earlier_rows: SharedFile | None = None

    @property
    def size_bytes(self) -> int:
        """The size of all parts together."""
        return sum(part.size_bytes for part in self.parts.values())

    def file_name(self, part: PartName) -> str:
        """Return the name of a part's file: its hash and the suffix of its file type."""
        return f"{self.parts[part].sha256}.{_SUFFIXES.get(part, 'safetensors')}"


_MANIFEST = TypeAdapter(Manifest)


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """The complete state of training after an iteration.

    tensors: the networks. optimiser: Adam's state of each parameter. state: the simulation, the data carried
    from batch to batch, and the random states. history: the last rows of the history, as CSV; the rows before
    them are below the index `earlier_rows`, and after those in `segments`, which the attempt has yet to add to an
    index. saved_hash: the hash of the configuration as it was saved, perhaps by an older version without some
    fields; empty if it was not saved. The tensors, the state and the history are empty if they were not read.
    `Manifest` describes the other fields.
    """

    config: ExperimentConfig
    iteration: int
    frames: int
    tensors: "dict[str, Tensor]"
    optimiser: "dict[str, Tensor]"
    state: "SimulationState"
    history: str
    platform: Platform
    selection_return: float | None = None
    highest_return: float | None = None
    started_from: str = ""
    computation: Computation = PLAIN
    saved_hash: str = ""
    earlier_rows: SharedFile | None = None
    segments: tuple[Segment, ...] = ()

    @property
    def num_earlier_rows(self) -> int:
        """The number of the history's rows before those in `history`."""
        indexed = self.earlier_rows.num_rows if self.earlier_rows else 0
        return indexed + sum(segment.num_rows for segment in self.segments)

    @property
    def is_best(self) -> bool:
        """Return whether the evaluation during training gave no earlier checkpoint a higher return."""
        return self.selection_return is not None and self.selection_return == self.highest_return


def pack(checkpoint: Checkpoint) -> tuple[Manifest, dict[str, bytes]]:
    """Return a checkpoint's manifest, and its parts by file name. Equal checkpoints give equal bytes."""
    contents: dict[PartName, bytes] = {
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
        parts={name: Part(sha256_of(content), len(content)) for name, content in contents.items()},
        computation=checkpoint.computation,
        earlier_rows=checkpoint.earlier_rows,
    )
    return manifest, {manifest.file_name(part): content for part, content in contents.items()}


def manifest_bytes(manifest: Manifest) -> bytes:
    """Return the manifest as canonical JSON."""
    record = _MANIFEST.dump_python(manifest, mode="json")
    return (json.dumps(record, sort_keys=True, indent=1, allow_nan=False) + "\n").encode()


def parse_manifest(content: bytes, location: str) -> Manifest:
    """Parse a manifest. Error messages name its `location`.

    Raises:
        CheckpointError: the content is not a manifest, has another format, or its configuration does not match
            its hash.
    """
    try:
        manifest = _MANIFEST.validate_json(content)
        hash_of_config = json_hash(manifest.config)
    except ValidationError as error:
        problem = error.errors()[0]
        if problem["loc"] == ("format",):
            raise CheckpointError(
                f"{location}: format {one_line(repr(problem['input']))}, this version reads {FORMAT}"
            ) from None
        raise CheckpointError(f"{location}: not the manifest of a checkpoint: {first_problem(error)}") from None
    except (ValueError, RecursionError) as error:  # numbers of too many digits, objects in too many objects
        raise CheckpointError(f"{location}: not the manifest of a checkpoint: {one_line(error)}") from None
    if hash_of_config != manifest.config_hash:
        raise CheckpointError(
            f"{location}: the configuration does not match its hash, {one_line(manifest.config_hash)}"
        )
    if missing := MAX_PART_BYTES.keys() - manifest.parts.keys():
        raise CheckpointError(f"{location}: parts are missing: {', '.join(sorted(missing))}")
    return manifest


def unpack(
    manifest: Manifest,
    read: Callable[[str, int, str], bytes],
    location: str,
    parts: Collection[PartName] = PARTS,
) -> Checkpoint:
    """Assemble a checkpoint from its manifest and the named parts; what other parts hold stays empty.

    `read` returns the bytes of a file; its arguments are the file's name, its largest size and its SHA-256. Error
    messages name the `location`.

    Raises:
        CheckpointError: a part is too large, does not match its hash, or cannot be parsed by this version.
    """
    contents: dict[PartName, bytes] = {}
    for name, part in manifest.parts.items():
        if name not in parts:
            continue
        if part.size_bytes > MAX_PART_BYTES[name]:
            raise CheckpointError(
                f"{location}: {name}: {part.size_bytes} bytes, at most {MAX_PART_BYTES[name]} are read"
            )
        contents[name] = read(manifest.file_name(name), part.size_bytes, part.sha256)
    from safetensors.torch import load

    from mappo.environment.simulation_state import SimulationState

    def tensors(name: PartName) -> "dict[str, Tensor]":
        return load(contents[name]) if name in contents else {}

    try:
        config = from_dict(manifest.config)
        return Checkpoint(
            config=config,
            iteration=manifest.iteration,
            frames=manifest.frames,
            tensors=tensors("networks"),
            optimiser=tensors("optimiser"),
            state=SimulationState(json.loads(contents.get("structure", b"null")), tensors("simulation")),
            history=contents.get("history", b"").decode(),
            platform=manifest.platform,
            selection_return=manifest.selection_return,
            highest_return=manifest.highest_return,
            started_from=manifest.started_from,
            saved_hash=manifest.config_hash,
            computation=manifest.computation
            or Computation(  # pydantic refuses `auto`
                simulation=config.collection.simulation,  # type: ignore[arg-type]
                update=config.learner.update,  # type: ignore[arg-type]
            ),
            earlier_rows=manifest.earlier_rows,
        )
    except (ConfigError, SafetensorError, LookupError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{location}: unreadable: {type(error).__name__}: {one_line(error)}") from error


def verify(content: bytes, sha256: str, location: str) -> bytes:
    """Return the content if its SHA-256 is the expected one. The error message names the `location`.

    Raises:
        CheckpointError: the content has another hash.
    """
    if (digest := sha256_of(content)) != sha256:
        raise CheckpointError(f"{location}: damaged or replaced: its SHA-256 is {digest}, not {sha256}")
    return content


def restore_networks(checkpoint: Checkpoint, networks: "Networks") -> None:
    """Copy a checkpoint's tensors into networks whose tensors have the same names, shapes and dtypes.

    Raises:
        CheckpointError: names, shapes or dtypes differ, or a value is not finite. No tensor is copied then.
    """
    target = networks.modules().state_dict()
    if problems := _differences(checkpoint.tensors, target) or _not_finite(checkpoint.tensors):
        raise CheckpointError(
            "the checkpoint does not fit these networks (another task, or other networks?): " + "; ".join(problems)
        )
    networks.modules().load_state_dict(checkpoint.tensors)


def _differences(tensors: "dict[str, Tensor]", target: "dict[str, Tensor]") -> list[str]:
    problems = [f"{name} is missing" for name in target if name not in tensors]
    problems += [f"{name} is unknown" for name in tensors if name not in target]
    for name in target.keys() & tensors.keys():
        tensor, expected = tensors[name], target[name]
        if (tensor.shape, tensor.dtype) != (expected.shape, expected.dtype):
            problems.append(
                f"{name} is {list(tensor.shape)} {tensor.dtype}, not {list(expected.shape)} {expected.dtype}"
            )
    return sorted(problems)


def _not_finite(tensors: "dict[str, Tensor]") -> list[str]:
    return [f"{name} is not finite" for name, tensor in sorted(tensors.items()) if not tensor.isfinite().all()]


@cache
def _package_versions() -> dict[str, str]:
    return {name: version(name) for name in _PACKAGES}


def _tensor_bytes(tensors: "dict[str, Tensor]") -> bytes:
    from safetensors.torch import save

    content: bytes = save({name: tensors[name].cpu().contiguous() for name in sorted(tensors)})
    return content


def sha256_of(content: bytes) -> str:
    """Return the SHA-256 of bytes, in hexadecimal."""
    return hashlib.sha256(content).hexdigest()
