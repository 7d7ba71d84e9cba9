"""The real services of tests: moto (an S3 mock over HTTP), Ceph RGW (a production S3 store), PostgreSQL, a full
disk.

moto checks neither signatures nor hashes; Ceph RGW checks both.
"""

import http.client
import logging
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import boto3
import pytest
from botocore.config import Config

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

ACCESS_KEY, SECRET_KEY, REGION = "test-access-key", "test-secret-key", "us-east-1"
_CEPH = ("ceph", "ceph-authtool", "ceph-mon", "ceph-osd", "monmaptool", "radosgw", "radosgw-admin", "setpriv")
_CEPH_CONF = """
[global]
fsid = {fsid}
mon host = [v2:127.0.0.1:{mon_v2},v1:127.0.0.1:{mon_v1}]
auth cluster required = none
auth service required = none
auth client required = none
ms bind ipv4 = true
ms mon client mode = crc
keyring = {directory}/keyring
run dir = {directory}
log file = {directory}/$name.log
admin socket = {directory}/$name.asok
pid file =
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 1
osd pool default pgp num = 1
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
mon max pg per osd = 1000
mon allow pool size one = true
mon warn on pool no redundancy = false
[mon]
mon data = {directory}/mon
mon initial members = a
paxos propose interval = 0.05
paxos min wait = 0.01
[osd]
osd data = {directory}/osd
osd objectstore = memstore
memstore device bytes = 8589934592
osd class load list = *
osd class default list = *
[client.rgw]
rgw frontends = beast endpoint=127.0.0.1:{rgw} tcp_nodelay=1
rgw data = {directory}/rgw
"""


def missing(what: str, install: str) -> NoReturn:
    """Skip the test, or fail it where MAPPO_REQUIRE_SERVICES is 1, because a service is not installed."""
    message = f"{what} is not installed: {install}"
    if os.environ.get("MAPPO_REQUIRE_SERVICES") == "1":
        pytest.fail(message)
    pytest.skip(message)


def free_ports(count: int) -> list[int]:
    with ExitStack() as sockets:
        bound_sockets = [sockets.enter_context(socket.socket()) for _ in range(count)]
        for bound_socket in bound_sockets:
            bound_socket.bind(("127.0.0.1", 0))
        return [bound_socket.getsockname()[1] for bound_socket in bound_sockets]


@contextmanager
def file_system_of(kibibytes: int, directory: Path) -> Iterator[Path]:
    """Mount a small file system in memory, which a test can fill."""
    directory.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kibibytes}k", "tmpfs", str(directory)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting a tmpfs takes root with CAP_SYS_ADMIN")
    try:
        yield directory
    finally:
        subprocess.run(["umount", "--lazy", str(directory)], check=True)


@contextmanager
def moto_server() -> Iterator[str]:
    """Run moto's S3 server in this process; yield its endpoint."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.WARNING)  # otherwise it logs every request
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        yield f"http://{host}:{port}"
    finally:
        server.stop()


@contextmanager
def ceph_rgw(directory: Path) -> Iterator[str]:
    """Run a Ceph RGW with one user, one monitor and one OSD in memory; yield its endpoint."""
    if not all(shutil.which(program) for program in _CEPH):
        missing("Ceph RGW", "sudo apt install ceph-common ceph-mon ceph-osd radosgw")
    v2, v1, rgw = free_ports(3)
    fsid = str(uuid.uuid4())
    for name in ("mon", "osd", "rgw"):
        (directory / name).mkdir(parents=True)
    conf = directory / "ceph.conf"
    conf.write_text(_CEPH_CONF.format(fsid=fsid, directory=directory, mon_v2=v2, mon_v1=v1, rgw=rgw))

    def call(program: str, *arguments: object) -> None:
        command = [program, *map(str, arguments)]
        process = subprocess.run(command, capture_output=True, text=True, timeout=60, env=_ceph_environment())
        assert process.returncode == 0, f"{' '.join(command)}: {process.stdout}{process.stderr}"

    with ExitStack() as daemons:

        def start(program: str, *arguments: str) -> None:
            daemons.enter_context(_daemon(directory, program, "-f", "--conf", str(conf), *arguments))

        keyring, monmap = directory / "keyring", directory / "monmap"
        for name in ("client.rgw", "client.admin"):
            create = [] if keyring.exists() else ["--create-keyring"]
            call("ceph-authtool", *create, keyring, "--gen-key", "-n", name)
        mon = f"[v2:127.0.0.1:{v2},v1:127.0.0.1:{v1}]"
        call("monmaptool", "--create", "--fsid", fsid, "--addv", "a", mon, monmap)
        call("ceph-mon", "--conf", conf, "-i", "a", "--mkfs", "--monmap", monmap)
        start("ceph-mon", "-i", "a")
        osd = str(uuid.uuid4())
        call("ceph-osd", "--conf", conf, "-i", 0, "--mkfs", "--osd-uuid", osd)
        call("ceph", "-c", conf, "--connect-timeout", 30, "osd", "new", osd, 0)
        call("ceph", "-c", conf, "osd", "crush", "add", "osd.0", 1.0, "host=localhost", "root=default")
        start("ceph-osd", "-i", "0")
        start("radosgw", "-n", "client.rgw")
        endpoint = f"http://127.0.0.1:{rgw}"
        wait(lambda: _answers(endpoint), 120, f"no answer from {endpoint}; logs in {directory}")
        keys = f"--access-key={ACCESS_KEY}", f"--secret-key={SECRET_KEY}"
        call("radosgw-admin", "-c", conf, "user", "create", "--uid=test", "--display-name=test", *keys)
        yield endpoint


def use_s3(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> str:
    """Create a bucket at an endpoint, set the environment so that boto3 finds it, and return the bucket's name."""
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_SESSION_TOKEN", "AWS_PROFILE", "AWS_DEFAULT_PROFILE", "AWS_REGION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
    monkeypatch.setenv("AWS_DEFAULT_REGION", REGION)
    bucket = f"bucket-{uuid.uuid4().hex[:12]}"
    with s3_client() as client:
        client.create_bucket(Bucket=bucket)
    return bucket


@contextmanager
def s3_client() -> "Iterator[S3Client]":
    """Yield boto3's client for the endpoint in the environment, to look into a bucket without `S3Store`."""
    yield _client(os.environ["AWS_ENDPOINT_URL"])


@cache  # creating a client takes a tenth of a second
def _client(endpoint: str) -> "S3Client":
    options = Config(
        s3={"addressing_style": "path"},
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    return boto3.session.Session(ACCESS_KEY, SECRET_KEY, region_name=REGION).client(
        "s3", endpoint_url=endpoint, config=options
    )


@contextmanager
def _daemon(directory: Path, *command: str) -> Iterator[None]:
    """Run a program until the block ends. The kernel kills the program if this process is killed."""
    with (directory / f"{command[0]}.out").open("wb") as output:
        process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", *command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=_ceph_environment(),
        )
    try:
        yield
    finally:
        process.kill()
        process.wait()


def _ceph_environment() -> dict[str, str]:
    """Return the environment without Python's settings: Debian's `ceph` runs on the system's Python."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "CEPH_"))}


def _answers(endpoint: str) -> bool:
    connection = http.client.HTTPConnection(endpoint.removeprefix("http://"), timeout=5)
    try:
        connection.request("GET", "/")
        return connection.getresponse().status == 200
    except (http.client.HTTPException, OSError):
        return False
    finally:
        connection.close()


def wait(condition: Callable[[], bool], seconds: float, message: object) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, message
        time.sleep(0.1)


class Postgres:
    """A PostgreSQL server in a directory, which a test can stop and start again."""

    def __init__(self, directory: Path):
        programs = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
        if not programs or not shutil.which("setpriv"):
            missing("PostgreSQL", "sudo apt install postgresql")
        self._bin, self._directory = programs[-1].parent, directory
        self._port = free_ports(1)[0]
        self._as_user: list[str] = []
        if os.geteuid() == 0:  # PostgreSQL refuses to run as root
            self._as_user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"]
            shutil.chown(directory, "postgres", "postgres")
        self._call("initdb", "--auth=trust", "--username=mappo", "--no-sync", "--encoding=UTF8", "-D", "data")
        self.start()

    def url(self, database: str) -> str:
        return f"postgresql://mappo:a-password@127.0.0.1:{self._port}/{database}"

    def create(self, database: str) -> str:
        """Create a database and return its URL."""
        self._call("createdb", "-h", "127.0.0.1", "-p", str(self._port), "-U", "mappo", database)
        return self.url(database)

    def start(self) -> None:
        settings = f"-p {self._port} -c listen_addresses=127.0.0.1 -c unix_socket_directories='' -c fsync=off"
        self._call("pg_ctl", "-D", "data", "-l", "log", "-w", "-o", settings, "start")

    def stop(self, mode: str = "immediate") -> None:
        self._call("pg_ctl", "-D", "data", "-m", mode, "-w", "stop")

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Stop the server's processes for the block: connections stay open, and nothing answers."""
        process = int((self._directory / "data" / "postmaster.pid").read_text().split()[0])
        children = subprocess.run(["pgrep", "--parent", str(process)], capture_output=True, text=True, check=True)
        processes = [process, *map(int, children.stdout.split())]
        for number in processes:
            os.kill(number, signal.SIGSTOP)
        try:
            yield
        finally:
            for number in processes:
                os.kill(number, signal.SIGCONT)

    def _call(self, program: str, *arguments: str) -> None:
        command = [*self._as_user, str(self._bin / program), *arguments]
        output = self._directory / "output"
        with output.open("w") as file:  # the server would keep a pipe open, and `run` would wait for its end
            process = subprocess.run(command, cwd=self._directory, stdout=file, stderr=file, timeout=60)
        assert process.returncode == 0, f"{' '.join(command)}: {output.read_text()}"


@contextmanager
def postgres() -> Iterator[Postgres]:
    """Run a PostgreSQL server until the block ends.

    Its directory is not below pytest's directories, which the user `postgres` cannot enter.
    """
    directory = Path(tempfile.mkdtemp(prefix="mappo-postgres-"))
    directory.chmod(0o755)
    try:
        server = Postgres(directory)
        try:
            yield server
        finally:
            server.stop()
    finally:
        shutil.rmtree(directory, ignore_errors=True)
