"""An HTTP/1.1 proxy in front of a real S3 server, with the faults of networks and stores.

A rule returns the fault of each request. An empty string forwards the request unchanged. The faults are:

    503 SlowDown        respond with this status and S3 error code; without a code, with a page of HTML;
                        with `empty` as the code, without a body; with `cut` as the code, with half of the XML
    delay 0.5           forward the request after 0.5 seconds
    drip 0.1 16         send 16 bytes of the response every 0.1 seconds, from its first line on
    hold                forward the request after `released` is set
    unread              do not read the request's body until `released` is set
    reset early         reset the connection before the body is read
    reset middle        reset the connection in the middle of the body
    lose reply          forward the request, then reset the connection: the client gets no response
    truncate            forward only half of the response's body
    chunked             forward the response in chunks, without Content-Length
    no length           forward the response without Content-Length, and close the connection
    corrupt             flip a bit in the response's body
    corrupt upload      flip a bit in the request's body
    drop condition      forward without If-None-Match; a store that checks signatures refuses the request
    refuse condition    respond with 501 NotImplemented to requests with If-None-Match
"""

import http.client
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

Rule = Callable[[int, str, str], str]  # number of the request from 1 on, method, path -> fault
_HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length"}


def always(action: str, method: str = "") -> Rule:
    """Return a rule that applies to all requests, or to all requests of one method."""
    return lambda number, its_method, path: action if method in ("", its_method) else ""


def first(count: int, action: str, method: str = "") -> Rule:
    """Return a rule that applies to the first requests, or to the first requests of one method."""
    matching: list[int] = []

    def rule(number: int, its_method: str, path: str) -> str:
        if method in ("", its_method):
            matching.append(number)
            return action if len(matching) <= count else ""
        return ""

    return rule


class FaultProxy(ThreadingHTTPServer):
    """The proxy that this module describes. A test may replace `rule` at any time."""

    daemon_threads = True

    def __init__(self, upstream: str, rule: Rule):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream = urlsplit(upstream).netloc
        self.rule = rule
        self.requests: list[tuple[str, str]] = []  # method, path
        self.held, self.released = threading.Event(), threading.Event()
        self.connections: set[socket.socket] = set()
        self.lock = threading.Lock()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def count(self, method: str) -> int:
        """Return the number of requests with this method."""
        return sum(its_method == method for its_method, _ in self.requests)

    def handle_error(self, request, client_address):
        """Ignore clients that close their connection, which the faults provoke."""


@contextmanager
def fault_proxy(upstream: str, rule: Rule = lambda *_: "") -> Iterator[FaultProxy]:
    """Run a proxy on a free port in front of the server at an endpoint; close all its connections at the end."""
    proxy = FaultProxy(upstream, rule)
    thread = threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield proxy
    finally:
        proxy.released.set()
        proxy.shutdown()
        thread.join()
        proxy.server_close()
        with proxy.lock:
            for connection in proxy.connections:
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: FaultProxy

    def setup(self):
        super().setup()
        with self.server.lock:
            self.server.connections.add(self.connection)

    def finish(self):
        with self.server.lock:
            self.server.connections.discard(self.connection)
        super().finish()

    def answer(self):
        with self.server.lock:
            self.server.requests.append((self.command, self.path))
            action = self.server.rule(len(self.server.requests), self.command, self.path)
        length = int(self.headers.get("Content-Length", 0))
        if action == "reset early":
            return self._reset()
        if action == "unread":
            self.server.released.wait()
            return self._reset()
        body = self.rfile.read(length // 2 if action == "reset middle" else length)
        if action == "reset middle":
            return self._reset()
        if action == "refuse condition":
            action = "501 NotImplemented" if "If-None-Match" in self.headers else ""
        if action[:3].isdecimal():
            return self._refuse(int(action[:3]), action[4:])
        if action.startswith("drip "):
            _, seconds, num_bytes = action.split()
            self.wfile = _Drip(self.wfile, float(seconds), int(num_bytes))
            self.close_connection = True
        if action.startswith("delay "):
            time.sleep(float(action.removeprefix("delay ")))
        if action == "hold":
            self.server.held.set()
            self.server.released.wait()
        if action == "corrupt upload":
            body = _flipped(body)
        try:
            status, headers, content = self._forward(body, "if-none-match" if action == "drop condition" else "")
        except (OSError, http.client.HTTPException):
            return self._reset()
        if action == "lose reply":
            return self._reset()
        return self._send(status, headers, _flipped(content) if action == "corrupt" else content, action)

    def __getattr__(self, name):
        if name.startswith("do_"):
            return self.answer
        raise AttributeError(name)

    def _forward(self, body: bytes, dropped_header: str) -> tuple[int, list[tuple[str, str]], bytes]:
        dropped = ("expect", dropped_header)
        headers = {name: value for name, value in self.headers.items() if name.lower() not in dropped}
        upstream = http.client.HTTPConnection(self.server.upstream, timeout=60)
        try:
            upstream.request(self.command, self.path, body, headers)  # keeps the Host header, which is signed
            response = upstream.getresponse()
            return response.status, response.getheaders(), response.read()
        finally:
            upstream.close()

    def _send(self, status: int, headers: list[tuple[str, str]], content: bytes, action: str = "") -> None:
        self.send_response_only(status)
        lengths = [value for name, value in headers if name.lower() == "content-length"]
        for name, value in headers:
            if name.lower() not in _HOP_BY_HOP:
                self.send_header(name, value)
        if action == "chunked":
            self.send_header("Transfer-Encoding", "chunked")
        elif action == "no length":
            self.close_connection = True
        elif status not in (204, 304):
            self.send_header("Content-Length", lengths[0] if lengths else str(len(content)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if action == "truncate":
            content = content[: len(content) // 2]
            self.close_connection = True
        if action == "chunked":
            content = b"%x\r\n%s\r\n0\r\n\r\n" % (len(content), content) if content else b"0\r\n\r\n"
        self.wfile.write(content)

    def _refuse(self, status: int, code: str) -> None:
        if code:
            content = f'<?xml version="1.0"?><Error><Code>{code}</Code><Message>{code}</Message></Error>'
        else:
            content = "<html><body><h1>A load balancer<br></h1></body></html>"
        content = content[: {"empty": 0, "cut": len(content) // 2}.get(code, len(content))]
        headers = [] if code == "empty" else [("Content-Type", "application/xml" if code else "text/html")]
        self._send(status, headers, content.encode())

    def _reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        self.connection.close()
        self.close_connection = True

    def log_message(self, format, *args):
        pass


class _Drip:
    """A file that writes a few bytes at a time."""

    def __init__(self, file, seconds: float, num_bytes: int):
        self._file, self._seconds, self._num_bytes = file, seconds, num_bytes

    def write(self, content: bytes) -> int:
        for start in range(0, len(content), self._num_bytes):
            self._file.write(content[start : start + self._num_bytes])
            time.sleep(self._seconds)
        return len(content)

    def __getattr__(self, name):
        return getattr(self._file, name)


def _flipped(content: bytes) -> bytes:
    return bytes([content[0] ^ 1]) + content[1:] if content else content
