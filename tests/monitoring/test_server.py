import socket
import socketserver
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import suppress

import pytest

from mappo.monitoring.server import MetricsServer, Page, text_page
from tests.support.services import wait


@pytest.fixture
def server() -> Iterator[MetricsServer]:
    pages = {
        "/metrics": lambda: Page(200, "text/plain", b"one 1\n"),
        "/healthz": lambda: text_page(503, "unhealthy"),
    }
    server = MetricsServer(0, pages)
    yield server
    server.close()


def test_a_page_is_served_with_its_status_and_type(server):
    with _get(server, "/metrics?any=thing") as answer:
        assert (answer.status, answer.headers["Content-Type"], answer.read()) == (200, "text/plain", b"one 1\n")
    with pytest.raises(urllib.error.HTTPError, match="503") as error:
        _get(server, "/healthz")
    assert error.value.read() == b"unhealthy\n"


def test_an_unknown_path_is_not_found_and_the_answer_names_the_known_paths(server):
    with pytest.raises(urllib.error.HTTPError, match="404") as error:
        _get(server, "/metrics/../etc")
    assert error.value.read() == b"not found; the pages are /metrics, /healthz\n"


def test_waiting_ends_only_after_an_answer_to_a_later_request(server):
    _get(server, "/metrics").close()
    since = time.monotonic()
    assert not server.wait_for_clients("/metrics", since, set(), 0.1)
    threading.Timer(0.2, lambda: _get(server, "/metrics").close()).start()
    assert server.wait_for_clients("/metrics", since, set(), 30)


def test_waiting_ends_after_both_clients_have_sent_another_request(server):
    """A Prometheus may run as two replicas; the second one scrapes some seconds after the first."""
    first, second = "127.0.0.1", "127.0.0.2"
    for client in (first, second):
        _get_from(server, client)
    clients = server.clients("/metrics", 0)
    assert len(clients) == 2
    since = time.monotonic()
    _get_from(server, first)
    assert not server.wait_for_clients("/metrics", since, clients, 0.2)
    _get_from(server, second)
    assert server.wait_for_clients("/metrics", since, clients, 30)


def test_a_taken_port_raises_an_error(server):
    with pytest.raises(OSError, match="in use"):
        MetricsServer(server.port, {})


def test_a_closed_server_frees_its_port():
    first = MetricsServer(0, {})
    first.close()
    MetricsServer(first.port, {}).close()


def test_many_requests_are_answered_at_a_bounded_rate(server):
    """Check that clients without pauses get a burst of answers and then a few per second, not thousands."""
    answers, stop = [], time.monotonic() + 1

    def send_requests() -> None:
        while time.monotonic() < stop:
            try:
                _get(server, "/metrics").close()
                answers.append(1)
            except OSError:  # the server closed the connection
                pass

    clients = [threading.Thread(target=send_requests) for _ in range(4)]
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    assert 5 < len(answers) < 50


@pytest.fixture
def _impatient(monkeypatch):
    """Let clients have one second to send their request, in place of five."""
    monkeypatch.setattr("mappo.monitoring.server._CLIENT_SECONDS", 1.0)


@pytest.mark.usefixtures("_impatient")
def test_silent_clients_do_not_block_other_clients(server):
    """The test opens more connections than the server has threads, and never sends a request."""
    silent = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(10)]
    try:
        wait(lambda: _is_answered(server), 30, "no answer")
    finally:
        for connection in silent:
            connection.close()


@pytest.mark.usefixtures("_impatient")
def test_clients_that_send_one_byte_at_a_time_do_not_block_other_clients(server):
    stop = threading.Event()
    slow = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(4)]

    def drip() -> None:
        while not stop.wait(0.2):
            for connection in slow:
                with suppress(OSError):
                    connection.send(b"G")

    threading.Thread(target=drip, daemon=True).start()
    try:
        wait(lambda: _is_answered(server), 30, "no answer")
    finally:
        stop.set()
        for connection in slow:
            connection.close()


def test_the_server_answers_again_after_threads_could_not_start(server, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(socketserver.ThreadingMixIn, "process_request", _no_thread)
        for _ in range(6):
            assert not _is_answered(server)
    assert _is_answered(server)


def test_a_page_that_raises_closes_its_connection_but_not_the_server():
    def broken() -> Page:
        raise RuntimeError("a defect")

    server = MetricsServer(0, {"/broken": broken, "/": lambda: text_page(200, "fine")})
    try:
        with pytest.raises(OSError, match="closed|reset"):
            _get(server, "/broken")
        assert _get(server, "/").read() == b"fine\n"
    finally:
        server.close()


def _get(server: MetricsServer, path: str):
    return urllib.request.urlopen(f"http://127.0.0.1:{server.port}{path}", timeout=20)


def _get_from(server: MetricsServer, client: str) -> None:
    with socket.create_connection(("127.0.0.1", server.port), source_address=(client, 0)) as connection:
        connection.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        while connection.recv(4096):
            pass


def _no_thread(*_: object) -> None:
    raise RuntimeError("can't start new thread")


def _is_answered(server: MetricsServer) -> bool:
    try:
        return _get(server, "/metrics").status == 200
    except OSError:
        return False
