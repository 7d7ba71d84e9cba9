"""The locations of stores and of runs in them: a directory, or a prefix in a bucket."""

import os
import re
from pathlib import Path

from mappo.config import require_run_name
from mappo.errors import ConfigError, NotALocation
from mappo.runs.directory_store import DirectoryStore
from mappo.runs.store import OnRequest, Store, ignore_request

_S3 = re.compile(r"(s3|minio)://([a-z0-9][a-z0-9.-]{1,61}[a-z0-9])((?:/[A-Za-z0-9!_.*'()=:@+,-]+)*)/?")
_ALMOST_S3 = re.compile(r"(s3|minio)([:;]|//)|.*[\x00-\x1f\x7f]", re.IGNORECASE | re.DOTALL)
_MISTYPED = re.compile(r"(s3|minio)[:;/]+(.*)", re.IGNORECASE)


def open_store(location: str, patience_seconds: float = 60.0, on_request: OnRequest = ignore_request) -> Store:
    """Return the store at `s3://bucket/prefix`, at `minio://bucket/prefix` or in a directory.

    The prefix or directory need not exist yet. `on_request` is called after every request, retries included;
    several threads may call it. Endpoint and credentials come from the environment: see `s3_access`.

    Raises:
        NotALocation: the text is not a location.
    """
    if is_directory(location):
        return DirectoryStore(Path(location), on_request)
    from mappo.runs.s3_store import S3Store  # imported here: boto3 takes long, and directories need none of it

    scheme, bucket, prefix = bucket_of(location)
    return S3Store(scheme, bucket, prefix, patience_seconds, on_request)


def is_directory(location: str) -> bool:
    """Return whether a location can only name a directory, and not a prefix in a bucket, not even mistyped."""
    return ":/" not in location and not _ALMOST_S3.match(location)


def require_location(location: str) -> str:
    """Return the location if it names a directory or a prefix in a bucket. Nothing there is read.

    Raises:
        NotALocation: the text is not a location.
    """
    if not is_directory(location):
        bucket_of(location)
    return location


def bucket_of(location: str) -> tuple[str, str, str]:
    """Return the scheme, the bucket and the prefix of a location in a bucket.

    Raises:
        NotALocation: the text is not a location in a bucket.
    """
    match = _S3.fullmatch(location)
    if not match or ".." in location:
        safe_location = re.sub("//.*@", "//", location)  # the text before @ may contain a password
        raise NotALocation(
            f"{safe_location!r}: not a location{_correction(location)}: give a directory, s3://bucket/prefix or "
            "minio://bucket/prefix (endpoint and credentials come from the environment)"
        )
    scheme, bucket, prefix = match.groups()
    return scheme, bucket, prefix.strip("/")


def _correction(location: str) -> str:
    """Return the location that a mistyped one probably means, in brackets; empty if nobody can tell."""
    match = _MISTYPED.fullmatch(location)
    meant = f"{match[1].lower()}://{match[2]}" if match else ""
    return f" (did you mean {meant}?)" if meant != location and _S3.fullmatch(meant) else ""


def joined(location: str, name: str) -> str:
    """Return the location of `name` below another location, which is a directory or lies in a bucket."""
    return f"{location.rstrip('/')}/{name}"


def run_location(store: str, run: str, otherwise: str, seed: str = "") -> str:
    """Return the location of a run: below `store` under its name, or `otherwise` if there is no store.

    A seed is appended to the name. In a pipeline on Kubeflow, a run without a name gets the ID of the pipeline's
    run as its name.

    Raises:
        ConfigError: a store is given without a name, a name without a store, or the name is not allowed.
    """
    if not store:
        if run:
            raise ConfigError(
                f"run = {run!r}: a name needs a store, in which a later start finds the run again; set store, or "
                "leave run empty"
            )
        return otherwise
    run = run or os.environ.get("MAPPO_PIPELINE_RUN", "")
    if not run:
        raise ConfigError(
            f"run = '': store = {store!r} needs the name of a run, by which a later start finds it again; set run"
        )
    return joined(store, require_run_name(f"{run}-{seed}" if seed else run))
