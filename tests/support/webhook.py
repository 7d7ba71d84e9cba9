"""A webhook's server, which records what it gets."""

import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Request:
    path: str
    headers: Message
    body: bytes


@dataclass
class Receiver:
    """The requests so far, and the next answers: status and headers; then `status`."""

    url: str
    requests: list[Request] = field(default_factory=list)
    status: int = 200
    answers: list[tuple[int, dict[str, str]]] = field(default_factory=list)


@contextmanager
def receiver(context: ssl.SSLContext | None = None) -> Iterator[Receiver]:
    """Run a server until the block ends; with a context, it speaks TLS."""
    record = Receiver("")

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.do_POST()

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            record.requests.append(Request(self.path, self.headers, body))
            status, headers = record.answers.pop(0) if record.answers else (record.status, {})
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(bytes(self.headers))  # what a client prints of an answer holds its secrets

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.handle_error = lambda *_: None
    if context:
        server.socket = context.wrap_socket(server.socket, server_side=True)
    record.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield record
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
