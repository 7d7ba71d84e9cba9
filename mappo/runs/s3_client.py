"""The client of an S3 store: boto3's, whose answers have a deadline.

boto3's own time-outs limit the silence between two bytes, so that a store that sends a byte every two seconds
would never time out. Here, an `Answer` limits all that one request sends and receives.
"""

import io
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import boto3
from botocore import exceptions as boto
from botocore.awsrequest import (
    AWSHTTPConnection,
    AWSHTTPConnectionPool,
    AWSHTTPSConnection,
    AWSHTTPSConnectionPool,
)
from botocore.config import Config

from mappo.errors import StoreError
from mappo.runs.s3_access import S3Access, require_plain
from mappo.runs.s3_errors import error_of_credentials

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

_CONNECT_SECONDS = 5.0
_SILENCE_SECONDS = 30.0  # between two bytes
_ANSWER_SECONDS = 30.0  # of a whole answer, and more for a large one:
_BYTES_PER_SECOND = 100_000  # the slowest transfer that an answer waits for
_PIECE_BYTES = 1 << 18  # of an upload
_current: ContextVar["Answer"] = ContextVar("answer")  # the one that this thread waits for

# Its warnings contain the output of programs that provide credentials. Every failure is an error here anyway.
logging.getLogger("botocore.credentials").setLevel(logging.ERROR)


class Answer:
    """The time and the bytes of one request and its answer.

    They have 30 s, and 1 s more for every 100 kB that are sent or received.
    """

    def __init__(self, max_bytes: int):
        self.excess = ""  # the limit that the answer has exceeded, in words
        self._max_bytes = max_bytes
        self._num_sent = self._num_received = 0

    def __enter__(self) -> None:
        self._start = time.monotonic()
        self._token = _current.set(self)

    def __exit__(self, *_: object) -> None:
        _current.reset(self._token)

    @contextmanager
    def transfer(self, connection: Any) -> Iterator[None]:
        """Let the block read or write a socket until the deadline.

        Raises:
            TimeoutError: the answer has exceeded a limit.
        """
        if self._num_received > self._max_bytes:
            self.excess = f"it has more than {self._max_bytes} bytes"
            raise TimeoutError
        seconds = _ANSWER_SECONDS + (self._num_sent + self._num_received) / _BYTES_PER_SECOND
        remaining = self._start + seconds - time.monotonic()
        try:
            if remaining <= 0:
                raise TimeoutError
            connection.settimeout(min(_SILENCE_SECONDS, remaining))
            yield
        except TimeoutError:
            is_silent = remaining > _SILENCE_SECONDS
            self.excess = (
                f"no byte in {_SILENCE_SECONDS:.0f} s" if is_silent else f"not complete in {seconds:.0f} s"
            )
            raise

    def count_sent(self, num_bytes: int) -> None:
        self._num_sent += num_bytes

    def count_received(self, num_bytes: int) -> None:
        self._num_received += num_bytes


class _Reader(io.RawIOBase):
    """The received bytes of a socket, until the deadline of the current answer."""

    def __init__(self, connection: Any):
        self._connection = connection
        self._raw = connection.makefile("rb", 0)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        answer = _current.get()
        with answer.transfer(self._connection):
            num_bytes: int = self._raw.readinto(buffer) or 0
        answer.count_received(num_bytes)
        return num_bytes

    def close(self) -> None:
        if not self.closed:
            self._raw.close()
        super().close()


class _Socket:
    """A connected socket that reads and writes until the deadline of the current answer."""

    def __init__(self, connection: Any):
        self._connection = connection

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection, name)

    def makefile(self, _mode: str, buffering: int = -1) -> Any:
        reader = _Reader(self._connection)
        return reader if buffering == 0 else io.BufferedReader(reader)

    def sendall(self, content: Any) -> None:
        answer = _current.get()
        view = memoryview(content).cast("B")
        for start in range(0, len(view), _PIECE_BYTES):
            piece = view[start : start + _PIECE_BYTES]
            with answer.transfer(self._connection):
                self._connection.sendall(piece)
            answer.count_sent(len(piece))


class _HTTPConnection(AWSHTTPConnection):
    def connect(self) -> None:
        super().connect()
        self.sock = _Socket(self.sock)


class _HTTPSConnection(AWSHTTPSConnection):
    def connect(self) -> None:
        super().connect()
        self.sock = _Socket(self.sock)


class _HTTPPool(AWSHTTPConnectionPool):
    ConnectionCls = _HTTPConnection


class _HTTPSPool(AWSHTTPSConnectionPool):
    ConnectionCls = _HTTPSConnection


def make_client(access: S3Access, location: str) -> "S3Client":
    """Return a client with boto3's defaults for Amazon.

    For every other store, use path-style addresses, and send checksums only where S3 requires them: many stores
    support neither virtual hosts nor boto3's newer checksums.

    Raises:
        StoreError: a setting is not usable.
    """
    session = boto3.session.Session()
    options: dict[str, Any] = {
        "connect_timeout": _CONNECT_SECONDS,
        "read_timeout": _SILENCE_SECONDS,
        "retries": {"total_max_attempts": 1},
    }
    access_key, secret_key = access.keys or (None, None)
    make = partial(
        session.client,
        "s3",
        endpoint_url=access.endpoint,
        region_name=access.region,
        aws_access_key_id=access_key,
        aws_secret_access_key=secret_key,
    )
    if not access.keys:
        _check_credentials(session, location)
    try:
        client: S3Client = make(config=Config(**options))
        url = urlsplit(client.meta.endpoint_url)
        _ = url.port  # raises ValueError if the port is not a number
        if url.scheme not in ("http", "https"):
            raise ValueError
    except boto.InvalidRegionError:
        raise StoreError(f"{location}: the region is not a name of a region; correct AWS_DEFAULT_REGION") from None
    except ValueError:  # its text can contain a password from the URL, so that this error leaves the text out
        raise StoreError(
            f"{location}: the endpoint ({access.endpoint_origin}) is not a URL such as http://host:9000 "
            "or https://host"
        ) from None
    require_plain("the region (AWS_DEFAULT_REGION)", client.meta.region_name or "")
    require_plain(f"the endpoint ({access.endpoint_origin})", client.meta.endpoint_url)
    if not (url.hostname or "").endswith((".amazonaws.com", ".amazonaws.com.cn")):
        options |= {
            "s3": {"addressing_style": "path"},
            "request_checksum_calculation": "when_required",
            "response_checksum_validation": "when_required",
        }
        client = make(config=Config(**options))
    client.meta.events.register("before-parse.s3.GetObject", _keep_length)
    client.meta.events.register("before-call.s3.HeadBucket", _no_region)  # type: ignore[arg-type]
    http: Any = client
    pools = {"http": _HTTPPool, "https": _HTTPSPool}
    http._endpoint.http_session._pool_classes_by_scheme.update(pools)  # botocore has no public way to do this
    return client


def _keep_length(response_dict: dict[str, Any], **_: Any) -> None:
    """Drop all headers of an object but its length. boto3 loses the connection when it cannot parse one."""
    headers = response_dict["headers"]
    if response_dict["status_code"] < 300:
        for name in list(headers):
            if name.lower() != "content-length" or not headers[name].isdecimal():
                del headers[name]


def _no_region(**_: Any) -> tuple[Any, dict[str, Any]]:
    """Answer the question for a bucket's region that boto3 asks after a redirection without a region.

    If the store redirects this question, too, boto3 asks again until the stack overflows.
    """
    return SimpleNamespace(status_code=200), {"ResponseMetadata": {"HTTPHeaders": {}}}


def _check_credentials(session: boto3.session.Session, location: str) -> None:
    """Check the credentials that boto3 has found, in the environment, a file or elsewhere.

    Raises:
        StoreError: they cannot be read, or contain what no request can send.
    """
    try:
        credentials = session.get_credentials()
        keys = credentials.get_frozen_credentials() if credentials else None
    except Exception as error:
        raise error_of_credentials(location, error) from None
    if credentials and keys:
        source = f"of the credentials from {credentials.method}"
        require_plain(f"the access key {source}", keys.access_key or "")
        require_plain(f"the session token {source}", keys.token or "")
        require_plain(f"the secret key {source}", keys.secret_key or "", ascii_only=False)
