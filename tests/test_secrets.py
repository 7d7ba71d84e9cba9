"""The secrets of all commands: none is shown, however malformed it is; canaries in every variable and file."""

import itertools
import json
import logging
import random
import re
from functools import partial
from pathlib import Path

import pytest

import components.__main__
import mappo.__main__
import pipelines.__main__
from mappo.config import from_dict
from mappo.monitoring.tracking import tracked_run
from mappo.runs import retries
from pipelines.kubeflow.api import Api
from tests import conftest
from tests.cli.test_main import TINY
from tests.support.kubeflow_server import KubeflowServer
from tests.support.services import use_s3
from tests.support.surroundings import set_surroundings
from tests.support.webhook import receiver

CANARY = "canary5f1d"
SECRETS = {  # a name of the mistake: the secret
    "none": CANARY,
    "newline at the end": f"{CANARY}\n",
    "newline inside": f"a\n{CANARY}",
    "carriage return": f"a\r{CANARY}",
    "control characters": f"\x1b\x7f{CANARY}",
    "at": f"a@{CANARY}@b",
    "slash": f"a/{CANARY}",
    "question mark": f"a?{CANARY}#b",
    "percent": f"%zz{CANARY}%",
    "colon": f"a:{CANARY}",
    "bracket": f"[{CANARY}",
    "brace": f"{{{CANARY}: [",
    "quotes": f"'{CANARY}\"",
    "space": f"a {CANARY}",
    "not ASCII": f"é€{CANARY}",
    "compatibility character": f"℀{CANARY}",
    "not UTF-8": f"\udcff{CANARY}",
}
TEXT = "{}"
URLS = ("http://user:{}@127.0.0.1:9/path", "http://user:{}", "http:/user:{}@host", "{}@127.0.0.1:9")
PROVIDERS = [TEXT, "minio: {{default: {{endpoint: 'user:{}@127.0.0.1:9'}}}}", "minio: {{default: {{region: {}}}}}"]
STORE = {  # variable: the forms of its value
    "AWS_ACCESS_KEY_ID": [TEXT],
    "AWS_SECRET_ACCESS_KEY": [TEXT],
    "AWS_SESSION_TOKEN": [TEXT],
    "AWS_DEFAULT_REGION": [TEXT],
    "AWS_ENDPOINT_URL": URLS,
    "AWS_ENDPOINT_URL_S3": URLS,
    "MAPPO_MINIO_ENDPOINT": URLS,
    "MAPPO_KUBEFLOW_ACCESS_KEY": [TEXT],
    "MAPPO_KUBEFLOW_SECRET_KEY": [TEXT],
    "MAPPO_KUBEFLOW_PROVIDERS": PROVIDERS,
    "http_proxy": URLS,
}
REPORTING = {
    "MLFLOW_TRACKING_URI": URLS,
    "MLFLOW_TRACKING_USERNAME": [TEXT],
    "MLFLOW_TRACKING_PASSWORD": [TEXT],
    "MLFLOW_TRACKING_TOKEN": [TEXT],
    "MAPPO_NOTIFY_URL": [*URLS, "http://127.0.0.1:9/{}"],
    "MAPPO_NOTIFY_FORMAT": [TEXT],
}
KUBEFLOW = {
    "KF_PIPELINES_TOKEN": [TEXT],
    "KF_PIPELINES_COOKIE": [TEXT],
    "KF_PIPELINES_ENDPOINT": URLS,
    "KF_PIPELINES_ROOT": ["s3://user:{}@bucket/x"],
    "http_proxy": URLS,
}
DATABASE = (
    *("{}", "postgresql://user:{}@127.0.0.1:9/name", "postgresql://{}@127.0.0.1:9/name", "postgresql://user:{}"),
    *(
        "postgresql://127.0.0.1:9/name?password={}",
        "postgresql://user:p@127.0.0.1:9/name?{}",
        "sqlite://user:{}@/name",
    ),
    *("mysql://user:{}@127.0.0.1/name", "sqlite+pysqlcipher://:{}@/name", "postgresql:/user:{}@127.0.0.1:9/name"),
)


FEW = pytest.mark.parametrize("number", [4, pytest.param(1000, marks=pytest.mark.long)], ids=["few", "all"])


def values(name, forms, number):
    """Return malformed secrets in each form: all, or a sample of this number that depends on the name."""
    every = [form.format(secret) for form, secret in itertools.product(forms, SECRETS.values())]
    return every if number > len(every) else random.Random(name).sample(every, number)


@pytest.fixture
def shown(monkeypatch, tmp_path, capfd, caplog):
    """Return a function that runs a command in this process and requires a status, one line, and no canary."""
    set_surroundings()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("no_proxy", "")
    make_retrying = retries.make_retrying
    for module in ("mappo.runs.s3_store", "mappo.tuning.database"):  # nothing is retried for a minute
        once = lambda is_retryable, _, *rest: make_retrying(is_retryable, 0.0, *rest)  # noqa: E731
        monkeypatch.setattr(f"{module}.make_retrying", once)
    monkeypatch.setattr(Api, "_is_exhausted", lambda *_: True)
    caplog.set_level(logging.DEBUG, "mappo")

    def run(program, *arguments: str) -> str:
        try:
            status = program.main([*arguments])
        except SystemExit as end:
            status = end.code
        out, err = capfd.readouterr()
        text = f"{out}{err}{caplog.text}"
        caplog.clear()
        assert CANARY not in text, (arguments, status)
        assert "Traceback" not in text
        assert status in range(4), (arguments, status)
        return text

    return run


@FEW
@pytest.mark.parametrize("variable", STORE)
def test_commands_that_reach_a_store_show_no_secret(shown, monkeypatch, moto_endpoint, variable, number):
    bucket, scheme = use_s3(monkeypatch, moto_endpoint), "s3"
    if "KUBEFLOW" in variable or "MINIO" in variable:
        scheme = "minio"
        for name in ("ACCESS", "SECRET"):
            monkeypatch.setenv(f"MAPPO_KUBEFLOW_{name}_KEY", "test")
    for value in values(variable, STORE[variable], number):
        monkeypatch.setenv(variable, value)
        shown(mappo.__main__, "checkpoints", "list", f"{scheme}://{bucket}/runs/first")


@pytest.mark.parametrize(
    "mistakes", [["none"], pytest.param(["newline inside", "at", "percent"], marks=pytest.mark.long)]
)
def test_every_command_with_a_store_shows_no_secret(shown, monkeypatch, moto_endpoint, tmp_path, mistakes):
    """Try all commands with secrets in all variables at once."""
    mappo_main, bucket = partial(shown, mappo.__main__), use_s3(monkeypatch, moto_endpoint)
    for mistake in mistakes:
        for variable in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
            monkeypatch.setenv(variable, SECRETS[mistake])
        for variable in ("KF_PIPELINES_TOKEN", "KF_PIPELINES_COOKIE", "MAPPO_KUBEFLOW_ACCESS_KEY"):
            monkeypatch.setenv(variable, SECRETS[mistake])
        store, run = f"s3://{bucket}/runs", f"s3://{bucket}/runs/{mistake.replace(' ', '-')}"
        mappo_main("train", *TINY, "--store", store, "--run", mistake.replace(" ", "-"))
        for action in ("list", "show", "verify", "prune", "gc"):
            mappo_main("checkpoints", action, run)
        for action in ("list", "show", "history", "rollback", "export"):
            mappo_main("champion", action, f"s3://{bucket}/champions")
        mappo_main("evaluate", run)
        mappo_main("report", run)
        for arguments in (["show-config"], ["recipes"], ["schema", "decision"], ["compare", "none.json"]):
            mappo_main(*arguments)
        shown(pipelines.__main__, "compile", "--pipeline=training", "--image", "a:1")
        if mistake == "none":
            continue  # what follows takes long
        mappo_main("promote", run, "--gate.num-seeds=2", "--champions", f"s3://{bucket}/champions")
        artifacts = {"report": {"artifacts": [{"uri": f"s3://{bucket}/a/pipeline/run/stage/execution/report"}]}}
        executor_input = json.dumps({"outputs": {"artifacts": artifacts}})
        shown(components.__main__, "nothing", "--executor_input", executor_input)
        with monkeypatch.context() as patch:
            patch.setenv("MAPPO_COMPILED", f"s3://user:{CANARY}@bucket/x")
            mappo_main("validate", *TINY)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert [path for path in files if CANARY.encode() in path.read_bytes()] == []


@FEW
@pytest.mark.parametrize("variable", REPORTING)
def test_mlflow_and_webhooks_show_no_secret(shown, monkeypatch, tmp_path, variable, number):
    """Log a number to a server that echoes what it gets, and send it a message."""
    monkeypatch.setattr("mappo.monitoring.tracking._END_SECONDS", 2.0)
    monkeypatch.setattr("mappo.reporting.webhook._DEADLINE_SECONDS", 2.0)
    with receiver() as server:
        server.status = 400
        for value in values(variable, REPORTING[variable], number):
            monkeypatch.setenv("MLFLOW_TRACKING_URI", server.url)
            monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "user")
            monkeypatch.setenv("MAPPO_NOTIFY_URL", server.url)
            monkeypatch.setenv(variable, value)
            shown(mappo.__main__, "evaluate", "none", "--notify")
            with tracked_run(from_dict(conftest.TINY), "a", "b") as tracked:
                tracked.measured(0, {"a": 1.0})
            shown(mappo.__main__, "recipes")  # requires that what was logged meanwhile holds no canary
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert [path for path in files if CANARY.encode() in path.read_bytes()] == []


@FEW
@pytest.mark.parametrize("form", DATABASE)
def test_commands_of_studies_show_no_secret(shown, monkeypatch, form, number):
    mappo_main = partial(shown, mappo.__main__)
    for value in values(form, [form], number):
        monkeypatch.setenv("MAPPO_DATABASE", value)
        mappo_main("study", "list")
    mappo_main("study", "work", "first")
    for action in ("show", "export", "resume", "delete"):
        mappo_main("study", action, "first")
    mappo_main("tune", "--study", "first", *TINY)


@FEW
@pytest.mark.parametrize("variable", KUBEFLOW)
def test_commands_for_kubeflow_show_no_secret(shown, monkeypatch, kubeflow: KubeflowServer, variable, number):
    monkeypatch.setenv("no_proxy", "")
    for value in values(variable, KUBEFLOW[variable], number):
        monkeypatch.setenv(variable, value)
        text = shown(pipelines.__main__, "runs", "list")
        if variable == "KF_PIPELINES_TOKEN" and not value.strip().isprintable():
            assert "KF_PIPELINES_TOKEN: holds a line break" in text
    for arguments in (
        *(["runs", action, "latest"] for action in ("show", "watch", "cancel", "retry")),
        ["runs", "logs", "train"],
        *(["artifacts", action, "latest"] for action in ("list", "fetch")),
        ["schedule", "list"],
        *(["schedule", action, "nightly"] for action in ("show", "pause", "resume", "delete", "trigger")),
        ["schedule", "create", "nightly", "--cron", "@daily", "--image", "a:1"],
        ["submit", "--image", "a:1"],
        ["doctor"],
    ):
        shown(pipelines.__main__, *arguments)


@pytest.mark.parametrize(
    "mistake",
    [
        *("none", "newline inside", "quotes", "not UTF-8"),
        *(pytest.param(mistake, marks=pytest.mark.long) for mistake in SECRETS),
    ],
)
def test_files_with_secrets_are_not_shown(shown, monkeypatch, kubeflow: KubeflowServer, tmp_path, mistake):
    """Put the canary into a token file, into the kubeconfig and into the site's file."""
    secret, pipelines_main = SECRETS[mistake], partial(shown, pipelines.__main__)
    file = tmp_path / "file"
    file.write_text(secret, errors="surrogateescape")
    pipelines_main("runs", "list", "--token-file", str(file))
    pipelines_main("doctor", "--token-file", str(file))
    file.write_text(f"minio_endpoint: 'http://user:{secret}'\nimage: a:1\n", errors="surrogateescape")
    pipelines_main("compile", "--site", str(file))
    monkeypatch.delenv("KF_PIPELINES_ENDPOINT")
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(file))
    address = kubeflow.url.removeprefix("http://")
    for text in (
        kubeconfig(kubeflow.url, {"token": secret}),
        kubeconfig(f"http://user:{secret}@{address}", {}),
        kubeconfig(kubeflow.url, {"username": "a", "password": secret}),
        kubeconfig(kubeflow.url, {"client-key-data": secret, "client-certificate-data": secret}),
        f"token: {secret}\nclusters: [",
        f"{secret}: &a\n  - {secret}",
        f"apiVersion: v1\nusers:\n- {secret}\ncurrent-context: {secret[:1]}",
    ):
        file.write_text(text, errors="surrogateescape")
        pipelines_main("runs", "list")
        pipelines_main("doctor")


def kubeconfig(server: str, user: dict[str, str]) -> str:
    context = {"cluster": "c", "user": "u", "namespace": "team"}
    return json.dumps(
        {
            "current-context": "here",
            "clusters": [{"name": "c", "cluster": {"server": server}}],
            "users": [{"name": "u", "user": user}],
            "contexts": [{"name": "here", "context": context}],
        },
        ensure_ascii=False,
    )


def test_every_variable_that_holds_a_secret_is_tried():
    """Compare with the variables that the documents name."""
    text = "".join(path.read_text() for path in Path(__file__).parents[1].joinpath("docs").glob("*.md"))
    words = re.findall(
        r"\b(?:AWS|KF_PIPELINES|MAPPO|MLFLOW)_\w*(?:KEY|KEY_ID|TOKEN|COOKIE|URL|URI|PASSWORD|DATABASE)\b", text
    )
    assert set(words) <= {*STORE, *KUBEFLOW, *REPORTING, "MAPPO_DATABASE"}
