import json

import pytest

import mappo
from pipelines.__main__ import main
from tests.kubeflow_server import KubeflowServer, KubernetesServer

NODE = {"status": {"allocatable": {"nvidia.com/gpu": "4"}}, "spec": {}}
GPU_SITE = """
image: mappo:{version}
stages:
  train: {{gpu_count: 2, node_selector: {{pool: gpu}}, tolerations: [{{key: gpu, operator: Exists}}]}}
"""


@pytest.fixture
def kubernetes(monkeypatch, tmp_path):
    """The API server of a cluster that has everything, by the kubeconfig."""
    with KubernetesServer(tokens={"mine"}) as server:
        namespace = "/api/v1/namespaces/team"
        for path in ("secrets/mappo-registry", "configmaps/mappo-monitoring"):
            server.add(f"{namespace}/{path}")
        server.add(f"{namespace}/secrets/mappo-database", data={"url": "YQ=="})
        keys = {"AWS_ACCESS_KEY_ID": "YQ==", "AWS_SECRET_ACCESS_KEY": "Yg=="}
        server.add(f"{namespace}/secrets/mappo-s3", data=keys)
        server.add(f"{namespace}/serviceaccounts/default-editor")
        server.add("/api/v1/nodes/big", labels={"pool": "gpu"}, **NODE)
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "here",
            "clusters": [{"name": "c", "cluster": {"server": server.url}}],
            "users": [{"name": "u", "user": {"token": "mine"}}],
            "contexts": [{"name": "here", "context": {"cluster": "c", "user": "u", "namespace": "team"}}],
        }
        path = tmp_path / "kubeconfig"
        path.write_text(json.dumps(config))
        monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(path))
        yield server


@pytest.fixture
def doctor(kubeflow, kubernetes, monkeypatch, tmp_path, capsys):
    """Look at a cluster of several users; the exit status, and state and detail by check."""
    (tmp_path / "site.yaml").write_text(GPU_SITE.format(version=mappo.__version__))

    def look(*arguments: str) -> tuple[int, dict[str, dict]]:
        given = ["--site", str(tmp_path / "site.yaml"), "--namespace", "team", *arguments]
        status = main(["doctor", *given, "--output", "json"])
        return status, {each["check"]: each for each in json.loads(capsys.readouterr().out)}

    with KubeflowServer(multi_user=True) as server:
        monkeypatch.setenv("KF_PIPELINES_ENDPOINT", server.url)
        look.server = server
        yield look


def test_a_cluster_that_has_everything_is_well(doctor, s3):
    status, found = doctor("--store", f"s3://{s3}/runs", "--pipeline-root", f"s3://{s3}/root")
    assert status == 0
    assert {each["state"] for each in found.values()} == {"ok"}
    assert len(found) == 15 - 2  # image, API, versions, credentials, 7 objects, nodes, two stores


def test_nothing_is_left_in_the_store(doctor, s3):
    from tests.services import s3_client

    doctor("--store", f"s3://{s3}/runs")
    with s3_client() as client:
        assert client.list_objects_v2(Bucket=s3).get("KeyCount") == 0


@pytest.mark.parametrize(
    ("path", "check", "state", "fix"),
    [
        ("secrets/mappo-s3", "secret mappo-s3", "warning", "create secret generic mappo-s3"),
        ("secrets/mappo-registry", "secret mappo-registry", "warning", "docker-registry mappo-registry"),
        ("secrets/mappo-database", "secret mappo-database", "warning", "--from-literal=url="),
        ("configmaps/mappo-monitoring", "config map mappo-monitoring", "warning", "kubectl apply -k"),
        ("serviceaccounts/default-editor", "service account default-editor", "warning", "--service-account"),
        ("", "namespace team", "failed", "--namespace"),
    ],
)
def test_what_is_missing_is_named_with_its_fix(doctor, kubernetes, path, check, state, fix):
    del kubernetes.objects[f"/api/v1/namespaces/team/{path}".rstrip("/")]
    status, found = doctor()
    assert status == (1 if state == "failed" else 0)
    assert found[check]["state"] == state
    assert fix in found[check]["fix"]


def test_a_secret_without_the_keys_that_are_read_is_a_warning(doctor, kubernetes):
    kubernetes.objects["/api/v1/namespaces/team/secrets/mappo-s3"]["data"] = {"accesskey": "YQ=="}
    found = doctor()[1]["secret mappo-s3"]
    assert found["state"] == "warning"
    assert "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" in found["detail"]


def test_what_may_not_be_looked_at_is_a_warning(doctor, kubernetes):
    kubernetes.forbidden = ["secrets", "nodes"]
    status, found = doctor()
    assert status == 0
    assert found["secret mappo-s3"]["state"] == found["nodes for train"]["state"] == "warning"
    assert "403" in found["nodes for train"]["detail"]


def test_gpus_labels_and_taints_of_nodes_are_compared_with_the_site(doctor, kubernetes):
    node = kubernetes.objects["/api/v1/nodes/big"]
    node["spec"] = {"taints": [{"key": "gpu", "value": "yes", "effect": "NoSchedule"}]}
    assert doctor()[1]["nodes for train"]["state"] == "ok"
    node["spec"] = {"taints": [{"key": "spot", "value": "yes", "effect": "NoSchedule"}]}
    status, found = doctor()
    assert status == 1
    assert "spot=yes:NoSchedule" in found["nodes for train"]["detail"]
    node["spec"], node["status"] = {}, {"allocatable": {"nvidia.com/gpu": "1"}}
    assert "none with 2 x nvidia.com/gpu" in doctor()[1]["nodes for train"]["detail"]
    node["status"], node["metadata"]["labels"] = NODE["status"], {}
    assert doctor()[1]["nodes for train"]["state"] == "warning"


def test_credentials_that_are_refused_fail_with_the_reason(doctor):
    doctor.server.tokens = {"another"}
    status, found = doctor()
    assert status == 1
    assert "missing, wrong or expired" in found["API"]["detail"]


def test_a_foreign_namespace_fails_with_the_reason(doctor):
    status, found = doctor("--namespace", "foreign")
    assert status == 1
    assert "may not do that here" in found["namespace"]["detail"]


def test_another_version_of_the_server_is_said(doctor, monkeypatch):
    monkeypatch.setattr(KubeflowServer, "_healthz", lambda self: {"tag_name": "2.5.0", "multi_user": True})
    found = doctor()[1]["versions"]
    assert found["state"] == "warning"
    assert "server 2.5.0, SDK 2.17.0" in found["detail"]


def test_an_image_of_another_version_or_none_is_said(doctor):
    assert doctor("--image", "mappo:0.0.1")[1]["image"]["state"] == "warning"


def test_a_store_that_cannot_be_written_fails_with_the_reason(doctor, s3):
    status, found = doctor("--store", "s3://no-such-bucket-here/runs")
    assert status == 1
    assert "no-such-bucket-here" in found["store"]["detail"]


def test_without_a_kubeconfig_the_rest_is_looked_at(doctor, monkeypatch, tmp_path):
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "none"))
    status, found = doctor()
    assert status == 0
    assert found["Kubernetes"]["state"] == "warning"
    assert found["credentials"]["state"] == "ok"


def test_findings_for_people_name_the_fix_below(doctor, capsys, tmp_path):
    assert main(["doctor", "--image", "mappo:latest", "--namespace", "team"]) == 0
    shown = capsys.readouterr().out
    assert "warning  image: latest means another image each week" in shown
    assert "\n         use a tag that stays" in shown
