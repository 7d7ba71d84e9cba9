"""A store below a prefix of a bucket, through boto3."""

import base64
import hashlib
import logging
import os
import time
from collections.abc import Callable
from copy import copy
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from tenacity import RetryCallState

from mappo.errors import KeyMissing, KeyTaken, StoreError, StoreUnavailable, TooLarge
from mappo.runs.retries import make_retrying
from mappo.runs.s3_access import S3Access, s3_access
from mappo.runs.store import Entry, OnRequest, checked_key, ignore_request, report_outcome, require_same

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

_log = logging.getLogger(__name__)
_TRANSIENT = {
    *("SlowDown", "Throttling", "ThrottlingException", "RequestTimeout", "RequestLimitExceeded"),
    *("BadDigest", "XAmzContentSHA256Mismatch"),  # the network has damaged the upload
}
_CREDENTIALS = {
    *("AccessDenied", "ExpiredToken", "ExpiredTokenException", "InvalidAccessKeyId", "InvalidToken"),
    *("SignatureDoesNotMatch", "TokenRefreshRequired", "AuthFailure", "RequestTimeTooSkewed", "403"),
}

_LITTLE_PATIENCE_SECONDS = 2.0

T = TypeVar("T")


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
        self._scheme, self._access = scheme, S3Access(None, "from the environment")  # the first request sets it
        self._patience_seconds, self._on_request = patience_seconds, on_request
        self._cached_client: S3Client | None = None

    def read(self, key: str, max_bytes: int) -> bytes:
        def get(client: "S3Client") -> bytes:
            response = client.get_object(Bucket=self._bucket, Key=self._key(key))
            with response["Body"] as body:
                if response["ContentLength"] > max_bytes:
                    size = response["ContentLength"]
                    raise TooLarge(f"{self.location}/{key}: {size} bytes, at most {max_bytes} are read")
                return body.read()

        return self._with_retries("read", key, get)

    def write(self, key: str, content: bytes) -> None:
        self._with_retries("write", key, lambda client: self._put(client, key, content))

    def create(self, key: str, content: bytes) -> None:
        try:
            self._with_retries("create", key, lambda client: self._put(client, key, content, IfNoneMatch="*"))
        except KeyTaken:  # an earlier try of this write may have created the key although its response was lost
            require_same(self, key, content)

    def entries(self, prefix: str = "") -> list[Entry]:
        def list_all(client: "S3Client") -> list[Entry]:
            entries = []
            start = len(self._prefix)
            pages = client.get_paginator("list_objects_v2").paginate(
                Bucket=self._bucket, Prefix=self._prefix + prefix
            )
            for page in pages:
                for item in page.get("Contents", []):
                    entries.append(Entry(item["Key"][start:], item["Size"], item["LastModified"].timestamp()))
            return sorted(entries, key=lambda entry: entry.key)

        return self._with_retries("list", prefix, list_all)

    def delete(self, key: str) -> None:
        self._with_retries(
            "delete", key, lambda client: client.delete_object(Bucket=self._bucket, Key=self._key(key))
        )

    def impatient(self) -> "S3Store":
        store = copy(self)
        store._patience_seconds = min(_LITTLE_PATIENCE_SECONDS, self._patience_seconds)
        return store

    def _key(self, key: str) -> str:
        return self._prefix + checked_key(key)

    def _put(self, client: "S3Client", key: str, content: bytes, **condition: Any) -> None:
        digest = base64.b64encode(hashlib.md5(content, usedforsecurity=False).digest()).decode()
        client.put_object(Bucket=self._bucket, Key=self._key(key), Body=content, ContentMD5=digest, **condition)

    def _with_retries(self, operation: str, key: str, request: Callable[["S3Client"], T]) -> T:
        """Send a request, and retry it with growing pauses while its error is transient."""
        location = f"{self.location}/{key}"
        log = partial(_log_retry, self._patience_seconds)
        retrying = make_retrying(_is_retryable, self._patience_seconds, 10.0, log)
        result: T = retrying(self._send, operation, location, request)
        return result

    def _send(self, operation: str, location: str, request: Callable[["S3Client"], T]) -> T:
        from botocore.exceptions import BotoCoreError, ClientError
        from urllib3.exceptions import HTTPError

        with report_outcome(self._on_request, operation):
            try:
                return request(self._client())
            except ClientError as error:
                raise self._error_of_response(location, error.response) from error
            except (BotoCoreError, HTTPError, OSError) as error:
                raise self._error_of_connection(location, error) from error

    def _error_of_response(self, location: str, response: Any) -> StoreError:
        """Return the error that describes a response with an error code."""
        code = str(response.get("Error", {}).get("Code", ""))
        status = int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        message = f"{location}: the store answered {status} {code}"
        if code == "NoSuchKey":
            return KeyMissing(f"{location}: the store has no such key")
        if code == "NoSuchBucket":
            return StoreError(
                f"{location}: there is no bucket {self._bucket!r} at {self._endpoint()}; create it first"
            )
        if status == 412:
            return KeyTaken(f"{location}: the key exists already")
        if code in _CREDENTIALS or status in (401, 403):
            endpoint = self._endpoint()
            self._cached_client = None  # a new client reads mounted credentials again, which may have been renewed
            return StoreError(
                f"{message}: the credentials are wrong, expired, or not allowed to do this at {endpoint}; "
                f"check {self._access.keys_origin}"
            )
        is_transient = status >= 500 or status in (409, 429) or code in _TRANSIENT
        return StoreUnavailable(message) if is_transient else StoreError(message)

    def _error_of_connection(self, location: str, error: Exception) -> StoreError:
        """Return the error that describes a missing or unreadable response.

        Most texts of the library's errors are left out, since they can contain a password from the URL of the
        endpoint.
        """
        from botocore import exceptions as boto

        name = type(error).__name__
        if isinstance(error, boto.SSLError):
            return StoreError(
                f"{location}: the certificate of {self._endpoint()} is not trusted; name the certificates of its "
                "authority in AWS_CA_BUNDLE"
            )
        if isinstance(
            error, boto.NoCredentialsError | boto.PartialCredentialsError | boto.CredentialRetrievalError
        ):
            return StoreError(
                f"{location}: no credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or mount a "
                f"credentials file and name it in AWS_SHARED_CREDENTIALS_FILE; they are for {self._endpoint()}"
            )
        if isinstance(
            error, boto.HTTPClientError | boto.ConnectionError | boto.IncompleteReadError
        ) or not isinstance(error, boto.BotoCoreError):
            return StoreUnavailable(f"{location}: no usable answer from {self._endpoint()}: {name}")
        return StoreError(f"{location}: {name}: {error}")

    def _client(self) -> "S3Client":
        if self._cached_client is None:
            self._cached_client = self._make_client()
        return self._cached_client

    def _make_client(self) -> "S3Client":
        """Return a client with boto3's defaults for Amazon.

        For every other store, use path-style addresses, and send checksums only where S3 requires them: many
        stores support neither virtual hosts nor boto3's newer checksums.
        """
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
            _ = url.port  # raises ValueError if the port is not a number
        except ValueError:  # its text can contain a password from the URL, so that this error leaves the text out
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
        if self._cached_client is None:
            return "its endpoint"
        url = urlsplit(self._cached_client.meta.endpoint_url)
        host = url.netloc.rpartition("@")[2]  # the text before @ may be a password
        return f"{url.scheme}://{host} ({self._access.endpoint_origin})"


def _is_retryable(error: BaseException) -> bool:
    return isinstance(error, StoreUnavailable)


def _log_retry(patience_seconds: float, state: RetryCallState) -> None:
    if state.attempt_number in (3, 6) or state.attempt_number % 10 == 0:
        remaining_seconds = max(0.0, patience_seconds - (time.monotonic() - state.start_time))
        error = state.outcome.exception() if state.outcome else None
        _log.warning("%s; trying again for %.0f s", error, remaining_seconds)
