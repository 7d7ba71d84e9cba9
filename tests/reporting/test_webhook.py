"""The messages as a real HTTP server receives them, and webhooks that are dead, slow or hostile."""

import json
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import pytest

from mappo.errors import ConfigError
from mappo.reporting.notification import Message, headlines
from mappo.reporting.webhook import Webhook
from tests.support.webhook import receiver

SECRET = "canary-7d1e"
MESSAGE = Message(
    "run first",
    "failed",
    "train: loss <nan> & worse",
    {"mean return, trained": "0.5 [0.4, 0.6]"},
    {"Kubeflow": "https://kubeflow.example.org/#/runs/details/1", "run": "s3://bucket/runs/first"},
)


def webhook(url: str, kind: str = "") -> Webhook:
    found = Webhook.from_environment({"MAPPO_NOTIFY_URL": url, "MAPPO_NOTIFY_FORMAT": kind})
    assert found
    return found


def post(url: str, seconds: float = 5.0) -> str:
    """Post a message; require that it takes little longer than it may, and that no text holds the secret."""
    start = time.monotonic()
    reason = webhook(url).post({"text": "a"}, seconds)
    assert time.monotonic() - start < seconds + 1
    assert SECRET not in reason + repr(webhook(url))
    return reason


def test_message_has_the_form_that_slack_documents():
    text = MESSAGE.body(webhook(f"https://hooks.slack.com/services/{SECRET}"))["text"]
    assert text.split("\n") == [
        "*mappo: run first failed*",
        "train: loss &lt;nan&gt; &amp; worse",
        "mean return, trained: 0.5 [0.4, 0.6]",
        "<https://kubeflow.example.org/#/runs/details/1|Kubeflow>",
        "run: s3://bucket/runs/first",
    ]


def test_message_for_teams_is_an_adaptive_card():
    body = MESSAGE.body(webhook(f"https://prod-1.westeurope.logic.azure.com/workflows/{SECRET}"))
    (attachment,) = body["attachments"]
    assert (body["type"], attachment["contentType"]) == ("message", "application/vnd.microsoft.card.adaptive")
    card = attachment["content"]
    assert [block["type"] for block in card["body"]] == ["TextBlock"] * 4
    assert [block["text"] for block in card["body"]][:2] == [
        "mappo: run first failed",
        "train: loss <nan> & worse",
    ]
    assert card["actions"] == [
        {"type": "Action.OpenUrl", "title": "Kubeflow", "url": "https://kubeflow.example.org/#/runs/details/1"}
    ]


def test_other_webhooks_receive_each_part_of_the_message():
    with receiver() as server:
        assert not webhook(f"{server.url}/{SECRET}").post(MESSAGE.body(webhook(server.url)))
        (request,) = server.requests
    assert (request.path, request.headers["Content-Type"]) == (f"/{SECRET}", "application/json")
    body = json.loads(request.body)
    assert body["subject"] == "run first"
    assert body["outcome"] == "failed"
    assert body["results"] == {"mean return, trained": "0.5 [0.4, 0.6]"}
    assert body["links"]["run"] == "s3://bucket/runs/first"
    assert body["text"].startswith("mappo: run first failed\ntrain: loss <nan>")


def test_format_can_be_chosen_for_any_host():
    assert "attachments" in MESSAGE.body(webhook("https://chat.example.org/x", "teams"))
    with pytest.raises(ConfigError, match="MAPPO_NOTIFY_FORMAT: must be slack, teams, json"):
        webhook("https://chat.example.org/x", SECRET)


@pytest.mark.parametrize(
    "url",
    ["x", "ftp://host/a", "https://", "https://user:a@host/b", "https://host:0/", "https://h ost/", "http://[::"],
)
def test_url_that_is_none_is_refused_without_being_shown(url):
    with pytest.raises(ConfigError, match="MAPPO_NOTIFY_URL: must be the URL of a webhook") as error:
        webhook(url.replace("a", SECRET))
    assert SECRET not in str(error.value)


def test_server_that_fails_for_a_moment_gets_the_message():
    with receiver() as server:
        server.answers = [(503, {}), (200, {})]
        assert post(f"{server.url}/{SECRET}", 10.0) == ""
        assert len(server.requests) == 2


@pytest.mark.parametrize("status", [400, 403, 404, 410])
def test_refusal_is_final(status):
    with receiver() as server:
        server.answers = [(status, {}), (200, {})]
        assert post(f"{server.url}/{SECRET}") == f"it answered {status}"
        assert len(server.requests) == 1


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirect_is_refused_so_that_no_other_host_gets_the_message(status):
    with receiver() as other, receiver() as server:
        server.answers = [(status, {"Location": f"{other.url}/{SECRET}"})]
        assert post(f"{server.url}/{SECRET}") == "it redirects to another address, which gets no message"
        assert other.requests == []


@contextmanager
def raw_server(answer: Callable[[socket.socket], None]) -> Iterator[str]:
    """Run a server that accepts connections and does what `answer` says with each."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=attempt, args=(connection,), daemon=True).start()

    def attempt(connection: socket.socket) -> None:
        with connection, suppress(OSError):
            answer(connection)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/{SECRET}"
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()


def drip(connection: socket.socket) -> None:
    connection.recv(1000)
    for byte in b"HTTP/1.1 200 OK\r\nX: " + b"a" * 10_000:
        connection.send(bytes([byte]))
        time.sleep(0.05)


def flood(connection: socket.socket) -> None:
    connection.recv(1000)
    connection.send(b"HTTP/1.1 200 OK\r\n\r\n")
    while True:
        connection.send(b"a" * 100_000)


def say_nothing(connection: socket.socket) -> None:
    connection.recv(1000)
    time.sleep(10)


def answer_nonsense(connection: socket.socket) -> None:
    connection.recv(1000)
    connection.send(b"220 smtp " + SECRET.encode() + b"\r\n")


def hang_up(connection: socket.socket) -> None:
    connection.recv(1000)


def test_dripping_webhook_ends_at_the_deadline():
    with raw_server(drip) as url:
        assert post(url, 1.0) == "it did not answer within 1 s"


def test_silent_webhook_ends_at_the_deadline():
    with raw_server(say_nothing) as url:
        assert post(url, 1.0) == "it did not answer within 1 s"


def test_huge_answer_is_not_read():
    with raw_server(flood) as url:
        assert post(url, 5.0) == ""


def test_nonsense_is_no_answer():
    with raw_server(answer_nonsense) as url:
        assert post(url).startswith("its answer cannot be read")


def test_connection_that_is_closed_is_retried_until_the_deadline():
    with raw_server(hang_up) as url:
        assert post(url, 2.0)


def test_dead_webhook_is_a_reason():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    assert post(f"http://127.0.0.1:{port}/{SECRET}", 2.0) == "it cannot be reached (ConnectionRefusedError)"


def test_untrusted_certificate_is_refused(tmp_path):
    names = [str(tmp_path / name) for name in ("key.pem", "certificate.pem")]
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    command += ["-keyout", names[0], "-out", names[1], "-days", "1", "-subj", "/CN=localhost"]
    subprocess.run(command, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(names[1], names[0])
    with receiver(context) as server:
        url = f"{server.url.replace('http:', 'https:')}/{SECRET}"
        assert post(url).startswith("its certificate is not valid")
        assert server.requests == []


def test_headlines_show_intervals_and_measurements_in_order_of_importance():
    metrics = {
        "training_frames": 60_000.0,
        "trained_return_mean": 0.98765,
        "trained_return_mean_low": 0.9,
        "trained_return_mean_high": 1.1,
        "trained_measured_collisions": 2.5,
        "loss_critic": 1.0,
    }
    assert headlines(metrics) == {
        "mean return, trained": "0.9877 [0.9, 1.1]",
        "frames of training": "60,000",
        "collisions, trained": "2.5",
    }
