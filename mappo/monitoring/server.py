"""A small HTTP server beside training, which cannot slow it down: few requests a second, few at once.

What is beyond that waits in the operating system's short queue, or is turned away, and costs training nothing.
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
_AT_ONCE = 4
_CLIENT_SECONDS = 5.0  # for a client to send its request and take the answer
_MOST_CLIENTS = 16  # that are remembered


@dataclass(frozen=True)
class Page:
    """An answer."""

    status: int
    content_type: str
    body: bytes


def text_page(status: int, text: str) -> Page:
    """A line for people."""
    return Page(status, "text/plain; charset=utf-8", f"{text}\n".encode())


class MetricsServer:
    """Serves pages by path, from threads of its own, until it is closed."""

    def __init__(self, port: int, pages: Mapping[str, Callable[[], Page]]):
        """Listen on all addresses of this machine; port 0 takes any that is free.

        Raises:
            OSError: the port is taken, or not allowed.
            RuntimeError: the system gives no thread for it.
        """
        self._answered: dict[str, dict[str, float]] = {}  # path, client: when its last request came
        self._changed = threading.Condition()
        self._server = _Server(port, pages, self._note)
        self.port: int = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.1,), name="metrics", daemon=True).start()

    def clients(self, path: str, moment: float) -> set[str]:
        """Addresses whose requests for a path since a moment of `time.monotonic` were answered."""
        with self._changed:
            return {client for client, asked in self._answered.get(path, {}).items() if asked >= moment}

    def wait_for_clients(self, path: str, moment: float, clients: set[str], seconds: float) -> bool:
        """Wait until all of these have asked for a path since a moment, and anyone at all; whether they have.

        A Prometheus may be two: each needs the last values.
        """

        def done() -> bool:
            asked = self.clients(path, moment)
            return bool(asked) and clients <= asked

        with self._changed:
            return self._changed.wait_for(done, seconds)

    def close(self) -> None:
        """Stop, and free the port."""
        self._server.shutdown()
        self._server.server_close()

    def _note(self, path: str, client: str, began: float) -> None:
        with self._changed:
            answered = self._answered.setdefault(path, {})
            answered[client] = max(began, answered.get(client, began))
            if len(answered) > _MOST_CLIENTS:
                del answered[min(answered, key=lambda known: answered[known])]
            self._changed.notify_all()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 16

    def __init__(
        self, port: int, pages: Mapping[str, Callable[[], Page]], on_answer: Callable[[str, str, float], object]
    ):
        self.pages, self.on_answer = pages, on_answer
        self._slots = threading.BoundedSemaphore(_AT_ONCE)
        self._next = 0.0  # when the next request is due, at the rate that is allowed
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
        """Hand a request to a thread, in its time, if one is free."""
        now = time.monotonic()
        self._next = max(self._next, now - _BURST / _REQUESTS_PER_SECOND) + 1 / _REQUESTS_PER_SECOND
        time.sleep(max(0.0, self._next - now))
        if not self._slots.acquire(blocking=False):
            return self.shutdown_request(request)
        try:
            super().process_request(request, client_address)
        except BaseException:  # no thread could be started
            self._slots.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answer, unless the client takes too long, however slowly it goes on."""
        deadline = threading.Timer(_CLIENT_SECONDS, _cut_off, (request,))
        deadline.daemon = True
        try:
            deadline.start()
            super().process_request_thread(request, client_address)
        finally:
            deadline.cancel()
            self._slots.release()

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002
        """A client that went away, or a defect: training goes on."""
        _log.debug("a request for metrics from %s failed", client_address, exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    timeout = _CLIENT_SECONDS
    server_version, sys_version = "mappo", ""
    server: _Server

    def do_GET(self) -> None:
        began = time.monotonic()
        path = self.path.partition("?")[0]
        page = self.server.pages.get(path, _not_found(self.server.pages))()
        self.send_response(page.status)
        self.send_header("Content-Type", page.content_type)
        self.send_header("Content-Length", str(len(page.body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(page.body)
            self.wfile.flush()
            self.server.on_answer(path, self.client_address[0], began)

    do_HEAD = do_GET  # noqa: N815  (the name that http.server looks for)

    def log_message(self, *_: object) -> None:
        """Not a line for each request."""


def _cut_off(request: socket.socket) -> None:
    with suppress(OSError):  # it is closed already
        request.shutdown(socket.SHUT_RDWR)


def _not_found(pages: Mapping[str, Callable[[], Page]]) -> Callable[[], Page]:
    return lambda: text_page(404, f"there is only {', '.join(pages)}")
