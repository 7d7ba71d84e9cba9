"""The names of runs and studies, and the place where a run is kept."""

import os
import re
from pathlib import Path

from mappo.config import require_run_name
from mappo.errors import ConfigError, StoreError
from mappo.runs.directory_store import DirectoryStore
from mappo.runs.s3_store import S3Store
from mappo.runs.store import OnRequest, Store, ignore_request

_S3 = re.compile(r"(s3|minio)://([a-z0-9][a-z0-9.-]{1,61}[a-z0-9])((?:/[A-Za-z0-9!_.*'()=:@+,-]+)*)/?")


def open_store(location: str, patience_seconds: float = 60.0, on_request: OnRequest = ignore_request) -> Store:
    """The store at `s3://bucket/prefix`, `minio://bucket/prefix` or in a directory, which need not be there yet.

    `on_request` hears of every request, each try counted; it may be called from several threads.
    Endpoint and credentials come from the environment: see `s3_access`.

    Raises:
        StoreError: not a location.
    """
    if ":/" not in location:
        return DirectoryStore(Path(location), on_request)
    scheme, bucket, prefix = bucket_of(location)
    return S3Store(scheme, bucket, prefix, patience_seconds, on_request)


def bucket_of(location: str) -> tuple[str, str, str]:
    """Return the scheme, the bucket and the prefix of a location in a bucket.

    Raises:
        StoreError: not such a location.
    """
    match = _S3.fullmatch(location)
    if not match or ".." in location:
        shown = re.sub("//.*@", "//", location)  # without a password
        raise StoreError(
            f"{shown!r}: not a location: give a directory, s3://bucket/prefix or minio://bucket/prefix "
            "(endpoint and credentials come from the environment)"
        )
    scheme, bucket, prefix = match.groups()
    return scheme, bucket, prefix.strip("/")


def joined(location: str, name: str) -> str:
    """The location of something below another, be it a directory or in a bucket."""
    return f"{location.rstrip('/')}/{name}"


def run_location(store: str, run: str, otherwise: str, seed: str = "") -> str:
    """Return where a run is kept: in the store under its name (with the seed, if there is one); or `otherwise`.

    In a pipeline on Kubeflow, a run that nobody named has the ID of the pipeline's run as its name.

    Raises:
        ConfigError: a store without a name, a name without a store, or a name that is not allowed.
    """
    if not store:
        if run:
            raise ConfigError(f"run = {run!r}: a name needs a store to be found in again; give one, or no name")
        return otherwise
    run = run or os.environ.get("MAPPO_PIPELINE_RUN", "")
    if not run:
        raise ConfigError(
            f"run '': a name has to be given with store = {store!r}, so that the run is found there again"
        )
    return joined(store, require_run_name(f"{run}-{seed}" if seed else run))
