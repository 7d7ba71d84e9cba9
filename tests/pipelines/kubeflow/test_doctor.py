import json
import shlex

import pytest
import yaml

import mappo
from pipelines.__main__ import main
from tests.support.kubeflow_server import KubeflowServer
from tests.support.kubernetes_server import ClusterServer
from tests.support.overlays import IN_NAMESPACES, ROOT, applied, commands_of, namespace_of, of_kind
from tests.support.recordings import manifest_of, raw

NODE = {"status": {"allocatable": {"nvidia.com/gpu": "4"}}, "spec": {}}
GPU_SITE = """
image: mappo:{version}
stages:
  train: {{gpu_count: 2, node_selector: {{pool: gpu}}, tolerations: [{{key: gpu, operator: Exists}}]}}
"""
STORE_SECRET = {"accesskey": "YQ==", "secretkey": "Yg=="}
CONTROLLER = "/api/v1/namespaces/kubeflow/configmaps/workflow-controller-configmap"
# The rights of Kubeflow's own accounts, as far as a run needs them.
EDITOR = [
    {"apiGroups": ["", "argoproj.io"], "resources": ["configmaps", "secrets"], "verbs": ["get"]},
    {"apiGroups": ["argoproj.io"], "resources": ["workflowtaskresults"], "verbs": ["create", "patch"]},
]


def stock_defaults() -> str:
    """Return the workflowDefaults of a stock 2.17, which the controller merged into a run that was recorded."""
    defaults = manifest_of(raw("raw-training"))["spec"]["templateDefaults"]
    return yaml.safe_dump({"spec": {"templateDefaults": {"retryStrategy": defaults["retryStrategy"]}}})


def secret(namespace: str, name: str, **data: str) -> dict:
    return {"kind": "Secret", "metadata": {"namespace": namespace, "name": name}, "data": data}


def bound(namespace: str, account: str, rules: list[dict]) -> list[dict]:
    """Return an account with a role of these rules."""
    metadata = {"namespace": namespace, "name": account}
    subject = {"kind": "ServiceAccount", **metadata}
    return [
        {"kind": "ServiceAccount", "metadata": metadata},
        {"kind": "Role", "metadata": metadata, "rules": rules},
        {"kind": "RoleBinding", "metadata": metadata, "roleRef": {"name": account}, "subjects": [subject]},
    ]


@pytest.fixture
def kubernetes(monkeypatch, tmp_path):
    """The API server of a cluster with a stock Kubeflow, by the kubeconfig; profile `team` has everything."""
    with ClusterServer(tokens={"mine"}, namespaces={"team", "kubeflow"}) as server:
        namespace = "/api/v1/namespaces/team"
        for path in ("secrets/mappo-registry", "configmaps/mappo-monitoring"):
            server.add(f"{namespace}/{path}")
        server.apply(secret(each, "mlpipeline-minio-artifact", **STORE_SECRET) for each in ("team", "kubeflow"))
        keys = {"AWS_ACCESS_KEY_ID": "YQ==", "AWS_SECRET_ACCESS_KEY": "Yg=="}
        server.apply([secret("team", "mappo-s3", **keys), secret("team", "mappo-database", url="YQ==")])
        server.apply([*bound("team", "default-editor", EDITOR), *bound("kubeflow", "pipeline-runner", EDITOR)])
        server.add(CONTROLLER, data={"workflowDefaults": stock_defaults()})
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
def look(capsys):
    """Run the command; return the exit status, and the findings by check."""

    def run(*arguments: str) -> tuple[int, dict[str, dict]]:
        status = main(["doctor", *arguments, "--output", "json"])
        found = json.loads(capsys.readouterr().out)
        by_check = {each["check"]: each for each in found}
        assert len(by_check) == len(found), "a check is shown once"
        fixes = [each["fix"] for each in found if each["state"] != "ok" and each["fix"]]
        assert len(set(fixes)) == len(fixes), "nothing is said twice"
        return status, by_check

    return run


@pytest.fixture
def doctor(kubeflow, kubernetes, monkeypatch, tmp_path, look):
    """Look at profile `team` of a cluster of several users."""
    (tmp_path / "site.yaml").write_text(GPU_SITE.format(version=mappo.__version__))

    def run(*arguments: str) -> tuple[int, dict[str, dict]]:
        return look("--site", str(tmp_path / "site.yaml"), "--namespace", "team", *arguments)

    with KubeflowServer(multi_user=True) as server:
        monkeypatch.setenv("KF_PIPELINES_ENDPOINT", server.url)
        run.server = server
        yield run


def test_a_cluster_that_has_everything_is_well(doctor, s3):
    status, found = doctor("--store", f"s3://{s3}/runs", "--pipeline-root", f"s3://{s3}/root")
    assert status == 0
    assert {each["state"] for each in found.values()} == {"ok"}
    assert len(found) == 4 + 9 + 1 + 1 + 2  # Kubeflow; namespace, objects and rights; retries; nodes; stores


def test_stock_kubeflow_without_a_secret_of_ours_is_well(kubeflow, kubernetes, look):
    status, found = look("--image", f"mappo:{mappo.__version__}")
    assert status == 0
    assert found["secret mappo-s3"]["state"] == "ok"
    assert "Kubeflow's own store" in found["secret mappo-s3"]["detail"]
    assert found["config map kfp-launcher"]["detail"] == (
        "none; artifacts go to minio://mlpipeline/v2/artifacts with the keys of secret mlpipeline-minio-artifact"
    )
    assert found["rights of pipeline-runner"]["state"] == found["retries"]["state"] == "ok"


@pytest.mark.parametrize("overlay", IN_NAMESPACES)
def test_an_overlays_own_commands_leave_nothing_to_mend(overlay, kubeflow, kubernetes, look, monkeypatch):
    """Nothing fails, and what is missing is only what the overlay does without."""
    namespace, is_multi_user = namespace_of(overlay), namespace_of(overlay) != "kubeflow"
    if not of_kind(overlay, "Namespace") or of_kind(overlay, "Profile"):  # Kubeflow makes it, with the secret
        kubernetes.add(f"/api/v1/namespaces/{namespace}")
        kubernetes.apply([secret(namespace, "mlpipeline-minio-artifact", **STORE_SECRET)])
    kubernetes.apply(applied(overlay).objects)
    site = ROOT / "k8s" / "overlays" / overlay / "site.yaml"
    given = ["--site", str(site)] if site.exists() else ["--image", f"mappo:{mappo.__version__}"]
    with KubeflowServer(multi_user=is_multi_user, namespaces={namespace}) as server:
        monkeypatch.setenv("KF_PIPELINES_ENDPOINT", server.url)
        asked = ["--namespace", namespace] if is_multi_user else []
        status, found = look(*given, *asked, "--service-account", "mappo-runner")
    assert status == 0, [each for each in found.values() if each["state"] == "failed"]
    assert found["rights of mappo-runner"]["state"] == "ok"
    warned = {check for check, each in found.items() if each["state"] == "warning"}
    without = {"secret mappo-registry", "secret mappo-database", "config map mappo-monitoring"}
    without |= {"nodes for train", "nodes for tune"}
    assert warned <= without


def test_nothing_is_left_in_the_store(doctor, s3):
    from tests.support.services import s3_client

    doctor("--store", f"s3://{s3}/runs")
    with s3_client() as client:
        assert client.list_objects_v2(Bucket=s3).get("KeyCount") == 0


@pytest.mark.parametrize(
    ("path", "check", "state", "fix"),
    [
        ("secrets/mappo-registry", "secret mappo-registry", "warning", "docker-registry mappo-registry"),
        ("secrets/mappo-database", "secret mappo-database", "warning", "--from-literal=url="),
        (
            "configmaps/mappo-monitoring",
            "config map mappo-monitoring",
            "warning",
            "create configmap mappo-monitoring",
        ),
        (
            "serviceaccounts/default-editor",
            "service account default-editor",
            "failed",
            "create serviceaccount default-editor",
        ),
        ("", "namespace team", "failed", "--namespace"),
    ],
)
def test_what_is_missing_is_named_with_its_fix(doctor, kubernetes, path, check, state, fix):
    del kubernetes.objects[f"/api/v1/namespaces/team/{path}".rstrip("/")]
    status, found = doctor()
    assert status == (1 if state == "failed" else 0)
    assert found[check]["state"] == state
    assert fix in found[check]["fix"]


def test_secret_of_kubeflows_store_that_is_missing_fails_with_the_command_that_copies_it(doctor, kubernetes):
    path = "/api/v1/namespaces/team/secrets/mlpipeline-minio-artifact"
    del kubernetes.objects[path]
    status, found = doctor()
    assert status == 1
    missing = found["secret mlpipeline-minio-artifact"]
    assert missing["state"] == "failed"
    assert "waits for it for ever" in missing["detail"]
    assert missing["fix"].replace("team", "mappo") in commands_of("base"), "the command that was tried there"
    kubernetes.add(path, data={"accesskey": "YQ=="})
    assert "without secretkey" in doctor()[1]["secret mlpipeline-minio-artifact"]["detail"]


def test_secret_of_kubeflows_store_that_is_missing_in_kubeflow_itself_is_not_copied_onto_itself(
    kubeflow, kubernetes, look
):
    del kubernetes.objects["/api/v1/namespaces/kubeflow/secrets/mlpipeline-minio-artifact"]
    fix = look("--image", "mappo:1")[1]["secret mlpipeline-minio-artifact"]["fix"]
    assert "sed" not in fix
    assert "create secret generic mlpipeline-minio-artifact --from-literal=accesskey=" in fix


def test_s3_secret_is_missed_only_by_a_run_that_uses_s3(doctor, kubernetes):
    del kubernetes.objects["/api/v1/namespaces/team/secrets/mappo-s3"]
    assert doctor()[1]["secret mappo-s3"]["state"] == "ok"
    found = doctor("--pipeline-root", "s3://no-such-bucket-here/root")[1]["secret mappo-s3"]
    assert found["state"] == "warning"
    assert "create secret generic mappo-s3 --from-literal=AWS_ACCESS_KEY_ID=" in found["fix"]


def own_bucket() -> dict[str, str]:
    """Return the data of kfp-launcher in components/own-bucket."""
    path = ROOT / "k8s" / "components" / "own-bucket" / "kfp-launcher.yaml"
    return yaml.safe_load(path.read_text())["data"]


def test_secret_that_kfp_launcher_names_is_needed(doctor, kubernetes):
    data = own_bucket()
    data["providers"] = data["providers"].replace("mappo-s3", "another")
    kubernetes.add("/api/v1/namespaces/team/configmaps/kfp-launcher", data=data)
    status, found = doctor()
    assert status == 1
    assert found["config map kfp-launcher"]["detail"] == (
        "artifacts go to s3://mappo/pipelines with the keys of secret another"
    )
    assert found["secret another"]["state"] == "failed"
    assert "--from-literal=AWS_ACCESS_KEY_ID=" in found["secret another"]["fix"]
    assert "get secrets/another" in found["rights of default-editor"]["detail"]


def test_secret_that_stages_and_launcher_read_is_checked_once(doctor, kubernetes):
    kubernetes.add("/api/v1/namespaces/team/configmaps/kfp-launcher", data=own_bucket())
    assert doctor()[1]["secret mappo-s3"]["state"] == "ok"
    del kubernetes.objects["/api/v1/namespaces/team/secrets/mappo-s3"]
    assert doctor()[1]["secret mappo-s3"]["state"] == "failed"


def test_kfp_launcher_that_the_launcher_cannot_read_fails(doctor, kubernetes):
    data = own_bucket() | {"providers": "s3: {default: {endpoint: s3.example.org}}"}
    kubernetes.add("/api/v1/namespaces/team/configmaps/kfp-launcher", data=data)
    status, found = doctor()
    assert status == 1
    assert "lacks credentials" in found["config map kfp-launcher"]["detail"]


def test_rights_that_an_account_lacks_fail_with_the_commands_that_give_them(doctor, kubernetes):
    kubernetes.apply(bound("team", "mappo-runner", EDITOR[1:]))
    status, found = doctor("--service-account", "mappo-runner")
    assert status == 1
    rights = found["rights of mappo-runner"]
    assert rights["detail"] == "may not get configmaps/kfp-launcher, get secrets/mlpipeline-minio-artifact"
    role, binding = rights["fix"].splitlines()[2:]
    name = "mappo-runner-get-mlpipeline-minio-artifact"
    only = "--verb=get --resource=secrets --resource-name=mlpipeline-minio-artifact"
    assert role == f"kubectl -n team create role {name} {only}"
    assert binding == (
        f"kubectl -n team create rolebinding {name} --role={name} --serviceaccount=team:mappo-runner"
    )


def test_rights_that_may_not_be_asked_for_are_a_warning_with_the_question_for_an_administrator(doctor, kubernetes):
    kubernetes.forbidden = ["localsubjectaccessreviews"]
    status, found = doctor()
    assert status == 0
    rights = found["rights of default-editor"]
    assert rights["state"] == "warning"
    assert "cannot be read: 403" in rights["detail"]
    question = "auth can-i create workflowtaskresults.argoproj.io --as=system:serviceaccount:team:default-editor"
    assert f"kubectl -n team {question}" in rights["fix"]


@pytest.mark.parametrize(
    ("defaults", "state", "detail"),
    [
        (stock_defaults(), "ok", "Argo recreates lost pods (OnError)"),
        (
            "spec:\n  templateDefaults:\n    retryStrategy: {limit: 0, retryPolicy: Always}\n",
            "ok",
            "pods that failed (Always)",
        ),
        ("", "warning", "does not recreate lost pods"),
        (
            "spec:\n  ttlStrategy: {secondsAfterCompletion: 3600}\n",
            "warning",
            "has no templateDefaults.retryStrategy",
        ),
        ("spec:\n  templateDefaults:\n    retryStrategy: {limit: 2}\n", "warning", "retryPolicy is OnFailure"),
        (
            "spec:\n  templateDefaults:\n    retryStrategy: {limit: 2, retryPolicy: Always}\n",
            "warning",
            "recreates failed pods at every level",
        ),
        ("spec: {templateDefaults: {retryStrategy: {retryPolicy: Always}}}", "failed", "one line"),
        ("spec:\n  - [\n", "failed", "not YAML"),
        ("- spec\n- spec\n", "failed", "keys and values"),
        ("spec:\n  templateDefaults:\n    - timeout\n", "failed", "keys and values"),
        ("spec:\n  templateDefaults:\n    retryStrategy: 2\n", "failed", "limit and retryPolicy"),
        ("spec:\nmetadata:\n", "warning", "has no templateDefaults.retryStrategy"),
    ],
)
def test_losses_that_argo_tries_again_are_read_from_its_controller(doctor, kubernetes, defaults, state, detail):
    kubernetes.objects[CONTROLLER]["data"] = {"workflowDefaults": defaults} if defaults else None
    found = doctor()[1]["retries"]
    assert found["state"] == state
    assert detail in found["detail"]
    if state != "failed" and "every level" not in detail:
        assert "restarts its process in the pod" in found["detail"]


def test_controller_is_mended_by_a_block_that_keeps_its_other_defaults(doctor, kubernetes):
    kubernetes.objects[CONTROLLER]["data"] = {
        "workflowDefaults": "spec:\n  ttlStrategy: {secondsAfterFailure: 60}\n"
    }
    words = shlex.split(doctor()[1]["retries"]["fix"])
    assert words[:6] == ["kubectl", "-n", "kubeflow", "patch", "configmap", "workflow-controller-configmap"]
    patched = yaml.safe_load(words[words.index("--patch") + 1])["data"]
    assert len(patched["workflowDefaults"].splitlines()) > 5, "the controller reads it line by line"
    spec = yaml.safe_load(patched["workflowDefaults"])["spec"]
    assert spec["ttlStrategy"] == {"secondsAfterFailure": 60}
    kubernetes.objects[CONTROLLER]["data"] = patched
    assert doctor()[1]["retries"]["state"] == "ok"


def test_controller_keeps_the_limit_and_backoff_that_a_site_chose(doctor, kubernetes):
    strategy = {"limit": 10, "retryPolicy": "OnFailure", "backoff": {"duration": "1m"}}
    defaults = yaml.safe_dump({"spec": {"templateDefaults": {"retryStrategy": strategy}}})
    kubernetes.objects[CONTROLLER]["data"] = {"workflowDefaults": defaults}
    words = shlex.split(doctor()[1]["retries"]["fix"])
    patched = yaml.safe_load(yaml.safe_load(words[words.index("--patch") + 1])["data"]["workflowDefaults"])
    assert patched["spec"]["templateDefaults"]["retryStrategy"] == {**strategy, "retryPolicy": "Always"}


def test_several_users_without_a_namespace_are_asked_for_it_and_nothing_else_is_guessed(
    kubernetes, look, monkeypatch
):
    with KubeflowServer(multi_user=True) as server:
        monkeypatch.setenv("KF_PIPELINES_ENDPOINT", server.url)
        status, found = look("--image", f"mappo:{mappo.__version__}")
    assert status == 1
    assert [check for check, each in found.items() if each["state"] == "failed"] == ["namespace"]
    assert not any(check.startswith(("secret", "service account", "rights")) for check in found)


@pytest.mark.parametrize("is_missing", [True, False])
def test_controller_that_cannot_be_read_is_a_warning(doctor, kubernetes, is_missing):
    if is_missing:
        del kubernetes.objects[CONTROLLER]
    else:
        kubernetes.forbidden = ["workflow-controller-configmap"]
    found = doctor()[1]["retries"]
    assert found["state"] == "warning"
    assert ("does not exist" if is_missing else "cannot be read") in found["detail"]


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


@pytest.mark.parametrize(
    ("server", "state", "detail"),
    [
        ("2.17.0", "ok", "server 2.17.0, SDK 2.17.3: tried on a real cluster"),
        ("2.16.1", "warning", "known from its sources alone"),
        ("2.15.0", "warning", "known from its sources alone"),
        ("2.5.0", "warning", "server 2.5.0, SDK 2.17.3: never tried"),
        ("unknown", "warning", "server does not tell its version"),
    ],
)
def test_versions_that_were_not_tried_are_a_warning(doctor, monkeypatch, server, state, detail):
    monkeypatch.setattr(KubeflowServer, "_healthz", lambda self: {"tag_name": server, "multi_user": True})
    found = doctor()[1]["versions"]
    assert found["state"] == state
    assert detail in found["detail"]


def test_an_api_that_is_not_there_is_one_line_that_says_how_to_reach_it(kubeflow, kubernetes, look, monkeypatch):
    kubeflow.stop()
    monkeypatch.setattr("pipelines.commands.doctor._PATIENCE_SECONDS", 0.0)
    status, found = look("--image", f"mappo:{mappo.__version__}")
    assert status == 1
    assert [check for check, each in found.items() if each["state"] == "failed"] == ["API"]
    assert "kubectl -n kubeflow port-forward svc/ml-pipeline 8888:8888" in found["API"]["fix"]
    assert "--namespace" not in str(found)
    assert found["secret mlpipeline-minio-artifact"]["state"] == "ok", "the rest is checked"


def test_a_cluster_that_is_not_there_is_one_line(kubeflow, kubernetes, look, monkeypatch):
    """Without an endpoint, Kubeflow and Kubernetes are asked in the same way."""
    kubernetes.stop()
    monkeypatch.delenv("KF_PIPELINES_ENDPOINT")
    monkeypatch.setattr("pipelines.commands.doctor._PATIENCE_SECONDS", 0.0)
    status, found = look("--image", f"mappo:{mappo.__version__}")
    assert status == 1
    assert set(found) == {"image", "API"}


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


def test_a_kubernetes_that_does_not_answer_is_one_line(doctor, kubernetes):
    kubernetes.stop()
    found = doctor()[1]
    assert found["Kubernetes"]["state"] == "warning"
    assert "secret mappo-s3" not in found


def test_findings_for_people_name_the_fix_below(doctor, capsys, tmp_path):
    assert main(["doctor", "--image", "mappo:latest", "--namespace", "team"]) == 0
    shown = capsys.readouterr().out
    assert "warning  image: latest means another image each week" in shown
    assert "\n         use a tag that stays" in shown


def test_a_fix_of_several_lines_can_be_copied_into_a_shell(doctor, kubernetes, capsys):
    kubernetes.objects[CONTROLLER]["data"] = None
    main(["doctor", "--image", "mappo:1", "--namespace", "team"])
    shown = capsys.readouterr().out
    command = shown[shown.index("kubectl -n kubeflow patch") :].partition("\nwarning")[0]
    patch = shlex.split(command)[-1]
    assert "retryPolicy: OnError" in yaml.safe_load(patch)["data"]["workflowDefaults"]
