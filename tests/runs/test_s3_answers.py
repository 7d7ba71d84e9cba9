"""The answers of S3 stores that are slow, cut, strange or refusals: each has a deadline and a true reason."""

import http.server
import logging
import os
import random
import re
import shutil
import ssl
import subprocess
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from mappo.errors import KeyMissing, KeyTaken, StoreError, StoreUnavailable, TooLarge
from mappo.runs import s3_client
from mappo.runs.attempt import claim
from mappo.runs.locations import open_store
from mappo.runs.run import Run
from mappo.runs.store import honours_conditions
from tests.support.fault_proxy import always, fault_proxy, first
from tests.support.services import use_s3

MEGABYTE = bytes(range(256)) * 4096
LONG = 30.0  # seconds of patience
CANARY = "canary-5f1d"


@pytest.fixture
def faulty(moto_endpoint, monkeypatch):
    """A proxy in front of moto, and the location of a store behind it."""
    bucket = use_s3(monkeypatch, moto_endpoint)
    with fault_proxy(moto_endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        yield proxy, f"s3://{bucket}/runs/a"


def keys(store):
    return [entry.key for entry in store.entries()]


def calls(store):
    """Return one call of each operation, all of which succeed in a store that works and holds `k`."""
    return {
        "read": lambda: store.read("k", 1 << 20),
        "write": lambda: store.write("written", b"1"),
        "create": lambda: store.create("created", b"1"),
        "list": store.entries,
        "delete": lambda: store.delete("none"),
    }


def error_of(call):
    """Return the error of a call, and the seconds that it took."""
    start = time.monotonic()
    with pytest.raises(StoreError) as raised:
        call()
    return raised.value, time.monotonic() - start


def text_of(error):
    """Return all that a traceback of this error prints."""
    return "".join(traceback.format_exception(error))


# Deadlines


def test_answer_that_drips_has_a_deadline_whatever_the_operation(faulty, monkeypatch):
    monkeypatch.setattr(s3_client, "_ANSWER_SECONDS", 1.0)
    proxy, location = faulty
    store = open_store(location, 0)
    store.write("k", b"12345678")
    proxy.rule = always("drip 0.05 1")  # a response has about 250 bytes, and no time-out between two of them
    with ThreadPoolExecutor() as threads:
        errors = list(threads.map(error_of, calls(store).values()))
    for error, seconds in errors:
        assert isinstance(error, StoreUnavailable)
        assert f"no usable answer from {proxy.endpoint} (from AWS_ENDPOINT_URL): not complete in 1 s" in (
            str(error)
        )
        assert 1 <= seconds < 4
    proxy.rule = always("")
    assert store.read("k", 8) == b"12345678"


def test_body_that_drips_is_read_again(faulty, monkeypatch):
    monkeypatch.setattr(s3_client, "_ANSWER_SECONDS", 1.0)
    proxy, location = faulty
    store = open_store(location, LONG)
    store.write("k", MEGABYTE)
    proxy.rule = first(1, "drip 0.05 300", "GET")  # the head comes at once, the body in three minutes
    assert store.read("k", 1 << 20) == MEGABYTE
    assert proxy.count("GET") == 2


def test_large_answer_may_take_longer_than_a_small_one(faulty, monkeypatch):
    monkeypatch.setattr(s3_client, "_ANSWER_SECONDS", 2.0)
    proxy, location = faulty
    store = open_store(location, 0)
    store.write("k", MEGABYTE)
    proxy.rule = always("drip 0.2 65536", "GET")  # 16 pieces
    start = time.monotonic()
    assert store.read("k", 1 << 20) == MEGABYTE
    assert time.monotonic() - start > 2.5


def test_store_that_does_not_read_an_upload_has_a_deadline(faulty, monkeypatch):
    monkeypatch.setattr(s3_client, "_ANSWER_SECONDS", 1.0)
    monkeypatch.setattr(s3_client, "_SILENCE_SECONDS", 1.0)
    proxy, location = faulty
    proxy.rule = always("unread")
    error, seconds = error_of(lambda: open_store(location, 0).write("k", MEGABYTE * 16))
    assert isinstance(error, StoreUnavailable)
    assert seconds < 5


def test_endless_answer_is_cut(faulty, monkeypatch):
    class Endless(http.server.BaseHTTPRequestHandler):
        def do_PUT(self):
            self.send_response(500)
            self.end_headers()
            while True:
                self.wfile.write(MEGABYTE)

        def log_message(self, *arguments):
            pass

    _, location = faulty
    with serve(Endless) as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        error, seconds = error_of(lambda: open_store(location, 0).write("k", b"1"))
    assert "it has more than 1048576 bytes" in str(error)
    assert seconds < 5


@contextmanager
def serve(handler, certificate=None):
    """Run an HTTP server with a handler on a free port; yield its endpoint."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    server.handle_error = lambda *_: None
    if certificate:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http{'s' * bool(certificate)}://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class Dripping(http.server.BaseHTTPRequestHandler):
    """A handler whose answer never ends, a byte at a time."""

    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", "1000000")
        self.end_headers()
        while True:
            self.wfile.write(b"1")
            time.sleep(0.05)

    def log_message(self, *arguments):
        pass


def test_encrypted_answers_have_a_deadline_and_errors_say_what_is_wrong(faulty, tmp_path, monkeypatch):
    if not shutil.which("openssl"):
        pytest.skip("openssl is not installed")
    monkeypatch.setattr(s3_client, "_ANSWER_SECONDS", 1.0)
    _, location = faulty
    certificate = tmp_path / "certificate.pem"
    request = "req -x509 -nodes -newkey ec -pkeyopt ec_paramgen_curve:P-256 -subj /CN=127.0.0.1 -days 2"
    command = ["openssl", *request.split(), "-addext", "subjectAltName=IP:127.0.0.1"]
    files = ["-keyout", str(tmp_path / "key"), "-out", str(certificate)]
    subprocess.run([*command, *files], check=True, capture_output=True)
    certificate.write_text(certificate.read_text() + (tmp_path / "key").read_text())
    with serve(Dripping, certificate) as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        error, _ = error_of(lambda: open_store(location, LONG).read("k", 1 << 20))
        assert "is not trusted; name the certificates of its authority in AWS_CA_BUNDLE" in str(error)
        monkeypatch.setenv("AWS_CA_BUNDLE", str(certificate))
        error, seconds = error_of(lambda: open_store(location, 0).read("k", 1 << 20))
        assert "not complete in 1 s" in str(error)
        assert 1 <= seconds < 4
    with serve(Dripping) as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint.replace("http", "https"))
        error, _ = error_of(lambda: open_store(location, 0).read("k", 1))
        assert isinstance(error, StoreUnavailable)
        assert f"no encrypted connection to {endpoint.replace('http', 'https')}" in str(error)


# Answers of another form


@pytest.mark.parametrize("fault", ["chunked", "no length"])
def test_answer_without_a_length_is_read_up_to_the_bound(faulty, fault):
    proxy, location = faulty
    store = open_store(location, LONG)
    for key, content in {"empty": b"", "k": MEGABYTE}.items():
        store.write(key, content)
    proxy.rule = always(fault)
    assert store.read("empty", 0) == b""
    assert store.read("k", len(MEGABYTE)) == MEGABYTE
    for max_bytes in (len(MEGABYTE) - 1, 1, 0):
        with pytest.raises(TooLarge, match=f"{location}/k: too many bytes, at most {max_bytes} are read"):
            store.read("k", max_bytes)
    assert keys(store) == ["empty", "k"]
    store.write("k", b"1")
    with pytest.raises(KeyTaken):
        store.create("k", b"2")


@pytest.mark.parametrize("body", ["empty", "cut"])
def test_404_without_a_reason_is_a_missing_key_only_if_a_listing_does_not_show_it(faulty, body):
    proxy, location = faulty
    store = open_store(location, LONG)
    store.write("k", b"1")
    store.write("k2", b"2")
    proxy.rule = lambda number, method, path: f"404 {body}" if method == "GET" and "list-type" not in path else ""
    with pytest.raises(KeyMissing, match=f"^{location}/none: the store has no such key"):
        store.read("none", 1)
    with pytest.raises(StoreUnavailable, match=f"^{location}/k: the store answered 404$"):
        open_store(location, 0).read("k", 1)
    proxy.rule = first(1, f"404 {body}", "GET")
    assert store.read("k", 1) == b"1"
    proxy.rule = first(1, f"404 {body}")
    assert keys(store) == ["k", "k2"]


def test_run_starts_in_a_store_whose_404_has_no_body(faulty):
    proxy, location = faulty
    proxy.rule = lambda number, method, path: "404 empty" if method == "GET" and "/latest.json" in path else ""
    assert Run.at(location, 1.0).refs() == []


@pytest.mark.parametrize("answer", ["200", "200 empty", "200 cut"])
def test_listing_that_is_not_a_listing_is_repeated(faulty, answer):
    proxy, location = faulty
    store = open_store(location, LONG)
    store.write("k", b"1")
    proxy.rule = first(1, answer)
    assert keys(store) == ["k"]
    proxy.rule = always(answer)
    with pytest.raises(StoreUnavailable):
        open_store(location, 0).entries()


@pytest.mark.parametrize(
    "headers",
    [{"Content-Length": "abc"}, {"Content-Length": "-5"}, {"Last-Modified": "abc"}, {"x-amz-missing-meta": "abc"}],
)
def test_garbled_length_is_an_error_and_other_headers_decide_nothing(faulty, headers, monkeypatch):
    class Garbled(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()

        def log_message(self, *arguments):
            pass

    _, location = faulty
    with serve(Garbled) as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        store = open_store(location, 0)
        if "Content-Length" in headers:
            with pytest.raises(StoreUnavailable, match=f"no usable answer from {endpoint}"):
                store.read("k", 1)
        else:
            assert store.read("k", 1) == b""


# Refusals


def test_store_that_does_not_implement_conditions_is_used_without_them(faulty, caplog):
    proxy, location = faulty
    proxy.rule = always("refuse condition")
    store = open_store(location, LONG)
    assert not honours_conditions(store, "attempts/")
    assert keys(store) == []
    store.create("k", b"1")
    assert store.read("k", 1) == b"1"
    assert proxy.count("PUT") == 4  # the first one was refused
    with caplog.at_level(logging.WARNING):
        assert [claim(Run.at(location)).number for _ in range(2)] == [1, 2]
    assert "ignores conditional writes" in caplog.text


@pytest.mark.parametrize("answer", ["501 NotImplemented", "501", "501 empty"])
def test_request_that_is_not_implemented_is_an_error_at_once(faulty, answer):
    proxy, location = faulty
    proxy.rule = always(answer)
    for call in (lambda: open_store(location, LONG).write("k", b"1"), open_store(location, LONG).entries):
        error, seconds = error_of(call)
        assert f"the store answered {answer.removesuffix(' empty')}: {proxy.endpoint}" in str(error)
        assert "does not implement this request" in str(error)
        assert seconds < 5
    assert len(proxy.requests) == 2


@pytest.mark.parametrize(
    "answer",
    ["403 QuotaExceeded", "400 XMinioAdminBucketQuotaExceeded", "507 XMinioStorageFull", "507"],
)
def test_quota_is_named_as_the_cause(faulty, answer):
    proxy, location = faulty
    proxy.rule = always(answer)
    error, _ = error_of(lambda: open_store(location, LONG).write("k", b"1"))
    assert f"{location}/k: the store answered {answer}: the quota of {proxy.endpoint}" in str(error)
    assert "credentials" not in str(error)
    assert proxy.count("PUT") == 1


@pytest.mark.parametrize(
    "answer",
    [
        *("301 PermanentRedirect", "301 empty", "307 TemporaryRedirect", "302"),
        *("400 AuthorizationHeaderMalformed", "400 IllegalLocationConstraintException"),
    ],
)
def test_wrong_region_is_named_as_the_cause(faulty, answer):
    proxy, location = faulty
    proxy.rule = always(answer)
    error, _ = error_of(lambda: open_store(location, LONG).write("k", b"1"))
    assert "is in another region than us-east-1, or not at http" in str(error)
    assert "correct AWS_DEFAULT_REGION" in str(error)
    assert not isinstance(error, StoreUnavailable)


def test_region_that_the_store_names_is_used(faulty, monkeypatch):
    """A store that names its region in the refusal, as Amazon and MinIO do: boto3 signs for it and sends again."""
    body = (
        b"<?xml version='1.0'?><Error><Code>AuthorizationHeaderMalformed</Code><Message>The region is wrong"
        b"</Message><Region>eu-north-7</Region></Error>"
    )

    class Strict(http.server.BaseHTTPRequestHandler):
        is_lenient = True

        def do_PUT(self):
            is_right = self.is_lenient and "/eu-north-7/s3/" in self.headers["Authorization"]
            self.send_response(200 if is_right else 400)
            self.send_header("Content-Length", "0" if is_right else str(len(body)))
            self.end_headers()
            self.wfile.write(b"" if is_right else body)

        def log_message(self, *arguments):
            pass

    _, location = faulty
    with serve(Strict) as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        open_store(location, 0).write("k", b"1")
        monkeypatch.setattr(Strict, "is_lenient", False)
        error, _ = error_of(lambda: open_store(location, LONG).write("k", b"1"))
    assert "400 AuthorizationHeaderMalformed: the bucket" in str(error)
    assert "is in another region, eu-north-7, than us-east-1" in str(error)


def test_deletion_of_a_key_that_is_missing_succeeds_in_every_store(faulty):
    proxy, location = faulty
    proxy.rule = always("404 NoSuchKey", "DELETE")
    open_store(location, LONG).delete("none")
    assert proxy.count("DELETE") == 1


def test_wrong_clock_is_named_as_the_cause(faulty):
    proxy, location = faulty
    proxy.rule = always("403 RequestTimeTooSkewed")
    error, _ = error_of(lambda: open_store(location, LONG).write("k", b"1"))
    assert "the clocks of this machine and" in str(error)


def test_refused_deletion_does_not_stop_the_start_of_a_run(faulty, caplog):
    proxy, location = faulty
    proxy.rule = always("403 AccessDenied", "DELETE")
    with caplog.at_level(logging.WARNING):
        assert claim(Run.at(location)).number == 1
    assert "the test of conditional writes could not be deleted" in caplog.text


def test_retries_are_paced_and_logged_once(faulty, caplog):
    proxy, location = faulty
    proxy.rule = always("503 SlowDown")
    with pytest.raises(StoreUnavailable), caplog.at_level(logging.WARNING):
        open_store(location, 4.0).entries()
    assert 4 <= len(proxy.requests) <= 7  # after 0, 0.2, 0.6, 1.4, 3 and 6.2 s
    (record,) = caplog.records
    assert "the store answered 503 SlowDown; trying again for" in record.message


# Settings and secrets


@pytest.mark.parametrize(
    "name",
    ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL"],
)
@pytest.mark.parametrize("end", ["\n", "\r\n", " ", "\t", "\x01", "\x7f", "\u200b", "\udcff"])
def test_character_that_no_setting_has_is_refused_at_once(faulty, monkeypatch, caplog, name, end):
    proxy, location = faulty
    monkeypatch.setitem(os.environ, name, f"http://{CANARY}{end}")
    error, seconds = error_of(lambda: open_store(location, LONG).write("k", b"1"))
    assert re.match(
        f"{name} contains (a line end|a space at an end|a character that cannot be printed)", str(error)
    )
    assert CANARY not in text_of(error) + caplog.text
    assert len(str(error).splitlines()) == 1
    assert not isinstance(error, StoreUnavailable)
    assert seconds < 5
    assert proxy.requests == []


@pytest.mark.parametrize(
    "name", ["MAPPO_KUBEFLOW_ACCESS_KEY", "MAPPO_KUBEFLOW_SECRET_KEY", "MAPPO_MINIO_ENDPOINT"]
)
def test_setting_of_kubeflows_store_with_a_line_end_is_refused_at_once(faulty, monkeypatch, name):
    _, location = faulty
    settings = {
        "MAPPO_KUBEFLOW_ACCESS_KEY": "k",
        "MAPPO_KUBEFLOW_SECRET_KEY": "s",
        "MAPPO_MINIO_ENDPOINT": "http://h",
    }
    for variable, value in settings.items():
        monkeypatch.setenv(variable, f"{CANARY}\n" if variable == name else value)
    error, _ = error_of(lambda: open_store(location.replace("s3:", "minio:"), LONG).write("k", b"1"))
    assert str(error).startswith(f"{name} contains a line end")
    assert CANARY not in text_of(error)


@pytest.mark.parametrize("field", ["aws_access_key_id", "aws_secret_access_key", "aws_session_token"])
@pytest.mark.parametrize("value", [f"{CANARY}\x01", f"{CANARY}\n  {CANARY}", f"{CANARY}\u200b"])
def test_credentials_file_with_a_character_that_no_key_has_is_refused_at_once(
    faulty, monkeypatch, tmp_path, field, value
):
    _, location = faulty
    fields = {"aws_access_key_id": "a", "aws_secret_access_key": "b", "aws_session_token": "c"} | {field: value}
    file = tmp_path / "credentials"
    file.write_text("[default]\n" + "".join(f"{name} = {value}\n" for name, value in fields.items()))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    error, seconds = error_of(lambda: open_store(location, LONG).write("k", b"1"))
    assert CANARY not in text_of(error)
    assert not isinstance(error, StoreUnavailable)
    assert seconds < 5


@pytest.mark.parametrize(
    "output", ["not JSON {secret}", '{{"Version": 1}}', '{{"Version": 1, "AccessKeyId": "{secret}\\n"}}']
)
def test_program_of_credentials_that_fails_shows_no_secret(faulty, monkeypatch, tmp_path, caplog, output):
    _, location = faulty
    script = tmp_path / "program"
    script.write_text(f"#!/bin/sh\necho '{output.format(secret=CANARY)}'\necho {CANARY} >&2\nexit 0\n")
    script.chmod(0o755)
    (tmp_path / "config").write_text(f"[default]\ncredential_process = {script}\n")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    error, _ = error_of(lambda: open_store(location, 0).write("k", b"1"))
    assert "no credentials: their source failed with" in str(error)
    assert CANARY not in text_of(error) + caplog.text


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("AWS_DEFAULT_REGION", "Not a region", "the region is not a name of a region; correct AWS_DEFAULT_REGION"),
        ("AWS_DEFAULT_REGION", "über", "AWS_DEFAULT_REGION contains a letter beyond ASCII"),
        ("AWS_ACCESS_KEY_ID", f"{CANARY}\u2013", "AWS_ACCESS_KEY_ID contains a letter beyond ASCII"),
        ("AWS_RETRY_MODE", "abc", 'Invalid value provided to "mode": "abc"'),
        ("HTTP_PROXY", f"http://{CANARY} x:y@[::", "no request can be sent to http://127.0.0.1"),
        ("HTTP_PROXY", f"http://me:{CANARY}@127.0.0.1:1", "ProxyConnectionError"),
    ],
)
def test_unusable_setting_is_an_error_without_secrets(faulty, monkeypatch, name, value, message):
    _, location = faulty
    monkeypatch.setenv(name, value)
    if name == "HTTP_PROXY":
        monkeypatch.delenv("NO_PROXY")
        monkeypatch.delenv("no_proxy", raising=False)
    error, _ = error_of(lambda: open_store(location, 0).write("k", b"1"))
    assert message in str(error)
    assert CANARY not in text_of(error)


@pytest.mark.parametrize("endpoint", ["http://[::1", "http://host:9000\t", "ftp://host", "http://ho st"])
def test_endpoint_that_is_not_a_url_is_an_error_for_kubeflows_store_too(faulty, monkeypatch, endpoint):
    _, location = faulty
    for name in ("ACCESS_KEY", "SECRET_KEY"):
        monkeypatch.setenv(f"MAPPO_KUBEFLOW_{name}", "k")
    monkeypatch.setenv("MAPPO_MINIO_ENDPOINT", endpoint)
    error, _ = error_of(lambda: open_store(location.replace("s3:", "minio:"), LONG).entries())
    assert "MAPPO_MINIO_ENDPOINT" in str(error)
    assert not isinstance(error, StoreUnavailable)


# Garbage


def garbage(rng):
    """Return an HTTP answer that is nearly one of an S3 store."""
    listing = (
        b"<ListBucketResult><IsTruncated>false</IsTruncated><Contents><Key>runs/a/k</Key><Size>1</Size></Contents>"
    )
    bodies = [
        *(
            b"",
            b"1",
            b"{",
            b"<",
            b"<a/>",
            b"<html><body>x<br></body></html>",
            b"<Error/>",
            b"<a><Error>x</Error></a>",
        ),
        *(b"<Error><Code>NoSuchKey</Code></Error>", b"<Error><Code><a/><b/></Code></Error>", b"<Error>x</Error>"),
        *(listing + b"</ListBucketResult>", listing, b"<a>" * 3000 + b"</a>" * 3000, bytes(range(256))),
        b"<ListBucketResult><IsTruncated>true</IsTruncated></ListBucketResult>",
        b"<ListBucketResult><IsTruncated>x</IsTruncated><Contents><Size>x</Size></Contents></ListBucketResult>",
    ]
    body = rng.choice(bodies)
    headers = [
        *("", "", f"Content-Length: {len(body)}", f"Content-Length: {len(body) + 9}", "Content-Length: x"),
        *("Transfer-Encoding: chunked", "Content-Encoding: gzip", "Last-Modified: x", "x-amz-bucket-region: ?"),
        *(
            "Content-Type: text/html",
            "x-amz-checksum-crc32: ?",
            "Location: http://127.0.0.1:1/",
            ": ",
            "\xff: \xff",
        ),
    ]
    first_lines = [
        f"HTTP/1.1 {status} x" for status in (100, 200, 200, 200, 204, 206, 301, 400, 404, 412, 416, 500)
    ]
    first_lines += ["HTTP/1.1 x", "HTTP/9.9 200 x", "", "x", "HTTP/1.1 200"]
    lines = [rng.choice(first_lines), *(rng.choice(headers) for _ in range(rng.randrange(4)))]
    return "\r\n".join(line for line in lines if line).encode("latin-1") + b"\r\n\r\n" + body


@pytest.mark.parametrize(("seed", "num_rounds"), [(7, 30), pytest.param(8, 2000, marks=pytest.mark.long)])
def test_answer_of_garbage_is_an_error_or_an_answer_but_never_another_exception(
    faulty, monkeypatch, seed, num_rounds
):
    rng = random.Random(seed)

    class Random(http.server.BaseHTTPRequestHandler):
        def answer(self):
            self.wfile.write(garbage(rng))
            self.close_connection = True

        def __getattr__(self, name):
            if name.startswith("do_"):
                return self.answer
            raise AttributeError(name)

        def log_message(self, *arguments):
            pass

    _, location = faulty
    outcomes = []
    with serve(Random) as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        store = open_store(location, 0)
        for _ in range(num_rounds):
            for call in calls(store).values():
                try:
                    call()
                except StoreError as error:
                    outcomes.append(error)
                else:
                    outcomes.append(None)
    assert all(len(str(outcome).splitlines()) == 1 for outcome in outcomes)
    outcomes = [outcome and type(outcome) for outcome in outcomes]
    assert {None, StoreUnavailable, StoreError, KeyMissing} <= set(outcomes)
