"""A small HTTP server that cannot slow training down: it answers few requests per second and few at once.

Further requests wait in the short queue of the operating system, or the server closes them. They cost training
nothing.
"""

import logging
import socket
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

_log = logging.getLogger(__name__)
_REQUESTS_PER_SECOND = 2.0
_BURST = 8
_MAX_CONCURRENT = 4
_CLIENT_SECONDS = 5.0  # deadline for a client to send its request and receive the answer
_MAX_CLIENTS = 16  # number of client addresses to remember for each path


@dataclass(frozen=True)
class Page:
    """The answer to a request."""

    status: int
    content_type: str
    body: bytes


def text_page(status: int, text: str) -> Page:
    """Return a page with one line of plain text."""
    return Page(status, "text/plain; charset=utf-8", f"{text}\n".encode())


class MetricsServer:
    """A server of pages by path. It runs in threads of its own until `close` is called."""

    def __init__(self, port: int, pages: Mapping[str, Callable[[], Page]]):
        """Listen on all addresses of this machine. Port 0 selects any free port.

        Raises:
            OSError: the port is taken, or this user may not listen on it.
            RuntimeError: the system cannot start a thread for the server.
        """
        self._answered: dict[
            str, dict[str, float]
        ] = {}  # path, client's address: time of the client's last request
        self._changed = threading.Condition()
        self._server = _Server(port, pages, self._note)
        self.port: int = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.1,), name="metrics", daemon=True).start()

    def clients(self, path: str, since: float) -> set[str]:
        """Return the addresses whose requests for `path` were answered. `since` is a time of `time.monotonic`."""
        with self._changed:
            return {client for client, last in self._answered.get(path, {}).items() if last >= since}

    def wait_for_clients(self, path: str, since: float, clients: set[str], seconds: float) -> bool:
        """Wait until all `clients`, and at least one client, have requested `path` since the time `since`.

        Return whether that happened within `seconds`. Several clients matter because a Prometheus may run as two
        replicas, and each of them needs the last values.
        """

        def all_have_requested() -> bool:
            answered = self.clients(path, since)
            return bool(answered) and clients <= answered

        with self._changed:
            return self._changed.wait_for(all_have_requested, seconds)

    def close(self) -> None:
        """Stop the server and free the port."""
        self._server.shutdown()
        self._server.server_close()

    def _note(self, path: str, client: str, start: float) -> None:
        with self._changed:
            answered = self._answered.setdefault(path, {})
            answered[client] = max(start, answered.get(client, start))
            if len(answered) > _MAX_CLIENTS:
                del answered[min(answered, key=lambda address: answered[address])]
            self._changed.notify_all()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 16

    def __init__(
        self, port: int, pages: Mapping[str, Callable[[], Page]], on_answer: Callable[[str, str, float], object]
    ):
        self.pages, self.on_answer = pages, on_answer
        self._slots = threading.BoundedSemaphore(_MAX_CONCURRENT)
        self._next = 0.0  # time at which the rate limit allows the next request
        self.address_family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
        super().__init__(("", port), _Handler)

    def server_bind(self) -> None:
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = "metrics", self.server_address[1]

    def process_request(self, request: Any, client_address: Any) -> None:
        """Wait for the rate limit, and hand the request to a thread; close the request if all threads are busy."""
        current = time.monotonic()
        self._next = max(self._next, current - _BURST / _REQUESTS_PER_SECOND) + 1 / _REQUESTS_PER_SECOND
        time.sleep(max(0.0, self._next - current))
        if not self._slots.acquire(blocking=False):
            return self.shutdown_request(request)
        try:
            super().process_request(request, client_address)
        except BaseException:  # the system could not start a thread
            self._slots.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answer a request, or cut the client off at the deadline.

        The socket's own timeout is not enough: it begins again with every byte that a slow client sends.
        """
        deadline = threading.Timer(_CLIENT_SECONDS, _cut_off, (request,))
        deadline.daemon = True
        try:
            deadline.start()
            super().process_request_thread(request, client_address)
        finally:
            deadline.cancel()
            self._slots.release()

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002
        """Log the error of a request at debug level only; a broken connection must not disturb training."""
        _log.debug("a request for metrics from %s failed", client_address, exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    timeout = _CLIENT_SECONDS
    server_version, sys_version = "mappo", ""
    server: _Server

    def do_GET(self) -> None:
        start = time.monotonic()
        path = self.path.partition("?")[0]
        page = self.server.pages.get(path, _not_found(self.server.pages))()
        self.send_response(page.status)
        self.send_header("Content-Type", page.content_type)
        self.send_header("Content-Length", str(len(page.body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(page.body)
            self.wfile.flush()
            self.server.on_answer(path, self.client_address[0], start)

    do_HEAD = do_GET  # noqa: N815  (the name that http.server looks for)

    def log_message(self, *_: object) -> None:
        """Print nothing, instead of one line per request."""


def _cut_off(request: socket.socket) -> None:
    with suppress(OSError):  # the request is closed already
        request.shutdown(socket.SHUT_RDWR)


def _not_found(pages: Mapping[str, Callable[[], Page]]) -> Callable[[], Page]:
    return lambda: text_page(404, f"not found; the pages are {', '.join(pages)}")
