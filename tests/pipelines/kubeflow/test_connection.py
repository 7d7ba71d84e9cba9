import base64
import json
import ssl
import subprocess
import threading
import time
from pathlib import Path

import pytest

from mappo.errors import ConfigError
from pipelines.compiling import Compiled
from pipelines.errors import ApiError
from pipelines.kubeflow import client
from pipelines.kubeflow.api import Api, RetryNotice
from pipelines.kubeflow.connection import Connection
from pipelines.kubeflow.submission import Submission
from tests.support.kubeflow_server import KubeflowServer

TRAINING = Compiled(Path("tests/golden/training.yaml").read_text())


@pytest.fixture
def server(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("KF_PIPELINES_SA_TOKEN_PATH", raising=False)
    with KubeflowServer() as server:
        yield server


def api(server: KubeflowServer, patience_seconds: float = 20.0, notices: list | None = None, **fields) -> Api:
    """Connect to a server. notices: a list that collects the notices of retries. fields: of the connection."""
    on_retry = notices.append if notices is not None else lambda _: None
    return Api(Connection(endpoint=server.url, **fields), patience_seconds=patience_seconds, on_retry=on_retry)


def submitted(kubeflow: Api) -> str:
    return client.submit(kubeflow, Submission(TRAINING)).run_id


@pytest.mark.parametrize("status", [429, 502, 503, 504])
def test_a_transient_error_is_reported_and_retried(server, status, monkeypatch):
    monkeypatch.setattr("pipelines.kubeflow.api._MAX_PAUSE_SECONDS", 0.2)
    notices: list[RetryNotice] = []
    kubeflow = api(server, notices=notices)
    server.fail(status, times=2)
    assert client.runs(kubeflow, 1) == []
    assert [(notice.tries, notice.is_over) for notice in notices] == [(1, False), (2, False), (3, True)]
    assert str(status) in notices[0].reason
    assert 0 < notices[0].seconds < notices[1].seconds < notices[2].seconds


def test_the_pause_is_as_long_as_the_server_requests(server):
    server.fail(429, times=1, headers={"Retry-After": "1"})
    started = time.monotonic()
    assert client.runs(api(server), 1) == []
    assert time.monotonic() - started > 1


def test_error_500_is_tried_only_three_times(server):
    """The server answers some mistakes of users with 500 too."""
    server.fail(500, times=100, path="/runs")
    with pytest.raises(ApiError, match="500"):
        client.runs(api(server), 1)
    assert server.count("GET", "/runs") == 3


def test_a_lasting_error_is_raised_with_its_reason_when_the_patience_ends(server):
    server.fail(503, times=1000)
    with pytest.raises(ApiError, match="503"):
        client.runs(api(server, patience_seconds=1), 1)


@pytest.mark.parametrize("status", [400, 403, 404, 409])
def test_a_permanent_error_is_not_retried(server, status):
    server.fail(status, times=1, path="/runs")
    with pytest.raises(ApiError) as error:
        client.runs(api(server), 1)
    assert error.value.status == status
    assert server.count("GET", "/runs") == 1


def test_requests_wait_while_the_server_restarts(server):
    kubeflow = api(server)
    assert client.runs(kubeflow, 1) == []
    server.stop()
    threading.Timer(1.5, server.start).start()
    assert client.runs(kubeflow, 1) == []


def test_no_server_is_an_error_that_names_the_endpoint():
    kubeflow = Api(Connection(endpoint="http://127.0.0.1:1"), patience_seconds=0.5)
    with pytest.raises(ApiError, match=r"http://127\.0\.0\.1:1: no answer: .*refused"):
        client.runs(kubeflow, 1)


def test_a_run_is_found_and_not_started_twice_when_the_answer_is_lost(server):
    server.drop(method="POST", path="/runs", after=True)
    run_id = submitted(api(server))
    assert list(server.runs) == [run_id]


def test_a_run_is_started_once_when_the_request_is_lost(server):
    server.drop(method="POST", path="/runs")
    run_id = submitted(api(server))
    assert list(server.runs) == [run_id]


def test_a_gateway_error_after_the_run_was_started_does_not_start_another(server):
    kubeflow = api(server)
    first = submitted(kubeflow)
    server.fail(502, method="POST", path="/runs")
    second = submitted(kubeflow)
    assert sorted(server.runs) == sorted([first, second])


def test_a_token_that_expires_is_read_again_from_its_file(server, tmp_path):
    file = tmp_path / "token"
    file.write_text("old\n")
    server.tokens = {"old"}
    kubeflow = api(server, token_file=str(file))
    assert client.runs(kubeflow, 1) == []
    server.tokens = {"new"}
    file.write_text("new\n")
    assert client.runs(kubeflow, 1) == []


def test_a_token_that_stays_expired_is_explained_without_long_retries(server):
    server.tokens = {"new"}
    started = time.monotonic()
    with pytest.raises(ApiError, match="missing, wrong or expired") as error:
        client.runs(api(server, token="old"), 1)
    assert error.value.status == 401
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("credential", ["token", "cookie"])
def test_white_space_around_credentials_is_stripped(server, credential, tmp_path):
    server.tokens, server.cookies = {"abc"}, {"abc"}
    text = {"token": " abc\r\n", "cookie": "authservice_session=abc\n"}[credential]
    assert client.runs(api(server, **{credential: text}), 1) == []


@pytest.mark.parametrize("credential", ["token", "cookie"])
@pytest.mark.parametrize("inside", ["\n", "\r", "\t", "\0", "\x7f", "é"])
def test_credentials_with_characters_illegal_in_headers_are_refused_without_showing_them(credential, inside):
    with pytest.raises(ConfigError, match=f"KF_PIPELINES_{credential.upper()}: holds a line break") as error:
        Connection(endpoint="http://kubeflow.invalid", **{credential: f"secret{inside}secret"})
    assert "secret" not in str(error.value)


def test_a_token_file_with_several_lines_is_refused_without_showing_it(server, tmp_path):
    (tmp_path / "token").write_text("secret\nsecret\n")
    with pytest.raises(ConfigError, match=f"token file {tmp_path}/token: holds a line break") as error:
        api(server, token_file=str(tmp_path / "token"))
    assert "secret" not in str(error.value)


def test_the_repr_of_a_connection_hides_credentials():
    assert "secret" not in repr(Connection(token="secret", cookie="secret"))


def test_a_session_cookie_suffices_without_a_token(server):
    server.tokens, server.cookies = set(), {"abc"}
    assert client.runs(api(server, cookie="authservice_session=abc"), 1) == []


def test_a_login_page_is_recognised_and_explained(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    with (
        KubeflowServer(tokens=set(), login_page=True) as server,
        pytest.raises(ApiError, match="a login page answered instead of the API"),
    ):
        client.runs(api(server), 1)


def test_a_login_page_with_status_200_is_recognised_too(server):
    server.fail(200, body="<!DOCTYPE html><title>Sign in</title>")
    with pytest.raises(ApiError, match="a login page answered"):
        client.runs(api(server), 1)


PROXY = "/api/v1/namespaces/kubeflow/services/ml-pipeline:http/proxy"


def kubeconfig(server: KubeflowServer, path: Path, user: dict) -> str:
    path.write_text(
        json.dumps(
            {
                "apiVersion": "v1",
                "kind": "Config",
                "current-context": "here",
                "clusters": [{"name": "c", "cluster": {"server": server.url}}],
                "users": [{"name": "u", "user": user}],
                "contexts": [
                    {"name": "here", "context": {"cluster": "c", "user": "u", "namespace": "team"}},
                    {"name": "there", "context": {"cluster": "c", "user": "u", "namespace": "other"}},
                ],
            }
        )
    )
    return str(path)


def test_the_api_is_reached_by_the_kubeconfig_when_no_endpoint_is_given(monkeypatch, tmp_path):
    with KubeflowServer(tokens={"mine"}) as server:
        server.prefix = PROXY
        path = kubeconfig(server, tmp_path / "config", {"token": "mine"})
        monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", path)
        assert client.runs(Api(Connection()), 1) == []
        assert client.runs(Api(Connection(context="there")), 1) == []
        with pytest.raises(ConfigError, match="kubeconfig"):
            Api(Connection(context="nowhere"))


def test_the_kubernetes_api_is_refused_as_a_way_to_a_kubeflow_of_several_users(monkeypatch, tmp_path):
    """The Kubernetes API checks the credentials and then removes them, so Kubeflow does not know the user."""
    with KubeflowServer(multi_user=True, tokens={"mine"}) as server:
        server.prefix = PROXY
        path = kubeconfig(server, tmp_path / "config", {"token": "mine"})
        monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", path)
        with pytest.raises(ConfigError, match="gateway's address by --endpoint"):
            assert Api(Connection()).namespace


def test_the_proxy_of_the_environment_is_used(monkeypatch, server):
    """The test server plays the proxy; the address itself does not exist."""
    monkeypatch.setenv("http_proxy", server.url)
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    endpoint = "http://kubeflow.invalid"
    assert client.runs(Api(Connection(endpoint=endpoint), patience_seconds=0), 1) == []
    monkeypatch.setenv("no_proxy", "kubeflow.invalid")
    with pytest.raises(ApiError, match="no answer"):
        client.runs(Api(Connection(endpoint=endpoint), patience_seconds=0), 1)


@pytest.mark.parametrize(
    ("variable", "proxy", "no_proxy", "expected"),
    [
        ("http_proxy", "proxy:3128", "", "http://proxy:3128"),
        ("all_proxy", "http://proxy:3128", "", "http://proxy:3128"),
        ("http_proxy", "http://u%40x:p@proxy:3128", "", "http://proxy:3128"),
        ("http_proxy", "http://proxy:3128", "kubeflow.invalid:8080", None),
        ("https_proxy", "http://proxy:3128", "", None),
    ],
)
def test_all_notations_of_a_proxy_are_understood(monkeypatch, variable, proxy, no_proxy, expected):
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv(variable, proxy)
    monkeypatch.setenv("no_proxy", no_proxy)
    configuration = Api(Connection(endpoint="http://kubeflow.invalid:8080"))._client.configuration
    assert configuration.proxy == expected
    credentials = (configuration.proxy_headers or {}).get("proxy-authorization", "")
    assert base64.b64decode(credentials.removeprefix("Basic ")) == (b"u@x:p" if "@" in proxy else b"")


def test_a_proxy_that_cannot_be_used_is_refused_without_its_password(monkeypatch):
    monkeypatch.setenv("http_proxy", "socks5://user:secret@proxy:1080")
    monkeypatch.setenv("no_proxy", "")
    with pytest.raises(ConfigError, match="must be the URL of an HTTP proxy") as error:
        Api(Connection(endpoint="http://kubeflow.invalid"))
    assert "secret" not in str(error.value)


def test_a_certificate_that_is_not_trusted_is_explained(server, tmp_path):
    subject = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    files = ["-keyout", str(tmp_path / "key"), "-out", str(tmp_path / "certificate")]
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", *subject, *files]
    subprocess.run(command, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "certificate", tmp_path / "key")
    server._http.socket = context.wrap_socket(server._http.socket, server_side=True)
    endpoint = server.url.replace("http:", "https:")
    with pytest.raises(ApiError, match="certificate is not trusted: give the authority's by --ca-file"):
        client.runs(Api(Connection(endpoint=endpoint), patience_seconds=1), 1)
    trusting = Connection(endpoint=endpoint, ca_file=str(tmp_path / "certificate"))
    assert client.runs(Api(trusting), 1) == []


def test_the_command_of_a_kubeconfig_fetches_a_new_token_when_one_expires(monkeypatch, tmp_path):
    """The kubeconfigs of aws, gcloud and kubelogin fetch tokens by a command."""
    command = tmp_path / "login"
    command.write_text(
        "#!/bin/sh\n"
        'printf \'{"apiVersion":"client.authentication.k8s.io/v1",\'\n'
        f'printf \'"kind":"ExecCredential","status":{{"token":"%s"}}}}\' $(cat {tmp_path}/token)\n'
    )
    command.chmod(0o755)
    (tmp_path / "token").write_text("first")
    user = {
        "exec": {
            "apiVersion": "client.authentication.k8s.io/v1",
            "command": str(command),
            "interactiveMode": "Never",
        }
    }
    with KubeflowServer(tokens={"first"}) as server:
        server.prefix = PROXY
        path = kubeconfig(server, tmp_path / "config", user)
        monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", path)
        kubeflow = Api(Connection())
        assert client.runs(kubeflow, 1) == []
        server.tokens = {"second"}
        (tmp_path / "token").write_text("second")
        assert client.runs(kubeflow, 1) == []


def test_error_names_the_ways_to_kubeflow_when_no_endpoint_can_be_derived(monkeypatch, tmp_path):
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="--endpoint or KF_PIPELINES_ENDPOINT"):
        Api(Connection())


def test_the_api_is_reached_by_the_service_account_in_a_pod(monkeypatch, tmp_path):
    account, token = tmp_path / "account", tmp_path / "token"
    account.mkdir()
    (account / "token").write_text("of kubernetes")
    (account / "namespace").write_text("team\n")
    token.write_text("of the pipelines\n")
    monkeypatch.setattr("pipelines.kubeflow.connection._SERVICE_ACCOUNT", account)
    monkeypatch.setattr("pipelines.kubeflow.connection._PIPELINES_TOKEN", token)
    kubeflow = Api(Connection(api_namespace="kf"))
    assert kubeflow.url == "http://ml-pipeline.kf.svc.cluster.local:8888"
    with KubeflowServer(multi_user=True, tokens={"of the pipelines"}) as server:
        kubeflow._client.configuration.host = server.url
        assert kubeflow.namespace == "team"
        assert client.runs(kubeflow, 1) == []


def test_a_namespace_is_required_with_several_users_and_ignored_with_one(monkeypatch, tmp_path):
    with KubeflowServer(multi_user=True) as server:
        assert api(server, namespace="team").namespace == "team"
        with pytest.raises(ConfigError, match="--namespace"):
            assert api(server).namespace
        with pytest.raises(ApiError, match="may not do that here") as error:
            client.runs(api(server, namespace="foreign"), 1)
        assert error.value.status == 403
    with KubeflowServer() as server:
        assert api(server, namespace="team").namespace is None


@pytest.mark.parametrize(
    ("endpoint", "reason"),
    [
        ("kubeflow.example.org", "must be a URL"),
        ("ftp://a", "must be a URL"),
        ("http://[::1", "must be a URL"),
        ("http://a:99999", "must be a URL"),
        ("http://a b", "must be a URL"),
        ("https://me:pw@a", "no password"),
        ("ftp://me:pw@a", "no password"),
    ],
)
def test_a_wrong_endpoint_is_refused(endpoint, reason):
    with pytest.raises(ConfigError, match=reason) as error:
        Api(Connection(endpoint=endpoint))
    assert "pw" not in str(error.value)


def test_missing_files_are_refused_naming_them(server, tmp_path):
    with pytest.raises(ConfigError, match="token file"):
        api(server, token_file=str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="--ca-file"):
        api(server, ca_file=str(tmp_path / "none"))
