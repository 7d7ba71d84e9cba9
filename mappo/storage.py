"""Where checkpoints live: a directory, or a prefix in a bucket of any S3-compatible store. One small interface.

Every failure is a `StoreError` that names the place and the cause. What may pass by itself (refused connections,
time-outs, throttling, answers cut short) is tried again until `patience_seconds` are over. Credentials come from
where boto3 looks for them (environment, mounted files, instance), or for minio:// from Kubeflow's own secret; see
`s3_access`. They are never part of a location or a message.
"""

import base64
import errno
import hashlib
import logging
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar
from urllib.parse import urlsplit

import yaml
from pydantic import BaseModel, Field, ValidationError
from tenacity import RetryCallState, Retrying, retry_if_exception_type, stop_after_delay, wait_exponential

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

_log = logging.getLogger(__name__)
_S3 = re.compile(r"(s3|minio)://([a-z0-9][a-z0-9.-]{1,61}[a-z0-9])((?:/[A-Za-z0-9!_.*'()=:@+,-]+)*)/?")
_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*")
_KUBEFLOW_STORE = "http://seaweedfs.kubeflow:9000"  # since Kubeflow 2.16; minio-service.kubeflow:9000 before it
_PARTIAL = ".partial-"  # in the names of files that are being written
_PASSING = {
    *("SlowDown", "Throttling", "ThrottlingException", "RequestTimeout", "RequestLimitExceeded"),
    *("BadDigest", "XAmzContentSHA256Mismatch"),  # changed on the way
}
_CREDENTIALS = {
    *("AccessDenied", "ExpiredToken", "ExpiredTokenException", "InvalidAccessKeyId", "InvalidToken"),
    *("SignatureDoesNotMatch", "TokenRefreshRequired", "AuthFailure", "RequestTimeTooSkewed", "403"),
}

KUBEFLOW_SECRET = "mlpipeline-minio-artifact"  # noqa: S105  (a name) of Kubeflow's own store, where Kubeflow copied it

_AWS_CREDENTIALS = ("AWS_ACCESS_KEY_ID", "AWS_SHARED_CREDENTIALS_FILE", "AWS_PROFILE")
_AWS_KEYS = "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN, or the mounted credentials file"
_KUBEFLOW_KEYS = (
    "MAPPO_KUBEFLOW_ACCESS_KEY and MAPPO_KUBEFLOW_SECRET_KEY, from Kubeflow's secret "
    f"{KUBEFLOW_SECRET}; "
    "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY replace them where AWS_ENDPOINT_URL is this endpoint"
)
_BOTO3 = "boto3; AWS_ENDPOINT_URL names another store than Amazon's"
_PROVIDERS = "key providers of Kubeflow's config map kfp-launcher"
_ANOTHER = "; minio_endpoint of the site's file (MAPPO_MINIO_ENDPOINT) names another store"
_ANOTHER_HERE = "; MAPPO_MINIO_ENDPOINT or AWS_ENDPOINT_URL names another store"

T = TypeVar("T")


class StoreError(Exception):
    """A store cannot do what it is asked; the message names place and cause."""

    outcome = "refused"  # of the request, for those who count them


class StoreUnavailable(StoreError):
    """It may be able to at another time: no connection, no answer in time, too many requests, a broken answer."""

    outcome = "unavailable"


class KeyMissing(StoreError):
    """There is nothing under this key."""

    outcome = "missing"


class TooLarge(StoreError):
    """An entry has more bytes than are read."""


class KeyTaken(StoreError):
    """There is something else under a key that was to be created."""

    outcome = "taken"


@dataclass(frozen=True)
class S3Access:
    """The endpoint and the keys of an S3 store. None leaves the choice to boto3.

    `endpoint_origin` and `keys_origin` tell people where endpoint and keys come from.
    """

    endpoint: str | None
    endpoint_origin: str
    keys: tuple[str, str] | None = field(default=None, repr=False)
    keys_origin: str = _AWS_KEYS
    region: str | None = None
    secret: str = ""  # that Kubeflow's launcher takes the keys from, if it says so


def s3_access(scheme: str, environment: Mapping[str, str]) -> S3Access:
    """Choose the endpoint and the keys of a store at s3:// or minio://.

    boto3 chooses both for s3://. minio:// is the store at MAPPO_MINIO_ENDPOINT, else at the endpoint of
    MAPPO_KUBEFLOW_PROVIDERS, else Kubeflow's own, as it is for Kubeflow's launcher. Where Kubeflow's keys
    (MAPPO_KUBEFLOW_ACCESS_KEY, MAPPO_KUBEFLOW_SECRET_KEY) are not set, as outside of a pod, AWS_ENDPOINT_URL goes
    before the last two. AWS credentials go before Kubeflow's keys at the AWS_ENDPOINT_URL beside them, and are for
    no other store if Kubeflow's keys are set.

    Raises:
        StoreError: the endpoint has to come from Kubeflow's providers, which cannot be read.
    """
    variable = next((name for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL") if environment.get(name)), "")
    if scheme == "s3":
        return S3Access(None, f"from {variable or _BOTO3}")
    keys = (environment.get("MAPPO_KUBEFLOW_ACCESS_KEY", ""), environment.get("MAPPO_KUBEFLOW_SECRET_KEY", ""))
    access = _minio_endpoint("" if all(keys) else variable, environment)
    is_for_aws = access.secret not in ("", KUBEFLOW_SECRET) or _is_same(access.endpoint, environment.get(variable))
    if not all(keys) or (is_for_aws and any(environment.get(name) for name in _AWS_CREDENTIALS)):
        return access
    return replace(access, keys=keys, keys_origin=_KUBEFLOW_KEYS)


def _is_same(one: str | None, other: str | None) -> bool:
    """Return whether two URLs name the same endpoint."""
    if not one or not other:
        return False
    parts = [urlsplit(url) for url in (one, other)]
    return len({(part.scheme, part.netloc.lower()) for part in parts}) == 1


def _minio_endpoint(aws_variable: str, environment: Mapping[str, str]) -> S3Access:
    if endpoint := environment.get("MAPPO_MINIO_ENDPOINT"):
        return S3Access(endpoint, "from MAPPO_MINIO_ENDPOINT")
    if aws_variable:
        return S3Access(environment[aws_variable], f"from {aws_variable}; MAPPO_MINIO_ENDPOINT goes before it")
    provider = _minio_provider(environment.get("MAPPO_KUBEFLOW_PROVIDERS", ""))
    another = _ANOTHER if environment.get("MAPPO_KUBEFLOW_ACCESS_KEY") else _ANOTHER_HERE
    if not provider.endpoint:
        return S3Access(_KUBEFLOW_STORE, f"Kubeflow's default{another}")
    scheme = "" if "://" in provider.endpoint else "http://" if provider.disable_ssl else "https://"
    access = S3Access(f"{scheme}{provider.endpoint}", f"from {_PROVIDERS}{another}", secret=provider.secret)
    return replace(access, region=provider.region or None)


class _Provider(BaseModel):
    """The default of one provider in Kubeflow's config map kfp-launcher."""

    endpoint: str | None = None
    region: str | None = None
    disable_ssl: bool | None = Field(default=None, validation_alias="disableSSL")
    credentials: dict[str, Any] | None = None

    @property
    def secret(self) -> str:
        """The name of the secret with the keys; empty if it is not said."""
        reference = (self.credentials or {}).get("secretRef")
        return str(reference.get("secretName") or "") if isinstance(reference, dict) else ""


class _Minio(BaseModel):
    default: _Provider | None = None


class _Providers(BaseModel):
    minio: _Minio | None = None


def _minio_provider(text: str) -> _Provider:
    """Read what Kubeflow's launcher takes minio:// to mean. The text may hold keys, and no message repeats it."""
    try:
        providers = _Providers.model_validate(yaml.safe_load(text) or {})
    except (yaml.YAMLError, ValidationError):
        raise StoreError(
            f"MAPPO_KUBEFLOW_PROVIDERS: {_PROVIDERS} is not the YAML that Kubeflow's launcher reads: correct "
            "minio.default.endpoint, region and disableSSL there, or set MAPPO_MINIO_ENDPOINT or AWS_ENDPOINT_URL"
        ) from None
    return (providers.minio and providers.minio.default) or _Provider()


OnRequest = Callable[[str, str], object]
"""Hears of every request: read, write, create, list or delete; and ok or the `outcome` of its error."""


def ignore_request(operation: str, outcome: str) -> None:
    """Hear of a request, and do nothing."""


@contextmanager
def _told(on_request: OnRequest, operation: str) -> Iterator[None]:
    try:
        yield
    except StoreError as error:
        on_request(operation, error.outcome)
        raise
    on_request(operation, "ok")


@dataclass(frozen=True)
class Entry:
    """Something in a store; modified is in seconds since 1970."""

    key: str
    size_bytes: int
    modified: float


class Store(Protocol):
    """Bytes by key. Keys are relative paths such as `blobs/1a2b.safetensors`.

    What is written is there for every reader as soon as the call returns, and never in part.
    """

    location: str

    def read(self, key: str, max_bytes: int) -> bytes:
        """All bytes of an entry.

        Raises:
            KeyMissing: there is none.
            TooLarge: it is larger than `max_bytes`.
            StoreError: it cannot be read.
        """

    def write(self, key: str, content: bytes) -> None:
        """Put bytes under a key, in the place of what may be there."""

    def create(self, key: str, content: bytes) -> None:
        """Put bytes under a key that is free. A store may ignore that condition: see `honours_conditions`.

        Raises:
            KeyTaken: the key holds other bytes.
        """

    def entries(self, prefix: str = "") -> list[Entry]:
        """What is below a prefix such as `blobs/`, by key."""

    def delete(self, key: str) -> None:
        """Remove an entry; one that is not there is fine."""


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


def honours_conditions(store: Store, prefix: str) -> bool:
    """Whether a store refuses to create what is there already; tried out below a prefix, and deleted again.

    Raises:
        StoreError: it cannot be written to, or does not give back what was written.
    """
    key = f"{prefix}probe-{secrets.token_hex(8)}"
    store.create(key, b"first")
    try:
        if store.read(key, 100) != b"first":
            raise StoreError(f"{store.location}: what was written is not what is read")
        try:
            store.create(key, b"second")
        except KeyTaken:
            return True
        return False
    finally:
        store.delete(key)


class DirectoryStore:
    """A `Store` in a directory of a file system with hard links."""

    def __init__(self, directory: Path, on_request: OnRequest = ignore_request):
        self.location = str(directory)
        self._directory, self._on_request = directory, on_request

    def read(self, key: str, max_bytes: int) -> bytes:
        path = self._path(key)
        with self._request("read", key):
            if (size := path.stat().st_size) > max_bytes:
                raise TooLarge(f"{path}: {size} bytes, at most {max_bytes} are read")
            return path.read_bytes()

    def write(self, key: str, content: bytes) -> None:
        with self._request("write", key), self._partial(key, content) as partial_file:
            partial_file.replace(self._path(key))

    def create(self, key: str, content: bytes) -> None:
        with self._request("create", key), self._partial(key, content) as partial_file:
            try:
                os.link(partial_file, self._path(key))
            except FileExistsError:
                _require_same(self, key, content)

    def entries(self, prefix: str = "") -> list[Entry]:
        found = []
        with self._request("list", prefix):
            for path in sorted((self._directory / prefix).rglob("*")):
                try:
                    status = path.lstat()
                except FileNotFoundError:  # deleted since
                    continue
                if path.is_file() and not path.is_symlink():
                    key = path.relative_to(self._directory).as_posix()
                    found.append(Entry(key, status.st_size, status.st_mtime))
        return found

    def delete(self, key: str) -> None:
        with self._request("delete", key):
            self._path(key).unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        return self._directory / _checked(key)

    @contextmanager
    def _partial(self, key: str, content: bytes) -> Iterator[Path]:
        """A file beside the one that is meant, with its content safe on the disk; gone after the block."""
        path = self._path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial_file = path.with_name(f"{path.name}{_PARTIAL}{secrets.token_hex(4)}")
        try:
            with partial_file.open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            yield partial_file
            _sync_directory(path.parent)
        finally:
            partial_file.unlink(missing_ok=True)

    @contextmanager
    def _request(self, operation: str, key: str) -> Iterator[None]:
        with _told(self._on_request, operation):
            try:
                yield
            except FileNotFoundError as error:
                raise KeyMissing(f"{self._directory / key}: {error.strerror}") from error
            except OSError as error:
                hint = "; free some, and saving goes on" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
                raise StoreError(f"{self._directory / key}: {error.strerror}{hint}") from error


class S3Store:
    """A `Store` below a prefix of a bucket, through boto3."""

    def __init__(
        self,
        scheme: str,
        bucket: str,
        prefix: str,
        patience_seconds: float,
        on_request: OnRequest = ignore_request,
    ):
        self.location = "/".join(filter(None, [f"{scheme}:/", bucket, prefix]))
        self._bucket, self._prefix = bucket, f"{prefix}/" if prefix else ""
        self._scheme, self._access = scheme, S3Access(None, "from the environment")  # until the first request
        self._patience_seconds, self._on_request = patience_seconds, on_request
        self._made: S3Client | None = None

    def read(self, key: str, max_bytes: int) -> bytes:
        def get(client: "S3Client") -> bytes:
            answer = client.get_object(Bucket=self._bucket, Key=self._key(key))
            with answer["Body"] as body:
                if answer["ContentLength"] > max_bytes:
                    size = answer["ContentLength"]
                    raise TooLarge(f"{self.location}/{key}: {size} bytes, at most {max_bytes} are read")
                return body.read()

        return self._patiently("read", key, get)

    def write(self, key: str, content: bytes) -> None:
        self._patiently("write", key, lambda client: self._put(client, key, content))

    def create(self, key: str, content: bytes) -> None:
        try:
            self._patiently("create", key, lambda client: self._put(client, key, content, IfNoneMatch="*"))
        except KeyTaken:  # or an earlier try of this very write, whose answer was lost
            _require_same(self, key, content)

    def entries(self, prefix: str = "") -> list[Entry]:
        def pages(client: "S3Client") -> list[Entry]:
            found = []
            start = len(self._prefix)
            pages = client.get_paginator("list_objects_v2").paginate(
                Bucket=self._bucket, Prefix=self._prefix + prefix
            )
            for page in pages:
                for entry in page.get("Contents", []):
                    found.append(Entry(entry["Key"][start:], entry["Size"], entry["LastModified"].timestamp()))
            return sorted(found, key=lambda entry: entry.key)

        return self._patiently("list", prefix, pages)

    def delete(self, key: str) -> None:
        self._patiently(
            "delete", key, lambda client: client.delete_object(Bucket=self._bucket, Key=self._key(key))
        )

    def _key(self, key: str) -> str:
        return self._prefix + _checked(key)

    def _put(self, client: "S3Client", key: str, content: bytes, **condition: Any) -> None:
        digest = base64.b64encode(hashlib.md5(content, usedforsecurity=False).digest()).decode()
        client.put_object(Bucket=self._bucket, Key=self._key(key), Body=content, ContentMD5=digest, **condition)

    def _patiently(self, operation: str, key: str, request: Callable[["S3Client"], T]) -> T:
        """Send a request, again and again while what went wrong may pass by itself."""
        place = f"{self.location}/{key}"
        patient = Retrying(
            retry=retry_if_exception_type(StoreUnavailable),
            stop=stop_after_delay(self._patience_seconds),
            wait=wait_exponential(
                multiplier=0.2, max=10
            ),  # no jitter: it would draw from training's random numbers
            before_sleep=partial(_log_retry, self._patience_seconds),
            reraise=True,
        )
        answer: T = patient(self._once, operation, place, request)
        return answer

    def _once(self, operation: str, place: str, request: Callable[["S3Client"], T]) -> T:
        from botocore.exceptions import BotoCoreError, ClientError
        from urllib3.exceptions import HTTPError

        with _told(self._on_request, operation):
            try:
                return request(self._client())
            except ClientError as error:
                raise self._readable(place, error.response) from error
            except (BotoCoreError, HTTPError, OSError) as error:
                raise self._without_answer(place, error) from error

    def _readable(self, place: str, response: Any) -> StoreError:
        """What the store answered, as one of our errors."""
        code = str(response.get("Error", {}).get("Code", ""))
        status = int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        said = f"{place}: the store answered {status} {code}"
        if code == "NoSuchKey":
            return KeyMissing(f"{place}: there is nothing")
        if code == "NoSuchBucket":
            return StoreError(
                f"{place}: there is no bucket {self._bucket!r} at {self._endpoint()}; create it first"
            )
        if status == 412:
            return KeyTaken(f"{place}: there is something already")
        if code in _CREDENTIALS or status in (401, 403):
            endpoint = self._endpoint()
            self._made = None  # mounted credentials may have been renewed
            return StoreError(
                f"{said}: the credentials are wrong, expired, or not allowed to do this at {endpoint}; "
                f"check {self._access.keys_origin}"
            )
        passing = status >= 500 or status in (409, 429) or code in _PASSING
        return StoreUnavailable(said) if passing else StoreError(said)

    def _without_answer(self, place: str, error: Exception) -> StoreError:
        """No answer, or none that could be read, as one of our errors; the text of a library's is not repeated."""
        from botocore import exceptions as boto

        name = type(error).__name__
        if isinstance(error, boto.SSLError):
            return StoreError(f"{place}: {self._endpoint()} has no certificate that is trusted; see AWS_CA_BUNDLE")
        if isinstance(
            error, boto.NoCredentialsError | boto.PartialCredentialsError | boto.CredentialRetrievalError
        ):
            return StoreError(
                f"{place}: no credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or mount a "
                f"credentials file and name it in AWS_SHARED_CREDENTIALS_FILE; they are for {self._endpoint()}"
            )
        if isinstance(
            error, boto.HTTPClientError | boto.ConnectionError | boto.IncompleteReadError
        ) or not isinstance(error, boto.BotoCoreError):
            return StoreUnavailable(f"{place}: no usable answer from {self._endpoint()}: {name}")
        return StoreError(f"{place}: {name}: {error}")

    def _client(self) -> "S3Client":
        if self._made is None:
            self._made = self._make_client()
        return self._made

    def _make_client(self) -> "S3Client":
        """Amazon's defaults for Amazon; path addressing and no new-fangled checksums for anybody else."""
        import boto3
        from botocore.config import Config

        options: dict[str, Any] = {"connect_timeout": 5, "read_timeout": 30, "retries": {"total_max_attempts": 1}}
        self._access = access = s3_access(self._scheme, os.environ)
        access_key, secret_key = access.keys or (None, None)
        make: Callable[..., S3Client] = partial(
            boto3.session.Session().client,
            "s3",
            endpoint_url=access.endpoint,
            region_name=access.region,
            aws_access_key_id=access_key,
            aws_secret_access_key=secret_key,
        )
        try:
            client = make(config=Config(**options))
            url = urlsplit(client.meta.endpoint_url)
            _ = url.port  # raises when it is none
        except ValueError:  # whose text holds what may be in the URL
            raise StoreError(
                f"{self.location}: the endpoint ({access.endpoint_origin}) is not a URL such as http://host:9000 "
                "or https://host"
            ) from None
        if (url.hostname or "").endswith((".amazonaws.com", ".amazonaws.com.cn")):
            return client
        options |= {
            "s3": {"addressing_style": "path"},
            "request_checksum_calculation": "when_required",
            "response_checksum_validation": "when_required",
        }
        return make(config=Config(**options))

    def _endpoint(self) -> str:
        if self._made is None:
            return "its endpoint"
        url = urlsplit(self._made.meta.endpoint_url)
        host = url.netloc.rpartition("@")[2]
        return f"{url.scheme}://{host} ({self._access.endpoint_origin})"


def _log_retry(patience_seconds: float, state: RetryCallState) -> None:
    if state.attempt_number in (3, 6) or state.attempt_number % 10 == 0:
        left = max(0.0, patience_seconds - (time.monotonic() - state.start_time))
        error = state.outcome.exception() if state.outcome else None
        _log.warning("%s; trying again for %.0f s", error, left)


def _require_same(store: Store, key: str, content: bytes) -> None:
    """Read back what holds a key that was to be created: it may be this very content."""
    found: bytes | None = None
    try:
        found = store.read(key, len(content))
    except KeyMissing:
        raise StoreUnavailable(f"{store.location}/{key}: refused as taken, and then not there") from None
    except TooLarge:
        pass
    if found != content:
        raise KeyTaken(f"{store.location}/{key}: there is something else already")


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _checked(key: str) -> str:
    if not _KEY.fullmatch(key) or ".." in key:
        raise StoreError(f"{key!r}: not a key")
    return key
