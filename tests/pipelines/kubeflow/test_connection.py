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
from pipelines.kubeflow.api import Api, Trying
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


def api(server: KubeflowServer, patience_seconds: float = 20.0, said: list | None = None, **how) -> Api:
    announce = said.append if said is not None else lambda _: None
    return Api(Connection(endpoint=server.url, **how), patience_seconds=patience_seconds, announce=announce)


def submitted(kubeflow: Api) -> str:
    return client.submit(kubeflow, Submission(TRAINING)).run_id


@pytest.mark.parametrize("status", [429, 502, 503, 504])
def test_a_transient_error_is_said_and_tried_again(server, status):
    said: list[Trying] = []
    kubeflow = api(server, said=said)
    server.fail(status, times=2)
    assert client.runs(kubeflow, 1) == []
    assert [(trying.tries, trying.is_over) for trying in said] == [(1, False), (2, False), (3, True)]
    assert str(status) in said[0].reason
    assert 0 < said[0].seconds < said[1].seconds < said[2].seconds


def test_the_pause_is_as_long_as_the_server_asks_for(server):
    server.fail(429, times=1, headers={"Retry-After": "2"})
    began = time.monotonic()
    assert client.runs(api(server), 1) == []
    assert time.monotonic() - began > 2


def test_error_500_is_tried_three_times_and_no_longer(server):
    """The server gives it for some mistakes of users too."""
    server.fail(500, times=100, path="/runs")
    with pytest.raises(ApiError, match="500"):
        client.runs(api(server), 1)
    assert server.count("GET", "/runs") == 3


def test_an_error_that_lasts_ends_with_the_patience_and_its_reason(server):
    server.fail(503, times=1000)
    with pytest.raises(ApiError, match="503"):
        client.runs(api(server, patience_seconds=1), 1)


@pytest.mark.parametrize("status", [400, 403, 404, 409])
def test_an_error_that_stays_is_not_tried_again(server, status):
    server.fail(status, times=1, path="/runs")
    with pytest.raises(ApiError) as error:
        client.runs(api(server), 1)
    assert error.value.status == status
    assert server.count("GET", "/runs") == 1


def test_a_server_that_restarts_is_waited_for(server):
    kubeflow = api(server)
    assert client.runs(kubeflow, 1) == []
    server.stop()
    threading.Timer(1.5, server.start).start()
    assert client.runs(kubeflow, 1) == []


def test_no_server_is_an_error_that_names_the_endpoint():
    kubeflow = Api(Connection(endpoint="http://127.0.0.1:1"), patience_seconds=0.5)
    with pytest.raises(ApiError, match=r"http://127\.0\.0\.1:1: no answer: .*refused"):
        client.runs(kubeflow, 1)


def test_a_run_whose_answer_was_lost_is_found_and_not_started_twice(server):
    server.drop(method="POST", path="/runs", after=True)
    run_id = submitted(api(server))
    assert list(server.runs) == [run_id]


def test_a_run_whose_request_was_lost_is_started_once(server):
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


def test_a_token_that_stays_expired_is_explained_and_not_tried_for_long(server):
    server.tokens = {"new"}
    began = time.monotonic()
    with pytest.raises(ApiError, match="missing, wrong or expired") as error:
        client.runs(api(server, token="old"), 1)
    assert error.value.status == 401
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("credential", ["token", "cookie"])
def test_space_around_credentials_is_taken_off(server, credential, tmp_path):
    server.tokens, server.cookies = {"abc"}, {"abc"}
    given = {"token": " abc\r\n", "cookie": "authservice_session=abc\n"}[credential]
    assert client.runs(api(server, **{credential: given}), 1) == []


@pytest.mark.parametrize("credential", ["token", "cookie"])
@pytest.mark.parametrize("inside", ["\n", "\r", "\t", "\0", "\x7f", "é"])
def test_credentials_that_no_header_may_hold_are_refused_without_showing_them(credential, inside):
    with pytest.raises(ConfigError, match=f"KF_PIPELINES_{credential.upper()}: holds a line break") as error:
        Connection(endpoint="http://kubeflow.invalid", **{credential: f"secret{inside}secret"})
    assert "secret" not in str(error.value)


def test_a_token_file_with_several_lines_is_refused_without_showing_it(server, tmp_path):
    (tmp_path / "token").write_text("secret\nsecret\n")
    with pytest.raises(ConfigError, match=f"token file {tmp_path}/token: holds a line break") as error:
        api(server, token_file=str(tmp_path / "token"))
    assert "secret" not in str(error.value)


def test_a_connection_shows_no_credentials():
    assert "secret" not in repr(Connection(token="secret", cookie="secret"))


def test_a_cookie_of_a_session_is_enough(server):
    server.tokens, server.cookies = set(), {"abc"}
    assert client.runs(api(server, cookie="authservice_session=abc"), 1) == []


def test_a_login_page_is_recognised_and_explained(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    with (
        KubeflowServer(tokens=set(), login_page=True) as server,
        pytest.raises(ApiError, match="a login page answered instead of the API"),
    ):
        client.runs(api(server), 1)


def test_a_login_page_that_is_served_with_200_is_recognised_too(server):
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


def test_without_an_endpoint_the_kubeconfig_leads_to_the_api(monkeypatch, tmp_path):
    with KubeflowServer(tokens={"mine"}) as server:
        server.prefix = PROXY
        path = kubeconfig(server, tmp_path / "config", {"token": "mine"})
        monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", path)
        assert client.runs(Api(Connection()), 1) == []
        assert client.runs(Api(Connection(context="there")), 1) == []
        with pytest.raises(ConfigError, match="kubeconfig"):
            Api(Connection(context="nowhere"))


def test_several_users_are_not_told_apart_by_the_clusters_own_api(monkeypatch, tmp_path):
    """It removes the credentials once it has checked them."""
    with KubeflowServer(multi_user=True, tokens={"mine"}) as server:
        server.prefix = PROXY
        path = kubeconfig(server, tmp_path / "config", {"token": "mine"})
        monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", path)
        with pytest.raises(ConfigError, match="gateway's address by --endpoint"):
            assert Api(Connection()).namespace


def test_a_proxy_of_the_environment_is_heeded(monkeypatch, server):
    """The server stands for the proxy; the address itself does not exist."""
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
def test_a_proxy_is_written_in_many_ways(monkeypatch, variable, proxy, no_proxy, expected):
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


def test_a_kubeconfig_that_fetches_tokens_by_a_command_fetches_another(monkeypatch, tmp_path):
    """As aws, gcloud and kubelogin do."""
    command = tmp_path / "login"
    command.write_text(
        "#!/bin/sh\n"
        'printf \'{"apiVersion":"client.authentication.k8s.io/v1",\'\n'
        f'printf \'"kind":"ExecCredential","status":{{"token":"%s"}}}}\' $(cat {tmp_path}/now)\n'
    )
    command.chmod(0o755)
    (tmp_path / "now").write_text("first")
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
        (tmp_path / "now").write_text("second")
        assert client.runs(kubeflow, 1) == []


def test_nothing_that_leads_to_kubeflow_is_an_error_that_says_what_would(monkeypatch, tmp_path):
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="--endpoint or KF_PIPELINES_ENDPOINT"):
        Api(Connection())


def test_in_a_pod_its_own_files_lead_to_the_api(monkeypatch, tmp_path):
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


def test_several_users_need_a_namespace_and_one_user_none(monkeypatch, tmp_path):
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
