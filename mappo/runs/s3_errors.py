"""The errors of an S3 store: what an answer, or its absence, means.

No message contains the text of a library's error or of a response, which can contain keys, tokens or passwords.
"""

import re
from dataclasses import dataclass
from typing import Any

from botocore import exceptions as boto

from mappo.errors import KeyMissing, KeyTaken, StoreError, StoreUnavailable

_TRANSIENT = {
    *("SlowDown", "Throttling", "ThrottlingException", "RequestTimeout", "RequestLimitExceeded"),
    *("BadDigest", "XAmzContentSHA256Mismatch", "IncompleteBody"),  # the network has damaged the upload
}
_CREDENTIALS = {
    *("AccessDenied", "ExpiredToken", "ExpiredTokenException", "InvalidAccessKeyId", "InvalidToken"),
    *("SignatureDoesNotMatch", "TokenRefreshRequired", "AuthFailure"),
}
_REGION = {
    *("AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "IncorrectEndpoint", "InvalidRegion"),
    *("PermanentRedirect", "Redirect", "TemporaryRedirect"),
}
_FULL = {"XMinioStorageFull", "InsufficientCapacity", "InsufficientStorage"}
_PLAIN_TEXTS = (
    boto.ProfileNotFound,
    boto.ConfigParseError,
    boto.ConfigNotFound,
    boto.InvalidRetryConfigurationError,
)


class NotImplementedByStore(StoreError):
    """The store does not implement a part of the request, such as its condition."""


class CredentialsRefused(StoreError):
    """The store refused the credentials; mounted ones may have been renewed since they were read."""


@dataclass(frozen=True)
class Request:
    """A request to a store, as its errors name it.

    location: the location of the key. endpoint: the endpoint without passwords, and the setting that it is from.
    keys_origin: the settings that the keys are from. region: the region that the request is signed for.
    """

    location: str
    bucket: str
    endpoint: str
    keys_origin: str
    region: str


def has_no_code(response: Any, status: int) -> bool:
    """Return whether a response with this status has no error code: its body is empty, cut, or not from S3."""
    return _status(response) == status and _code(response) in ("", str(status))


def error_of_response(request: Request, response: Any) -> StoreError:
    """Return the error that describes a response with an error code."""
    code, status = _code(response), _status(response)
    message = (
        f"{request.location}: the store answered {status}{f' {code}' if code not in ('', str(status)) else ''}"
    )
    if code == "NoSuchKey":
        return KeyMissing(f"{request.location}: the store has no such key")
    if code == "NoSuchBucket":
        return StoreError(
            f"{request.location}: there is no bucket {request.bucket!r} at {request.endpoint}; create it first"
        )
    if status == 412:
        return KeyTaken(f"{request.location}: the key exists already")
    if status == 501 or code == "NotImplemented":
        return NotImplementedByStore(f"{message}: {request.endpoint} does not implement this request")
    if "quota" in code.lower() or status == 507 or code in _FULL:
        return StoreError(
            f"{message}: the quota of {request.endpoint} is used up, or it is full; raise the quota or free some "
            "space, and saving continues"
        )
    if code == "RequestTimeTooSkewed":
        return StoreError(f"{message}: the clocks of this machine and of {request.endpoint} differ; correct them")
    if code in _REGION or status in (301, 302, 307, 308):
        return StoreError(f"{message}: {_region(request, response)}")
    if code in _CREDENTIALS or status in (401, 403):
        return CredentialsRefused(
            f"{message}: the credentials are wrong, expired, or not allowed to do this at {request.endpoint}; "
            f"check {request.keys_origin}"
        )
    if has_no_code(response, 404) and "html" in _header(response, "content-type"):
        return StoreError(f"{message} with a web page: {request.endpoint} is not the endpoint of an S3 store")
    is_transient = status >= 500 or status in (408, 409, 429) or code in _TRANSIENT or has_no_code(response, 404)
    return StoreUnavailable(message) if is_transient else StoreError(message)


def error_of_connection(request: Request, error: Exception, excess: str = "") -> StoreError:
    """Return the error that describes a missing or unreadable answer. `excess`: the limit that it exceeded."""
    name = type(error).__name__
    cause = getattr(error, "kwargs", {}).get("error")
    if excess:
        return StoreUnavailable(f"{request.location}: no usable answer from {request.endpoint}: {excess}")
    if isinstance(error, boto.SSLError):
        return _error_of_tls(request, cause)
    if isinstance(error, boto.NoCredentialsError):
        return StoreError(f"{error_of_credentials(request.location, error)}; they are for {request.endpoint}")
    if type(error) is boto.HTTPClientError and isinstance(cause, ValueError):
        return StoreError(
            f"{request.location}: no request can be sent to {request.endpoint} ({type(cause).__name__}); check "
            f"HTTP_PROXY, HTTPS_PROXY and {request.keys_origin} for spaces and line ends"
        )
    is_connection = isinstance(error, boto.HTTPClientError | boto.ConnectionError | boto.IncompleteReadError)
    if is_connection or not isinstance(error, boto.BotoCoreError):
        return StoreUnavailable(f"{request.location}: no usable answer from {request.endpoint}: {name}")
    return error_of_settings(request.location, error)


def error_of_settings(location: str, error: Exception) -> StoreError:
    """Return the error that describes settings that boto3 refuses."""
    text = f": {' '.join(str(error).split())}" if isinstance(error, _PLAIN_TEXTS) else ""
    return StoreError(f"{location}: boto3 refuses its settings: {type(error).__name__}{text}")


def error_of_credentials(location: str, error: Exception) -> StoreError:
    """Return the error that describes credentials that boto3 cannot find or read."""
    if isinstance(error, boto.NoCredentialsError | boto.PartialCredentialsError):
        return StoreError(
            f"{location}: no credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or mount a "
            "credentials file and name it in AWS_SHARED_CREDENTIALS_FILE"
        )
    if isinstance(error, _PLAIN_TEXTS):
        return error_of_settings(location, error)
    kind = StoreUnavailable if isinstance(error, boto.HTTPClientError | boto.ConnectionError) else StoreError
    return kind(f"{location}: no credentials: their source failed with {type(error).__name__}")


def _error_of_tls(request: Request, cause: Any) -> StoreError:
    inner = cause.args[0] if getattr(cause, "args", ()) else cause
    reason = str(getattr(inner, "reason", None) or type(inner).__name__)
    if "CERTIFICATE" in reason or isinstance(inner, FileNotFoundError):
        return StoreError(
            f"{request.location}: the certificate of {request.endpoint} is not trusted; name the certificates of "
            "its authority in AWS_CA_BUNDLE"
        )
    return StoreUnavailable(f"{request.location}: no encrypted connection to {request.endpoint}: {reason}")


def _region(request: Request, response: Any) -> str:
    named = str(response.get("Error", {}).get("Region") or _header(response, "x-amz-bucket-region"))
    region = f", {named}," if re.fullmatch(r"[A-Za-z0-9-]{1,40}", named) else ""
    return (
        f"the bucket {request.bucket!r} is in another region{region} than {request.region}, or not at "
        f"{request.endpoint}; correct AWS_DEFAULT_REGION or the endpoint"
    )


def _code(response: Any) -> str:
    """Return the error code, without characters that S3's codes never have."""
    return re.sub(r"[^A-Za-z0-9._-]", "", str(response.get("Error", {}).get("Code", "")))[:60]


def _status(response: Any) -> int:
    return int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _header(response: Any, name: str) -> str:
    return str(response.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get(name, ""))
