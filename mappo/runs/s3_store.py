"""A store below a prefix of a bucket, through boto3."""

import base64
import hashlib
import io
import logging
import os
import time
from collections.abc import Callable
from contextlib import suppress
from copy import copy
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from botocore.exceptions import BotoCoreError, ClientError
from botocore.parsers import ResponseParserError
from tenacity import RetryCallState
from urllib3.exceptions import HTTPError

from mappo.errors import KeyMissing, KeyTaken, StoreError, StoreUnavailable, TooLarge
from mappo.runs.retries import make_retrying
from mappo.runs.s3_access import S3Access, s3_access
from mappo.runs.s3_client import Answer, make_client
from mappo.runs.s3_errors import (
    CredentialsRefused,
    NotImplementedByStore,
    Request,
    error_of_connection,
    error_of_response,
    has_no_code,
)
from mappo.runs.store import Entry, OnRequest, checked_key, ignore_request, report_outcome, require_same

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

_log = logging.getLogger(__name__)
_LOGGED_ATTEMPT = 3  # of a request; earlier ones happen all the time
_MAX_ANSWER_BYTES = 1 << 20  # of an answer without an object or a listing
_MAX_LISTING_BYTES = 1 << 30
_CHUNK_BYTES = 1 << 20
_UNREADABLE = (  # what boto3 raises for answers that are not S3's
    *(ResponseParserError, ValueError, LookupError, TypeError, AttributeError, RecursionError),
)

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
        self._implements_conditions = True

    def read(self, key: str, max_bytes: int) -> bytes:
        def get(client: "S3Client") -> bytes:
            try:
                response = client.get_object(Bucket=self._bucket, Key=self._key(key))
            except ClientError as error:
                if has_no_code(error.response, 404) and not self._is_listed(client, key):
                    raise KeyMissing(f"{self.location}/{key}: the store has no such key") from None
                raise
            return self._body(response, f"{self.location}/{key}", max_bytes)

        return self._with_retries("read", key, get, max_bytes + _MAX_ANSWER_BYTES)

    def write(self, key: str, content: bytes) -> None:
        self._with_retries("write", key, lambda client: self._put(client, key, content))

    def create(self, key: str, content: bytes) -> None:
        try:
            if self._implements_conditions:
                condition = {"IfNoneMatch": "*"}
                return self._with_retries(
                    "create", key, lambda client: self._put(client, key, content, **condition)
                )
        except KeyTaken:  # an earlier try of this write may have created the key although its response was lost
            return require_same(self, key, content)
        except NotImplementedByStore:  # as in a store that ignores the condition: see `honours_conditions`
            self._implements_conditions = False
        return self.write(key, content)

    def entries(self, prefix: str = "") -> list[Entry]:
        return self._with_retries("list", prefix, lambda client: self._list(client, prefix), _MAX_LISTING_BYTES)

    def entries_outside(self, folder: str) -> list[Entry]:
        delimiter = f"/{folder}/"  # the store then names each such folder once, and not its keys

        def list_outside(client: "S3Client") -> list[Entry]:
            return self._list(client, "", delimiter)

        try:
            return self._with_retries("list", "", list_outside, _MAX_LISTING_BYTES)
        except StoreUnavailable:
            raise
        except StoreError:  # some stores know no delimiter but "/"; another reason meets `entries`, too
            return self.entries()

    def delete(self, key: str) -> None:
        with suppress(KeyMissing):  # some stores refuse to delete what does not exist
            self._with_retries(
                "delete", key, lambda client: client.delete_object(Bucket=self._bucket, Key=self._key(key))
            )

    def impatient(self) -> "S3Store":
        store = copy(self)
        store._patience_seconds = min(_LITTLE_PATIENCE_SECONDS, self._patience_seconds)
        return store

    def _list(self, client: "S3Client", prefix: str, delimiter: str = "") -> list[Entry]:
        """Return the entries below a prefix; of the keys that contain the delimiter, none."""
        entries = []
        start = len(self._prefix)
        pages = client.get_paginator("list_objects_v2").paginate(
            Bucket=self._bucket, Prefix=self._prefix + prefix, Delimiter=delimiter
        )
        for page in pages:
            if not all(group["Prefix"].endswith(delimiter) for group in page.get("CommonPrefixes", [])):
                raise StoreError(f"{self.location}: the store groups keys by another delimiter than {delimiter!r}")
            for item in self._listed(page):
                entries.append(Entry(item["Key"][start:], item["Size"], item["LastModified"].timestamp()))
        return sorted(entries, key=lambda entry: entry.key)

    def _key(self, key: str) -> str:
        return self._prefix + checked_key(key)

    def _body(self, response: Any, location: str, max_bytes: int) -> bytes:
        """Return the body of an answer, whose length need not be known beforehand."""
        length = response.get("ContentLength")
        content, body = io.BytesIO(), response["Body"]
        try:
            if length is None or length <= max_bytes:
                # The last, empty read checks the length.
                while chunk := body.read(min(_CHUNK_BYTES, max_bytes + 1 - content.tell())):
                    content.write(chunk)
                    if content.tell() > max_bytes:
                        break
                else:
                    return content.getvalue()
            size = "too many" if length is None else length
            raise TooLarge(f"{location}: {size} bytes, at most {max_bytes} are read")
        finally:
            body.close()

    def _listed(self, page: Any) -> list[Any]:
        """Return the objects of a page of a listing."""
        if "IsTruncated" not in page:  # a listing of nothing has it, too; an empty answer has not
            raise StoreUnavailable(f"{self.location}: the store answered a request to list with something else")
        contents: list[Any] = page.get("Contents", [])
        return contents

    def _is_listed(self, client: "S3Client", key: str) -> bool:
        """Return whether a listing contains a key: the store answered 404 without a reason."""
        page = client.list_objects_v2(Bucket=self._bucket, Prefix=self._key(key), MaxKeys=1)
        return any(item["Key"] == self._key(key) for item in self._listed(page))

    def _put(self, client: "S3Client", key: str, content: bytes, **condition: Any) -> None:
        digest = base64.b64encode(hashlib.md5(content, usedforsecurity=False).digest()).decode()
        client.put_object(Bucket=self._bucket, Key=self._key(key), Body=content, ContentMD5=digest, **condition)

    def _with_retries(
        self,
        operation: str,
        key: str,
        request: Callable[["S3Client"], T],
        max_bytes: int = _MAX_ANSWER_BYTES,
    ) -> T:
        """Send a request, and retry it with growing pauses while its error is transient."""
        location = f"{self.location}/{key}"
        log = partial(_log_retry, self._patience_seconds)
        retrying = make_retrying(_is_retryable, self._patience_seconds, 10.0, log)
        result: T = retrying(self._send, operation, location, request, max_bytes)
        return result

    def _send(self, operation: str, location: str, request: Callable[["S3Client"], T], max_bytes: int) -> T:
        """Send a request once.

        Errors hide their cause (from None): its text can contain a token or a password.
        """
        with report_outcome(self._on_request, operation):
            answer = Answer(max_bytes)
            try:
                client = self._client()
                with answer:
                    return request(client)
            except ClientError as error:
                described = error_of_response(self._described(location), error.response)
                if isinstance(described, CredentialsRefused):
                    self._cached_client = None  # a new client reads mounted credentials, which may be renewed
                raise described from None
            except (BotoCoreError, HTTPError, OSError, *_UNREADABLE) as error:
                raise error_of_connection(self._described(location), error, answer.excess) from None

    def _client(self) -> "S3Client":
        if self._cached_client is None:
            self._access = s3_access(self._scheme, os.environ)
            self._cached_client = make_client(self._access, self.location)
        return self._cached_client

    def _described(self, location: str) -> Request:
        if self._cached_client is None:
            return Request(location, self._bucket, "its endpoint", self._access.keys_origin, "the client's")
        meta = self._cached_client.meta
        url = urlsplit(meta.endpoint_url)
        host = url.netloc.rpartition("@")[2]  # the text before @ may be a password
        endpoint = f"{url.scheme}://{host} ({self._access.endpoint_origin})"
        return Request(location, self._bucket, endpoint, self._access.keys_origin, str(meta.region_name))


def _is_retryable(error: BaseException) -> bool:
    return isinstance(error, StoreUnavailable)


def _log_retry(patience_seconds: float, state: RetryCallState) -> None:
    if state.attempt_number == _LOGGED_ATTEMPT:
        remaining_seconds = max(0.0, patience_seconds - (time.monotonic() - state.start_time))
        error = state.outcome.exception() if state.outcome else None
        _log.warning("%s; trying again for %.0f s", error, remaining_seconds)
