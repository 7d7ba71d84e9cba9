import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml

from mappo.errors import KeyMissing, KeyTaken, StoreError, StoreUnavailable
from mappo.runs.directory_store import DirectoryStore
from mappo.runs.locations import open_store
from mappo.runs.s3_access import s3_access
from mappo.runs.store import honours_conditions
from tests.support.fault_proxy import always, fault_proxy, first
from tests.support.services import ACCESS_KEY, SECRET_KEY, file_system_of, free_ports, s3_client, use_s3

MEGABYTE = random.Random(1).randbytes(1 << 20)
LONG, SHORT = 30.0, 1.0  # seconds of patience


@pytest.fixture(params=["directory", "moto", "rgw"])
def store(request, tmp_path, monkeypatch):
    """An empty store of each kind: a directory, moto and Ceph RGW."""
    if request.param == "directory":
        return open_store(str(tmp_path / "not" / "there" / "yet"))
    bucket = use_s3(monkeypatch, request.getfixturevalue(f"{request.param}_endpoint"))
    return open_store(f"s3://{bucket}/runs/a", LONG)


@pytest.fixture(params=["moto", "rgw"])
def faulty(request, monkeypatch):
    """A proxy in front of a real server, and the location of a store behind it."""
    endpoint = request.getfixturevalue(f"{request.param}_endpoint")
    bucket = use_s3(monkeypatch, endpoint)
    with fault_proxy(endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        yield proxy, f"s3://{bucket}/runs/a"


def on(*servers):
    return pytest.mark.parametrize("faulty", servers, indirect=True)


@pytest.fixture
def small_disk(tmp_path):
    with file_system_of(256, tmp_path / "disk") as directory:
        yield directory


def keys(store, prefix=""):
    return [entry.key for entry in store.entries(prefix)]


def outcome(call, *arguments):
    """Return the result of a call, or the class of the error that it raises."""
    try:
        return call(*arguments)
    except StoreError as error:
        return type(error)


class Model:
    """A `Store` in a dict, with which the real stores are compared."""

    def __init__(self):
        self.content = {}

    def read(self, key, max_bytes):
        if key not in self.content:
            raise KeyMissing(key)
        if len(self.content[key]) > max_bytes:
            raise StoreError(key)
        return self.content[key]

    def write(self, key, content):
        self.content[key] = content

    def create(self, key, content):
        if self.content.setdefault(key, content) != content:
            raise KeyTaken(key)

    def delete(self, key):
        self.content.pop(key, None)


def test_stores_behave_like_a_dict(store):
    model, rng = Model(), random.Random(3)
    for _ in range(40):
        name = rng.choice(["read", "write", "create", "create", "delete"])
        arguments = [rng.choice(["a", "blobs/b", "blobs/c.json", "blobs/0001/d", "latest/e"])]
        if name == "read":
            arguments.append(rng.choice([2, 100]))
        elif name != "delete":
            arguments.append(rng.choice([b"", b"1", b"333"]))
        expected = outcome(getattr(model, name), *arguments)
        assert outcome(getattr(store, name), *arguments) == expected, (name, arguments)
        prefix = rng.choice(["", "blobs/", "blobs/0001/", "none/"])
        assert [(entry.key, entry.size_bytes) for entry in store.entries(prefix)] == sorted(
            (key, len(content)) for key, content in model.content.items() if key.startswith(prefix)
        )


@pytest.mark.parametrize("content", [b"", b"\0\r\n\xff", MEGABYTE], ids=len)
def test_store_returns_every_byte_that_was_written(store, content):
    store.write("blobs/a", content)
    assert store.read("blobs/a", len(content)) == content
    store.create("blobs/b", content)
    assert store.read("blobs/b", len(content)) == content


def test_entries_have_the_time_of_their_write(store):
    store.write("a", b"1")
    assert store.entries()[0].modified == pytest.approx(time.time(), abs=60)


def test_entries_outside_of_a_folder_are_those_without_its_name_in_their_keys(store):
    inside = ["blobs/1/a", "first/blobs/a", "first/blobs/b/c", "a/b/blobs/c"]
    outside = ["a/b/d", "first/attempts/0001.json", "first/blobs.json", "first/my-blobs/a", "latest.json"]
    for key in [*inside, *outside]:
        store.write(key, b"1")
    entries = {entry.key: entry for entry in store.entries()}
    listed = {entry.key: entry for entry in store.entries_outside("blobs")}
    assert listed.keys() - {"blobs/1/a"} == {*outside}  # a bucket's delimiter begins with a slash
    assert all(entries[key] == entry for key, entry in listed.items())


def test_a_store_that_groups_keys_by_another_delimiter_is_listed_as_a_whole(s3, monkeypatch):
    """Some stores know "/" alone; a prefix below such a group would be lost."""
    store = open_store(f"s3://{s3}/runs")
    for key in ("first/attempts/0001.json", "first/blobs/a"):
        store.write(key, b"1")
    send = type(store._client()._endpoint.http_session).send

    def by_slash(session, request):
        request.url = request.url.replace("delimiter=%2Fblobs%2F", "delimiter=%2F")
        return send(session, request)

    monkeypatch.setattr(type(store._client()._endpoint.http_session), "send", by_slash)
    assert [entry.key for entry in store.entries_outside("blobs")] == ["first/attempts/0001.json", "first/blobs/a"]


def test_errors_name_the_location_and_the_cause(store):
    with pytest.raises(KeyMissing, match=rf"^{store.location}/no/where: "):
        store.read("no/where", 10)
    store.write("a", b"1234")
    with pytest.raises(StoreError, match=rf"^{store.location}/a: 4 bytes, at most 3 are read"):
        store.read("a", 3)
    with pytest.raises(KeyTaken, match=rf"^{store.location}/a: the key already holds other content"):
        store.create("a", b"4321")


def test_store_honours_conditions_and_the_probe_leaves_no_entry(store):
    store.write("attempts/0001.json", b"{}")
    assert honours_conditions(store, "attempts/")
    assert keys(store) == ["attempts/0001.json"]


@pytest.mark.parametrize("store", ["directory", "rgw"], indirect=True)
def test_only_one_of_many_simultaneous_creates_of_a_key_succeeds(store):
    winners, losers, start = [], [], threading.Barrier(8)

    def create(content):
        start.wait()
        try:
            store.create("attempts/0001.json", content)
            winners.append(content)
        except KeyTaken:
            losers.append(content)

    threads = [threading.Thread(target=create, args=(b"%d" % number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(winners), len(losers)) == (1, 7)
    assert store.read("attempts/0001.json", 10) == winners[0]


@pytest.mark.parametrize("location", ["directory", "s3"])
def test_keys_that_leave_the_store_are_refused(s3, tmp_path, location):
    store = open_store(str(tmp_path / "store") if location == "directory" else f"s3://{s3}/a")
    for key in ("../a", "a/../../b", "/etc/passwd", "a//b", "", ".", ".hidden", "a b", "a\n", "ä"):
        for call, *rest in ((store.read, 1), (store.write, b""), (store.create, b""), (store.delete,)):
            with pytest.raises(StoreError, match="not a valid key"):
                call(key, *rest)
    assert list(tmp_path.rglob("*")) == []


@pytest.mark.parametrize(
    "location",
    [
        *(
            "s3://",
            "s3://b",
            "s3:///runs",
            "s3://Upper/a",
            "s3://bucket/../other",
            "s3://bucket//a",
            "s3://bucket/a b",
        ),
        *(
            "s3:/bucket/a",
            "gs://bucket/a",
            "http://host/bucket",
            "file:///tmp/a",
            "s3://bucket/a?b",
            "S3://bucket/a",
        ),
        *(
            "s3//bucket/a",
            "s3:bucket/a",
            "S3//bucket",
            "minio//bucket/a",
            "s3;//bucket",
            "runs\n",
            "\0",
            "runs\x7f/a",
        ),
    ],
)
def test_text_that_is_not_a_location_is_refused(location):
    with pytest.raises(StoreError, match=r"not a location.*: give a directory, s3://bucket/prefix or minio://"):
        open_store(location)


@pytest.mark.parametrize("location", ["s3://me:canary@bucket/a", "http://me:can/ary@host/bucket"])
def test_location_with_a_password_is_refused_without_repeating_it(location):
    with pytest.raises(StoreError, match="not a location") as raised:
        open_store(location)
    assert not re.search("me|can", str(raised.value).partition(": ")[0])


@pytest.mark.parametrize("location", ["s3://{}", "s3://{}/", "s3://{}/a/b/", "minio://{}/a"])
def test_prefix_of_a_location_is_optional(s3, location):
    store = open_store(location.format(s3))
    store.write("k", b"1")
    prefix = location.partition("{}")[2].strip("/")
    with s3_client() as client:
        (entry,) = client.list_objects_v2(Bucket=s3)["Contents"]
    assert entry["Key"] == f"{prefix}/k".strip("/")
    assert keys(store) == ["k"]


def test_prefix_that_starts_alike_has_other_entries(s3):
    open_store(f"s3://{s3}/runs/ab").write("k", b"1")
    assert keys(open_store(f"s3://{s3}/runs/a")) == []


def test_entries_of_all_pages_are_listed_when_one_page_fails_at_first(s3, monkeypatch):
    monkeypatch.setenv("MOTO_S3_DEFAULT_MAX_KEYS", "3")
    store = open_store(f"s3://{s3}/a")
    for number in range(10):
        store.write(f"k{number}", b"1")
    with fault_proxy(os.environ["AWS_ENDPOINT_URL"]) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        proxy.rule = lambda number, method, path: "503 SlowDown" if number == 3 else ""
        assert keys(open_store(f"s3://{s3}/a", LONG)) == [f"k{number}" for number in range(10)]
        assert proxy.count("GET") == 3 + 4


# Transient errors


ANSWERS = ["503 SlowDown", "500 InternalError", "502", "429 TooManyRequests", "400 RequestTimeout"]
FAULTS = ["reset early", "reset middle", "lose reply", "truncate", "delay 0.1"]


@pytest.mark.parametrize(
    ("faulty", "fault"),
    [*(("moto", fault) for fault in ANSWERS + FAULTS), *(("rgw", fault) for fault in FAULTS)],
    indirect=["faulty"],
)
def test_every_call_succeeds_after_a_transient_fault(faulty, fault):
    proxy, location = faulty
    store = open_store(location, LONG)
    for key in ("read", "deleted", "listed/a"):
        store.write(key, MEGABYTE)
    proxy.rule = lambda number, *request: fault if proxy.requests.count(request) == 1 else ""
    proxy.requests.clear()
    with ThreadPoolExecutor() as threads:  # together, which saves time: every call waits before its retry
        calls = [
            threads.submit(store.write, "written", MEGABYTE),
            threads.submit(store.create, "created", MEGABYTE),
            threads.submit(store.delete, "deleted"),
            threads.submit(store.read, "read", 1 << 20),
            threads.submit(keys, store, "listed/"),
        ]
    assert [call.result() for call in calls] == [None, None, None, MEGABYTE, ["listed/a"]]
    proxy.rule = always("")
    assert keys(store) == ["created", "listed/a", "read", "written"]
    assert store.read("written", 1 << 20) == store.read("created", 1 << 20) == MEGABYTE


@on("moto")
def test_errors_that_end_within_the_patience_are_retried_and_logged(faulty, caplog):
    proxy, location = faulty
    proxy.rule = first(3, "503 SlowDown")
    open_store(location, LONG).write("a", b"1")
    assert proxy.count("PUT") == 4
    (record,) = caplog.records
    assert f"{location}/a: the store answered 503 SlowDown; trying again for" in record.message


@on("moto")
def test_errors_that_outlast_the_patience_are_raised_and_name_the_location(faulty):
    proxy, location = faulty
    faults = ["503 SlowDown", "502", "reset early", "reset middle", "lose reply", "truncate"]
    content = MEGABYTE[: 1 << 16]
    key_of = {fault: fault.replace(" ", "-") for fault in faults}
    patient, store = open_store(location, LONG), open_store(location, SHORT)
    for key in key_of.values():
        patient.write(key, content)
    store.entries()  # create the client beforehand, since that takes time, too
    proxy.rule = lambda number, method, path: path.rpartition("/")[2].replace("-", " ")
    proxy.requests.clear()

    def seconds_until_error(fault):
        start = time.monotonic()
        with pytest.raises(StoreUnavailable, match=rf"^{location}/{key_of[fault]}: ") as raised:
            store.read(key_of[fault], len(content))
        assert str(fault[:3] if fault[0] == "5" else proxy.endpoint) in str(raised.value)
        return time.monotonic() - start

    with ThreadPoolExecutor() as threads:
        durations = threads.map(seconds_until_error, faults)
    assert all(SHORT <= seconds < LONG for seconds in durations)
    for key in key_of.values():
        assert len([path for _, path in proxy.requests if path.endswith(key)]) > 1
    proxy.rule = always("")
    assert all(patient.read(key, len(content)) == content for key in key_of.values())


def test_endpoint_that_refuses_connections_is_named(s3, monkeypatch):
    (port,) = free_ports(1)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    start = time.monotonic()
    with pytest.raises(
        StoreUnavailable, match=rf"from http://127\.0\.0\.1:{port} \(from AWS_ENDPOINT_URL\): Endpoint"
    ):
        open_store(f"s3://{s3}/a", 0.2).write("k", b"1")
    assert time.monotonic() - start < 5


def test_write_returns_only_after_the_store_has_the_bytes(faulty):
    proxy, location = faulty
    store = open_store(location, LONG)
    proxy.rule = first(1, "hold", "PUT")
    writing = threading.Thread(target=store.write, args=("a", b"1"))
    writing.start()
    assert proxy.held.wait(10)
    assert keys(open_store(location)) == []
    assert writing.is_alive()
    proxy.released.set()
    writing.join(10)
    assert open_store(location).read("a", 1) == b"1"


# Creation, when a response is lost


def test_create_succeeds_when_its_own_first_write_lost_its_response(faulty):
    proxy, location = faulty
    proxy.rule = first(1, "lose reply", "PUT")
    open_store(location, LONG).create("a", b"mine")
    assert proxy.count("PUT") == 2
    assert open_store(location).read("a", 100) == b"mine"


def test_create_raises_the_cause_when_it_cannot_read_the_existing_key(faulty):
    proxy, location = faulty
    proxy.rule = lambda number, method, path: "lose reply" if number == 1 else "403" * (method == "GET")
    with pytest.raises(StoreError, match="credentials"):
        open_store(location, LONG).create("a", b"mine")


@on("rgw")  # moto checks no hash
def test_upload_that_the_network_damaged_is_repeated(faulty):
    proxy, location = faulty
    proxy.rule = first(1, "corrupt upload", "PUT")
    open_store(location, LONG).write("a", b"1")
    assert proxy.count("PUT") == 2
    assert open_store(location).read("a", 1) == b"1"


def test_listing_that_cannot_be_parsed_is_repeated(faulty):
    proxy, location = faulty
    open_store(location, LONG).write("a", b"1")
    proxy.rule = first(1, "corrupt", "GET")
    assert keys(open_store(location, LONG)) == ["a"]
    assert proxy.count("GET") == 2


@on("moto")  # no request reaches the store
def test_probe_of_a_store_that_is_down_ends_after_one_patience(faulty):
    proxy, location = faulty
    proxy.rule = always("503 SlowDown")
    with pytest.raises(StoreUnavailable):
        honours_conditions(open_store(location, 0.2), "attempts/")
    assert {method for method, _ in proxy.requests} == {"PUT"}


def test_create_is_refused_when_its_response_was_lost_and_the_key_holds_other_content(faulty):
    proxy, location = faulty
    open_store(location, LONG).write("a", b"somebody else's")
    proxy.rule = first(1, "lose reply", "PUT")
    with pytest.raises(KeyTaken, match=rf"^{location}/a: the key already holds other content"):
        open_store(location, LONG).create("a", b"mine")
    assert open_store(location).read("a", 100) == b"somebody else's"


@on("moto")  # without its header, the request has a wrong signature, which moto does not check
def test_store_that_ignores_conditions_is_detected(faulty):
    proxy, location = faulty
    proxy.rule = always("drop condition")
    store = open_store(location, LONG)
    assert not honours_conditions(store, "attempts/")
    assert keys(store) == []


@on("rgw")
def test_rgw_with_a_versioned_bucket_is_detected_as_ignoring_conditions(faulty):
    _, location = faulty
    with s3_client() as client:
        versioned = {"Status": "Enabled"}
        client.put_bucket_versioning(Bucket=location.split("/")[2], VersioningConfiguration=versioned)
    assert not honours_conditions(open_store(location, LONG), "attempts/")


def test_store_that_returns_other_bytes_than_were_written_is_detected(faulty):
    proxy, location = faulty
    proxy.rule = always("corrupt", "GET")
    with pytest.raises(StoreError, match="returned other bytes than were written"):
        honours_conditions(open_store(location, LONG), "attempts/")


# Permanent errors


@on("moto")  # no request reaches the store
@pytest.mark.parametrize(
    "answer", ["403 ExpiredToken", "400 ExpiredToken", "403 AccessDenied", "403 InvalidAccessKeyId", "403", "401"]
)
def test_refused_credentials_are_an_error_at_once_that_names_the_settings_to_check(faulty, answer):
    proxy, location = faulty
    proxy.rule = always(answer)
    with pytest.raises(StoreError, match=rf"^{location}/a: .* {answer}.*AWS_SECRET_ACCESS_KEY") as raised:
        open_store(location, LONG).write("a", b"1")
    assert not isinstance(raised.value, StoreUnavailable)
    assert len(proxy.requests) == 1


@on("moto")  # no request reaches the store
@pytest.mark.parametrize("unset", [["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"], ["AWS_SECRET_ACCESS_KEY"]])
def test_missing_credentials_are_an_error_at_once_that_names_the_settings(faulty, unset, monkeypatch):
    proxy, location = faulty
    for name in unset:
        monkeypatch.delenv(name)
    with pytest.raises(StoreError, match=r"no credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACC") as raised:
        open_store(location, LONG).read("a", 1)
    assert not isinstance(raised.value, StoreUnavailable)
    assert proxy.requests == []


@on("rgw")  # moto checks no signature
def test_renewed_credentials_file_is_read_by_the_next_call(faulty, tmp_path, monkeypatch):
    proxy, location = faulty
    file = tmp_path / "credentials"
    content = f"[default]\naws_access_key_id = {os.environ['AWS_ACCESS_KEY_ID']}\naws_secret_access_key = "
    file.write_text(f"{content}expired\n")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    store = open_store(location, LONG)
    with pytest.raises(StoreError, match="403 SignatureDoesNotMatch: the credentials are wrong, expired"):
        store.write("a", b"1")
    assert len(proxy.requests) == 1
    file.write_text(f"{content}{SECRET_KEY}\n")
    store.write("a", b"1")
    assert store.read("a", 1) == b"1"


def test_missing_bucket_is_an_error_at_once_that_names_it(faulty):
    proxy, _ = faulty
    store = open_store("s3://no-such-bucket/a", LONG)
    calls = [
        *(lambda: store.read("k", 1), lambda: store.write("k", b""), lambda: store.create("k", b"")),
        *(lambda: store.entries(), lambda: store.delete("k")),
    ]
    for call in calls:
        with pytest.raises(
            StoreError, match=f"no bucket 'no-such-bucket' at {proxy.endpoint} .*; create"
        ) as raised:
            call()
        assert not isinstance(raised.value, StoreUnavailable | KeyMissing)
    assert len(proxy.requests) == len(calls)


@pytest.mark.parametrize(
    "endpoint", ["localhost:9000", "minio", "http://canary@host:port", "http://canary@host:99999", "http://"]
)
def test_endpoint_that_is_not_a_url_is_an_error_at_once_whose_message_does_not_repeat_it(
    s3, monkeypatch, endpoint
):
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    with pytest.raises(
        StoreError, match=rf"^s3://{s3}/a: the endpoint \(from AWS_ENDPOINT_URL\) is not a URL"
    ) as raised:
        open_store(f"s3://{s3}/a", LONG).entries()
    assert not isinstance(raised.value, StoreUnavailable)
    assert "canary" not in str(raised.value)


def test_ipv6_endpoint_is_named_with_its_brackets(s3, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://[::1]:1")
    with pytest.raises(StoreUnavailable, match=r"from http://\[::1\]:1 \("):
        open_store(f"s3://{s3}/a", 0).entries()


@on("moto")  # no request reaches the store
def test_404_of_a_server_that_is_not_an_s3_store_does_not_mean_a_missing_key(faulty):
    proxy, location = faulty
    proxy.rule = always("404")
    store = open_store(location, LONG)
    for call in (store.entries, lambda: store.read("a", 1)):
        with pytest.raises(StoreError, match="the store answered 404") as raised:
            call()
        assert not isinstance(raised.value, KeyMissing)


def test_missing_profile_is_an_error_that_names_it(s3, monkeypatch):
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(StoreError, match=r"profile \(nobody\) could not be found"):
        open_store(f"s3://{s3}/a", LONG).entries()


def test_secrets_are_in_no_message(s3, monkeypatch, caplog):
    (port,) = free_ports(1)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://someone:canary@127.0.0.1:{port}")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "canary")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "canary")
    with pytest.raises(StoreUnavailable, match=rf"http://127\.0\.0\.1:{port}") as raised:
        open_store(f"s3://{s3}/a", 3).write("k", b"1")
    assert caplog.records
    assert "canary" not in str(raised.value) + caplog.text


# minio://


CLOUD = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}  # keys of Amazon or of an unknown endpoint
OWN = {**CLOUD, "AWS_ENDPOINT_URL": "http://own:1"}  # the complete content of the secret mappo-s3
KUBEFLOW = {"MAPPO_KUBEFLOW_ACCESS_KEY": "k", "MAPPO_KUBEFLOW_SECRET_KEY": "s"}
SITE = {"MAPPO_MINIO_ENDPOINT": "http://site:1"}
SEAWEEDFS = "http://seaweedfs.kubeflow:9000"


def providers(text, scheme="minio"):
    """Return a pod's environment with the providers of Kubeflow's config map, as k8s/base sets them."""
    default = "\n".join(f"    {line}" for line in text.split("; "))
    return {"MAPPO_KUBEFLOW_PROVIDERS": f"{scheme}:\n  default:\n{default}\n    credentials: {{fromEnv: false}}\n"}


OWN_PROVIDER = {
    "MAPPO_KUBEFLOW_PROVIDERS": "minio: {default: {endpoint: 'http://p:1', "
    "credentials: {secretRef: {secretName: mappo-s3}}}}"
}


@pytest.mark.parametrize(
    ("environment", "endpoint", "keys"),
    [
        ({}, SEAWEEDFS, None),
        (KUBEFLOW, SEAWEEDFS, ("k", "s")),
        (CLOUD, SEAWEEDFS, None),
        (CLOUD | KUBEFLOW, SEAWEEDFS, ("k", "s")),
        (OWN, "http://own:1", None),
        (OWN | KUBEFLOW, SEAWEEDFS, ("k", "s")),
        (OWN | {"AWS_ENDPOINT_URL_S3": "http://s3:1"}, "http://s3:1", None),
        (OWN | KUBEFLOW | {"AWS_ENDPOINT_URL": SEAWEEDFS}, SEAWEEDFS, None),
        (OWN | KUBEFLOW | providers("endpoint: own:1; disableSSL: true"), "http://own:1", None),
        (KUBEFLOW | {"AWS_ENDPOINT_URL": SEAWEEDFS}, SEAWEEDFS, ("k", "s")),
        (KUBEFLOW | {"AWS_ENDPOINT_URL": SEAWEEDFS, "AWS_PROFILE": "me"}, SEAWEEDFS, None),
        (KUBEFLOW | {"AWS_ENDPOINT_URL": SEAWEEDFS, "AWS_SHARED_CREDENTIALS_FILE": "/c"}, SEAWEEDFS, None),
        ({"AWS_ENDPOINT_URL": "", "AWS_ACCESS_KEY_ID": ""} | KUBEFLOW, SEAWEEDFS, ("k", "s")),
        ({"MAPPO_KUBEFLOW_ACCESS_KEY": "k"}, SEAWEEDFS, None),
        (SITE | OWN, "http://site:1", None),
        (SITE | OWN | KUBEFLOW, "http://site:1", ("k", "s")),
        (SITE | OWN | KUBEFLOW | {"AWS_ENDPOINT_URL": "http://site:1"}, "http://site:1", None),
        (SITE | {"MAPPO_KUBEFLOW_PROVIDERS": "{["}, "http://site:1", None),
        (OWN | providers("endpoint: p:1"), "http://own:1", None),
        (CLOUD | KUBEFLOW | providers("endpoint: p:1; disableSSL: true"), "http://p:1", ("k", "s")),
        (KUBEFLOW | providers("endpoint: p:1"), "https://p:1", ("k", "s")),
        (KUBEFLOW | providers("endpoint: http://p:1"), "http://p:1", ("k", "s")),
        (KUBEFLOW | providers("endpoint: s3.amazonaws.com", scheme="s3"), SEAWEEDFS, ("k", "s")),
        (KUBEFLOW | providers("region: a"), SEAWEEDFS, ("k", "s")),
        (CLOUD | KUBEFLOW | OWN_PROVIDER, "http://p:1", None),
        (KUBEFLOW | OWN_PROVIDER, "http://p:1", ("k", "s")),
        (OWN | KUBEFLOW | {"AWS_ENDPOINT_URL": f"{SEAWEEDFS}/"}, SEAWEEDFS, None),
        (KUBEFLOW | {"MAPPO_KUBEFLOW_PROVIDERS": "minio:\n"}, SEAWEEDFS, ("k", "s")),
        (KUBEFLOW | {"MAPPO_KUBEFLOW_PROVIDERS": ""}, SEAWEEDFS, ("k", "s")),
    ],
)
def test_minio_is_the_store_that_the_environment_names(environment, endpoint, keys):
    """Keys of None leave the choice to boto3."""
    access = s3_access("minio", environment)
    assert (access.endpoint, access.keys) == (endpoint, keys)


@pytest.mark.parametrize("environment", [{}, CLOUD, OWN, SITE | providers("endpoint: p:1")])
def test_s3_leaves_the_choice_to_boto3_and_never_uses_kubeflows_keys(environment):
    access = s3_access("s3", environment | KUBEFLOW)
    assert (access.endpoint, access.keys, access.region) == (None, None, None)


@pytest.mark.parametrize(
    "text",
    ["{[", "text", "- a", "minio: text", "minio: {default: text}", "minio: {default: {endpoint: [canary]}}"],
)
def test_unreadable_providers_are_an_error_only_if_they_are_needed(text):
    environment = {"MAPPO_KUBEFLOW_PROVIDERS": text}
    with pytest.raises(
        StoreError, match="^MAPPO_KUBEFLOW_PROVIDERS: .* config map kfp-launcher .*set MAPPO_M"
    ) as e:
        s3_access("minio", environment)
    assert "canary" not in str(e.value)
    assert s3_access("s3", environment).endpoint is None
    assert s3_access("minio", environment | OWN).endpoint == "http://own:1"


@pytest.fixture(params=["moto", "rgw"])
def kubeflows(request, monkeypatch):
    """The bucket of a store whose endpoint and keys come only from the variables of every pod on Kubeflow."""
    endpoint = request.getfixturevalue(f"{request.param}_endpoint")
    bucket = use_s3(monkeypatch, endpoint)
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("MAPPO_KUBEFLOW_ACCESS_KEY", ACCESS_KEY)
    monkeypatch.setenv("MAPPO_KUBEFLOW_SECRET_KEY", SECRET_KEY)
    host = endpoint.removeprefix("http://")
    for name, value in providers(f"endpoint: {host}; disableSSL: true; region: us-east-1").items():
        monkeypatch.setenv(name, value)
    return bucket


def test_kubeflows_store_is_opened_with_the_variables_of_every_pod(kubeflows, monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "of another cloud")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "of another cloud")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "of another cloud")
    store = open_store(f"minio://{kubeflows}/v2/artifacts", LONG)
    store.write("a", b"1")
    store.create("b", b"2")
    assert keys(store) == ["a", "b"]
    assert store.read("a", 1) == b"1"


def test_refused_keys_of_kubeflow_are_an_error_that_names_their_origin(kubeflows, monkeypatch):
    monkeypatch.setenv("MAPPO_KUBEFLOW_SECRET_KEY", "canary")
    provider = yaml.safe_load(os.environ["MAPPO_KUBEFLOW_PROVIDERS"])["minio"]["default"]
    with fault_proxy(f"http://{provider['endpoint']}") as proxy:
        proxy.rule = always("403 SignatureDoesNotMatch")
        monkeypatch.setenv(
            "MAPPO_KUBEFLOW_PROVIDERS", json.dumps({"minio": {"default": {"endpoint": proxy.endpoint}}})
        )
        with pytest.raises(
            StoreError, match=f"not allowed to do this at {proxy.endpoint} .from key prov"
        ) as raised:
            open_store(f"minio://{kubeflows}/a").write("k", b"1")
    assert "MAPPO_KUBEFLOW_SECRET_KEY, from Kubeflow's secret mlpipeline-minio-artifact" in str(raised.value)
    assert "AWS_SECRET_ACCESS_KEY replace them where AWS_ENDPOINT_URL is this endpoint" in str(raised.value)
    assert not re.search(f"canary|{ACCESS_KEY}", f"{raised.value}{s3_access('minio', os.environ)}")


def test_unreachable_minio_is_an_error_that_names_the_settings(s3, monkeypatch):
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    with pytest.raises(
        StoreUnavailable,
        match=r"^minio://bucket/a/k: no usable answer from http://seaweedfs\.kubeflow:9000 \(Kubeflow's default; "
        "MAPPO_MINIO_ENDPOINT or AWS_ENDPOINT_URL names another store",
    ):
        open_store("minio://bucket/a", 0).read("k", 1)


# Directories


def test_full_disk_is_an_error_that_changes_nothing_and_ends_when_space_is_freed(small_disk):
    store = DirectoryStore(small_disk / "runs")
    store.write("old", b"old")
    store.write("filler", bytes(100_000))
    for call in (store.write, store.create):
        with pytest.raises(
            StoreError, match=rf"^{small_disk}/runs/new: No space left on device; free some space, and"
        ):
            call("new", bytes(200_000))
    with pytest.raises(StoreError, match="free some"):
        store.write("old", bytes(200_000))
    assert keys(store) == ["filler", "old"]
    assert store.read("old", 10) == b"old"
    store.delete("filler")
    store.write("new", bytes(200_000))
    assert keys(store) == ["new", "old"]


def test_read_only_disk_is_an_error_that_names_the_cause(small_disk):
    store = DirectoryStore(small_disk)
    store.write("a", b"1")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    for call in (lambda: store.write("a", b"2"), lambda: store.create("b", b"2"), lambda: store.delete("a")):
        with pytest.raises(StoreError, match="Read-only file system"):
            call()
    assert store.read("a", 1) == b"1"


@pytest.mark.parametrize(("call", "event"), [("write", "os.rename"), ("create", "os.link")])
def test_crash_before_the_file_is_renamed_leaves_the_old_content(tmp_path, call, event):
    store = DirectoryStore(tmp_path)
    store.write("a/old", b"old")
    key = "a/old" if call == "write" else "a/new"
    crash = (
        "import os, sys, pathlib, mappo.runs.directory_store as storage\n"
        f"sys.addaudithook(lambda event, _: event == {event!r} and os.kill(os.getpid(), 9))\n"
        f"storage.DirectoryStore(pathlib.Path({str(tmp_path)!r})).{call}({key!r}, b'new')\n"
    )
    project = str(Path(__file__).parents[2])
    process = subprocess.run([sys.executable, "-c", crash], env={**os.environ, "PYTHONPATH": project})
    assert process.returncode == -signal.SIGKILL
    leftover, old = store.entries()
    if ".partial-" not in leftover.key:
        leftover, old = old, leftover
    assert (old.key, ".partial-" in leftover.key) == ("a/old", True)
    assert store.read("a/old", 10) == b"old"
    getattr(store, call)(key, b"new")
    assert store.read(key, 10) == b"new"


def test_path_that_is_not_a_directory_is_an_error_that_names_it(tmp_path):
    (tmp_path / "file").write_text("")
    store = open_store(str(tmp_path / "file"))
    with pytest.raises(StoreError, match=rf"^{tmp_path}/file/a: (File exists|Not a directory)"):
        store.write("a", b"1")
