"""Post a message to a webhook, whose URL is a secret.

A webhook that is dead, slow or hostile costs one warning and a bounded time: the request runs in a thread with a
deadline, redirects are refused, and little of an answer is read. No message shows the URL, an error's text or an
answer, all of which can hold the secret.
"""

import json
import os
import re
import ssl
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any, Literal, get_args
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

import mappo
from mappo.errors import ConfigError

URL_VARIABLE, FORMAT_VARIABLE = "MAPPO_NOTIFY_URL", "MAPPO_NOTIFY_FORMAT"
KUBEFLOW_URL_VARIABLE = "MAPPO_KUBEFLOW_URL"  # the address of Kubeflow's UI, for links in messages
WebhookFormat = Literal["slack", "teams", "json"]
_DEADLINE_SECONDS = 30.0  # for all attempts together
_REQUEST_SECONDS = 10.0  # without a byte from the webhook
_RETRY_SECONDS = (1.0, 4.0)  # waits after the first and the second attempt
_ANSWER_BYTES = 1000  # read of an answer
_HOSTS: dict[WebhookFormat, tuple[str, ...]] = {
    "slack": ("hooks.slack.com", "hooks.slack-gov.com"),
    "teams": (".webhook.office.com", ".logic.azure.com", ".powerplatform.com"),
}


@dataclass(frozen=True)
class Webhook:
    """A webhook: its URL, and the format of the messages that it takes."""

    url: str
    format: WebhookFormat

    def __repr__(self) -> str:
        """Return a text without the URL."""
        return f"Webhook(format={self.format!r})"

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> "Webhook | None":
        """Read MAPPO_NOTIFY_URL and MAPPO_NOTIFY_FORMAT; without a URL, the result is None.

        Without a format, Slack's and Teams' hosts get theirs, and all others get json.

        Raises:
            ConfigError: a variable has a value that is not allowed. The message does not show the value.
        """
        url, name = environment.get(URL_VARIABLE, "").strip(), environment.get(FORMAT_VARIABLE, "").strip()
        if not url:
            return None
        host = _host(url)
        if name and name not in get_args(WebhookFormat):
            raise ConfigError(f"{FORMAT_VARIABLE}: must be {', '.join(get_args(WebhookFormat))}, or not set")
        guesses = [kind for kind, hosts in _HOSTS.items() if host.endswith(hosts)]
        kinds = [kind for kind in get_args(WebhookFormat) if kind == name] or guesses
        return cls(url, kinds[0] if kinds else "json")

    def post(self, body: Mapping[str, Any], deadline_seconds: float = _DEADLINE_SECONDS) -> str:
        """Post a JSON object; return why it was not delivered, or an empty text."""
        deadline = time.monotonic() + deadline_seconds
        reasons: list[str] = []
        content = json.dumps(body).encode()
        thread = threading.Thread(
            target=lambda: reasons.append(_deliver(self.url, content, deadline)), daemon=True
        )
        thread.start()
        thread.join(deadline_seconds)
        return reasons[0] if reasons else f"it did not answer within {deadline_seconds:g} s"


def required_webhook() -> Webhook:
    """Return the webhook of a user who asks for messages.

    Raises:
        ConfigError: MAPPO_NOTIFY_URL is missing, or it is not the URL of a webhook.
    """
    webhook = Webhook.from_environment()
    if webhook is None:
        raise ConfigError(f"--notify: set {URL_VARIABLE} in the environment to the URL of a webhook")
    return webhook


class _NoRedirects(HTTPRedirectHandler):
    """A handler that refuses redirects: another host must not get the message, nor the URL as the referrer."""

    def redirect_request(self, *_: Any) -> None:
        return None


def _deliver(url: str, content: bytes, deadline: float) -> str:
    """Post until it succeeds, fails for good, or the deadline is near; return the reason of the failure."""
    for wait in (*_RETRY_SECONDS, None):
        reason, may_pass = _attempt(url, content)
        if not reason or not may_pass or wait is None or time.monotonic() + wait > deadline:
            return reason
        time.sleep(wait)
    raise AssertionError


def _attempt(url: str, content: bytes) -> tuple[str, bool]:
    """Post once; return why it failed, or an empty text, and whether another attempt may succeed."""
    headers = {"Content-Type": "application/json", "User-Agent": f"mappo/{mappo.__version__}"}
    request = Request(url, content, headers, method="POST")  # noqa: S310  (`_host` has checked the scheme)
    try:
        with build_opener(_NoRedirects).open(request, timeout=_REQUEST_SECONDS) as answer:
            answer.read(_ANSWER_BYTES)
    except HTTPError as error:
        error.close()
        if error.code < 400:
            return "it redirects to another address, which gets no message", False
        return f"it answered {error.code}", error.code >= 500 or error.code == 429
    except URLError as error:
        cause = error.reason
        if isinstance(cause, ssl.SSLError):
            return "its certificate is not valid, or it does not speak TLS", False
        return f"it cannot be reached ({type(cause).__name__})", True
    except TimeoutError:
        return "it did not answer in time", True
    except (HTTPException, OSError, ValueError) as error:
        return f"its answer cannot be read ({type(error).__name__})", False
    return "", False


def _host(url: str) -> str:
    """Return the host in a URL.

    Raises:
        ConfigError: the text is not the URL of a webhook.
    """
    try:
        parts = urlsplit(url)
        host = parts.hostname or ""
        is_sound = parts.scheme in ("http", "https") and parts.port != 0 and parts.username is None
    except ValueError:
        host, is_sound = "", False
    if not (is_sound and re.fullmatch(r"[!-~]+", url) and re.fullmatch(r"[a-z0-9._-]+|[0-9a-f:.]+", host)):
        raise ConfigError(
            f"{URL_VARIABLE}: must be the URL of a webhook, such as https://host/path, without user and password"
        )
    return host
