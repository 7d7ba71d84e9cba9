"""The API of one Kubeflow Pipelines server: requests, retries and readable errors."""

import json
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, TypeVar
from urllib.parse import urlsplit

import kfp_server_api
import tenacity
import urllib3

from mappo.errors import ConfigError
from pipelines.errors import ApiError
from pipelines.kubeflow.connection import Connection, client_configuration, in_pod

_PAGE_SIZE = 100


T = TypeVar("T")
_TIMEOUT_SECONDS = (10.0, 60.0)  # for the connection, for the answer
_NOT_DONE = (429, 503)  # the server refused the request before it did anything
_PERHAPS_DONE = (500, 502, 504)  # the server may have carried the request out
_MAX_PAUSE_SECONDS = 10.0
_TRIES_AT_500 = 3
_MEANINGS = {
    401: "the credentials are missing, wrong or expired",
    403: "these credentials may not do that here",
    404: "it does not exist",
    407: "the proxy needs a user and a password, in HTTPS_PROXY or HTTP_PROXY",
    409: "it exists already",
    429: "too many requests",
}
_CERTIFICATE = "its certificate is not trusted: give the authority's by --ca-file or KF_PIPELINES_CA_FILE"
_LOGIN = (
    "a login page answered instead of the API: give a token (KF_PIPELINES_TOKEN, --token-file) or the cookie of a "
    "session in the browser (KF_PIPELINES_COOKIE), or bypass the gateway with kubectl port-forward"
)


@dataclass(frozen=True)
class RetryNotice:
    """A notice that a request failed and is retried.

    reason: the last failure; empty in the last notice of a request. tries, seconds: number and total time of the
    tries so far. is_over: whether the retries have ended, with an answer or an error.
    """

    reason: str
    tries: int
    seconds: float
    is_over: bool = False


class Api:
    """The API as one user sees it. Requests with transient errors are retried for up to `patience_seconds`."""

    def __init__(
        self,
        connection: Connection,
        *,
        patience_seconds: float = 60.0,
        on_retry: Callable[[RetryNotice], object] = lambda _: None,
    ):
        """Configure the client; send no request yet.

        `on_retry` is called before each retry of a request, and once more when a retried request ends.

        Raises:
            ConfigError: the endpoint is no URL, no endpoint can be derived, or a file cannot be read.
        """
        self.connection, self._patience, self._on_retry = connection, patience_seconds, on_retry
        self._connect()

    def _connect(self) -> None:
        configuration, self._own_namespace = client_configuration(self.connection)
        configuration.retries = False  # urllib3 neither follows redirects nor retries: `_retrying` retries
        self.url: str = configuration.host
        self.is_by_kubeconfig = not self.connection.endpoint and not in_pod()
        self._client = kfp_server_api.ApiClient(configuration, cookie=self.connection.cookie or None)
        self.runs = kfp_server_api.RunServiceApi(self._client)
        self.experiments = kfp_server_api.ExperimentServiceApi(self._client)
        self.pipelines = kfp_server_api.PipelineServiceApi(self._client)
        self.uploads = kfp_server_api.PipelineUploadServiceApi(self._client)
        self.recurring = kfp_server_api.RecurringRunServiceApi(self._client)
        self._health = kfp_server_api.HealthzServiceApi(self._client)

    @property
    def has_pages(self) -> bool:
        """Return whether the endpoint is likely a gateway with pages for people, and not the API alone."""
        parts = urlsplit(self.connection.endpoint)
        return parts.path.endswith("/pipeline") or (bool(parts.hostname) and parts.port is None)

    @cached_property
    def is_multi_user(self) -> bool:
        """Return whether this Kubeflow has several users, with a namespace for each."""
        return bool(self.call(self._health.healthz_service_get_healthz).multi_user)

    @cached_property
    def namespace(self) -> str | None:
        """The user's namespace; None in a Kubeflow of one user, which refuses requests with a namespace.

        Raises:
            ConfigError: Kubeflow has several users, and the namespace or the user is unknown.
        """
        if not self.is_multi_user:
            return None
        if self.is_by_kubeconfig:
            raise ConfigError(
                "this Kubeflow has several users, and the Kubernetes API does not pass on who the user is: give "
                "the gateway's address by --endpoint, with a token or cookie"
            )
        namespace = self.connection.namespace or self._own_namespace
        if not namespace:
            raise ConfigError("this Kubeflow has several users: give --namespace or KF_PIPELINES_NAMESPACE")
        return namespace

    def call(self, function: Callable[..., T], *arguments: Any, **options: Any) -> T:
        """Send an idempotent request, with retries; return the answer.

        Raises:
            ApiError: the server refused the request, or did not answer in time.
        """
        return self._retrying(lambda: self._once(function, arguments, options))

    def create(self, function: Callable[..., T], body: Any, find: Callable[[], T | None]) -> T:
        """Create an object once, with retries; return the created object.

        A lost answer leaves open whether the object was created. `find` then looks for the object before the next
        try.

        Raises:
            ApiError: the server refused the request, or did not answer in time.
        """
        is_perhaps_created = False

        def attempt() -> T:
            nonlocal is_perhaps_created
            if is_perhaps_created and (existing := find()) is not None:
                return existing
            try:
                return self._once(function, (body,), {})
            except _Transient as error:
                is_perhaps_created = is_perhaps_created or not error.surely_not_done
                raise

        return self._retrying(attempt)

    def server_version(self) -> str:
        """Return the server's version; empty if the server does not tell its version."""
        try:
            answer = json.loads(self.text("/apis/v2beta1/healthz"))
        except (ApiError, ValueError):
            return ""
        version = str(answer.get("tag_name", "")) if isinstance(answer, dict) else ""
        return "" if version == "unknown" else version

    def text(self, path: str) -> str:
        """Return the text at a path of the server that the generated client does not support, with retries.

        Raises:
            ApiError: the server refused the request, or did not answer in time.
        """

        def get(_request_timeout: tuple[float, float]) -> str:
            answer = self._client.call_api(
                path,
                "GET",
                auth_settings=["Bearer"],
                response_type="str",
                _return_http_data_only=True,
                _preload_content=False,
                _request_timeout=_request_timeout,
            )
            self._client.last_response = answer
            return str(answer.data.decode(errors="replace"))

        return self._retrying(lambda: self._once(get, (), {}), tries_at_500=1)

    def _once(self, function: Callable[..., T], arguments: tuple[Any, ...], options: Mapping[str, Any]) -> T:
        try:
            answer = function(*arguments, **options, _request_timeout=_TIMEOUT_SECONDS)
        except kfp_server_api.ApiException as error:
            raise _translated(error, self.url) from None
        except AttributeError as error:  # a bug of the generated client, at a certificate that is not trusted
            if not isinstance(error.__context__, kfp_server_api.ApiException):
                raise
            raise ApiError(f"{self.url}: {_CERTIFICATE} ({_reason(error.__context__)})") from None
        except urllib3.exceptions.HTTPError as error:
            unsent = isinstance(
                error, urllib3.exceptions.NewConnectionError | urllib3.exceptions.NameResolutionError
            )
            raise _Transient(f"{self.url}: no answer: {_reason(error)}", surely_not_done=unsent) from None
        kind = self._client.last_response.getheader("content-type") or ""
        if not kind.startswith(("application/json", "text/plain")):
            raise ApiError(f"{self.url}: {_LOGIN}")
        return answer

    def _retrying(self, attempt: Callable[[], T], tries_at_500: int = _TRIES_AT_500) -> T:
        """Retry transient errors until the patience ends; after a 401, renew the credentials and retry once."""
        renewed, tries, started = False, 0, time.monotonic()

        def renewing() -> T:
            nonlocal renewed, tries
            tries += 1
            try:
                return attempt()
            except ApiError as error:
                if error.status != 401 or renewed:
                    raise
                renewed = True
                self._renew()
                return attempt()

        retry = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(_Transient),
            wait=_pause,
            stop=partial(self._is_exhausted, tries_at_500),
            before_sleep=self._report_retry,
            reraise=True,
        )
        try:
            return retry(renewing)
        finally:
            if tries > 1:
                self._on_retry(RetryNotice("", tries, time.monotonic() - started, is_over=True))

    def _is_exhausted(self, tries_at_500: int, state: tenacity.RetryCallState) -> bool:
        """Return whether the retries end: after the patience, or after few tries at error 500.

        The server answers some mistakes of users with error 500 too, and retries do not mend these.
        """
        assert state.outcome is not None
        assert state.seconds_since_start is not None
        error = state.outcome.exception()
        is_internal = isinstance(error, ApiError) and error.status == 500
        return state.seconds_since_start > self._patience or (is_internal and state.attempt_number >= tries_at_500)

    def _report_retry(self, state: tenacity.RetryCallState) -> None:
        assert state.outcome is not None
        assert state.seconds_since_start is not None
        reason = " ".join(str(state.outcome.exception()).split())
        self._on_retry(RetryNotice(reason, state.attempt_number, state.seconds_since_start))

    def _renew(self) -> None:
        """Read the tokens again; the command of a kubeconfig fetches a new token."""
        fresh, _ = client_configuration(self.connection)
        self._client.configuration.api_key = fresh.api_key
        self._client.configuration.api_key_prefix = fresh.api_key_prefix
        self._client.configuration.refresh_api_key_hook = fresh.refresh_api_key_hook


class _Transient(ApiError):
    """A transient error, after which a request is retried.

    surely_not_done: whether the server certainly did not carry the request out. pause_seconds: the pause that the
    server asks for.
    """

    def __init__(self, message: str, status: int = 0, *, surely_not_done: bool, pause_seconds: float = 0.0):
        super().__init__(message, status)
        self.surely_not_done, self.pause_seconds = surely_not_done, pause_seconds


def unique_name(base: str) -> str:
    """Return a unique name, which finds a created object again after a lost answer."""
    return f"{base} {time.strftime('%Y-%m-%d %H:%M:%S', time.gmtime())} {uuid.uuid4().hex[:6]}"


def _pause(state: tenacity.RetryCallState) -> float:
    """Return the pause before the next try: it doubles each time, and is at least what the server asks for."""
    assert state.outcome
    error = state.outcome.exception()
    requested = error.pause_seconds if isinstance(error, _Transient) else 0.0
    return float(min(max(requested, 0.25 * 2**state.attempt_number), _MAX_PAUSE_SECONDS))


def _translated(error: kfp_server_api.ApiException, url: str) -> ApiError:
    status, text = int(error.status or 0), _server_message(error)
    if 300 <= status < 400:
        return ApiError(f"{url}: {_LOGIN}", 401)
    message = f"{url}: {_MEANINGS.get(status, f'error {status}')}: {text}" if text else f"{url}: error {status}"
    if status in _NOT_DONE + _PERHAPS_DONE or status == 0:
        wait = str((error.headers or {}).get("Retry-After", ""))
        seconds = float(wait) if wait.isdecimal() else 0.0
        return _Transient(message, status, surely_not_done=status in _NOT_DONE, pause_seconds=seconds)
    return ApiError(message, status)


def _server_message(error: kfp_server_api.ApiException) -> str:
    """Return the server's message from the body of its answer."""
    body = error.body or ""
    try:
        answer = json.loads(body)
    except ValueError:
        return str(error.reason or "") if body.lstrip().startswith("<") else body.strip()[:500]
    if isinstance(answer, dict):
        for key in ("error_message", "message", "error", "error_details"):
            if isinstance(answer.get(key), str) and answer[key]:
                return str(answer[key])
    return body[:500]


def _reason(error: BaseException) -> str:
    """Return the last part of an error's message, which names the cause."""
    return " ".join(str(error).split()).rpartition(": ")[2] or type(error).__name__


def pages(kubeflow: Api, function: Callable[..., Any], name: str, **options: Any) -> Iterator[Any]:
    """Yield all items of a list, page by page. name: the field of the answer that holds the items."""
    options = {key: value for key, value in options.items() if value is not None}
    token = ""
    while True:
        page = kubeflow.call(function, page_size=_PAGE_SIZE, page_token=token, **options)
        yield from getattr(page, name) or []
        token = page.next_page_token
        if not token:
            return


def predicate(operation: str, key: str, value: str) -> str:
    """Return a list's filter with one condition, as JSON. operation: such as EQUALS or IS_SUBSTRING."""
    return json.dumps({"predicates": [{"operation": operation, "key": key, "string_value": value}]})


def experiment_filter(kubeflow: Api) -> dict[str, Any]:
    """Return the options that restrict a list to the user's namespace."""
    return {"namespace": kubeflow.namespace} if kubeflow.namespace else {}
